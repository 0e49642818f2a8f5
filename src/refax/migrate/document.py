"""A file as pieces of Python: a whole `.py`, the cells of a notebook, the fenced code of Markdown.

The pieces of one file are read as one module, for they share their names. What is no piece is
never touched.
"""

import re
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path

import libcst as cst

from refax.migrate.edit import Edit

MAGIC = re.compile(
  r"^([ \t]*(?:[\w.]+[ \t]*=[ \t]*)?)([!%?](?:.*\\\r?\n)*.*|[\w.]+\?\??[ \t]*)$", re.MULTILINE
)
OTHER = re.compile(r"\s*%%(?!(?:time|timeit|capture|prun)\b)")
FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})[ \t]*(\{code-cell\}[ \t]*\w*|\{?\w*\}?)[^\n`]*$")
LANGUAGES = frozenset({"python", "python3", "py", "ipython", "ipython3"})


@dataclass
class Piece:
  """A piece of code.

  Attributes:
    text: the code, without what the file indents it by.
    place: what to write before the line number, `cell 3:`.
    line: the number of its first line, from 1.
    starts: for every line of `text`, where in the file the line starts.
    indents: for every line of `text`, how many characters of the file stand before it.
  """

  text: str
  place: str = ""
  line: int = 1
  starts: list[int] = field(default_factory=list)
  indents: list[int] = field(default_factory=list)


class Document:
  """Pieces of code as one module, and the way back from its bytes to the pieces.

  Attributes:
    module: the text of the module.
    skipped: the places of pieces that are no Python.
  """

  def __init__(self, pieces: list[Piece], *, whole: bool):
    self.pieces, self.skipped = pieces, []
    texts = [p.text for p in pieces]
    if not whole:
      texts = [self._parsable(piece) for piece in pieces]
    self.module = "\n".join(texts)
    self._starts, at = [], 0
    for text in texts:
      self._starts.append(at)
      at += len(text.encode()) + 1

  def _parsable(self, piece: Piece) -> str:
    """The piece's code, with all that is no Python put into comments of the same size."""
    if OTHER.match(piece.text):  # `%%bash`
      return _comments(piece.text)
    for text in (piece.text, MAGIC.sub(_masked, _unmarked(piece.text))):
      if _parses(text):
        return text
    self.skipped.append(f"{piece.place}{piece.line}")
    return _comments(piece.text)

  def where(self, at: int) -> str:
    """The place and line of a byte of the module."""
    i = max(bisect_right(self._starts, at) - 1, 0)
    before = self.module.encode()[self._starts[i] : at].decode(errors="replace")
    return f"{self.pieces[i].place}{self.pieces[i].line + before.count(chr(10))}"

  def edited(self, edits: list[Edit]) -> dict[int, list[Edit]]:
    """The edits of each piece, with positions in the bytes of the piece's text."""
    out: dict[int, list[Edit]] = {}
    for edit in edits:
      i = max(bisect_right(self._starts, edit.start) - 1, 0)
      start = self._starts[i]
      size = len(self.pieces[i].text.encode())
      moved = Edit(edit.start - start, min(edit.end - start, size), edit.text)
      out.setdefault(i, []).append(moved)
    return out


def fenced(text: str) -> list[Piece]:
  """The fenced Python of a Markdown file."""
  pieces, lines = [], text.splitlines(keepends=True)
  at, open_fence, piece = 0, None, None
  for number, line in enumerate(lines, 1):
    found = FENCE.match(line.rstrip("\r\n"))
    if open_fence:
      if found and found[2].startswith(open_fence[2]) and not found[3]:
        pieces += [piece] if piece and piece.text else []
        open_fence = piece = None
      elif piece:
        indent = _common(open_fence[1], line)
        piece.text += line[indent:]
        piece.starts.append(at)
        piece.indents.append(indent)
    elif found:
      open_fence = found
      python = found[3].split(" ")[0] == "{code-cell}" or found[3].strip("{}") in LANGUAGES
      piece = Piece("", "", number + 1) if python else None
    at += len(line)
  return pieces


def replace_fenced(text: str, piece: Piece, edits: list[Edit]) -> list[tuple[int, int, str]]:
  """Edits of a fenced piece as spans of the file's characters and their new text."""
  data = piece.text.encode()
  line_starts = [0]
  for line in piece.text.splitlines(keepends=True):
    line_starts.append(line_starts[-1] + len(line))

  def place(at: int, *, before_indent: bool) -> int:
    chars = len(data[:at].decode())
    i = bisect_right(line_starts, chars) - 1
    if i >= len(piece.starts):
      last = len(piece.starts) - 1
      width = line_starts[last + 1] - line_starts[last]
      return piece.starts[last] + piece.indents[last] + width
    column = chars - line_starts[i]
    indent = 0 if before_indent and column == 0 else piece.indents[i]
    return piece.starts[i] + indent + column

  out = []
  for edit in edits:
    whole = not edit.text and edit.end > edit.start
    start = place(edit.start, before_indent=whole)
    end = place(edit.end, before_indent=whole)
    row = bisect_right(line_starts, len(data[: edit.start].decode())) - 1
    first = piece.starts[min(row, len(piece.starts) - 1)]
    indent = text[first : first + piece.indents[min(row, len(piece.starts) - 1)]]
    out.append((start, end, edit.text.replace("\n", f"\n{indent}")))
  return out


def kind_of(path: Path) -> str:
  """How to read a file: `code`, `notebook`, `markdown`, or empty for not at all."""
  kinds = {".py": "code", ".pyi": "code", ".ipynb": "notebook", ".md": "markdown"}
  return kinds.get(path.suffix.lower(), "")


def _common(indent: str, line: str) -> int:
  """How many characters of a fence's indent a line of it has."""
  size = 0
  while size < len(indent) and line[size : size + 1] == indent[size]:
    size += 1
  return size


def _parses(text: str) -> bool:
  try:
    cst.parse_module(text)
  except (cst.ParserSyntaxError, RecursionError):
    return False
  return True


def _unmarked(text: str) -> str:
  """A cell's code without the options that MyST writes at its head."""
  return re.sub(r"\A(?:[ \t]*:[\w-]+:.*\n)+", lambda m: _comments(m[0]), text)


def _masked(found: re.Match[str]) -> str:
  return found[1] + "0" + _comments(found[2])[1:]


def _comments(text: str) -> str:
  return "".join(c if c in "\r\n" else "#" for c in _ascii(text))


def _ascii(text: str) -> str:
  """Text of as many characters as the other has bytes."""
  return "".join("#" * len(c.encode()) for c in text) if not text.isascii() else text
