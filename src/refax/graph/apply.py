"""GraphDef.apply: a call of an object that is given as a GraphDef and States, and its new state."""

from collections.abc import Callable
from typing import Any

from refax.core import graphdef as graphdef_module
from refax.core.graphdef import GraphDef
from refax.graph.split import merge, split


class Applied:
  """An object to be called, or one of its methods: attributes and items lead to it.

  Args:
    call: from `(object -> method, args, kwargs)` to the result and the new state.
    get: from the object to the method.
  """

  def __init__(self, call: Callable[..., Any], get: Callable[[Any], Any] = lambda node: node):
    self._call, self._get = call, get

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self._call(self._get, args, kwargs)

  def __getattr__(self, name: str) -> "Applied":
    if name.startswith("__"):
      raise AttributeError(name)
    return Applied(self._call, lambda node: getattr(self._get(node), name))

  def __getitem__(self, key: Any) -> "Applied":
    return Applied(self._call, lambda node: self._get(node)[key])


def apply(graphdef: GraphDef, *states: Any) -> Applied:
  """See `GraphDef.apply`."""

  def call(get: Callable[[Any], Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    node = merge(graphdef, *states)
    out = get(node)(*args, **kwargs)
    return out, split(node)

  return Applied(call)


graphdef_module.on_apply = apply
