"""nnx.shard_map: a function of one shard of arrays and of state, on every device of a mesh."""

import functools
import itertools
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from refax._jax import is_tracer, put
from refax.core.annotation import of_axes
from refax.transforms.axes import argument_axes, assign
from refax.transforms.lift import Inputs, Outputs
from refax.transforms.stage import Staged, read_closures, values_of


def shard_map(
  f: Callable | None = None,
  *,
  mesh: Any,
  in_specs: Any,
  out_specs: Any,
  axis_names: AbstractSet[str] = frozenset(),
  check_vma: bool = True,
) -> Any:
  """Run a function on each shard of its arguments, as `jax.shard_map`.

  State that passes through an enclosing transform must be on the devices of the mesh: put it there
  with `nnx.device_put(model, NamedSharding(mesh, P()))`.

  Args:
    f: a function of Modules, Variables and arrays; without it, a decorator is returned.
    mesh: the mesh of devices.
    in_specs: for each positional argument a `PartitionSpec`, or `nnx.StateAxes` with one for each
      filter. State is written back with the same layout; state by closure is replicated.
    out_specs: the same for what `f` returns.
    axis_names: the axes of the mesh that `f` is a shard of; by default all. The others are JAX's,
      as outside.
    check_vma: as in `jax.shard_map`.

  Returns:
    A function like `f` on whole arrays.

  Raises:
    TreeMismatchError: the specs do not fit the arguments.

  >>> from refax import nnx; import jax, jax.numpy as jnp
  >>> from jax.sharding import AxisType, PartitionSpec as P
  >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
  >>> run = nnx.shard_map(
  ...   lambda model, x: model(x), mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
  ... )
  >>> run(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.ones((4, 2))).shape
  (4, 3)
  """
  if f is None:
    return lambda f: shard_map(
      f,
      mesh=mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      axis_names=axis_names,
      check_vma=check_vma,
    )

  @functools.wraps(f)
  def wrapper(*args: Any) -> Any:
    inputs = Inputs.of(args, {})
    found_specs = argument_axes(inputs, in_specs, len(args), default=PartitionSpec())
    specs = [found_specs[i] for i in range(len(inputs.leaves))]
    values = _put(values_of(inputs), specs, mesh, axis_names)
    shard = functools.partial(
      jax.shard_map, mesh=mesh, axis_names=frozenset(axis_names), check_vma=check_vma
    )
    found: list[Staged] = []

    def stage(values):
      found.append(Staged(f, inputs, values))
      return ()

    jax.eval_shape(shard(stage, in_specs=(specs,), out_specs=()), values)
    staged = found[0]
    refs, closures = read_closures([staged])
    spec = staged.outputs.spec._replace(written=tuple(sorted(staged.written)))
    leaves = [*inputs.leaves, *staged.outputs.fresh]
    fresh = assign(out_specs, spec.graphdef.root, spec.graphdef, leaves, "out_specs")
    out = Outputs(
      [specs[i] for i in spec.written],
      [fresh.get(len(values) + i, PartitionSpec()) for i in range(len(staged.outputs.fresh))],
      spec,
    )
    after = {key: PartitionSpec() for key in sorted(staged.closures_written)}
    run = shard(
      staged.run_apart,
      in_specs=(specs, {key: PartitionSpec() for key in closures}),
      out_specs=(out, after),
    )
    everywhere = _put(list(closures.values()), [PartitionSpec()] * len(closures), mesh, axis_names)
    outputs, after = run(values, dict(zip(closures, everywhere, strict=True)))
    return inputs.commit(outputs, refs, after)

  return wrapper


def _put(values: list[Any], specs: list[Any], mesh: Any, axis_names: Any) -> list[Any]:
  """Lay arrays out on the mesh: the buffer of a Variable is committed to where it is."""

  def laid_out(value: Any, spec: Any) -> Any:
    sharding = NamedSharding(mesh, spec)
    there = lambda x: is_tracer(x) or (axis_names and _lies(x, sharding, axis_names))
    return jax.tree.map(lambda x: x if there(x) else put(x, sharding), value)

  return list(map(laid_out, values, specs))


def _lies(x: Any, sharding: NamedSharding, axis_names: Any) -> bool:
  """Whether an array is on the mesh, and these axes of the mesh divide it as they are to."""
  found = getattr(x, "sharding", None)
  if not isinstance(found, NamedSharding) or found.mesh != sharding.mesh:
    return False
  pairs = itertools.zip_longest(*(of_axes(s.spec, axis_names) for s in (found, sharding)))
  return all(a == b for a, b in pairs)
