"""nnx.capture: what the Modules in a function compute, by path, without touching the model.

While the function is traced, what the chosen methods are given and return is tapped
(`refax.transforms.taps`), and the trace is evaluated so that the taps are results too. So it
reaches through every transform that keeps its jaxpr, plain JAX's included.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax

from refax import _jax
from refax.core import calls
from refax.core.calls import Call, Observer
from refax.core.filters import Filter
from refax.core.node import Node
from refax.core.variable import Intermediate, Variable
from refax.errors import CaptureError
from refax.graph.state import State, from_flat_state, to_flat_state
from refax.inspect.choice import Choice, Presence
from refax.inspect.target import Arguments, Compiled, like, owner_and_function
from refax.transforms.jit import jit
from refax.transforms.lift import Inputs
from refax.transforms.stage import Staged, read_closures, values_of
from refax.transforms.taps import Found, Label, Look, evaluate, is_tap, tap, unreached
from refax.typing import Path


def capture(
  fn: Callable,
  *which: Filter,
  methods: str | Sequence[str] = "__call__",
  inputs: bool = False,
  gradients: bool = False,
  init: State | None = None,
  method_outputs: type[Variable] | None = None,
) -> Callable[..., Any]:
  """A function that also returns what Modules inside it have computed.

  The model stays as it is. The function is compiled; it may be compiled already, differentiate,
  and use any transform. State that it writes is written.

  Args:
    fn: a Module, or a function of Modules and arrays; or, for a decorator, the first of `which`,
      a type of Variable.
    *which: the Modules of interest, those that match one of these; by default all. A type of
      Module; a path such as `"encoder/layers/*"`, where `*` stands for any one step and `**` for
      any number; a predicate `(path, module) -> bool`. A type of Variable chooses what is sown
      or perturbed in Variables of that type.
    methods: the names of the methods whose results are kept.
    inputs: whether to keep what the methods are given, too: `(args, kwargs)`.
    gradients: whether to keep the gradients of what is kept, where `fn` computes gradients.
    init: perturbations by path: each is added to what a Module perturbs under that name.
    method_outputs: a type of Variable; the results of all methods are kept in Variables of it.

  Returns:
    A function like `fn` that returns `(result, State)`. The State has for each Module, by its
    path, `__call__` (or the name of the method): a tuple with the result of each call; then
    `__call__.inputs` and `__call__.gradient`. Where several types of Variables are chosen, there
    is a State for each. What was computed in a loop over layers, under
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
  if isinstance(fn, type) and issubclass(fn, Variable):
    return lambda decorated: capture(
      decorated,
      fn,
      *which,
      methods=methods,
      inputs=inputs,
      gradients=gradients,
      init=init,
      method_outputs=method_outputs,
    )
  wanted = (methods,) if isinstance(methods, str) else tuple(methods)
  choice = Choice.of(which if method_outputs is None else (..., *which))
  methods_of = wanted if method_outputs is None else None
  observer = _Taps(choice, methods_of, inputs, gradients, method_outputs or Intermediate)
  owner, function = owner_and_function(fn)
  added = {} if init is None else {path: x.get_value() for path, x in to_flat_state(init)}
  presence, compiled = Presence(which, is_root=bool(owner)), Compiled()

  def wrapper(*args: Any, **kwargs: Any) -> Any:
    presence.check(owner or (*args, *kwargs.values()))
    arguments = Arguments.of((*owner, *args), kwargs)
    complete, is_eager = arguments.completing(function), _jax.no_trace_active()
    run = functools.partial(_captured, complete, observer, bool(owner), is_eager)
    if is_eager:
      run = compiled.of(arguments, functools.partial(jit, run))
    result, states = run(arguments.args, arguments.kwargs, added)
    return (result, *states)

  return like(fn, wrapper)


class _Key(NamedTuple):
  """What is tapped: what a method is given or returns."""

  owner: Hashable
  """Of which capture it is, where one is inside another."""
  path: Path
  type: type[Variable]
  tree: Any


