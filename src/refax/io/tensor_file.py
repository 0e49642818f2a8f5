"""The format of a safetensors file: 8 bytes that say how long the header is, JSON, the data.

It is read and written here and not by the `safetensors` package, which the tests compare with:
that package writes only what is all in memory at once, its NumPy side reads no float8, and it
accepts a header that names a tensor twice. Everything that a header says is checked before a byte
of data is read, and a file that breaks the rules is refused with `CheckpointFormatError`.
"""

import contextlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from refax.errors import CheckpointFormatError, InvalidArgumentError

METADATA = "__metadata__"
MAX_HEADER = 100_000_000
"""Bytes; the `safetensors` package reads no longer header either."""

DTYPES: dict[str, np.dtype] = {
  name: np.dtype(dtype)
  for name, dtype in {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "C64": np.complex64,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E8M0": jnp.float8_e8m0fnu,
    "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
    "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
  }.items()
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
  """What the header says of one tensor; the offsets count from the beginning of the file."""

  dtype: np.dtype
  shape: tuple[int, ...]
  begin: int
  end: int

  def zeros(self) -> np.ndarray:
    """A tensor like this one that takes no memory, to try a function on."""
    return np.broadcast_to(np.zeros((), self.dtype), self.shape)


class Reader(NamedTuple):
  """An open file whose header has been checked."""

  path: str
  file: BinaryIO
  metadata: dict[str, str]
  entries: dict[str, Entry]

  def refusal(self, problem: str) -> CheckpointFormatError:
    """The error for this file."""
    return CheckpointFormatError.file(self.path, problem)

  def read(self, name: str, scratch: "Scratch | None" = None) -> np.ndarray:
    """One tensor, in memory; a mapped file would crash where another program truncates it.

    Args:
      name: its name.
      scratch: memory to read into, which the next call uses again; without it, the tensor has
        memory of its own.
    """
    entry = self.entries[name]
    size = entry.end - entry.begin
    buffer = memory(size) if scratch is None else scratch.take(size)
    self.file.seek(entry.begin)
    if self.file.readinto(buffer.data) != buffer.size:  # pyright: ignore[reportAttributeAccessIssue]
      raise self.refusal(f"the tensor {name!r} ends early: the file changes while it is read")
    if entry.dtype == np.bool_:
      return (buffer != 0).reshape(entry.shape)  # a byte of 2 is no bool for NumPy
    return buffer.view(entry.dtype).reshape(entry.shape)


def memory(size: int) -> np.ndarray:
  """Bytes that go back to the system when they are dropped.

  Those of `np.empty` stay in the heap between JAX's buffers, which do not fit into the gaps: a
  model of 192 MiB took 160 more to load.
  """
  return np.frombuffer(mmap.mmap(-1, size), np.uint8) if size else np.empty(0, np.uint8)


class Scratch:
  """Memory for one tensor after the other: new memory for each takes three times as long to read.

  >>> scratch = Scratch()
  >>> scratch.take(3).size
  3
  """

  def __init__(self):
    self._buffer = memory(0)

  def take(self, size: int) -> np.ndarray:
    """This many bytes; they hold what was in them."""
    if size > self._buffer.size:
      self._buffer = memory(0)  # the smaller ones go back first
      self._buffer = memory(max(size, 2**16))
    return self._buffer[:size]


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[Reader]:
  """Open a file and check its header.

  Raises:
    CheckpointFormatError: the file breaks the rules of the format.
    OSError: it cannot be opened.
  """
  with open(path, "rb") as file:
    try:
      metadata, entries = _read_header(file)
    except _FormatError as error:
      raise CheckpointFormatError.file(os.fspath(path), str(error)) from None
    yield Reader(os.fspath(path), file, metadata, entries)


class _FormatError(Exception):
  """What is wrong with a file, before its path is known."""


def _read_header(file: BinaryIO) -> tuple[dict[str, str], dict[str, Entry]]:
  size = os.fstat(file.fileno()).st_size
  start = file.read(8)
  if len(start) < 8:
    raise _FormatError(f"{len(start)} bytes, too short for the length of the header")
  length = int.from_bytes(start, "little")
  if length > MAX_HEADER:
    raise _FormatError(f"a header of {length} bytes, more than the {MAX_HEADER} that may be")
  if length > size - 8:
    raise _FormatError(f"a header of {length} bytes in a file of {size}")
  header = _parse(file.read(length))
  metadata = header.pop(METADATA, {})
  if not _is_text(metadata):
    raise _FormatError("metadata that is no JSON object of strings")
  entries = {name: _entry(name, value, 8 + length) for name, value in header.items()}
  _check_layout(entries, 8 + length, size)
  return metadata, entries


def _parse(text: bytes) -> dict[str, Any]:
  def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
      if name in found:
        raise _FormatError(f"the name {quoted(name)} twice in the header")
      found[name] = value
    return found

  try:
    header = json.loads(text.decode(), object_pairs_hook=distinct)
    json.dumps(header, ensure_ascii=False).encode()  # half a surrogate pair cannot be printed
  except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
    raise _FormatError(f"a header that is no JSON: {str(error)[:80]}") from None
  if not isinstance(header, dict):
    raise _FormatError("a header that is no JSON object")
  return header


def _is_text(value: Any) -> bool:
  return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def quoted(name: str) -> str:
  """A name for a message, cut if it is long."""
  return repr(name if len(name) <= 80 else name[:77] + "...")


def _entry(name: str, value: Any, data: int) -> Entry:
  """The checked entry of one tensor; `data` is where the data begins."""
  what = f"the tensor {quoted(name)}"
  fields = ("dtype", "shape", "data_offsets")
  if not isinstance(value, dict) or not all(field in value for field in fields):
    raise _FormatError(f"{what} without a dtype, shape or data_offsets")
  dtype, shape, offsets = (value[field] for field in fields)
  if not isinstance(dtype, str) or dtype not in DTYPES:
    raise _FormatError(f"{what} of the unknown dtype {quoted(str(dtype))}")
  if not _are_sizes(shape):
    raise _FormatError(f"{what} with a shape that is no list of sizes")
  if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
    raise _FormatError(f"{what} with data_offsets that are no range")
  entry = Entry(DTYPES[dtype], tuple(shape), data + offsets[0], data + offsets[1])
  if math.prod(shape) * entry.dtype.itemsize != entry.end - entry.begin:
    raise _FormatError(f"{what} with a shape that does not match its bytes")
  if 0 not in shape:  # its bytes are in the file
    return entry
  try:
    entry.zeros()
  except (ValueError, OverflowError) as error:
    raise _FormatError(f"{what} with a shape that no array can have: {error}") from None
  return entry


def _are_sizes(value: Any) -> bool:
  """Whether this can be a shape; NumPy has at most 64 axes."""
  few = isinstance(value, list) and len(value) <= 64
  return few and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_layout(entries: Mapping[str, Entry], start: int, size: int) -> None:
  """The tensors lie one after the other and fill the file."""
  position = start
  for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
    if entry.begin != position:
      problem = "overlaps another" if entry.begin < position else "leaves a gap before it"
      raise _FormatError(f"the tensor {quoted(name)} {problem}")
    position = entry.end
  if position != size:
    raise _FormatError(f"a file of {size} bytes whose header describes {position}")


def write(
  path: str | os.PathLike[str],
  shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
  tensors: Iterable[tuple[str, np.ndarray]],
  metadata: Mapping[str, str],
) -> None:
  """Write a file as a whole or not at all: a kill or a full disk leaves the old file as it was.

  Args:
    path: the file; a temporary one beside it becomes it at the end.
    shapes: the dtype and shape of each tensor, in the order of the file: see `order`.
    tensors: the tensors by name, in the same order; one is held at a time.
    metadata: facts about the file.

  Raises:
    InvalidArgumentError: a text that is no Unicode, or a header that is too long to be read.
    OSError: the disk is full, the folder does not exist; the old file is whole.
  """
  header = _header(shapes, metadata)
  target = os.path.realpath(path)  # a link goes on being one
  temporary = os.path.join(os.path.dirname(target), f".refax-{os.urandom(8).hex()}.tmp")
  try:
    with open(temporary, "xb") as file:
      file.write(header)
      for (name, (dtype, shape)), (given, x) in zip(shapes.items(), tensors, strict=True):
        if (given, x.dtype, x.shape) != (name, dtype, shape):
          raise RuntimeError(f"{given} was changed by another thread while it was saved")
        file.write(_bytes(x))
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, target)
  except BaseException:
    if os.path.exists(temporary):
      os.remove(temporary)
    raise
  _sync_folder(os.path.dirname(target))


