"""What a function reaches without being given it: by closure, partial, as a method, as a global.

A compiled function keeps what it found there. These objects are therefore part of what a call of
`nnx.jit` is known by: their structure, and which cells they hold.
"""

import contextlib
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from refax import _jax
from refax.core.flatten import Walk, flatten
from refax.core.node import Node
from refax.core.structure import root_of
from refax.core.variable import Variable
from refax.core.watch import Watch

_DEPTH = 8  # of functions that call functions, and of containers in containers


class Same:
  """An object that is equal to itself only."""

  __slots__ = ("value",)

  def __init__(self, value: Any):
    self.value = value

  def __hash__(self) -> int:
    return id(self.value)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Same) and self.value is other.value


class Slot(NamedTuple):
  """A place where a function finds something: a global, an attribute, a cell of a closure."""

  read: Callable[[], Any]
  value: Any

  def holds(self) -> bool:
    """Whether what was found is still there."""
    return self.read() is self.value


class Reach:
  """The Modules and Variables that one function reaches without being given them."""

  def __init__(self, fun: Callable):
    self._fun = fun
    self._seen: dict[int, Callable[[], Any]] = {}  # found while tracing
    self._objects: list[Any] = []
    self._slots: list[Slot] = []
    self._scanned = False
    self.is_steady = True
    """Whether a change of what is reached shows in the slots, in a watch, and in the epoch."""

  def snapshot(self, watch: Watch | None = None) -> tuple:
    """What a trace depends on: hashable, equal as long as another trace would be the same.

    Args:
      watch: is told of changes to the objects from now on.
    """
    if not self._scanned or not self.is_steady or not self.holds():
      self._scan()
    objects = [*self._objects, *(x for read in self._seen.values() if (x := read()) is not None)]
    parts, steady = [], True
    for x in objects:
      if watch is not None:
        Walk(watch).entry(x)
      flat = flatten(x)
      cells = [leaf.get_raw_value() if isinstance(leaf, Variable) else leaf for leaf in flat.leaves]
      parts.append((flat.graphdef, tuple(map(Same, cells)), tuple(map(_place, cells))))
      steady = steady and all(map(_jax.is_ref, cells))
      steady = steady and (not isinstance(x, Node) or x._pytree.cache is not None)
    self.is_steady = self._is_listed and steady
    return tuple(parts)

  def objects(self) -> list[Any]:
    """The Modules and Variables that the function finds now, before it runs."""
    if not self._scanned or not self._is_listed or not self.holds():
      self._scan()
    return self._objects

  def holds(self) -> bool:
    """Whether the function finds the same objects where it found them last time."""
    return all(slot.read() is slot.value for slot in self._slots)

  @property
  def slots(self) -> list[Slot]:
    """The places to look at before each call."""
    return self._slots

  def add(self, variables: Iterable[Variable]) -> bool:
    """Variables were read by a trace that the search did not find; whether any is new."""
    found = {id(root): root for root in map(root_of, variables)}
    known = {id(x) for x in self._objects} | self._seen.keys()
    new = {key: x for key, x in found.items() if key not in known}
    covered = {id(leaf) for x in self._objects for leaf in flatten(x).leaves}
    new = {key: x for key, x in new.items() if key not in covered}
    self._seen |= {key: weakref.ref(x) for key, x in new.items()}
    return bool(new)

  def _scan(self) -> None:
    search = _Search()
    search.visit(self._fun, 0)
    self._objects, self._slots = list(search.objects.values()), search.slots
    self._is_listed, self._scanned = search.is_listed, True


