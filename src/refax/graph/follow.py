"""Which state belongs to which parameter: moments of an optimizer, averages, by path and shape."""

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from refax.typing import Path

T = TypeVar("T")


class Leaders(Generic[T]):
  """Parameters, found by what follows them: `opt_state.0.mu.linear.kernel` follows `linear.kernel`.

  Args:
    leaders: for the path and the shape of each parameter, what is to be found.

  >>> leaders = Leaders({(("linear", "kernel"), (2, 3)): "kernel"})
  >>> leaders.of(("mu", "linear", "kernel"), (2, 3)), leaders.of(("mu", "linear", "kernel"), (2,))
  ('kernel', None)
  """

  def __init__(self, leaders: Mapping[tuple[Path, tuple[int, ...]], T]):
    self._by_end: dict[Any, list[tuple[Path, T]]] = {}
    for (path, shape), found in leaders.items():
      self._by_end.setdefault((path[-1:], shape), []).append((path, found))

  def of(self, path: Path, shape: tuple[int, ...]) -> T | None:
    """What was given for the parameter of this shape with the most of the path in common.

    None where there are several of them, for which different things were given.
    """
    best: int = 0
    found: list[T] = []
    for leader, value in self._by_end.get((path[-1:], tuple(shape)), ()):
      common = _common(path, leader)
      if common > best:
        best, found = common, []
      if common == best and value not in found:
        found.append(value)
    return found[0] if len(found) == 1 else None


def _common(a: Path, b: Path) -> int:
  """The number of last steps that two paths have in common."""
  count = 0
  for x, y in zip(reversed(a), reversed(b), strict=False):
    if x != y:
      break
    count += 1
  return count
