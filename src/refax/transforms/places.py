"""Places where a function finds things without being given them: read again before each call.

What was found in a place is held weakly, and so is what the place belongs to: a model that a
notebook binds to the same name once more must not live as long as the function.
"""

import collections
import functools
import operator
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from refax import _jax
from refax.core.by_value import SameHash
from refax.core.watch import Row, weakly
from refax.graph.state import State

_MOST = 256  # items of containers in one place; more of them take long to look at in each call
_DEEPEST = 8  # containers in containers

_BUILT_IN = (list, tuple, dict, set, frozenset, collections.deque)
_EXACT = frozenset((*_BUILT_IN, collections.OrderedDict, collections.defaultdict))
"""Containers whose items are all that there is to them."""

_AROUND: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
  (types.MappingProxyType, dict),
  (weakref.WeakValueDictionary, dict),
  (weakref.ref, lambda ref: (ref(),)),
  (collections.ChainMap, operator.attrgetter("maps")),
  (collections.UserDict, operator.attrgetter("data")),
  (collections.UserList, operator.attrgetter("data")),
  ((type({}.values()), type({}.keys()), type({}.items())), tuple),
  (State, operator.methodcaller("_ordered")),
)
"""Containers around another one, and the function to that."""

_ANY_PLAIN, _END, _NOTHING = object(), object(), object()


class Slot(NamedTuple):
  """A place where a function finds something: a global, an attribute, a cell of a closure."""

  read: Callable[[], Any]
  """What is there now, or None."""
  known: Callable[[], Any]
  """What was there, or None if that is gone."""

  @classmethod
  def of(cls, read: Callable[[], Any], value: Any) -> "Slot | None":
    """A place with an object or a container of such; None if that is too large to be watched."""
    if opened(type(value)) is None:
      return cls(read, weakly(value))
    items = _items(value)
    if items is None:
      return None
    contents = Contents(read, items)
    return cls(contents, weakref.ref(contents))

  @classmethod
  def empty(cls, read: Callable[[], Any]) -> "Slot":
    """A place with nothing in it, or a number, that may get an object."""
    return cls(lambda: _NOTHING if is_plain(type(x := read())) else x, lambda: _NOTHING)

  @classmethod
  def unchanged(cls, value: Any) -> "Slot":
    """A value that has the hash that it has now."""
    seen = SameHash(value)
    return cls(lambda: seen if seen.holds(value) else None, lambda: seen)

  def holds(self) -> bool:
    """Whether what was found is still there."""
    now = self.read()
    return now is not None and now is self.known()


class Part:
  """`get(owner)` for an owner that is not kept alive: None when it is gone."""

  __slots__ = ("_get", "_owner")

  def __init__(self, owner: Any, get: Callable[[Any], Any]):
    self._owner, self._get = weakly(owner), get

  @property
  def is_gone(self) -> bool:
    """Whether the owner is."""
    return self._owner() is None

  def __call__(self) -> Any:
    owner = self._owner()
    return None if owner is None else self._get(owner)


class Contents:
  """What is in the container in a place: itself as long as that is the same, else None."""

  __slots__ = ("__weakref__", "_known", "_read")

  def __init__(self, read: Callable[[], Any], items: list[Any]):
    self._read, self._known = read, Row(items)

  def __call__(self) -> "Contents | None":
    now = _items(self._read())
    return self if now is not None and self._known.is_of(now) else None

  def items(self) -> list[Any]:
    """What was in it, in one row."""
    return self._known.items()


@functools.lru_cache(maxsize=1024)
def opened(cls: type) -> Callable[[Any], Any] | None:
  """The function from a container of this type to the dict or sequence in it; None for others."""
  if issubclass(cls, _BUILT_IN):
    return _itself
  return next((open_ for sort, open_ in _AROUND if issubclass(cls, sort)), None)


def _itself(value: Any) -> Any:
  return value


def is_filled(value: Any) -> bool:
  """Whether there is anything in a container, and not only None."""
  while (held := opened(type(value))(value)) is not value:  # pyright: ignore[reportOptionalCall]
    value = held
    if opened(type(value)) is None:
      return True
  return any(x is not None for x in (tuple(value.values()) if isinstance(value, dict) else value))


