"""Memory of attention: keys and values of the positions that were decoded so far.

A position has a slot. In a memory of a layer with a sliding window the slots are a ring: position
`p` is in slot `p % size`, and the newest positions take the places of the oldest, which no query
sees any more. Everywhere else position `p` is in slot `p`, and a memory can be full.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from refax import _jax
from refax.core.variable import Cache
from refax.errors import InvalidArgumentError, ShapeMismatchError
from refax.nn import check, explicit
from refax.typing import Dtype

LOST = -(2**30)
"""`used` of a memory that was cut, inside a transform, to what it no longer holds: all that is
computed from there on is NaN."""


class Memory(NamedTuple):
  """Keys and values `[batch..., slots, heads, size]`, and how many positions were decoded.

  Attributes:
    keys: of the positions in the slots.
    values: the same for values.
    used: how many positions were decoded: one number, or one for each sequence, `[batch...]`.
    window: how many positions a query sees; None for all.
  """

  keys: Cache
  values: Cache
  used: Cache
  window: int | None = None

  @classmethod
  def empty(
    cls, shape: tuple[int, ...], dtype: Dtype, window: int | None, per_sequence: bool, spare: int
  ) -> "Memory":
    """A memory without a position, for as many as `shape` says; of a window, as many as it takes.

    Args:
      shape: `(batch..., positions, heads, size)`.
      dtype: of keys and values.
      window: how many positions a query sees; None for all.
      per_sequence: whether sequences of the batch are of different lengths.
      spare: how many positions more than a window a ring keeps, so that it can be cut back.
    """
    batch, (positions, *heads) = shape[:-3], shape[-3:]
    slots = positions if window is None else min(positions, window + spare)
    zeros = lambda: Cache(jnp.zeros((*batch, slots, *heads), dtype))
    used = Cache(jnp.zeros(batch if per_sequence else (), jnp.int32))
    return cls(zeros(), zeros(), used, window)

  @property
  def slots(self) -> int:
    """How many positions it holds at once."""
    return self.keys.shape[-3]

  @property
  def is_ring(self) -> bool:
    """Whether new positions take the places of old ones."""
    return self.window is not None and self.slots >= self.window

  def next_positions(self, length: int) -> jax.Array:
    """The positions that come next, `[length]` or, for each sequence, `[batch..., length]`."""
    return self.used[...][..., None] + jnp.arange(length)

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
    if self.is_ring:
      return
    used = self.used[...]
    known = 0 if _jax.is_tracer(used) else int(used.max())  # inside a transform nobody knows
    if known + key.shape[-3] > shape[-3]:
      raise ShapeMismatchError(
        f"the memory of {layer} is full",
        at=check.origin(self.keys),
        got=f"{key.shape[-3]} more positions, after {known} of {shape[-3]}",
        fix="call init_cache for a longer memory, or to start again",
      )

  def fits(self, layer: str, length: int) -> jax.Array | None:
    """Which of the next positions the memory has room for, None where all have.

    In a transform nothing can be raised: `checkify` names the layer that has none, and what it
    computes for a position past the end is made `poisoned`.
    """
    used = self.used[...]
    if not _jax.is_tracer(used):  # `check_room` has seen it
      return None
    positions = self.next_positions(length)
    fits = positions >= 0 if self.is_ring else (positions >= 0) & (positions < self.slots)
    return _jax.checked(fits, f"the memory of {layer} is full: it holds {self.slots} positions")

  def add(self, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Write the next keys and values, in place.

    What has no room is left out, and what is there stays.

    Returns:
      The keys and values to look at, and a mask `[batch... or 1..., 1, queries, keys]`: a query
      sees the positions up to its own, of a window the last ones.
    """
    start, own, length = self.used[...], self.next_positions(key.shape[-3]), key.shape[-3]
    new = [x.astype(cache.dtype) for cache, x in ((self.keys, key), (self.values, value))]
    # In a small ring, the last of the new would take the place of what the first has to see.
    apart = self.is_ring and self.slots < (self.window or 0) + length - 1
    seen = [self.keys[...], self.values[...]]
    slots = self._held(start) if apart else None
    for cache, x in zip((self.keys, self.values), new, strict=True):
      cache[...] = explicit.call_like(_writer(self.is_ring), cache[...], x, start)
    end = start + length
    self.used[...] = end if self.is_ring else jnp.where(end > self.slots, self.slots, end)
    if slots is not None:
      seen = [_joined(old, x) for old, x in zip(seen, new, strict=True)]
      slots = jnp.concatenate([slots, own], axis=-1)
    else:
      seen, slots = [self.keys[...], self.values[...]], self._held(end)
    mask = self._visible(own, slots)
    lead = tuple(range(key.ndim - 3 - (own.ndim - 1)))
    return seen[0], seen[1], jnp.expand_dims(jnp.expand_dims(mask, -3), lead)

  def _held(self, used: jax.Array) -> jax.Array:
    """The position in each slot after `used` positions, `[slots]` or `[batch..., slots]`."""
    slots = jnp.arange(self.slots)
    if not self.is_ring:
      return jnp.broadcast_to(slots, (*used.shape, self.slots))
    last = used[..., None] - 1
    return last - (last - slots) % self.slots  # negative where there is none yet

  def _visible(self, own: jax.Array, held: jax.Array) -> jax.Array:
    """Which of the positions `held` a query at its `own` sees, `[..., queries, keys]`."""
    own, held = own[..., None], held[..., None, :]
    visible = (held >= 0) & (held <= own)
    return visible if self.window is None else visible & (held > own - self.window)

  def cut(self, layer: str, length: Any) -> None:
    """Forget all positions but the first `length`, one number or one for each sequence.

    Raises:
      InvalidArgumentError: they are more than there are; or newer ones have taken their places, in
        the ring of a window. Inside a transform nothing can be raised: what is computed from there
        on is NaN.
    """
    used = self.used[...]
    length = jnp.broadcast_to(jnp.asarray(length, jnp.int32), used.shape)
    kept = (length >= 0) & (length <= used)
    if self.is_ring and self.window is not None:
      in_place = used - length <= self.slots - self.window + 1
      kept &= (used <= self.slots) | in_place | (length == 0)
    if not _jax.is_tracer(kept) and not bool(kept.all()):
      last = jnp.maximum(used - (self.slots - (self.window or 0) + 1), 0)
      first = jnp.where(used <= self.slots, 0, last) if self.is_ring else jnp.zeros_like(used)
      want = f"{first.tolist()} to {used.tolist()}, the lengths that the memory of {layer} can have"
      raise InvalidArgumentError.value("truncate_cache", "length", length.tolist(), want)
    kept = _jax.checked(kept, f"the memory of {layer} cannot be cut to what it no longer holds")
    self.used[...] = jnp.where(kept, length, LOST)


