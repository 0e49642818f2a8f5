"""List and Dict: built-in containers that JAX passes through and that know when they change.

A list or dict assigned to an attribute of a Pytree becomes one of these; a tuple too, if it holds
data. Elements are data or static, as attributes are.
"""

import functools
import weakref
from collections.abc import (
  Callable,
  Iterable,
  Iterator,
  Mapping,
  MutableMapping,
  MutableSequence,
  Set,
)
from typing import Any, Generic, TypeVar, overload

import jax
import numpy as np

from refax.core import text
from refax.core.brief import summary
from refax.core.flatten import flatten
from refax.core.module import Module
from refax.core.pytree import classify, converters
from refax.core.rebuild import adopt
from refax.core.storage import is_array_like
from refax.core.variable import Variable
from refax.typing import path_str

A = TypeVar("A")


class _Static:
  """A static element; everything else in a container is data."""

  __slots__ = ("value",)

  def __init__(self, value: Any):
    self.value = value


def _kept(item: Any) -> Any:
  return item.value if isinstance(item, _Static) else item


def _forget(moved: dict[int, weakref.ref], key: int, _: Any) -> None:
  moved.pop(key, None)


class _Container(Module, named=False):
  """What List and Dict share: elements in `_items`, kept as data or `_Static`."""

  __slots__ = ("_items", "_moved")
  _is_container = True
  _altered_by_key = False
  _items: Any
  _moved: dict[int, weakref.ref]
  """Arrays that were elements and have been replaced: where one comes back, elements are moved."""

  def _written(self, item: Any, value: Any) -> bool:
    """Whether an assignment changes no structure: the same object, or a write to a Variable.

    An array that is written to the place of a Variable is its new value, as in an attribute. But
    where elements change places (`l[0], l[1] = l[1], l[0]`), nothing is written.
    """
    if isinstance(item, Variable) and is_array_like(value) and not self._is_move(item, value):
      item.set_value(value)
      return True
    return _kept(item) is value

  def _is_move(self, item: Variable, value: Any) -> bool:
    items = list(self._elements())
    moved = self._moved.get(id(value))
    return (
      any(_kept(x) is value for x in items if not isinstance(value, bool | int | float | complex))
      or (moved is not None and moved() is value)
      or sum(x is item for x in items) > 1
    )

  def _note_moved(self, item: Any) -> None:
    if isinstance(item, jax.Array | np.ndarray):
      self._moved[id(item)] = weakref.ref(item, functools.partial(_forget, self._moved, id(item)))

  def _elements(self) -> Iterable[Any]:
    raise NotImplementedError

  def _alter(self, entries: Iterable[tuple[Any, Any, bool]], removed: Iterable[Any]) -> None:
    entries = list(entries)
    self._clear()
    self._fill({key: x for key, x, _ in entries}, {key for key, _, is_data in entries if is_data})

  def _keep(self, key: Any, value: Any) -> Any:
    """The element as it is kept; raises StaticAttributeError if it can be neither."""
    value, dynamic = classify(value, lambda: type(self).__name__ + path_str((key,)))
    if dynamic:
      adopt(self, key, value)
    return value if dynamic else _Static(value)

  def _set_items(self, items: Any) -> None:
    self._check_trace("...")
    object.__setattr__(self, "_items", items)
    self._structure_changed(None, added=(...,))

  def __getstate__(self) -> Any:
    return super().__getstate__(), self._items

  def __setstate__(self, state: Any) -> None:
    super().__setstate__(state[0])
    object.__setattr__(self, "_items", state[1])
    object.__setattr__(self, "_moved", {})

  def __len__(self) -> int:
    return len(self._items)

  def __eq__(self, other) -> bool:
    if isinstance(other, type(self)):
      other = other._plain()
    return self._plain() == other

  __hash__ = None  # pyright: ignore[reportAssignmentType]  # as the built-in ones

  def _plain(self) -> Any:
    raise NotImplementedError


