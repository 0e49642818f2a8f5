"""Which Modules of a model are meant: by type, by path, by a predicate."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from refax.core.calls import path_of
from refax.core.filters import Filter, to_predicate
from refax.core.flatten import flatten, walk_nodes
from refax.core.module import Module
from refax.core.variable import Variable
from refax.errors import FilterError
from refax.typing import Path


class Choice:
  """The Modules that match one of some filters. Equal and hashable by these.

  >>> Choice.of(["encoder/**"]).has(("encoder", "layers", 3), None)
  True
  """

  def __init__(self, filters: tuple, types: tuple[type[Variable], ...]):
    self._filters = filters
    self.types = types
    """The types of Variables."""
    self.has_modules = bool(filters)
    """Whether Modules are meant, and not types of Variables alone."""
    self._predicates = [_predicate(f) for f in filters]

  @classmethod
  def of(cls, filters: Sequence[Filter]) -> "Choice":
    """The choice of some filters; of none, all Modules.

    Raises:
      FilterError: one is not a filter.
    """
    types = tuple(f for f in filters if isinstance(f, type) and issubclass(f, Variable))
    others = tuple(f for f in filters if f not in types)
    return cls(others or (() if types else (...,)), types)

  def has(self, path: Path, module: Any) -> bool:
    """Whether a Module is meant."""
    return any(p(path, module) for p in self._predicates)

  def has_type(self, variable_type: type[Variable]) -> bool:
    """Whether what is sown in Variables of a type is meant."""
    return issubclass(variable_type, self.types)

  def __hash__(self) -> int:
    return hash((self._filters, self.types))

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Choice) and (self._filters, self.types) == (
      other._filters,
      other.types,
    )


def _predicate(filter: Filter) -> Any:
  if isinstance(filter, str):
    match = matcher(filter)
    return lambda path, _: match(path)
  if isinstance(filter, tuple) and filter and not any(map(_is_filter, filter)):
    return lambda path, _: tuple(map(str, path)) == tuple(map(str, filter))
  if isinstance(filter, Module):  # which is callable, but no predicate
    raise FilterError.unknown(filter)
  return to_predicate(filter)


def _is_filter(x: Any) -> bool:
  return callable(x) or x is ... or x is None or isinstance(x, bool)


def matcher(pattern: str) -> Any:
  """The predicate on paths of a pattern: `*` is any one step, `**` any number of steps.

  >>> matcher("layers/*/attention")(("layers", 3, "attention"))
  True
  """
  steps = pattern.replace(".", "/").strip("/").split("/") if pattern else []
  text = "".join(r"(?:[^/]+/)*" if s == "**" else _step(s) + "/" for s in steps)
  compiled = re.compile(text)
  return lambda path: compiled.fullmatch("".join(f"{step}/" for step in path)) is not None


def _step(pattern: str) -> str:
  return "[^/]*".join(map(re.escape, pattern.split("*")))


class Presence:
  """Whether the paths among some filters lead to Modules in the arguments of a function.

  Args:
    filters: those of the user; only paths are looked at.
    is_root: whether paths count from the argument itself.
  """

  def __init__(self, filters: Iterable[Filter], *, is_root: bool):
    self._patterns = [f for f in filters if isinstance(f, str)]
    self._is_root = is_root
    self._seen: list[tuple[Path, Any]] = []

  def check(self, given: Iterable[Any]) -> None:
    """Raise FilterError if a path leads nowhere; without a Module among them, nothing is known."""
    roots = [x for x in given if isinstance(x, Module)] if self._patterns else []
    seen = [(() if self._is_root else path_of(x), flatten(x).graphdef) for x in roots]
    if seen == self._seen:  # a loop hands over the same model in each step
      return
    paths = [
      (*start, *path)
      for root, (start, _) in zip(roots, seen, strict=True)
      for path, node in walk_nodes(root)
      if isinstance(node, Module)
    ]
    for pattern in self._patterns if roots else ():
      if not any(map(matcher(pattern), paths)):
        raise FilterError.no_module(pattern, ["/".join(map(str, p)) for p in paths])
    self._seen = seen
