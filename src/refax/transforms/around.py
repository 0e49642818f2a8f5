"""What code finds around itself, and whether it is as it was: another trace would be the same."""

import dis
import functools
import inspect
import os
import pathlib
import sys
import sysconfig
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from refax.core.by_value import ByValue, NotByValue, Unchanged
from refax.core.definition import kind
from refax.core.interrupt import uninterrupted
from refax.core.node import Node
from refax.core.variable import Variable
from refax.core.watch import weakly
from refax.transforms.places import codes_in, contents, functions_of, names_in, rules_of

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
  them are mentioned. Of what is installed, some packages are known to do the same each time; all
  others are not known. Nothing is kept alive: models and arrays are compared by identity.
  """

  def __init__(self):
    self.is_known = True
    """Whether all of it can be compared with what it will be."""
    self.is_light = True
    """Whether nothing of it is a model or an array, which other code would keep alive."""
    self._seen: set[Any] = set()
    self._spaces: list[_Space] = []
    self._open: list[tuple[Any, frozenset[str]]] = []
    """Values that are still to be followed, and the names that code which finds them mentions."""

  def add(self, things: Iterable[Any]) -> None:
    """Look around functions and classes, too, for a trace that is made now."""
    if not self.holds():
      self.is_known = False  # there are traces of two kinds
    self._open += [(x, frozenset()) for x in things]
    self._quietly(self._look)

  def holds(self) -> bool:
    """Whether all of it is as it was."""
    return self.is_known and self._quietly(lambda: all(space.holds() for space in self._spaces))

  def _quietly(self, look: Callable[[], bool]) -> bool:
    """`look()`, or False if a user's `__eq__` or `__hash__` raises: to look breaks no program.

    What the handler of a signal raises, a time limit maybe, is not taken for that.
    """

    def tried() -> bool:
      try:
        return look()
      except Exception:
        self.is_known = False
        return False

    return uninterrupted(tried)

  def _look(self) -> bool:
    while self._open and self.is_known:
      self._follow(*self._open.pop())
    return self.is_known

  def _is_new(self, *key: Any) -> bool:
    if key in self._seen or not self.is_known:
      return False
    self._seen.add(key)
    self.is_known &= len(self._seen) < _WIDEST
    return True

  def _follow(self, x: Any, names: frozenset[str]) -> None:
    """Look around a value that code mentioning these names has found."""
    if isinstance(x, types.FunctionType):
      self._function(x, names)
    elif isinstance(x, type):
      self._class(x)
    elif isinstance(x, types.ModuleType):
      self.is_known &= not is_installed(x) or (_is_fixed(x.__name__) and not _moves(x, names))
      self._space(x, vars, names)
    elif isinstance(x, types.MethodType):
      self._open += [(x.__func__, names), (x.__self__, names)]
    elif isinstance(x, functools.partial):
      self._space(x, _parts, None)
    elif isinstance(x, list | tuple | set | frozenset | dict):  # a small one: see `_sameness`
      parts = (*x, *x.values()) if isinstance(x, dict) else x
      self._open += [(part, names) for part in parts]
    elif (wrapped := _wrapped(x)) is not None:
      self._open.append((wrapped, names))
      if rules_of(x) or not isinstance(wrapped, types.FunctionType) or not is_installed(wrapped):
        self._space(x, rules_of, None)
    elif not isinstance(x, _LEFT_ALONE) and type(x) is not object:
      self._object(x, names)

  def _function(self, f: types.FunctionType, asked_for: frozenset[str]) -> None:
    if (wrapped := _wrapped(f)) is not None:
      self._open.append((wrapped, frozenset()))
    if is_installed(f):
      self.is_known &= _is_fixed(f.__globals__.get("__name__"))  # `__module__` is what it wraps
      if f.__closure__ is not None and self._is_new(id(f), contents):
        # A transformation of optax, a function of several cases: it holds functions of the user's.
        self._open += [(contents(cell), frozenset()) for cell in f.__closure__]
      return
    self._space(f, vars, asked_for - {"__wrapped__"})
    names = frozenset(names_in(f.__code__))
    asked, imported = _loaded(f.__code__)
    self.is_known &= _MOVING_CALLS.isdisjoint(asked - f.__globals__.keys())
    self._space(f, _globals_of, asked, names)
    self._space(f, _own_values, None, names)
    package = f.__globals__.get("__package__") or ""
    modules = (*imported, *(f"{package}.{name}" for name in imported))
    self._open += [(sys.modules[name], names) for name in modules if name in sys.modules]

  def _class(self, cls: type) -> None:
    if is_installed(cls):
      self.is_known &= _is_fixed(cls.__module__)
      return
    self._space(cls, _attributes, None)
    if not is_installed(type(cls)):
      self._class(type(cls))
    self._open += [(base, frozenset()) for base in cls.__bases__]

  def _object(self, x: Any, names: frozenset[str]) -> None:
    """A plain object: an attribute of it may change, and it stays the same."""
    cls = type(x)
    if isinstance(x, _STATELESS):
      return
    if isinstance(x, types.BuiltinFunctionType):
      owner = x.__self__  # a module, or a list, for its `append`
      self.is_known &= isinstance(owner, types.ModuleType) and _is_fixed(owner.__name__)
    elif not _is_of_known_module(x):
      self.is_known = False
    elif not is_installed(cls):
      self._class(cls)
      self.is_known &= _has_only_dict(x)
      self._space(x, vars, None)
    elif not has_equality(x):
      self.is_known &= hasattr(x, "__dict__") and not any(hasattr(cls, k) for k in _COMPUTED)
      self._space(x, vars, names)

  def _space(
    self,
    owner: Any,
    read: Callable[[Any], Mapping[str, Any]],
    names: frozenset[str] | None,
    inner: frozenset[str] | None = None,
  ) -> None:
    """Note what is under some names, or all; `inner` are names that may be looked up in that."""
    if not self._is_new(id(owner), read, names):
      return
    space = read(owner)
    there = {name: space[name] for name in (space if names is None else names & space.keys())}
    same = list(map(_sameness, there.values()))
    self.is_known &= None not in same
    self.is_light &= not any(map(_is_heavy, there.values()))
    self._spaces.append(_Space(weakly(owner), read, names, tuple(there), same))
    inner = inner or names or frozenset(there)
    values = there.values()
    self._open += [(x, inner) for value in values for x in functions_of(value) or [value]]


class _Space:
  """Values under names: of a module, a class, an object, a function."""

  __slots__ = ("_names", "_owner", "_read", "_same", "_there")

  def __init__(
    self, owner: Any, read: Callable, names: frozenset[str] | None, there: tuple, same: list
  ):
    self._owner, self._read, self._names, self._there = owner, read, names, there
    self._same: list[Callable[[Any], bool]] = same

  def holds(self) -> bool:
    """Whether they are as they were."""
    owner = self._owner()
    if owner is None:
      return False
    space = self._read(owner)
    count = len(space) if self._names is None else len(self._names & space.keys())
    return count == len(self._there) and all(
      name in space and is_same(space[name])
      for name, is_same in zip(self._there, self._same, strict=True)
    )


def _sameness(value: Any) -> Callable[[Any], bool] | None:
  """Whether another value is the same, so that code that finds it does the same; None: unknown."""
  if isinstance(value, types.MappingProxyType):
    return None  # a view of what may change
  if isinstance(value, tuple | list) and _is_heavy(value):
    return _items_same(value)
  if isinstance(value, list | tuple | set | frozenset | dict | np.ndarray):
    try:
      return _content_of(value) if _is_small(value) else None
    except NotByValue:
      return None
  known = weakly(value)
  if has_equality(value):
    return functools.partial(_is_equal, known, kind(value))
  return lambda x: x is known()


def _is_heavy(value: Any) -> bool:
  """Whether a value is a model or an array, or a list or tuple with one in it."""
  if isinstance(value, tuple | list):
    return len(value) <= _LONGEST and any(map(_is_heavy, value))
  return isinstance(value, _HEAVY)


def _items_same(value: Any) -> Callable[[Any], bool] | None:
  """`_sameness` of a list or tuple, item by item."""
  cls, same = type(value), [is_same for x in value if (is_same := _sameness(x)) is not None]
  if len(same) < len(value):
    return None

  def are_same(x: Any) -> bool:
    if type(x) is not cls or len(x) != len(same):
      return False
    return all(is_same(y) for is_same, y in zip(same, x, strict=True))

  return are_same


def _content_of(value: Any) -> Callable[[Any], bool]:
  seen = ByValue(value)
  unchanged = Unchanged(value, seen)
  return lambda x: unchanged.holds(x) if x is value else seen.holds(x)


_HEAVY = (Node, Variable, jax.Array, jax.Ref)
"""What is the same if it is the same object: `nnx.jit` itself looks at what is in it."""

_LEFT_ALONE = (*_HEAVY, np.ndarray, types.NoneType, types.EllipsisType)
"""What is compared by `_sameness`, and what there is one of."""

_STATELESS = (
  types.MethodDescriptorType, types.WrapperDescriptorType, np.ufunc, property,
  types.GetSetDescriptorType, types.MemberDescriptorType, types.MethodWrapperType,
  typing.TypeVar, typing.ParamSpec, inspect.Signature,
)  # fmt: skip

_COMPUTED = ("__getattr__", "__getitem__", "__next__")
"""Where a class has one of these, there is more in an object than its attributes."""


_FIXED = frozenset(
  (
    "_abc", "_collections", "_functools", "_operator", "abc", "absl", "builtins", "chex", "cmath",
    "collections", "contextlib", "copy", "dataclasses", "decimal", "einops", "enum", "flax",
    "fractions", "functools", "itertools", "jax", "jaxlib", "jaxtyping", "logging", "math",
    "ml_dtypes", "numbers", "numpy", "operator", "optax", "re", "refax", "reprlib", "string",
    "textwrap", "types", "typing", "typing_extensions", "warnings",
  )
)  # fmt: skip
"""Packages whose functions do the same each time. `os`, `time`, `random` and the like do not."""

_MOVING_CALLS = frozenset(
  ("__import__", "eval", "exec", "globals", "input", "locals", "open", "vars")
)
"""Built-in functions that give something else each time."""


def _is_fixed(module: str | None) -> bool:
  """Whether what a module defines does the same each time."""
  module = module or "builtins"
  return module.partition(".")[0] in _FIXED and not module.startswith("numpy.random")


def _is_of_known_module(x: Any) -> bool:
  """Whether an object is of a class of the user's, or of a package that does the same each time."""
  name = getattr(x, "__module__", None) or type(x).__module__  # a function in C has its own
  module = sys.modules.get(name)
  return module is not None and (not is_installed(module) or _is_fixed(name))


