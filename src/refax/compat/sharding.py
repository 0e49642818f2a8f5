"""Sharding that is written into the metadata of Variables, with Flax NNX's names."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from refax import _jax
from refax.core.variable import Variable
from refax.graph.split import split
from refax.transforms.abstract import eval_shape
from refax.transforms.axes import StateAxes

NAMES = ("out_sharding", "sharding", "sharding_names", "mesh", "sharding_rules")
PARTITION_NAME = "partition_name"

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]


class _Local(threading.local):
  rules: Rules = ()


_local = _Local()


def named(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """Metadata with the names of the axes under `out_sharding`, hashable."""
  found = dict(metadata)
  for old in ("sharding_names", "sharding"):
    if old in found:
      found["out_sharding"] = found.pop(old)
  for name in ("out_sharding", "sharding_rules"):
    if isinstance(found.get(name), list | tuple) and not isinstance(found[name], PartitionSpec):
      found[name] = tuple(tuple(x) if isinstance(x, list) else x for x in found[name])
  return found


@contextlib.contextmanager
def logical_axis_rules(rules: Rules) -> Iterator[None]:
  """Which axes of the mesh the names of axes in `out_sharding` mean, for a block.

  Args:
    rules: pairs of a name and an axis of the mesh, several, or None.

  >>> from refax.compat import nnx
  >>> with nnx.logical_axis_rules([("embed", "data")]):
  ...   tuple(nnx.get_partition_spec(nnx.Param(jax.numpy.zeros(2), sharding=("embed",)))[...])
  ('data',)
  """
  outer = _local.rules
  _local.rules = tuple(tuple(rule) for rule in rules)  # pyright: ignore[reportAttributeAccessIssue]
  try:
    yield
  finally:
    _local.rules = outer


def get_logical_axis_rules() -> Rules:
  """The rules of `logical_axis_rules` of now."""
  return _local.rules


def spec_of(metadata: Mapping[str, Any]) -> PartitionSpec | None:
  """What the metadata of a Variable says about its layout; None if nothing."""
  axes = metadata.get("out_sharding")
  if isinstance(axes, NamedSharding):
    return axes.spec
  if axes is None or isinstance(axes, PartitionSpec):
    return axes
  rules = {}
  for name, axis in (*(metadata.get("sharding_rules") or ()), *_local.rules):
    rules.setdefault(name, axis)
  used: set[Any] = set()
  found = []
  for axis in axes:
    axis = rules.get(axis, axis) if isinstance(axis, str) else axis
    if axis in used:
      axis = None
    used |= set(axis if isinstance(axis, tuple) else (axis,)) - {None}
    found.append(axis)
  return PartitionSpec(*found)


def laid_out(value: Any, metadata: Mapping[str, Any]) -> Any:
  """A value on the mesh as the metadata says, where there is a mesh."""
  spec = spec_of(metadata)
  if spec is None:
    return value
  axes = metadata.get("out_sharding")
  mesh = axes.mesh if isinstance(axes, NamedSharding) else metadata.get("mesh")
  if mesh is None:
    mesh = _jax.context_mesh()
  if mesh is None or mesh.empty:
    return value
  return jax.tree.map(lambda x: _placed(x, NamedSharding(mesh, spec)), value)


def _placed(x: Any, sharding: NamedSharding) -> Any:
  if not hasattr(x, "shape") or isinstance(x, jax.ShapeDtypeStruct):
    return x
  if not _jax.is_tracer(x) and isinstance(sharding.mesh, jax.sharding.Mesh):
    return jax.device_put(x, sharding)
  if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types:
    return jax.sharding.reshard(x, sharding)
  return jax.lax.with_sharding_constraint(x, sharding)


def get_var_pspec(variable: Variable) -> PartitionSpec | None:
  """The PartitionSpec of a Variable; that of no axis where it has none, None if it is no array."""
  spec = spec_of(variable._def.metadata)
  if spec is not None:
    return spec
  return PartitionSpec() if hasattr(variable.get_raw_value(), "shape") else None


def get_partition_spec(tree: Any) -> Any:
  """A copy of a pytree with a PartitionSpec in each Variable, and in place of each array."""

  def spec(x: Any) -> Any:
    if isinstance(x, Variable):
      return x._handle(get_var_pspec(x), x._def)
    return PartitionSpec() if hasattr(x, "shape") else None

  return jax.tree.map(spec, tree, is_leaf=lambda x: isinstance(x, Variable))


def get_named_sharding(tree: Any, mesh: Any) -> Any:
  """`get_partition_spec` with a NamedSharding for each PartitionSpec."""
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    get_partition_spec(tree),
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )


def get_abstract_model(init_fn: Callable[[], Any], mesh: Any, *, graph: Any = None) -> Any:
  """The GraphDef of a model, and its abstract State with shardings; nothing is computed."""
  with jax.set_mesh(mesh):
    graphdef, state = split(eval_shape(init_fn))
    state = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state,
      get_named_sharding(state, mesh),
      is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct),
    )
  return graphdef, state


def add_axis(tree: Any, index: int, transform_metadata: Mapping[str, Any]) -> Any:
  """Let the Variables of a tree have one axis more, with the name that the metadata gives it."""
  return _change_axis(tree, index, transform_metadata, add=True)


def remove_axis(tree: Any, index: int, transform_metadata: Mapping[str, Any]) -> Any:
  """Let the Variables of a tree have one axis less."""
  return _change_axis(tree, index, transform_metadata, add=False)


def _change_axis(tree: Any, index: int, metadata: Mapping[str, Any], *, add: bool) -> Any:
  if PARTITION_NAME not in metadata:
    raise ValueError(
      f"transform_metadata has no {PARTITION_NAME!r}, the name of the axis\n  got: {dict(metadata)}"
    )
  others = {k: v for k, v in metadata.items() if k != PARTITION_NAME}
  names = {"out_sharding": metadata[PARTITION_NAME]} | others

  def change(x: Any) -> Any:
    if not isinstance(x, Variable):
      return x
    for key, name in names.items():
      axes = x._def.metadata.get(key)
      if isinstance(axes, tuple) and axes:
        x.set_metadata(**{key: _with_axis(axes, index, name, add=add)})
    (x.add_axis if add else x.remove_axis)(index, metadata[PARTITION_NAME])  # pyright: ignore[reportAttributeAccessIssue]
    return x

  return jax.tree.map(change, tree, is_leaf=lambda x: isinstance(x, Variable))


def _with_axis(axes: tuple, index: int, name: Any, *, add: bool) -> tuple:
  found = list(axes)
  if add:
    found += [None] * (index - len(found))
    found.insert(index if index >= 0 else len(found) + 1 + index, name)
  elif (removed := found.pop(index)) != name:
    raise ValueError(f"expected {name!r} at index {index} of {axes!r}, found {removed!r}")
  return tuple(found)


class StateSharding(StateAxes):
  """A sharding for each filter: how the Variables of one argument of `nnx.jit` are laid out.

  >>> from refax.compat import nnx
  >>> nnx.StateSharding({nnx.Param: None, ...: None}).shardings
  (None, None)
  """

  def __init__(self, shardings: Any, /):
    pairs = isinstance(shardings, Mapping | StateAxes)
    super().__init__(shardings if pairs else dict(shardings))

  @property
  def filters(self) -> tuple:
    """The filters."""
    return tuple(filter for filter, _ in self.items)

  @property
  def shardings(self) -> tuple:
    """The sharding of each."""
    return tuple(sharding for _, sharding in self.items)

  def map_prefix(self, path: Any, variable: Any) -> Any:
    """The sharding of a Variable."""
    return self.axis(path, variable)
