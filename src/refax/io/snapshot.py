"""The values of an object at one moment, whatever other threads do to it meanwhile."""

from typing import Any

import jax
import numpy as np

from refax import _jax
from refax.errors import CheckpointWriteError, InvalidArgumentError
from refax.io.slots import Slot

_TRIES = 2000


def snapshot(function: str, slots: list[Slot]) -> dict[str, Any]:
  """What each slot holds, by its name: arrays that nobody changes or donates any more.

  A step of `nnx.jit` that another thread runs is seen as a whole or not at all.

  Raises:
    InvalidArgumentError: a slot holds no array that a file can take.
    CheckpointWriteError: other threads wrote the Variables without a pause.
  """
  for slot in slots:
    _check(function, slot)
  refs = [slot.cell for slot in slots if _jax.is_ref(slot.cell)]
  copies = _jax.snapshot(refs, _TRIES)
  if copies is None:
    raise CheckpointWriteError.moving(_TRIES)
  of_refs = iter(copies)
  return {s.name: next(of_refs) if _jax.is_ref(s.cell) else _kept(s.cell) for s in slots}


def of_this_process(x: Any) -> Any:
  """An array of this process as NumPy's, where there are several: orbax takes no other of these."""
  several = jax.process_count() > 1 and isinstance(x, jax.Array)
  return np.asarray(x) if several and x.is_fully_addressable else x


def _kept(cell: Any) -> Any:
  """A copy of an array of the user, who may change or donate it; a number as an array."""
  return _jax.copied(cell) if isinstance(cell, jax.Array) else np.array(cell, native(cell))


def native(x: Any) -> Any:
  """The dtype of an array in the byte order of this machine, which a file has too."""
  dtype = np.asarray(x).dtype if not hasattr(x, "dtype") else x.dtype
  swapped = isinstance(dtype, np.dtype) and not dtype.isnative
  return dtype.newbyteorder("=") if swapped else dtype


def _check(function: str, slot: Slot) -> None:
  cell = slot.cell
  if isinstance(cell, jax.ShapeDtypeStruct):
    raise InvalidArgumentError.value(function, slot.name, cell, "a model with values")
  if _jax.is_tracer(cell):
    want = "values; inside a transform there are none: call it outside"
    raise InvalidArgumentError.value(function, slot.name, cell, want)
  dtype = slot.dtype
  if isinstance(dtype, np.dtype) and (dtype.kind in "OSUTmM" or dtype.names is not None):
    want = "numbers of a dtype that JAX has; note other things as user="
    raise InvalidArgumentError.value(function, f"dtype of {slot.name}", dtype, want)
