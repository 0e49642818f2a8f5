"""The Python in the README and the docs runs, and what it says about the commands is true."""

import inspect
import pathlib
import re

import pytest

from refax import nnx
from refax.nn import activations

ROOT = pathlib.Path(__file__).parent.parent
# Importing `refax.compat` changes what Variables are: tests/compat runs the page that does.
PAGES = [
  ROOT / "README.md",
  *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "flax.md"),
]


def python_blocks(path):
  return re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(path):
  namespace = {"__name__": "__main__"}
  for block in python_blocks(path):
    exec(compile(block, str(path), "exec"), namespace)
  assert namespace.get("nnx") is not None or not python_blocks(path)


def test_the_readme_example_learns(capsys):
  exec(python_blocks(ROOT / "README.md")[0], {"__name__": "__main__"})
  loss, value = re.match(r"loss (\S+), f\(1, 2\) = (\S+)", capsys.readouterr().out).groups()
  assert float(loss) < 0.5
  assert abs(float(value) - 3.0) < 0.3


def test_the_make_targets_of_the_readme_exist():
  makefile = (ROOT / "Makefile").read_text()
  targets = re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text())
  assert {"train", "test", "help"} <= set(targets)
  for target in targets:
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_names_that_the_reference_cannot_find_by_itself_are_written_there():
  """mkdocstrings documents what is defined by `class` and `def`; the rest is listed by hand."""
  page = (ROOT / "docs" / "reference.md").read_text()
  assert "::: refax.nnx" in page
  by_hand = [
    name
    for name in nnx.__all__
    if not (inspect.isclass(obj := getattr(nnx, name)) or inspect.isfunction(obj))
    or getattr(activations, name, None) is obj
  ]
  assert {"Filter", "initializers", "relu"} <= set(by_hand)
  assert [name for name in by_hand if f"`nnx.{name}`" not in page] == []
