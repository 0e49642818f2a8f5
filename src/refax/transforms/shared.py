"""nnx.jit of one function, written again and again, as `nnx.jit(f)(model, x)` in a loop.

As in `jax.jit`, what was compiled belongs to the function. That holds for functions that can be
imported, which live on anyway, and as long as what their code finds around itself (globals, helper
functions, attributes of modules and classes) is as it was: who sets a global number and writes
`nnx.jit(f)` again gets a new trace. Code that finds what cannot be compared is compiled each time.
"""

import collections
import functools
import os
import pathlib
import sys
import sysconfig
import types
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from refax.core.by_value import ByValue, NotByValue, has_hash
from refax.core.definition import kind
from refax.core.node import Node
from refax.core.variable import Variable
from refax.core.watch import weakly
from refax.transforms.places import contents

_MOST = 64  # functions that are remembered
_WIDEST = 4096  # values around one function
_LONGEST = 256  # items of one container

_PLACES = ("stdlib", "platstdlib", "purelib", "platlib")
_INSTALLED = (
  *(os.path.join(sysconfig.get_path(name), "") for name in _PLACES),
  os.path.join(pathlib.Path(__file__).parents[1], ""),
  "<frozen ",
)
"""Where files are that do not change while a program runs: Python, packages, and Refax itself."""


class Around:
  """What code finds around itself: the values under the names that it mentions.

  Functions of the user's are followed, and classes, modules and plain objects, as far as names in
  them are mentioned. What is installed does not change. Nothing is kept alive.
  """

  def __init__(self):
    self.is_known = True
    """Whether all of it can be compared with what it will be."""
    self._seen: set[Any] = set()
    self._spaces: list[_Space] = []

  def add(self, things: Iterable[Any]) -> None:
    """Look around functions and classes, too, for a trace that is made now."""
    if not self.holds():
      self.is_known = False  # there are traces of two kinds
    for x in things:
      self._follow(x, frozenset())

  def holds(self) -> bool:
    """Whether all of it is as it was."""
    return self.is_known and all(space.holds() for space in self._spaces)

  def _is_new(self, *key: Any) -> bool:
    if key in self._seen or not self.is_known:
      return False
    self._seen.add(key)
    self.is_known &= len(self._seen) < _WIDEST
    return True

  def _follow(self, x: Any, names: frozenset[str]) -> None:
    """Look around a value that code mentioning these names has found."""
    if isinstance(x, types.FunctionType):
      self._function(x)
    elif isinstance(x, type):
      self._class(x)
    elif isinstance(x, types.ModuleType):
      if not _is_installed(x):
        self._space(x, vars, names)
    elif isinstance(x, types.MethodType | functools.partial):
      self._space(x, _parts, None)
    elif isinstance(x, list | tuple | set | frozenset | dict):  # a small one: see `_sameness`
      for part in (*x, *x.values()) if isinstance(x, dict) else x:
        self._follow(part, names)
    elif callable(getattr(x, "__wrapped__", None)):
      self._follow(x.__wrapped__, names)
    elif not isinstance(x, _LEFT_ALONE):
      self._object(x, names)

  def _function(self, f: types.FunctionType) -> None:
    if callable(wrapped := getattr(f, "__wrapped__", None)):
      self._follow(wrapped, frozenset())
    if f.__code__.co_filename.startswith(_INSTALLED):
      return
    names = frozenset(_names(f.__code__))
    self._space(f, lambda f: f.__globals__, names)
    self._space(f, _own_values, None)
    package = f.__globals__.get("__package__") or ""
    for name in (*names, *(f"{package}.{name}" for name in names)):  # imported in the function
      if name in sys.modules:
        self._follow(sys.modules[name], names)

  def _class(self, cls: type) -> None:
    if not _is_installed(cls):
      self._space(cls, _attributes, None)
      for base in cls.__bases__:
        self._class(base)

  def _object(self, x: Any, names: frozenset[str]) -> None:
    """A plain object: an attribute of it may change, and it stays the same."""
    cls = type(x)
    if not _is_installed(cls):
      self._class(cls)
      self.is_known &= _has_only_dict(x)
      self._space(x, vars, None)
    elif not _has_equality(x) and not isinstance(x, _STATELESS):
      is_plain = hasattr(x, "__dict__") and not any(hasattr(cls, name) for name in _COMPUTED)
      self.is_known &= is_plain
      self._space(x, vars, names)

  def _space(
    self, owner: Any, read: Callable[[Any], Mapping[str, Any]], names: frozenset[str] | None
  ) -> None:
    """Note what is under some names, or under all."""
    if not self._is_new(id(owner), names):
      return
    space = read(owner)
    there = {name: space[name] for name in (space if names is None else names & space.keys())}
    self._spaces.append(_Space(weakly(owner), read, names, tuple(there)))
    for value in there.values():
      if (same := _sameness(value)) is None:
        self.is_known = False
        return
      self._spaces[-1].same.append(same)
    inner = frozenset(there) if names is None else names
    for value in there.values():
      self._follow(_function_of(value), inner)


