"""Numbers for what a compiled function reaches by closure: each has a trace of its own."""

import itertools
from collections.abc import Sequence

_NUMBERS = itertools.count(1)


class Versions:
  """The versions of one function: what was reached, and which objects have had its cells.

  What is compiled for a version holds the cells. When the last object with some of them is gone,
  the version is an orphan, unless the next call finds a new object on the same cells.
  """

  def __init__(self):
    self._numbers: dict[tuple, int] = {}
    self._holders: dict[int, list[set[int]]] = {}  # who has each lot of cells, by `id`
    self._orphans: set[int] = set()

  def __len__(self) -> int:
    return len(self._numbers)

  def __contains__(self, found: tuple) -> bool:
    return found in self._numbers

  def number(self, found: tuple, ids: Sequence[int]) -> int:
    """The number of a version; 0 where nothing is reached.

    Args:
      found: what is reached, as `Reach.snapshot` says.
      ids: the `id` of each object in it.
    """
    if not found:
      return 0
    version = self._numbers.setdefault(found, next(_NUMBERS))
    lots = self._holders.setdefault(version, [set() for _ in ids])
    for lot, key in zip(lots, ids, strict=True):
      lot.add(key)
    self._orphans.discard(version)
    return version

  def note_gone(self, key: int) -> bool:
    """An object is gone; whether there are orphans now."""
    for version, lots in list(self._holders.items()):
      for lot in lots:
        if key in lot:
          lot.discard(key)
          if not lot:
            self._orphans.add(version)
    return bool(self._orphans)

  def take_orphans(self) -> frozenset[int]:
    """The orphans, which are forgotten here."""
    gone = frozenset(self._orphans)
    if gone:
      self._orphans -= gone
      self._numbers = {f: n for f, n in list(self._numbers.items()) if n not in gone}
      self._holders = {n: x for n, x in list(self._holders.items()) if n not in gone}
    return gone

  def clear(self) -> None:
    """Forget all of them."""
    self._numbers.clear()
    self._holders.clear()
    self._orphans.clear()
