"""stage: a function of objects, traced once into a pure function of values.

State goes in and comes out as arrays, so any JAX transform may be applied to it, also those that
refuse Refs (a branch under `jax.grad`, a scan carry). Inside, Variables are hijax where those of
the caller are: their cells are Refs that live in the trace. What is written is read off the jaxpr,
and state that the function reaches by closure is found there too.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refax import _jax
from refax.core.gather import as_kept
from refax.core.observe import compiled_as_is, observe
from refax.core.storage import as_array, needs_guard, write_ref
from refax.core.variable import Variable
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
  """

  def __init__(
    self, fn: Callable, inputs: Inputs, values: Sequence[Any], *, is_final: bool = False
  ):
    self.inputs = inputs
    self._is_final = is_final

    def traced(values):
      with compiled_as_is(()) if is_final else contextlib.nullcontext():
        return staged(values)

    def staged(values):
      frame = inputs.enter(entered(inputs, values))
      args, kwargs = frame.args
      outputs = frame.collect(fn(*args, **kwargs))
      local = [i for i in range(len(frame.leaves)) if frame.is_local(i)]
      finals = {i: jax.tree.map(lambda ref: ref[...], frame.leaves[i]._cell) for i in local}
      return finals, outputs

    with observe() as self._observed:
      self._jaxpr, shapes = _jax.traced(traced, list(values))
    self._tree = jax.tree.structure(shapes)
    self.finals, self.outputs = shapes  # shapes and dtypes
    self._find_effects(values)
    self._find_closures()
    self._purify(values)

  def _find_effects(self, values: Sequence[Any]) -> None:
    """Which of the caller's Variables, and which Refs by closure, are read and written."""
    jaxpr = self._jaxpr.jaxpr
    # Each Ref is read once more at the end, for its final value: not the function's doing.
    last = {id(v) for v in jaxpr.outvars[: len(jax.tree.leaves(self.finals))]}
    own = [e for e in jaxpr.eqns if not any(id(out) in last for out in e.outvars)]
    reads, writes = _jax.ref_effects(jaxpr.replace(eqns=own, effects=set()))
    source = {id(out): e.invars[0] for e in jaxpr.eqns for out in e.outvars if e.invars}
    self.read, self.written = set(), set(self.outputs.spec.written)
    outvars = iter(jaxpr.outvars)
    for index, final in self.finals.items():
      refs = [source.get(id(next(outvars))) for _ in jax.tree.leaves(final)]
      self.read |= {index} if any(ref in reads for ref in refs) else set()
      self.written |= {index} if any(ref in writes for ref in refs) else set()
    used = {id(v) for e in own for v in e.invars}
    invars = iter(jaxpr.invars)
    for index, value in enumerate(values):  # a lojax Variable is read where its array is used
      mine = [next(invars) for _ in jax.tree.leaves(value)]
      leaf = self.inputs.leaves[index]
      if isinstance(leaf, Variable) and not leaf.is_hijax and any(id(v) in used for v in mine):
        self.read.add(index)
    consts = list(zip(jaxpr.constvars, self._jaxpr.consts, strict=True))
    self.closures_read = {id(ref) for var, ref in consts if var in reads}
    self.closures_written = {id(ref) for var, ref in consts if var in writes}

  def _find_closures(self) -> None:
    """The Refs that the function reaches by closure; none of them may be an argument too."""
    self.closures: Closures = {id(c): c for c in self._jaxpr.consts if _jax.is_ref(c)}
    for leaf in self.inputs.leaves:
      if isinstance(leaf, Variable):
        for ref in jax.tree.leaves(leaf._cell):
          if id(ref) in self.closures:
            raise AliasError.closure(leaf._def.origin)

  def closure_variable(self, key: int) -> Variable | None:
    """The Variable through which a Ref was reached by closure, if one was seen."""
    seen = self._observed.get(key)
    return None if seen is None else seen()

  def _purify(self, values: Sequence[Any]) -> None:
    """Turn the jaxpr into one of values only: Refs inside it become values that are passed on."""
    self._in_tree = jax.tree.structure(list(values))
    if not self.closures:  # all Refs are made inside: the second trace would be the first one
      self._pure = _jax.discharge(self._jaxpr)
      self._pure_tree = jax.tree.structure(([0] * len(self._jaxpr.out_avals), {}))
      return

    def with_local_refs(given):
      flat, closures = given
      refs = {key: _jax.new_cell(value) for key, value in closures.items()}
      consts = [refs.get(id(c), c) if _jax.is_ref(c) else c for c in self._jaxpr.consts]
      results = _jax.jaxpr_as_fun(self._jaxpr.replace(consts=consts))(*flat)
      return results, {key: ref[...] for key, ref in refs.items()}

    avals = {key: jax.ShapeDtypeStruct(r.shape, r.dtype) for key, r in self.closures.items()}
    flat = jax.tree.leaves(list(values))
    closed, shapes = _jax.traced(with_local_refs, (flat, avals))
    self._pure = _jax.discharge(closed)
    self._pure_tree = jax.tree.structure(shapes)

  def updated(self) -> set[int]:
    """Which of the caller's Variables are written in part, by `dynamic_update_slice`."""
    jaxpr = self._pure.jaxpr
    results, _ = self._pure_tree.unflatten(jaxpr.outvars)
    finals, outputs = self._tree.unflatten(results)
    after = dict(zip(outputs.spec.written, outputs.written, strict=True)) | finals
    before = self._in_tree.unflatten(jaxpr.invars[: self._in_tree.num_leaves])
    sources = {id(v): eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    source = lambda v: sources.get(id(v))
    return {i for i in self.written if view.is_updated(after.get(i), before[i], source)}

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
      results = view.evaluate(self._pure, flat)
    else:
      results = _jax.jaxpr_as_fun(self._pure)(*flat)
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

  @property
  def pure(self) -> Any:
    """The function as a closed jaxpr of values."""
    return self._pure

  def operands(
    self, values: Sequence[Any], closures: dict[int, jax.Array]
  ) -> tuple[Any, list[Any]]:
    """The function as a closed jaxpr, and what it is run on: values, then those of closures."""
    mine = {key: closures[key] for key in self.closures}
    return self._pure, list(map(_operand, jax.tree.leaves((values, mine))))

  def _result(
    self,
    results: Sequence[Any],
    values: Sequence[Any],
    closures: dict[int, jax.Array],
    written: list[int],
    wanted: list[int],
  ) -> Result:
    results, after = self._pure_tree.unflatten(results)
    finals, outputs = self._tree.unflatten(results)
    finals = {i: finals[i] for i in written if i in finals}
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


def entered(inputs: Inputs, values: Sequence[Any]) -> dict[int, Entered]:
  """How the caller's leaves enter: Variables in the storage that they have outside."""
  return {
    i: Entered(value, isinstance(leaf, Variable) and leaf.is_hijax)
    for i, (leaf, value) in enumerate(zip(inputs.leaves, values, strict=True))
  }


def values_of(inputs: Inputs) -> list[Any]:
  """The current value of each leaf of the inputs."""
  with as_kept():
    return [x.get_value() if isinstance(x, Variable) else x for x in inputs.leaves]


def read_closures(stages: Sequence[Staged]) -> tuple[Closures, dict[int, jax.Array]]:
  """All Refs that the functions reach by closure, and their values."""
  refs = {key: ref for staged in stages for key, ref in staged.closures.items()}
  return refs, {key: _jax.read_cell(ref) for key, ref in refs.items()}


def write_closures(refs: Closures, values: dict[int, jax.Array]) -> None:
  """Write back state that was reached by closure."""
  for key, value in values.items():
    write_ref(refs[key], as_array(value), None, "a Variable that came by closure")
