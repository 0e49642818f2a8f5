"""The format of a GGUF file: what it says of itself, what it says of its tensors, the data.

Files of llama.cpp have weights that are quantised in blocks; the package `gguf` makes floats of
them. The header is read here and not by `gguf.GGUFReader`: that takes four seconds for a vocabulary
of 49,152 words, does not end where the length of an array is damaged, and maps the file, so that a
program crashes where another one truncates it. The tests compare with it.

A shape is given as NumPy and torch have it, the reverse of what the file says: `[out, in]`.
"""

import contextlib
import math
import os
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from refax.errors import CheckpointFormatError, MissingPackageError
from refax.io.tensor_file import Scratch, memory, quoted

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
MAX_AXES, MAX_DEPTH = 4, 8
CHUNK = 2**22
"""Bytes of quantised blocks that become floats at a time."""

STRING, ARRAY = 8, 9
NUMBERS = dict(enumerate("BbHhIif?")) | dict(enumerate("Qqd", 10))
"""The codes of `struct` for the types of numbers."""
PLAIN = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
  "I8": np.dtype(np.int8),
  "I16": np.dtype(np.int16),
  "I32": np.dtype(np.int32),
  "I64": np.dtype(np.int64),
}
"""What is stored as it is; everything else becomes float32."""


class Entry(NamedTuple):
  """What the header says of one tensor; the offsets count from the beginning of the file."""

  dtype: np.dtype
  shape: tuple[int, ...]
  begin: int
  end: int
  blocks: Any
  """The type of the blocks, one of `gguf.GGMLQuantizationType`; None if there are none."""

  def zeros(self) -> np.ndarray:
    """A tensor like this one that takes no memory, to try a function on."""
    return np.broadcast_to(np.zeros((), self.dtype), self.shape)


