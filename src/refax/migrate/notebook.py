"""The code cells of a Jupyter notebook, and new ones put in without another byte changed."""

import json
from json.decoder import JSONDecodeError
from json.decoder import scanstring as scan_string  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

from refax.migrate.document import Piece

SPACE = " \t\r\n"


def cells(text: str) -> tuple[list[Piece], list[tuple[int, int]]]:
  """The code cells of a notebook, and where in the text the source of each stands.

  Raises:
    ValueError: the text is no notebook.
  """
  spans = _spans(text)
  try:
    notebook = json.loads(text)
    listed = notebook["cells"]
    found = [(i, "".join(c["source"])) for i, c in enumerate(listed) if c["cell_type"] == "code"]
  except (JSONDecodeError, KeyError, TypeError) as error:
    raise ValueError(f"it is no notebook of format 4: {error!r}") from error
  pieces = [Piece(source, f"cell {i + 1}:") for i, source in found]
  return pieces, [spans[i] for i, _ in found]


def written(raw: str, source: str) -> str:
  """The JSON of a cell's source, in the style of the one that it replaces.

  Args:
    raw: the JSON of the cell's source before.
    source: the new source.
  """
  escapes = raw.isascii()
  if not raw.startswith("["):
    return json.dumps(source, ensure_ascii=escapes)
  literals, between = _items(raw)
  known = {json.loads(literal): literal for literal in literals}
  lines = source.splitlines(keepends=True) if "\n" in source else [source]
  lines = _rejoined(lines)
  new = [known.get(line) or json.dumps(line, ensure_ascii=escapes) for line in lines]
  first = raw.index('"') if literals else 1
  last = raw.rindex('"') + 1 if literals else len(raw) - 1
  return raw[:first] + between.join(new) + raw[last:]


def _rejoined(lines: list[str]) -> list[str]:
  """Lines that end in a newline only: `splitlines` knows more ends than notebooks do."""
  out: list[str] = []
  for line in lines:
    if out and not out[-1].endswith("\n"):
      out[-1] += line
    else:
      out.append(line)
  return out


def _items(raw: str) -> tuple[list[str], str]:
  """The literals of a JSON list of strings, and what stands between the first two."""
  literals, between, at, end = [], ",\n", 1, None
  while (start := raw.find('"', at)) >= 0:
    if end is not None and len(literals) == 1:
      between = raw[end:start]
    end = scan_string(raw, start + 1, False)[1]
    literals.append(raw[start:end])
    at = end
  return literals, between


def _spans(text: str) -> dict[int, tuple[int, int]]:
  """Where the value of `source` of every cell stands."""
  spans: dict[int, tuple[int, int]] = {}

  def value(at: int, path: tuple[Any, ...]) -> int:
    at = _skip(text, at)
    if len(path) == 3 and path[0] == "cells" and path[2] == "source":
      end = _value_end(text, at, lambda a, p: value(a, (*path, p)))
      spans[path[1]] = (at, end)
      return end
    return _value_end(text, at, lambda a, p: value(a, (*path, p)))

  try:
    value(0, ())
  except (IndexError, StopIteration, JSONDecodeError) as error:
    raise ValueError(f"it is no JSON: {error}") from error
  return spans


def _value_end(text: str, at: int, inner: Any) -> int:
  """Where a JSON value ends; `inner` reads the values in it."""
  char = text[at]
  if char == '"':
    return scan_string(text, at + 1, False)[1]
  if char not in "[{":
    while at < len(text) and text[at] not in ",]}" + SPACE:
      at += 1
    return at
  closing, index = ("]" if char == "[" else "}"), 0
  at = _skip(text, at + 1)
  while text[at] != closing:
    key: Any = index
    if char == "{":
      key, at = scan_string(text, at + 1, False)
      at = _skip(text, _skip(text, at) + 1)
    at = _skip(text, inner(at, key))
    if text[at] == ",":
      at = _skip(text, at + 1)
    index += 1
  return at + 1


def _skip(text: str, at: int) -> int:
  while text[at] in SPACE:
    at += 1
  return at
