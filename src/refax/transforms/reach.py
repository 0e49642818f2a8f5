"""What a function reaches without being given it: by closure, partial, as a method, as a global.

A compiled function keeps what it found there. These objects are therefore part of what a call of
`nnx.jit` is known by: their structure, and which cells they hold.
"""

import contextlib
import functools
import inspect
import itertools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from refax import _jax
from refax.core.definition import is_library
from refax.core.flatten import Walk, flatten
from refax.core.graphdef import LEAF
from refax.core.node import Node
from refax.core.structure import root_of
from refax.core.variable import Variable, is_variable
from refax.core.watch import MISSING, Row, Watch, weakly
from refax.transforms.around import is_installed
from refax.transforms.places import (
  Contents,
  Part,
  Slot,
  contents,
  function_of,
  is_filled,
  is_plain,
  names_in,
  opened,
  rules_of,
)

_MOST = 64  # ways in which containers have held the same objects
_LONG = 4096  # items of a list of data: the rest of them is not looked through
_DEPTH = 64  # of functions that call functions, and of containers in containers
_HELPERS = 4096  # functions that one function calls by name
_WIDEST = 8192  # things that are looked at; plain objects may lead to all of a program


class Same:
  """A cell that is equal to itself only, and not kept alive."""

  __slots__ = ("_hash", "_known")

  def __init__(self, value: Any):
    self._known, self._hash = weakly(value), id(value)

  def __hash__(self) -> int:
    return self._hash

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Same) or self._hash != other._hash:
      return False
    return (value := self._known()) is not None and value is other._known()


