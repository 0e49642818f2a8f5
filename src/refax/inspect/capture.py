"""nnx.capture: what the Modules in a function compute, by path, without touching the model.

While the function is traced, what the chosen methods are given and return is tapped
(`refax.transforms.taps`), and the trace is evaluated so that the taps are results too. So it
reaches through every transform that keeps its jaxpr, plain JAX's included.
"""

import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from refax import _jax
from refax.core import calls
from refax.core.calls import Call
from refax.core.filters import Filter
from refax.core.node import Node
from refax.core.variable import Intermediate, Variable
from refax.errors import CaptureError
from refax.graph.state import State, from_flat_state
from refax.inspect.choice import Choice, check_there
from refax.inspect.target import Arguments, like, owner_and_function
from refax.transforms.jit import jit
from refax.transforms.lift import Inputs
from refax.transforms.stage import Staged, read_closures, values_of, write_closures
from refax.transforms.taps import Found, Label, Look, evaluate, is_tap, tap, unreached
from refax.typing import Path


def capture(
  fn: Callable,
  *which: Filter,
  methods: str | Sequence[str] = "__call__",
  inputs: bool = False,
  gradients: bool = False,
) -> Callable[..., Any]:
  """A function that also returns what Modules inside it have computed.

  The model stays as it is. The function is compiled; it may be compiled already, differentiate,
  and use any transform. State that it writes is written.

  Args:
    fn: a Module, or a function of Modules and arrays.
    *which: the Modules of interest, those that match one of these; by default all. A type of
      Module; a path such as `"encoder/layers/*"`, where `*` stands for any one step and `**` for
      any number; a predicate `(path, module) -> bool`. A type of Variable chooses what is sown
      in Variables of that type.
    methods: the names of the methods whose results are kept.
    inputs: whether to keep what the methods are given, too: `(args, kwargs)`.
    gradients: whether to keep the gradients of the results, where `fn` computes gradients.

  Returns:
    A function like `fn` that returns `(result, State)`. The State has for each Module, by its
    path, `__call__` (or the name of the method): a tuple with the result of each call; then
    `__call__.inputs` and `__call__.gradient`. What was computed in a loop over layers, under
    `jax.vmap` or in `nnx.scan` is stacked along the first axis.

  Raises:
    FilterError: no Module is at such a path.
    CaptureError: something of interest is in a part of the function that cannot hand it out.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> rngs = nnx.Rngs(0)
  >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.relu, nnx.Linear(3, 1, rngs=rngs))
  >>> y, kept = nnx.capture(model, nnx.Linear)(jnp.ones((4, 2)))
  >>> kept["layers"][0]["__call__"][0].shape
  (4, 3)
  """
  wanted = (methods,) if isinstance(methods, str) else tuple(methods)
  observer = _Taps(Choice.of(which), wanted, inputs, gradients)
  owner, function = owner_and_function(fn)
  compiled: dict[Hashable, Callable] = {}

  def wrapper(*args: Any, **kwargs: Any) -> Any:
    check_there(which, owner or (*args, *kwargs.values()), is_root=bool(owner))
    arguments = Arguments.of((*owner, *args), kwargs)
    run = functools.partial(_captured, arguments.completing(function), observer, bool(owner))
    if _jax.no_trace_active():
      run = compiled.setdefault(arguments.constants, jit(run))
    return run(arguments.args, arguments.kwargs)

  return like(fn, wrapper)


class _Key(NamedTuple):
  """What is tapped: one array of what a method is given or returns."""

  path: Path
  call: int
  """A number for each call that was traced."""
  tree: Any
  leaf: int


