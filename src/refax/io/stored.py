"""Arrays in dtypes that a format does not have, as integers that every format has."""

import concurrent.futures
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refax.core.processes import checksum

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


def from_flat_bytes(x: Any, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
  """What `flat_bytes` was given."""
  return np.asarray(x).view(jnp.dtype(dtype)).reshape(shape)


def checksums(arrays: Mapping[str, Any]) -> dict[str, int | None]:
  """The CRC-32 of the bytes of each array; None where this process has a part of it only.

  Every core takes a part: on one, the checksums take half as long as it takes to read the arrays.

  >>> checksums({"a": np.zeros(2, np.int8)})
  {'a': 1104745215}
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  if cores == 1 or sum(x.nbytes for x in arrays.values()) < 2**20:
    return {name: checksum(x) for name, x in arrays.items()}
  with concurrent.futures.ThreadPoolExecutor(min(cores, 8)) as pool:
    return dict(zip(arrays, pool.map(checksum, arrays.values()), strict=True))
