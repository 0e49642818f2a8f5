"""The page "Coming from Flax NNX" runs from top to bottom, and what it shows is what one sees."""

import pathlib
import re

import pytest

from tests import pages

pytest.importorskip("libcst")

PAGE = pathlib.Path(__file__).parent.parent.parent / "docs" / "flax.md"


def test_the_python_of_the_page_runs():
  blocks = pages.python_blocks(PAGE)
  namespace = {"__name__": "__main__"}
  for block in blocks:
    exec(compile(block, str(PAGE), "exec"), namespace)
  assert namespace["train_step"] is not None and len(blocks) == 4


def test_names_of_the_table_are_there():
  from refax import nnx
  from refax.compat import nnx as compat

  rows = [row.split("|")[1:3] for row in PAGE.read_text().splitlines() if row.startswith("| `")]
  for name in ("TrainState", "cached_partial", "split_context", "with_vars", "capture"):
    assert any(name in theirs for theirs, _ in rows) and hasattr(compat, name)
  same = next(theirs for theirs, ours in rows if ours.strip() == "the same")
  for name in re.findall(r"`(\w+)`", same):
    assert hasattr(nnx, name)
