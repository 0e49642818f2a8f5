"""nnx.find_nonfinite: which operation of which layer made the first NaN or infinity.

The function runs compiled, and says of the result of each operation whether it is finite, in each
step of each loop. From a result that is not finite, the way back leads through operations whose
results are not finite either, to the first whose arguments all were. An infinity that is masked
out later, as in `jnp.where(x > 0, jnp.log(x), 0)`, is not on that way.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refax import _jax
from refax.core.calls import path_of
from refax.core.module import Module
from refax.core.variable import Variable
from refax.errors import ExplicitAxesError
from refax.inspect.cost import is_backward_name, layer_of, scopes_of
from refax.inspect.numbers import Numbers
from refax.inspect.target import Arguments, like, owner_and_function
from refax.transforms.jit import leaf_name
from refax.transforms.lift import Inputs
from refax.transforms.stage import Staged, read_closures, values_of
from refax.transforms.taps import Found, Look, evaluate, inner_jaxprs, opened
from refax.typing import Path


class Statistics(NamedTuple):
  """What an array holds."""

  shape: tuple[int, ...]
  dtype: str
  nans: int
  infinities: int
  least: float
  """Of the finite elements; NaN if there are none."""
  greatest: float
  mean: float

  @classmethod
  def of(cls, x: Any) -> "Statistics":
    """The statistics of an array."""
    x = np.asarray(x)
    n = Numbers.of(x.real)
    extremes = (n.min, n.max) if n.low_to_high else (np.nan, np.nan)
    return cls(x.shape, str(x.dtype), n.nan, n.inf, *extremes, n.mean)

  def __str__(self) -> str:
    bad = [f"{n:,} {what}" for n, what in ((self.nans, "NaN"), (self.infinities, "inf")) if n]
    numbers = f"from {self.least:.4g} to {self.greatest:.4g}, mean {self.mean:.4g}"
    if np.isnan(self.least):
      numbers = "none finite" if bad else "empty"
    shape = ",".join(map(str, self.shape))
    return f"{self.dtype}[{shape}], {', '.join([*bad, numbers])}"


class NonFinite(NamedTuple):
  """The operation that made the first value that is not finite; see `nnx.find_nonfinite`.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> found = nnx.find_nonfinite(lambda x: jnp.log(x))(jnp.zeros(2))
  >>> print(found)  # doctest: +ELLIPSIS
  the first value that is not finite: log in outside of all layers (forward)
    line:   ...
    input:  float32[2], from 0 to 0, mean 0
    output: float32[2], 2 inf, none finite, first at [0]
  """

  module: str
  """The path of the layer; empty for an operation outside of all layers."""
  line: str
  """Where in the source the operation is called: file:line:column (function)."""
  operation: str
  """The name of JAX's primitive; `argument` if a value was not finite from the start."""
  is_backward: bool
  """Whether it belongs to the computation of gradients."""
  steps: tuple[tuple[int, int], ...]
  """(step, number of steps) of each loop that it is in; in a Stack, the index of the layer."""
  element: tuple[int, ...]
  """The index of the first element that is not finite: of a batch, its first number."""
  inputs: tuple[Statistics, ...]
  output: Statistics | None

  def __str__(self) -> str:
    if self.operation == "argument":
      return (
        f"an argument is not finite: {self.module}, first at {list(self.element)}\n  {self.output}"
      )
    where = self.module or "outside of all layers"
    steps = [f"step {i} of {n}" for i, n in self.steps]
    direction = "backward" if self.is_backward else "forward"
    what = f"{self.operation} in {where} ({', '.join([direction, *steps])})"
    lines = [f"the first value that is not finite: {what}", f"  line:   {self.line}"]
    lines += [f"  input:  {x}" for x in self.inputs]
    lines += [f"  output: {self.output}, first at {list(self.element)}"] if self.output else []
    return "\n".join(lines)


