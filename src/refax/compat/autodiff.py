"""grad, vjp, jvp and custom_vjp as Flax NNX calls them.

In Flax, a State or a Variable that is an argument is differentiated as a whole, tree mode gives
gradients in the form of the argument, and `bwd` of a custom_vjp gets a pair.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from refax.compat.flags import set_graph_mode, set_graph_updates
from refax.compat.signature import positional
from refax.core.flatten import flatten
from refax.core.node import Node
from refax.core.rebuild import unflatten
from refax.core.variable import Variable
from refax.graph.split import state
from refax.graph.state import State, from_flat_state, to_flat_state
from refax.transforms import autodiff
from refax.transforms import custom as custom_module
from refax.transforms.autodiff import DiffState
from refax.typing import Path


def is_tree_mode(graph: bool | None, graph_updates: bool | None) -> bool:
  """Whether gradients have the form of their arguments."""
  graph = set_graph_mode.current_value() if graph is None else graph
  updates = set_graph_updates.current_value() if graph_updates is None else graph_updates
  return not (graph and updates)


def grad(f: Callable[..., Any] | None = None, **options: Any) -> Any:
  """`nnx.grad`; a State among the arguments is differentiated as a whole.

  >>> from refax.compat import nnx
  >>> graphdef, stats = nnx.split(nnx.Dict(a=nnx.BatchStat(3.0)))
  >>> float(nnx.grad(lambda s: nnx.merge(graphdef, s).a[...] ** 2)(stats)["a"])
  6.0
  """
  return _differentiated(autodiff.grad, f, options)


def value_and_grad(f: Callable[..., Any] | None = None, **options: Any) -> Any:
  """`nnx.value_and_grad`; a State among the arguments is differentiated as a whole.

  >>> from refax.compat import nnx
  >>> value, grads = nnx.value_and_grad(lambda s: s["a"] ** 2)(nnx.State({"a": nnx.BatchStat(3.0)}))
  >>> float(value), float(grads["a"])
  (9.0, 6.0)
  """
  return _differentiated(autodiff.value_and_grad, f, options)


def _differentiated(transform: Any, f: Any, options: dict[str, Any]) -> Any:
  if f is None:
    return functools.partial(_differentiated, transform, options=options)
  options = dict(options)
  options.pop("reduce_axes", None)
  tree = is_tree_mode(options.pop("graph", None), options.pop("graph_updates", None))
  argnums = options.pop("argnums", 0)
  single = isinstance(argnums, int | DiffState)

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    if not all(isinstance(n, DiffState) or -len(args) <= n < len(args) for n in _all(argnums)):
      args, kwargs = positional(f, args, kwargs), {}
    cases = tuple(_case(n, args, tree) for n in _all(argnums))
    call = transform(f, argnums=cases[0] if single else cases, **options)
    out = call(*args, **kwargs)
    if not tree:
      return out
    whole = transform is autodiff.value_and_grad or options.get("has_aux", False)
    value, grads = out if whole else (None, out)
    if transform is autodiff.grad and whole:
      grads, value = out
    given = [args[c.argnum if isinstance(c, DiffState) else c] for c in cases]
    shaped = tuple(map(_like, given, (grads,) if single else grads))
    grads = shaped[0] if single else shaped
    if not whole:
      return grads
    return (value, grads) if transform is autodiff.value_and_grad else (grads, value)

  return wrapper


def _all(argnums: Any) -> tuple:
  return (argnums,) if isinstance(argnums, int | DiffState) else tuple(argnums)


def _case(argnum: Any, args: tuple, tree: bool) -> Any:
  if isinstance(argnum, DiffState) or not (tree or isinstance(args[argnum], State)):
    return argnum
  return DiffState(argnum, differentiable)


def differentiable(path: Path, x: Any) -> bool:
  """Whether a Variable or array is of floating-point or complex numbers."""
  cells = jax.tree.leaves(x.get_raw_value() if isinstance(x, Variable) else x)
  return bool(cells) and all(jnp.issubdtype(jnp.result_type(c), jnp.inexact) for c in cells)


def _like(arg: Any, grads: Any) -> Any:
  """Gradients in the form of an argument: Modules for Modules."""
  if isinstance(arg, Node):
    return _node_like(arg, grads)
  if isinstance(arg, State | Variable | jax.Array):
    return grads
  is_leaf = lambda x: isinstance(x, Node | Variable)
  return jax.tree.map(
    lambda x, g: _node_like(x, g) if isinstance(x, Node) else g, arg, grads, is_leaf=is_leaf
  )


def _node_like(node: Node, grads: Any) -> Any:
  flat = flatten(node)
  found = dict(to_flat_state(grads)) if isinstance(grads, State) else {}
  leaves = [
    found.get(path, _zero(leaf))
    for path, leaf in zip(flat.graphdef.paths, flat.leaves, strict=True)
  ]
  return unflatten(flat.graphdef, leaves)[0]


def _zero(leaf: Any) -> Any:
  def zeros(x: Any) -> Any:
    inexact = jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    return jnp.zeros_like(x) if inexact else jnp.zeros(jnp.shape(x), jax.dtypes.float0)

  if not isinstance(leaf, Variable):
    return zeros(leaf)
  return leaf._handle(jax.tree.map(zeros, leaf.get_value()), leaf._def.as_gradient())


def vjp(f: Callable[..., Any] | None = None, *primals: Any, **options: Any) -> Any:
  """`nnx.vjp`, with gradients in the form of the arguments; without primals, a decorator.

  >>> from refax.compat import nnx
  >>> y, pull = nnx.vjp(lambda m: m.a[...] ** 2, nnx.Dict(a=nnx.Param(3.0)))
  >>> float(pull(1.0)[0].a)
  6.0
  """
  if f is None or not primals:
    return functools.partial(vjp, **options) if f is None else functools.partial(vjp, f, **options)
  options = _without(options, "reduce_axes", "graph", "graph_updates")
  out = autodiff.vjp(f, *primals, wrt=differentiable, **options)
  pull = lambda cotangent: tuple(map(_like, primals, out[1](cotangent)))
  return (out[0], pull, *out[2:])


def jvp(
  f: Callable[..., Any] | None = None, primals: Any = None, tangents: Any = None, **options: Any
):
  """`nnx.jvp`, with tangents in the form of the arguments; without primals, a decorator.

  >>> from refax.compat import nnx
  >>> m = nnx.Dict(a=nnx.Param(3.0))
  >>> float(nnx.jvp(lambda m: m.a[...] ** 2, (m,), (nnx.Dict(a=nnx.Param(1.0)),))[1])
  6.0
  """
  if f is None or primals is None:
    return functools.partial(jvp, **options) if f is None else functools.partial(jvp, f, **options)
  options = _without(options, "graph", "graph_updates")
  given = tuple(jax.tree.map(_tangent, t, is_leaf=lambda x: isinstance(x, Node)) for t in tangents)
  return autodiff.jvp(f, primals, given, wrt=differentiable, **options)


def _tangent(x: Any) -> Any:
  if not isinstance(x, Node):
    return x
  pairs = [(path, leaf) for path, leaf in to_flat_state(state(x)) if differentiable(path, leaf)]
  return from_flat_state(pairs)


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
  return {k: v for k, v in options.items() if k not in names}


class _CustomVJP:
  """A function with a derivative of its own, whose `bwd` is called as Flax does."""

  def __init__(self, fun: Callable[..., Any], nondiff_argnums: tuple, tree: bool):
    functools.update_wrapper(self, fun)
    self._fun, self._nondiff, self._tree = fun, nondiff_argnums, tree
    self._rules: tuple | None = None

  def defvjp(self, fwd: Any, bwd: Any, symbolic_zeros: bool = False) -> None:
    """Define the derivative: `bwd(residuals, (input_gradients, g))`; in tree mode, with `g`."""
    if "updates_g" in inspect.signature(bwd).parameters:
      raise TypeError(
        "bwd of nnx.custom_vjp gets no updates_g: state that the function writes has no gradient\n"
        "  fix: return what is to have a gradient"
      )
    self._rules = (fwd, bwd)

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    args = positional(self._fun, args, kwargs)
    fixed = sorted({range(len(args))[n] for n in self._nondiff})
    plain = [i for i in fixed if not _holds_objects(args[i])]
    function = custom_module.custom_vjp(self._fun, nondiff_argnums=plain)
    if self._rules is not None:
      fwd, bwd = self._rules
      backward = _Backward(bwd, args, fixed, self._tree)
      function.defvjp(fwd, lambda *given: backward(plain, *given))
    return function(*args)


class _Backward:
  """Flax's way to call a user's `bwd`, in Refax's."""

  def __init__(self, bwd: Callable[..., Any], args: tuple, fixed: list[int], tree: bool):
    self._bwd, self._args, self._fixed, self._tree = bwd, args, fixed, tree

  def __call__(self, plain: list[int], *given: Any) -> Any:
    residuals, g = given[len(plain) :]
    others = [i for i in range(len(self._args)) if i not in self._fixed]
    if not self._tree:
      g = tuple(_zeros_of(self._args[i]) for i in others), g
    grads = self._bwd(*(self._args[i] for i in self._fixed), residuals, g)
    found = dict(zip(others, map(_of_floats, grads), strict=True))
    return tuple(found.get(i) for i in range(len(self._args)) if i not in plain)