@functools.lru_cache(maxsize=1024)
def is_plain(cls: type) -> bool:
  """Whether a value of this type is a number, text or an array: no object is in it."""
  arrays = (jax.Array, np.ndarray, np.generic)
  return (issubclass(cls, arrays) and not issubclass(cls, jax.Ref)) or cls in _PLAIN


_PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None)))


def _items(value: Any) -> list[Any] | None:
  """What containers hold, in one row; None for anything else, and for too much to look at.

  Numbers, strings, arrays, and containers of nothing else are all alike: no object is in them, and
  they may be counters, and lists of losses.
  """
  found: list[Any] = []
  is_container = opened(type(value)) is not None
  return found if is_container and _spread(value, found, 0) else None


def _spread(value: Any, found: list[Any], depth: int) -> bool:
  cls = type(value)
  open_ = opened(cls)
  if open_ is None:
    is_array = _jax.is_tracer(value) and not _jax.is_ref(value)
    found.append(_ANY_PLAIN if is_plain(cls) or is_array else value)
    return True
  if depth > _DEEPEST or len(found) > _MOST:
    return False
  if (held := open_(value)) is not value:
    found.append(cls)
    return _spread(held, found, depth + 1)
  if not _is_exact(cls):
    return False
  inside: list[Any] = [cls]
  if len(value) > _MOST:  # one look at the types of all takes 10 ns an item
    values = value.values() if isinstance(value, dict) else value
    if not all(map(is_plain, set(map(type, values)))):
      return False
  elif isinstance(value, dict):
    for key in list(value):
      start = len(inside)
      inside.append(key)
      if not _spread(value.get(key), inside, depth + 1):
        return False
      if len(inside) == start + 2 and inside[-1] is _ANY_PLAIN:
        del inside[start:]
  elif not all(_spread(x, inside, depth + 1) for x in tuple(value)):
    return False
  holds_none = all(x is _ANY_PLAIN for x in inside[1:])
  found += [_ANY_PLAIN] if holds_none else [*inside, _END]
  return len(found) <= _MOST


def _is_exact(cls: type) -> bool:
  """Whether a type of containers iterates as the built-in ones do: these, and named tuples."""
  return cls in _EXACT or (issubclass(cls, tuple) and cls.__iter__ is tuple.__iter__)


def contents(cell: types.CellType) -> Any:
  """What is in a cell of a closure; None if nothing is."""
  try:
    return cell.cell_contents
  except ValueError:  # not assigned yet
    return None


def function_of(attribute: Any) -> types.FunctionType | None:
  """The function behind a method or a property of a class; None for another attribute."""
  if isinstance(attribute, classmethod | staticmethod):
    attribute = attribute.__func__
  elif isinstance(attribute, property):
    attribute = attribute.fget
  elif isinstance(attribute, functools.cached_property | functools.partialmethod):
    attribute = attribute.func
  return attribute if isinstance(attribute, types.FunctionType) else None


def functions_of(attribute: Any) -> list[types.FunctionType]:
  """All functions behind a method or a property of a class."""
  if isinstance(attribute, property):
    found = (attribute.fget, attribute.fset, attribute.fdel)
    return [f for f in found if isinstance(f, types.FunctionType)]
  function = function_of(attribute)
  return [] if function is None else [function]


def rules_of(x: Any) -> dict[str, types.FunctionType]:
  """The functions that what wraps a function keeps besides it: derivatives of the user's own."""
  kept = getattr(x, "__dict__", {}).items()
  return {k: f for k, f in kept if k != "__wrapped__" and isinstance(f, types.FunctionType)}


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
  """The code of a function, and of functions inside it."""
  yield code
  for const in code.co_consts:
    if isinstance(const, types.CodeType):
      yield from codes_in(const)


def names_in(code: types.CodeType) -> Iterator[str]:
  """The global names and attributes that a function, and functions inside it, may look up.

  Text may be one: in `getattr(x, "name")`, `vars(x)["name"]`, `attrgetter`, the pattern of a class.
  """
  for part in codes_in(code):
    yield from part.co_names
    for const in part.co_consts:
      texts = const if isinstance(const, tuple) else (const,)
      yield from (x for x in texts if isinstance(x, str) and x.isidentifier())