class _Space:
  """Values under names: of a module, a class, an object, a function."""

  __slots__ = ("_names", "_owner", "_read", "_there", "same")

  def __init__(self, owner: Any, read: Callable, names: frozenset[str] | None, there: tuple):
    self._owner, self._read, self._names, self._there = owner, read, names, there
    self.same: list[Callable[[Any], bool]] = []

  def holds(self) -> bool:
    """Whether they are as they were."""
    owner = self._owner()
    if owner is None:
      return False
    space = self._read(owner)
    count = len(space) if self._names is None else len(self._names & space.keys())
    return count == len(self._there) and all(
      name in space and is_same(space[name])
      for name, is_same in zip(self._there, self.same, strict=True)
    )


def _sameness(value: Any) -> Callable[[Any], bool] | None:
  """Whether another value is the same, so that code that finds it does the same; None: unknown."""
  if isinstance(value, Node | Variable):
    return _is_object  # nnx.jit sees which one
  if isinstance(value, list | tuple | set | frozenset | dict | np.ndarray):
    try:
      return ByValue(value).holds if _is_small(value) else None
    except NotByValue:
      return None
  if not isinstance(value, _LEFT_ALONE) and _has_equality(value):
    return functools.partial(_is_equal, value, kind(value))
  known = weakly(value)
  return lambda x: x is known()


_LEFT_ALONE = (Node, Variable, jax.Array, np.ndarray, jax.Ref, type(None), type(...))
"""What nnx.jit sees itself, what is compared by `_sameness`, and what there is one of."""

_STATELESS = (
  types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, np.ufunc,
  types.GetSetDescriptorType, types.MemberDescriptorType, types.MethodWrapperType,
)  # fmt: skip

_COMPUTED = ("__getattr__", "__getitem__", "__next__")
"""Where a class has one of these, there is more in an object than its attributes."""


def _parts(x: Any) -> dict[str, Any]:
  """What a bound method or a partial holds."""
  if isinstance(x, types.MethodType):
    return {"function": x.__func__, "self": x.__self__}
  return {"function": x.func, "args": x.args, "keywords": x.keywords}


def _own_values(f: types.FunctionType) -> dict[str, Any]:
  """What a function holds: in the cells of its closure, and as defaults."""
  cells = dict(zip(f.__code__.co_freevars, map(contents, f.__closure__ or ()), strict=True))
  return cells | {"defaults": f.__defaults__, "kwdefaults": f.__kwdefaults__}


def _attributes(cls: type) -> dict[str, Any]:
  """What a class defines, without what Python keeps there."""
  return {k: x for k, x in vars(cls).items() if k in _MEANT or not k.startswith(("__", "_abc_"))}


_MEANT = frozenset(f"__{name}__" for name in ("call", "getattr", "getitem", "iter", "matmul"))
"""Some methods that are called without being named."""


def _has_only_dict(x: Any) -> bool:
  """Whether all that is in an object of the user's is in its `__dict__`."""
  has_slots = any(vars(cls).get("__slots__") for cls in type(x).__mro__)
  is_more = isinstance(x, list | dict | set | tuple | str | bytes | np.ndarray)
  return hasattr(x, "__dict__") and not has_slots and not is_more


def _is_small(value: Any) -> bool:
  """Whether a container, or an array of NumPy, is looked through in no time."""
  open_, count = [value], 0
  while open_ and count <= _LONGEST:
    x = open_.pop()
    if isinstance(x, np.ndarray):
      count += x.nbytes // 64
    elif isinstance(x, list | tuple | set | frozenset | dict):
      count += len(x)
      if count <= _LONGEST:
        open_ += [*x, *x.values()] if isinstance(x, dict) else x
  return count <= _LONGEST


