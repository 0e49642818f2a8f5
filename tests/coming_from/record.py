"""Runs the programs of the pages docs/from/, and records what those of the other libraries compute.

`python tests/coming_from/record.py`, in an environment with some of the libraries, writes for each
of them the numbers that a page compares, and the files that its programs write. The tests then
compare our programs with them where the library is not installed.
"""

import importlib.util
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "from"
OURS = "Refax"
LIBRARIES = {"PyTorch": "torch", "Equinox": "equinox", "Flax Linen": "flax", "Haiku": "haiku"}
_ITEM = re.compile(
  r'^```python title="(?P<title>.+?)"\n(?P<code>.*?)^```|^<!-- both: (?P<both>.*?) -->',
  flags=re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
  title: str
  code: str


class Both(NamedTuple):
  """Names that the block before, and the last one of the other library, give the same numbers."""

  title: str
  names: tuple[str, ...]
  index: int


def items(text):
  """The programs of a page and what is compared, from top to bottom."""
  found, title, count = [], None, 0
  for match in _ITEM.finditer(text):
    if match["both"]:
      count += 1
      found.append(Both(title, tuple(match["both"].split(", ")), count))
    else:
      title = title if match["title"] == OURS else match["title"]
      found.append(Block(match["title"], match["code"]))
  return found


def run(text, title, path):
  """The numbers that the programs with one title have where a page compares them."""
  namespace, numbers = {"__name__": "__main__"}, {}
  for item in items(text):
    if isinstance(item, Block):
      if item.title == title:
        exec(compile(item.code, f"{path}, {title}", "exec"), namespace)
    elif title in (OURS, item.title):
      for name in item.names:
        numbers[f"{item.title} {item.index} {name}"] = as_array(namespace[name])
  return numbers


def as_array(x):
  """An array of NumPy, also of a tensor of torch and of a Variable."""
  x = x.detach().numpy() if hasattr(x, "detach") else x
  return np.asarray(x[...] if hasattr(x, "get_raw_value") else x)


def is_there(title):
  return importlib.util.find_spec(LIBRARIES[title]) is not None


def launched(port):
  """What torchrun tells the first of one process."""
  return {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}


def main():
  for path in sorted(DOCS.glob("*.md")):
    text = path.read_text()
    for title in LIBRARIES:
      if f'title="{title}"' in text and is_there(title):
        os.environ.update(launched(29517))
        with tempfile.TemporaryDirectory() as folder:
          os.chdir(folder)
          numbers = run(text, title, path)
          for file in Path().glob("from_*"):
            shutil.copyfile(file, HERE / file)
          os.chdir(HERE)
        np.savez_compressed(HERE / f"{title.lower().replace(' ', '_')}.npz", **numbers)
        print(f"{title}: {len(numbers)} arrays")


if __name__ == "__main__":
  sys.exit(main())
