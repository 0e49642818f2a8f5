"""Findings, and the edits of bytes that they hold. Text outside of an edit is never touched."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Edit:
  """Bytes `start` to `end` become `text`."""

  start: int
  end: int
  text: str


@dataclass(frozen=True)
class Finding:
  """One thing to tell about a piece of code.

  Attributes:
    kind: `change` for what is certain, with its edits; `write` for what a person has to write;
      `look` for what may need no change at all.
    at: the byte that it is about.
    text: what to write, in a sentence, or as `old -> new`.
    edits: what makes a `change`.
  """

  kind: Literal["change", "write", "look"]
  at: int
  text: str
  edits: tuple[Edit, ...] = ()


def apply(data: bytes, edits: Iterable[Edit]) -> bytes:
  """The bytes after all edits; what lies in a piece that is removed needs none of its own.

  >>> from refax.migrate.edit import Edit, apply
  >>> apply(b"a.value", [Edit(1, 7, "[...]")])
  b'a[...]'
  """
  pieces, done = [], 0
  for edit in sorted(set(edits), key=lambda e: (e.start, -e.end)):
    if edit.end <= done and edit.start < done:
      continue
    if edit.start < done:
      raise ValueError(f"two edits at byte {edit.start}")
    pieces += [data[done : edit.start], edit.text.encode()]
    done = edit.end
  return b"".join([*pieces, data[done:]])


def remove(data: bytes, items: Sequence[tuple[int, int]], gone: set[int]) -> list[Edit]:
  """Edits that take items out of a list that is written with commas.

  Args:
    data: the bytes.
    items: start and end of every item, without its comma.
    gone: the positions of those to remove.
  """
  edits = []
  for i in sorted(gone):
    start, end = items[i]
    comma = _after_comma(data, end)
    line = _own_lines(data, start, comma or end)
    if line and comma:
      edits.append(Edit(*line, ""))
    elif comma:
      edits.append(_remove_inside(data, start, comma))
    else:
      kept = [k for k in range(i) if k not in gone]
      before = items[kept[-1]][1] if kept else None
      edits.append(_remove_last(data, before, start, end))
  return _merged(edits)


def _merged(edits: list[Edit]) -> list[Edit]:
  """Deletions without overlaps."""
  out: list[Edit] = []
  for edit in sorted(edits, key=lambda e: (e.start, e.end)):
    if out and edit.start <= out[-1].end:
      out[-1] = Edit(out[-1].start, max(edit.end, out[-1].end), "")
    else:
      out.append(edit)
  return out


def _remove_last(data: bytes, before: int | None, start: int, end: int) -> Edit:
  """The last item without a comma behind it takes the comma before it along."""
  if before is None:
    return Edit(start, end, "")
  between = data[before:start]
  if b"#" not in between:
    return Edit(before, end, "")
  line = _own_lines(data, start, end)  # a comment stands between: leave its line and the comma
  return Edit(*line, "") if line else Edit(start, end, "")


def _after_comma(data: bytes, at: int) -> int | None:
  """Where the comma that follows ends, if one does, comments aside."""
  while at < len(data):
    char = data[at : at + 1]
    if char == b",":
      return at + 1
    if char == b"#":
      newline = data.find(b"\n", at)
      at = len(data) if newline < 0 else newline
    elif char in b" \t\r\n\f\\":
      at += 1
    else:
      return None
  return None


def _remove_inside(data: bytes, start: int, comma: int) -> Edit:
  """An item with a comma that shares its line takes the spaces on one side of it along."""
  first, end = start, comma
  while data[end : end + 1] in (b" ", b"\t"):
    end += 1
  while data[first - 1 : first] in (b" ", b"\t"):
    first -= 1
  begins_line = first == 0 or data[first - 1 : first] in (b"\r", b"\n")
  if data[end : end + 1] in (b"\r", b"\n", b"#") and not begins_line:
    return Edit(first, comma, "")
  return Edit(start, end, "")


def _own_lines(data: bytes, start: int, end: int) -> tuple[int, int] | None:
  """The whole lines of what is alone on its lines, or None."""
  first = data.rfind(b"\n", 0, start) + 1
  newline = data.find(b"\n", end)
  if newline < 0 or data[first:start].strip() or data[end:newline].strip():
    return None
  return first, newline + 1
