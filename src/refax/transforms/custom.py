"""nnx.custom_vjp: a function of objects with a derivative rule of the user's own."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from refax import _jax
from refax.core import storage
from refax.core.array_protocol import unwrap
from refax.core.graphdef import LEAF, GraphDef
from refax.core.rebuild import unflatten
from refax.core.variable import Variable
from refax.errors import MissingRuleError, TreeMismatchError
from refax.graph.split import state
from refax.graph.state import State, to_flat_state
from refax.transforms.dependence import NOTHING, Flow, Tangents
from refax.transforms.lift import Inputs, Outputs
from refax.transforms.loops import difference, leaf_indices, out_parts, signature
from refax.transforms.stage import Staged, read_closures, values_of
from refax.typing import path_str


class custom_vjp:
  """A function whose gradient the user defines, as `jax.custom_vjp`.

  Differentiated are arrays and lojax Variables (inside `nnx.grad`, the selected ones); all other
  state is read and written as in any function. `defvjp(fwd, bwd)` takes two functions:

  - `fwd(*args) -> (out, residuals)`, where `out` is what the function returns, and residuals may
    hold anything, Modules too;
  - `bwd(residuals, g) -> gradients`, a tuple with one for each argument: an array for an array, a
    State (or nested dicts) for a Module, with the Variables that have a gradient, None for zero.
    `g` has the form of `out`. With `nondiff_argnums`, these arguments come first.

  Args:
    fun: a function of Modules, Variables and arrays.
    nondiff_argnums: positions of arguments that are passed as they are.

  Raises:
    MissingRuleError: it is called before `defvjp`.
    TreeMismatchError: `fwd` does not return what the function returns and residuals, or `bwd` does
      not return a gradient for each argument.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> @nnx.custom_vjp
  ... def scale(model, x):
  ...   return model.kernel[0, 0] * x
  >>> scale.defvjp(
  ...   lambda model, x: (scale(model, x), (model.kernel[0, 0], x)),
  ...   lambda res, g: ({"kernel": jnp.full((1, 1), g * res[1])}, jnp.clip(g * res[0], -1, 1)),
  ... )
  >>> model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
  >>> float(nnx.grad(scale)(model, 5.0)["kernel"][0, 0])
  5.0
  """

  def __init__(self, fun: Callable, *, nondiff_argnums: Sequence[int] = ()):
    functools.update_wrapper(self, fun)
    self._fun = fun
    self._nondiff = tuple(nondiff_argnums)
    self._fwd: Callable | None = None
    self._bwd: Callable | None = None

  def defvjp(self, fwd: Callable, bwd: Callable) -> None:
    """Define the derivative: see the class."""
    self._fwd, self._bwd = fwd, bwd

  def __call__(self, *args: Any) -> Any:
    if self._fwd is None or self._bwd is None:
      raise MissingRuleError.vjp(getattr(self._fun, "__name__", "the function"))
    fixed = {range(len(args))[n]: args[range(len(args))[n]] for n in self._nondiff}
    bind = lambda f: lambda *inner: f(*(fixed.get(i, x) for i, x in enumerate(inner)))
    inputs = Inputs.of(tuple(None if i in fixed else x for i, x in enumerate(args)), {})
    bwd = functools.partial(self._bwd, *fixed.values())
    call = _Call(bind(self._fun), bind(self._fwd), bwd, inputs, args, set(fixed))
    return call.run()


_MOVING = "what has a gradient"


class _Call:
  """One call. `fwd` is traced when it is needed: it may call the function itself."""

  def __init__(
    self,
    fun: Callable,
    fwd: Callable,
    bwd: Callable,
    inputs: Inputs,
    args: tuple,
    fixed: set[int],
  ):
    self.inputs, self.args, self.fixed, self.bwd = inputs, args, fixed, bwd
    self._fwd = fwd
    self.fwd: Any = None  # staged when a derivative is taken
    self.values = values_of(inputs)
    self.count = len(self.values)
    self.fun = Staged(fun, inputs, self.values)
    self.written = sorted(self.fun.written)
    self.closures_written = sorted(self.fun.closures_written)
    self.diff = [i for i in range(self.count) if self._is_differentiable(i)]
    self.out = self.fun.outputs.spec.graphdef.root

  def _is_differentiable(self, index: int) -> bool:
    leaf = self.inputs.leaves[index]
    leaves = jax.tree.leaves(self.values[index])
    hijax = isinstance(leaf, Variable) and leaf.is_hijax
    return not hijax and all(jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves)

  def _stage_fwd(self, values: list[Any]) -> None:
    """Trace `fwd`, and pair the results of `fun` with the first half of what it returns."""
    self.fwd = Staged(self._fwd, self.inputs, values)
    if not (self.fwd.written <= self.fun.written):
      raise TreeMismatchError.rule("fwd", "the state that the function writes", "more of it")
    graph, fwd_graph = self.fun.outputs.spec.graphdef, self.fwd.outputs.spec.graphdef
    parts = out_parts((0, 0), fwd_graph.root, "what fwd returns")
    (_, out), (_, self.residuals) = parts
    was, now = signature(self.out, graph), signature(out, fwd_graph)
    if was != now:
      raise TreeMismatchError.rule("fwd", *difference(was, now))
    self.pairs = list(zip(leaf_indices(self.out, graph), leaf_indices(out, fwd_graph), strict=True))
    if len({i for i, _ in self.pairs if i >= self.count}) != len(self.fun.outputs.fresh):
      raise TreeMismatchError.rule("the function", "arguments as they are", "new attributes")

  def run(self) -> Any:
    refs, closures = read_closures([self.fun])
    diff = {i: self.values[i] for i in self.diff}
    rest = {i: v for i, v in enumerate(self.values) if i not in diff}
    primal = jax.custom_vjp(lambda diff, rest, closures: self._run(self.fun, diff, rest, closures))
    primal.defvjp(self._forward, self._backward)
    fresh, written, after = primal(diff, rest, closures)
    if not _jax.no_trace_active():
      written, after = self._without_zeros(written, after)
    spec = self.fun.outputs.spec._replace(written=tuple(self.written))
    return self.inputs.commit(Outputs(written, fresh, spec), refs, after)

  def _without_zeros(self, written: Sequence[Any], after: dict[int, Any]) -> tuple[list, dict]:
    """What is written, without gradients where it depends on nothing that has one.

    For all that a `jax.custom_vjp` returns, JAX has a gradient: then a Ref refuses it.
    """
    moving, moving_closures = self._dependent(self.fun)
    if self.fwd is not None:
      more, more_closures = self._dependent(self.fwd)
      moving, moving_closures = moving | more, moving_closures | more_closures
    free = lambda x: jax.tree.map(jax.lax.stop_gradient, x)
    values = [x if i in moving else free(x) for i, x in zip(self.written, written, strict=True)]
    kept = {k: self._storable(k, x) if k in moving_closures else free(x) for k, x in after.items()}
    return values, kept

  def _storable(self, key: int, x: jax.Array) -> jax.Array:
    """What is written to a Ref by closure; refused where a gradient would be lost, as elsewhere."""
    variable = self.fun.closure_variable(key)
    origin = "a Variable that came by closure" if variable is None else variable._def.origin
    detached = variable is not None and variable.drops_gradients
    return storage.stored(x, origin, detached=detached, hijax=True)

  def _dependent(self, staged: Staged) -> tuple[set[int], set[int]]:
    """Which leaves and closures are written with values that depend on what has a gradient."""
    flows, moves = [], Flow(computed=frozenset([_MOVING]))
    for i, tree in enumerate(map(jax.tree.structure, self.values)):
      flows += [moves if i in self.diff else NOTHING] * tree.num_leaves
    flows += [NOTHING] * len(staged.closures)
    results = Tangents().run(staged.pure.jaxpr, staged.pure.consts, flows)
    leaves, closures = staged.finals_of(results)
    moving = {i for i, found in leaves.items() if any(_MOVING in flow.all for flow in found)}
    return moving, {key for key, flow in closures.items() if _MOVING in flow.all}

  def _run(self, staged: Staged, diff: dict, rest: dict, closures: dict) -> tuple:
    values = [diff.get(i, rest.get(i)) for i in range(self.count)]
    result = staged.run(
      values, closures, written=self.written, closures_written=self.closures_written
    )
    return result.outputs.fresh, result.outputs.written, result.closures

  def _forward(self, diff: dict, rest: dict, closures: dict) -> tuple:
    self._stage_fwd([diff.get(i, rest.get(i)) for i in range(self.count)])
    closures = read_closures([self.fwd])[1] | closures
    fresh, written, after = self._run(self.fwd, diff, rest, closures)
    order = {i: j for i, j in self.pairs if i >= self.count}
    out = tuple(fresh[order[i] - self.count] for i in sorted(order))
    current = diff | rest | dict(zip(self.written, written, strict=True))
    needed = {
      j: current[j] if j < self.count else unwrap(fresh[j - self.count])
      for j in set(leaf_indices(self.residuals, self.fwd.outputs.spec.graphdef))
    }
    return (out, written, after), (needed, diff)

  def _backward(self, saved: tuple, cotangents: tuple) -> tuple:
    needed, diff = saved
    fresh, written, _ = cotangents
    by_index = dict(zip(self.written, written, strict=True))
    by_index |= {self.count + i: unwrap(g) for i, g in enumerate(fresh)}
    residuals = self._rebuild(self.residuals, self.fwd, needed)
    grads = self.bwd(residuals, self._rebuild(self.out, self.fun, by_index))
    return self._gradients(grads, diff), None, None

  def _rebuild(self, entry: tuple, staged: Staged, values: dict[int, Any]) -> Any:
    """The object that an entry describes, with lojax Variables on these values."""
    graph = staged.outputs.spec.graphdef
    templates = [*self.inputs.leaves, *staged.outputs.fresh]
    leaves = [
      x._handle(values.get(i), x._def.elsewhere()) if isinstance(x, Variable) else values.get(i)
      for i, x in enumerate(templates)
    ]
    part = GraphDef(entry, graph.nodes, graph.leaf_count, origins=graph.origins)
    return unflatten(part, leaves)[0]

  def _gradients(self, grads: Any, diff: dict[int, Any]) -> dict[int, Any]:
    """The cotangent of each differentiable leaf, from what `bwd` returned."""
    args = [i for i in range(len(self.args)) if i not in self.fixed]
    if not isinstance(grads, tuple | list) or len(grads) != len(args):
      got = f"{len(grads)} gradients" if isinstance(grads, tuple | list) else type(grads).__name__
      raise TreeMismatchError.rule("bwd", f"a tuple of {len(args)} gradients", got)
    found: dict[int, Any] = {}
    for i, grad in zip(args, grads, strict=True):
      given = self._given(grad)
      for path, entry in self.inputs.graphdef.walk(self.inputs.arguments[i]):
        if entry[0] == LEAF and path in given:
          found.setdefault(entry[1], given.pop(path))
      if given:
        path = path_str(next(iter(given)))
        raise TreeMismatchError.rule("bwd", f"gradients for argument {i}", f"one for {path}")
    zeros = {i: jax.tree.map(jnp.zeros_like, v) for i, v in diff.items() if i not in found}
    like = lambda v, g: jax.tree.map(
      lambda a, b: jnp.asarray(b, a.dtype).reshape(jnp.shape(a)), v, g
    )
    return zeros | {i: like(diff[i], g) for i, g in found.items() if i in diff}

  def _given(self, grad: Any) -> dict[tuple, Any]:
    """The values of a gradient by path; a plain value has the empty path."""
    if grad is None:
      return {}
    if isinstance(grad, Variable) or not isinstance(grad, State | dict):
      nodes = not isinstance(grad, Variable | jax.Array) and hasattr(grad, "_pytree")
      if not nodes:
        return {(): unwrap(grad)}
      grad = state(grad)
    return {path: unwrap(x) for path, x in to_flat_state(grad)}