def find_nonfinite(fn: Callable) -> Callable[..., NonFinite | None]:
  """Which operation makes the first NaN or infinity in a function's result, or in its state?

  The function runs compiled, once, and again for the numbers; all state stays as it is. It looks
  through loops, `nnx.Stack`, `checkpoint`, `vmap`, nested `jit` and derivatives; of a
  `while` loop it knows the last step only.

  Args:
    fn: a function of Modules, Variables and arrays, such as a training step.

  Returns:
    A function with the arguments of `fn` that returns a `NonFinite`, which prints what happened;
    None if all is finite.

  Raises:
    ExplicitAxesError: layers compute in a mesh with explicit axes.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnp.log)
  >>> found = nnx.find_nonfinite(lambda model, x: model(x).sum())(model, jnp.zeros((1, 2)))
  >>> found.operation, found.element
  ('log', (0, 0))
  """
  owner, function = owner_and_function(fn)

  def wrapper(*args: Any, **kwargs: Any) -> NonFinite | None:
    arguments = Arguments.of((*owner, *args), kwargs)
    inputs = Inputs.of(arguments.args, arguments.kwargs)
    call = arguments.completing(function)
    staged = Staged(call, inputs, values_of(inputs), is_final=True)
    return found_in(staged, lambda path: leaf_name(function, path))

  return like(fn, wrapper)


def found_in(staged: Staged, name: Callable[[Path], str]) -> NonFinite | None:
  """The first value that is not finite in what a staged function does; `name` names arguments."""
  _, closures = read_closures([staged])
  closed, flat = staged.operands(values_of(staged.inputs), closures)
  keys: list[Found] = []

  def flags(flat):
    found, results, given = _flags(closed, flat)
    keys[:] = [f._replace(value=None) for f in found]
    return [f.value for f in found], results, given

  values, results, given = jax.device_get(jax.jit(flags)(flat))
  table = {_place(k): v for k, v in zip(keys, values, strict=True)}
  jaxpr = opened(closed)
  known = dict(zip(jaxpr.invars, given, strict=True))
  bad = [v for v, flags in zip(jaxpr.outvars, results, strict=True) if flags.any()]
  wanted = {v for v in bad if not _is_literal(v)}
  if not bad:
    return None
  search = _Search(table)
  place = search.first(jaxpr, (), (), wanted, known)
  if place is None or not search.is_sure:
    found = _argument(staged, name, is_sure=place is None)
    if found is not None or place is None:
      return found
  return _report(place, closed, flat, _paths(staged.inputs))


def _flags(closed: Any, flat: list[Any]) -> tuple[list[Found], list[Any], list[Any]]:
  look = Look(lambda eqn, _, results: [Found(id(eqn), list(map(_flag, results)))], _is_inexact)
  results, found = evaluate(closed, flat, look)
  return found, list(map(_flag, results)), list(map(_flag, flat))


def _flag(x: Any) -> jax.Array:
  """Whether there is a NaN, and whether there is an infinity."""
  if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
    return jnp.zeros(2, bool)
  aval: Any = jax.typeof(x)
  mesh, now = aval.sharding.mesh, jax.sharding.get_abstract_mesh()
  # Layers compute in `jax.sharding.auto_axes`, and JAX takes nothing of it where axes are explicit.
  if not mesh.empty and not now.empty and mesh != now:
    raise ExplicitAxesError.look("nnx.find_nonfinite", now)
  return jnp.stack([jnp.isnan(x).any(), jnp.isinf(x).any()])


def _is_inexact(eqn: Any) -> bool:
  dtype = lambda v: getattr(v.aval, "dtype", bool)
  return any(jnp.issubdtype(dtype(v), jnp.inexact) for v in eqn.outvars)


def _place(found: Found) -> tuple:
  return (*((id(eqn), branch) for eqn, branch in found.within), found.key)


class _Place(NamedTuple):
  """An operation, in the steps of the loops that it is in."""

  eqn: Any
  within: tuple[tuple[Any, int], ...]
  step: tuple[int, ...]