def _joined(old: jax.Array, new: jax.Array) -> jax.Array:
  """The slots of a memory, and new positions after them."""
  join = lambda old, new: jnp.concatenate([old, new], axis=-3)
  return explicit.call(join, old, new, out=lambda: explicit.names(old))


def _writer(is_ring: bool) -> Any:
  return _added_to_ring if is_ring else _added


def _added(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
  """A memory with `new` at `start`, as far as there is room."""
  axis, length = old.ndim - 3, new.shape[old.ndim - 3]
  if start.size > 1:
    return _scattered(old, new, start[..., None] + jnp.arange(length))
  start = start.reshape(())
  place = jnp.clip(start, 0, old.shape[axis] - length)
  if _jax.is_tracer(start):
    is_new = (jnp.arange(length) >= start - place) & (start >= 0)
    before = lax.dynamic_slice_in_dim(old, place, length, axis)
    # Not `jnp.roll`, which first tries whether the shift is known: 25 ms of tracing each time.
    twice = jnp.concatenate([new, new], axis)
    moved = lax.dynamic_slice_in_dim(twice, length - (start - place), length, axis)
    new = jnp.where(is_new[:, None, None], moved, before)
  return lax.dynamic_update_slice_in_dim(old, new, place, axis)


def _added_to_ring(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
  """A ring with `new` from position `start` on; of more than there are slots, the last."""
  axis, slots = old.ndim - 3, old.shape[old.ndim - 3]
  length = new.shape[axis]
  kept = min(length, slots)
  new = lax.slice_in_dim(new, length - kept, length, axis=axis)
  start = start + (length - kept)
  if start.size == 1 and kept == 1:
    return lax.dynamic_update_slice_in_dim(old, new, start.reshape(()) % slots, axis)
  return _scattered(old, new, (start[..., None] + jnp.arange(kept)) % slots)


def _scattered(old: jax.Array, new: jax.Array, places: jax.Array) -> jax.Array:
  """`old` with `new` in the slots `places`, `[length]` or `[batch..., length]`; others drop."""
  batch, slots = old.shape[:-3], old.shape[-3]
  places = jnp.broadcast_to(places, (*batch, places.shape[-1]))
  places = jnp.where(places < 0, slots, places)  # a negative one would count from the end
  rows = jnp.meshgrid(*map(jnp.arange, batch), indexing="ij")
  return old.at[*(row[..., None] for row in rows), places].set(new, mode="drop")


def poisoned(x: jax.Array, fits: jax.Array | None) -> jax.Array:
  """`x` of shape `[batch..., length, features]`, with NaN where `fits` is false.

  A factor, not a selection: so the gradient of what is NaN is NaN too.
  """
  if fits is None:
    return x
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    return jnp.where(fits[..., None], x, poison(x.dtype))
  return x * jnp.where(fits, 1.0, poison(x.dtype)).astype(x.dtype)[..., None]


def poison(dtype: Dtype) -> Any:
  """The number that nobody takes for a result: NaN, or the integer that is farthest from 0."""
  if jnp.issubdtype(dtype, jnp.integer):
    return jnp.iinfo(dtype).min or jnp.iinfo(dtype).max
  return jnp.nan if jnp.issubdtype(dtype, jnp.inexact) else True
