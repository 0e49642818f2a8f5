"""Arrays in dtypes that a format does not have, as integers that every format has."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

UNKNOWN_TO_ORBAX = frozenset(("uint2", "uint4", "float8_e4m3"))
"""Dtypes that tensorstore, by which orbax writes, does not have. All have less than 9 bits."""


def as_bytes(x: Any) -> Any:
  """An array of a dtype with at most 8 bits as one of `uint8`, of the same shape and sharding.

  >>> import jax.numpy as jnp
  >>> as_bytes(jnp.array([1, 15], jnp.uint4))
  Array([ 1, 15], dtype=uint8)
  """
  if jnp.issubdtype(x.dtype, jnp.integer):
    return x.astype(np.uint8)
  return x.view(np.uint8) if isinstance(x, np.ndarray) else _bits(x, np.uint8)


def from_bytes(x: Any, dtype: Any) -> Any:
  """What `as_bytes` was given.

  >>> from_bytes(jnp.array([1, 15], jnp.uint8), jnp.uint4)
  Array([1, 15], dtype=uint4)
  """
  dtype = jnp.dtype(dtype)
  if jnp.issubdtype(dtype, jnp.integer):
    return x.astype(dtype)
  return x.view(dtype) if isinstance(x, np.ndarray) else _bits(x, dtype)


def _bits(x: jax.Array, dtype: Any) -> jax.Array:
  return jax.lax.bitcast_convert_type(x, dtype)


def flat_bytes(x: Any) -> np.ndarray:
  """The bytes of an array of any dtype, on the host, as a vector.

  >>> flat_bytes(np.array([[1, 2]], np.int16)).tolist()
  [1, 0, 2, 0]
  """
  return np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8)


def from_flat_bytes(x: Any, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
  """What `flat_bytes` was given."""
  return np.asarray(x).view(jnp.dtype(dtype)).reshape(shape)
