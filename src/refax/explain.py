"""`python -m refax.explain NAME`: when an error comes, a program that raises it, and what to do.

The text is a section of the page `docs/reference/errors.md`, which a wheel has as
`refax/errors.md`. This module imports neither JAX nor the rest of Refax, so it answers at once.
"""

import argparse
import difflib
import re
import sys
import textwrap
from pathlib import Path

WIDTH = 88
_HEADING = re.compile(r"^## (\w+)\n", flags=re.MULTILINE)
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```\n", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")


def page() -> str:
  """The page about errors: beside this file in a wheel, in `docs` in a checkout.

  >>> page().startswith("# Errors")
  True
  """
  here = Path(__file__).resolve()
  installed = here.with_name("errors.md")
  path = installed if installed.exists() else here.parents[2] / "docs/reference/errors.md"
  return path.read_text(encoding="utf-8")


def sections(text: str) -> dict[str, str]:
  r"""The text below each heading of the second level, by the heading.

  >>> sections("# Page\n\n## A\n\none\n\n## B\n\ntwo\n")
  {'A': 'one\n', 'B': 'two\n'}
  """
  _, *parts = _HEADING.split(text)
  return {name: body.strip() + "\n" for name, body in zip(parts[::2], parts[1::2], strict=True)}


def blocks(text: str, language: str) -> list[str]:
  r"""What is in the fenced blocks of one language.

  >>> blocks("Write:\n\n```python\nx = 1\n```\n", "python")
  ['x = 1\n']
  """
  return [body for found, body in _FENCE.findall(text) if found == language]


def plain(text: str) -> str:
  r"""Markdown as text for a terminal: code is indented, paragraphs are filled, links are words.

  >>> print(plain("See [here](x.md).\n\n```python\nx = 1\n```\n"), end="")
  See here.
  <BLANKLINE>
      x = 1
  """
  done, end = [], 0
  for fence in _FENCE.finditer(text):
    done += [_filled(text[end : fence.start()]), textwrap.indent(fence[2].rstrip(), "    ")]
    end = fence.end()
  done.append(_filled(text[end:]))
  return "\n\n".join(part for part in done if part) + "\n"


def _filled(text: str) -> str:
  words = _LINK.sub(r"\1", text).replace("**", "").strip()
  return "\n\n".join(textwrap.fill(part, WIDTH) for part in words.split("\n\n") if part)


def summary(body: str) -> str:
  r"""The first sentence of a section, without its first words.

  >>> summary("You meet it when a file is damaged, or too old.\nMore.\n")
  'when a file is damaged, or too old'
  """
  first = " ".join(_LINK.sub(r"\1", body).split("\n\n")[0].split())
  sentence = re.split(r"(?<=\w)\. (?=[A-Z])", first.removesuffix("."))[0]
  return re.sub(r"^You meet (it|this warning) ", "", sentence)


def main(argv: list[str] | None = None) -> int:
  """Print a section, or the list of all; returns 2 where there is no such section."""
  parser = argparse.ArgumentParser(
    prog="python -m refax.explain",
    description="Say when an error of Refax comes, show a program that raises it, and what to do.",
  )
  parser.add_argument("name", nargs="?", metavar="NAME", help="such as ShapeMismatchError")
  name = parser.parse_args(argv).name
  text = page()
  known = sections(text)
  if name is None:
    _list(known)
    return 0
  wanted = name.rpartition(".")[2]  # refax.errors.ShapeMismatchError, as Python prints it
  by_lower = {k.lower(): k for k in known}
  found = by_lower.get(wanted.lower())
  if found is None:
    near = difflib.get_close_matches(wanted.lower(), by_lower, 3, 0.5)
    meant = f"Did you mean {' or '.join(by_lower[n] for n in near)}? " if near else ""
    print(f"Refax has no error {wanted}. {meant}", end="", file=sys.stderr)
    print("python -m refax.explain lists all of them.", file=sys.stderr)
    return 2
  imports = blocks(text.partition("\n## ")[0], "python")[0]
  print(f"{found}\n{'=' * len(found)}\n\n{plain(known[found])}")
  print(f"The programs begin with:\n\n{textwrap.indent(imports, '    ')}", end="")
  return 0


def _list(known: dict[str, str]) -> None:
  width = max(map(len, known))
  for name, body in known.items():
    print(
      f"{name:{width}}  {textwrap.shorten(summary(body), WIDTH + 8 - width, placeholder=' ...')}"
    )
  print("\npython -m refax.explain NAME explains one of them.")


if __name__ == "__main__":
  sys.exit(main())
