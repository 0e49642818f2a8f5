"""Static values that have no hash: a plain dataclass with a model's sizes, lists and dicts in it.

A GraphDef must be hashable, and must not change when such a value does. So it holds a ByValue: what
the value was when a walk saw it, in a copy that nobody else has, and compared by what is in it.
"""

import copy as copylib
import dataclasses
import enum
import functools
import operator
import types
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from refax import _jax
from refax.core import callables
from refax.core.definition import is_library, kind
from refax.core.node import Node
from refax.core.variable import Variable


class NotByValue(TypeError):
  """A value has a part that can be neither hashed nor compared by what is in it."""


class ByValue:
  """A value without a hash, as it was at one moment. Equal to another one with the same in it.

  Args:
    value: the value; it is copied.

  Raises:
    NotByValue: it holds tracers, objects with state, or what cannot be taken apart.
  """

  __slots__ = ("_hash", "_key", "_value")

  def __init__(self, value: Any):
    self._key = _key(value)
    self._hash = hash(self._key)
    self._value = _copied(value, {})

  def fresh(self) -> Any:
    """A copy that its owner may change."""
    return _copied(self._value, {})

  def holds(self, value: Any) -> bool:
    """Whether a value is still as it was."""
    try:
      return _key(value) == self._key
    except NotByValue:
      return False

  def __hash__(self) -> int:
    return self._hash

  def __eq__(self, other: object) -> bool:
    return self is other or (isinstance(other, ByValue) and self._key == other._key)

  def __repr__(self) -> str:
    return repr(self._value)

  def __reduce__(self) -> Any:
    return ByValue, (self._value,)


class Unchanged:
  """Whether one value without a hash is still as it was, asked before each call of a function.

  Mostly it holds the very same things as before. Only where it does not, or where an array of NumPy
  may have been written to, is it compared by what is in it: that takes 2 us for each field.

  Args:
    value: the value.
    seen: what it is now.
  """

  __slots__ = ("_containers", "_seen")

  def __init__(self, value: Any, seen: ByValue):
    self._seen = seen
    found: list[tuple[Callable[[], list[Any]], list[Any]]] = []
    self._containers = found if _list_containers(value, found) else None

  def holds(self, value: Any) -> bool:
    """Whether it is; `value` is always the same one."""
    if self._containers is not None and all(
      len(now := read()) == len(known) and all(map(operator.is_, now, known))
      for read, known in self._containers
    ):
      return True
    return self._seen.holds(value)


def _list_containers(value: Any, found: list[tuple[Callable[[], list[Any]], list[Any]]]) -> bool:
  """List (read, what was read) for each container in a value; False if one cannot be read so."""
  if has_hash(value) or isinstance(value, jax.Array):
    return True
  if isinstance(value, tuple):
    return all(_list_containers(x, found) for x in value)
  read = _reader(value)
  if read is None:
    return False
  now = read()
  found.append((read, now))
  return all(_list_containers(x, found) for x in now)


def _reader(value: Any) -> Callable[[], list[Any]] | None:
  """The function to all that is in a list, a set, a dict, or an object by its attributes."""
  if type(value) in (list, set):
    return functools.partial(list, value)
  if type(value) is dict:
    return lambda: [*value, *value.values()]
  if isinstance(value, list | set | frozenset | dict | np.ndarray):
    return None  # of another class, or written to in place
  if not hasattr(value, "__dict__"):
    return None
  attributes = vars(value)
  if not attributes.keys() >= set(_names(value) or ()):
    return None
  return lambda: [*attributes, *attributes.values()]


class _Content:
  """An array of JAX, compared by what is in it: the bits, so that -0.0 is not 0.0.

  It is looked at before each call of what was compiled for it, and mostly it is the same array.
  """

  __slots__ = ("_array", "_type")

  def __init__(self, array: jax.Array):
    self._array = array
    self._type = array.shape, array.dtype, getattr(array, "weak_type", False)

  def __hash__(self) -> int:
    return hash(self._type)

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, _Content) or self._type != other._type:
      return False
    a, b = _jax.bits(self._array), _jax.bits(other._array)
    if a is b:
      return True
    if a.is_deleted() or b.is_deleted():
      return False
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


