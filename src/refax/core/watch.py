"""Watch: what has been touched of the objects that one walk saw, so that its result may be kept.

A walk through a model takes microseconds a Variable, and every call of a compiled function would
need one. Its result is kept instead, with a Watch that each object it saw knows. An assignment
tells the watches of its object what was there before; all other objects' watches stay as they are.
A watch holds again when everything that was touched is as the walk saw it: a model that goes to
evaluation and back, or from which `nnx.pop` takes what a step has sown, need not be walked again.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

Before = Mapping[Any, tuple[Any, bool]]
"""What was under some keys of a node: the value (or MISSING), and whether it was data."""

Change = tuple[tuple[int, Any], Any, bool]
"""A node by its address and a key of it, and what was there."""

MISSING: Any = object()
_MOST = 4096  # keys that were touched; who sets more of them is not going back and forth


class _Weak(weakref.ref):
  """A value that is not to be kept alive. No attribute of a user's is one of these."""

  __slots__ = ()


def weakly(x: Any) -> Callable[[], Any]:
  """A function to something that it does not keep alive, where Python can refer to it weakly."""
  try:
    return weakref.ref(x)
  except TypeError:  # a number, a string, a list, an object with `__slots__`
    return lambda: x


class Row:
  """Things in a row, by identity, of which none is kept alive."""

  __slots__ = ("_known",)

  def __init__(self, items: Iterable[Any]):
    self._known = list(map(weakly, items))

  def is_of(self, items: list[Any]) -> bool:
    """Whether it is a row of these things."""
    if len(items) != len(self._known):
      return False
    return all(ref() is x for ref, x in zip(self._known, items, strict=True))

  def items(self) -> list[Any]:
    """The things; None for each that is gone."""
    return [ref() for ref in self._known]


class Parts:
  """What a dict, a list or another pytree that is no object holds directly, by identity."""

  __slots__ = ("_row", "_sort")

  def __init__(self, value: Any):
    items, self._sort = _parts(value)
    self._row = Row(items)

  def holds(self, value: Any) -> bool:
    """Whether the same is still in it."""
    now, sort = _parts(value)
    return self._row.is_of(now) and sort == self._sort

  def items(self) -> list[Any]:
    """What it holds."""
    return self._row.items()


def _parts(value: Any) -> tuple[list[Any], Any]:
  """What a pytree holds directly, and how."""
  if type(value) is list:
    return list(value), list
  if type(value) is dict:
    return list(value.values()), list(value)
  return jax.tree_util.tree_flatten(value, is_leaf=lambda x: x is not value)


class Watch:
  """Whether what a walk saw is still there.

  Args:
    seen_as: what the walk has seen of a value, if not which one it is: a compiled function takes
      the arrays in an object afresh at each call, so one is as good as the other.
  """

  __slots__ = (
    "__weakref__",
    "_compared",
    "_dead",
    "_seen_as",
    "_touched",
    "held",
    "mark",
    "ref",
  )

  def __init__(self, seen_as: Callable[[Any], Any] | None = None):
    self.ref = weakref.ref(self)
    self._seen_as = seen_as
    self._dead = False
    self._compared: list[tuple[Any, Any]] = []
    self._touched: dict[tuple[int, Any], tuple[weakref.ref, Any, bool]] = {}
    # Of a thread that touches while another one looks, the mark is new after the look: no touch
    # is lost. A count, or a set that is emptied, could lose one.
    self.mark, self.held = object(), None
    """Where these are the same, nothing was touched since the watch held, and it holds."""

  def touch(self, node: Any, changes: "list[Change] | None") -> None:
    """Something of an object has changed.

    Args:
      node: the object.
      changes: what there was; None if that is not known, and the watch never holds again.
    """
    touched = self._touched
    if changes is None or len(touched) > _MOST:
      self._dead = True
    else:
      for place, old, was_data in changes:
        if place not in touched:
          if was_data and isinstance(old, tuple | list | dict):
            self._dead = True  # it may hold arrays, which are not to be kept for its identity
            break
          touched.setdefault(place, (weakref.ref(node), self._kept(old), was_data))
    self.mark = object()

  def compare(self, value: Any, seen: Any) -> None:
    """What tells nobody that it changes is looked at each time.

    Args:
      value: a static value without a hash, or a container that is no object.
      seen: tells whether it is as it was, by `holds(value)`.
    """
    self._compared.append((value, seen))

  @property
  def is_dead(self) -> bool:
    """Whether it will never hold again."""
    return self._dead

  def holds(self) -> bool:
    """Whether a walk would find the same again."""
    mark = self.mark
    if mark is self.held:
      return True
    if self._dead:
      return False
    for (_, key), (ref, old, was_data) in list(self._touched.items()):
      node = ref()
      if node is None or (key in node._pytree.dynamic) is not was_data:
        return False
      now = node.__dict__.get(key, MISSING)
      if self._seen_as is not None:
        now = self._seen_as(now)
      if type(old) is _Weak:
        old = old()
        if old is None:
          return False
      if now is not old:
        return False
    for value, seen in self._compared:
      if not seen.holds(value):
        self._dead = type(seen) is Parts  # who exchanges what is in a dict does so at each step
        return False
    if not self._compared:
      self.held = mark
    return True

  def additions(self) -> list[tuple[Any, Any, Any]] | None:
    """(node, key, value) of the data that came where nothing was; None if more has changed."""
    if self._dead or not all(seen.holds(value) for value, seen in self._compared):
      return None
    found = []
    for (_, key), (ref, old, was_data) in list(self._touched.items()):
      node = ref()
      if node is None:
        return None
      now, is_data = node.__dict__.get(key, MISSING), key in node._pytree.dynamic
      if type(old) is _Weak:
        old = old()
      if not was_data and not is_data:  # numbers and names, as those of modes; or nothing now
        continue
      if now is old and now is not None and is_data is was_data:
        continue
      if old is not MISSING or not is_data:
        return None
      found.append((node, key, now))
    return found

  def _kept(self, old: Any) -> Any:
    if self._seen_as is not None:
      old = self._seen_as(old)
    try:
      return _Weak(old)
    except TypeError:  # a number, a string, a tuple
      return old


class Watches(list):
  """The watches of one object, weakly: who has forgotten a walk has forgotten its watch."""

  __slots__ = ()

  def add(self, watch: Watch) -> None:
    """Let a watch know of changes from now on."""
    self.append(watch.ref)
    count = len(self)
    if count >= 8 and not count & (count - 1):
      for ref in [ref for ref in self if ref() is None]:
        self.remove(ref)

  def touch(self, node: Any, before: Before | None) -> None:
    """Tell all of them what there was before a change; None if that is not known."""
    changes = None
    if before is not None:
      address = object.__hash__(node)  # `id` is audited: it takes three times as long
      changes = [((address, key), *was) for key, was in before.items()]
    for ref in tuple(self):
      if (watch := ref()) is not None:
        watch.touch(node, changes)


_ARRAY: Any = type("_Array", (), {"__slots__": ()})()


def any_array(x: Any) -> Any:
  """An array as any array, everything else as it is."""
  return _ARRAY if isinstance(x, jax.Array | np.ndarray) and not isinstance(x, jax.Ref) else x
