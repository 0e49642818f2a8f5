"""transform_metadata: the names of axes in `out_sharding`, under vmap and scan.

A Variable that is made inside of a mapped function has one axis more outside of it. Its metadata
gets a name for this axis, too: without `transform_metadata` None, an axis that is not divided.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from refax.core.annotation import AXES, PARTITION_NAME
from refax.core.flatten import Walk
from refax.core.variable import Variable, is_variable
from refax.transforms.axes import StateAxes, argument_axes, assign
from refax.transforms.lift import Inputs


def add_axis(tree: Any, index: int, transform_metadata: Mapping[str, Any]) -> Any:
  """Let the Variables of a tree have one axis more, with the name that the metadata gives it.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> kernel = nnx.Param(jnp.zeros((2, 3)), out_sharding=(None, "mlp"))
  >>> add_axis(kernel, 0, {nnx.PARTITION_NAME: "layers"}).out_sharding
  ('layers', None, 'mlp')
  """
  return _change_axis(tree, index, transform_metadata, add=True)


def remove_axis(tree: Any, index: int, transform_metadata: Mapping[str, Any]) -> Any:
  """Let the Variables of a tree have one axis less.

  Raises:
    ValueError: the axis at `index` has another name.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> kernel = nnx.Param(jnp.zeros((2, 3)), out_sharding=("layers", "mlp"))
  >>> remove_axis(kernel, 0, {nnx.PARTITION_NAME: "layers"}).out_sharding
  ('mlp',)
  """
  return _change_axis(tree, index, transform_metadata, add=False)


def _change_axis(tree: Any, index: int, metadata: Mapping[str, Any], *, add: bool) -> Any:
  if PARTITION_NAME not in metadata:
    raise ValueError(
      f"transform_metadata has no {PARTITION_NAME!r}, the name of the axis\n  got: {dict(metadata)}"
    )
  others = {k: v for k, v in metadata.items() if k != PARTITION_NAME}
  names = dict.fromkeys(AXES, metadata[PARTITION_NAME]) | others

  def change(x: Any) -> Any:
    if not isinstance(x, Variable):
      return x
    for key, name in names.items():
      axes = x._def.metadata.get(key)
      if _has_names(axes):
        x.set_metadata(**{key: _with_axis(axes, index, name, add=add)})
    told = getattr(type(x), "add_axis" if add else "remove_axis", None)  # hooks of refax.compat
    if told is not None:
      told(x, index, metadata[PARTITION_NAME])
    return x

  return jax.tree.map(change, tree, is_leaf=is_variable)


def _has_names(axes: Any) -> bool:
  """Whether an entry of the metadata has a name for each axis of the array."""
  return isinstance(_spec(axes), tuple | PartitionSpec)


def _rank(x: Variable) -> int:
  return len(getattr(x.get_raw_value(), "shape", ()))


def _pad(x: Variable, rank: int) -> None:
  """Let a Variable name all axes of an array of this rank."""
  entries = {key: axes for key in AXES if _has_names(axes := x.get_metadata().get(key))}
  if entries:
    x.set_metadata(**{key: _padded(axes, rank) for key, axes in entries.items()})


def _padded(axes: Any, rank: int) -> Any:
  """The names of as many axes: those that are left out are not divided."""
  if isinstance(axes, NamedSharding):
    return NamedSharding(axes.mesh, _padded(axes.spec, rank))
  found = (*axes, *[None] * (rank - len(axes)))
  return PartitionSpec(*found) if isinstance(axes, PartitionSpec) else found


def _spec(axes: Any) -> Any:
  return axes.spec if isinstance(axes, NamedSharding) else axes


def _with_axis(axes: Any, index: int, name: Any, *, add: bool) -> Any:
  if isinstance(axes, NamedSharding):
    return NamedSharding(axes.mesh, _with_axis(axes.spec, index, name, add=add))
  found = list(axes)
  if add:
    found += [None] * (index - len(found))
    found.insert(index if index >= 0 else len(found) + 1 + index, name)
  elif (removed := found.pop(index)) != name:
    raise ValueError(f"expected {name!r} at index {index} of {axes!r}, found {removed!r}")
  return PartitionSpec(*found) if isinstance(axes, PartitionSpec) else tuple(found)


def transform_metadata(
  f: Callable[..., Any] | None = None,
  *,
  in_axes: Any = 0,
  out_axes: Any = 0,
  partition: str | None = None,
  metadata: Mapping[str, Any] | None = None,
  graph: Any = None,
) -> Any:
  """A function to be mapped, inside of which Variables do not name the axis that is mapped.

  Args:
    f: the function; without it, a decorator is returned.
    in_axes: the mapped axis of each argument, as for `nnx.vmap`.
    out_axes: that of the results.
    partition: the name of the axis, in the metadata `out_sharding`.
    metadata: in place of it, names for several entries of the metadata.
    graph: taken for Flax's sake.

  >>> from refax import nnx; import jax
  >>> @nnx.vmap
  ... @nnx.transform_metadata(partition="layers")
  ... def create(key):
  ...   return nnx.Param(jax.numpy.zeros(3), out_sharding=("embed",))
  >>> create(jax.random.split(jax.random.key(0), 2)).out_sharding
  ('layers', 'embed')
  """
  names = dict(metadata) if metadata is not None else {PARTITION_NAME: partition}
  if f is None:
    return functools.partial(transform_metadata, in_axes=in_axes, out_axes=out_axes, metadata=names)

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    leaves, given = _mapped_arguments(args, kwargs, in_axes)
    for x, axis in given:
      _pad(x, _rank(x) + 1)
      remove_axis(x, axis, names)
    out = f(*args, **kwargs)
    changed = {id(x): (x, axis) for x, axis in given}
    known = set(map(id, leaves))
    are_told = any(isinstance(x, StateAxes) for x in jax.tree.leaves(in_axes))
    gained = [
      (x, axis if are_told else 0)
      for x, axis in _mapped_arguments(args, kwargs, in_axes)[1]
      if id(x) not in known
    ]  # in a mapped `__init__`
    for x, axis in (*_mapped_results(out, out_axes), *gained):
      changed.setdefault(id(x), (x, axis))
    for x, axis in changed.values():
      add_axis(x, axis, names)
    return out

  return wrapper


def _mapped_arguments(
  args: tuple, kwargs: dict[str, Any], in_axes: Any
) -> tuple[list[Any], list[tuple[Variable, int]]]:
  """All leaves of the arguments, and the Variables among them that are mapped, with their axes."""
  inputs = Inputs.of(args, kwargs)
  axes = argument_axes(inputs, in_axes, len(args), default=0 if kwargs else None)
  pairs = [(inputs.leaves[i], axis) for i, axis in axes.items() if type(axis) is int]
  return inputs.leaves, [(x, axis) for x, axis in pairs if isinstance(x, Variable)]


def _mapped_results(out: Any, out_axes: Any) -> list[tuple[Variable, int]]:
  walk = Walk()
  entry = walk.entry(out)
  found = assign(out_axes, entry, walk.graphdef(entry), walk.leaves, "out_axes")
  pairs = [(walk.leaves[i], axis) for i, axis in found.items() if type(axis) is int]
  return [(x, axis) for x, axis in pairs if isinstance(x, Variable)]


def kept_up(f: Callable[..., Any], names: Mapping[str, Any] | None, **axes: Any) -> Callable:
  """A function to be mapped, whose Variables name all their axes inside and outside of it.

  Args:
    f: the function.
    names: the `transform_metadata` of `nnx.vmap` or `nnx.scan`.
    **axes: their `in_axes` and `out_axes`.
  """
  if names:
    return transform_metadata(f, metadata=names, **axes)

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    out = f(*args, **kwargs)
    leaves = jax.tree.leaves(out, is_leaf=is_variable)
    if any(is_variable(x) and _has_names(x.sharding_names) for x in leaves):
      for x, axis in _mapped_results(out, axes["out_axes"]):
        # What is passed through, or is a gradient of it, has names for the whole array already.
        if _has_names(x.sharding_names) and len(_spec(x.sharding_names)) == _rank(x):
          add_axis(x, axis, {PARTITION_NAME: None})
    return out

  return wrapper
