"""What a model is: its layers, what they are given and return, what they hold, what they take.

The model is traced on types: nothing is computed and nothing is written.
"""

import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refax import _jax
from refax.core import calls
from refax.core.calls import Call, Observer
from refax.core.flatten import walk_graph
from refax.core.module import Module
from refax.core.node import Node
from refax.core.variable import Param, Variable, identity
from refax.inspect.cost import Cost, by_path, operations, with_all_below
from refax.inspect.target import Arguments
from refax.transforms.autodiff import grad
from refax.transforms.lift import Inputs
from refax.transforms.stage import Staged
from refax.transforms.taps import opened
from refax.typing import Path


class Layer(NamedTuple):
  """A Module in a model."""

  path: Path
  level: int
  """How many Modules are around it, containers left out."""
  method: str
  """The method that is called, if it is not the one that models are called by."""
  type: str
  same_as: Path | None
  """Where it is described, if it is at another path, too."""
  inputs: Any
  """What it is given at its first call: a pytree with `jax.ShapeDtypeStruct` for arrays."""
  outputs: Any
  calls: int
  variables: tuple[tuple[Path, Variable], ...]
  """Those that it holds itself, each at the first path where it is found."""
  below: tuple[Variable, ...]
  """All Variables in it and below."""
  forward: Cost | None
  backward: Cost | None
  """Of the forward and the backward pass together."""


def layers_of(
  model: Any,
  args: Sequence[Any],
  kwargs: dict[str, Any],
  *,
  method: str = "__call__",
  flops: tuple[bool, bool] = (True, True),
) -> list[Layer]:
  """The layers of a model, each before those below it, in the order of their calls.

  Args:
    model: a Module; its Variables may hold `jax.ShapeDtypeStruct`s.
    args: what it is called with: arrays, or their types. Without any argument nothing is called.
    kwargs: more of that.
    method: the name of the method that is called.
    flops: whether to count operations: of the forward pass, of forward and backward together.
  """
  seen = _Calls(method)
  costs: list[dict[str, Cost] | None] = [None, None]
  if (args or kwargs) and hasattr(type(model), method):
    forward = lambda model, *a, **k: _arrays_of(getattr(model, method)(*a, **k))
    staged = _staged(forward, model, args, kwargs, seen)
    paths = {"/".join(map(str, path)) for path in seen.inputs}
    if flops[0]:
      costs[0] = _costs(staged, paths)
    if flops[1]:
      costs[1] = _costs(_backward(forward, model, args, kwargs), paths)
  return _rows(model, seen, *costs)


