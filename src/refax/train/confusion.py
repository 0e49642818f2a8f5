"""ConfusionMatrix: which classes are taken for which."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from refax.core.variable import borrowed
from refax.core.write import write
from refax.errors import ShapeMismatchError
from refax.nn import check
from refax.train import metric
from refax.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConfusionStatistics:
  """What `ConfusionMatrix` computes.

  Attributes:
    counts: uint32 `[classes, classes]`; how often the class of the row was predicted as that of the
      column.
    precision: float32 `[classes]`; which part of those predicted as a class are of it.
    recall: float32 `[classes]`; which part of those of a class are predicted as it.
    f1: float32 `[classes]`; the harmonic mean of precision and recall.

  >>> from refax import nnx
  >>> nnx.metrics.ConfusionMatrix(2).compute().counts.tolist()
  [[0, 0], [0, 0]]
  """

  counts: jax.Array
  precision: jax.Array
  recall: jax.Array
  f1: jax.Array


class ConfusionMatrix(metric.Metric):
  """How often each class was predicted as each other one. Counts stop at 2^32 - 1.

  Args:
    num_classes: the number of classes.

  Raises:
    InvalidArgumentError: `num_classes` is not a positive int.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> matrix = nnx.metrics.ConfusionMatrix(2)
  >>> matrix.update(logits=jnp.array([[0.1, 0.9], [0.8, 0.2]]), labels=jnp.array([1, 1]))
  >>> matrix.compute().counts.tolist()
  [[0, 0], [1, 1]]
  """

  def __init__(self, num_classes: int):
    self.num_classes = check.size("ConfusionMatrix", "num_classes", num_classes)
    self.counts = metric.MetricState(jnp.zeros((self.num_classes,) * 2, jnp.uint32))

  def reset(self) -> None:
    """Forget all that was counted, in place."""
    metric.clear(self.counts)

  def update(  # pyright: ignore[reportIncompatibleMethodOverride]
    self, *, logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None, **_: Any
  ) -> None:
    """Count predictions, in place.

    Args:
      logits: numbers `[..., classes]`; the largest one is the prediction.
      labels: the right classes, integers `[...]`; those that are no class are not counted.
      mask: True for the labels that count; broadcasts to them.

    Raises:
      ShapeMismatchError: `labels` are not integers or do not have the shape of the predictions,
        `logits` has another number of classes, or the mask does not broadcast to the labels;
        nothing has been written.
    """
    write(*self._planned(logits=logits, labels=labels, mask=mask), fresh=True)

  def _planned(  # pyright: ignore[reportIncompatibleMethodOverride]
    self, *, logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None, **_: Any
  ) -> metric.Writes:
    name, n = type(self).__name__, self.num_classes
    logits, labels = metric.classes(name, logits, labels, self.counts)
    if logits.shape[-1] != n:
      raise ShapeMismatchError(
        f"{name} was built for {n} classes",
        at=check.origin(self.counts),
        got=f"logits of shape {logits.shape}, with {logits.shape[-1]} on the last axis",
        fix=f"pass logits with {n} on the last axis, or build it with {logits.shape[-1]}",
      )
    mask = check.mask(name, labels, mask)
    return [(self.counts, _added(borrowed(self.counts), logits, labels, mask))]

  def compute(self) -> ConfusionStatistics:
    """The counts and what follows from them for each class; nan where there was nothing."""
    return ConfusionStatistics(self.counts[...], *_shares(borrowed(self.counts)))


@partial(jax.jit, inline=True)
def _added(
  counts: jax.Array, logits: jax.Array, labels: jax.Array, mask: jax.Array | None
) -> jax.Array:
  """The counts after predictions have been counted."""
  counted = (labels >= 0) & (labels < counts.shape[-1])
  counted = counted if mask is None else counted & mask
  rows = jnp.where(counted, labels, 0)
  new = jnp.zeros_like(counts).at[rows, logits.argmax(-1)].add(counted.astype(jnp.uint32))
  total = counts + new
  return jnp.where(total < new, jnp.uint32(2**32 - 1), total)


@partial(jax.jit, inline=True)
def _shares(counts: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Precision, recall and F1."""
  share = counts.astype(jnp.float32)
  right, predicted, actual = jnp.diagonal(share), share.sum(0), share.sum(1)
  return right / predicted, right / actual, 2 * right / (predicted + actual)