class _Taps:
  """Taps what chosen methods are given and return."""

  def __init__(self, choice: Choice, methods: tuple[str, ...], inputs: bool, gradients: bool):
    self._choice, self._methods = choice, methods
    self._inputs, self._gradients = inputs, gradients
    self._calls = itertools.count()
    self.key = ("capture", choice, methods, inputs, gradients)

  def enter(self, call: Call, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if not (self._inputs and self._is_chosen(call)):
      return args, kwargs
    return self._tapped((*call.path, f"{call.method}.inputs"), (args, kwargs), gradients=False)

  def leave(self, call: Call, result: Any) -> Any:
    if not self._is_chosen(call):
      return result
    return self._tapped((*call.path, call.method), result, gradients=self._gradients)

  def sow(self, path: Path, variable_type: type[Variable], name: str, value: Any) -> bool:
    if self._choice.has_type(variable_type):
      self._tapped((*path, name), value, gradients=False)
    return True  # the model stays as it is

  def _is_chosen(self, call: Call) -> bool:
    return call.method in self._methods and self._choice.has(call.path, call.module)

  def _tapped(self, path: Path, value: Any, *, gradients: bool) -> Any:
    leaves, tree = jax.tree.flatten(value, is_leaf=lambda x: isinstance(x, Node | Variable))
    number, arrays = next(self._calls), [_is_array(x) for x in leaves]
    shown = jax.tree.structure(jax.tree.unflatten(tree, [0 if a else None for a in arrays]))
    index = itertools.count()
    tapped = [
      tap(x, Label(_Key(path, number, shown, next(index)), has_gradient=gradients)) if a else x
      for x, a in zip(leaves, arrays, strict=True)
    ]
    return jax.tree.unflatten(tree, tapped)


def _is_array(x: Any) -> bool:
  return isinstance(x, jax.Array | np.ndarray) and not _jax.is_ref(x)


def _find(eqn: Any, _: Any, results: list[Any]) -> list[Found]:
  label = eqn.params["label"]
  return [] if label.kind == "tangent" else [Found((label.key, label.kind), results[0])]


def _captured(
  fn: Callable, observer: _Taps, is_of_first: bool, args: tuple, kwargs: dict[str, Any]
) -> Any:
  """The result and what was kept; paths count from the first argument, or from what is known."""

  def call(*args: Any, **kwargs: Any) -> Any:
    with calls.observing(observer, args[0] if is_of_first else None):
      return fn(*args, **kwargs)

  inputs = Inputs.of(args, kwargs)
  staged = Staged(call, inputs, values_of(inputs))
  refs, closures = read_closures([staged])
  result, found = staged.run_with(_evaluated, values_of(inputs), closures)
  write_closures(refs, result.closures)
  return inputs.commit(result.outputs), _state_of(found)


def _evaluated(closed: Any, flat: list[Any]) -> tuple[list[Any], list[Found]]:
  look = Look(_find, is_tap, enters_custom=True)
  missed = unreached(closed, look)
  if missed:
    raise CaptureError.unreached(missed)
  return evaluate(closed, flat, look)


def _state_of(found: list[Found]) -> State:
  """What was found, by path: a tuple of the values of all calls."""
  calls_: dict[tuple[Path, str], list[tuple[_Key, dict[int, Any]]]] = {}
  for (key, kind), value, _ in found:
    lot = calls_.setdefault((key.path, kind), [])
    if not lot or lot[-1][0][:3] != key[:3] or key.leaf in lot[-1][1]:
      at = [x for x in lot if x[0][:3] == key[:3] and key.leaf not in x[1]]
      if not at:
        lot.append((key, {}))
    mine = next(x for x in reversed(lot) if x[0][:3] == key[:3])
    mine[1][key.leaf] = value
  flat = {}
  for (path, kind), lot in calls_.items():
    *above, name = path
    last = f"{name}.gradient" if kind == "gradient" else name
    values = tuple(
      jax.tree.unflatten(key.tree, [leaves.get(i) for i in range(key.tree.num_leaves)])
      for key, leaves in lot
    )
    flat[(*above, last)] = Intermediate(values, is_hijax=False)
  return from_flat_state(flat)
