"""What is looked into: a Module, a method of one, or a function of Modules."""

from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import jax
import numpy as np

from refax.core.definition import kind
from refax.core.module import Module
from refax.core.node import Node
from refax.core.variable import Variable


def owner_and_function(fn: Callable) -> tuple[tuple[Module, ...], Callable]:
  """A Module that is called, or whose method is, as an argument; and a plain function of it."""
  if isinstance(fn, Module):
    return (fn,), _call
  if isinstance(fn, MethodType) and isinstance(fn.__self__, Module):
    return (fn.__self__,), fn.__func__
  return (), fn


def _call(model: Module, *args: Any, **kwargs: Any) -> Any:
  return model(*args, **kwargs)  # pyright: ignore[reportCallIssue]


def like(fn: Callable, wrapper: Callable) -> Callable:
  """A wrapper with the name and the documentation of a function; a Module has none."""
  if isinstance(fn, Module):
    return wrapper
  for name in ("__module__", "__name__", "__qualname__", "__doc__"):
    if hasattr(fn, name):
      setattr(wrapper, name, getattr(fn, name))
  wrapper.__wrapped__ = fn  # pyright: ignore[reportFunctionMemberAccess]
  return wrapper


class Arguments(NamedTuple):
  """The arguments of a call: constants, which decide what is traced, and all others."""

  constants: tuple[tuple[int | str, Any], ...]
  """Numbers, names and functions, by position or keyword. Hashable if these are."""
  args: tuple
  """Positional ones, None in the place of constants."""
  kwargs: dict[str, Any]

  @classmethod
  def of(cls, args: tuple, kwargs: dict[str, Any]) -> "Arguments":
    """The arguments of a call."""
    named = [*enumerate(args), *kwargs.items()]
    constants = tuple((key, x) for key, x in named if _is_constant(x))
    keys = {key for key, _ in constants}
    rest = {k: x for k, x in kwargs.items() if k not in keys}
    return cls(constants, tuple(None if i in keys else x for i, x in enumerate(args)), rest)

  @property
  def key(self) -> Any:
    """What tells constants apart: 1 is not 1.0, and 0.0 not -0.0."""
    return tuple((key, kind(x), x) for key, x in self.constants)

  def completing(self, fn: Callable) -> Callable:
    """The function of all other arguments."""
    constants = dict(self.constants)

    def complete(*args: Any, **kwargs: Any) -> Any:
      full = (constants.get(i, x) for i, x in enumerate(args))
      return fn(*full, **kwargs, **{k: x for k, x in self.constants if isinstance(k, str)})

    return complete


def _is_constant(x: Any) -> bool:
  if isinstance(x, Node | Variable | jax.Array | np.ndarray | np.generic):
    return False
  return isinstance(x, bool | int | float | complex | str | bytes | type) or callable(x)


class Compiled:
  """What was made for calls with some constants; not of many, as of a new number in each call."""

  def __init__(self):
    self._made: dict[Any, Any] = {}

  def of(self, arguments: Arguments, make: Callable[[], Any]) -> Any:
    """What was made for these constants; made now, if there is none."""
    try:
      known = self._made.get(arguments.key)
    except TypeError:  # a callable object without a hash
      return make()
    if known is None:
      if len(self._made) >= _MOST:
        self._made.clear()
      known = self._made[arguments.key] = make()
    return known


_MOST = 64
