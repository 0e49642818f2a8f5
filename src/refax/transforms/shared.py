"""nnx.jit of one function, written again and again, as `nnx.jit(f)(model, x)` in a loop.

As in `jax.jit`, what was compiled belongs to the function, as long as that lives. It also belongs
to every other one of the same code, for a lambda in the loop is a new function each time: if it can
be imported, or has no closure, and reaches no model and no array, which would be kept alive. Both
hold as long as what the code finds around itself (globals, helper functions, attributes of modules
and classes) is as it was: who sets a global number and writes `nnx.jit(f)` again gets a new trace.
Code that finds what cannot be compared is compiled each time.
"""

import collections
import functools
import sys
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax

from refax.core.by_value import has_hash
from refax.core.definition import kind
from refax.core.node import Node
from refax.core.variable import Variable
from refax.core.watch import weakly
from refax.transforms.around import Around, has_equality, is_installed

_MOST = 16  # functions that are remembered: what was compiled for them takes memory


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
  """What was compiled for a function is kept by this; None if it cannot be.

  Returns:
    The function, if it is to be forgotten when its module has another one, and what it has in
    common with functions that do the same.
  """
  if is_importable(fun):
    return fun, fun
  if isinstance(fun, types.FunctionType) and fun.__closure__ is None and _is_in_module(fun):
    own = fun.__defaults__, tuple((fun.__kwdefaults__ or {}).items())
    is_all = (fun.__code__, id(fun.__globals__), kind(own), own)
    return (None, is_all) if _is_light(own) else None
  if isinstance(fun, functools.partial):
    inner, how = fun.func, [kind(fun.args), fun.args, tuple(fun.keywords.items())]
    how.append(kind(tuple(fun.keywords.values())))
  else:
    ref, inner, *how = getattr(fun, "_refax_derived", (None, None))
    inner = inner if ref is not None and ref() is fun else None
  found = lasting(inner) if inner is not None and _is_light(tuple(how)) else None
  return found and (found[0], (*how, found[1]))


def _is_in_module(fun: types.FunctionType) -> bool:
  """Whether the globals of a function are those of a module: others would be kept alive."""
  return getattr(sys.modules.get(fun.__module__), "__dict__", None) is fun.__globals__


def _is_light(x: Any) -> bool:
  """Whether a value holds no model and no array, which would be kept alive."""
  if isinstance(x, tuple):
    return all(map(_is_light, x))
  if isinstance(x, types.FunctionType):
    return x.__closure__ is None or is_importable(x)
  if isinstance(x, type | types.ModuleType) or x is None or x is ...:
    return True
  is_value = is_installed(type(x)) and has_equality(x)
  return is_value and not isinstance(x, Node | Variable | jax.Array | types.MethodType)


def weak_function(fun: Any) -> Callable[[], Any]:
  """A function to one that it does not keep alive; of a bound method, not its object."""
  if isinstance(fun, types.MethodType):
    function, owner = fun.__func__, weakly(fun.__self__)
    return lambda: None if (x := owner()) is None else types.MethodType(function, x)
  return weakly(fun)


class _Own(NamedTuple):
  """What was compiled for one function, as long as that lives."""

  parts: tuple[weakref.ref, ...]
  made: Any
  around: Around

  def is_of(self, parts: tuple) -> bool:
    """Whether these are the function, or the object and the function of a method."""
    return all(ref() is x for ref, x in zip(self.parts, parts, strict=True))


class Known:
  """What was compiled for functions: by function, and by what functions have in common."""

  def __init__(self):
    self._kept: collections.OrderedDict[Hashable, tuple[Any, Around, Any, Any]]
    self._kept = collections.OrderedDict()
    self._own: dict[Hashable, _Own] = {}

  def shared(
    self, fun: Any, options: Hashable, make: Callable[[Around | None], Any]
  ) -> tuple[Any, Any]:
    """What was made for a function with some options, if it would be the same now, or a new one.

    Args:
      fun: the function.
      options: the options.
      make: makes it; what the function finds around itself is to be noted as it is traced. It is
        not to keep the function alive then.

    Returns:
      What was made, and the function that it was made for, which whoever uses it keeps alive.
    """
    parts = (fun.__self__, fun.__func__) if isinstance(fun, types.MethodType) else (fun,)
    own = (*map(id, parts), options)
    if not has_hash(own):
      return make(None), fun
    known = self._own.get(own)
    if known is not None and known.is_of(parts) and known.around.holds():
      return known.made, fun
    found = lasting(fun)
    key = (found[1], options) if found is not None and has_hash(found[1]) else None
    if key is not None:
      made, around, _, first = self._kept.get(key, (None, None, None, None))
      if around is not None and around.is_light and around.holds():
        return made, first
    made = make(around := Around())
    self._note(own, parts, made, around)
    if found is not None and key is not None:
      self._keep(key, (made, around, found[0], fun))
    return made, fun

  def _note(self, key: Hashable, parts: tuple, made: Any, around: Around) -> None:
    """Remember one as long as its function, or the object whose method it is, lives."""
    entries = self._own

    def gone(ref: weakref.ref) -> None:
      if (entry := entries.get(key)) is not None and any(ref is x for x in entry.parts):
        entries.pop(key, None)

    try:
      entries[key] = _Own(tuple(weakref.ref(x, gone) for x in parts), made, around)
    except TypeError:  # what cannot be referred to weakly
      entries.pop(key, None)

  def _keep(self, key: Hashable, entry: tuple[Any, Around, Any, Any]) -> None:
    """Remember one, and forget those that would be others by now."""
    for other, (_, around, fun, _) in list(self._kept.items()):
      if not around.holds() or (fun is not None and not is_importable(fun)):
        self._kept.pop(other, None)
    self._kept[key] = entry
    self._kept.move_to_end(key)
    while len(self._kept) > _MOST:
      self._kept.popitem(last=False)

  def forget_for_others(self, made: Any) -> None:
    """Let no other function find it: it may hold a model."""
    for key, (other, *_) in list(self._kept.items()):
      if other is made:
        self._kept.pop(key, None)

  def forget(self, made: Any) -> None:
    """Let nobody find it any more."""
    self.forget_for_others(made)
    for key, entry in list(self._own.items()):
      if entry.made is made:
        self._own.pop(key, None)