class List(_Container, MutableSequence, Generic[A], named=False):
  """A list whose elements are data (Modules, Variables, arrays) or static.

  Args:
    items: the elements.

  >>> from refax import nnx
  >>> layers = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.relu])
  >>> layers.append(nnx.relu); len(layers)
  3
  """

  __slots__ = ()

  def __init__(self, items: Iterable[A] = ()):
    object.__setattr__(self, "_moved", {})
    object.__setattr__(self, "_items", [])
    object.__setattr__(self, "_items", [self._keep(i, x) for i, x in enumerate(items)])

  def _entries(self) -> Iterable[tuple[Any, Any, bool]]:
    attributes = list(super()._entries())
    return [
      (i, _kept(x), not isinstance(x, _Static)) for i, x in enumerate(self._items)
    ] + attributes

  def _fill(self, entries: dict[Any, Any], dynamic: Set[Any]) -> None:
    items = {k: x if k in dynamic else _Static(x) for k, x in entries.items() if isinstance(k, int)}
    object.__setattr__(self, "_moved", {})
    object.__setattr__(self, "_items", list(items.values()))
    if len(items) < len(entries):
      attributes = {key: x for key, x in entries.items() if key not in items}
      super()._fill(attributes, dynamic & attributes.keys())

  @overload
  def __getitem__(self, index: int) -> A: ...
  @overload
  def __getitem__(self, index: slice) -> "List[A]": ...
  def __getitem__(self, index):
    if isinstance(index, slice):
      return List(map(_kept, self._items[index]))
    return _kept(self._items[index])

  def _set_items(self, items: Any) -> None:
    super()._set_items(items)
    for i, item in enumerate(items):
      adopt(self, i, item, moved=True)

  def __setitem__(self, index, value) -> None:
    items = list(self._items)
    if isinstance(index, slice):
      items[index] = [self._keep(index, x) for x in value]
    else:
      if self._written(items[index], value):
        return
      self._note_moved(items[index])
      items[index] = self._keep(index, value)
    self._set_items(items)

  def __delitem__(self, index) -> None:
    items = list(self._items)
    del items[index]
    self._set_items(items)

  def insert(self, index: int, value: A) -> None:
    """Insert before `index`."""
    items = list(self._items)
    items.insert(index, self._keep(index, value))
    self._set_items(items)

  def __iter__(self) -> Iterator[A]:
    return map(_kept, iter(self._items))

  def _elements(self) -> Iterable[Any]:
    return self._items

  def reverse(self) -> None:
    """Reverse the order of the elements; none is written."""
    self._set_items(self._items[::-1])

  def sort(self, *, key: Callable[[A], Any] | None = None, reverse: bool = False) -> None:
    """Sort the elements, as `list.sort`; none is written."""
    by = _kept if key is None else lambda item: key(_kept(item))
    self._set_items(sorted(self._items, key=by, reverse=reverse))

  def copy(self) -> "List[A]":
    """A List of the same elements."""
    return List(self)

  def __mul__(self, count: int) -> "List[A]":
    return List(list(self) * count)

  __rmul__ = __mul__

  def __imul__(self, count: int) -> "List[A]":
    self._set_items(self._items * count)
    return self

  def __lt__(self, other: Iterable[Any]) -> bool:
    return list(self) < list(other)

  def __le__(self, other: Iterable[Any]) -> bool:
    return list(self) <= list(other)

  def __gt__(self, other: Iterable[Any]) -> bool:
    return list(self) > list(other)

  def __ge__(self, other: Iterable[Any]) -> bool:
    return list(self) >= list(other)

  def __add__(self, other: Iterable[Any]) -> "List":
    return List([*self, *other])

  def __radd__(self, other: Iterable[Any]) -> "List":
    return List([*other, *self])

  def _plain(self) -> list:
    return list(self)

  def __repr_parts__(self, style: Any) -> tuple[text.Parts, Any]:
    items = (("", x) for x in self)
    comment = summary(flatten(self).leaves)
    return text.Parts("List([", comment, items, "])", folds=True), style._replace(shapes=True)


class Dict(_Container, MutableMapping, Generic[A], named=False):
  """A dict whose values are data (Modules, Variables, arrays) or static.

  Args:
    items: a mapping, or pairs.
    **kwargs: more items.

  >>> from refax import nnx
  >>> heads = nnx.Dict(a=nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
  >>> sorted(heads), heads["a"] is heads.a
  (['a'], True)
  """

  __slots__ = ()

  def __init__(self, items: Mapping[Any, A] | Iterable[tuple[Any, A]] = (), /, **kwargs: A):
    object.__setattr__(self, "_moved", {})
    object.__setattr__(self, "_items", {})
    kept = {key: self._keep(key, value) for key, value in dict(items, **kwargs).items()}
    object.__setattr__(self, "_items", kept)

  def _entries(self) -> Iterable[tuple[Any, Any, bool]]:
    order = sorted(self._items, key=lambda key: (type(key).__name__, key))
    return [
      (key, _kept(self._items[key]), not isinstance(self._items[key], _Static)) for key in order
    ]

  def _fill(self, entries: dict[Any, Any], dynamic: Set[Any]) -> None:
    items = {key: x if key in dynamic else _Static(x) for key, x in entries.items()}
    object.__setattr__(self, "_moved", {})
    object.__setattr__(self, "_items", items)

  def __getitem__(self, key) -> A:
    return _kept(self._items[key])

  def __setitem__(self, key, value: A) -> None:
    if key in self._items:
      if self._written(self._items[key], value):
        return
      self._note_moved(self._items[key])
    self._set_items(self._items | {key: self._keep(key, value)})

  def __delitem__(self, key) -> None:
    items = dict(self._items)
    del items[key]
    self._set_items(items)

  def __iter__(self) -> Iterator[Any]:
    return iter(self._items)

  def __reversed__(self) -> Iterator[Any]:
    return reversed(self._items)

  def _elements(self) -> Iterable[Any]:
    return self._items.values()

  def copy(self) -> "Dict[A]":
    """A Dict of the same items."""
    return Dict(self)

  @classmethod
  def fromkeys(cls, keys: Iterable[Any], value: Any = None) -> "Dict":
    """A Dict with the same value for each key."""
    return cls(dict.fromkeys(keys, value))

  def __or__(self, other: Any) -> "Dict":
    return Dict(dict(self) | dict(other)) if isinstance(other, Mapping) else NotImplemented

  def __ror__(self, other: Any) -> "Dict":
    return Dict(dict(other) | dict(self)) if isinstance(other, Mapping) else NotImplemented

  def __ior__(self, other: Mapping[Any, A] | Iterable[tuple[Any, A]]) -> "Dict":
    self.update(other)
    return self

  def __delattr__(self, name: str) -> None:
    if name not in self._items:
      raise AttributeError(f"Dict has no item {name!r}; it has {sorted(map(str, self._items))}")
    del self[name]

  def __getattr__(self, name: str) -> A:
    if name.startswith("_") or name not in self._items:
      raise AttributeError(f"Dict has no item {name!r}; it has {sorted(map(str, self._items))}")
    return self[name]

  def __setattr__(self, name: str, value: A) -> None:
    self[name] = value

  def _plain(self) -> dict:
    return dict(self)

  def __repr_parts__(self, style: Any) -> tuple[text.Parts, Any]:
    items = ((f"{key!r}: ", value) for key, value, _ in self._entries())
    comment = summary(flatten(self).leaves)
    return text.Parts("Dict({", comment, items, "})"), style._replace(shapes=True)


converters.update({list: List, tuple: List, dict: Dict})
