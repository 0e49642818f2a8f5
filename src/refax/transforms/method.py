"""nnx.jit of a Module, or of a method of one: what is compiled belongs to the class.

The Module is the first argument then, so two Modules of one class share what was compiled.
"""

import functools
import operator
import types
from collections.abc import Callable
from typing import Any

from refax.core.node import Node
from refax.errors import AliasError


def method_of(fun: Any) -> tuple[Callable, Node] | None:
  """The function that a Module or a bound method of one stands for, and the Module."""
  if isinstance(fun, types.MethodType):
    function, owner = fun.__func__, fun.__self__
  else:
    found = (vars(cls).get("__call__") for cls in type(fun).__mro__)
    function, owner = next((x for x in found if x is not None), None), fun
  if isinstance(owner, Node) and isinstance(function, types.FunctionType):
    return function, owner
  return None


def bound(call: Any, owner: Node, fun: Any, otherwise: Callable[[], Any]) -> Callable:
  """What `nnx.jit` has made of a method, for one Module.

  Args:
    call: the compiled function of the Module and the other arguments.
    owner: the Module.
    fun: what the user has given.
    otherwise: makes what is called if the method finds the Module by closure, too: then it cannot
      be an argument.
  """
  made: Any = None

  def first(way: Callable, other: Callable[[Any], Callable]) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
      nonlocal made
      if made is None:
        try:
          return way(owner, *args, **kwargs)
        except AliasError:  # raised as it was traced: nothing has happened
          made = otherwise()
      return other(made)(*args, **kwargs)

    return run

  lower = lambda *args, **kwargs: call.lower(*args, **kwargs).bound(owner)
  wrapper: Any = functools.update_wrapper(first(call, lambda made: made), call)
  wrapper.lower = first(lower, operator.attrgetter("lower"))
  wrapper.trace = first(call.trace, operator.attrgetter("trace"))
  wrapper.clear_cache = call.clear_cache
  wrapper.__wrapped__ = fun
  return wrapper
