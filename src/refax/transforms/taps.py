"""Taps: values inside a function that are also handed out of it.

`tap(x, label)` is `x`, and marks it in a trace. `evaluate` runs a jaxpr once more and returns,
besides its results, what a look at each equation finds: through loops (stacked), branches, nested
`jit`, `checkpoint` and derivatives. What a loop stacks has one axis more in front for each loop.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from refax import _jax

_tap = _jax.Primitive("refax_tap")


class Label(NamedTuple):
  """What a tap is known by."""

  key: Any
  """What was tapped: hashable."""
  kind: str = "value"
  """`value`, `tangent` or `gradient`."""
  has_gradient: bool = False
  """Whether the gradients of the values are tapped too."""
  which: tuple[int, ...] = ()
  """Which of the values have a gradient."""


def tap(xs: Sequence[Any], label: Label) -> list[Any]:
  """Arrays as they are, marked in the trace; all of them or none are in what JAX makes of it."""
  return _tap.bind(*map(jnp.asarray, xs), label=label)


def _differentiated(primals: Any, tangents: Any, *, label: Label) -> tuple[Any, Any]:
  out, tangents = _tap.bind(*primals, label=label), list(tangents)
  which = tuple(i for i, dx in enumerate(tangents) if type(dx) is not ad.Zero)
  if label.kind == "value" and label.has_gradient and which:
    tapped = _tap.bind(
      *(tangents[i] for i in which), label=label._replace(kind="tangent", which=which)
    )
    for i, dx in zip(which, tapped, strict=True):
      tangents[i] = dx
  return out, tangents


def _transposed(cts: Any, *_: Any, label: Label) -> list[Any]:
  there = [i for i, ct in enumerate(cts) if type(ct) is not ad.Zero]
  if label.kind != "tangent" or not there:
    return list(cts)
  which = tuple(label.which[i] for i in there)
  tapped = _tap.bind(*(cts[i] for i in there), label=label._replace(kind="gradient", which=which))
  new = dict(zip(there, tapped, strict=True))
  return [new.get(i, ct) for i, ct in enumerate(cts)]


def _batched(args: Any, dims: Any, *, label: Label) -> tuple[Any, Any]:
  moved = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims, strict=True)]
  # A mapped value has an axis more in front, as one of a loop.
  return _tap.bind(*moved, label=label), [d if d is None else 0 for d in dims]


_tap.multiple_results = True
_tap.def_impl(lambda *xs, label: list(xs))
_tap.def_abstract_eval(lambda *xs, label: list(xs))
ad.primitive_jvps[_tap] = _differentiated
ad.primitive_transposes[_tap] = _transposed
batching.primitive_batchers[_tap] = _batched
mlir.register_lowering(_tap, lambda ctx, *xs, label: list(xs))


class Found(NamedTuple):
  """A value that was found inside a function."""

  key: Any
  value: Any
  """A pytree of arrays."""
  within: tuple[tuple[Any, int], ...] = ()
  """The equations in whose jaxprs it was found, outermost first, and which of the jaxprs it is."""


class Look(NamedTuple):
  """What is looked for in a jaxpr."""

  find: Callable[[Any, list[Any], list[Any]], list[Found]]
  """Called with an equation, its arguments and its results."""
  is_wanted: Callable[[Any], bool]
  """Whether anything may be found in an equation, apart from what is nested in it."""
  enters_custom: bool = True
  """Whether to look into functions with derivatives of their own, which are then lost."""


def is_tap(eqn: Any) -> bool:
  """Whether an equation is a tap."""
  return eqn.primitive is _tap


def evaluate(
  closed: Any, args: Sequence[Any], look: Look, *, again: bool = False
) -> tuple[list[Any], list[Found]]:
  """Run a closed jaxpr.

  Args:
    closed: the jaxpr.
    args: its arguments.
    look: what is looked for.
    again: whether this computes once more what has been seen, as the backward pass of a
      `jax.checkpoint` does.

  Returns:
    The results, and what was found, in the order of the program.
  """
  found: list[Found] = []

  def results_of(eqn: Any, values: list[Any]) -> list[Any]:
    rule = _RULES.get(eqn.primitive.name)
    if rule is not None and _is_wanted_inside(eqn, look):
      results, inside = rule(_Nested(eqn, values, look, again))
      found.extend(inside)
    else:
      results = _jax.evaluate(eqn, values)
    if look.is_wanted(eqn) and not (again and _is_value(eqn)):
      found.extend(look.find(eqn, values, results))
    return results

  return _jax.interpret(closed, args, results_of), found


def unreached(closed: Any, look: Look) -> list[str]:
  """The primitives inside which something is wanted that `evaluate` cannot hand out."""
  names: list[str] = []
  anywhere = look._replace(enters_custom=True)
  for eqn in opened(closed).eqns:
    if not _is_wanted_inside(eqn, anywhere):
      continue
    is_custom = eqn.primitive.name.startswith("custom_")
    if eqn.primitive.name in _RULES and not (is_custom and not look.enters_custom):
      names += [n for inner in inner_jaxprs(eqn) for n in unreached(inner, look)]
    else:
      names.append(eqn.primitive.name)
  return names


def _is_value(eqn: Any) -> bool:
  """Whether an equation taps a value, which was seen when it was computed first."""
  return is_tap(eqn) and eqn.params["label"].kind != "gradient"


def opened(closed: Any) -> Any:
  """A jaxpr without its constants."""
  return getattr(closed, "jaxpr", closed)


def inner_jaxprs(eqn: Any) -> list[Any]:
  """The jaxprs inside an equation, without their constants."""
  return list(map(opened, _jax.inner_jaxprs(eqn)))


def _is_wanted_inside(eqn: Any, look: Look) -> bool:
  if eqn.primitive.name.startswith("custom_") and not look.enters_custom:
    return False
  return any(
    look.is_wanted(e) or _is_wanted_inside(e, look)
    for jaxpr in inner_jaxprs(eqn)
    for e in jaxpr.eqns
  )


class _Nested:
  """An equation with jaxprs inside, in which something is looked for."""

  def __init__(self, eqn: Any, args: list[Any], look: Look, again: bool):
    self.params, self.args, self.eqn = eqn.params, args, eqn
    self._look, self._again = look, again

  def run(
    self, closed: Any, args: Sequence[Any], *, again: bool = False, branch: int = 0
  ) -> tuple[list[Any], list[Any], list[Found]]:
    """The results of a nested jaxpr, the values that were found, and what these are."""
    results, found = evaluate(closed, args, self._look, again=again or self._again)
    at = (self.eqn, branch)
    return results, [f.value for f in found], [Found(f.key, None, (at, *f.within)) for f in found]


Outcome = tuple[list[Any], list[Found]]


def _pairs(keys: list[Found], values: list[Any]) -> list[Found]:
  return [key._replace(value=value) for key, value in zip(keys, values, strict=True)]


def _call(nested: _Nested) -> Outcome:
  """A function that is called as it is."""
  (jaxpr,) = _jax.inner_jaxprs(nested.eqn)
  results, values, keys = nested.run(jaxpr, nested.args)
  return results, _pairs(keys, values)


def _jit(nested: _Nested) -> Outcome:
  keys: list[Found] = []

  def call(*args):
    results, values, keys[:] = nested.run(nested.params["jaxpr"], args)
    return results, values

  call.__name__ = call.__qualname__ = nested.params["name"]
  results, values = jax.jit(call)(*nested.args)
  return results, _pairs(keys, values)


def _checkpoint(nested: _Nested) -> Outcome:
  keys: list[Found] = []
  params = nested.params

  def call(*args):
    results, values, keys[:] = nested.run(params["jaxpr"], args, again=params["differentiated"])
    return results, values

  again = jax.checkpoint(call, prevent_cse=params["prevent_cse"], policy=params["policy"])
  results, values = again(*nested.args)
  return results, _pairs(keys, values)


def _scan(nested: _Nested) -> Outcome:
  params, (start, carry_count) = nested.params, _jax.scan_counts(nested.eqn)
  end = start + carry_count
  keys: list[Found] = []
  consts, init, xs = nested.args[:start], nested.args[start:end], nested.args[end:]

  def step(carry, x):
    results, values, keys[:] = nested.run(params["jaxpr"], [*consts, *carry, *x])
    return results[:carry_count], (results[carry_count:], values)

  options = {name: params[name] for name in ("length", "reverse", "unroll")}
  carry, (ys, values) = jax.lax.scan(step, init, xs, **options)
  return [*carry, *ys], _pairs(keys, values)


def _while(nested: _Nested) -> Outcome:
  """Of a loop of unknown length the last step is handed out; zeros if there was none."""
  params = nested.params
  first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
  args = nested.args
  cond_consts, consts, init = args[:first], args[first:second], args[second:]
  keys: list[Found] = []

  def step(state):
    results, values, keys[:] = nested.run(params["body_jaxpr"], [*consts, *state[0]], branch=1)
    return results, values

  shapes = jax.eval_shape(step, (init, ()))[1]
  cond = lambda state: _jax.jaxpr_as_fun(_closed(params["cond_jaxpr"]))(*cond_consts, *state[0])[0]
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  results, values = jax.lax.while_loop(cond, step, (init, zeros))
  return results, _pairs(keys, values)


def _cond(nested: _Nested) -> Outcome:
  """Of the branch that was not taken zeros are handed out."""
  index, *args = nested.args
  branches = nested.params["branches"]
  shapes, keys = [], []
  for i, branch in enumerate(branches):
    named: list[Any] = []

    def run(*args, i=i, branch=branch, named=named):
      results, values, named[:] = nested.run(branch, args, branch=i)
      return results, values

    shapes.append(jax.eval_shape(run, *args)[1])
    keys += named

  def taken(i: int) -> Callable[..., Any]:
    def run(*args):
      results, values, _ = nested.run(branches[i], args)
      zeros = lambda s: jnp.zeros(s.shape, s.dtype)
      others = [values if j == i else jax.tree.map(zeros, s) for j, s in enumerate(shapes)]
      return results, [value for lot in others for value in lot]

    return run

  results, values = jax.lax.switch(index, list(map(taken, range(len(branches)))), *args)
  return results, _pairs(keys, values)


def _closed(jaxpr: Any) -> Any:
  return jaxpr if hasattr(jaxpr, "consts") else _jax.ClosedJaxpr(jaxpr, ())


_RULES: dict[str, Callable[[_Nested], Outcome]] = {
  "jit": _jit,
  "pjit": _jit,
  "closed_call": _call,
  "core_call": _call,
  "eval_jaxpr": _call,
  "custom_jvp_call": _call,
  "custom_vjp_call": _call,
  "checkpoint": _checkpoint,
  "remat2": _checkpoint,
  "scan": _scan,
  "while": _while,
  "cond": _cond,
}
