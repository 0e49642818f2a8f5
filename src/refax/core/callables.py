"""Functions that hold objects: bound methods and partials, which can be followed, and closures.

A method that is bound to a Module, kept in an attribute, means the Module: after a transform or a
copy it must be bound to the new one. Python can rebuild bound methods and `functools.partial`; what
a function has closed over, nobody can exchange.
"""

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

from refax.typing import Path

CALLABLES = frozenset((types.MethodType, functools.partial))
"""The types of functions that can be taken apart and put together again."""


class CallableDef:
  """The static half of a bound method or a partial, in the role of a treedef. Hashable."""

  __slots__ = ("_build", "_key", "paths")

  def __init__(self, key: tuple, paths: Iterable[Path], build: Callable[[list], Any]):
    self._key, self.paths, self._build = key, list(paths), build

  @property
  def num_leaves(self) -> int:
    """The number of parts."""
    return len(self.paths)

  def unflatten(self, parts: Iterable[Any]) -> Any:
    """The function with these parts."""
    return self._build(list(parts))

  def __hash__(self) -> int:
    return hash(self._key)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, CallableDef) and self._key == other._key

  def __reduce__(self) -> Any:
    return _definition, self._key


def _definition(sort: str, *key: Any) -> CallableDef:
  if sort == "method":
    (function,) = key
    build = lambda parts: types.MethodType(function, *parts)
    return CallableDef((sort, function), [("__self__",)], build)
  count, names = key
  paths = [("func",), *(("args", i) for i in range(count)), *(("keywords", n) for n in names)]

  def partial(parts: list) -> functools.partial:
    function, *rest = parts
    return functools.partial(function, *rest[:count], **dict(zip(names, rest[count:], strict=True)))

  return CallableDef((sort, count, names), paths, partial)


def taken_apart(value: Any) -> tuple[list[Any], CallableDef]:
  """The parts of a bound method or a partial, and what puts them together again."""
  if isinstance(value, types.MethodType):
    return [value.__self__], _definition("method", value.__func__)
  names = tuple(value.keywords)
  parts = [value.func, *value.args, *value.keywords.values()]
  return parts, _definition("partial", len(value.args), names)


def captured(value: Any, is_object: Callable[[Any], bool], depth: int = 0) -> Any:
  """An object that a function holds: bound, in a partial, by closure, or wrapped; or None."""
  if is_object(value):
    return value
  if depth > 8 or isinstance(value, type | types.ModuleType):
    return None
  for part in _held(value, depth):
    found = captured(part, is_object, depth + 1)
    if found is not None:
      return found
  return None


def _held(value: Any, depth: int) -> Iterable[Any]:
  if isinstance(value, types.MethodType):
    return (value.__self__, value.__func__)
  if isinstance(value, functools.partial):
    return (value.func, *value.args, *value.keywords.values())
  if isinstance(value, types.FunctionType):
    cells = value.__closure__ or ()
    held = [cell.cell_contents for cell in cells if _is_full(cell)]
    held += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return (*held, getattr(value, "__wrapped__", None))
  if depth and isinstance(value, list | tuple):
    return value
  if depth and isinstance(value, dict):
    return value.values()
  wrapped = getattr(value, "__wrapped__", None) if callable(value) else None
  return () if wrapped is None else (wrapped,)


def _is_full(cell: Any) -> bool:
  try:
    return cell.cell_contents is not None
  except ValueError:  # not assigned yet
    return False
