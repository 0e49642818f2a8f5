"""Which arrays that a function has returned nobody else has: they go into cells without a copy.

The state of an optimizer is twice as large as its parameters, and `tx.init` has just made it; a
checkpoint has just been read. To copy them would take as long again. But a function of a user may
return an array that it keeps, or one that it was given, or one in two places. Those are copied, for
later steps donate what is in a cell.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from refax import _jax


def _references(xs: list[Any], i: int) -> int:
  return sys.getrefcount(xs[i])


_ALONE = _references([object()], 0)
"""The references to an object that only a list refers to."""


class Owned:
  """Which of the arrays in a list are held by this list alone and share no memory with others.

  Args:
    arrays: what a function returned. Whatever else refers to an element makes it not owned.
    given: what the function was given.

  >>> import jax.numpy as jnp
  >>> kept = jnp.ones(2)
  >>> owned = Owned([jnp.zeros(3), kept])
  >>> owned(0), owned(1)
  (True, False)
  """

  def __init__(self, arrays: list[Any], given: Iterable[Any] = ()):
    self._arrays = arrays
    self._places = list(map(_places, arrays))
    self._users = Counter(place for places in self._places for place in places)
    self._users.update(place for x in given for place in _places(x))

  def __call__(self, i: int) -> bool:
    """Whether nobody else has element `i`, now."""
    if _references(self._arrays, i) != _ALONE:
      return False
    places = self._places[i]
    return bool(places) and all(self._users[place] == 1 for place in places)


def _places(x: Any) -> list[Any]:
  """Where the memory of a concrete array begins, on each of its devices; nothing for other things.

  Two Arrays of JAX may share memory, after `jax.device_put` for one.
  """
  if not isinstance(x, jax.Array) or _jax.is_ref(x) or _jax.is_tracer(x) or not x.size:
    return []
  if not isinstance(x.dtype, np.dtype):
    return []  # typed keys: somebody may have their bits
  try:
    if len(x.sharding.device_set) == 1:
      return [x.unsafe_buffer_pointer()]
    shards = x.addressable_shards
    return [(shard.device.id, shard.data.unsafe_buffer_pointer()) for shard in shards]
  except Exception:  # a platform that does not say
    return []