def _is_object(x: Any) -> bool:
  return isinstance(x, Node | Variable)


def _holds(space: Mapping, names: frozenset[str], same: dict[str, Callable[[Any], bool]]) -> bool:
  return (names & space.keys()) == same.keys() and all(
    is_same(space[name]) for name, is_same in same.items()
  )


def _has_equality(x: Any) -> bool:
  """Whether a value is what its equality says: numbers, text, dtypes, specs of shardings."""
  cls = type(x)
  return cls.__hash__ not in (None, object.__hash__) and cls.__eq__ is not object.__eq__


def _is_equal(value: Any, kind_: Any, x: Any) -> bool:
  return x is value or (kind(x) == kind_ and bool(x == value))


def _is_installed(x: Any) -> bool:
  """Whether a module or a class is none of the user's: a notebook has no file."""
  module = sys.modules.get(x.__module__) if isinstance(x, type) else x
  if (file := getattr(module, "__file__", None)) is not None:
    return file.startswith(_INSTALLED)
  return module is None or module.__name__ in sys.stdlib_module_names - {"__main__"}


def _names(code: types.CodeType) -> Iterable[str]:
  yield from code.co_names
  for const in code.co_consts:
    if isinstance(const, types.CodeType):
      yield from _names(const)


def _function_of(attribute: Any) -> Any:
  """The function behind what a class defines."""
  if isinstance(attribute, property):
    return attribute.fget
  if isinstance(attribute, functools.cached_property):
    return attribute.func
  is_wrapped = isinstance(attribute, classmethod | staticmethod)
  return attribute.__func__ if is_wrapped else attribute


def is_importable(fun: Any) -> bool:
  """Whether a function is what its module has under its name, itself or in a class."""
  if not isinstance(fun, types.FunctionType):
    return False
  at: Any = sys.modules.get(fun.__module__)
  for name in fun.__qualname__.split("."):
    at = getattr(at, "__dict__", {}).get(name)
  return at is fun


def derived(wrapper: Any, transform: str, fun: Any, **options: Any) -> Any:
  """What a transform has made of a function, marked so: made again, it is the same.

  Args:
    wrapper: what was made.
    transform: the name of the transform.
    fun: the function.
    **options: the others of its arguments.
  """
  # `functools.wraps` copies the mark to functions that are others: hence the reference.
  wrapper._refax_derived = weakref.ref(wrapper), fun, transform, tuple(options.items())
  return wrapper


def lasting(fun: Any) -> tuple[Any, Hashable] | None:
  """The function that can be imported, and all that was made of it, as a key; None if it cannot."""
  if is_importable(fun):
    return fun, fun
  ref, inner, *how = getattr(fun, "_refax_derived", (None, None))
  found = lasting(inner) if ref is not None and ref() is fun else None
  return found and (found[0], (*how, found[1]))


class Known:
  """What `nnx.jit` has made of functions that can be imported, by function and options."""

  def __init__(self):
    self._calls: collections.OrderedDict[Hashable, tuple[Any, Around, Any]]
    self._calls = collections.OrderedDict()

  def shared(self, fun: Any, options: Hashable, make: Callable[[Around | None], Any]) -> Any:
    """What was made of a function with some options, if it would be the same now, or a new one.

    Args:
      fun: the function.
      options: the options.
      make: makes it; what the function finds around itself is to be noted as it is traced.
    """
    if (found := lasting(fun)) is None or not has_hash(key := (found[1], options)):
      return make(None)
    call, around, _ = self._calls.get(key, (None, None, None))
    if around is None or not around.holds():
      call = make(around := Around())
      self._keep(key, (call, around, found[0]))
    return call

  def _keep(self, key: Hashable, entry: tuple[Any, Around, Any]) -> None:
    """Remember one, and forget those of functions that are others by now."""
    for other, (*_, fun) in list(self._calls.items()):
      if not is_importable(fun):
        self._calls.pop(other, None)
    self._calls[key] = entry
    self._calls.move_to_end(key)
    while len(self._calls) > _MOST:
      self._calls.popitem(last=False)
