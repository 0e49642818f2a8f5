"""Which axis each Variable and array is mapped over: `in_axes` and `out_axes` of vmap and scan."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, Sharding

from refax.core.filters import Filter, PathIn, Predicate, to_predicate
from refax.core.flatten import Walk, flatten
from refax.core.graphdef import LEAF, NODE, REGION, GraphDef
from refax.core.node import Node
from refax.core.rebuild import unflatten
from refax.core.variable import Variable
from refax.errors import FilterError, TreeMismatchError
from refax.graph.state import State, to_flat_state
from refax.transforms.positions import by_position
from refax.typing import Path, path_str


class _Named(type):
  """A class that prints as its public name: it is an argument, and shows in errors."""

  def __repr__(cls) -> str:
    return f"nnx.{cls.__name__}"


class Carry(metaclass=_Named):
  """In `in_axes` and `out_axes` of `nnx.scan`: what each step hands to the next.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> nnx.scan(lambda total, x: (total + x, total), in_axes=(nnx.Carry, 0))(0.0, jnp.arange(3.0))[0]
  Array(3., dtype=float32)
  """


class StateAxes:
  """An axis for each filter: how the Variables of one argument are mapped.

  Args:
    axes: from filters to an axis, None (shared), or `nnx.Carry` (in `nnx.scan`). The first that
      matches counts; what matches none is an error. A State of axes says them by path.

  >>> from refax import nnx
  >>> nnx.StateAxes({nnx.Param: 0, ...: None})
  StateAxes({Param: 0, ...: None})
  """

  def __init__(self, axes: "Mapping[Filter, Any] | State | StateAxes", /):
    if isinstance(axes, State):
      items = tuple((PathIn(path), axis) for path, axis in to_flat_state(axes))
    else:
      items = axes.items if isinstance(axes, StateAxes) else tuple(axes.items())
    self.items: tuple[tuple[Filter, Any], ...] = items
    self._cases: list[tuple[Predicate, Any]] = [(to_predicate(f), axis) for f, axis in items]

  def axis(self, path: Path, leaf: Any) -> Any:
    """The axis of a Variable; raises FilterError if no filter matches."""
    for predicate, axis in self._cases:
      if predicate(path, leaf):
        return axis
    raise FilterError.remainder([path_str(path)])

  def __eq__(self, other) -> bool:
    return isinstance(other, StateAxes) and self.items == other.items

  def __hash__(self) -> int:
    return hash(self.items)

  def __repr__(self) -> str:
    def name(x: Any) -> str:
      plain = isinstance(x, type) and type(x) is type
      return "..." if x is ... else x.__name__ if plain else repr(x)

    return "StateAxes({" + ", ".join(f"{name(f)}: {name(a)}" for f, a in self.items) + "})"


def is_axis(x: Any) -> bool:
  """Whether `x` is one axis, not a tree of them."""
  return x is None or x is Carry or isinstance(x, int | StateAxes | PartitionSpec | Sharding)


def is_prefix(x: Any) -> bool:
  """Whether `x` is one axis, or an object with axes in it (see `prefix`)."""
  return is_axis(x) or isinstance(x, Node)


def assign(
  prefix: Any, entry: tuple, graphdef: GraphDef, leaves: list[Any], what: str
) -> dict[int, Any]:
  """The axis of every leaf below an entry, from a prefix tree of axes.

  Raises:
    TreeMismatchError: the prefix does not fit, or one Variable gets two axes.
    FilterError: a `StateAxes` does not cover a Variable.
  """
  found: dict[int, Any] = {}
  for axis, path, index in _pairs(prefix, entry, graphdef, what):
    if isinstance(axis, StateAxes):
      axis = axis.axis(path, leaves[index])
    if found.setdefault(index, axis) != axis:
      raise _two_axes(what, leaves[index], path, found[index], axis)
  return found


def _pairs(
  prefix: Any, entry: tuple, graphdef: GraphDef, what: str
) -> Iterator[tuple[Any, Path, int]]:
  if isinstance(prefix, Node) and entry[0] == NODE:
    prefix = by_path(prefix, 0)  # what the argument gains is mapped along axis 0
  if is_axis(prefix):
    for path, (sort, *rest) in graphdef.walk(entry):
      if sort == LEAF:
        yield prefix, path, rest[0]
    return
  if entry[0] != REGION:
    raise TreeMismatchError.axes(what, "", f"{prefix!r} for one Module, Variable or array")
  positions = entry[1].unflatten(range(entry[1].num_leaves))
  try:
    below = lambda axis, sub: [(axis, i) for i in jax.tree.leaves(sub)]
    pairs = jax.tree.leaves(
      jax.tree.map(below, prefix, positions, is_leaf=is_prefix),
      is_leaf=lambda x: isinstance(x, tuple) and len(x) == 2 and is_prefix(x[0]),
    )
  except ValueError:
    shown = jax.tree.map(lambda _: "*", positions)
    raise TreeMismatchError.axes(what, "", f"{prefix!r} for {shown}") from None
  for axis, position in pairs:
    yield from _pairs(axis, entry[2][position], graphdef, what)


def by_path(axes: Node, default: Any) -> StateAxes:
  """The axes in an object that `prefix` has made, by the paths of its Variables and arrays.

  Args:
    axes: the object.
    default: the axis of what has no place in it.
  """
  flat = flatten(axes)
  places = [(path, entry[1]) for path, entry in flat.graphdef.walk() if entry[0] == LEAF]
  found: dict[Filter, Any] = {PathIn(path): flat.leaves[i] for path, i in places}
  return StateAxes(found | {...: default})


def move(value: Any, source: int, target: int) -> Any:
  """Move an axis of every array of a value; typed keys too."""
  return (
    value if source == target else jax.tree.map(lambda x: jnp.moveaxis(x, source, target), value)
  )


def size_of(
  axes: dict[int, Any], values: list[Any], name: Callable[[int], str], function: str
) -> int | None:
  """The size of the mapped axis, or None if nothing is mapped.

  Raises:
    TreeMismatchError: the sizes differ, or an array does not have the axis.
  """
  sizes: dict[str, int] = {}
  for index, axis in axes.items():
    if isinstance(axis, int):
      for x in jax.tree.leaves(values[index]):
        shape = jnp.shape(x)
        if not -len(shape) <= axis < len(shape):
          got = f"axis {axis} of an array {shape}"
          raise TreeMismatchError.axes(f"in_axes of {function}", name(index), got)
        sizes[name(index)] = shape[axis]
  if len(set(sizes.values())) > 1:
    raise TreeMismatchError.sizes(function, sizes)
  return next(iter(sizes.values()), None)


def counted(f: Callable, args: tuple, kwargs: dict[str, Any], in_axes: Any) -> tuple[tuple, dict]:
  """The arguments of a call, by position where a tuple has an axis for each."""
  return (args, kwargs) if is_prefix(in_axes) else by_position(f, args, kwargs, len(in_axes))


def argument_axes(inputs: Any, in_axes: Any, positional: int, *, default: Any) -> dict[int, Any]:
  """The axis of every leaf of a call's arguments; keyword arguments have the default axis.

  Raises:
    TreeMismatchError: the axes do not fit the arguments, or one Variable gets two.
  """
  entries = inputs.arguments
  prefixes = (in_axes,) * positional if is_prefix(in_axes) else tuple(in_axes)
  if len(prefixes) != positional:
    got = f"{len(prefixes)} axes for {positional} positional arguments"
    raise TreeMismatchError.axes("in_axes", "", got)
  found: dict[int, Any] = {}
  for prefix, entry in zip(
    [*prefixes, *[default] * (len(entries) - positional)], entries, strict=True
  ):
    part = assign(prefix, entry, inputs.graphdef, inputs.leaves, "in_axes")
    for index, axis in part.items():
      if found.setdefault(index, axis) != axis:
        raise _two_axes("in_axes", inputs.leaves[index], (), found[index], axis)
  return found


def _two_axes(what: str, leaf: Any, path: Path, first: Any, second: Any) -> TreeMismatchError:
  at = str(leaf._def.origin) if isinstance(leaf, Variable) else path_str(path)
  return TreeMismatchError.axes(
    what, at, f"the same Variable with axis {first} and with axis {second}"
  )


def prefix(node: Any, axes: Mapping[Filter, Any] | Callable[[Path, Any], Any], /) -> Any:
  """The axes of an argument, for `in_axes` and `out_axes`, by a rule for its Variables and arrays.

  Args:
    node: the argument, or a tuple of all arguments: any pytree of Modules, Variables and arrays.
    axes: `(path, leaf) -> axis`, or an axis for each filter: the first that matches counts.

  Returns:
    The same pytree with an axis in place of each Variable and array.

  Raises:
    FilterError: no filter matches a Variable.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> d = {"a": nnx.Param(jnp.array(2)), "b": nnx.BatchStat(jnp.arange(3))}
  >>> in_axes = (nnx.prefix(d, {nnx.Param: None, nnx.BatchStat: 0}),)
  >>> nnx.vmap(lambda d: d["a"] * d["b"], in_axes=in_axes)(d).tolist()
  [0, 2, 4]
  """
  rule = axes if callable(axes) else StateAxes(axes).axis
  walk = Walk()
  graphdef = walk.graphdef(walk.entry(node))
  found = map(rule, graphdef.paths, walk.leaves)
  return unflatten(graphdef, found)[0]
