"""Processes that run one program together: whether all of them have the same values.

With `jax.distributed`, each process makes its own copy of a model and lays it out over devices of
all of them. JAX takes these copies to be equal. Where one process used another seed, the replicas
would differ from the first step on, and nothing would say so.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from refax import _jax
from refax.errors import ProcessMismatchError


def check_same(function: str, checksums: Mapping[str, int | None]) -> None:
  """Compare arrays with those of the other processes, in one exchange for all of them.

  Every process has to call this.

  Args:
    function: who asks, for the error.
    checksums: of the arrays, by their names; None where there is one array of all processes.

  Raises:
    ProcessMismatchError: a process has another value, or other names. Every process raises it.
  """
  if jax.process_count() == 1:
    return
  names = list(checksums)
  sums = np.array([x or 0 for x in checksums.values()], np.uint32)
  summary = np.array([len(names), zlib.crc32(repr(names).encode()), zlib.crc32(sums.data)])
  summaries = gathered(summary.astype(np.uint32))
  if (summaries == summaries[0]).all():
    return
  if (summaries[:, :2] != summaries[0, :2]).any():
    raise ProcessMismatchError.names(function, summaries[:, 0].tolist())
  differs = gathered(sums)
  differs = differs != differs[0]
  names = [name for name, some in zip(names, differs.any(0), strict=True) if some]
  raise ProcessMismatchError.values(function, names, np.flatnonzero(differs.any(1)).tolist())


def gathered(x: np.ndarray) -> np.ndarray:
  """An array of one shape in all processes, from each of them: the first axis is the process."""
  if jax.process_count() == 1:
    return x[None]
  from jax.experimental import multihost_utils  # it takes a while to import

  return np.asarray(multihost_utils.process_allgather(x, tiled=False))


def gathered_bytes(data: bytes) -> list[bytes]:
  """Some bytes from each process."""
  sizes = gathered(np.array([len(data)], np.uint32))[:, 0]
  padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
  padded[: len(data)] = np.frombuffer(data, np.uint8)
  return [row[:n].tobytes() for row, n in zip(gathered(padded), sizes, strict=True)]


def whole(x: Any) -> Any:
  """An array of which this process has all, on one device or on each; None if it has parts only.

  >>> import jax.numpy as jnp
  >>> int(whole(jnp.array(3)))
  3
  """
  if not isinstance(x, jax.Array) or x.is_fully_addressable:
    return x
  return x.addressable_data(0) if x.is_fully_replicated else None


def flat_bytes(x: Any) -> np.ndarray:
  """The bytes of an array of any dtype, on the host, as a vector.

  >>> flat_bytes(np.array([[1, 2]], np.int16)).tolist()
  [1, 0, 2, 0]
  """
  return np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8)


def checksum(x: Any) -> int | None:
  """The CRC-32 of the bytes of an array; None where this process has parts of it only.

  >>> checksum(np.zeros(2, np.int8))
  1104745215
  """
  x = whole(_jax.bits(x))
  return None if x is None else zlib.crc32(flat_bytes(x).data)