class _Search:
  """The way back from what is not finite. `table` has the flags of each operation's results."""

  def __init__(self, table: dict[tuple, list[Any]]):
    self._table = table
    self.is_sure = True
    """Whether all arguments of the operation that was found were finite."""

  def first(
    self, jaxpr: Any, within: tuple, index: tuple[int, ...], wanted: set[Any], given: dict[Any, Any]
  ) -> _Place | None:
    """The operation where what is wanted became not finite; None if the arguments were not.

    Args:
      jaxpr: where to look.
      within: the equations that it is nested in.
      index: the steps of the loops around it.
      wanted: its results that are not finite.
      given: the flags of its arguments.
    """
    flags = self._flags(jaxpr, within, index, given)
    bad, origin, source = set(wanted), None, None
    for eqn in reversed(jaxpr.eqns):
      if bad.isdisjoint(eqn.outvars):
        continue
      # An infinity that stands in the program is there for a purpose, as in masks; a NaN is not.
      arguments = [v for v in eqn.invars if flags(v).any() and not (_is_literal(v) and flags(v)[0])]
      if not arguments:
        origin = eqn
      elif any(flags(v)[0] for v in eqn.outvars) and not any(flags(v)[0] for v in arguments):
        source = eqn  # a NaN of infinities, which may have been there on purpose
      bad.update(v for v in arguments if not _is_literal(v))
    eqn = origin if origin is not None else source
    self.is_sure = origin is not None
    if eqn is None:
      return None
    mine = bad.intersection(eqn.outvars)
    return self._inside(eqn, within, index, mine, flags) or _Place(eqn, within, index)

  def _flags(
    self, jaxpr: Any, within: tuple, index: tuple[int, ...], given: dict[Any, Any]
  ) -> Callable[[Any], Any]:
    names = tuple((id(eqn), branch) for eqn, branch in within)
    known = dict(given)
    for eqn in jaxpr.eqns:
      lot = self._table.get((*names, id(eqn)))
      if lot is not None:
        known.update((v, x[index]) for v, x in zip(eqn.outvars, lot, strict=True))
    clean = np.zeros(2, bool)

    def flags(v: Any) -> Any:
      if _is_literal(v):
        x = np.asarray(v.val)
        is_number = np.issubdtype(x.dtype, np.inexact)
        return np.array([np.isnan(x).any(), np.isinf(x).any()]) if is_number else clean
      return known.get(v, clean)

    return flags

  def _inside(
    self, eqn: Any, within: tuple, index: tuple[int, ...], wanted: set[Any], flags: Callable
  ) -> _Place | None:
    """The operation inside an equation, if it has a jaxpr that was looked into."""
    name = eqn.primitive.name
    for branch, jaxpr in enumerate(inner_jaxprs(eqn)):
      inner = (*within, (eqn, branch))
      if name == "while" or not any(
        (*((id(e), b) for e, b in inner), id(x)) in self._table for x in jaxpr.eqns
      ):
        continue
      operands = eqn.invars[1:] if name == "cond" else eqn.invars
      given = dict(zip(jaxpr.invars, map(flags, operands), strict=True))
      if name == "scan":
        found = self._in_loop(eqn, jaxpr, inner, index, given)
      else:
        positions = [i for i, v in enumerate(eqn.outvars) if v in wanted]
        outs = {jaxpr.outvars[i] for i in positions if not _is_literal(jaxpr.outvars[i])}
        found = self.first(jaxpr, inner, index, outs, given)
      if found is not None:
        return found
    return None

  def _in_loop(
    self, eqn: Any, jaxpr: Any, inner: tuple, index: tuple[int, ...], given: dict[Any, Any]
  ) -> _Place | None:
    """The operation in the first step that returned what is not finite."""
    start, count = _jax.scan_counts(eqn)
    states = jaxpr.invars[start : start + count]
    steps = range(eqn.params["length"])
    for step in reversed(steps) if eqn.params["reverse"] else steps:
      at = (*index, step)
      flags = self._flags(jaxpr, inner, at, given)
      bad = {v for v in jaxpr.outvars if not _is_literal(v) and flags(v).any()}
      if bad and (found := self.first(jaxpr, inner, at, bad, given)) is not None:
        return found
      given = given | dict(zip(states, map(flags, jaxpr.outvars[:count]), strict=True))
    return None


def _is_literal(v: Any) -> bool:
  return hasattr(v, "val")


