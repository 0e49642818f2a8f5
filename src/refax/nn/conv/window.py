"""The geometry of a window that slides over the spatial axes of `[..., *spatial, channels]`."""

import math
import operator
from collections.abc import Collection, Sequence
from typing import Any

import jax

from refax.errors import InvalidArgumentError
from refax.nn import check
from refax.typing import Padding


def per_axis(layer: str, name: str, value: int | Sequence[int] | None, rank: int) -> tuple:
  """A positive int for each of `rank` axes: `value`, or one int for all, or None for ones.

  Raises:
    InvalidArgumentError: the count is wrong, or one of them is not a positive int.
  """
  if value is None:
    return (1,) * rank
  if not isinstance(value, Sequence):
    return (check.size(layer, name, value),) * rank
  if len(value) != rank:
    raise InvalidArgumentError.value(layer, name, value, f"an int, or {rank} ints")
  return tuple(check.size(layer, name, x) for x in value)


def paddings(layer: str, padding: Padding, rank: int, names: Collection[str]) -> Any:
  """A padding as one of `names`, or as a pair (low, high) for each of `rank` axes.

  Raises:
    InvalidArgumentError: it is neither one of the names, nor an int, nor ints and pairs of ints.
  """
  if isinstance(padding, str):
    if padding.upper() in names:
      return padding.upper()
  else:
    try:
      entries = padding if isinstance(padding, Sequence) else (padding,) * rank
      pairs = tuple(_pair(entry) for entry in entries)
    except (TypeError, ValueError):
      pairs = ()
    if len(pairs) == rank:
      return pairs
  raise InvalidArgumentError.value(
    layer, "padding", padding, f"{', '.join(names)}, an int, or {rank} ints or (low, high) pairs"
  )


def _pair(entry: Any) -> tuple[int, int]:
  low, high = entry if isinstance(entry, Sequence) else (entry, entry)
  return operator.index(low), operator.index(high)


def fold_batch(x: jax.Array, rank: int) -> tuple[jax.Array, tuple[int, ...]]:
  """`x` with one batch axis in the place of none or many, and the shape of those."""
  batch = x.shape[: x.ndim - rank - 1]
  return x.reshape(math.prod(batch), *x.shape[len(batch) :]), batch
