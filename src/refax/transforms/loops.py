"""nnx.scan, nnx.while_loop and nnx.fori_loop: loops whose steps read and write state.

All state that a loop writes travels in JAX's carry, as arrays; state that it only reads stays
outside. A scan may also give each step a slice of the state of its own (a stack of layers).
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refax.core.array_protocol import unwrap
from refax.core.graphdef import LEAF, NODE, REGION, GraphDef
from refax.core.variable import Variable
from refax.errors import TreeMismatchError
from refax.transforms.axes import Carry, argument_axes, assign, counted, move, size_of
from refax.transforms.axis_names import kept_up
from refax.transforms.eager import compiled_once
from refax.transforms.fast import is_eager
from refax.transforms.lift import Inputs, Outputs
from refax.transforms.stage import Result, Staged, read_closures, values_of
from refax.transforms.view import View, value_of
from refax.typing import ArrayLike, describe, path_str


def scan(
  f: Callable | None = None,
  *,
  length: int | None = None,
  reverse: bool = False,
  unroll: int | bool = 1,
  in_axes: Any = (Carry, 0),
  out_axes: Any = (Carry, 0),
  transform_metadata: Mapping[str, Any] | None = None,
) -> Any:
  """Run a function step by step over an axis, as `jax.lax.scan`, with any arguments.

  Args:
    f: a function of Modules, Variables and arrays; without it, a decorator is returned.
    length: the number of steps, where no argument tells.
    reverse: whether to go from the last slice to the first.
    unroll: as in `jax.lax.scan`.
    in_axes: for each positional argument `nnx.Carry` (what a step hands to the next), an axis (each
      step gets a slice), None (all steps share it), or `nnx.StateAxes` with an axis or None for
      each filter. Shared state that a step writes is seen by the next. Keyword arguments are
      shared.
    out_axes: `nnx.Carry` for the part of what `f` returns that is the carry, an axis along which
      the results of all steps are stacked, or None for the result of the last step.
    transform_metadata: `{nnx.PARTITION_NAME: name}`, the name of the axis in the `out_sharding` of
      sliced Variables; without it, Variables that `f` makes get None, an axis that is not divided.

  Returns:
    A function with the arguments of `f`, that returns what `f` returns: the carry after the last
    step and stacked results. Mapped state is written back along its axis; what a mapped argument
    gains (an attribute that `sow` adds) is stacked along axis 0, what a shared one gains is that
    of the last step.

  Raises:
    TreeMismatchError: axes do not fit, lengths differ, or the carry changes its structure.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> layers = nnx.vmap(lambda rngs: nnx.Linear(3, 3, rngs=rngs))(nnx.Rngs(0).split(8))
  >>> forward = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
  >>> forward(jnp.ones((2, 3)), layers).shape
  (2, 3)
  """
  options = {
    "length": length,
    "reverse": reverse,
    "unroll": unroll,
    "in_axes": in_axes,
    "out_axes": out_axes,
  }
  if f is None:
    return lambda f: scan(f, transform_metadata=transform_metadata, **options)
  f = kept_up(f, transform_metadata, in_axes=in_axes, out_axes=out_axes)

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    args, kwargs = counted(f, args, kwargs, in_axes)
    call = Scan(f, args, kwargs, in_axes=in_axes, out_axes=out_axes, length=length)
    return call.run(reverse, unroll)

  return wrapper


def while_loop(cond_fun: Callable, body_fun: Callable, init_val: Any) -> Any:
  """Run a function while a condition holds, as `jax.lax.while_loop`.

  Args:
    cond_fun: `val -> bool`; it may read state that `body_fun` writes, and writes none itself.
    body_fun: `val -> val`.
    init_val: Modules, Variables, arrays, any pytree of these.

  Returns:
    The last `val`.

  Raises:
    TreeMismatchError: `body_fun` returns another structure, shape or dtype than it got, or
      `cond_fun` writes state.

  >>> from refax import nnx
  >>> def double(v):
  ...   v[...] *= 2
  ...   return v
  >>> int(nnx.while_loop(lambda v: v < 100, double, nnx.Variable(1)))
  128
  """
  return _loop(
    (init_val,),
    body_fun,
    lambda conds, step, start: jax.lax.while_loop(conds[0], step, start),
    "the body of nnx.while_loop",
    conditions=(cond_fun,),
  )


def fori_loop(
  lower: ArrayLike,
  upper: ArrayLike,
  body_fun: Callable,
  init_val: Any,
  *,
  unroll: int | bool | None = None,
) -> Any:
  """Run a function for each integer of a range, as `jax.lax.fori_loop`.

  Args:
    lower: the first integer.
    upper: the end of the range, not included.
    body_fun: `(i, val) -> val`.
    init_val: Modules, Variables, arrays, any pytree of these.
    unroll: as in `jax.lax.fori_loop`.

  Returns:
    The last `val`.

  Raises:
    TreeMismatchError: `body_fun` returns another structure, shape or dtype than it got.

  >>> from refax import nnx
  >>> def add(i, total):
  ...   total += i
  ...   return total
  >>> int(nnx.fori_loop(0, 5, add, nnx.Variable(0)))
  10
  """
  bounds = unwrap(lower), unwrap(upper)

  def run(conds, step, start):
    body = lambda i, state: step(state, {0: i})
    return jax.lax.fori_loop(*bounds, body, start, unroll=unroll)

  index = jnp.zeros((), jnp.result_type(*bounds))
  return _loop((index, init_val), body_fun, run, "the body of nnx.fori_loop")


def _loop(
  args: tuple, body: Callable, run: Callable, what: str, conditions: tuple[Callable, ...] = ()
) -> Any:
  """A loop whose last argument, and the state that it writes, are carried."""
  inputs = Inputs.of(args, {})
  values = values_of(inputs)
  entry = inputs.arguments[-1]
  staged, carry, values = _stage_carried(
    body, inputs, values, lambda s: [(entry, s.outputs.spec.graphdef.root)], what
  )
  conds = [Staged(c, inputs, values, is_compiled=is_eager()) for c in conditions]
  if any(c.written or c.closures_written for c in conds):
    raise TreeMismatchError.condition("nnx.while_loop")
  for cond in conds:
    _condition(cond)
  refs, closures = read_closures([staged, *conds])

  def loop(values: list[Any], closures: dict[int, Any]) -> _State:
    step = lambda state, given=None: carry.after(
      state, staged.run(carry.values(values, state, given or {}), closures | state.closures)
    )

    def test(cond: Staged, state: _State) -> Any:
      current = carry.values(values, state, {})
      fresh = cond.run(current, closures | state.closures).outputs.fresh
      return unwrap([*current, *fresh][_condition(cond)])

    tests = [functools.partial(test, c) for c in conds]
    return run(tests, step, carry.start(values, closures))

  last = compiled_once(loop, values, closures)
  fresh = [carry.final(i, last) for i in range(len(staged.outputs.fresh))]
  spec = staged.outputs.spec._replace(written=tuple(sorted(staged.written)))
  outputs = Outputs([last.cells[i] for i in spec.written], fresh, spec)
  return inputs.commit(outputs, refs, last.closures)


def _condition(cond: Staged) -> int:
  """The leaf that a condition returns, a new one or a Variable that it got."""
  graphdef = cond.outputs.spec.graphdef
  if graphdef.root[0] != LEAF:
    got = difference([], signature(graphdef.root, graphdef))[1]
    raise TreeMismatchError.no_boolean("nnx.while_loop", got)
  return graphdef.root[1]


class _State(NamedTuple):
  """What JAX carries from step to step: by leaf of the inputs, and by Ref."""

  cells: dict[int, Any]  # state that is written, and not sliced
  arrays: dict[int, Any]  # the arrays of the carry
  closures: dict[int, Any]


class _Carry:
  """How the carry that a step returns becomes the carry that the next step gets.

  `links` pairs each leaf of the carry on the way in with the leaf on the way out. A Variable is
  paired with itself, for its value travels with the state; an array with the new array.
  """

  def __init__(self, staged: Staged, pairs: list[tuple[tuple, tuple]], what: str, sliced=()):
    self.staged = staged
    self.count = len(staged.inputs.leaves)
    self.written = sorted(staged.written)
    self.kept = [i for i in self.written if i not in sliced]
    self.links: dict[int, int] = {}
    for before, after in pairs:
      self._link(before, after, what)
    self._source = {out: i for i, out in self.links.items()}

  def _link(self, before: tuple, after: tuple, what: str) -> None:
    graphs = self.staged.inputs.graphdef, self.staged.outputs.spec.graphdef
    was, now = signature(before, graphs[0]), signature(after, graphs[1])
    leaves = [leaf_indices(e, g) for e, g in zip((before, after), graphs, strict=True)]
    if was != now:
      raise TreeMismatchError.carry(what, *difference(was, now))
    for i, out in zip(*leaves, strict=True):
      if out != i and (out < self.count or i in self.written):
        origin = self.staged.inputs.leaves[i]._def.origin
        raise TreeMismatchError.carry(what, origin, "another Variable in its place")
      if out != i:
        self.links[i] = out

  def fresh_value(self, out: int, outputs: Outputs) -> Any:
    leaf = outputs.fresh[out - self.count]
    return leaf._cell if isinstance(leaf, Variable) else leaf

  def start(self, values: list[Any], closures: dict[int, Any]) -> _State:
    return _State(
      {i: values[i] for i in self.kept},
      {i: jax.tree.map(jnp.asarray, values[i]) for i in self.links},
      {key: closures[key] for key in sorted(self.staged.closures_written)},
    )

  def values(self, base: list[Any], state: _State, given: dict[int, Any]) -> list[Any]:
    """The value of each leaf in this step."""
    current = state.cells | state.arrays | given
    return [current.get(i, v) for i, v in enumerate(base)]

  def after(self, state: _State, result: Result) -> _State:
    final = dict(zip(self.written, result.outputs.written, strict=True))
    arrays = {i: self.fresh_value(out, result.outputs) for i, out in self.links.items()}
    return _State({i: final[i] for i in self.kept}, arrays, result.closures)

  def final(self, index: int, last: _State) -> Any:
    """The new leaf `index` after the last step: the array, or the Variable with its value."""
    template = self.staged.outputs.fresh[index]
    value = last.arrays[self._source[self.count + index]]
    if isinstance(template, Variable):
      return template._handle(value, template._def)
    return value

  def is_carried(self, index: int) -> bool:
    """Whether the new leaf `index` is part of the carry."""
    return self.count + index in self._source


def _stage_carried(
  f: Callable, inputs: Inputs, values: list[Any], pairs: Callable, what: str, sliced: Any = None
) -> tuple[Staged, _Carry, list[Any]]:
  """Trace a step; numbers in the carry take the dtype that the step gives them, as in JAX."""
  slices = sliced or {}
  for attempt in range(2):
    elements = [slices.get(i, v) for i, v in enumerate(values)]
    staged = Staged(f, inputs, elements, is_compiled=is_eager())
    carry = _Carry(staged, pairs(staged), what, slices)
    changed = {}
    for i, out in carry.links.items():
      was = jax.tree.map(jnp.asarray, values[i])
      now = carry.fresh_value(out, staged.outputs)
      if all(map(_same_type, jax.tree.leaves(was), jax.tree.leaves(now))):
        continue
      weak = all(getattr(x, "weak_type", False) for x in jax.tree.leaves(was))
      if attempt or not weak or not _widens(was, now):
        path = path_str(inputs.graphdef.paths[i][2:])
        raise TreeMismatchError.carry(what, describe(was), describe(now), path)
      changed[i] = jnp.asarray(was, now.dtype)
    if not changed:
      return staged, carry, values
    values = [changed.get(i, v) for i, v in enumerate(values)]
  raise AssertionError("the second attempt returns or raises")


def _widens(was: Any, now: Any) -> bool:
  """Whether a weakly typed number like `was` becomes an array like `now`, as JAX promotes."""
  return jnp.shape(was) == now.shape and jnp.result_type(was, now) == now.dtype


def _slice_type(value: Any, axis: int) -> Any:
  """The shapes and dtypes of a slice of a value."""
  mesh = jax.sharding.get_abstract_mesh()
  return jax.tree.map(lambda x: _type_of_slice(jax.typeof(x), axis, mesh), value)


@functools.lru_cache(maxsize=1024)  # JAX's trace of it takes a tenth of the time of a loop
def _type_of_slice(aval: Any, axis: int, _mesh: Any) -> Any:
  def first(x: Any) -> Any:
    if x.shape[axis]:
      return jnp.take(x, 0, axis)
    return jax.lax.full(jnp.moveaxis(x, axis, 0).shape[1:], 0, x.dtype)

  return jax.eval_shape(first, aval)


def _same_type(a: Any, b: Any) -> bool:
  return a.shape == b.shape and a.dtype == b.dtype


class Scan:
  """One call of a scanned function: which leaf is carried, sliced or shared."""

  def __init__(self, f, args, kwargs, *, in_axes, out_axes, length):
    self.inputs = Inputs.of(args, kwargs)
    values = values_of(self.inputs)
    axes = argument_axes(self.inputs, in_axes, len(args), default=None)
    self.sliced = {i: axis for i, axis in axes.items() if isinstance(axis, int)}
    size = size_of(self.sliced, values, self._name, "nnx.scan")
    if size is not None and length not in (None, size):
      raise TreeMismatchError.sizes("nnx.scan", {"length": length, "the arguments": size})
    self.length = length if size is None else size
    if self.length is None:
      raise TreeMismatchError.no_size("nnx.scan", repr(in_axes), "length")
    slices = {i: _slice_type(values[i], axis) for i, axis in self.sliced.items()}
    prefixes = in_axes if isinstance(in_axes, tuple | list) else (in_axes,) * len(args)
    entries = map(self._entry, self.inputs.arguments)
    self.prefixes = list(zip(prefixes, entries, strict=False))
    before = [entry for prefix, entry in self.prefixes if prefix is Carry]
    pairs = functools.partial(self._pairs, before, out_axes)
    what = "the function of nnx.scan"
    self.staged, self.carry, self.values = _stage_carried(
      f, self.inputs, values, pairs, what, slices
    )
    self.in_place = {i for i in self.staged.updated() if self.sliced.get(i) == 0}
    """Slices that a step writes in part: the stacked array is carried, see `view.py`."""

  def _name(self, index: int) -> str:
    return path_str(self.inputs.graphdef.paths[index][1:])

  def _entry(self, entry: tuple) -> tuple:
    """The entry of an argument; of None as it is in a result, a pytree without leaves."""
    if entry[0] == LEAF and self.inputs.leaves[entry[1]] is None:
      return (REGION, jax.tree.structure(None), ())
    return entry

  def _pairs(self, before: list[tuple], out_axes: Any, staged: Staged) -> list:
    """(entry on the way in, on the way out) of what is carried; the rest of `f`'s results aside."""
    parts = out_parts(out_axes, staged.outputs.spec.graphdef.root)
    after = [entry for prefix, entry in parts if prefix is Carry]
    self.results = [(prefix, entry) for prefix, entry in parts if prefix is not Carry]
    if len(before) != len(after):
      got = f"{len(before)} nnx.Carry in in_axes, {len(after)} in out_axes"
      raise TreeMismatchError.axes("in_axes and out_axes", "", got)
    return list(zip(before, after, strict=True))

  def run(self, reverse: bool, unroll: int | bool) -> Any:
    staged, carry = self.staged, self.carry
    refs, closures = read_closures([staged])
    xs = {i: move(self.values[i], axis, 0) for i, axis in self.sliced.items()}
    whole = {i: jnp.asarray(xs.pop(i)) for i in sorted(self.in_place)}
    index = jnp.arange(self.length) if whole else None

    def loop(shared: list[Any], closures: dict[int, Any], whole: dict[int, Any], given: Any):
      def step(loop: tuple[_State, dict[int, Any]], given: tuple[Any, dict[int, Any]]):
        (state, whole), (index, xs) = loop, given
        views = {i: View(x, index) for i, x in whole.items()}
        values = carry.values(shared, state, xs | views)
        result = staged.run(values, closures | state.closures)
        final = dict(zip(carry.written, result.outputs.written, strict=True))
        whole = {i: final[i].stacked for i in whole}
        fresh = {i: x for i, x in enumerate(result.outputs.fresh) if not carry.is_carried(i)}
        sliced = {i: value_of(final[i]) for i in final if i in xs}
        return (carry.after(state, result), whole), (sliced, fresh)

      start = carry.start(shared, closures), whole
      return jax.lax.scan(step, start, given, length=self.length, reverse=reverse, unroll=unroll)

    (last, whole), (written, stacked) = compiled_once(
      loop, self._shared(), closures, whole, (index, xs)
    )
    written = {i: move(x, 0, self.sliced[i]) for i, x in written.items()} | whole | last.cells
    spec = staged.outputs.spec._replace(written=tuple(carry.written))
    fresh = self._fresh(stacked, last, 0 if reverse else -1)
    outputs = Outputs([written[i] for i in spec.written], fresh, spec)
    return self.inputs.commit(outputs, refs, last.closures)

  def _shared(self) -> list[Any]:
    """The values that are not sliced: each step is given slices in the place of the others."""
    return [None if i in self.sliced else x for i, x in enumerate(self.values)]

  def _fresh(self, stacked: dict[int, Any], last: _State, end: int) -> list[Any]:
    """The new leaves: the last carry, and results stacked along their axis, or the last of them."""
    outputs = self.staged.outputs
    leaves = [*self.inputs.leaves, *outputs.fresh]
    axes = self._gained_axes(leaves)
    for prefix, entry in self.results:
      axes |= assign(prefix, entry, outputs.spec.graphdef, leaves, "out_axes")
    fresh = []
    for i in range(len(outputs.fresh)):
      axis = axes.get(self.carry.count + i)
      if self.carry.is_carried(i):
        fresh.append(self.carry.final(i, last))
      elif axis is None:
        fresh.append(jax.tree.map(lambda a: a[end], stacked[i]))
      else:
        fresh.append(move(stacked[i], 0, axis))
    return fresh

  def _gained_axes(self, leaves: list[Any]) -> dict[int, Any]:
    """Axis 0 for the leaves that sliced arguments have gained: each step had a slice of its own."""
    axes: dict[int, Any] = {}
    for prefix, entry in self.prefixes:
      if prefix is not Carry:
        graphdef = self.staged.outputs.spec.graphdef
        found = assign(prefix, entry, graphdef, leaves, "in_axes")
        axes |= {i: 0 for i, axis in found.items() if isinstance(axis, int)}
    return axes