class Reach:
  """The Modules and Variables that one function reaches without being given them.

  Args:
    function: to the function, which is not kept alive.
    on_gone: called with the `id` of one that is gone, also when it is not reached any more: what
      was compiled holds its arrays.
    given: static arguments, whose attributes are within reach.
  """

  def __init__(
    self,
    function: Callable[[], Any],
    on_gone: Callable[[int], None] = lambda key: None,
    given: tuple = (),
  ):
    self._function, self._given = function, given
    self._living: dict[int, weakref.ref] = {}  # all that were ever reached
    self._on_gone = on_gone
    self._seen: dict[int, Callable[[], Any]] = {}  # found while tracing
    self._objects: list[Callable[[], Any]] = []
    self._places: dict[Place, tuple[Callable[[], Any], Slot]] = {}
    self._held: dict[int, Row] = {}  # the contents of all containers, as they have been
    self._holds = 0  # which of these they are now
    self._numbers = itertools.count()
    self._scanned = False
    self._arrays: list[Slot] = []
    self.ids: list[int] = []
    """The `id` of each object of the last snapshot, and of each Variable in it."""
    self.refs: frozenset[int] = frozenset()
    """The `id` of each Ref of the last snapshot."""
    self.is_steady = True
    """Whether a change of what is reached shows in the slots, in a watch, and in the epoch."""
    self.has_arrays = False
    """Whether there are arrays without a Ref in it, which a compiled function keeps as they are."""

  def snapshot(self, watch: Watch | None = None) -> tuple:
    """What a trace depends on: hashable, equal as long as another trace would be the same.

    Args:
      watch: is told of changes to the objects from now on.
    """
    if not self._scanned or not self.is_steady or not self.holds():
      self._scan()
    objects = _alive((*self._objects, *self._seen.values()))
    parts: list[tuple] = []
    arrays: list[Slot | None] = []
    tracked: list[Any] = list(objects)
    for x in objects:
      walk = Walk(watch)
      walk.entry(x)
      arrays += _arrays_in(walk)
      flat = flatten(x)
      cells = [leaf.get_raw_value() if isinstance(leaf, Variable) else leaf for leaf in flat.leaves]
      kinds = [(type(x), x._def) if isinstance(x, Variable) else None for x in flat.leaves]
      parts.append((flat.graphdef, *map(tuple, (map(Same, cells), map(_place, cells), kinds))))
      tracked += filter(is_variable, walk.leaves)
    for x in tracked:  # a part of an object may go before the object does
      self._weakly(x)
    self.ids = list(map(id, tracked))
    refs = filter(_jax.is_ref, jax.tree.leaves([x._cell for x in tracked if is_variable(x)]))
    self.refs = frozenset(map(id, refs))
    self._arrays = [slot for slot in arrays if slot is not None]
    self.has_arrays = bool(arrays)
    self.is_steady = self._is_listed and len(self._arrays) == len(arrays)
    return (self._holds, *parts) if parts else ()

  def objects(self) -> list[Any]:
    """The Modules and Variables that the function finds now, before it runs."""
    if not self._scanned or not self._is_listed or not self.holds():
      self._scan()
    return _alive(self._objects)

  def holds(self) -> bool:
    """Whether the function finds the same objects where it found them last time."""
    return all(slot.holds() for _, slot in self._places.values())

  @property
  def slots(self) -> list[Slot]:
    """The places to look at before each call."""
    return [*(slot for _, slot in self._places.values()), *self._arrays]

  def add(self, variables: Iterable[Variable]) -> bool:
    """Variables were read by a trace that the search did not find; whether any is new."""
    found = {id(root): root for root in map(root_of, variables)}
    is_eager = _jax.no_trace_active()
    if is_eager:  # what the trace has made itself is gone with it, and nobody reaches it again
      found = {key: x for key, x in found.items() if _made_in(x) is _jax.EAGER}
    objects = _alive(self._objects)
    known = set(map(id, (*objects, *_alive(self._seen.values()))))
    new = {key: x for key, x in found.items() if key not in known}
    covered = {id(leaf) for x in objects for leaf in flatten(x).leaves}
    new = {key: x for key, x in new.items() if key not in covered}
    weak = self._weakly if is_eager else weakref.ref
    self._seen |= {key: weak(x) for key, x in new.items()}
    return bool(new)

  def _scan(self) -> None:
    search = _Search()
    search.visit(self._function(), 0)
    search.visit_given(self._function(), self._given)
    for place, (read, _) in self._places.items():
      if place not in search.places and not _is_gone(read):  # there was an object, and may be again
        search.watch(place, read, read())
    self._objects = list(map(self._weakly, search.objects.values()))
    self._places = search.places
    self._note_contents()
    self._is_listed, self._scanned = search.is_listed, True

  def _note_contents(self) -> None:
    """The same objects may be in containers in another way: twice, or under another key."""
    reads = [slot.read for _, slot in self._places.values()]
    items = [x for read in reads if isinstance(read, Contents) for x in read.items()]
    if len(self._held) > _MOST:
      self._held.clear()
    for number, row in self._held.items():
      if row.is_of(items):
        self._holds = number
        return
    self._holds = next(self._numbers)
    self._held[self._holds] = Row(items)

  def _weakly(self, x: Any) -> weakref.ref:
    """A reference to an object that was found, whose end is noticed."""
    known = self._living.get(id(x))
    if known is not None and known() is x:
      return known
    living, on_gone, key = self._living, self._on_gone, id(x)

    def gone(ref: weakref.ref) -> None:
      if living.get(key) is ref:
        del living[key]
        on_gone(key)

    living[key] = weakref.ref(x, gone)
    return living[key]


Place = tuple[int, Any]
"""Something that holds others, by its `id`, and where in it."""


