"""Metric: the base of metrics, and what they ask of their arguments."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refax.core.filters import Filter
from refax.core.pytree import Pytree
from refax.core.variable import Variable, borrowed
from refax.core.write import write
from refax.errors import InvalidArgumentError, MissingArgumentError, ShapeMismatchError
from refax.graph.split import split
from refax.nn import check, dtypes
from refax.typing import describe


class MetricState(Variable):
  """The state of a metric. Detached: what is written to it carries no gradient.

  >>> from refax import nnx
  >>> isinstance(nnx.metrics.Average().total, nnx.metrics.MetricState)
  True
  """

  detached = True


Writes = list[tuple[Variable, jax.Array]]
"""Values for Variables, fresh from compiled functions."""


class Metric(Pytree):
  """What all metrics do; the base of metrics of your own.

  >>> from refax import nnx; import jax
  >>> class Largest(nnx.Metric):
  ...   def __init__(self):
  ...     self.value = nnx.metrics.MetricState(float("-inf"))
  ...   def reset(self):
  ...     self.value[...] = float("-inf")
  ...   def update(self, *, values, **_):
  ...     self.value[...] = jax.numpy.maximum(self.value[...], values.max())
  ...   def compute(self):
  ...     return self.value[...]
  >>> largest = Largest(); jax.jit(Largest.update)(largest, values=jax.numpy.arange(3.0))
  >>> float(largest.compute())
  2.0
  """

  def reset(self) -> None:
    """Forget all that was counted, in place."""
    raise NotImplementedError(f"{type(self).__name__} has no method reset")

  def update(self, **kwargs: Any) -> None:
    """Count a batch, in place."""
    raise NotImplementedError(f"{type(self).__name__} has no method update")

  def compute(self) -> Any:
    """The value of the metric over all that was counted."""
    raise NotImplementedError(f"{type(self).__name__} has no method compute")

  def _planned(self, **kwargs: Any) -> "Writes | None":
    """What `update` would write, checked, with nothing written; None if only `update` knows."""
    return None

  def split(self, *filters: Filter) -> Any:
    """As `nnx.split(metric, *filters)`."""
    return split(self, *filters)


def planned(metric: Metric, kwargs: dict[str, Any]) -> Writes | None:
  """What `metric.update(**kwargs)` would write; None if there is no plan of this `update`."""
  owner = lambda name: next(cls for cls in type(metric).__mro__ if name in vars(cls))
  if "update" in vars(metric) or not issubclass(owner("_planned"), owner("update")):
    return None  # a subclass has an `update` of its own
  return metric._planned(**kwargs)


@partial(jax.jit, inline=True, keep_unused=True)  # the zeros lie where the arrays do
def _zeros(arrays: list[jax.Array]) -> list[jax.Array]:
  return list(map(jnp.zeros_like, arrays))


def clear(*state: Variable) -> None:
  """Set Variables to zero, all or none of them."""
  write(*zip(state, _zeros(list(map(borrowed, state))), strict=True), fresh=True)


def argument_name(metric: str, argname: Any) -> str:
  """`argname` as it is, if it is a str; raises InvalidArgumentError."""
  if not isinstance(argname, str):
    want = "the name of a keyword argument, a str"
    raise InvalidArgumentError.value(metric, "argname", argname, want)
  return argname


def numbers(metric: Metric, name: str, kwargs: dict[str, Any], state: Variable) -> jax.Array:
  """The argument `name` as an array of real numbers."""
  kind = type(metric).__name__
  if name not in kwargs:
    raise MissingArgumentError.keyword(kind, name, list(kwargs), check.origin(state))
  try:
    x = check.as_input(_without_wrapping(kwargs[name]))
  except (TypeError, OverflowError):
    want = "a number or an array of numbers"
    raise InvalidArgumentError.value(kind, name, kwargs[name], want) from None
  if not any(jnp.issubdtype(x.dtype, k) for k in (jnp.floating, jnp.integer, jnp.bool_)):
    raise ShapeMismatchError(
      f"{kind} takes real numbers",
      at=check.origin(state),
      got=f"{name} of {describe(x)}",
      fix="pass floats, integers or booleans: abs(x), or x.real",
    )
  return x


def _without_wrapping(x: Any) -> Any:
  """Integers of 64 bits as floats, where JAX would keep the lower 32 bits of them only."""
  if isinstance(x, int) and not isinstance(x, bool):
    return x if abs(x) < 2**31 else float(x)
  if not isinstance(x, np.ndarray | np.integer) or x.dtype.kind not in "iu":
    return x
  return x if jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype else np.asarray(x, np.float32)


def classes(metric: str, logits: Any, labels: Any, state: Variable) -> tuple[jax.Array, jax.Array]:
  """Logits and labels as arrays, one label for each row of logits."""
  logits, labels = check.as_input(logits), integers(metric, labels, state)
  if logits.ndim == 0 or logits.shape[:-1] != labels.shape:
    raise ShapeMismatchError(
      f"{metric} compares a row of logits with a label",
      at=check.origin(state),
      got=f"logits of shape {logits.shape} and labels of shape {labels.shape}",
      fix="pass logits of shape (..., classes) and labels of shape (...)",
    )
  return logits, labels


def integers(metric: str, labels: Any, state: Variable, *, boolean: bool = False) -> jax.Array:
  """Labels as an array of integers, or of booleans if that is allowed."""
  labels = check.as_input(labels)
  if not jnp.issubdtype(labels.dtype, jnp.integer) and not (boolean and labels.dtype == bool):
    raise ShapeMismatchError(
      f"{metric} takes labels that are integers",
      at=check.origin(state),
      got=f"labels of {describe(labels)}",
      fix="pass labels.astype(int), or for one-hot labels labels.argmax(-1)",
    )
  return dtypes.wide_integers(labels)
