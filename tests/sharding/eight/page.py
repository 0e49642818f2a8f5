"""The page on scaling runs from top to bottom, and says what comes out."""

import re
from pathlib import Path

from tests import pages

PAGE = Path(__file__).parents[3] / "docs" / "scaling.md"


def test_the_python_of_the_page_runs_from_top_to_bottom(capsys):
  text = PAGE.read_text()
  blocks = pages.python_blocks(PAGE)
  namespace = {"__name__": "__main__"}
  for block in blocks:
    block = re.sub("^jax.config.update.*$", "", block, flags=re.MULTILINE)  # eight, by a flag
    exec(compile(block, str(PAGE), "exec"), namespace)
  printed = capsys.readouterr().out
  for line in re.findall(r"^# (.*)", "\n".join(blocks), flags=re.MULTILINE):
    start = line.partition("...")[0].split("  ")[0].strip()
    assert start in printed, line
  table = [line for line in printed.splitlines() if line.startswith(("all-reduce", "in all"))]
  assert all(re.sub(" +", " ", line) in re.sub(" +", " ", text) for line in table)
