"""Sentences of real text, and what the model reads of them: numbers of word pieces."""

import re
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np

from examples.minilm.model import folder

LENGTH = 96  # tokens of a sentence that are read; all of the corpus have less
CHAPTERS = ("debugger", "formatstrings", "import", "specialnames", "string-methods", "typesmapping")
"""Chapters of the Python reference that have enough prose to learn from."""


class Tokens(NamedTuple):
  """A batch of sentences: numbers of word pieces, and 1 where there is one."""

  ids: np.ndarray
  mask: np.ndarray


class Tokenizer:
  """The model's own vocabulary, from its package."""

  def __init__(self, length: int = LENGTH):
    import tokenizers

    self._length = length
    self._tokenizer = tokenizers.Tokenizer.from_file(str(folder() / "tokenizer.json"))
    self._tokenizer.enable_truncation(length)

  def __call__(self, sentences: list[str], *, pad: bool = False) -> Tokens:
    """Sentences as numbers, as long as the longest; with `pad` as long as any could be."""
    self._tokenizer.enable_padding(length=self._length if pad else None)
    encoded = self._tokenizer.encode_batch(sentences)
    ids = np.array([e.ids for e in encoded], np.int32)
    return Tokens(ids, np.array([e.attention_mask for e in encoded], np.int32))


def chapter(name: str) -> list[str]:
  """The sentences of a chapter of the Python reference, which every Python brings along."""
  paragraphs = re.split(r"\n\s*\n", topics[name])
  prose = [
    " ".join(p.split()) for p in paragraphs if not re.search(r"::=|>>>|\*\*\*|===|\.\.\.", p)
  ]
  sentences = [s for p in prose for s in re.split(r"(?<=[.!?]) +(?=[A-Z])", p)]
  return [s for s in sentences if 40 <= len(s) <= 300 and s[0].isupper() and s.endswith(".")]


def sentences() -> list[str]:
  """All sentences of the chapters, each once."""
  return list(dict.fromkeys(s for name in CHAPTERS for s in chapter(name)))
