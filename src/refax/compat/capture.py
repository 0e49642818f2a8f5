"""nnx.capture: what Modules sow and perturb while a function runs, or what their methods return."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from refax.core.flatten import walk_nodes
from refax.core.module import Module
from refax.core.variable import Variable
from refax.graph.split import pop
from refax.graph.state import State, from_flat_state, to_flat_state

_OUTPUTS = "_captured_outputs"
"""The attribute for what methods return, by their names: an attribute of the name is the method."""


def capture(
  fn: Any,
  *var_types: type[Variable],
  init: State | None = None,
  method_outputs: type[Variable] | None = None,
) -> Callable[..., Any]:
  """A function that also returns what the Modules kept meanwhile.

  Args:
    fn: a Module, a bound method of one, or a function whose first argument is one; or a type of
      Variable, and a decorator is returned.
    *var_types: the types of Variables to take out; a State is returned for each.
    init: Variables to put into the Modules first, at their paths: perturbations of another call.
    method_outputs: a type of Variable in which the results of all methods are kept.

  >>> from refax.compat import nnx; import jax.numpy as jnp
  >>> class Net(nnx.Module):
  ...   def __call__(self, x):
  ...     self.sow(nnx.Intermediate, "h", x)
  ...     return x + 1
  >>> y, kept = nnx.capture(Net(), nnx.Intermediate)(jnp.array(1.0))
  >>> float(y), float(kept["h"][0])
  (2.0, 1.0)
  """
  if isinstance(fn, type) and issubclass(fn, Variable):
    types = (fn, *var_types)
    return lambda f: capture(f, *types, init=init, method_outputs=method_outputs)
  owner = fn.__self__ if inspect.ismethod(fn) else fn

  def wrapper(*args: Any, **kwargs: Any) -> Any:
    module = owner if isinstance(owner, Module) else args[0]
    given = _give(module, init)
    try:
      with _keeping_outputs(module, method_outputs):
        result = fn(*args, **kwargs)
      states = _taken(module, var_types) if var_types else ()
    finally:
      for node, name in given:
        if hasattr(node, name):
          delattr(node, name)
    if not var_types:
      return result
    return (result, states) if len(var_types) == 1 else (result, *states)

  return functools.update_wrapper(wrapper, fn) if inspect.isroutine(fn) else wrapper


def _taken(module: Module, types: tuple[type[Variable], ...]) -> Any:
  """What was kept, out of the Modules: a State for each type."""
  exactly = [lambda _, x, cls=cls: type(x) is cls for cls in types]  # a Perturbation is one itself
  states = pop(module, *exactly)
  found = [states] if len(types) == 1 else list(states)
  for i, state in enumerate(found):
    pairs = []
    for path, leaf in to_flat_state(state):
      outputs = leaf.get_value() if path[-1] == _OUTPUTS else {}
      pairs += [((*path[:-1], name), type(leaf)(x)) for name, x in outputs.items()]
      pairs += [] if path[-1] == _OUTPUTS else [(path, leaf)]
    found[i] = from_flat_state(pairs)
  return found[0] if len(types) == 1 else tuple(found)


def _give(module: Module, init: State | None) -> list[tuple[Any, Any]]:
  """Set the Variables of a State as attributes at their paths; returns the places."""
  nodes = dict(walk_nodes(module))
  given = []
  for path, leaf in to_flat_state(init) if init else ():
    if path[:-1] in nodes:
      setattr(nodes[path[:-1]], path[-1], leaf)
      given.append((nodes[path[:-1]], path[-1]))
  return given


@contextmanager
def _keeping_outputs(module: Module, variable_type: type[Variable] | None) -> Iterator[None]:
  """While the block runs, the methods of the Modules' classes sow what they return."""
  originals = []
  classes = {type(x) for _, x in walk_nodes(module) if isinstance(x, Module)}
  for cls in classes if variable_type is not None else ():
    for name, method in list(vars(cls).items()):
      if inspect.isfunction(method) and (not name.startswith("_") or name == "__call__"):
        originals.append((cls, name, method))
        setattr(cls, name, _sowing(method, name, variable_type))
  try:
    yield
  finally:
    for cls, name, method in originals:
      setattr(cls, name, method)


def _sowing(method: Callable[..., Any], name: str, variable_type: Any) -> Callable[..., Any]:
  @functools.wraps(method)
  def wrapper(self: Module, *args: Any, **kwargs: Any) -> Any:
    result = method(self, *args, **kwargs)
    old = getattr(self, _OUTPUTS, None)
    kept = {} if old is None else old.get_value()
    kept = kept | {name: (*kept.get(name, ()), result)}
    setattr(self, _OUTPUTS, variable_type(kept, is_hijax=False))
    return result

  return wrapper
