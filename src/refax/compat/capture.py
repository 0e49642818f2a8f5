"""nnx.capture: what Modules sow and perturb while a function runs, or what their methods return.

While it runs, each Module says in its attribute `__captures__` which types of Variables are kept.
It is static, so a compiled function is traced again with it. What is kept is in attributes of its
own, for a Module may have a method of the same name.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from refax.compat.variables import variable_type_from_name
from refax.core.flatten import walk_nodes
from refax.core.module import Module
from refax.core.variable import Perturbation, Variable
from refax.graph.split import pop
from refax.graph.state import State, from_flat_state, to_flat_state

_MARK = "__captures__"
_KEPT = "__captured__"


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
    nodes = {path: x for path, x in walk_nodes(module) if isinstance(x, Module)}
    given = dict(to_flat_state(init)) if init else {}
    types = {*var_types, *map(type, given.values()), *filter(None, [method_outputs])}
    mark = tuple(sorted(types, key=lambda cls: cls.__qualname__))
    try:
      for node in nodes.values():
        setattr(node, _MARK, mark)
      for path, x in given.items():
        if path[:-1] in nodes:
          setattr(nodes[path[:-1]], _attribute(type(x), path[-1]), x)
      with _keeping_outputs(nodes.values(), method_outputs):
        result = fn(*args, **kwargs)
      states = _taken(module, var_types)
    finally:
      for node in nodes.values():
        for name in [name for name in vars(node) if name == _MARK or name.startswith(_KEPT)]:
          delattr(node, name)
    return (result, *states) if var_types else result

  return functools.update_wrapper(wrapper, fn) if inspect.isroutine(fn) else wrapper


def _attribute(cls: type[Variable], name: Any) -> str:
  return f"{_KEPT}{cls.__name__}_{name}"


def _taken(module: Module, types: tuple[type[Variable], ...]) -> list[State]:
  """What was kept, out of the Modules: a State for each type."""

  def kept(cls: type[Variable]) -> Callable[[Any, Any], bool]:
    return lambda path, x: type(x) is cls and str(path[-1]).startswith(_KEPT)

  states: Any = pop(module, *map(kept, types)) if types else ()
  found: Any = [states] if len(types) == 1 else states
  return [_named(state, cls) for state, cls in zip(found, types, strict=True)]


def _named(state: State, cls: type[Variable]) -> State:
  """A State with the names under which Variables were kept, for those of their attributes."""
  start = len(_attribute(cls, ""))
  pairs = ((*path[:-1], path[-1][start:]) for path, _ in to_flat_state(state))
  return from_flat_state(zip(pairs, to_flat_state(state).leaves, strict=True))


@contextmanager
def _keeping_outputs(nodes: Iterable[Module], variable_type: Any) -> Iterator[None]:
  """While the block runs, the methods of the Modules' classes sow what they return."""
  originals = []
  for cls in set(map(type, nodes)) if variable_type is not None else ():
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
    self.sow(variable_type, name, result)
    return result

  return wrapper


_plain_sow, _plain_perturb = Module.sow, Module.perturb


def _sow(
  self: Module, variable_type: Any, name: str, value: Any, *args: Any, **kwargs: Any
) -> bool:
  """`Module.sow`; inside `capture` only what is captured is kept."""
  name, kept = _place(self, variable_type, name)
  return kept and _plain_sow(self, _type(variable_type), name, value, *args, **kwargs)


def _perturb(self: Module, name: str, value: Any, variable_type: Any = Perturbation) -> Any:
  """`Module.perturb`; inside `capture` only what is captured is kept."""
  name, kept = _place(self, variable_type, name)
  return _plain_perturb(self, name, value, _type(variable_type)) if kept else value


def _type(variable_type: Any) -> type[Variable]:
  if isinstance(variable_type, str):
    return variable_type_from_name(variable_type, allow_register=True)
  return variable_type


def _place(module: Module, variable_type: Any, name: str) -> tuple[str, bool]:
  """The attribute for what is kept under a name, and whether it is kept."""
  types = vars(module).get(_MARK)
  cls = _type(variable_type)
  return (name, True) if types is None else (_attribute(cls, name), cls in types)


ADDED = {"sow": _sow, "perturb": _perturb}
"""Methods of Modules, in this process."""
