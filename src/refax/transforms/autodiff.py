"""nnx.grad, value_and_grad, vjp and jvp: derivatives with respect to the Variables of an object.

The selected Variables are read once, outside, and are plain arrays inside: a Ref that is read in a
differentiated function is kept as a residual by every layer. All other state is written in place.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refax import _jax, config
from refax.core.array_protocol import unwrap
from refax.core.definition import Differentiation
from refax.core.filters import Filter, Predicate, to_predicate
from refax.core.graphdef import LEAF, NODE
from refax.core.observe import differentiated, undo_on_error
from refax.core.variable import Param, Variable
from refax.core.write import values_at_once
from refax.errors import (
  AliasError,
  GradientOutputError,
  InvalidArgumentError,
  TreeMismatchError,
)
from refax.graph.split import state
from refax.graph.state import State, from_flat_state, to_flat_state
from refax.transforms.lift import Entered, Inputs, Outputs
from refax.transforms.positions import by_position
from refax.transforms.shared import derived
from refax.typing import Path, describe, path_str


class DiffState(NamedTuple):
  """An argument and which of its Variables to differentiate; for `argnums`.

  >>> from refax import nnx
  >>> nnx.DiffState(0, nnx.BatchStat).argnum
  0
  """

  argnum: int
  filter: Filter = Param


def grad(
  f: Callable | None = None,
  *,
  argnums: int | DiffState | Sequence[int | DiffState] = 0,
  has_aux: bool = False,
  holomorphic: bool = False,
  allow_int: bool = False,
  wrt: Filter = Param,
  through: Filter = None,
) -> Any:
  """The gradient of a function, as `jax.grad`, with respect to Variables of its arguments.

  Args:
    f: a function that returns a scalar, or `(scalar, aux)`; without it, a decorator is returned.
    argnums: which arguments, by position, also if they are given by keyword;
      `nnx.DiffState(i, filter)` for a filter of its own.
    has_aux: whether `f` returns `(scalar, aux)`.
    holomorphic: whether `f` is holomorphic, as in `jax.grad`.
    allow_int: whether to differentiate with respect to integers too, as in `jax.grad`.
    wrt: which Variables of these arguments. Arrays outside any Module are always differentiated.
    through: Variables through which gradients flow when they are written and read again, which
      is an error otherwise: a recurrent memory, fast weights.

  Returns:
    A function that returns the gradient: a State of lojax Variables for a Module, a Variable for
    a Variable, an array for an array; and `aux`. State that `f` writes is written in place.

  Raises:
    DifferentiatedWriteError: `f` writes a Variable that is differentiated, or a value that
      depends on one to a Variable that is not detached and not in `through`.
    AliasError: two of the arguments share a Variable that is differentiated.
    InvalidArgumentError: `argnums` names no argument of the call.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
  >>> grads = nnx.grad(lambda m: m(jnp.ones((3, 2))).sum())(model)
  >>> grads["kernel"][...].tolist()
  [[3.0], [3.0]]
  """
  options = {
    "argnums": argnums,
    "has_aux": has_aux,
    "holomorphic": holomorphic,
    "allow_int": allow_int,
    "wrt": wrt,
    "through": through,
  }
  value_and = value_and_grad(**options)

  def decorate(f: Callable) -> Callable:
    inner = value_and(f)

    @functools.wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
      value, grads = inner(*args, **kwargs)
      return (grads, value[1]) if has_aux else grads

    return derived(wrapper, "grad", f, **options)

  return decorate if f is None else decorate(f)


def value_and_grad(
  f: Callable | None = None,
  *,
  argnums: int | DiffState | Sequence[int | DiffState] = 0,
  has_aux: bool = False,
  holomorphic: bool = False,
  allow_int: bool = False,
  wrt: Filter = Param,
  through: Filter = None,
) -> Any:
  """The value and the gradient of a function; all arguments as in `nnx.grad`.

  Returns:
    A function that returns `(value, gradient)`, or `((value, aux), gradient)`.

  Raises:
    DifferentiatedWriteError, AliasError: as `nnx.grad`.

  >>> from refax import nnx
  >>> loss, grad = nnx.value_and_grad(lambda w: w * w)(nnx.Param(3.0))
  >>> float(loss), float(grad)
  (9.0, 6.0)
  """
  cases: Sequence[Any] = [argnums] if isinstance(argnums, int | DiffState) else argnums
  count = 1 + max((x.argnum if isinstance(x, DiffState) else x for x in cases), default=-1)

  def decorate(f: Callable) -> Callable:
    @functools.wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
      args, kwargs = by_position(f, args, kwargs, count)
      call = Differentiated(args, kwargs, argnums, wrt, through)
      pure = functools.partial(call.run_scalar, f, has_aux)
      transformed = jax.value_and_grad(
        pure, has_aux=True, holomorphic=holomorphic, allow_int=allow_int
      )
      with undo_on_error(call.state()):
        (value, outputs), grads = transformed(call.values)
        aux = call.inputs.commit(outputs)
      return ((value, aux) if has_aux else value), call.gradients(grads)

    options = (argnums, has_aux, holomorphic, allow_int, wrt, through)
    return derived(wrapper, "value_and_grad", f, options=options)

  return decorate if f is None else decorate(f)


def vjp(
  f: Callable, *primals: Any, has_aux: bool = False, wrt: Filter = Param, through: Filter = None
) -> Any:
  """The value of a function and its vector-Jacobian product, as `jax.vjp`.

  Args:
    f: a function of Modules, Variables and arrays.
    *primals: its arguments; all are differentiated.
    has_aux: whether `f` returns `(value, aux)`.
    wrt: which Variables of the arguments.
    through: as in `nnx.grad`.

  Returns:
    `(value, vjp_fn)`, or `(value, vjp_fn, aux)`. `vjp_fn(cotangent)` is a tuple with a gradient for
    each argument, in the form of those of `nnx.grad`. State that `f` writes is written in place.

  Raises:
    DifferentiatedWriteError, AliasError: as `nnx.grad`.

  >>> from refax import nnx
  >>> y, pull = nnx.vjp(lambda w, x: w * x, nnx.Param(3.0), 2.0)
  >>> [float(g) for g in pull(1.0)]
  [2.0, 3.0]
  """
  call = Differentiated(primals, {}, tuple(range(len(primals))), wrt, through)
  pure = functools.partial(call.run, f, has_aux)
  with undo_on_error(call.state()):
    value, pull, outputs = jax.vjp(pure, call.values, has_aux=True)
    aux = call.inputs.commit(outputs)
  vjp_fn = lambda cotangent: call.gradients(pull(unwrap(cotangent))[0])
  return (value, vjp_fn, aux) if has_aux else (value, vjp_fn)


def jvp(
  f: Callable,
  primals: Sequence[Any],
  tangents: Sequence[Any],
  *,
  has_aux: bool = False,
  wrt: Filter = Param,
  through: Filter = None,
) -> Any:
  """The value of a function and its Jacobian-vector product, as `jax.jvp`.

  Args:
    f: a function of Modules, Variables and arrays.
    primals: its arguments.
    tangents: a tangent for each, in the form of the gradients of `nnx.grad`; zeros for Variables
      that a State leaves out.
    has_aux: whether `f` returns `(value, aux)`.
    wrt: which Variables of the arguments.
    through: as in `nnx.grad`.

  Returns:
    `(value, tangent)`, or `(value, tangent, aux)`. State that `f` writes is written in place.

  Raises:
    TreeMismatchError: a tangent does not have the form of its argument.
    DifferentiatedWriteError, AliasError: as `nnx.grad`.

  >>> from refax import nnx
  >>> value, tangent = nnx.jvp(lambda w: w * w, (nnx.Param(3.0),), (1.0,))
  >>> float(value), float(tangent)
  (9.0, 6.0)
  """
  call = Differentiated(tuple(primals), {}, tuple(range(len(primals))), wrt, through)
  pure = functools.partial(call.run, f, has_aux)
  with undo_on_error(call.state()):
    value, tangent, outputs = jax.jvp(
      pure, (call.values,), (call.tangents(tangents),), has_aux=True
    )
    aux = call.inputs.commit(outputs)
  return (value, tangent, aux) if has_aux else (value, tangent)


class Differentiated:
  """One call: what is selected, what is local, and the form of the gradients."""

  def __init__(
    self, args: tuple, kwargs: dict[str, Any], argnums: Any, wrt: Filter, through: Filter
  ):
    self.inputs = Inputs.of(args, kwargs)
    self._args = args
    self._single = isinstance(argnums, int | DiffState)
    cases: Sequence[Any] = [argnums] if self._single else argnums
    self._forms: list[Any] = []
    owners: dict[int, int] = {}
    for case in cases:
      argnum, filter = case if isinstance(case, DiffState) else DiffState(case, wrt)
      if not -len(args) <= argnum < len(args):
        want = f"the number of a positional argument; there are {len(args)}"
        raise InvalidArgumentError.value("a gradient", "argnums", argnum, want)
      argnum %= len(args)
      form = self._form(argnum, to_predicate(filter))
      for index in jax.tree.leaves(form):
        if owners.setdefault(index, argnum) != argnum:
          raise AliasError.gradient(self.inputs.leaves[index]._def.origin, owners[index], argnum)
      self._forms.append(form)
    selected = values_at_once([self.inputs.leaves[i] for i in owners])
    self.values = dict(zip(owners, map(unwrap, selected), strict=True))
    self._local = self._locals(to_predicate(through))

  def _locals(self, through: Predicate) -> dict[int, Entered]:
    """State that gradients flow through: differentiable arrays inside, written back at the end."""
    found = {
      i: leaf
      for i, (path, leaf) in enumerate(
        zip(self.inputs.graphdef.paths, self.inputs.leaves, strict=True)
      )
      if isinstance(leaf, Variable) and i not in self.values and through(path[2:], leaf)
    }
    values = zip(found.items(), values_at_once(list(found.values())), strict=True)
    return {i: Entered(x, hijax=False, attached=leaf.detached) for (i, leaf), x in values}

  def _form(self, argnum: int, predicate: Predicate) -> Any:
    """The gradient's structure for an argument, with indices of leaves in place of values."""
    entry = self.inputs.arguments[argnum]
    if entry[0] == LEAF:  # an argument that is a Variable or an array is meant itself
      return entry[1]
    return self._form_of(entry, isinstance(self._args[argnum], State), predicate)

  def _form_of(self, entry: tuple, is_state: bool, predicate: Predicate) -> Any:
    if entry[0] == NODE or is_state:
      found: dict[int, Path] = {}
      for path, (sort, *rest) in self.inputs.graphdef.walk(entry):
        if sort == LEAF and self._selects(rest[0], path, predicate, arrays=is_state):
          found.setdefault(rest[0], path)
      return from_flat_state((path, index) for index, path in found.items())
    if entry[0] == LEAF:
      return entry[1] if self._selects(entry[1], (), predicate, arrays=True) else None
    return entry[1].unflatten(self._form_of(e, False, predicate) for e in entry[2])

  def _selects(self, index: int, path: Path, predicate: Predicate, *, arrays: bool) -> bool:
    leaf = self.inputs.leaves[index]
    return predicate(path, leaf) if isinstance(leaf, Variable) else arrays

  def run(self, f: Callable, has_aux: bool, values: dict[int, Any]) -> tuple[Any, Outputs]:
    """The function of the selected values that JAX differentiates."""
    selected = [self.inputs.leaves[i] for i in values]
    variables = [x for x in selected if isinstance(x, Variable)]
    with (
      Differentiation() as now,
      differentiated(variables),
      config.local_variables() as hijax_afterwards,
    ):
      marks = {i: now for i in values if not self._is_local(i)}
      entered = {i: Entered(v, hijax=False, selected=marks.get(i)) for i, v in values.items()}
      frame = self.inputs.enter(entered | self._local)
      args, kwargs = frame.args
      out = f(*args, **kwargs)
      if has_aux and not (isinstance(out, tuple | list) and len(out) == 2):
        raise GradientOutputError.no_pair(_name(f), _shapes(out))
      value, aux = out if has_aux else (out, None)
      return unwrap(value), frame.collect(aux, hijax_afterwards=hijax_afterwards)

  def _is_local(self, index: int) -> bool:
    """For `refax.compat`: a lojax Variable may be written while it is differentiated."""
    leaf = self.inputs.leaves[index]
    return Variable.is_lenient and isinstance(leaf, Variable) and not leaf.is_hijax

  def run_scalar(self, f: Callable, has_aux: bool, values: dict[int, Any]) -> tuple[Any, Outputs]:
    """`run`, for a function whose gradient is taken: it returns one number."""
    value, outputs = self.run(f, has_aux, values)
    if not isinstance(value, int | float | complex | jax.Array) or jnp.shape(value) != ():
      raise GradientOutputError.no_scalar(_name(f), _shapes(value), has_aux)
    return value, outputs

  def pull(
    self, f: Callable, has_aux: bool, wider: Callable[[Any], Any]
  ) -> tuple[jax.Array, Any, Any]:
    """The value of `f`, its aux, and what pulls a cotangent back, in `wider(dtype)`.

    State that `f` writes is written.
    """
    wide = jax.tree.map(lambda x: jnp.asarray(x, wider(jnp.result_type(x))), self.values)

    def run(wide: dict[int, Any]) -> tuple[Any, Outputs]:
      values = jax.tree.map(lambda x, old: x.astype(jnp.result_type(old)), wide, self.values)
      return self.run_scalar(f, has_aux, values)

    with undo_on_error(self.state()):
      value, pull, outputs = jax.vjp(run, wide, has_aux=True)
      return value, self.inputs.commit(outputs), pull

  def state(self) -> list[Any]:
    """The Refs of the arguments that are not differentiated: `f` may write them."""
    leaves = [x for i, x in enumerate(self.inputs.leaves) if i not in self.values]
    kept = [x._cell for x in leaves if isinstance(x, Variable)]
    cells = [x for x in jax.tree.leaves(kept) if _jax.is_ref(x)]
    return [ref for ref in cells if not _jax.is_tracer(ref)]

  def gradients(self, grads: dict[int, Any]) -> Any:
    """The gradients in the form of the arguments."""

    def gradient(index: int) -> Any:
      leaf = self.inputs.leaves[index]
      if not isinstance(leaf, Variable):
        return grads[index]
      return leaf._handle(grads[index], leaf._def.as_gradient())

    forms = tuple(jax.tree.map(gradient, form) for form in self._forms)
    return forms[0] if self._single else forms

  def tangents(self, tangents: Sequence[Any]) -> dict[int, Any]:
    """The tangent of each selected value, from tangents in the form of the gradients."""
    found: dict[int, Any] = {}
    for form, tangent in zip(self._forms, tangents, strict=True):
      if isinstance(form, State):
        given = dict(
          to_flat_state(tangent if isinstance(tangent, State | dict) else state(tangent))
        )
        for path, index in to_flat_state(form):
          if path in given:
            found[index] = unwrap(given.pop(path))
        if given:
          raise TreeMismatchError.no_place(path_str(next(iter(given))), "the differentiated state")
      else:
        found |= zip(jax.tree.leaves(form), [unwrap(t) for t in _leaves(tangent)], strict=True)
    zeros = {i: jax.tree.map(jnp.zeros_like, v) for i, v in self.values.items() if i not in found}
    like = lambda v, t: jax.tree.map(lambda a, b: jnp.asarray(b, a.dtype), v, t)
    return zeros | {i: like(self.values[i], t) for i, t in found.items()}


def _name(f: Callable) -> str:
  return getattr(f, "__name__", type(f).__name__)


def _shapes(out: Any) -> str:
  """What a function returned, without the numbers."""
  shown = jax.tree.map(lambda x: describe(x) if hasattr(x, "shape") else x, unwrap(out))
  return " ".join(str(shown).replace("'", "").split())[:200]


def _leaves(tree: Any) -> list[Any]:
  return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Variable))
