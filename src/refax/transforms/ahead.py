"""Compiling ahead of time: `nnx.jit(f).lower(model, x).compile()(model, x)`."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from refax.core.variable import Variable
from refax.errors import ArgumentError


class Lowered:
  """What `nnx.jit(f).lower` returns; all else that `jax.stages.Lowered` has, this has too."""

  def __init__(self, lowered: Any, make: Callable[[Any], "AheadCompiled"]):
    self._lowered, self._make = lowered, make

  def compile(self, *args: Any, **kwargs: Any) -> "AheadCompiled":
    """Compile it, with the options of `jax.stages.Lowered.compile`."""
    return self._make(self._lowered.compile(*args, **kwargs))

  def bound(self, first: Any) -> "Lowered":
    """The same for a function that is called without its first argument, which is always this."""
    with_first = lambda made: functools.partial(made, first)
    make = lambda executable: AheadCompiled(executable, with_first(self._make(executable)))
    return Lowered(self._lowered, make)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._lowered, name)


class AheadCompiled:
  """A function compiled for arguments of one structure, called with the arguments of the function.

  All else that `jax.stages.Compiled` has, this has too.
  """

  def __init__(self, compiled: Any, call: Callable[..., Any]):
    self._compiled, self._call = compiled, call

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self._call(*args, **kwargs)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._compiled, name)


def checked(name: str, was: tuple, now: tuple) -> None:
  """Raise ArgumentError if the arguments of a call are not those that were compiled for."""
  if was != now:
    pairs = zip(was[1], now[1], strict=False)
    got = [f"{b}, compiled for {a}" for a, b in pairs if a != b]
    raise ArgumentError.compiled(name, got[0] if got else "arguments of another structure")


def description(structure: Any, leaves: tuple) -> tuple:
  """What is compiled for: a structure, and the types of the arrays."""
  return structure, tuple(map(_type, leaves))


def _type(leaf: Any) -> Any:
  if isinstance(leaf, Variable):
    return type(leaf).__name__, leaf._def, *map(_type, jax.tree.leaves(leaf.get_raw_value()))
  if leaf is None:
    return None
  aval = leaf if hasattr(leaf, "dtype") else jax.typeof(leaf)
  return f"{aval.dtype}{list(aval.shape)}"