def _moves(module: types.ModuleType, names: frozenset[str]) -> bool:
  """Whether what is looked up in a package, which else does the same each time, may change."""
  return (module is np and "random" in names) or (module is jax and "config" in names)


def _wrapped(x: Any) -> Callable | None:
  """The function that a decorator has wrapped."""
  wrapped = vars(x).get("__wrapped__") if hasattr(x, "__dict__") else None
  return wrapped if callable(wrapped) else None


@functools.lru_cache(maxsize=4096)
def _loaded(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
  """The names that a function, and functions inside it, look up as globals, and what they import.

  `dis` would tell too, and take 6 us for each instruction.
  """
  found: tuple[set[str], set[str]] = set(), set()
  for part in codes_in(code):
    more = 0
    for op, arg in zip(part.co_code[::2], part.co_code[1::2], strict=True):
      index, more = arg | more, 0
      if op == _MORE:
        more = index << 8
      elif op == _GLOBAL:
        found[0].add(part.co_names[index >> 1])
      elif op == _NAME:
        found[0].add(part.co_names[index])
      elif op == _IMPORT:
        found[1].add(part.co_names[index])
  return frozenset(found[0]), frozenset(found[1])


_MORE, _GLOBAL, _NAME, _IMPORT = (
  dis.opmap[name] for name in ("EXTENDED_ARG", "LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME")
)


def _parts(x: functools.partial) -> dict[str, Any]:
  """What a partial holds."""
  return {"function": x.func, "args": x.args, "keywords": x.keywords}


def _own_values(f: types.FunctionType) -> dict[str, Any]:
  """What a function holds: in the cells of its closure, as defaults, and its code."""
  cells = dict(zip(f.__code__.co_freevars, map(contents, f.__closure__ or ()), strict=True))
  own = ("__code__", "__defaults__", "__kwdefaults__")
  return cells | {name: getattr(f, name) for name in own}


def _globals_of(f: types.FunctionType) -> dict[str, Any]:
  return f.__globals__


def _attributes(cls: type) -> dict[str, Any]:
  """What a class defines, without what Python keeps there."""
  is_kept = lambda name, x: not name.startswith(("__", "_abc_")) or bool(functions_of(x))
  return {name: x for name, x in vars(cls).items() if is_kept(name, x)}


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
    elif isinstance(x, Node | Variable | jax.Array | jax.Ref):
      return False  # it would be kept alive
    elif isinstance(x, list | tuple | set | frozenset | dict):
      count += len(x)
      if count <= _LONGEST:
        open_ += [*x, *x.values()] if isinstance(x, dict) else x
  return count <= _LONGEST


def has_equality(x: Any) -> bool:
  """Whether a value is what its equality says: numbers, text, dtypes, specs of shardings."""
  cls = type(x)
  return cls.__hash__ not in (None, object.__hash__) and cls.__eq__ is not object.__eq__


def _is_equal(known: Callable[[], Any], kind_: Any, x: Any) -> bool:
  value = known()
  return x is value or (kind(x) == kind_ and bool(x == value))


def is_installed(x: Any) -> bool:
  """Whether a function, a module or a class is none of the user's: a notebook has no file."""
  if isinstance(x, types.FunctionType):
    return x.__code__.co_filename.startswith(_INSTALLED)
  module = sys.modules.get(x.__module__) if isinstance(x, type) else x
  if (file := getattr(module, "__file__", None)) is not None:
    return file.startswith(_INSTALLED)
  return module is not None and module.__name__ in sys.stdlib_module_names
