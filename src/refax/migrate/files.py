"""Files found, read, migrated and written back whole or not at all."""

import ast
import io
import os
import shutil
import tempfile
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import libcst as cst

from refax.migrate.document import Document, Piece, fenced, kind_of, replace_fenced
from refax.migrate.edit import Edit, apply
from refax.migrate.notebook import cells, written
from refax.migrate.rules import findings
from refax.migrate.source import Source

FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages", "venv", "env"})
TOO_DEEP = "it is nested too deeply to be read"


@dataclass
class Result:
  """What became of one file.

  Attributes:
    path: the file.
    old: its bytes.
    new: its bytes with all that is certain.
    said: place, kind and text of every finding.
    skipped: places of code that is no Python.
  """

  path: Path
  old: bytes
  new: bytes
  said: list[tuple[str, str, str]] = field(default_factory=list)
  skipped: list[str] = field(default_factory=list)


class UnreadableError(Exception):
  """A file cannot be read, for the reason that the message says."""


def find(paths: Iterable[Path]) -> Iterator[Path]:
  """The files to read: those that are named, and those in folders that are named."""
  seen = set()
  for path in paths:
    for found in _in_folder(path) if path.is_dir() else [path]:
      real = found.resolve()
      if real not in seen:
        seen.add(real)
        yield found


def _in_folder(folder: Path) -> Iterator[Path]:
  """Files below a folder; not through links, nor in hidden folders and environments."""
  for root, folders, files in os.walk(folder):
    folders[:] = sorted(f for f in folders if _wanted(Path(root, f)))
    for name in sorted(files):
      path = Path(root, name)
      if kind_of(path) and not name.startswith(".") and not path.is_symlink() and path.is_file():
        yield path


def _wanted(folder: Path) -> bool:
  hidden = folder.name.startswith(".") or folder.name in FOLDERS
  return not hidden and not folder.is_symlink() and not (folder / "pyvenv.cfg").exists()


def migrate(path: Path) -> Result:
  """Read a file and say what to write.

  Raises:
    UnreadableError: the file cannot be read.
  """
  try:
    old = path.read_bytes()
  except OSError as error:
    raise UnreadableError(error.strerror or str(error)) from error
  if b"nnx" not in old or not (b"flax" in old or b"refax" in old):
    return Result(path, old, old)
  try:
    return _migrated(path, old)
  except (cst.ParserSyntaxError, SyntaxError) as error:
    raise UnreadableError(_syntax(error)) from error
  except RecursionError as error:
    raise UnreadableError(TOO_DEEP) from error
  except (UnicodeError, ValueError, LookupError) as error:
    raise UnreadableError(str(error)) from error


def _migrated(path: Path, old: bytes) -> Result:
  kind = kind_of(path) or "code"
  encoding = tokenize.detect_encoding(io.BytesIO(old).readline)[0] if kind == "code" else "utf-8"
  mark = b"\xef\xbb\xbf" if old.startswith(b"\xef\xbb\xbf") else b""
  encoding = "utf-8" if encoding == "utf-8-sig" else encoding
  text = old[len(mark) :].decode(encoding)
  spans: list[tuple[int, int]] = []
  if kind == "code":
    _check_depth(text)
    pieces = [Piece(text)]
  elif kind == "notebook":
    pieces, spans = cells(text)
  else:
    pieces = fenced(text)
  document = Document(pieces, whole=kind == "code")
  source = Source(document.module)
  found = findings(source)
  said = [(document.where(f.at), f.kind, f.text) for f in found]
  edits = document.edited([e for f in found for e in f.edits])
  new = _replaced(text, kind, document, spans, edits)
  skipped = document.skipped if found else []
  return Result(path, old, mark + new.encode(encoding) if edits else old, said, skipped)


def _replaced(
  text: str,
  kind: str,
  document: Document,
  spans: list[tuple[int, int]],
  edits: dict[int, list[Edit]],
) -> str:
  """The text of the file with the edits of its pieces."""
  parts: list[tuple[int, int, str]] = []
  for i, own in edits.items():
    piece = document.pieces[i]
    if kind == "markdown":
      parts += replace_fenced(text, piece, own)
      continue
    changed = apply(piece.text.encode(), own).decode()
    start, end = spans[i] if kind == "notebook" else (0, len(text))
    parts.append((start, end, written(text[start:end], changed) if spans else changed))
  for start, end, new in sorted(set(parts), reverse=True):
    text = text[:start] + new + text[end:]
  if kind == "code" and parts:
    cst.parse_module(text)
  return text


def _check_depth(text: str) -> None:
  """Refuse what would exhaust the stack of the parser; newer syntax than this Python's may pass."""
  try:
    ast.parse(text)
  except SyntaxError as error:
    if "too many nested" in str(error):
      raise RecursionError(TOO_DEEP) from error
  except MemoryError as error:
    raise RecursionError(TOO_DEEP) from error


def _syntax(error: Exception) -> str:
  if isinstance(error, cst.ParserSyntaxError):
    return f"line {error.raw_line}: {error.message.splitlines()[0]}"
  return f"it is no Python: {error}"


def write(result: Result) -> None:
  """Put the new bytes in the place of the old: all of them or none, with the file's mode.

  Raises:
    UnreadableError: the file cannot be written.
  """
  path = result.path.resolve()
  try:
    if not os.access(path, os.W_OK):
      raise PermissionError(13, "Permission denied")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
      with os.fdopen(handle, "wb") as file:
        file.write(result.new)
      shutil.copymode(path, name)
      os.replace(name, path)
    except BaseException:
      os.unlink(name)
      raise
  except OSError as error:
    raise UnreadableError(f"it cannot be written: {error.strerror or error}") from error
