"""nnx.shard and nnx.create_sharded: a model laid out over a mesh by a plan."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from refax.core.annotation import placed
from refax.core.gather import GATHERED, Gathered
from refax.errors import InvalidArgumentError, ShardingError
from refax.graph.placement import put
from refax.sharding.plan import Layout, Place, Plan
from refax.sharding.plans import annotated
from refax.transforms.jit import jit

T = TypeVar("T")


def shard(tree: T, mesh: Mesh | None = None, plan: Any = None) -> T:
  """Lay a live model out over a mesh, in place.

  State that belongs to a parameter (moments of an optimizer, averages) lies as the parameter, if
  both are in `tree`; an optimizer that is made afterwards follows by itself. Everything that the
  plan says nothing of, random streams for example, is on each device as a whole. What `nnx.jit` and
  `jax.jit` write later stays where it is.

  Args:
    tree: a model, or several objects in a tuple: `(model, optimizer)`.
    mesh: the mesh; by default that of `jax.set_mesh`.
    plan: a plan of `nnx.plans`, a `nnx.Plan`, or a mapping for one; by default what the metadata
      `out_sharding` of the Variables says.

  Returns:
    `tree` itself.

  Raises:
    ShardingError: the plan does not fit the model or the mesh; nothing has moved.
    RefArgumentError: it is called inside a transform.

  >>> from refax import nnx; import jax
  >>> mesh = jax.make_mesh((1,), ("data",))
  >>> model = nnx.shard(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), mesh, nnx.plans.fsdp(min_size=0))
  >>> model.kernel.sharding.spec
  P(None, 'data')
  """
  mesh, plan = _mesh("nnx.shard", mesh), _plan(plan)
  found = plan.resolved(tree, mesh)
  where = {place.path: NamedSharding(mesh, layout.kept) for place, layout in found}
  whole = NamedSharding(mesh, PartitionSpec())
  result = put(tree, lambda path, _: where.get(path, whole))
  for place, layout in found:
    _mark(place, layout, mesh)
  return result


def _mark(place: Place, layout: Layout, mesh: Mesh) -> None:
  """Let a Variable know where its value is when a layer uses it, if that is not where it lies."""
  whole = lambda spec: PartitionSpec(*spec, *[None] * (place.variable.ndim - len(spec)))
  if layout.kept != layout.used:
    how = Gathered(mesh, whole(layout.kept), whole(layout.used))
    place.variable.set_metadata(**{GATHERED: how})


def create_sharded(make: Callable[[], T], mesh: Mesh | None = None, plan: Any = None) -> T:
  """Build a model that is laid out over a mesh from the start.

  `make` is compiled, and each device computes its part of the parameters: no device and no host
  ever holds a large parameter as a whole. The numbers are those of the model that `make` builds.

  Args:
    make: builds the model, or several objects in a tuple: a model and its optimizer.
    mesh: the mesh; by default that of `jax.set_mesh`.
    plan: as for `nnx.shard`.

  Returns:
    What `make` returns.

  Raises:
    ShardingError: the plan does not fit the model or the mesh.

  >>> from refax import nnx; import jax
  >>> mesh = jax.make_mesh((1,), ("data",))
  >>> make = lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  >>> nnx.create_sharded(make, mesh, nnx.plans.fsdp(min_size=0)).kernel.sharding.spec
  P(None, 'data')
  """
  mesh, plan = _mesh("nnx.create_sharded", mesh), _plan(plan)
  # XLA decides how to divide what leads to the parameters; the types of the mesh are for later.
  auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
  with jax.set_mesh(auto):
    tree = born(make, auto, plan)()
  return shard(tree, mesh, plan)


def born(make: Callable[[], T], mesh: Mesh, plan: Plan) -> Callable[[], T]:
  """The compiled function of `create_sharded`."""

  def build() -> T:
    tree = make()
    for place, layout in plan.resolved(tree, mesh):
      lay_out = functools.partial(placed, mesh=mesh, spec=layout.kept)
      place.variable.set_value(jax.tree.map(lay_out, place.variable.get_value()))
    return tree

  return jit(build)


def _mesh(function: str, mesh: Mesh | None) -> Mesh:
  mesh = jax.sharding.get_mesh() if mesh is None else mesh
  if not isinstance(mesh, Mesh):
    want = "a mesh of devices: jax.make_mesh((8,), ('data',)); behind it, the plan"
    raise InvalidArgumentError.value(function, "mesh", mesh, want)
  if mesh.empty:
    raise ShardingError.no_mesh(function)
  return mesh


def _plan(plan: Any) -> Plan:
  if plan is None:
    return annotated()
  if isinstance(plan, Mapping):
    return Plan(plan)
  if not isinstance(plan, Plan):
    want = "a plan, such as nnx.plans.fsdp('data'), or a mapping from paths to specs"
    raise InvalidArgumentError.value("nnx.shard", "plan", plan, want)
  return plan