class _Search:
  """One look through a function."""

  def __init__(self):
    self.objects: dict[int, Any] = {}
    self.places: dict[Place, tuple[Callable[[], Any], Slot]] = {}
    self.is_listed = True  # no container that may change without a slot
    self._leads: dict[tuple[int, frozenset[str]], bool] = {}  # what was visited, to an object?
    self._names: frozenset[str] = frozenset()  # that the function being looked through mentions
    self._mentions: dict[Any, frozenset[str]] = {}  # by function
    self._class_names: dict[type, frozenset[str]] = {}
    self._expanded: dict[tuple[type, frozenset[str]], frozenset[str]] = {}

  def visit(self, x: Any, depth: int, *, is_watched: bool = False) -> bool:
    """Look at something; whether it is an object, or leads to one.

    Args:
      x: anything.
      depth: of functions and containers around it.
      is_watched: whether there is a slot that shows what is in it, if it is a container.
    """
    if isinstance(x, Node | Variable):
      if type(x) in weakref.ProxyTypes:
        x = x.__repr__.__self__  # what it stands for
      self.objects[id(x)] = x
      return True
    key = (id(x), self._names)
    if depth > _DEPTH or is_plain(type(x)) or len(self._leads) > _WIDEST:
      return False
    if key in self._leads:
      return self._leads[key]
    if isinstance(x, type | types.ModuleType):
      return self._attributes(x, depth)
    self._leads[key] = False  # meanwhile: it may hold itself
    self._leads[key] = self._inside(x, depth, is_watched)
    return self._leads[key]

  def visit_given(self, function: Callable, given: Iterable[Any]) -> None:
    """Look at static arguments, of which a function uses attributes as of its own object."""
    with self._mentioning(self._mentioned(function)):
      for x in given:
        is_function = isinstance(x, types.FunctionType | types.MethodType | functools.partial)
        (self.visit if is_function else self._holder)(x, 1)

  def _inside(self, x: Any, depth: int, is_watched: bool) -> bool:
    """Whether something that holds others leads to an object."""
    if isinstance(x, types.MethodType):
      leads = self.visit(x.__func__, depth + 1)
      with self._mentioning(self._mentioned(x.__func__)):
        return self._holder(x.__self__, depth + 1) or leads
    if isinstance(x, functools.partial):
      leads = self.visit(x.func, depth + 1)
      with self._mentioning(self._names | self._mentioned(getattr(x.func, "__func__", x.func))):
        return self._all((*x.args, *x.keywords.values()), depth) or leads
    if isinstance(x, types.FunctionType):
      asked = self._names.intersection(vars(x))
      with self._mentioning(self._mentioned(x)):
        return self._function(x, depth, asked)
    if (open_ := opened(type(x))) is not None:
      held = open_(x)
      values = tuple(held.values()) if isinstance(held, dict) else tuple(held)
      if len(values) > _LONG:
        values = () if all(map(is_plain, set(map(type, values)))) else values[:_LONG]
      leads = self._all(values, depth, is_watched=True)
      if leads and not is_watched:
        self.watch((id(x), ...), lambda: x, x)
      return leads
    if callable(getattr(x, "__wrapped__", None)):
      return self._all((x.__wrapped__, *rules_of(x).values()), depth)
    if depth == 0:
      call = inspect.getattr_static(type(x), "__call__", None)
      with self._mentioning(self._mentioned(call)):
        return self._holder(x, depth + 1)  # a callable object
    return self._attributes(x, depth)

  def _all(self, parts: Iterable[Any], depth: int, *, is_watched: bool = False) -> bool:
    leads = False
    for part in parts:
      leads |= self.visit(part, depth + 1, is_watched=is_watched)
    return leads

  @contextlib.contextmanager
  def _mentioning(self, names: frozenset[str]) -> Iterator[None]:
    """Of plain objects, these attributes are looked at meanwhile."""
    outer, self._names = self._names, names
    try:
      yield
    finally:
      self._names = outer

  def _attributes(self, x: Any, depth: int) -> bool:
    """Look at those attributes of a plain object, a class or a module that the function mentions.

    Other modules and classes there are not followed: these lead to all there is.
    """
    names, is_module = self._names, isinstance(x, types.ModuleType)
    cls = x if isinstance(x, type) else type(x)
    if _is_apart(x.__name__ if is_module else getattr(cls, "__module__", None)):
      return False
    own = vars(x) if is_module or cls is x else getattr(x, "__dict__", {})
    if is_module:
      there = [name for name in names if name in own]
    else:
      names, defined = self._with_methods(cls, names), self._names_of(cls)
      there = [name for name in names if name in own or name in defined]
    leads = False
    with self._mentioning(names):
      for name in there:
        value = _attribute(x, name)
        is_led = not isinstance(value, type | types.ModuleType) and value is not MISSING
        if is_led and not _is_foreign(value, x):
          leads |= self._slot(x, name, lambda x, name=name: getattr(x, name, None), value, depth)
    return leads

  def _mentioned(self, function: Any) -> frozenset[str]:
    """The names that a function, and functions that it calls by name, mention."""
    if not isinstance(function, types.FunctionType):
      return frozenset()
    if function in self._mentions:
      return self._mentions[function]
    found: dict[str, None] = {}  # in order: where the search ends must not depend on hashes
    seen: set[Any] = set()
    open_ = [function]
    while open_ and len(seen) < _HELPERS:
      f = open_.pop()
      if not isinstance(f, types.FunctionType) or f in seen:
        continue
      if seen and is_library(f.__module__):
        continue
      seen.add(f)
      names = dict.fromkeys(names_in(f.__code__))
      found |= names
      open_ += [f.__globals__.get(name) for name in names]
      open_ += map(contents, f.__closure__ or ())
    self._mentions[function] = frozenset(found)
    return self._mentions[function]

  def _names_of(self, cls: type) -> frozenset[str]:
    """What a class and those above it define, by name."""
    if cls not in self._class_names:
      self._class_names[cls] = frozenset().union(*map(vars, cls.__mro__))
    return self._class_names[cls]

  def _with_methods(self, cls: type, names: frozenset[str]) -> frozenset[str]:
    """Names, and those that the methods mention which are named by them."""
    if (cls, names) in self._expanded:
      return self._expanded[cls, names]
    defined = self._names_of(cls)
    found = {*_BY_SYNTAX, *names}
    open_ = list(found & defined)
    while open_:
      method = function_of(inspect.getattr_static(cls, open_.pop(), None))
      new = self._mentioned(method) - found
      found |= new
      open_ += new & defined
    self._expanded[cls, names] = frozenset(found)
    return self._expanded[cls, names]

  def _holder(self, x: Any, depth: int) -> bool:
    """An object of a plain class whose method is called: its attributes are within reach."""
    if isinstance(x, Node | Variable | type | types.ModuleType) or not hasattr(x, "__dict__"):
      return self.visit(x, depth)
    leads = False
    for name, value in list(vars(x).items()):
      leads |= self._slot(x, name, lambda x, name=name: vars(x).get(name), value, depth)
    with self._mentioning(self._names.difference(vars(x))):
      return self._attributes(x, depth) or leads  # those of its class

  def _function(self, f: types.FunctionType, depth: int, asked: Iterable[str]) -> bool:
    """Look at what a function finds, and at those of its attributes that another one asks for."""
    leads = False
    for name in asked:
      leads |= self._slot(f, (name,), lambda f, name=name: vars(f).get(name), vars(f)[name], depth)
    wrapped = getattr(f, "__wrapped__", None)
    if callable(wrapped):
      leads |= self.visit(wrapped, depth + 1)
      if is_library(f.__globals__.get("__name__")):
        return leads  # a transform around it
    for i, cell in enumerate(f.__closure__ or ()):
      if (value := contents(cell)) is not None or not is_installed(f):
        leads |= self._slot(f, i, lambda f, i=i: contents(f.__closure__[i]), value, depth)
    for name in ("__defaults__", "__kwdefaults__"):
      if (value := getattr(f, name)) is not None:
        leads |= self._slot(f, name, lambda f, name=name: getattr(f, name), value, depth)
    for name in dict.fromkeys(names_in(f.__code__)):
      if name in vars(f):  # an attribute of a function, its own mostly
        leads |= self._slot(
          f, (name,), lambda f, name=name: vars(f).get(name), vars(f)[name], depth
        )
      if name in f.__globals__:
        value = f.__globals__[name]
        if not _is_foreign(value, f):
          leads |= self._slot(f, name, lambda f, name=name: f.__globals__.get(name), value, depth)
    return leads

  def _slot(self, owner: Any, key: Any, get: Callable[[Any], Any], value: Any, depth: int) -> bool:
    """Look at what `get(owner)` is; the place is watched if that may be, or lead to, an object."""
    read = Part(owner, get)
    leads = self.visit(value, depth + 1, is_watched=True)
    is_empty = value is None or (opened(type(value)) is not None and not is_filled(value))
    if leads or is_empty or isinstance(value, types.FunctionType | functools.partial):
      self.watch((id(owner), key), read, value)
    return leads

  def watch(self, place: Place, read: Callable[[], Any], value: Any) -> None:
    """Let another object in a place, or in a container there, be seen."""
    slot = Slot.empty(read) if is_plain(type(value)) else Slot.of(read, value)
    if slot is None:
      self.is_listed = False
    else:
      self.places[place] = read, slot