class Reader(NamedTuple):
  """An open file whose header has been checked."""

  path: str
  file: BinaryIO
  values: dict[str, Any]
  entries: dict[str, Entry]

  @property
  def metadata(self) -> dict[str, str]:
    """What the file says of itself, as text; without arrays."""
    return {key: str(value) for key, value in self.values.items() if not isinstance(value, list)}

  def refusal(self, problem: str) -> CheckpointFormatError:
    """The error for this file."""
    return CheckpointFormatError.file(self.path, problem, "GGUF file")

  def read(self, name: str, scratch: Scratch | None = None) -> np.ndarray:
    """One tensor, in memory of its own or in `scratch`; blocks become floats on the way."""
    entry = self.entries[name]
    size = math.prod(entry.shape) * entry.dtype.itemsize
    out = memory(size) if scratch is None else scratch.take(size)
    self.file.seek(entry.begin)
    if entry.blocks is None:
      self._fill(name, out)
      return out.view(entry.dtype).reshape(entry.shape)
    floats = out.view(np.float32)
    per_block, step = gguf_package().GGML_QUANT_SIZES[entry.blocks]
    raw = np.empty(min(entry.end - entry.begin, CHUNK // step * step), np.uint8)
    done = 0
    while done < floats.size:
      part = raw[: (floats.size - done) // per_block * step]
      self._fill(name, part)
      count = part.size // step * per_block
      _dequantize(part.reshape(-1, step), entry.blocks, floats[done : done + count])
      done += count
    return floats.reshape(entry.shape)

  def _fill(self, name: str, out: np.ndarray) -> None:
    if self.file.readinto(out.data) != out.size:  # pyright: ignore[reportAttributeAccessIssue]
      raise self.refusal(f"the tensor {quoted(name)} ends early: the file changes while it is read")


def _dequantize(raw: np.ndarray, blocks: Any, out: np.ndarray) -> None:
  """Write the floats of some blocks, one in each row of `raw`.

  The package takes 16 rows at a time. Blocks know nothing of rows, so rows of 64 blocks do as well,
  and take a tenth of the calls.
  """
  many = len(raw) // 64 * 64
  split = out.size * many // len(raw)
  for part, rows, into in ((raw[:many], many // 64, out[:split]), (raw[many:], 1, out[split:])):
    if len(part):
      into[:] = gguf_package().quants.dequantize(part.reshape(rows, -1), blocks).reshape(-1)


def gguf_package() -> Any:
  """The package `gguf`.

  Raises:
    MissingPackageError: it is not installed.
  """
  try:
    import gguf
  except ImportError:
    raise MissingPackageError.extra("nnx.load_gguf", "gguf", "gguf") from None
  return gguf


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[Reader]:
  """Open a file and check its header.

  Raises:
    CheckpointFormatError: the file breaks the rules of the format.
    MissingPackageError: the package `gguf` is not installed.
    OSError: it cannot be opened.
  """
  gguf_package()
  with open(path, "rb") as file:
    try:
      values, entries = _read_header(_Cursor(file))
    except _FormatError as error:
      raise CheckpointFormatError.file(os.fspath(path), str(error), "GGUF file") from None
    yield Reader(os.fspath(path), file, values, entries)


class _FormatError(Exception):
  """What is wrong with a file, before its path is known."""


class _Cursor:
  """Reads the header from its beginning; what would be behind the end of the file is an error."""

  def __init__(self, file: BinaryIO):
    self.file = file
    self.size = os.fstat(file.fileno()).st_size
    self.position = 0

  def bytes(self, count: int) -> bytes:
    if count > self.size - self.position:
      raise _FormatError(f"a header that goes on behind the end, at byte {self.size}")
    self.position += count
    return self.file.read(count)

  def number(self, code: str) -> Any:
    return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

  def text(self) -> str:
    raw = self.bytes(self.number("Q"))
    try:
      return raw.decode()
    except UnicodeDecodeError as error:
      raise _FormatError(f"a text that is no UTF-8: {error}") from None

  def value(self, kind: int, depth: int = 0) -> Any:
    """A number, a text, or a list of either."""
    if kind == STRING:
      return self.text()
    if kind in NUMBERS:
      return self.number(NUMBERS[kind])
    if kind != ARRAY or depth == MAX_DEPTH:
      raise _FormatError(f"a value of the unknown type {kind}, or arrays in arrays in arrays")
    inner, count = self.number("I"), self.number("Q")
    if inner in NUMBERS:
      size = struct.calcsize("<" + NUMBERS[inner])
      return list(struct.unpack(f"<{count}{NUMBERS[inner]}", self.bytes(count * size)))
    self.bytes(0 if count * 8 <= self.size - self.position else self.size)  # each has a length
    return [self.value(inner, depth + 1) for _ in range(count)]


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, Entry]]:
  if cursor.size < 24:
    raise _FormatError(f"{cursor.size} bytes, too short for a header")
  magic = cursor.bytes(4)
  if magic != MAGIC:
    raise _FormatError(f"a file that begins with {magic!r} and not with {MAGIC!r}")
  version = cursor.number("I")
  if version not in VERSIONS:
    is_swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
    problem = "numbers with the large byte first" if is_swapped else f"version {version}"
    raise _FormatError(f"{problem}; versions 2 and 3 with the small byte first are read")
  tensors, facts = cursor.number("Q"), cursor.number("Q")
  values: dict[str, Any] = {}
  for _ in range(facts):
    key = cursor.text()
    if key in values:
      raise _FormatError(f"the key {quoted(key)} twice")
    values[key] = cursor.value(cursor.number("I"))
  alignment = values.get(ALIGNMENT, 32)
  if type(alignment) is not int or not 0 < alignment < 2**32 or alignment & (alignment - 1):
    raise _FormatError(f"the alignment {alignment!r}, which is no power of 2")
  found = _tensors(cursor, tensors)
  return values, _entries(found, -(-cursor.position // alignment) * alignment, alignment, cursor)


class _Stored(NamedTuple):
  """What the header says of a tensor, as it says it."""

  shape: tuple[int, ...]
  kind: int
  offset: int


def _tensors(cursor: _Cursor, count: int) -> dict[str, _Stored]:
  found: dict[str, _Stored] = {}
  for _ in range(count):
    name = cursor.text()
    if name in found:
      raise _FormatError(f"the name {quoted(name)} twice")
    axes = cursor.number("I")
    if axes > MAX_AXES:
      raise _FormatError(f"the tensor {quoted(name)} with {axes} axes, more than {MAX_AXES}")
    shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
    found[name] = _Stored(shape, cursor.number("I"), cursor.number("Q"))
  return found


def _entries(
  tensors: dict[str, _Stored], start: int, alignment: int, cursor: _Cursor
) -> dict[str, Entry]:
  """The checked tensors: they lie one after the other, each at a multiple of the alignment."""
  entries: dict[str, Entry] = {}
  position = start
  for name, stored in tensors.items():
    if start + stored.offset != position:
      problem = "overlaps another" if start + stored.offset < position else "leaves a gap before it"
      raise _FormatError(f"the tensor {quoted(name)} {problem}")
    entry = _entry(name, stored, position)
    if entry.end > cursor.size:
      problem = f"ends at byte {entry.end}, in a file of {cursor.size}"
      raise _FormatError(f"the tensor {quoted(name)} {problem}")
    entries[name] = entry
    position = -(-entry.end // alignment) * alignment
  return entries


def _entry(name: str, stored: _Stored, begin: int) -> Entry:
  gguf = gguf_package()
  what = f"the tensor {quoted(name)}"
  try:
    kind = gguf.GGMLQuantizationType(stored.kind)
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
  except (ValueError, KeyError):
    raise _FormatError(f"{what} of the unknown type {stored.kind}") from None
  dtype = PLAIN.get(kind.name)
  row = stored.shape[-1] if stored.shape else 1
  if row % per_block:
    raise _FormatError(f"{what} with rows of {row}, no multiple of the {per_block} of {kind.name}")
  end = begin + math.prod(stored.shape) // per_block * size
  entry = Entry(dtype or np.dtype(np.float32), stored.shape, begin, end, None if dtype else kind)
  try:
    entry.zeros()
    if dtype is None:
      gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
  except (ValueError, OverflowError, NotImplementedError) as error:
    raise _FormatError(f"{what} of {kind.name}{list(stored.shape)}: {error}") from None
  return entry
