"""Loops and branches outside of compiled functions are compiled once for each computation.

JAX compiles a loop for the trace that was made of its body. The next call makes another trace, of
the same operations, which is compiled again: that takes a hundred times as long as all the rest.
Here each call is traced too, so all that Python does happens, and what has changed around the
function is seen. But what was compiled belongs to the operations of the trace, and not to it.
"""

import collections
import functools
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from refax import _jax
from refax.core.storage import is_array_like
from refax.transforms.fast import is_eager

_MOST = 64  # computations that are remembered

_compiled: "collections.OrderedDict[Hashable, Callable]" = collections.OrderedDict()


def compiled_once(function: Callable, *args: Any) -> Any:
  """`function(*args)`, for a function that does nothing but a loop or a branch of JAX.

  Args:
    function: from pytrees of arrays to a pytree of arrays. An array that may be another one in the
      next call is to be an argument, and not to be found by closure.
    *args: its arguments.
  """
  flat, tree = jax.tree.flatten(args)
  if not is_eager() or not all(map(is_array_like, flat)):
    return function(*args)
  closed, out = _jax.traced(lambda flat: function(*tree.unflatten(flat)), flat)
  if not _jax.only_refs_are_effects(closed):  # what prints, or calls Python, is another each time
    return function(*args)
  consts = closed.consts
  closed = _jax.consts_as_inputs(_jax.without_rules(closed))  # no array is kept alive
  try:
    hash(key := _Key().of(closed.jaxpr))
  except (_Unknown, TypeError):  # something that has no hash
    return function(*args)
  # What has failed is not kept: after Ctrl-C while it compiles, JAX never compiles that jaxpr.
  run = _compiled.get(key) or jax.jit(_jax.jaxpr_as_fun(closed))
  results = run(*consts, *flat)
  _compiled.pop(key, None)
  while len(_compiled) >= _MOST:
    _compiled.popitem(last=False)
  _compiled[key] = run  # as the last one that was used
  return jax.tree.unflatten(jax.tree.structure(out), results)


class _Unknown(Exception):
  """There is something in a jaxpr that cannot be compared with what is in another one."""


class _Key:
  """What two jaxprs have in common that compute the same, whatever their variables are."""

  def __init__(self):
    self._numbers: dict[Any, int] = {}

  def of(self, jaxpr: Any) -> tuple:
    """The key of a jaxpr.

    Raises:
      _Unknown: it has none.
      TypeError: the key has no hash.
    """
    inputs = self._defined(jaxpr.constvars), self._defined(jaxpr.invars)
    equations = tuple(map(self._equation, jaxpr.eqns))
    return (*inputs, equations, tuple(map(self._read, jaxpr.outvars)))

  def _defined(self, variables: Sequence[Any]) -> tuple:
    for var in variables:
      self._numbers[var] = len(self._numbers)
    return tuple(var.aval for var in variables)

  def _equation(self, eqn: Any) -> tuple:
    if _jax.is_custom(eqn):
      raise _Unknown  # it holds functions
    read = tuple(map(self._read, eqn.invars))
    params = tuple((name, _constant(x)) for name, x in eqn.params.items())
    return eqn.primitive, read, params, self._defined(eqn.outvars), _jax.context_of(eqn)

  def _read(self, atom: Any) -> Hashable:
    if not _jax.is_literal(atom):
      return self._numbers[atom]
    value = np.asarray(atom.val)
    if value.ndim:
      raise _Unknown
    return atom.aval, value.dtype, value.tobytes()  # NaN is like itself, and 0 not like -0


def _constant(x: Any) -> Hashable:
  """A parameter of an operation, as a part of a key."""
  if hasattr(x, "eqns"):
    if getattr(x, "consts", ()):
      raise _Unknown
    return _Key().of(getattr(x, "jaxpr", x))
  if isinstance(x, _jax.Call):
    return _constant(x.jaxpr)
  if isinstance(x, tuple | list):
    return type(x), tuple(map(_constant, x))
  if isinstance(x, dict):
    return type(x), tuple((key, _constant(value)) for key, value in x.items())
  if isinstance(x, float):
    return type(x), x.hex()
  if isinstance(x, types.FunctionType | types.MethodType | functools.partial):
    raise _Unknown  # another one each time
  return type(x), x
