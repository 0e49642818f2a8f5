"""Welford: mean and standard deviation of numbers that come in batches."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from refax.core.variable import borrowed
from refax.core.write import write
from refax.nn import check, dtypes
from refax.train import accumulator, metric
from refax.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
  """What `Welford` computes: arrays of dtype float32.

  Attributes:
    mean: the mean.
    standard_error_of_mean: the standard deviation divided by the root of the count.
    standard_deviation: the root of the mean squared distance to the mean.

  >>> from refax import nnx
  >>> welford = nnx.metrics.Welford(); welford.update(values=3.0)
  >>> float(welford.compute().standard_deviation)
  0.0
  """

  mean: jax.Array
  standard_error_of_mean: jax.Array
  standard_deviation: jax.Array


class Welford(metric.Metric):
  """Mean, standard deviation and standard error of numbers, in one pass and without cancellation.

  Batches are merged as in "Updating Formulae and a Pairwise Algorithm for Computing Sample
  Variances", Chan, Golub and LeVeque 1979, STAN-CS-79-773; for one number at a time that is
  "Note on a Method for Calculating Corrected Sums of Squares and Products", Welford 1962.

  Args:
    argname: the keyword argument of `update` that has the numbers.

  Raises:
    InvalidArgumentError: `argname` is not a str.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> welford = nnx.metrics.Welford()
  >>> welford.update(values=jnp.array([1.0, 2.0])); welford.update(values=jnp.array([3.0, 6.0]))
  >>> statistics = welford.compute()
  >>> float(statistics.mean), round(float(statistics.standard_deviation), 4)
  (3.0, 1.8708)
  """

  def __init__(self, argname: str = "values"):
    self.argname = metric.argument_name(type(self).__name__, argname)
    self.mean = metric.MetricState(jnp.zeros((), jnp.float32))
    self.mean_low = metric.MetricState(jnp.zeros((), jnp.float32))
    self.m2 = metric.MetricState(jnp.zeros((), jnp.float32))
    self.m2_low = metric.MetricState(jnp.zeros((), jnp.float32))
    self.count = metric.MetricState(jnp.zeros((), jnp.uint32))
    self.count_high = metric.MetricState(jnp.zeros((), jnp.uint32))

  def reset(self) -> None:
    """Forget all that was counted, in place."""
    metric.clear(*self._state())

  def _state(self) -> list[metric.MetricState]:
    return [self.mean, self.mean_low, self.m2, self.m2_low, self.count, self.count_high]

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
    x = metric.numbers(self, self.argname, kwargs, self.mean)
    mask = check.mask(type(self).__name__, x, mask)
    state = self._state()
    return list(zip(state, _added(list(map(borrowed, state)), x, mask), strict=True))

  def compute(self) -> Statistics:
    """The statistics; all are nan if nothing was counted."""
    return _statistics(*map(borrowed, self._state()))


@partial(jax.jit, inline=True)
def _added(state: list[jax.Array], x: jax.Array, mask: jax.Array | None) -> list[jax.Array]:
  """The state of a Welford after numbers have been counted."""
  mean, m2, (low, high) = state[:2], state[2:4], state[4:]
  old = accumulator.count_as_float(low, high)
  n = accumulator.size(x, mask)
  count = accumulator.add_count(low, high, n)
  new = accumulator.count_as_float(*count)
  n = jnp.asarray(n, jnp.float32)
  shift, rest, batch_m2 = _distance(x, mask, n, mean)
  delta, part = shift + rest, n / jnp.maximum(new, 1)
  mean = accumulator.add(*mean, shift * part, rest * part)
  m2 = accumulator.add(*m2, batch_m2, delta * delta * old * part)
  return [*mean, *m2, *count]


@partial(jax.jit, inline=True)
def _statistics(
  mean: Any, mean_low: Any, m2: Any, m2_low: Any, count: Any, count_high: Any
) -> Statistics:
  count = accumulator.count_as_float(count, count_high)
  deviation = jnp.sqrt((m2 + m2_low) / count)
  mean = jnp.where(count > 0, mean + mean_low, jnp.nan)
  return Statistics(mean, deviation / jnp.sqrt(count), deviation)


def _distance(
  x: jax.Array, mask: jax.Array | None, n: jax.Array, mean: list[jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """How far the mean of a batch is from another, in two parts, and its sum of squared distances.

  The distances to the running mean are small numbers, so that little is lost in their sum; a
  second sum takes away what was lost in the first.
  """
  dtype = dtypes.wide_dtype(x.dtype)
  mean_of = lambda x: jnp.sum(x, dtype=dtype, where=mask) / jnp.maximum(n, 1)
  near = x.astype(dtype) - mean[0]
  shift = mean_of(near)
  rest = mean_of(near - shift)
  m2 = jnp.sum(jnp.square(near - shift), dtype=dtype, where=mask) - n * jnp.square(rest)
  high, m2 = shift.astype(jnp.float32), jnp.maximum(m2, 0).astype(jnp.float32)
  low = (shift - high + rest - mean[1]).astype(jnp.float32)
  return high, jnp.where(n > 0, low, 0), m2
