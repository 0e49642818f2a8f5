"""bridge.Module: an NNX Module that is written, initialized and applied as one of Linen.

Its fields are those of a dataclass; `setup` or a method in `compact` makes what it holds; `init`
returns the variables, and `apply` takes them. Values that `apply` was given wait under the name of
the attribute, as `ModuleState`, until the Module is made that takes them.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, dataclass_transform

import jax
import numpy as np

from refax import config
from refax.compat import boxes
from refax.compat.bridge import Initializing, ToNNX
from refax.compat.scope import MODULE_CONTEXT, AttrPriority, ModuleMeta, Scope
from refax.compat.variables import VariableMetadata
from refax.core.containers import Dict
from refax.core.filters import Not
from refax.core.flatten import walk_nodes
from refax.core.module import Module as NNXModule
from refax.core.node import Node
from refax.core.variable import Param, Variable
from refax.graph.split import clone, update
from refax.graph.split import state as state_of
from refax.graph.state import to_flat_state
from refax.rngs import Rngs, RngState


class ModuleState(Dict):
  """The values for a Module that is not there yet."""


@dataclass_transform(field_specifiers=(dataclasses.field,))
class Module(NNXModule, metaclass=ModuleMeta):
  """An NNX Module with the ways of Linen; subclasses are dataclasses by themselves.

  >>> from refax.compat import nnx; import jax, jax.numpy as jnp
  >>> class Dense(nnx.bridge.Module):
  ...   size: int
  ...   @nnx.bridge.compact
  ...   def __call__(self, x):
  ...     return x @ self.param("w", nnx.initializers.ones, (x.shape[-1], self.size))
  >>> variables = Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))
  >>> variables["params"]["w"].shape, Dense(3).apply(variables, jnp.ones((1, 2))).tolist()
  ((2, 3), [[2.0, 2.0, 2.0]])
  """

  scope = None
  _priorities = ()
  _is_initializing = False
  _is_setup = False

  def __init_subclass__(cls, **kwargs: Any):
    super().__init_subclass__(**kwargs)
    dataclasses.dataclass(repr=False, eq=False)(cls)

  def __getattribute__(self, name: str) -> Any:
    value = super().__getattribute__(name)
    if type(value) is ModuleState:
      raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r} yet")
    return value

  def __setattr__(self, name: str, value: Any) -> None:
    if name in ("scope", "_priorities", "_is_initializing", "_is_setup") or self.scope is None:
      super().__setattr__(name, value)
      return
    old = vars(self).get(name)
    if type(old) is ModuleState:
      _give(value, _plain(old))
    elif isinstance(old, Module) and old is not value and type(old) is type(value):
      _give(value, _nested_state(old))  # a compact method that runs again
    for _, node in walk_nodes(value):
      if isinstance(node, Module):
        node._is_initializing = self._is_initializing
        node._bind(self.scope)
    super().__setattr__(name, value)

  def _bind(self, scope: Scope) -> None:
    for _, node in reversed(list(walk_nodes(self))):
      if isinstance(node, Module):
        if node.scope is None:
          node.scope = scope.copy()
        node._set_up()

  def _set_up(self) -> None:
    setup = getattr(self, "setup", None)
    if setup is not None and not self._is_setup:
      MODULE_CONTEXT.run(self, setup)
      self._is_setup = True

  def _entries(self) -> Any:
    order = dict(self._priorities)
    return sorted(super()._entries(), key=lambda entry: order.get(entry[0], AttrPriority.DEFAULT))

  @property
  def attr_priorities(self) -> dict[str, AttrPriority]:
    """The priorities that have been set."""
    return dict(self._priorities)

  def set_attr_priority(self, name: str, value: AttrPriority) -> None:
    """Say whether the variables of a shared object have this name of it."""
    self._priorities = tuple((dict(self._priorities) | {name: value}).items())

  def is_initializing(self) -> bool:
    """Whether this runs in `init`."""
    return self._is_initializing

  def make_rng(self, name: str = "default") -> jax.Array:
    """The next key of a stream."""
    return self.require_scope().rngs[name]()

  def require_scope(self) -> Scope:
    """The scope of the call; an error where nothing runs."""
    if self.scope is None:
      raise ValueError(
        f"this {type(self).__name__} is not part of a call: it has no variables and no streams\n"
        "  fix: do it in setup() or in a method in @nnx.bridge.compact, under init or apply"
      )
    return self.scope

  def param(self, name: str, init_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Param:
    """The Param with this name; in `init`, made by `init_fn(key, *args, **kwargs)`."""
    kwargs.pop("unbox", None)
    make = lambda key: init_fn(key, *args, **kwargs)
    self.require_scope()
    found = self._made("params", name, make, lambda: self.make_rng("params"))
    if not isinstance(found, Param):
      raise ValueError(f"{name!r} is no Param\n  got: a {type(found).__name__}")
    return found

  def variable(
    self, col: str, name: str, init_fn: Any = None, *args: Any, **kwargs: Any
  ) -> Variable:
    """The Variable of a collection with this name; made by `init_fn(*args, **kwargs)`."""
    kwargs.pop("unbox", None)
    self.require_scope()
    if init_fn is None and not hasattr(self, name):
      raise ValueError(f"{name!r} is not there yet\n  fix: pass a function that makes it, init_fn")
    make = None if init_fn is None else lambda _, init=init_fn: init(*args, **kwargs)
    return self._made(col, name, make, lambda: jax.random.key(0))

  def _made(self, collection: str, name: str, make: Any, key: Callable[[], Any]) -> Variable:
    value = getattr(self, name, None)
    if isinstance(value, Variable):
      return value
    if value is not None and make is not None:  # a field has the array
      wanted = jax.eval_shape(lambda: _raw(make(jax.random.key(0))))
      shapes = [tuple(map(np.shape, jax.tree.leaves(x))) for x in (wanted, value)]
      if shapes[0] != shapes[1]:
        raise ValueError(f"{name!r} has another shape\n  got: {shapes[1]}, not {shapes[0]}")
    elif value is None:
      assert make is not None
      value = make(key())
    setattr(self, name, boxes.to_nnx_var(collection, value))
    return getattr(self, name)

  def _variables(self) -> dict[str, Any]:
    found = {}
    for path, x in to_flat_state(state_of(self, Not(RngState))):
      if isinstance(x, Variable):
        found[boxes.collection_of(x, allow_register=True), *path] = boxes.to_linen_var(x)
    return boxes.nested(found)

  @property
  def variables(self) -> Mapping[str, Any]:
    """The variables, by collection."""
    return self._variables()

  def apply(
    self,
    variables: Mapping[str, Any],
    *args: Any,
    rngs: Any = None,
    method: Any = "__call__",
    mutable: Any = False,
    _initialize: bool = False,
    **kwargs: Any,
  ) -> Any:
    """Call a method of a copy that has these variables.

    Args:
      variables: by collection, as `init` returns them.
      *args: the arguments of the method.
      rngs: Rngs, a key or seed, or a dict of keys.
      method: the method, or its name.
      mutable: whether the variables are returned too.
      **kwargs: keywords for the method.

    Returns:
      What the method returns; with `mutable`, also the variables after the call.
    """
    with config.use_hijax(False):  # the copy lives for this call only
      module: Any = clone(self)
      _give(module, boxes.linen_vars_to_nnx_attrs(variables))
      call = _unbound(module, method)
      rngs = rngs if isinstance(rngs, Rngs) else Rngs() if rngs is None else Rngs(rngs)
      nodes = [x for _, x in walk_nodes(module) if isinstance(x, Module)]
      for node in nodes:
        node._is_initializing = _initialize
        node.scope = Scope(rngs, mutable)
      for node in nodes:
        node._set_up()
      with Initializing(module, lambda _: _initialize):
        out = MODULE_CONTEXT.run(module, lambda: call(module, *args, **kwargs))
      for _, node in walk_nodes(module):
        if isinstance(node, Module):
          node._is_initializing = False
          node.scope = None
        elif isinstance(node, ToNNX):
          node.to_nnx__initializing = False
      return out if mutable is False else (out, module._variables())

  def init(self, rngs: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The variables that a call makes."""
    return self.init_with_output(rngs, *args, **kwargs)[1]

  def init_with_output(self, rngs: Any = None, *args: Any, **kwargs: Any) -> Any:
    """What a call returns, and the variables that it makes."""
    options = {"rngs": rngs, "mutable": True, "_initialize": True}
    return self.apply({}, *args, **(kwargs | options))


