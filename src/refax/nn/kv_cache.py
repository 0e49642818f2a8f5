"""Memory of attention: keys and values of the positions that were decoded so far."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from refax import _jax
from refax.core.variable import Cache
from refax.errors import ShapeMismatchError
from refax.nn import check
from refax.typing import Dtype


class Memory(NamedTuple):
  """Keys and values `[batch..., max_length, heads, size]`, and how many positions they have."""

  keys: Cache
  values: Cache
  used: Cache

  @classmethod
  def empty(cls, shape: tuple[int, ...], dtype: Dtype) -> "Memory":
    """A memory of this shape, without a position."""
    zeros = lambda: Cache(jnp.zeros(shape, dtype))
    return cls(zeros(), zeros(), Cache(jnp.zeros((), jnp.int32)))

  def check_room(self, layer: str, query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    """Raise ShapeMismatchError unless the memory can take these, one key for each query."""
    shape = self.keys.shape
    fits = key.shape[:-3] + key.shape[-2:] == shape[:-3] + shape[-2:]
    if not fits or value.shape != key.shape or query.shape[:-2] != key.shape[:-2]:
      raise ShapeMismatchError(
        f"{layer} decodes queries, keys and values of the same positions, "
        f"for a batch of shape {shape[:-3]}",
        at=check.origin(self.keys),
        got=f"query {query.shape}, key {key.shape}, value {value.shape}",
        fix="call init_cache with the shape of the inputs, with the largest length",
      )
    used = self.used[...]
    known = 0 if _jax.is_tracer(used) else int(used)  # inside a transform nobody knows
    if known + key.shape[-3] > shape[-3]:
      raise ShapeMismatchError(
        f"the memory of {layer} is full",
        at=check.origin(self.keys),
        got=f"{key.shape[-3]} more positions, after {known} of {shape[-3]}",
        fix="call init_cache for a longer memory, or to start again",
      )

  def visible(self, query: jax.Array) -> jax.Array:
    """A mask `[1..., 1, queries, max_length]`: a query sees all positions up to its own."""
    own = self.used[...] + jnp.arange(query.shape[-3])
    mask = jnp.arange(self.keys.shape[-3]) <= own[:, None]
    return jnp.expand_dims(mask, tuple(range(query.ndim - 2)))

  def fits(self, layer: str, length: int) -> jax.Array | None:
    """Which of the next positions the memory has room for, `[length]`; None where all have.

    In a transform nothing can be raised: `checkify` names the layer that has none, and what it
    computes for a position past the end is made `poisoned`.
    """
    used = self.used[...]
    if not _jax.is_tracer(used):  # `check_room` has seen it
      return None
    size = self.keys.shape[-3]
    message = f"the memory of {layer} is full: it holds {size} positions"
    return _jax.checked(used + jnp.arange(length) < size, message)

  def add(self, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Write the next keys and values, in place; returns all of the memory.

    What has no room is left out, and what is there stays.
    """
    start, axis = self.used[...], self.keys.ndim - 3
    size, length = self.keys.shape[axis], key.shape[axis]
    place = jnp.minimum(start, size - length)
    is_new = jnp.arange(length) >= start - place
    for cache, new in ((self.keys, key), (self.values, value)):
      old, new = cache[...], new.astype(cache.dtype)
      if _jax.is_tracer(start):
        before = lax.dynamic_slice_in_dim(old, place, length, axis)
        new = jnp.where(is_new[:, None, None], jnp.roll(new, start - place, axis), before)
      cache[...] = lax.dynamic_update_slice_in_dim(old, new, place, axis)
    self.used[...] = jnp.minimum(start + length, size)
    return self.keys[...], self.values[...]


def poisoned(x: jax.Array, fits: jax.Array | None) -> jax.Array:
  """`x` of shape `[batch..., length, features]`, with NaN where `fits` is false.

  A factor, not a selection: so the gradient of what is NaN is NaN too.
  """
  if fits is None:
    return x
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    return jnp.where(fits[:, None], x, poison(x.dtype))
  return x * jnp.where(fits, 1.0, poison(x.dtype)).astype(x.dtype)[:, None]


def poison(dtype: Dtype) -> Any:
  """The number that nobody takes for a result: NaN, or the integer that is farthest from 0."""
  if jnp.issubdtype(dtype, jnp.integer):
    return jnp.iinfo(dtype).min or jnp.iinfo(dtype).max
  return jnp.nan if jnp.issubdtype(dtype, jnp.inexact) else True
