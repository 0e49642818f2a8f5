"""Filters: which Variables (or Modules) an operation is about.

A filter is a predicate `(path, value) -> bool`, or one of the short forms that `to_predicate`
understands: a type, a tag, `...`, True, False, None, or a tuple or list of filters (any of them).
"""

import builtins
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any as AnyType
from typing import TypeAlias

from refax.errors import FilterError
from refax.typing import Key, Path

Predicate: TypeAlias = Callable[[Path, AnyType], bool]
Filter: TypeAlias = type | str | bool | EllipsisType | Predicate | Sequence[AnyType] | None


def to_predicate(filter: Filter) -> Predicate:
  """The predicate that a filter stands for.

  >>> from refax import nnx
  >>> to_predicate(nnx.Param)((), nnx.Param(0.0))
  True

  Raises:
    FilterError: it is not a filter.
  """
  if filter is ... or filter is True:
    return Everything()
  if filter is None or filter is False:
    return Nothing()
  if isinstance(filter, str):
    return WithTag(filter)
  if isinstance(filter, type):
    return OfType(filter)
  if isinstance(filter, list | tuple):
    return Any(*filter)
  if callable(filter):
    return filter
  raise FilterError.unknown(filter)


def to_predicates(filters: Sequence[Filter]) -> list[Predicate]:
  """The predicates of several filters; `...` may only be the last.

  Raises:
    FilterError: `...` or True comes before the end, or one is not a filter.
  """
  for i, filter in enumerate(filters):
    if (filter is ... or filter is True) and i < len(filters) - 1:
      raise FilterError.not_last(i + 1, len(filters))
  return [to_predicate(f) for f in filters]


class _Filter:
  """A filter with a value: equal and hashable by its arguments, so that it may be static."""

  def __init__(self, *args: AnyType):
    self._args = args

  def __call__(self, path: Path, value: AnyType) -> bool:
    raise NotImplementedError

  def __eq__(self, other) -> bool:
    return type(self) is type(other) and self._args == other._args

  def __hash__(self) -> int:
    return hash((type(self), self._args))

  def __repr__(self) -> str:
    return f"{type(self).__name__}({', '.join(map(repr, self._args))})"


class OfType(_Filter):
  """Values of a type, or Variables of a type.

  >>> from refax import nnx
  >>> nnx.OfType(nnx.Param)((), nnx.BatchStat(0.0))
  False
  """

  def __init__(self, type: builtins.type):
    super().__init__(type)
    self.type = type

  def __call__(self, path: Path, value: AnyType) -> bool:
    return isinstance(value, self.type)


class PathContains(_Filter):
  """Values whose path has this key as one of its steps.

  >>> from refax import nnx
  >>> nnx.PathContains("head")(("head", "kernel"), None)
  True
  """

  def __init__(self, key: Key, *, exact: bool = True):
    super().__init__(key, exact)
    self.key = key
    self.exact = exact

  def __call__(self, path: Path, value: AnyType) -> bool:
    if self.exact:
      return self.key in path
    return any(str(self.key) in str(key) for key in path)


class PathIn(_Filter):
  """Values at one of these paths.

  >>> from refax import nnx
  >>> nnx.PathIn(("head", "bias"))(("head", "kernel"), None)
  False
  """

  def __init__(self, *paths: Path):
    super().__init__(*paths)
    self.paths = frozenset(tuple(path) for path in paths)

  def __call__(self, path: Path, value: AnyType) -> bool:
    return tuple(path) in self.paths


class WithTag(_Filter):
  """Values whose `tag` is this one.

  >>> from refax import nnx
  >>> nnx.WithTag("frozen")((), nnx.Param(0.0, tag="frozen"))
  True
  """

  def __init__(self, tag: str):
    super().__init__(tag)
    self.tag = tag

  def __call__(self, path: Path, value: AnyType) -> bool:
    return getattr(value, "tag", None) == self.tag


class Any(_Filter):
  """Values that match one of the filters.

  >>> from refax import nnx
  >>> nnx.Any(nnx.Param, nnx.BatchStat)((), nnx.BatchStat(0.0))
  True
  """

  def __init__(self, *filters: Filter):
    self.predicates = tuple(map(to_predicate, filters))
    super().__init__(*self.predicates)

  def __call__(self, path: Path, value: AnyType) -> bool:
    return any(p(path, value) for p in self.predicates)


class All(_Filter):
  """Values that match all of the filters.

  >>> from refax import nnx
  >>> nnx.All(nnx.Param, nnx.PathContains("head"))(("body",), nnx.Param(0.0))
  False
  """

  def __init__(self, *filters: Filter):
    self.predicates = tuple(map(to_predicate, filters))
    super().__init__(*self.predicates)

  def __call__(self, path: Path, value: AnyType) -> bool:
    return all(p(path, value) for p in self.predicates)


class Not(_Filter):
  """Values that do not match the filter.

  >>> from refax import nnx
  >>> nnx.Not(nnx.Param)((), nnx.BatchStat(0.0))
  True
  """

  def __init__(self, filter: Filter, /):
    self.predicate = to_predicate(filter)
    super().__init__(self.predicate)

  def __call__(self, path: Path, value: AnyType) -> bool:
    return not self.predicate(path, value)


class Everything(_Filter):
  """All values; `...` for short.

  >>> from refax import nnx
  >>> nnx.Everything()((), None)
  True
  """

  def __init__(self):
    super().__init__()

  def __call__(self, path: Path, value: AnyType) -> bool:
    return True


class Nothing(_Filter):
  """No value; None or False for short.

  >>> from refax import nnx
  >>> nnx.Nothing()((), None)
  False
  """

  def __init__(self):
    super().__init__()

  def __call__(self, path: Path, value: AnyType) -> bool:
    return False
