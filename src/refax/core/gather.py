"""Parameters that are divided where they are kept, and whole where a layer uses them.

`nnx.plans.fsdp` divides parameters over the axis of the batch. XLA, left alone, may divide the
activations in the same way instead, and send these about. So a parameter that is read in a call of
a Module, while JAX traces, is gathered there; its gradient is divided again.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from refax import _jax
from refax.core.annotation import axes_by_sort, axes_of, of_axes

GATHERED = "gathered"
"""The name in the metadata of a Variable."""


@dataclasses.dataclass(frozen=True, repr=False)
class Gathered:
  """Where an array lies, and where it is used: specs for its last axes, on a mesh."""

  mesh: Mesh
  kept: PartitionSpec
  used: PartitionSpec

  def __repr__(self) -> str:
    return f"{self.used}"


class _Calls(threading.local):
  depth = 0


_calls = _Calls()


@contextlib.contextmanager
def in_call() -> Iterator[None]:
  """While a Module is called: what it reads, it uses."""
  _calls.depth += 1
  try:
    yield
  finally:
    _calls.depth -= 1


@contextlib.contextmanager
def as_kept() -> Iterator[None]:
  """While parameters are read where they lie, also in a call: an optimizer updates its part."""
  outer, _calls.depth = _calls.depth, 0
  try:
    yield
  finally:
    _calls.depth = outer


def gathered(x: Any, how: Gathered) -> Any:
  """An array of a parameter, gathered if a Module reads it while JAX traces."""
  if _calls.depth == 0 or not _jax.is_tracer(x):
    return x
  mesh = jax.sharding.get_abstract_mesh()
  mesh = how.mesh if mesh.empty else mesh
  explicit, auto = axes_by_sort(mesh)
  names = {a for part in how.kept for a in axes_of(part)}
  if not names <= explicit | auto:
    return x  # `shard_map` says itself what a device gets
  if names & explicit:
    used = of_axes(_last(how.used, x.ndim, None), explicit)
    x = jax.sharding.reshard(x, NamedSharding(mesh, used))
  if names & auto:
    x = _gather.bind(x, mesh=mesh, kept=of_axes(how.kept, auto), used=of_axes(how.used, auto))
  return x


def gather_again(primitive: Any, *_: Any, **__: Any) -> bool:
  """A policy for `nnx.remat`: keep everything for the backward pass but gathered parameters.

  A parameter that `nnx.plans.fsdp` divides is whole where a layer uses it. Its gradient needs the
  whole parameter once more: without this policy, each device keeps it until then. What only has
  another form is not kept either: it may be a parameter in another form. A `nnx.Stack` does so by
  itself; layers in a list are called by `nnx.remat(policy=nnx.plans.gather_again)`.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> block = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  >>> call = nnx.remat(lambda block, x: block(x), policy=nnx.plans.gather_again)
  >>> nnx.grad(lambda block: call(block, jnp.ones(2)).sum())(block).bias[...].tolist()
  [1.0, 1.0]
  """
  return primitive is not _gather and primitive.name not in _FORMS


_FORMS = frozenset(
  """
  broadcast_in_dim convert_element_type reshape sharding_constraint slice squeeze transpose
  """.split()  # noqa: SIM905 - words in lines are read faster
)


def _last(spec: PartitionSpec, ndim: int, before: Any) -> PartitionSpec:
  """The spec for as many axes: of a slice fewer, of what is mapped more in front."""
  parts = tuple(spec)
  return PartitionSpec(*[before] * (ndim - len(parts)), *parts[max(len(parts) - ndim, 0) :])


def _laid_out(x: Any, mesh: Any, spec: PartitionSpec) -> Any:
  spec = _last(spec, x.ndim, PartitionSpec.UNCONSTRAINED)
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


_gather = _jax.Primitive("refax_gather")
_gather.def_impl(lambda x, *, mesh, kept, used: x)
_gather.def_abstract_eval(lambda x, *, mesh, kept, used: x)
ad.deflinear2(_gather, lambda ct, x, *, mesh, kept, used: [_laid_out(ct, mesh, kept)])
batching.primitive_batchers[_gather] = lambda args, dims, **how: (
  _gather.bind(jnp.moveaxis(args[0], dims[0], 0), **how),
  0,
)
mlir.register_lowering(
  _gather,
  mlir.lower_fun(lambda x, mesh, kept, used: _laid_out(x, mesh, used), multiple_results=False),
)
