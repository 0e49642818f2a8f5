"""out_sharding: over which axes of a mesh a Variable is divided, written in its metadata.

`nnx.Param(x, out_sharding=("embed", "mlp"))` names the axes of an array. A name is an axis of the
mesh, or a logical one that the rules of `nnx.logical_axis_rules` (or the Variable's own
`sharding_rules`) translate. In a mesh, a Variable is laid out as it says when it is made.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from refax import _jax, config
from refax.errors import ShardingError

PARTITION_NAME = "partition_name"
NAMES = frozenset(
  """
  eager_sharding mesh opt_sharding optimizer_sharding out_sharding sharding sharding_names
  sharding_rules
  """.split()  # noqa: SIM905 - words in lines are read faster
)

OF_STATE = ("opt_sharding", "optimizer_sharding")
"""The entry that names the axes of what an optimizer keeps for an array, here and in Flax NNX."""

AXES = ("out_sharding", *OF_STATE)
"""The entries that name axes."""

Axis = str | tuple[str, ...] | None
Rules = Sequence[tuple[str, Axis]]

_rules = jax.make_user_context(default_value=())  # of a thread, and part of the key of every jit


@dataclasses.dataclass(frozen=True)
class Annotated:
  """A value with metadata for the Variable that it becomes: what an initializer may return."""

  value: Any
  metadata: Mapping[str, Any]


def with_metadata(initializer: Callable[..., Any], **metadata: Any) -> Callable[..., Any]:
  """An initializer whose values bring metadata to the Variables that are made of them.

  Args:
    initializer: `(key, shape, dtype) -> array`.
    **metadata: hashable facts, as for `nnx.Variable`.

  >>> from refax import nnx
  >>> init = nnx.with_metadata(nnx.initializers.zeros_init(), tag="bias")
  >>> nnx.Linear(2, 3, bias_init=init, rngs=nnx.Rngs(0)).bias.tag
  'bias'
  """

  @functools.wraps(initializer)
  def wrapper(*args: Any, **kwargs: Any) -> Annotated:
    return Annotated(initializer(*args, **kwargs), metadata)

  return wrapper


def with_partitioning(
  initializer: Callable[..., Any], sharding: Any, mesh: Any = None, **metadata: Any
) -> Callable[..., Any]:
  """An initializer whose Variables name the axes that they are divided over.

  Args:
    initializer: `(key, shape, dtype) -> array`.
    sharding: a name or None for each axis of the array, or a `PartitionSpec`.
    mesh: the mesh; by default that of `jax.set_mesh`.
    **metadata: more metadata of the Variables.

  >>> from refax import nnx
  >>> init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
  >>> nnx.Linear(2, 3, kernel_init=init, rngs=nnx.Rngs(0)).kernel.out_sharding
  (None, 'model')
  """
  return with_metadata(initializer, out_sharding=sharding, mesh=mesh, **metadata)


@contextlib.contextmanager
def logical_axis_rules(rules: Rules) -> Iterator[None]:
  """Which axes of the mesh the names in `out_sharding` mean, for a block or a decorated function.

  Args:
    rules: pairs of a name and an axis of the mesh, a tuple of several axes, or None.

  Raises:
    ShardingError: two rules give one name different axes.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> kernel = nnx.Param(jnp.zeros((2, 4)), out_sharding=("embed", "mlp"))
  >>> with nnx.logical_axis_rules([("embed", None), ("mlp", "model")]):
  ...   tuple(nnx.get_partition_spec(kernel)[...])
  (None, 'model')
  """
  with _rules(checked_rules(rules)):
    yield


def get_logical_axis_rules() -> Rules:
  """The rules of `nnx.logical_axis_rules` of now.

  >>> get_logical_axis_rules()
  ()
  """
  return _rules.value


def checked_rules(rules: Rules | Mapping[str, Axis]) -> tuple[tuple[str, Axis], ...]:
  """Rules as pairs, hashable; a mapping is one of them.

  Raises:
    ShardingError: two rules give one name different axes.
  """
  found: dict[str, Axis] = {}
  for name, axis in rules.items() if isinstance(rules, Mapping) else rules:
    axis = tuple(axis) if isinstance(axis, list | tuple) else axis
    if found.setdefault(name, axis) != axis:
      raise ShardingError.rules("", name, found[name], axis)
  return tuple(found.items())


def named(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """Metadata with the names of the axes under `out_sharding`, hashable, without a mesh of None."""
  found = dict(metadata)
  for old in ("sharding_names", "sharding"):
    if old in found:
      found["out_sharding"] = found.pop(old)
  for name in AXES:
    if isinstance(axes := found.get(name), list | tuple):
      found[name] = tuple(tuple(x) if isinstance(x, list) else x for x in axes)
    elif isinstance(axes, str):
      found[name] = (axes,)
  if found.get("sharding_rules") is not None:
    found["sharding_rules"] = checked_rules(found["sharding_rules"])
  if found.get("mesh", _rules) is None:
    del found["mesh"]
  return found


def applied(value: Any, metadata: dict[str, Any], origin: Any) -> tuple[Any, dict[str, Any]]:
  """The value laid out as the metadata says, and the metadata in one form.

  Raises:
    ShardingError: the metadata fits neither the array, nor the rules, nor the mesh.
  """
  eager = metadata.pop("eager_sharding", None)
  metadata = named(metadata)
  for key in AXES:
    names = metadata.get(key)
    _check_names(names, origin)
    if isinstance(names, tuple) and hasattr(value, "ndim"):
      # All of them: a function that is mapped adds an axis in front, or takes it away.
      metadata[key] = names + (None,) * (value.ndim - len(names))
  if config.using_eager_sharding() if eager is None else eager:
    value = laid_out(value, metadata, origin)
  return value, metadata


def _check_names(axes: Any, origin: Any) -> None:
  """Refuse what names no axis."""
  for part in axes if isinstance(axes, tuple) else ():
    if not all(isinstance(x, str) for x in axes_of(part)):
      raise ShardingError.names(origin, axes, part)


def reshaped(x: Any, shape: tuple[int, ...]) -> Any:
  """What an initializer has returned in another shape; what is annotated is so in this shape."""
  if isinstance(x, Annotated):
    return dataclasses.replace(x, value=x.value.reshape(shape))
  return x.reshape(shape)


def spec_of(metadata: Mapping[str, Any], origin: Any = "") -> PartitionSpec | None:
  """What the metadata of a Variable says about its layout, in axes of the mesh; None if nothing.

  Raises:
    ShardingError: rules contradict each other.
  """
  axes = metadata.get("out_sharding")
  if isinstance(axes, NamedSharding):
    return axes.spec
  if axes is None:
    return None
  rules = dict(_rules.value)
  for name, axis in metadata.get("sharding_rules") or ():
    if rules.setdefault(name, axis) != axis:
      raise ShardingError.rules(origin, name, rules[name], axis)

  def translate(part: Any) -> Any:
    if not isinstance(part, tuple):
      return rules.get(part, part) if isinstance(part, str) else part
    return tuple(a for x in part for a in axes_of(rules.get(x, x))) or None

  return PartitionSpec(*map(translate, axes))


def mesh_of(metadata: Mapping[str, Any]) -> Any:
  """The mesh that a Variable is for: of its metadata, or of `jax.set_mesh`; None without one."""
  axes = metadata.get("out_sharding")
  mesh = axes.mesh if isinstance(axes, NamedSharding) else metadata.get("mesh")
  mesh = _jax.context_mesh() if mesh is None else mesh
  return None if mesh is None or mesh.empty else mesh


def laid_out(value: Any, metadata: Mapping[str, Any], origin: Any) -> Any:
  """A value on the mesh as the metadata says, where there is a mesh."""
  spec = spec_of(metadata, origin)
  mesh = None if spec is None else mesh_of(metadata)
  if spec is None or mesh is None:
    return value
  return jax.tree.map(lambda x: placed(x, mesh, spec, origin), value)


def placed(x: Any, mesh: Any, spec: PartitionSpec, origin: Any = "") -> Any:
  """An array laid out over a mesh, also while JAX traces; what is no array, as it is.

  Raises:
    ShardingError: the spec does not fit the array or the mesh.
  """
  if not hasattr(x, "shape") or isinstance(x, jax.ShapeDtypeStruct):
    return x
  check(spec, mesh, x.shape, origin)
  if not _jax.is_tracer(x) and isinstance(mesh, jax.sharding.Mesh) and _jax.no_trace_active():
    return _jax.put(x, NamedSharding(mesh, spec))
  return constrained(x, mesh, spec)


def constrained(x: jax.Array, mesh: Any, spec: PartitionSpec) -> jax.Array:
  """An array laid out over a mesh while JAX traces: explicit axes by its type, others by XLA."""
  explicit, auto = axes_by_sort(mesh)
  if explicit:
    x = jax.sharding.reshard(x, NamedSharding(mesh, of_axes(spec, explicit)))
  if not explicit or any(of_axes(spec, auto)):
    x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, of_axes(spec, auto)))
  return x


def axes_by_sort(mesh: Any) -> tuple[set[str], set[str]]:
  """The explicit and the automatic axes of a mesh; the manual ones are not JAX's to lay out."""
  sorts = list(zip(mesh.axis_names, mesh.axis_types, strict=True))
  of = lambda wanted: {name for name, sort in sorts if sort == wanted}
  return of(AxisType.Explicit), of(AxisType.Auto)


