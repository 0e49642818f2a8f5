"""Writing: the memory of keys and values is a Variable, so a loop around the model is plain JAX."""

import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from examples.chars.model import LENGTH, CharModel
from examples.chars.text import decode, encode
from refax import nnx


@jax.jit
def memorize(model: CharModel, prompt: jax.Array) -> jax.Array:
  """Put a prompt `[length]` into the memory; the most likely character after it."""
  return model(prompt[None], decode=True)[0, -1].argmax()


@jax.jit
def write_most_likely(model: CharModel, first: jax.Array, steps: jax.Array) -> jax.Array:
  """The text from `first` on: one `jax.lax.scan`, whose carry is one character and no memory."""

  def step(character, _):
    return model(character[None, None], decode=True)[0, -1].argmax(), character

  return jax.lax.scan(step, first, steps)[1]


def by_hand(model: CharModel, prompt: str, count: int) -> str:
  """What `nnx.generate(model, encode(prompt), count)` does, written in plain JAX."""
  nnx.init_cache(model, batch_size=1, max_length=LENGTH)
  first = memorize(model, jnp.asarray(encode(prompt)))
  return decode(write_most_likely(model, first, jnp.arange(count)).tolist())


class Writer:
  """Yields text as it comes, and knows how fast that was."""

  def __init__(self, model: CharModel, *, temperature: float, seed: int):
    s = nnx.samplers
    self.model = model
    self.sampler = s.sample(s.temperature(temperature), s.top_p(0.95))
    self.rngs = nnx.Rngs(seed)
    self.speed = float("nan")  # characters a second, without the first, which waits for XLA

  def write(self, prompt: str, count: int) -> Iterator[str]:
    options = {"sampler": self.sampler, "rngs": self.rngs}
    numbers = nnx.stream(self.model, encode(prompt), count, **options)
    yield decode([next(numbers)])
    start = time.perf_counter()
    for written, number in enumerate(numbers, 1):
      yield decode([number])
      self.speed = written / (time.perf_counter() - start)
