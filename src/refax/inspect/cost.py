"""How many operations a function takes, by layer: counted in its jaxpr, without running it.

The numbers are those of XLA's cost analysis (a multiplication and an addition of a matrix product
are two operations, an elementwise operation is one for each element, what only moves data is none),
but the body of a loop counts as often as it runs; XLA counts it once.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refax.transforms.taps import inner_jaxprs


class Cost(NamedTuple):
  """What an operation, or many, take."""

  flops: float = 0.0
  """Arithmetic operations."""
  transcendentals: float = 0.0
  """Exponentials, logarithms, roots: one for each element."""
  nbytes: float = 0.0
  """Bytes that are read and written, each operation by itself: XLA's fusion saves many of them."""

  def __add__(self, other: "Cost") -> "Cost":  # pyright: ignore[reportIncompatibleMethodOverride]
    return Cost(*(a + b for a, b in zip(self, other, strict=True)))

  def times(self, n: float) -> "Cost":
    """The cost of n such operations."""
    return Cost(*(n * x for x in self))


class Operation(NamedTuple):
  """An operation in a jaxpr."""

  scopes: tuple[str, ...]
  """The named scopes that it is in."""
  is_backward: bool
  runs: float
  """How often it runs."""
  eqn: Any
  cost: Cost
  """Of all runs together."""


def operations(
  jaxpr: Any, scopes: tuple[str, ...] = (), count: float = 1, *, backward: bool = False
) -> Iterator[Operation]:
  """All operations of a jaxpr, also of those nested in it.

  Of the branches of a `cond` the one that takes most counts; of a `while` loop one step.
  """
  for eqn in jaxpr.eqns:
    stack = eqn.source_info.name_stack
    inside = (*scopes, *scopes_of(stack))
    is_backward = backward or is_backward_name(str(stack))
    times = count * eqn.params["length"] if eqn.primitive.name == "scan" else count
    lots = [
      list(operations(inner, inside, times, backward=is_backward)) for inner in inner_jaxprs(eqn)
    ]
    if eqn.primitive.name == "cond" and lots:
      lots = [max(lots, key=lambda lot: sum(x.cost.flops for x in lot))]
    if not lots:
      yield Operation(inside, is_backward, count, eqn, cost_of(eqn).times(count))
    for lot in lots:
      yield from lot


def is_backward_name(name: str) -> bool:
  """Whether the names around an operation say that it belongs to the computation of gradients."""
  return "transpose(" in name


def scopes_of(stack: Any) -> list[str]:
  """The named scopes of an operation, step by step, without the transforms it went through."""
  parts = [part.name for part in getattr(stack, "stack", ()) if "Scope" in type(part).__name__]
  return [step for name in parts if name not in _OF_JAX for step in name.split("/")]


_OF_JAX = frozenset(("checkpoint", "rematted_computation"))


def by_path(
  found: Iterable[Operation], paths: set[str], key: Callable[[Operation], str] = lambda _: ""
) -> dict[tuple[str, str], Cost]:
  """The cost of each layer itself, without those below, by its path and by `key`.

  Args:
    found: the operations.
    paths: the paths of the layers; an operation belongs to the longest in which it is.
    key: what else to tell apart.
  """
  costs: dict[tuple[str, str], Cost] = defaultdict(Cost)
  for x in found:
    costs[layer_of(x.scopes, paths), key(x)] += x.cost
  return dict(costs)


def layer_of(scopes: tuple[str, ...], paths: set[str]) -> str:
  """The longest of some paths that these scopes are in; empty if there is none."""
  known = ("/".join(scopes[:i]) for i in range(len(scopes), 0, -1))
  return next((path for path in known if path in paths), "")


def with_all_below(costs: dict[str, Cost]) -> dict[str, Cost]:
  """The cost of each layer with all layers below it."""
  total: dict[str, Cost] = defaultdict(Cost)
  for path, cost in costs.items():
    steps = path.split("/") if path else []
    for i in range(len(steps) + 1):
      total["/".join(steps[:i])] += cost
  return dict(total)


_TRANSCENDENTAL = re.compile(
  "exp|exp2|log|logistic|tanh|pow|sqrt|rsqrt|cbrt|sin|cos|tan|atan2|expm1|log1p|erf|erfc|erf_inv"
  "|asin|acos|atan|sinh|cosh|asinh|acosh|atanh|lgamma|digamma"
)
_ELEMENTWISE = re.compile(
  "add|sub|mul|div|rem|max|min|neg|abs|sign|floor|ceil|round|integer_pow|square|select_n|clamp|eq"
  "|ne|lt|le|gt|ge|and|or|xor|not|is_finite|nextafter|convert_element_type|add_any|conj|real|imag"
  "|shift_left|shift_right_logical|shift_right_arithmetic|population_count|scatter[-_]add"
)
_REDUCTIONS = ("reduce_", "cum", "argmax", "argmin")


def cost_of(eqn: Any) -> Cost:
  """What one operation takes."""
  name = eqn.primitive.name
  outs, ins = ([_size(v) for v in lot] for lot in (eqn.outvars, eqn.invars))
  nbytes = float(sum(_nbytes(v) for v in (*eqn.outvars, *eqn.invars)))
  if name == "dot_general":
    (contract, _), _ = eqn.params["dimension_numbers"]
    depth = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
    return Cost(2.0 * outs[0] * depth, 0.0, nbytes)
  if name == "conv_general_dilated":
    return Cost(_convolution(eqn, outs[0]), 0.0, nbytes)
  if _TRANSCENDENTAL.fullmatch(name):
    return Cost(0.0, float(outs[0]), nbytes)
  if _ELEMENTWISE.fullmatch(name):
    size = ins[-1] if name.startswith("scatter") else outs[0]
    return Cost(float(size), 0.0, nbytes)
  if name.startswith(_REDUCTIONS):
    return Cost(float(max(ins[0] - outs[0], 0)), 0.0, nbytes)
  return Cost(0.0, 0.0, nbytes)


def _convolution(eqn: Any, out: int) -> float:
  kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
  _, in_channels, *spatial = numbers.rhs_spec
  return 2.0 * out * kernel[in_channels] * math.prod(kernel[i] for i in spatial)


def _size(v: Any) -> int:
  return math.prod(getattr(v.aval, "shape", ()))


def _nbytes(v: Any) -> int:
  dtype = getattr(v.aval, "dtype", None)
  if dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended):
    return 0
  return _size(v) * jnp.dtype(dtype).itemsize