def _raw(x: Any) -> Any:
  return x.raw_value if isinstance(x, VariableMetadata) else boxes.unboxed(x)


def _plain(state: Any) -> dict[Any, Any]:
  return {k: _plain(v) if isinstance(v, Dict) else v for k, v in state.items()}


def _nested_state(module: Any) -> dict[Any, Any]:
  return boxes.nested(dict(to_flat_state(state_of(module, Not(RngState)))))


def _give(value: Any, tree: Mapping[Any, Any]) -> None:
  """Give an object its Variables; what a `bridge.Module` has no place for yet waits there."""
  if isinstance(value, ToNNX):
    value._write(tree)
    return
  children = {key: child for key, child, _ in value._entries()} if isinstance(value, Node) else {}
  for key, new in tree.items():
    child = children.get(key)
    if isinstance(child, Node) and isinstance(new, Mapping):
      _give(child, new)
    elif isinstance(value, Module) and child is None:
      setattr(value, key, ModuleState(new) if isinstance(new, Mapping) else new)
    elif isinstance(value, Node):
      update(value, {key: new})


def _unbound(module: Any, method: Any) -> Callable[..., Any]:
  """A method as a function whose first argument is the Module."""
  if isinstance(method, str):
    found = getattr(module, method)
    if isinstance(found, Module):  # a submodule's name stands for its call
      return lambda module, *args, **kwargs: getattr(module, method)(*args, **kwargs)
    method = found
  if inspect.ismethod(method) and isinstance(method.__self__, Module):
    method = method.__func__
  if not callable(method):
    raise TypeError(f"method is a method or its name\n  got: {method!r}")
  return method
