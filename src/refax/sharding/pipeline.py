"""Pipeline parallelism: each device has some layers of a stack, and microbatches pass through."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from refax import _jax
from refax.errors import InvalidArgumentError, ShardingError
from refax.nn import check
from refax.nn.block.stack import Stack
from refax.transforms.axes import Carry
from refax.transforms.control import cond
from refax.transforms.jit import jit
from refax.transforms.loops import scan
from refax.transforms.sharding import shard_map


def pipeline(
  stack: Stack, x: Any, /, *, microbatches: int, axis: str = "stage", mesh: Any = None
) -> jax.Array:
  """Call a stack whose layers are divided over devices, with a batch in parts (GPipe).

  Device `i` has the `i`-th part of the layers. In each of `microbatches + devices - 1` ticks it
  runs its layers on one microbatch and hands the result on. In `(devices - 1) / (microbatches +
  devices - 1)` of the time a device has nothing to do. At the end all devices have the result.

  It is `stack(x)` for each microbatch, one after the other: in value, in gradient, and in what
  layers write (a random stream draws for each microbatch, statistics see one after the other).

  Args:
    stack: the layers; `nnx.plans.pipeline(axis)` divides them over devices.
    x: `[batch, ...]`.
    microbatches: the number of parts of the batch.
    axis: the axis of the mesh that the layers are divided over.
    mesh: the mesh; by default that of `jax.set_mesh`.

  Returns:
    What `stack(x)` returns, `[batch, ...]`.

  Raises:
    ShardingError: there is no mesh, it lacks the axis, or the devices do not divide the layers
      evenly.
    InvalidArgumentError: the microbatches do not divide the batch evenly.

  Source: Y. Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline
  Parallelism", 2019, https://arxiv.org/abs/1811.06965.

  >>> from refax import nnx; import jax, jax.numpy as jnp
  >>> mesh = jax.make_mesh((1,), ("stage",))
  >>> stack = nnx.Stack(nnx.Linear, 4, 8, 8, rngs=nnx.Rngs(0))
  >>> nnx.pipeline(stack, jnp.ones((6, 8)), microbatches=3, mesh=mesh).shape
  (6, 8)
  """
  x = check.as_input(x)
  mesh = (_jax.wide_mesh() or _jax.context_mesh()) if mesh is None else mesh
  count = _stages(stack, mesh, axis)
  size = x.shape[0] if x.ndim else 0
  if type(microbatches) is not int or microbatches < 1 or not size or size % microbatches:
    want = f"a number that divides the batch of {size}"
    raise InvalidArgumentError.value("nnx.pipeline", "microbatches", microbatches, want)
  parts = x.reshape(microbatches, size // microbatches, *x.shape[1:])
  return _compiled(mesh, axis, count)(stack, parts).reshape(x.shape)


@functools.lru_cache(maxsize=64)
def _compiled(mesh: Any, axis: str, count: int) -> Callable[[Stack, jax.Array], jax.Array]:
  """The pipeline as a compiled function; the same one for calls of one kind."""
  if count == 1:
    return jit(scan(lambda stack, part: stack(part), in_axes=(None, 0), out_axes=0))
  wide = lambda x: x.astype(jnp.float32) if _is_narrow(x) else x

  def run(stack: Stack, parts: jax.Array, like: jax.Array) -> jax.Array:
    done = _stage(stack, parts.astype(like.dtype), axis, count)
    is_last = jax.lax.axis_index(axis) == count - 1
    return jax.lax.psum(wide(jnp.where(is_last, done, jnp.zeros_like(done))), axis)

  over = shard_map(
    run,
    mesh=mesh,
    in_specs=(PartitionSpec(axis), PartitionSpec(), PartitionSpec()),
    out_specs=PartitionSpec(),
    axis_names={axis},
    check_vma=False,
  )
  like = lambda parts: jnp.zeros((), parts.dtype)
  return jit(lambda stack, parts: over(stack, wide(parts), like(parts)).astype(parts.dtype))


def _is_narrow(x: jax.Array) -> bool:
  """Whether XLA on a CPU cannot sum these over devices in a part of a mesh: it ends the process."""
  return jax.default_backend() == "cpu" and x.dtype in (jnp.bfloat16, jnp.float16)


def _stages(stack: Any, mesh: Any, axis: str) -> int:
  if not isinstance(stack, Stack):
    raise InvalidArgumentError.value("nnx.pipeline", "stack", stack, "a nnx.Stack")
  if mesh is None or mesh.empty:
    raise ShardingError.no_mesh("nnx.pipeline")
  sizes = dict(mesh.shape)
  if axis not in sizes:
    raise ShardingError.unknown("", PartitionSpec(axis), axis, sizes)
  if len(stack) % sizes[axis]:
    raise ShardingError.uneven("", PartitionSpec(axis), (len(stack),), 0, sizes[axis])
  return sizes[axis]


def _stage(stack: Stack, parts: jax.Array, axis: str, count: int) -> jax.Array:
  """What one device does: a tick for each microbatch, and those in which it waits."""
  place, last = jax.lax.axis_index(axis), parts.shape[0] - 1
  onward = [(i, i + 1) for i in range(count - 1)]

  def tick(carry: Any, time: jax.Array, stack: Stack) -> Any:
    waiting, done = carry
    number = time - place  # of the microbatch that is here now
    first = jax.lax.dynamic_index_in_dim(parts, jnp.clip(number, 0, last), keepdims=False)
    x = jnp.where(place == 0, first, waiting)
    is_here = (number >= 0) & (number <= last)
    y = cond(is_here, lambda stack, x: stack(x), lambda stack, x: x, stack, x)
    slot = jnp.clip(number, 0, last)
    old = jax.lax.dynamic_index_in_dim(done, slot, keepdims=False)
    done = jax.lax.dynamic_update_index_in_dim(done, jnp.where(is_here, y, old), slot, 0)
    return jax.lax.ppermute(y, axis, onward), done

  run = scan(tick, in_axes=(Carry, 0, None), out_axes=Carry)
  start = (jnp.zeros_like(parts[0]), jnp.zeros_like(parts))
  return run(start, jnp.arange(last + count), stack)[1]
