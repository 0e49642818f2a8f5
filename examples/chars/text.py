"""The text: the pages that `help()` of Python shows, which every Python brings along."""

import re
from typing import NamedTuple

import numpy as np

# The characters that the model knows: all that ASCII can print, and the end of a line.
KNOWN = "\n" + "".join(map(chr, range(32, 127)))
NUMBER = {character: number for number, character in enumerate(KNOWN)}
PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "..."})
RUN = re.compile(r"(.)\1{4,}")  # lines of tables and of headings, and the gaps in tables
HELD_OUT = 10  # one page of so many


class Corpus(NamedTuple):
  """Text as numbers, int32; the model is never trained on the pages in `held_out`."""

  train: np.ndarray
  held_out: np.ndarray


def encode(text: str) -> np.ndarray:
  """The number of each character; characters that the model does not know are left out.

  Where a character comes more than four times in a row, it comes four times.
  """
  plain = RUN.sub(r"\1\1\1\1", text.translate(PLAIN))
  return np.array([NUMBER[c] for c in plain if c in NUMBER], np.int32)


def decode(numbers: np.ndarray | list[int]) -> str:
  return "".join(KNOWN[number] for number in numbers)


def pages() -> list[str]:
  """The pages, where a paragraph that several pages have is in the first of them only.

  Some pages repeat others, so without this the model would have seen text that is held out.
  """
  from pydoc_data.topics import topics

  seen: set[str] = set()
  found = []
  for name in sorted(topics):
    new = [part for part in topics[name].strip("\n").split("\n\n") if part.strip() not in seen]
    seen.update(part.strip() for part in new)
    if new:
      found.append("\n\n".join(new) + "\n\n\n")
  return found


def load(*, seed: int) -> Corpus:
  """All pages, in random order."""
  found = pages()
  order = np.random.default_rng(seed).permutation(len(found))
  count = -(-len(found) // HELD_OUT)
  text = ["".join(found[i] for i in chosen) for chosen in (order[count:], order[:count])]
  return Corpus(*map(encode, text))