def _bytes(x: np.ndarray) -> Any:
  """The bytes of a tensor: of a large one its own memory, a small one is faster copied."""
  if x.nbytes < _SMALL:
    return x.tobytes()
  return np.ascontiguousarray(x).reshape(-1).view(np.uint8).data


_SMALL = 2**16


def order(shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, Any]:
  """Wide dtypes first, so that every tensor is aligned; then by name."""
  return dict(sorted(shapes.items(), key=lambda item: (-item[1][0].itemsize, item[0])))


def _header(shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Any) -> bytes:
  header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
  position = 0
  for name, (dtype, shape) in shapes.items():
    end = position + math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": (position, end)}
    position = end
  try:
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
  except UnicodeEncodeError as error:
    bad = error.object[error.start : error.end]
    raise InvalidArgumentError.value("save_safetensors", "text", bad, "valid Unicode") from None
  text += b" " * (-len(text) % 8)
  if len(text) > MAX_HEADER:
    raise InvalidArgumentError.value(
      "save_safetensors", "header length", len(text), "fewer tensors or less metadata: two files"
    )
  return len(text).to_bytes(8, "little") + text


def _sync_folder(folder: str) -> None:
  """The new name is on the disk too; a system that has no such thing needs none."""
  try:
    descriptor = os.open(folder, os.O_RDONLY)
  except OSError:
    return
  try:
    os.fsync(descriptor)
  except OSError:
    pass
  finally:
    os.close(descriptor)
