"""Small language models to generate with, and the slow way to generate that needs no memory."""

import jax
import jax.numpy as jnp

from refax import nnx

VOCABULARY = 23


class Model(nnx.Module):
  """A decoder of two blocks whose output shares the table of its tokens."""

  def __init__(self, seed=0, *, vocabulary=VOCABULARY, size=8, **options):
    rngs = nnx.Rngs(seed)
    self.embed = nnx.Embed(vocabulary, size, rngs=rngs)
    options = {"scan_layers": False, "rope": nnx.RoPE(), "num_kv_heads": 1} | options
    self.decoder = nnx.TransformerDecoder(2, size, 2, rngs=rngs, **options)

  def __call__(self, tokens, *, decode=False):
    x = self.decoder(3 * self.embed(tokens), decode=decode)
    return 3 * self.embed.attend(x)


@nnx.jit
def logits_after(model, tokens, length):
  return model(tokens)[0, length - 1]


def naive(model, prompt, count, *, pick=None, stop=()):
  """Tokens one by one, each from all before it; `pick(logits, all so far, i)` chooses."""
  tokens = list(prompt)
  for i in range(count):
    padded = jnp.array([tokens + [0] * (64 - len(tokens))])
    logits = logits_after(model, padded, len(tokens))
    token = int(logits.argmax() if pick is None else pick(logits, tokens, i))
    tokens.append(token)
    if token in stop:
      break
  return tokens[len(prompt) :]


def prompts(seed, *sizes):
  keys = jax.random.split(jax.random.key(seed), len(sizes))
  return [
    jax.random.randint(key, (n,), 0, VOCABULARY).tolist()
    for key, n in zip(keys, sizes, strict=True)
  ]
