"""The pages docs/from/ are true: both programs of each pair run, and their numbers agree.

Where the other library is not installed, our numbers are compared with those that
`tests/coming_from/record.py` has recorded from it.
"""

import re
import shutil

import numpy as np
import pytest

import refax.testing
from refax import nnx
from tests.coming_from import record

PAGES = sorted(record.DOCS.glob("*.md"))
PAIRS = [
  (path, title)
  for path in PAGES
  for title in record.LIBRARIES
  if f'title="{title}"' in path.read_text()
]
TOPICS = (
  "Define a model",
  "Initialize",
  "Load their weights",
  "Gradients",
  "Train step",
  "Dropout and random keys",
  "Running statistics, training and evaluation",
  "Freeze a part",
  "Inspect parameters",
  "Save and restore",
  "Loops over layers",
  "Several devices",
  "Names",
  "What will surprise you",
)


def recorded(title):
  return dict(np.load(record.HERE / f"{title.lower().replace(' ', '_')}.npz"))


def assert_agree(got, want):
  """Whether they are the same numbers; a page that was edited has to be recorded again."""
  assert got.keys() == want.keys(), "run tests/coming_from/record.py"
  for name in got:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_there_is_a_page_for_each_library():
  assert [path.stem for path in PAGES] == ["equinox", "linen", "pytorch"]
  assert {title for _, title in PAIRS} == set(record.LIBRARIES)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_our_programs_run_from_top_to_bottom_and_give_the_numbers_of_theirs(
  path, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  for file in record.HERE.glob("from_*"):
    shutil.copy(file, tmp_path)
  want = {}
  for title in [title for page, title in PAIRS if page == path]:
    want |= recorded(title)
  assert len(want) > 10
  assert_agree(record.run(path.read_text(), record.OURS, path), want)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "title"), PAIRS, ids=lambda value: getattr(value, "stem", value))
def test_their_programs_run_and_give_the_recorded_numbers(path, title, tmp_path, monkeypatch):
  if not record.is_there(title):
    pytest.skip(f"{title} is not installed")
  monkeypatch.chdir(tmp_path)
  for name, value in record.launched(29518).items():
    monkeypatch.setenv(name, value)
  assert_agree(record.run(path.read_text(), title, path), recorded(title))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_each_topic_has_a_pair_of_programs(path):
  text = path.read_text()
  headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
  assert tuple(heading for heading in headings if heading != "Haiku") == TOPICS
  for part in text.split("\n## ")[1:]:
    titles = re.findall(r'^```python title="(.+?)"$', part, flags=re.MULTILINE)
    assert part.startswith("Names") or (record.OURS in titles and len(set(titles)) == 2), part[:40]
  assert "```python\n" not in text  # a program without a title would not run


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_names_of_refax_on_a_page_exist(path):
  names = set(re.findall(r"\bnnx((?:\.[A-Za-z_]\w*)+)", path.read_text()))
  assert len(names) > 40
  for name in names - {".bridge.ToNNX"}:  # a name of refax.compat
    value = nnx
    for part in name[1:].split("."):
      value = getattr(value, part)
  for name in re.findall(r"\brefax\.testing\.(\w+)", path.read_text()):
    assert name in refax.testing.__all__
