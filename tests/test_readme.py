"""The Python in the README and the docs runs, and what it says about the commands is true."""

import pathlib
import re
import warnings

import pytest

from refax import nnx
from tests import pages

ROOT = pathlib.Path(__file__).parent.parent
# Importing `refax.compat` changes what Variables are: tests/compat runs the page that does. The
# page on scaling needs eight devices: tests/sharding runs it. Errors and other libraries have tests
# of their own.
ELSEWHERE = ("flax.md", "scaling.md", "reference/errors.md", "from/")
DOCS = ROOT / "docs"
PAGES = [
  ROOT / "README.md",
  *(
    path
    for path in sorted(DOCS.rglob("*.md"))
    if not str(path.relative_to(DOCS)).startswith(ELSEWHERE) and pages.python_blocks(path)
  ),
]


# CI runs these as notebooks too.
SLOW = ("array_refs", "characters", "ensemble", "ten_minutes", "vae")


@pytest.mark.parametrize(
  "path",
  [
    pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in SLOW else ())
    for path in PAGES
  ],
)
def test_the_python_of_a_page_runs_and_prints_what_it_shows(path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with warnings.catch_warnings():  # pages may say simplefilter
    assert pages.run(path)["nnx"] is nnx


def test_a_page_that_shows_something_else_fails(tmp_path):
  page = tmp_path / "page.md"
  page.write_text("```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n")
  with pytest.raises(AssertionError, match=r"page\.md shows"):
    pages.run(page)
  page.write_text("```python\nprint('a', 1 + 1, 'b')\n```\n\n```text\na ... b\n```\n")
  pages.run(page)


def test_the_readme_example_learns(capsys):
  exec(pages.python_blocks(ROOT / "README.md")[0], {"__name__": "__main__"})
  loss, value = re.match(r"loss (\S+), f\(1, 2\) = (\S+)", capsys.readouterr().out).groups()
  assert float(loss) < 0.5
  assert abs(float(value) - 3.0) < 0.3


def test_the_make_targets_of_the_readme_exist():
  makefile = (ROOT / "Makefile").read_text()
  targets = re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text())
  assert {"train", "test", "help"} <= set(targets)
  for target in targets:
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_each_public_name_has_one_place_in_the_reference():
  text = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
  described = re.findall(r"^::: refax\.nnx\.(\w+)$", text, flags=re.MULTILINE)
  assert len(described) == len(set(described))
  assert set(described) <= set(nnx.__all__)
  # mkdocstrings describes what `class` and `def` define; the rest is written by hand.
  by_hand = [name for name in nnx.__all__ if name not in described]
  assert {"Filter", "initializers", "relu"} <= set(by_hand)
  assert [name for name in by_hand if f"`nnx.{name}`" not in text] == []


def test_each_page_is_in_the_navigation():
  nav = (ROOT / "mkdocs.yml").read_text()
  found = [str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")]
  assert [name for name in found if f" {name}\n" not in nav] == []
