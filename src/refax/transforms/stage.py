"""stage: a function of objects, traced once into a pure function of values.

State goes in and comes out as arrays, so any JAX transform may be applied to it, also those that
refuse Refs (a branch under `jax.grad`, a scan carry). Inside, Variables are hijax where those of
the caller are: the trace has Refs as inputs for their cells. What is written is read off its jaxpr,
and state that the function reaches by closure is found there too. Then the jaxpr is made one of
values: a Ref becomes an input, and one more result.
"""

import contextlib
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refax import _jax
from refax.core.observe import compiled_as_is, observe
from refax.core.storage import needs_guard
from refax.core.variable import Variable
from refax.core.write import values_at_once
from refax.errors import AliasError
from refax.transforms import view
from refax.transforms.lift import Entered, Inputs, Outputs
from refax.transforms.view import View, value_of

Closures = dict[int, jax.Ref]
"""Refs that functions reach by closure, by identity."""


class Result(NamedTuple):
  """What one run of a staged function gives: its outputs, and the state reached by closure."""

  outputs: Outputs
  closures: dict[int, jax.Array]


class Staged:
  """A traced function. `written` and `closures` say what it does to state.

  Args:
    fn: called with the inner arguments, `fn(*args, **kwargs)`.
    inputs: the caller's arguments.
    values: the value of each leaf of the inputs, or its shape and dtype.
    is_final: whether nothing will differentiate what is staged: fewer operations are then recorded.
    is_compiled: whether nothing will batch it either: it is compiled as it is.
  """

  def __init__(
    self,
    fn: Callable,
    inputs: Inputs,
    values: Sequence[Any],
    *,
    is_final: bool = False,
    is_compiled: bool = False,
  ):
    self.inputs = inputs
    self._is_final = is_final = is_final or is_compiled

    def traced(values):
      refs = filter(_jax.is_ref, jax.tree.leaves(values))
      with compiled_as_is(refs) if is_final else contextlib.nullcontext():
        frame = inputs.enter({i: Entered(x, hijax=False) for i, x in enumerate(values)})
        args, kwargs = frame.args
        return frame.collect(fn(*args, **kwargs))

    self._trees = list(map(jax.tree.structure, values))
    is_hijax = lambda x: isinstance(x, Variable) and x.is_hijax
    self._hijax = {i: self._trees[i] for i, x in enumerate(inputs.leaves) if is_hijax(x)}
    given = list(values)
    for i in self._hijax:
      given[i] = jax.tree.map(_jax.AsRef, given[i])
    with observe() as self._observed:
      self.jaxpr, self.outputs = _jax.traced(traced, given)
    """The trace itself, and the shapes and dtypes of what the function gives."""
    self.out_tree = jax.tree.structure(self.outputs)
    self._find_effects()
    self._find_closures()
    self.pure = _jax.discharge(_jax.refs_as_inputs(self.jaxpr))
    """The function as a closed jaxpr of values."""
    is_compiled = is_compiled and _jax.only_refs_are_effects(self.pure)
    self._step = _jax.consts_as_inputs(_jax.without_rules(self.pure)) if is_compiled else None

  def _find_effects(self) -> None:
    """Which of the caller's Variables, and which Refs by closure, are read and written."""
    jaxpr = self.jaxpr.jaxpr
    reads, writes = _jax.ref_effects(jaxpr)
    used = {id(v) for e in jaxpr.eqns for v in e.invars}
    self.read, self.written = set(), set(self.outputs.spec.written)
    for index, mine in enumerate(self.by_leaf(jaxpr.invars)):
      if index in self._hijax:
        self.read |= {index} if any(v in reads for v in mine) else set()
        self.written |= {index} if any(v in writes for v in mine) else set()
      elif isinstance(self.inputs.leaves[index], Variable) and any(id(v) in used for v in mine):
        self.read.add(index)  # a lojax Variable is read where its array is used
    consts = list(zip(jaxpr.constvars, self.jaxpr.consts, strict=True))
    self.closures_read = {id(ref) for var, ref in consts if var in reads}
    self.closures_written = {id(ref) for var, ref in consts if var in writes}

  def by_leaf(self, flat: Sequence[Any]) -> list[list[Any]]:
    """What belongs to the values of each leaf of the inputs, of what there is for all of them."""
    rest = iter(flat)
    return [list(islice(rest, tree.num_leaves)) for tree in self._trees]

  def _find_closures(self) -> None:
    """The Refs that the function reaches by closure; none of them may be an argument too."""
    self.closures: Closures = {id(c): c for c in self.jaxpr.consts if _jax.is_ref(c)}
    for leaf in self.inputs.leaves:
      if isinstance(leaf, Variable):
        for ref in jax.tree.leaves(leaf._cell):
          if id(ref) in self.closures:
            raise AliasError.closure(leaf._def.origin)

  def closure_variable(self, key: int) -> Variable | None:
    """The Variable through which a Ref was reached by closure, if one was seen."""
    seen = self._observed.get(key)
    return None if seen is None else seen()

  def _apart(self, results: Sequence[Any]) -> tuple[Outputs, dict[int, Any], dict[int, Any]]:
    """The outputs, the final values of the caller's hijax Variables, and those of closures."""
    rest = iter(results)
    outputs = self.out_tree.unflatten(islice(rest, self.out_tree.num_leaves))
    finals = {i: t.unflatten(islice(rest, t.num_leaves)) for i, t in self._hijax.items()}
    return outputs, finals, dict(zip(self.closures, rest, strict=True))

  def finals_of(self, results: Sequence[Any]) -> tuple[dict[int, list[Any]], dict[int, Any]]:
    """Of what there is for each result of `pure`: that of final values, by leaf and by closure."""
    outputs, finals, closures = self._apart(range(len(results)))
    by_leaf = dict(zip(outputs.spec.written, outputs.written, strict=True)) | finals
    of = lambda tree: [results[j] for j in jax.tree.leaves(tree)]
    return {i: of(x) for i, x in by_leaf.items()}, {k: results[j] for k, j in closures.items()}

  def updated(self) -> set[int]:
    """Which of the caller's Variables are written in part, by `dynamic_update_slice`."""
    jaxpr = self.pure.jaxpr
    outputs, finals, _ = self._apart(jaxpr.outvars)
    after = dict(zip(outputs.spec.written, outputs.written, strict=True)) | finals
    before = self.by_leaf(jaxpr.invars)
    sources = {id(v): eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    source = lambda v: sources.get(id(v))
    alone = {i: before[i][0] for i in self.written if len(before[i]) == 1}
    return {i for i, v in alone.items() if view.is_updated(after.get(i), v, source)}

  def run(
    self,
    values: Sequence[Any],
    closures: dict[int, jax.Array],
    *,
    written: Sequence[int] | None = None,
    closures_written: Sequence[int] | None = None,
  ) -> Result:
    """Run on values; `written` may ask for more final values than the function writes.

    A value may be a `View`: where `updated` names it, so is what is written to it.
    """
    _, flat = self.operands(values, closures)
    if any(isinstance(x, View) for x in flat):
      results = view.evaluate(self.pure, flat)
    elif self._step is not None:
      results = _jax.call_jaxpr(self._step, [*self.pure.consts, *flat], "step")
    else:
      results = _jax.jaxpr_as_fun(self.pure)(*flat)
    written = sorted(self.written if written is None else written)
    wanted = sorted(self.closures_written if closures_written is None else closures_written)
    return self._result(results, values, closures, written, wanted)

  def run_with(
    self,
    evaluate: Callable[[Any, list[Any]], tuple[list[Any], Any]],
    values: Sequence[Any],
    closures: dict[int, jax.Array],
  ) -> tuple[Result, Any]:
    """`run` by another evaluation of the jaxpr, `(closed jaxpr, values) -> (results, more)`."""
    results, more = evaluate(*self.operands(values, closures))
    written, wanted = sorted(self.written), sorted(self.closures_written)
    return self._result(results, values, closures, written, wanted), more

  def operands(
    self, values: Sequence[Any], closures: dict[int, jax.Array]
  ) -> tuple[Any, list[Any]]:
    """The function as a closed jaxpr, and what it is run on: values, then those of closures."""
    flat = [*jax.tree.leaves(list(values)), *(closures[key] for key in self.closures)]
    return self.pure, list(map(_operand, flat))

  def _result(
    self,
    results: Sequence[Any],
    values: Sequence[Any],
    closures: dict[int, jax.Array],
    written: list[int],
    wanted: list[int],
  ) -> Result:
    outputs, finals, after = self._apart(results)
    finals = {i: finals[i] for i in written if i in finals}
    after = {key: after[key] for key in wanted if key in after}
    if not self._is_final:
      finals, after = jax.tree.map(_without_tangent, (finals, after))
    given = dict(zip(outputs.spec.written, outputs.written, strict=True)) | finals
    spec = outputs.spec._replace(written=tuple(written))
    fresh = jax.tree.map(value_of, outputs.fresh)
    outputs = Outputs([given.get(i, values[i]) for i in written], fresh, spec)
    return Result(outputs, {key: after.get(key, closures[key]) for key in wanted})

  def run_apart(
    self, values: list[Any], closures: dict[int, Any]
  ) -> tuple[Outputs, dict[int, Any]]:
    """`run` for transforms that take specs: a plain tuple of its results."""
    result = self.run(values, closures)
    return result.outputs, result.closures


def _operand(x: Any) -> Any:
  """`x` as an operand of a jaxpr: an array, or a `View` of one."""
  return x if isinstance(x, jax.Array | View) else jnp.asarray(x)  # which takes 10 us of an array


def _without_tangent(x: Any) -> Any:
  """The final value of a Ref carries none; under some transforms JAX makes it explicit zeros."""
  if isinstance(x, View):
    return View(_without_tangent(x.stacked), x.index)
  return jax.lax.stop_gradient(x) if needs_guard(x) else x


def values_of(inputs: Inputs) -> list[Any]:
  """The current value of each leaf of the inputs."""
  return values_at_once(inputs.leaves)


def read_closures(stages: Sequence[Staged]) -> tuple[Closures, dict[int, jax.Array]]:
  """All Refs that the functions reach by closure, and their values."""
  refs = {key: ref for staged in stages for key, ref in staged.closures.items()}
  return refs, {key: _jax.read_cell(ref) for key, ref in refs.items()}
