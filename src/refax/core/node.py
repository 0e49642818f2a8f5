"""Node: a Python object with named entries, each data or static, that knows when it changes."""

import collections
import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, ClassVar

import jax

from refax import _jax
from refax.core.callables import CALLABLES
from refax.core.keywords import check_keywords
from refax.core.watch import MISSING, Before, Watches
from refax.errors import TraceContextError
from refax.typing import path_str


class Attributes(dict):
  """The `__dict__` of a Node: what is written to it directly is an assignment like any other.

  `vars(module)["k"] = x`, `module.__dict__.update()` and `functools.cached_property` write there.
  """

  __slots__ = ("_owner",)

  def __init__(self, owner: "Node"):
    super().__init__()
    self._owner = weakref.ref(owner)

  def __setitem__(self, name: str, value: Any) -> None:
    owner = self._owner()
    assert owner is not None
    if name in type(owner)._memoized:
      owner._memoize(name, value)
    else:
      owner._assign(name, value)

  def __delitem__(self, name: str) -> None:
    owner = self._owner()
    assert owner is not None
    if name not in self:
      raise KeyError(name)
    owner.__delattr__(name)

  def update(self, *args: Any, **kwargs: Any) -> None:
    for name, value in dict(*args, **kwargs).items():
      self[name] = value

  def __ior__(self, other: Any) -> "Attributes":  # pyright: ignore[reportIncompatibleMethodOverride]
    self.update(other)
    return self

  def setdefault(self, name: str, default: Any = None) -> Any:
    if name not in self:
      self[name] = default
    return self[name]

  def pop(self, name: str, *default: Any) -> Any:
    if name not in self and default:
      return default[0]
    value = self[name]
    del self[name]
    return value

  def popitem(self) -> tuple[str, Any]:
    name = next(reversed(self))
    return name, self.pop(name)

  def clear(self) -> None:
    for name in list(self):
      del self[name]

  def copy(self) -> dict[str, Any]:
    return dict(self)

  def __reduce__(self) -> Any:  # a copy is a plain dict
    return dict, (dict(self),)


set_attribute = dict.__setitem__
"""An attribute set in a Node's `__dict__`, past the assignment."""


class NodeState:
  """What the traversal keeps on each node, apart from the user's attributes."""

  __slots__ = (
    "cache",
    "changed",
    "dynamic",
    "having",
    "home",
    "in_trace",
    "lost",
    "origin",
    "place",
    "popped",
    "read",
    "rebuilt",
    "trace",
    "watches",
  )

  def __init__(self, trace: Any):
    self.dynamic: set[str] = set()  # the names of attributes that hold data
    self.watches: Watches | None = None  # of the walks that have seen this node
    self.cache: Any = None  # what the node flattened to
    self.changed = False  # since JAX rebuilt it
    self.having: Any = None  # the Modules below that have some attributes; see `module`
    self.rebuilt: Any = None  # what JAX made the node from
    self.trace = trace  # the trace state when the node was made
    self.in_trace = False  # JAX rebuilt the node, in a trace
    self.lost: Any = None  # what was added to it since
    self.popped: Any = None  # how `nnx.pop` left what is below; see `split`
    self.read: Any = None  # where a trace has read it by closure
    self.home: tuple[weakref.ref | None, Any] = (None, None)
    self.origin: weakref.ref | None = None  # what a trace has rebuilt this object from
    self.place: tuple = ()  # where that was, if calls were observed