class _Taps(Observer):
  """Taps what chosen methods are given and return, and what is sown.

  Args:
    choice: the Modules, and the types of Variables.
    methods: the names of the methods; all of them if None.
    inputs: whether to tap what they are given.
    gradients: whether to tap gradients.
    kind: the type of Variable for what methods are given and return.
  """

  def __init__(
    self,
    choice: Choice,
    methods: tuple[str, ...] | None,
    inputs: bool,
    gradients: bool,
    kind: type[Variable],
  ):
    super().__init__(("capture", choice, methods, inputs, gradients, kind))
    self._choice, self._methods, self._kind = choice, methods, kind
    self._inputs, self._gradients = inputs, gradients
    self.tapped: set[tuple[Path, type[Variable]]] = set()
    """What was tapped in the trace of now."""
    self.added: dict[Path, Any] = {}
    """What is added to the values that Modules perturb, in the trace of now."""
    self.types = tuple(dict.fromkeys((*choice.types, *([kind] if choice.has_modules else []))))

  def enter(self, call: Call, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if not (self._inputs and self._is_chosen(call)):
      return args, kwargs
    path = (*call.path, f"{call.method}.inputs")
    return self._tapped(path, self._kind, (args, kwargs), gradients=False)

  def leave(self, call: Call, result: Any) -> Any:
    if not self._is_chosen(call):
      return result
    path = (*call.path, call.method)
    return self._tapped(path, self._kind, result, gradients=self._gradients)

  def sow(self, path: Path, variable_type: type[Variable], name: str, value: Any) -> bool:
    if self._choice.has_type(variable_type):
      self._tapped((*path, name), variable_type, value, gradients=False)
    return True  # the model stays as it is

  def perturb(self, path: Path, variable_type: type[Variable], name: str, value: Any) -> Any:
    more = self.added.get((*path, name))
    if more is not None:
      value = jax.tree.map(jax.numpy.add, more, value)
    if not self._choice.has_type(variable_type):
      return value
    return self._tapped((*path, name), variable_type, value, gradients=self._gradients)

  def _is_chosen(self, call: Call) -> bool:
    is_method = self._methods is None or call.method in self._methods
    return is_method and self._choice.has(call.path, call.module)

  def _tapped(self, path: Path, kind: type[Variable], value: Any, *, gradients: bool) -> Any:
    leaves, tree = jax.tree.flatten(value, is_leaf=lambda x: isinstance(x, Node | Variable))
    places = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array) and not _jax.is_ref(x)]
    if not places:
      return value
    shown = jax.tree.structure(
      jax.tree.unflatten(tree, [0 if i in places else None for i in range(len(leaves))])
    )
    self.tapped.add((path, kind))
    label = Label(_Key(self.key, path, kind, shown), has_gradient=gradients)
    for i, x in zip(places, tap([leaves[i] for i in places], label), strict=True):
      leaves[i] = x
    return jax.tree.unflatten(tree, leaves)


def _captured(
  fn: Callable,
  observer: _Taps,
  is_of_first: bool,
  is_final: bool,
  args: tuple,
  kwargs: dict[str, Any],
  added: dict[Path, Any],
) -> tuple[Any, list[State]]:
  """The result and what was kept; paths count from the first argument, or from what is known."""
  paths = list(added)

  def call(args: tuple, kwargs: dict[str, Any], more: list[Any]) -> Any:
    observer.added = dict(zip(paths, more, strict=True))
    try:
      with calls.observing(observer, args[0] if is_of_first else None):
        return fn(*args, **kwargs)
    finally:
      observer.added = {}

  observer.tapped.clear()
  inputs = Inputs.of((args, kwargs, list(added.values())), {})
  staged = Staged(call, inputs, values_of(inputs))
  refs, closures = read_closures([staged])
  evaluated = functools.partial(_evaluated, observer, is_final)
  result, found = staged.run_with(evaluated, values_of(inputs), closures)
  states = [_state_of([f for f in found if f.key[0].type is kind]) for kind in observer.types]
  return inputs.commit(result.outputs, refs, result.closures), states


def _evaluated(
  observer: _Taps, is_final: bool, closed: Any, flat: list[Any]
) -> tuple[list[Any], list[Found]]:
  """The results, and what this observer has tapped.

  Functions with derivatives of their own are entered where nothing differentiates them any more.
  """

  def find(eqn: Any, _: Any, results: list[Any]) -> list[Found]:
    label = eqn.params["label"]
    return [Found((label.key, label.kind, label.which), results)]

  def is_wanted(eqn: Any) -> bool:
    return is_tap(eqn) and eqn.params["label"].key.owner == observer.key

  look = Look(find, is_wanted, enters_custom=is_final)
  missed = unreached(closed, look)
  if missed:
    raise CaptureError.unreached(missed)
  results, found = evaluate(closed, flat, look)
  found = [f for f in found if f.key[1] != "tangent"]
  lost = observer.tapped - {(f.key[0].path, f.key[0].type) for f in found}
  if lost:
    raise CaptureError.lost(sorted("/".join(map(str, path)) for path, _ in lost))
  return results, found


def _state_of(found: list[Found]) -> State:
  """What was found, by path: a tuple of the values of all calls, in their order."""
  lots: dict[Path, list[Any]] = {}
  kinds: dict[Path, type[Variable]] = {}
  for (key, kind, which), values, _ in found:
    *above, name = key.path
    is_gradient = kind == "gradient"
    path = (*above, f"{name}.gradient" if is_gradient else name)
    places = which if is_gradient else range(len(values))
    leaves = dict(zip(places, values, strict=True))
    value = jax.tree.unflatten(key.tree, [leaves.get(i) for i in range(key.tree.num_leaves)])
    lot, kinds[path] = lots.setdefault(path, []), key.type
    lot.insert(0 if is_gradient else len(lot), value)  # the backward pass begins with the last call
  return from_flat_state(
    {path: kinds[path](tuple(lot), is_hijax=False) for path, lot in lots.items()}
  )