class _Search:
  """One look through a function."""

  def __init__(self):
    self.objects: dict[int, Any] = {}
    self.slots: list[Slot] = []
    self.is_listed = True  # no container that may change without a slot
    self._visited: set[tuple[int, frozenset[str]]] = set()
    self._names: frozenset[str] = frozenset()  # that the function being looked through mentions

  def visit(self, x: Any, depth: int) -> None:
    if isinstance(x, Node | Variable):
      self.objects[id(x)] = x
      return
    key = (id(x), self._names)
    if depth > _DEPTH or key in self._visited:
      return
    if isinstance(x, type | types.ModuleType):
      self._attributes(x, depth)
      return
    self._visited.add(key)
    if isinstance(x, types.MethodType):
      self.visit(x.__func__, depth + 1)
      with self._mentioning(_mentioned(x.__func__)):
        self._holder(x.__self__, depth + 1)
    elif isinstance(x, functools.partial):
      for part in (x.func, *x.args, *x.keywords.values()):
        self.visit(part, depth + 1)
    elif isinstance(x, types.FunctionType):
      with self._mentioning(_mentioned(x)):
        self._function(x, depth)
    elif isinstance(x, list | tuple | dict | set):
      self._container(x, depth)
    elif callable(getattr(x, "__wrapped__", None)):
      self.visit(x.__wrapped__, depth + 1)
    elif depth == 0:
      with self._mentioning(_mentioned(inspect.getattr_static(type(x), "__call__", None))):
        self._holder(x, depth + 1)  # a callable object
    else:
      self._attributes(x, depth)

  @contextlib.contextmanager
  def _mentioning(self, names: frozenset[str]) -> Iterator[None]:
    """Of plain objects, these attributes are looked at meanwhile."""
    outer, self._names = self._names, names
    try:
      yield
    finally:
      self._names = outer

  def _attributes(self, x: Any, depth: int) -> None:
    """Look at those attributes of a plain object, a class or a module that the function mentions.

    In a class and a module, only at Modules and Variables: the rest leads to all there is.
    """
    is_space = isinstance(x, type | types.ModuleType)
    if not is_space and type(x).__module__.startswith(("builtins", "jax", "numpy")):
      return
    for name in self._names:
      value = _attribute(x, name)
      if isinstance(value, Node | Variable) or not (is_space or value is None):
        self._slot(functools.partial(getattr, x, name, None), value, depth)

  def _holder(self, x: Any, depth: int) -> None:
    """An object of a plain class whose method is called: its attributes are within reach."""
    if isinstance(x, Node | Variable | type | types.ModuleType) or not hasattr(x, "__dict__"):
      self.visit(x, depth)
      return
    for name, value in vars(x).items():
      self._slot(functools.partial(vars(x).get, name), value, depth)
    with self._mentioning(self._names.difference(vars(x))):
      self._attributes(x, depth)  # those of its class

  def _function(self, f: types.FunctionType, depth: int) -> None:
    wrapped = getattr(f, "__wrapped__", None)
    if callable(wrapped):
      self.visit(wrapped, depth + 1)
      if f.__globals__.get("__name__", "").startswith("refax."):
        return  # a transform around it
    for cell in f.__closure__ or ():
      if (value := _contents(cell)) is not None:
        self._slot(functools.partial(_contents, cell), value, depth)
    for value in (*(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values()):
      self.visit(value, depth + 1)
    for name in _names(f.__code__):
      if name in f.__globals__:
        value = f.__globals__[name]
        if not isinstance(value, types.FunctionType) or value.__module__ == f.__module__:
          self._slot(functools.partial(f.__globals__.get, name), value, depth)

  def _slot(self, read: Callable[[], Any], value: Any, depth: int) -> None:
    """Look at what a place holds; it is watched if that may be, or lead to, an object."""
    before = len(self.objects)
    self.visit(value, depth + 1)
    followed = isinstance(value, Node | Variable | types.FunctionType | functools.partial)
    if followed or len(self.objects) > before:
      self.slots.append(Slot(read, value))

  def _container(self, x: Any, depth: int) -> None:
    before = len(self.objects)
    for part in x.values() if isinstance(x, dict) else x:
      self.visit(part, depth + 1)
    if len(self.objects) > before and not isinstance(x, tuple):
      self.is_listed = False


def _place(cell: Any) -> Any:
  """Where a Ref is: `nnx.device_put` moves it, and a compiled function keeps it where it was."""
  return cell.sharding if _jax.is_ref(cell) and not _jax.is_tracer(cell) else None


def _attribute(x: Any, name: str) -> Any:
  """An attribute that is stored somewhere; None for one that is computed, as a property is."""
  if isinstance(x, types.ModuleType):
    return vars(x).get(name)
  value = inspect.getattr_static(x, name, None)
  if isinstance(value, types.MemberDescriptorType):  # of `__slots__`
    return getattr(x, name, None)
  return None if hasattr(type(value), "__get__") else value


def _contents(cell: Any) -> Any:
  try:
    return cell.cell_contents
  except ValueError:  # not assigned yet
    return None


def _mentioned(function: Any) -> frozenset[str]:
  """The names that a function mentions; of one that is not in Python, none."""
  code = getattr(function, "__code__", None)
  return frozenset() if code is None else frozenset(_names(code))


def _names(code: types.CodeType) -> Iterator[str]:
  """The global names that a function, and functions inside it, may look up."""
  yield from code.co_names
  for const in code.co_consts:
    if isinstance(const, types.CodeType):
      yield from _names(const)