class _Calls(Observer):
  """Sees what each Module is given and returns."""

  def __init__(self, method: str):
    super().__init__()
    self._methods = {"__call__", method}
    self.inputs: dict[Path, Any] = {}
    self.outputs: dict[Path, Any] = {}
    self.other: dict[Path, str] = {}
    """The first other method of a Module that was called."""
    self.count: dict[Path, int] = {}
    self.order: dict[Path, int] = {}

  def enter(self, call: Call, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    self.order.setdefault(call.path, len(self.order))
    if self._is_shown(call):
      self.count[call.path] = self.count.get(call.path, 0) + 1
      options = {k: x for k, x in kwargs.items() if x is not None}
      given = (*args, options) if options else args
      self.inputs.setdefault(call.path, _types(given[0] if len(given) == 1 else given))
    return args, kwargs

  def leave(self, call: Call, result: Any) -> Any:
    if self._is_shown(call):
      self.outputs.setdefault(call.path, _types(result))
    return result

  def _is_shown(self, call: Call) -> bool:
    """Whether it is the method that a model is called by, or the one of a Module that has none."""
    if call.method in self._methods:
      return True
    if callable(call.module):
      return False
    return self.other.setdefault(call.path, call.method) == call.method

  def sow(self, path: Path, variable_type: type, name: str, value: Any) -> bool:
    return True  # nothing is stored

  def perturb(self, path: Path, variable_type: type, name: str, value: Any) -> Any:
    return value


def _types(tree: Any) -> Any:
  """A pytree with the types of its arrays; of an object, its name."""

  def one(x: Any) -> Any:
    if isinstance(x, Variable):
      x = x.get_raw_value()
    if isinstance(x, Node):
      return type(x).__name__
    if hasattr(x, "shape") and hasattr(x, "dtype"):
      return jax.ShapeDtypeStruct(x.shape, x.dtype)
    return x

  return jax.tree.map(
    one, tree, is_leaf=lambda x: isinstance(x, Variable | Node | types.GeneratorType)
  )


def _staged(
  fn: Callable, model: Any, args: Sequence[Any], kwargs: dict[str, Any], observer: Any = None
) -> Staged:
  arguments = Arguments.of((model, *args), kwargs)
  complete = arguments.completing(fn)

  def call(model: Any, *args: Any, **kwargs: Any) -> Any:
    if observer is None:
      return complete(model, *args, **kwargs)
    with calls.observing(observer, model):
      return complete(model, *args, **kwargs)

  inputs = Inputs.of(arguments.args, arguments.kwargs)
  return Staged(call, inputs, [type_of(x) for x in inputs.leaves], is_final=observer is not None)


def type_of(leaf: Any) -> Any:
  """The shapes and dtypes of a leaf: an array, a Variable, or a type already."""

  def one(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
      return x
    if _jax.is_ref(x):
      return jax.ShapeDtypeStruct(x.shape, x.dtype)
    return _jax.type_struct(jax.typeof(x))

  return jax.tree.map(one, leaf.get_raw_value() if isinstance(leaf, Variable) else leaf)


def _arrays_of(out: Any) -> list[Any]:
  """All arrays in what a method returns, which may be a generator of more."""
  if isinstance(out, types.GeneratorType):
    return [x for part in out for x in _arrays_of(part)]
  is_leaf = lambda x: isinstance(x, Node | Variable | types.GeneratorType)
  leaves = jax.tree.leaves(out, is_leaf=is_leaf)
  found: list[Any] = []
  for x in leaves:
    if isinstance(x, types.GeneratorType):
      found += _arrays_of(x)
    elif isinstance(x, Variable):
      found += jax.tree.leaves(x.get_value())
    elif isinstance(x, jax.Array) and not _jax.is_ref(x):
      found.append(x)
  return found


def _backward(
  forward: Callable, model: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> Staged | None:
  """The gradient of the sum of all that a model returns; None if there is none."""

  def loss(model: Any, *args: Any, **kwargs: Any) -> Any:
    out = [x for x in forward(model, *args, **kwargs) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(jnp.sum(x.astype(jnp.float32)) for x in out)

  def call(model: Any, *args: Any, **kwargs: Any) -> Any:
    return grad(loss, wrt=Param)(model, *args, **kwargs)

  try:
    return _staged(call, model, args, kwargs)
  except Exception:  # a model that cannot be differentiated has a summary like any other
    return None


def _costs(staged: Staged | None, paths: set[str]) -> dict[str, Cost] | None:
  if staged is None:
    return None
  found = by_path(operations(opened(staged.pure)), paths)
  return with_all_below({path: cost for (path, _), cost in found.items()})


def _rows(
  model: Any, seen: _Calls, forward: dict[str, Cost] | None, both: dict[str, Cost] | None
) -> list[Layer]:
  """The layers by their tree, those that are called first before others."""
  nodes = _modules(model)
  place: dict[Path, tuple[int, int]] = {}
  for i, (path, _, _) in enumerate(nodes):
    for end in range(len(path) + 1):
      place.setdefault(path[:end], (len(seen.order), i))
  for path, n in seen.order.items():  # a parent is where the first of its children is called
    for end in range(len(path) + 1):
      if path[:end] in place:
        place[path[:end]] = min(place[path[:end]], (n, 0))
  place_of = {path for path, _, _ in nodes}
  order = lambda path: [place[path[: i + 1]] for i in range(len(path))]
  taken: set[int] = set()
  rows = []
  for path, node, same_as in sorted(nodes, key=lambda row: order(row[0])):
    name = "/".join(map(str, path))
    # In an object that is no Module, as a quantized weight is, they belong to the layer.
    is_own = lambda p, path=path: not any((*path, *p[:i]) in place_of for i in range(1, len(p)))
    own = tuple((p, v) for p, v in _variables(node) if is_own(p) and not _is_taken(v, taken))
    below = tuple(v for _, v in _variables(node))
    cost = lambda lot, name=name: None if lot is None else lot.get(name, Cost())
    rows.append(
      Layer(
        path=path,
        method=seen.other.get(path, ""),
        level=sum(path[:i] in place_of for i in range(len(path))),
        type=type(node).__name__,
        same_as=same_as,
        inputs=seen.inputs.get(path, ()),
        outputs=seen.outputs.get(path, ()),
        calls=seen.count.get(path, 0),
        variables=own,
        below=below,
        forward=cost(forward),
        backward=cost(both),
      )
    )
  return rows


def _modules(model: Any) -> list[tuple[Path, Any, Path | None]]:
  """(path, Module, the path where it was first) of each place of one; containers are left out."""
  found: list[tuple[Path, Any, Path | None]] = []
  owners: dict[int, Path] = {}
  open_: list[tuple[Path, Any]] = [((), model)]
  while open_:
    path, node = open_.pop()
    if isinstance(node, Module) and not (path and node._is_container):
      found.append((path, node, owners.get(id(node))))
    if id(node) in owners:
      continue
    owners[id(node)] = path
    children = [((*path, k), x) for k, x, is_data in node._entries() if is_data]
    open_ += reversed([(p, x) for p, x in children if isinstance(x, Node)])
  return found


def _variables(node: Any) -> list[tuple[Path, Variable]]:
  return [(path, x) for path, x in walk_graph(node) if isinstance(x, Variable)]


def _is_taken(variable: Variable, taken: set[int]) -> bool:
  key = identity(variable)
  is_known = key in taken
  taken.add(key)
  return is_known
