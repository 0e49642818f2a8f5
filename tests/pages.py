"""Runs a page of the documentation: its Python from top to bottom, and what it says is printed."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def blocks(path: Path) -> Iterator[tuple[str, str, int]]:
  """(language, text, number of the line before the text) of each fenced block."""
  page = path.read_text()
  for block in BLOCK.finditer(page):
    yield block[1], block[2], page.count("\n", 0, block.start(2))


def python_blocks(path: Path) -> list[str]:
  return [text for language, text, _ in blocks(path) if language == "python"]


def run(path: Path) -> dict:
  """Execute a page; a block of text after a block of Python must be what that printed.

  Three dots in the text stand for anything, as in a doctest. Returns the names of the page.
  """
  namespace = {"__name__": "__main__"}
  printed = None
  for language, text, line in blocks(path):
    if language == "python":
      output = io.StringIO()
      with contextlib.redirect_stdout(output):  # the empty lines: a traceback names the page's line
        exec(compile("\n" * line + text, str(path), "exec"), namespace)
      printed = output.getvalue()
    elif language == "text" and printed is not None:
      assert matches(text, printed), f"{path.name} shows\n{text}\nand prints\n{printed}"
      printed = None
  return namespace


def matches(shown: str, printed: str) -> bool:
  """Whether a text is what was printed; white space at the ends of lines does not count."""
  plain = lambda text: "\n".join(line.rstrip() for line in text.strip().splitlines())
  pattern = ".*".join(re.escape(part) for part in plain(shown).split("..."))
  return re.fullmatch(pattern, plain(printed), flags=re.DOTALL) is not None
