"""Layers in a mesh with explicit axes, where the sharding of an array is a part of its type.

There JAX refuses what it cannot derive one sharding for: a lookup, a product over an axis that both
operands have split, random numbers beside an array that is split. So a layer computes as in a mesh
with automatic axes, where XLA finds a way for everything, and says how its result is split: the
axes of the batch as in the input, new features as in the kernel. Without explicit axes, nothing
here does anything.

`names(x)` are the mesh axes that each axis of an array is split over: a name, a tuple of names, or
None. A mesh axis can split one axis of an array only: where it would split two, the first has it.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from refax.core.annotation import axes_by_sort, axes_of, part_of

Names = list[Any]


def axes() -> tuple[str, ...]:
  """The explicit axes of the mesh of now; none without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.axis_names:  # as `mesh.empty` says, in a third of the time: every layer asks
    return ()
  explicit, _ = axes_by_sort(mesh)
  return tuple(name for name in mesh.axis_names if name in explicit)


def names(x: Any) -> Names:
  """The mesh axes that each axis of an array is split over."""
  aval: Any = jax.typeof(x)
  found = list(aval.sharding.spec)
  return found + [None] * (aval.ndim - len(found))


def call(fn: Callable[..., Any], *args: Any, out: Callable[[], Any] | None) -> Any:
  """`fn(*args)`, with results that are split as `out()` says.

  Args:
    fn: a function of arrays, all of which are among `args`: it must not find any by closure.
    *args: pytrees of arrays.
    out: gives the names of the result, or a tuple with those of each result. None to leave all to
      `fn`: it is the user's, or was given a sharding by the user.

  Returns:
    What `fn` returns.
  """
  explicit = () if out is None else axes()
  if out is None or not explicit:
    return fn(*args)
  wanted = out()
  several = isinstance(wanted, tuple)
  specs = tuple(map(_spec, wanted)) if several else _spec(wanted)
  return jax.sharding.auto_axes(fn, axes=explicit, out_sharding=specs)(*args)


def call_like(fn: Callable[..., Any], x: Any, *args: Any) -> Any:
  """`fn(x, *args)`, split as `x` is, whose shape it has."""
  return call(fn, x, *args, out=lambda: names(x))


def together(fn: Callable[..., Any], *xs: Any) -> Any:
  """`fn(*xs)` of arrays that broadcast to each other; where they are split otherwise, as the first.

  JAX itself broadcasts what is not split to what is, and refuses where two are split otherwise.
  """
  return call(fn, *xs, out=lambda: broadcast(*map(names, xs)))


def add(x: Any, y: Any) -> Any:
  """`x + y`, as `together`."""
  return together(operator.add, x, y)


def put(x: Any, wanted: Callable[[], Names]) -> Any:
  """`x`, split as `wanted()` says."""
  if not axes() or (new := distinct(wanted())) == names(x):
    return x
  return jax.sharding.reshard(x, PartitionSpec(*new))


def put_like(x: Any, other: Any) -> Any:
  """`x`, split as another array of its shape."""
  return put(x, lambda: names(other))


def whole(x: Any, axis: int) -> Any:
  """`x`, not split along one axis."""
  return put(x, lambda: [None if i == axis else n for i, n in enumerate(names(x))])


def fitted(fn: Callable[..., Any], *args: Any, out: Callable[[], Names] | None) -> Any:
  """`call`, of a result whose sizes only `fn` knows: what does not divide them does not split."""
  if out is None:
    return fn(*args)

  def fit() -> Names:
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), args)
    return divisors(out(), jax.eval_shape(fn, *bare).shape)

  return call(fn, *args, out=fit)


def divisors(wanted: Names, shape: Sequence[int]) -> Names:
  """Names without those that do not divide the axes of a shape."""
  sizes = jax.sharding.get_abstract_mesh().shape
  width = lambda entry: math.prod(sizes[name] for name in axes_of(entry))
  return [x if n % width(x) == 0 else None for x, n in zip(wanted, shape, strict=True)]


def broadcast(*several: Sequence[Any]) -> Names:
  """The names of what comes of broadcasting arrays with these names to each other."""
  rank = max(map(len, several))
  found: Names = [None] * rank
  for entries in several:
    for axis, name in enumerate(entries, rank - len(entries)):
      found[axis] = name if found[axis] is None else found[axis]
  return found


def distinct(wanted: Names) -> Names:
  """Names, each where it comes first."""
  used: set[str] = set()
  entries = []
  for entry in wanted:
    new = [name for name in axes_of(entry) if name not in used]
    used.update(new)
    entries.append(part_of(new))
  return entries


def _spec(wanted: Names) -> PartitionSpec:
  return PartitionSpec(*distinct(wanted))