def out_parts(out_axes: Any, root: tuple, what: str = "out_axes") -> list[tuple[Any, tuple]]:
  """(prefix, entry) of each part of what a function returns: the whole, or a tuple's elements."""
  if not isinstance(out_axes, tuple | list):
    return [(out_axes, root)]
  children = root[1].children() if root[0] == REGION else []
  if len(children) != len(out_axes):
    got = f"{len(out_axes)} axes for {len(children) or 'one'} result(s)"
    raise TreeMismatchError.axes(what, "", got)
  parts, entries = [], list(root[2])
  for prefix, treedef in zip(out_axes, children, strict=True):
    mine, entries = entries[: treedef.num_leaves], entries[treedef.num_leaves :]
    is_leaf = jax.tree_util.treedef_is_leaf(treedef) and len(mine) == 1
    parts.append((prefix, mine[0] if is_leaf else (REGION, treedef, tuple(mine))))
  return parts


def leaf_indices(entry: tuple, graphdef: GraphDef) -> list[int]:
  """The leaves below an entry, in order."""
  return [e[1] for _, e in graphdef.walk(entry) if e[0] == LEAF]


def signature(entry: tuple, graphdef: GraphDef) -> list[tuple]:
  """The structure below an entry, without the numbers of its leaves and nodes."""
  signature = []
  for path, (sort, *rest) in graphdef.walk(entry):
    if sort == NODE:
      rest = [graphdef.nodes[rest[0]][0].__name__]
    elif sort == REGION:
      rest = rest[:1]
    signature.append((path_str(path), sort, ("*",) if sort == LEAF else tuple(rest)))
  return signature


def difference(was: list[tuple], now: list[tuple]) -> tuple[str, str]:
  """The first place where two structures differ, in words."""

  def name(path: str, sort: int, what: tuple) -> str:
    return path or "one value" if sort == LEAF else f"{path} {what[-1]}".strip()

  pairs = itertools.zip_longest(was, now)
  old, new = next((a, b) for a, b in pairs if a != b)
  if new is not None and all(path != new[0] for path, *_ in was):
    return f"nothing at {new[0]}", name(*new)
  if old is not None and all(path != old[0] for path, *_ in now):
    return name(*old), f"nothing at {old[0]}"
  return (name(*old) if old else "nothing there"), (name(*new) if new else "nothing there")
