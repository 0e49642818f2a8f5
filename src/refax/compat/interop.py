"""NNX Modules and Linen modules inside of a `bridge.Module`, and its compact methods."""

import functools
from collections.abc import Callable
from typing import Any

from refax.compat.bridge import ToNNX
from refax.compat.compact import Module
from refax.compat.scope import MODULE_CONTEXT, ModuleStackEntry, current_context, next_name
from refax.graph.split import state as state_of
from refax.graph.split import update
from refax.rngs import Rngs, RngState
from refax.transforms.abstract import eval_shape
from refax.transforms.jit import jit


def compact(f: Callable[..., Any]) -> Callable[..., Any]:
  """A method that makes the Modules and Variables that it uses; see `bridge.Module`."""

  @functools.wraps(f)
  def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(self, Module):
      raise ValueError(f"compact is for methods of bridge.Module\n  got: a {type(self).__name__}")
    return MODULE_CONTEXT.run(self, lambda: f(self, *args, **kwargs), in_compact=True)

  return wrapper


def _parent(who: str) -> tuple[ModuleStackEntry, Any]:
  entry = current_context()
  if entry is None:
    raise ValueError(f"{who} is for methods of a bridge.Module, under init or apply")
  return entry, entry.module


def _adopt(entry: ModuleStackEntry, name: str | None, module: Any, kind: type) -> Any:
  if entry.in_compact:
    setattr(entry.module, name or next_name(entry, kind), module)
  return module


def nnx_in_bridge_mdl(factory: Callable[[Rngs], Any], name: str | None = None) -> Any:
  """An NNX Module inside of a `bridge.Module`, whose random streams it gets.

  Args:
    factory: makes the Module of Rngs.
    name: its attribute, in a compact method; in `setup`, assign what is returned.
  """
  entry, parent = _parent("nnx_in_bridge_mdl")
  rngs = parent.require_scope().rngs
  if parent.is_initializing():
    module = factory(rngs)
  else:
    module = eval_shape(factory, rngs if len(rngs) else Rngs(0))
    if len(rngs):
      update(module, jit(lambda rngs: state_of(factory(rngs), RngState))(rngs))
  return _adopt(entry, name, module, type(module))


def linen_in_bridge_mdl(linen_module: Any, name: str | None = None) -> ToNNX:
  """A Linen module inside of a `bridge.Module`.

  Args:
    linen_module: the module.
    name: its attribute, in a compact method; in `setup`, assign what is returned.
  """
  entry, parent = _parent("linen_in_bridge_mdl")
  module = ToNNX(linen_module, parent.require_scope().rngs)
  module.to_nnx__initializing = parent.is_initializing()
  return _adopt(entry, name, module, type(linen_module))