def _is_only_for_gradients(place: _Place, top: Any) -> bool:
  """Whether nothing but the computation of gradients uses what an operation computes.

  Its own name does not say so: JAX computes the factors of a gradient while it goes forward. What
  belongs to the function itself leads to its value, which may be used by nobody.
  """
  levels = [*(inner_jaxprs(eqn)[branch] for eqn, branch in reversed(place.within)), top]
  outer = [eqn for eqn, _ in reversed(place.within)]
  start = list(place.eqn.outvars)
  for i, jaxpr in enumerate(levels):
    used, consumed = set(start), set()
    for eqn in jaxpr.eqns:
      mine = used.intersection(v for v in eqn.invars if not _is_literal(v))
      consumed |= mine
      if mine and not _is_backward(eqn):
        used.update(eqn.outvars)
    reached = [k for k, v in enumerate(jaxpr.outvars) if not _is_literal(v) and v in used]
    if used - consumed - {jaxpr.outvars[k] for k in reached}:
      return False
    if not reached or i == len(outer):
      return not reached
    start = [outer[i].outvars[k] for k in reached]
  return False


def _is_backward(eqn: Any) -> bool:
  return is_backward_name(str(eqn.source_info.name_stack))


def _report(place: _Place, closed: Any, flat: list[Any], paths: set[str]) -> NonFinite:
  """What is said of an operation: it is computed once more, for its arguments and results."""
  at = tuple((id(e), b) for e, b in place.within)

  def find(eqn: Any, args: list[Any], results: list[Any]) -> list[Found]:
    return [Found(id(eqn), (args, results))]

  def numbers(flat):
    found = evaluate(closed, flat, Look(find, lambda eqn: eqn is place.eqn))[1]
    return next(f.value for f in found if _place(f)[:-1] == at)

  args, results = jax.device_get(jax.jit(numbers)(flat))
  loops = [e for e, _ in place.within if e.primitive.name == "scan"]
  numbers_of = lambda lot: [np.asarray(x)[place.step] for x in lot if _is_number(x)]
  args, results = numbers_of(args), numbers_of(results)
  output = next((x for x in results if not np.isfinite(x).all()), results[0])
  eqns = [*(e for e, _ in place.within), place.eqn]
  backward = any(map(_is_backward, eqns)) or _is_only_for_gradients(place, opened(closed))
  return NonFinite(
    _module([e.source_info.name_stack for e in eqns], paths),
    _line(place.eqn),
    place.eqn.primitive.name,
    backward,
    tuple((i, e.params["length"]) for i, e in zip(place.step, loops, strict=True)),
    tuple(int(i) for i in np.argwhere(~np.isfinite(output))[0]),
    tuple(map(Statistics.of, args)),
    Statistics.of(output),
  )


def _is_number(x: Any) -> bool:
  return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _argument(staged: Staged, name: Callable[[Path], str], *, is_sure: bool) -> NonFinite | None:
  """What is said where a value came that was not finite: its path.

  Args:
    staged: the function.
    name: what the user calls the leaf at a path.
    is_sure: whether an argument is to blame. If not, an array may be infinite on purpose, as a mask
      is; a Variable is not.
  """
  inputs = staged.inputs
  for path, leaf, value in zip(
    inputs.graphdef.paths, inputs.leaves, values_of(inputs), strict=True
  ):
    for x in jax.tree.leaves(value) if is_sure or isinstance(leaf, Variable) else ():
      if _is_number(x) and not bool(jnp.isfinite(x).all()):
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(np.asarray(x)))[0])
        return NonFinite(name(path), "", "argument", False, (), at, (), Statistics.of(x))
  if not is_sure:
    return None
  return NonFinite("", "", "a constant or a Variable by closure", False, (), (), (), None)


def _line(eqn: Any) -> str:
  from jax.extend import source_info_util  # which takes 60 ms to import

  return source_info_util.summarize(eqn.source_info)


def _module(stacks: list[Any], paths: set[str]) -> str:
  """The layer in the names of nested operations; all of the names if no layer is known."""
  steps = tuple(step for stack in stacks for step in scopes_of(stack))
  return layer_of(steps, paths) if paths else "/".join(steps)


def _paths(inputs: Inputs) -> set[str]:
  """The paths of all Modules among the arguments, each from the one that it lives in."""
  return {"/".join(map(str, path_of(x))) for x in inputs.objects if isinstance(x, Module)}
