"""dependence: which cells the results and writes of a jaxpr depend on, through all that is nested.

A value is followed forward. It is an unchanged copy of a cell, or computed from cells; a copy that
is put back into its own cell has not been read. So an argument of a nested transform that is passed
in and not used is no read, nor is one that a branch hands back as it was.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from refax import _jax

Key = Hashable
"""What a cell is known by."""


class Flow(NamedTuple):
  """Where a value comes from: the cells that it may be a copy of, and those it is computed from."""

  copies: frozenset[Key] = frozenset()
  computed: frozenset[Key] = frozenset()

  @property
  def all(self) -> frozenset[Key]:
    """All cells that the value depends on."""
    return self.copies | self.computed


class Cell(NamedTuple):
  """What a variable of a jaxpr stands for that is a Ref."""

  key: Key


NOTHING = Flow()
COPYING = ("stop_gradient", "refax_guard", "copy", "copy_p")
"""Primitives whose result is their operand."""


def join(*flows: Flow) -> Flow:
  """A value that is one of several."""
  copies = frozenset().union(*(flow.copies for flow in flows))
  return Flow(copies, frozenset().union(*(flow.computed for flow in flows)))


def computed(*flows: Flow) -> Flow:
  """A value that is computed from several."""
  return Flow(frozenset(), frozenset().union(*(flow.all for flow in flows)))


class Dependence:
  """Follow the values of a jaxpr. `reads` has the cells that writes and side effects depend on."""

  def __init__(self):
    self.reads: set[Key] = set()
    self._content: dict[Key, Flow] = {}
    self._control: list[Flow] = []  # what decides whether an equation is run

  def run(self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Flow | Cell]) -> list[Any]:
    """The flows of the results; run twice, as a loop may read what a later equation writes."""
    self.call(jaxpr, consts, values)
    return self.call(jaxpr, consts, values)

  def call(self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """The flows of the results of a jaxpr, once through."""
    bound = [Cell(id(c)) if _jax.is_ref(c) else NOTHING for c in consts]
    known = dict(zip(map(id, jaxpr.constvars), bound, strict=True))
    known |= zip(map(id, jaxpr.invars), values, strict=True)
    read = lambda x: known.get(id(x), NOTHING)  # a literal is in no table
    for eqn in jaxpr.eqns:
      outs = self._equation(eqn, [read(x) for x in eqn.invars])
      known |= zip(map(id, eqn.outvars), outs, strict=True)
    return [read(x) for x in jaxpr.outvars]

  def _equation(self, eqn: Any, values: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    rule = _RULES.get(name)
    if rule is not None:
      return rule(self, eqn, values)
    if name in COPYING:
      return [x if isinstance(x, Flow) else self._get(x) for x in values]
    inner = _jax.inner_jaxprs(eqn) or _jax.meant_jaxprs(eqn)
    if len(inner) == 1 and _fits(inner[0], eqn):
      return self._inner(inner[0], values)
    return self._other(eqn, values)

  def _inner(self, jaxpr: Any, values: Sequence[Any]) -> list[Any]:
    return self.call(getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ()), values)

  def _other(self, eqn: Any, values: list[Any]) -> list[Any]:
    """An equation of which nothing is known: all it is given goes into all that it gives."""
    cells = [x for x in values if isinstance(x, Cell)]
    flow = computed(*(x for x in values if isinstance(x, Flow)), *map(self._get, cells))
    for cell in cells:
      self._put(cell, flow)
    if cells or any(not hasattr(e, "input") for e in eqn.effects if not _jax.makes_ref(e)):
      self.reads |= flow.all.union(*(x.all for x in self._control))
    return [self._new(var, flow) if _jax.is_ref_var(var) else flow for var in eqn.outvars]

  def _new(self, var: Any, flow: Flow) -> Cell:
    cell = Cell(id(var))  # the function has made it: what is read from it was put into it
    self._put(cell, flow)
    return cell

  def _put(self, cell: Cell, flow: Flow) -> None:
    self._content[cell.key] = join(self._content.get(cell.key, NOTHING), flow)

  def _get(self, cell: Cell) -> Flow:
    return join(Flow(frozenset([cell.key])), self._content.get(cell.key, NOTHING))

  def _read(self, eqn: Any, values: list[Any]) -> list[Any]:
    cell, *index = values
    flow = self._get(cell)
    return [flow if _is_whole(eqn, eqn.outvars[0]) else computed(flow, *index)]

  def _write(self, eqn: Any, values: list[Any]) -> list[Any]:
    cell, value, *index = values
    old = self._get(cell)
    self.reads |= (value.copies - {cell.key}) | value.computed
    self.reads |= frozenset().union(*(x.all for x in (*index, *self._control)))
    if not _is_whole(eqn, eqn.invars[1]) or eqn.primitive.name == "addupdate":
      self.reads.add(cell.key)
    self._put(cell, value)
    return [old] * len(eqn.outvars)

  def _scan(self, eqn: Any, values: list[Any]) -> list[Any]:
    consts, carries = _jax.scan_counts(eqn)
    fixed, carry = values[:consts], values[consts : consts + carries]
    body, xs, outs = eqn.params["jaxpr"], values[consts + carries :], []
    for _ in range(len(carry) + 2):
      outs = self._inner(body, [*fixed, *carry, *xs])
      new = [_either(a, b) for a, b in zip(carry, outs, strict=False)]
      if new == carry:
        break
      carry = new
    return outs if eqn.params["length"] else [*carry, *outs[carries:]]

  def _while(self, eqn: Any, values: list[Any]) -> list[Any]:
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_cond, fixed, carry = values[:n], values[n : n + m], values[n + m :]
    while True:
      goes_on = computed(*self._inner(eqn.params["cond_jaxpr"], [*of_cond, *carry]))
      self._control.append(goes_on)
      outs = self._inner(eqn.params["body_jaxpr"], [*fixed, *carry])
      self._control.pop()
      new = [_either(a, b) for a, b in zip(carry, outs, strict=True)]
      if new == carry:
        return [x if isinstance(x, Cell) else _because(x, goes_on) for x in carry]
      carry = new

  def _cond(self, eqn: Any, values: list[Any]) -> list[Any]:
    index, *operands = values
    self._control.append(computed(index))
    found = [self._inner(branch, operands) for branch in eqn.params["branches"]]
    self._control.pop()
    return [_because(join(*outs), index) for outs in zip(*found, strict=True)]


_RULES = {
  "get": Dependence._read,
  "swap": Dependence._write,
  "addupdate": Dependence._write,
  "scan": Dependence._scan,
  "while": Dependence._while,
  "cond": Dependence._cond,
}


class Tangents(Dependence):
  """The same for gradients: what has none depends on nothing."""

  def _equation(self, eqn: Any, values: list[Any]) -> list[Any]:
    if eqn.primitive.name == "stop_gradient":
      return [NOTHING]
    # A rule of the user's own gives gradients where the function has none, as for a rounding.
    follow = self._other if _jax.is_custom(eqn) else super()._equation
    flows = follow(eqn, values)
    has_tangent = lambda var: jnp.issubdtype(getattr(var.aval, "dtype", jnp.float32), jnp.inexact)
    pairs = zip(flows, eqn.outvars, strict=True)
    return [x if isinstance(x, Cell) or has_tangent(v) else NOTHING for x, v in pairs]


def _either(a: Any, b: Any) -> Any:
  return a if isinstance(a, Cell) else join(a, b)


def _because(flow: Flow, decided_by: Flow) -> Flow:
  """A value that is there because of another one; of nothing, if it is the same in any case."""
  return Flow(flow.copies, flow.computed | decided_by.all)


def _fits(jaxpr: Any, eqn: Any) -> bool:
  inner = getattr(jaxpr, "jaxpr", jaxpr)
  return (len(inner.invars), len(inner.outvars)) == (len(eqn.invars), len(eqn.outvars))


def _is_whole(eqn: Any, value: Any) -> bool:
  """Whether a Ref is read or written as a whole."""
  return value.aval.shape == eqn.invars[0].aval.shape and len(eqn.invars) <= 2