class SameHash:
  """Whether the hash of a value is what it was: an object may have one of what is in it.

  Args:
    value: the value.
  """

  __slots__ = ("_hash",)

  def __init__(self, value: Any):
    self._hash = hash(value)

  def holds(self, value: Any) -> bool:
    """Whether it is."""
    try:
      return hash(value) == self._hash
    except TypeError:  # there is a list in it now
      return False


@functools.lru_cache(maxsize=1024)
def hashes_content(cls: type) -> bool:
  """Whether objects of a class may get another hash: `__hash__` is the user's, and not frozen."""
  parameters = getattr(cls, "__dataclass_params__", None)
  if parameters is not None and parameters.frozen:
    return False
  is_users = not is_library(cls.__module__) and not issubclass(cls, enum.Enum)
  return is_users and isinstance(cls.__hash__, types.FunctionType)


def has_hash(value: Any) -> bool:
  """Whether a value can be hashed."""
  try:
    hash(value)
  except TypeError:
    return False
  return True


def _key(value: Any, above: tuple = ()) -> Any:
  """What two values have in common that are the same inside. Hashable."""
  if isinstance(value, jax.Array) and not (_jax.is_tracer(value) or _jax.is_ref(value)):
    return _Content(value)
  if isinstance(value, jax.Array | jax.Ref | Node | Variable) or _holds_state(value):
    raise NotByValue(type(value).__name__)
  if has_hash(value):
    return kind(value), value
  if any(value is x for x in above):
    raise NotByValue("a value that holds itself")
  above = (*above, value)
  if isinstance(value, np.ndarray):
    if value.dtype.hasobject:
      raise NotByValue("an array of objects")
    return type(value), value.dtype, value.shape, value.tobytes()
  return (type(value), *(tuple(_key(x, above) for x in part) for part in _parts(value)))


def _holds_state(value: Any) -> bool:
  is_object = lambda x: isinstance(x, Node | Variable)
  return callable(value) and callables.captured(value, is_object) is not None


def _parts(value: Any) -> Iterable[list[Any]]:
  """What is in a value, in an order that equal values share."""
  if isinstance(value, set | frozenset):
    yield sorted(value, key=lambda x: (type(x).__qualname__, repr(x)))
  elif isinstance(value, list | tuple):
    yield list(value)
  elif isinstance(value, dict):
    yield list(value)
    yield list(value.values())
  names = _names(value)
  if names is None:
    raise NotByValue(type(value).__name__)
  yield list(names)
  yield [getattr(value, name) for name in names]


def _names(value: Any) -> list[str] | None:
  """The attributes that a value consists of, or None if it is not known which."""
  if isinstance(value, list | tuple | dict | set | frozenset):
    return sorted(getattr(value, "__dict__", ()))
  if dataclasses.is_dataclass(value):
    fields = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
    return fields + sorted(getattr(value, "__dict__", {}).keys() - set(fields))
  # A class that defines `__eq__` and no `__hash__` says that its objects are what is in them.
  return sorted(vars(value)) if hasattr(value, "__dict__") else None


def _copied(value: Any, memo: dict[int, Any]) -> Any:
  """A copy down to what has a hash, or is an array; what is shared inside stays so."""
  if isinstance(value, np.ndarray):
    return value.copy()
  if isinstance(value, jax.Array):
    return value
  if has_hash(value):
    return value
  if id(value) in memo:
    return memo[id(value)]
  again: Callable[[Any], Any] = lambda x: _copied(x, memo)
  if type(value) is tuple:
    return tuple(map(again, value))
  if isinstance(value, tuple):  # a namedtuple
    return type(value)(*map(again, value))
  memo[id(value)] = new = copylib.copy(value)
  if isinstance(new, list):
    new[:] = map(again, new)
  elif isinstance(new, dict):
    for key, x in list(new.items()):
      dict.__setitem__(new, key, again(x))
  for name in () if isinstance(new, set) else _names(new) or ():
    object.__setattr__(new, name, again(getattr(new, name)))
  return new
