"""Average and Accuracy: means over all that was counted."""

from functools import partial
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp

from refax.core.variable import borrowed
from refax.core.write import write
from refax.errors import InvalidArgumentError, ShapeMismatchError
from refax.nn import check, dtypes
from refax.train import accumulator, metric
from refax.typing import ArrayLike


class Average(metric.Metric):
  """The mean of numbers.

  Args:
    argname: the keyword argument of `update` that has the numbers.

  Raises:
    InvalidArgumentError: `argname` is not a str.

  >>> from refax import nnx; import jax, jax.numpy as jnp
  >>> loss = nnx.metrics.Average("loss")
  >>> @jax.jit
  ... def step(metric, x):
  ...   metric.update(loss=x)
  >>> step(loss, jnp.array([1.0, 2.0])); step(loss, jnp.array([3.0, 6.0]))
  >>> float(loss.compute())
  3.0
  """

  def __init__(self, argname: str = "values"):
    self.argname = metric.argument_name(type(self).__name__, argname)
    self.total = metric.MetricState(jnp.zeros((), jnp.float32))
    self.total_low = metric.MetricState(jnp.zeros((), jnp.float32))
    self.count = metric.MetricState(jnp.zeros((), jnp.uint32))
    self.count_high = metric.MetricState(jnp.zeros((), jnp.uint32))

  def reset(self) -> None:
    """Forget all that was counted, in place."""
    metric.clear(*self._state())

  def update(self, mask: ArrayLike | None = None, **kwargs: Any) -> None:
    """Count numbers, in place.

    Args:
      mask: True for the numbers that count; broadcasts to them.
      **kwargs: the numbers, an array of any shape, as the argument `argname`; others are ignored.

    Raises:
      MissingArgumentError: there is no argument `argname`; nothing has been written.
      ShapeMismatchError: the numbers are complex or the mask does not broadcast to them; nothing
        has been written.
    """
    write(*self._planned(mask, **kwargs), fresh=True)

  def _planned(self, mask: ArrayLike | None = None, **kwargs: Any) -> metric.Writes:
    x = metric.numbers(self, self.argname, kwargs, self.total)
    mask = check.mask(type(self).__name__, x, mask)
    state = self._state()
    return list(zip(state, _added(list(map(borrowed, state)), x, mask), strict=True))

  def _state(self) -> list[metric.MetricState]:
    return [self.total, self.total_low, self.count, self.count_high]

  def compute(self) -> jax.Array:
    """The mean, a float32; nan if nothing was counted."""
    return _mean(*map(borrowed, self._state()))


@partial(jax.jit, inline=True)
def _added(state: list[jax.Array], x: jax.Array, mask: jax.Array | None) -> list[jax.Array]:
  """The state of an Average after numbers have been counted."""
  total, total_low, count, count_high = state
  total, total_low = accumulator.add(total, total_low, *accumulator.sum_parts(x, mask))
  return [total, total_low, *accumulator.add_count(count, count_high, accumulator.size(x, mask))]


@partial(jax.jit, inline=True)
def _mean(total: Any, total_low: Any, count: Any, count_high: Any) -> jax.Array:
  return (total + total_low) / accumulator.count_as_float(count, count_high)


class Accuracy(Average):
  """The part of predictions that are right.

  Args:
    threshold: None for classes, predicted by the largest logit; a number for two classes, where
      a logit of at least that means class 1.

  Raises:
    InvalidArgumentError: `threshold` is not a number.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> accuracy = nnx.metrics.Accuracy()
  >>> accuracy.update(logits=jnp.array([[0.1, 0.9], [0.8, 0.2]]), labels=jnp.array([1, 1]))
  >>> float(accuracy.compute())
  0.5
  """

  def __init__(self, threshold: float | None = None, *args: Any, **kwargs: Any):
    if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, Real)):
      want = "None for classes, or a float for two classes"
      raise InvalidArgumentError.value(type(self).__name__, "threshold", threshold, want)
    self.threshold = None if threshold is None else float(threshold)
    super().__init__(*args, **kwargs)

  def update(  # pyright: ignore[reportIncompatibleMethodOverride]  # Flax NNX's signature
    self, *, logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None, **_: Any
  ) -> None:
    """Count predictions, in place.

    Args:
      logits: numbers `[..., classes]`; with a threshold `[...]`.
      labels: the right classes, integers `[...]`; with a threshold a positive one means class 1.
      mask: True for the labels that count; broadcasts to them.

    Raises:
      ShapeMismatchError: `labels` are not integers or do not have the shape of the predictions, or
        the mask does not broadcast to them; nothing has been written.
    """
    write(*self._planned(logits=logits, labels=labels, mask=mask), fresh=True)

  def _planned(  # pyright: ignore[reportIncompatibleMethodOverride]
    self, *, logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None, **_: Any
  ) -> metric.Writes:
    name, threshold = type(self).__name__, self.threshold
    if threshold is None:
      logits, labels = metric.classes(name, logits, labels, self.total)
    else:
      logits = check.as_input(logits)
      labels = metric.integers(name, labels, self.total, boolean=True)
    if threshold is not None and logits.shape != labels.shape:
      raise ShapeMismatchError(
        f"{name} with a threshold compares one logit with one label",
        at=check.origin(self.total),
        got=f"logits of shape {logits.shape} and labels of shape {labels.shape}",
        fix="pass both of one shape, or for classes build it without a threshold",
      )
    mask, state = check.mask(name, labels, mask), self._state()
    new = _added_right(list(map(borrowed, state)), logits, labels, mask, threshold=threshold)
    return list(zip(state, new, strict=True))


@partial(jax.jit, inline=True, static_argnames="threshold")
def _added_right(
  state: list[jax.Array],
  logits: jax.Array,
  labels: jax.Array,
  mask: jax.Array | None,
  *,
  threshold: float | None,
) -> list[jax.Array]:
  """The state of an Accuracy after predictions have been counted."""
  if threshold is None:
    return _added(state, logits.argmax(-1) == labels, mask)
  # In bfloat16 the threshold 0.7 is 0.699.
  return _added(state, (dtypes.wide(logits) >= threshold) == (labels > 0), mask)