def _is_apart(module: Any) -> bool:
  """Whether what a module defines leads to no state of the user's, or to all of a program."""
  is_runner = isinstance(module, str) and module.partition(".")[0] in _RUNNERS
  return is_runner or is_library(module)


_RUNNERS = frozenset(("_pytest", "absl", "logging", "pluggy", "pytest", "unittest"))
"""What runs tests: the object of a test leads to these, and they to everything."""


def _is_gone(read: Callable[[], Any]) -> bool:
  """Whether what a place belongs to is gone."""
  return isinstance(read, Part) and read.is_gone


def _is_foreign(value: Any, user: Any) -> bool:
  """Whether a value is a function of an installed package, which something else uses."""
  if not isinstance(value, types.FunctionType) or callable(getattr(value, "__wrapped__", None)):
    return False
  return is_installed(value) and value.__module__ != getattr(user, "__module__", None)


def _alive(reads: Iterable[Callable[[], Any]]) -> list[Any]:
  """What these weak references refer to, without what is gone."""
  return [x for read in reads if (x := read()) is not None]


def _made_in(x: Node | Variable) -> Any:
  """The trace state when an object was made."""
  return x._trace if isinstance(x, Variable) else x._pytree.trace


def _arrays_in(walk: Walk) -> Iterator[Slot | None]:
  """A slot, or None if there is none, for each cell without a Ref, and each array, of a walk.

  The watch of the walk sees no other array in the place of one.
  """
  places = {
    entry[1]: (node, key)
    for node, (_, entries) in zip(walk.objects, walk.nodes, strict=True)
    for key, entry in entries
    if entry[0] == LEAF
  }
  for i, leaf in enumerate(walk.leaves):
    if isinstance(leaf, Variable):
      cell = leaf.get_raw_value()
      if not _jax.is_ref(cell):
        yield Slot(Part(leaf, lambda v: v.get_raw_value()), weakly(cell))
    elif i in places:
      node, key = places[i]
      yield Slot(Part(node, lambda node, key=key: _data_at(node, key)), weakly(leaf))
    elif not _jax.is_ref(leaf):
      yield None


def _data_at(node: Node, key: Any) -> Any:
  return node.__dict__[key] if key in node.__dict__ else node[key]  # pyright: ignore[reportIndexIssue]


def _place(cell: Any) -> Any:
  """Where a Ref is: `nnx.device_put` moves it, and a compiled function keeps it where it was."""
  return cell.sharding if _jax.is_ref(cell) and not _jax.is_tracer(cell) else None


def _attribute(x: Any, name: str) -> Any:
  """An attribute that is stored somewhere; MISSING for one that is computed, as a property is."""
  if isinstance(x, types.ModuleType):
    return vars(x).get(name, MISSING)
  if not isinstance(x, type) and name in getattr(x, "__dict__", {}):
    return vars(x)[name]
  value = inspect.getattr_static(x, name, MISSING)
  if isinstance(value, types.MemberDescriptorType):  # of `__slots__`
    return MISSING if isinstance(x, type) else getattr(x, name, None)
  return MISSING if hasattr(type(value), "__get__") else value


_BY_SYNTAX = ("__call__", "__getitem__", "__iter__", "__next__", "__getattr__", "__enter__")
"""Methods that are called without being named."""