class Node:
  """What the traversal walks: an object with named entries, each data or static."""

  __slots__ = ("__dict__", "__weakref__", "_pytree")
  _pytree: NodeState
  _memoized: ClassVar[frozenset[str]] = frozenset()
  """The names of cached properties: what they keep is no part of the structure."""

  _is_module: ClassVar[bool] = False
  """Whether it is a part of a model, in whose path others are."""

  _is_container: ClassVar[bool] = False
  """Whether it only holds other objects: a List, a Dict."""

  _altered_by_key: ClassVar[bool] = True
  """Whether `_alter` takes only the entries that are new or others, and not all of them."""

  _accepted: ClassVar[tuple[Any, frozenset[str] | None] | None] = None
  """A constructor, and the keywords that it takes; see `keywords`."""

  def __new__(cls, *args, **kwargs):
    if kwargs:
      check_keywords(cls, kwargs)
    self = object.__new__(cls)
    object.__setattr__(self, "_pytree", NodeState(_jax.trace_state()))
    object.__setattr__(self, "__dict__", Attributes(self))
    return self

  def _assign(self, name: str, value: Any) -> None:
    """Set an attribute that is written to `__dict__`."""
    setattr(self, name, value)

  def _memoize(self, name: str, value: Any) -> None:
    """Keep the value of a cached property; a tracer must not stay in an object from outside."""
    if self._pytree.trace != _jax.trace_state() and any(
      map(_jax.is_tracer, jax.tree.leaves(value))
    ):
      raise TraceContextError.attribute(type(self).__name__ + path_str((name,)))
    set_attribute(self.__dict__, name, value)

  def _entries(self) -> Iterable[tuple[Any, Any, bool]]:
    """(key, value, is it data) of every attribute, in a deterministic order.

    Functions that hold objects come last, so that a Variable has the path of its own attribute.
    """
    attributes, dynamic, memoized = self.__dict__, self._pytree.dynamic, self._memoized
    keys = sorted(attributes) if not memoized else sorted(attributes.keys() - memoized)
    if not CALLABLES.isdisjoint([type(attributes.get(key)) for key in dynamic]):
      keys.sort(key=lambda key: key in dynamic and type(attributes[key]) in CALLABLES)
    return [(key, attributes[key], key in dynamic) for key in keys]

  def _fill(self, entries: dict[Any, Any], dynamic: Set[Any]) -> None:
    """Take the entries as they are, those under the keys `dynamic` as data; nothing is checked."""
    dict.update(self.__dict__, entries)
    self._pytree.dynamic.update(dynamic)

  def _clear(self) -> None:
    dict.clear(self.__dict__)
    self._pytree.dynamic.clear()

  def _alter(
    self, entries: Iterable[tuple[Any, Any, bool]], removed: Iterable[Any]
  ) -> Before | None:
    """Take entries as they are, and lose some keys; returns what there was, if that is known."""
    attributes, dynamic = self.__dict__, self._pytree.dynamic
    before = {}
    for key, value, is_dynamic in entries:
      before[key] = (attributes.get(key, MISSING), key in dynamic)
      (dynamic.add if is_dynamic else dynamic.discard)(key)
      set_attribute(attributes, key, value)
    for key in removed:
      before[key] = (dict.pop(attributes, key, MISSING), key in dynamic)
      dynamic.discard(key)
    return before

  def _structure_changed(
    self, before: Before | None, added: Iterable[Any] = (), removed: Iterable[Any] = ()
  ) -> None:
    """Attributes were set or deleted; data under the keys `added`, and `removed`.

    Args:
      before: what there was under the keys that have changed; None if that is not known.
      added: the keys under which there is data that was not there.
      removed: the keys under which there is none any more.
    """
    state = self._pytree
    state.changed = True
    if state.watches is not None:
      state.watches.touch(self, before)
    if state.in_trace or state.read is not None:
      on_change(self, added, removed)


# Nodes are made by the hundred, at each call of a transform: in C, as far as it goes.
_drain = functools.partial(collections.deque, maxlen=0)
_set_owner = vars(Attributes)["_owner"].__set__
_set_dict, _set_state = (vars(Node)[slot].__set__ for slot in ("__dict__", "_pytree"))


def make_nodes(classes: Sequence[type[Node]]) -> list[Node]:
  """Empty Nodes of these classes; no constructor is called."""
  made = list(map(object.__new__, classes))
  attributes = list(map(dict.__new__, itertools.repeat(Attributes, len(made))))
  _drain(map(_set_owner, attributes, map(weakref.ref, made)))
  _drain(map(_set_dict, made, attributes))
  _drain(map(_set_state, made, map(NodeState, itertools.repeat(_jax.trace_state()))))
  return made


on_change: Callable[[Node, Iterable[Any], Iterable[Any]], None] = lambda *_: None
"""Called when a change of structure may be lost or not seen; see `structure`."""


class Tracked:
  """A container that is no Node but reports its changes, so that a cache may pass through it."""

  __slots__ = ()
  _tracked: ClassVar[bool] = True

  def _visit(self, watch: Any) -> Iterable[Any]:
    """Let a watch know of changes, if there is one; the values in the container."""
    raise NotImplementedError