def _holds_objects(x: Any) -> bool:
  is_object = lambda x: isinstance(x, Node | Variable)
  return any(map(is_object, jax.tree.leaves(x, is_leaf=is_object)))


def _of_floats(x: Any) -> Any:
  return _tangent(x) if isinstance(x, Node) else _inexact(x)


def _zeros_of(x: Any) -> Any:
  """For a Module, a State of zeros with the paths of its Variables; None for anything else."""
  if not isinstance(x, Node):
    return None
  return from_flat_state((path, _zero(leaf)) for path, leaf in to_flat_state(state(x)))


def _inexact(grads: Any) -> Any:
  if not isinstance(grads, State):
    return grads
  return from_flat_state((p, x) for p, x in to_flat_state(grads) if differentiable(p, x))


def custom_vjp(
  fun: Any = None, *, nondiff_argnums: Any = (), graph: Any = None, graph_updates: Any = None
):
  """`nnx.custom_vjp`; `bwd` gets `(input_gradients, g)`, with a State of zeros for each Module.

  >>> from refax.compat import nnx
  >>> @nnx.custom_vjp
  ... def double(m):
  ...   return 2 * m.a[...]
  >>> def bwd(res, g):
  ...   (m_g,), out_g = g
  ...   m_g["a"][...] = 10 * out_g
  ...   return (m_g,)
  >>> double.defvjp(lambda m: (double(m), None), bwd)
  >>> float(nnx.grad(double)(nnx.Dict(a=nnx.Param(3.0)))["a"])
  10.0
  """
  if fun is None:
    flags = {"graph": graph, "graph_updates": graph_updates}
    return functools.partial(custom_vjp, nondiff_argnums=nondiff_argnums, **flags)
  numbers = (nondiff_argnums,) if isinstance(nondiff_argnums, int) else tuple(nondiff_argnums)
  numbers = tuple(n for n in numbers if isinstance(n, int))
  return _CustomVJP(fun, numbers, is_tree_mode(graph, graph_updates))