def of_axes(spec: PartitionSpec, names: Container[str]) -> PartitionSpec:
  """A spec of these axes of the mesh only.

  >>> of_axes(PartitionSpec(("a", "b"), "a"), {"b"})
  P('b', None)
  """
  return PartitionSpec(*(part_of(a for a in axes_of(part) if a in names) for part in spec))


def part_of(axes: Iterable[str]) -> Any:
  """The part of a spec for one axis of an array, from axes of the mesh: the inverse of `axes_of`.

  >>> part_of(()), part_of(["a"]), part_of(["a", "b"])
  (None, 'a', ('a', 'b'))
  """
  axes = tuple(axes)
  return axes if len(axes) > 1 else axes[0] if axes else None


def axes_of(part: Any) -> tuple[str, ...]:
  """The axes of the mesh that one axis of an array is divided over.

  >>> axes_of(None), axes_of("a"), axes_of(("a", "b"))
  ((), ('a',), ('a', 'b'))
  """
  if part is None or part is PartitionSpec.UNCONSTRAINED:
    return ()
  return part if isinstance(part, tuple) else (part,)


def check(spec: PartitionSpec, mesh: Any, shape: tuple[int, ...], at: Any) -> None:
  """Refuse a spec that does not fit an array of this shape, on this mesh.

  Raises:
    ShardingError: it names more axes than there are, an axis that the mesh has not, one twice, or
      one that does not divide the array evenly.
  """
  if len(spec) > len(shape):
    raise ShardingError.rank(at, spec, shape)
  sizes, used = dict(mesh.shape), set()
  for axis in (a for part in spec for a in axes_of(part)):
    if axis not in sizes:
      raise ShardingError.unknown(at, spec, axis, sizes)
    if axis in used:
      raise ShardingError.twice(at, spec, axis)
    used.add(axis)
  for dimension, part in enumerate(spec):
    count = math.prod(sizes[axis] for axis in axes_of(part))
    if shape[dimension] % count:
      raise ShardingError.uneven(at, spec, shape, dimension, count)
