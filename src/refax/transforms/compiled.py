"""One compiled call of nnx.jit: buffers out of the cells, one call of arrays, buffers back.

A Ref among the arguments of `jax.jit` costs 13-18 us a call, for it leaves JAX's C++ path. Here the
trace of a call is compiled as a function of arrays: state that is written is donated and returned,
state that is only read is neither. State that the function reaches by closure is treated alike.
"""

import itertools
import re
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refax import _jax
from refax.core.graphdef import LEAF, REGION
from refax.core.variable import Variable
from refax.transforms.commit import CompiledCommit, Outputs
from refax.transforms.lift import Inputs
from refax.transforms.tree import is_built_in


class Retraced(Exception):
  """JAX traces again (another context, sharding, device): this call needs another executable."""


class Container(NamedTuple):
  """An argument that is handed over as it is: lists, tuples and dicts of arrays and numbers."""

  argument: int
  """Which one, of `Inputs.arguments`."""
  treedef: Any
  leaves: tuple[int, ...]

  @classmethod
  def of(cls, argument: int, entry: tuple, is_item: Callable[[int], bool]) -> "Container | None":
    """The description of an argument; None if something else is in it.

    Args:
      argument: which one.
      entry: what the walk made of it.
      is_item: whether a leaf may be handed over in its container.
    """
    if entry[0] != REGION or not is_built_in(entry[1]):
      return None
    if not all(e[0] == LEAF and is_item(e[1]) for e in entry[2]):
      return None
    return cls(argument, entry[1], tuple(e[1] for e in entry[2]))

  def paths(self) -> dict[str, int]:
    """The leaves by what JAX calls their places."""
    flat, _ = jax.tree_util.tree_flatten_with_path(self.treedef.unflatten(self.leaves))
    return {jax.tree_util.keystr(path): i for path, i in flat}


class Items(NamedTuple):
  """The leaves of a call that are handed over as arrays, by index; all others hold Refs.

  An item is an array, or the cell of a lojax Variable.
  """

  given: list[int]
  """Those that may be overwritten."""
  direct: list[int]
  """Those in the arguments themselves, and in containers there that are not handed over."""
  containers: list[Container]
  variables: list[int]
  """The lojax Variables in objects."""
  arrays: list[int]
  """The arrays in objects."""

  @classmethod
  def of(cls, inputs: Inputs, mask: Sequence[bool], needed: Iterable[int]) -> "Items":
    """The items of a call.

    Args:
      inputs: its arguments.
      mask: for each leaf, whether it may be overwritten.
      needed: the leaves that the result will hold; each is to be found by itself.
    """
    leaves, apart = inputs.leaves, frozenset(needed)

    def is_item(i: int) -> bool:
      is_object = isinstance(leaves[i], Variable) or leaves[i] is None or _jax.is_ref(leaves[i])
      return not (is_object or mask[i] or i in apart)

    found = [Container.of(n, entry, is_item) for n, entry in enumerate(inputs.arguments)]
    containers = [c for c in found if c is not None]
    entries = [e for a in inputs.arguments for e in (a[2] if a[0] == REGION else [a])]
    direct = {entry[1] for entry in entries if entry[0] == LEAF}
    items, inside = cls([], [], containers, [], []), {i for c in containers for i in c.leaves}
    for i, (leaf, given) in enumerate(zip(leaves, mask, strict=True)):
      is_variable = isinstance(leaf, Variable)
      if leaf is None or _jax.is_ref(leaf) or (is_variable and leaf.is_hijax) or i in inside:
        continue
      lot = items.direct if i in direct else items.variables if is_variable else items.arrays
      (items.given if given else lot).append(i)
    return items

  def handed(self, item_of: Callable[[int], Any]) -> tuple[Any, ...]:
    """All that are not overwritten, as they are handed over; `item_of` gives each by its index."""
    return (
      *map(item_of, self.direct),
      *(c.treedef.unflatten(map(item_of, c.leaves)) for c in self.containers),
      *map(item_of, self.variables),
      *map(item_of, self.arrays),
    )

  def by_index(self, handed: Sequence[Any]) -> dict[int, Any]:
    """The items in what was handed over."""
    first, last = len(self.direct), len(self.direct) + len(self.containers)
    apart = [*self.direct, *self.variables, *self.arrays]
    items = dict(zip(apart, [*handed[:first], *handed[last:]], strict=True))
    for container, x in zip(self.containers, handed[first:last], strict=True):
      items |= zip(container.leaves, jax.tree.leaves(x), strict=True)
    return items

  def place(self, index: int, path: str) -> tuple[int, str]:
    """The item in a place of what was handed over, and the rest of the path to something in it."""
    first, last = len(self.direct), len(self.direct) + len(self.containers)
    if first <= index < last:
      return self.containers[index - first].paths()[path], ""
    apart = [*self.direct, *self.containers, *self.variables, *self.arrays]
    return apart[index], path


def item(leaf: Any) -> Any:
  """What is handed over of a leaf."""
  return leaf._cell if isinstance(leaf, Variable) else leaf


class Compiled:
  """The function of arrays for one structure of arguments.

  Args:
    inputs: the arguments of a call.
    mask: for each of their leaves, whether it may be overwritten.
    traced: the trace of the function on `(kept leaves, given leaves)`, by `jax.jit(...).trace`.
    jitted: the function of leaves that was traced.
    careful: keep what is written until the call has succeeded, for it may fail while it runs.
    names: what the user calls each leaf.
  """

  def __init__(
    self,
    inputs: Inputs,
    mask: Sequence[bool],
    traced: Any,
    jitted: Callable[..., Outputs],
    *,
    careful: bool,
    names: Callable[[], list[str]],
  ):
    self._closed, self._jitted, self._names = traced.jaxpr, jitted, names
    jaxpr = traced.jaxpr.jaxpr
    self.commit = CompiledCommit(inputs.graphdef, traced.out_info)
    self.items = Items.of(inputs, mask, self.commit.leaves)
    self._out_count = len(jax.tree.leaves(traced.out_info))
    self._order = sorted(range(len(mask)), key=lambda i: mask[i])  # as they were traced: kept first
    self._spans = _spans(inputs.leaves, self._order)
    flat, self._tree = jax.tree.flatten(_in_two(inputs.leaves, mask))
    self.closures = {i: c for i, c in enumerate(traced.jaxpr.consts) if _jax.is_ref(c)}
    refs = {i: x for i, x in enumerate(flat) if _jax.is_ref(x)}
    self._ref_places = list(refs)
    _, writes = _jax.ref_effects(jaxpr)
    used = _jax.used_vars(jaxpr)
    vars_: dict[Any, Any] = {i: jaxpr.invars[i] for i in refs}
    vars_ |= {("closure", i): jaxpr.constvars[i] for i in self.closures}
    self.written = [key for key, var in vars_.items() if var in writes]
    self.read = [key for key, var in vars_.items() if var in used and var not in writes]
    self._types = {k: (r.shape, r.dtype) for k, r in {**refs, **self._closure_refs}.items()}
    self.careful = careful or not _jax.only_refs_are_effects(traced.jaxpr)
    self._vars = {**dict(enumerate(jaxpr.invars)), **vars_}
    self._name = traced.fun_name
    writes_of = [vars_[key] for key in self.written]
    self._pure = None if self.careful else _jax.without_refs(traced.jaxpr, writes_of)
    self._compile(self.cells(inputs.leaves)[0])

  @property
  def _closure_refs(self) -> dict[Any, jax.Ref]:
    return {("closure", i): ref for i, ref in self.closures.items()}

  def cells(self, leaves: Sequence[Any]) -> tuple[list[jax.Ref], list[jax.Ref]]:
    """The Refs that a call writes, and those that it only reads, of these leaves."""
    flat = jax.tree.leaves([getattr(leaves[i], "_cell", leaves[i]) for i in self._order])
    refs: dict[Any, Any] = {i: flat[i] for i in self._ref_places} | self._closure_refs
    return [refs[key] for key in self.written], [refs[key] for key in self.read]

  def _compile(self, written: list[jax.Ref]) -> None:
    # A Ref stays where it is; for what a function returns, the compiler would choose.
    places = [_the(_jax.peek_cell(ref).sharding) for ref in written]
    call: Any = self._function()
    call = _pure(call) if _jax.checks_results() else call
    call.__name__ = call.__qualname__ = self._name  # what profiles and errors show
    self.jitted: Any = jax.jit(
      call,
      donate_argnums=() if self.careful else 0,
      out_shardings=(*places, *[None] * self._out_count),
    )
    self.call: Any = _settled(self.jitted, call) if self.careful else self.jitted

  def _function(self) -> Any:
    """The call as a function of arrays."""
    traces: list[None] = []
    this = weakref.ref(self)  # a cycle would hold Refs by closure until the collector runs

    def call(written, arrays, read=()):
      compiled = this()
      if compiled is None or (traces and not compiled.careful):
        raise Retraced
      traces.append(None)
      return compiled._trace(written, arrays, read)

    return call

  def _trace(self, written: Sequence[Any], arrays: Sequence[Any], read: Sequence[Any]) -> tuple:
    """What the function of arrays computes."""
    count = len(self.written)
    values = dict(zip([*self.written, *self.read], [*written[:count], *read], strict=True))
    items = dict(zip(self.items.given, written[count:], strict=True))
    items |= self.items.by_index(arrays)
    new, results = self._of_values(values, items) or self._of_refs(values, items)
    return (*new, *self._own(results))

  def _of_values(self, values: dict[Any, Any], items: dict[int, Any]) -> Any:
    """What is written, and the results, if the trace could be made one of values."""
    if self._pure is None:
      return None
    closed, kept = self._pure
    cells = {self._vars[key]: x for key, x in values.items()}
    flat = self._flat(dict.fromkeys(self._types), items)
    by_var = {self._vars[i]: x for i, x in enumerate(flat)} | cells
    args = [by_var[var] for var in kept]
    if not _jax.fits(closed, args):
      return None
    out = _jax.call_jaxpr(closed, args, self._name)
    return out[: len(self.written)], out[len(self.written) :]

  def _of_refs(self, values: dict[Any, Any], items: dict[int, Any]) -> Any:
    """What is written, and the results, by Refs like the caller's."""
    # A cell that is neither read nor written stays out: nothing asks for its value.
    refs = {
      key: _jax.new_cell(values[key] if key in values else jnp.zeros(shape, dtype))
      for key, (shape, dtype) in self._types.items()
    }
    results = self._run(refs, self._flat(refs, items))
    return [refs[key][...] for key in self.written], results

  def _flat(self, refs: dict[Any, Any], items: dict[int, Any]) -> list[Any]:
    """The flat leaves as they were traced."""
    flat: list[Any] = []
    for i in self._order:
      flat += jax.tree.leaves(items[i]) if i in items else [refs[key] for key in self._spans[i]]
    return flat

  def _run(self, refs: dict[Any, jax.Ref], flat: list[Any]) -> list[Any]:
    """The function on Refs, of which JAX has the trace already."""
    if not (self.closures or self.careful):
      return jax.tree.leaves(self._jitted(*self._tree.unflatten(flat)))
    consts = [refs.get(("closure", i), c) for i, c in enumerate(self._closed.consts)]
    return _jax.jaxpr_as_fun(self._closed.replace(consts=consts))(*flat)

  def _own(self, results: list[Any]) -> list[Any]:
    """The results, with an array of its own for each new Ref: JAX hands inputs out as they are."""
    new = iter(results)
    own = list(itertools.islice(new, sum(tree.num_leaves for _, tree in self.commit.written)))
    for fresh in self.commit.fresh:
      arrays = itertools.islice(new, fresh.treedef.num_leaves)
      own += map(jnp.copy, arrays) if fresh.hijax else arrays
    return own

  def lower(self, leaves: Sequence[Any]) -> Any:
    """The lowered computation, by `jax.jit(...).lower`."""
    written, read = ([_jax.peek_cell(ref) for ref in refs] for refs in self.cells(leaves))
    item_of = lambda i: item(leaves[i])
    given, handed = map(item_of, self.items.given), self.items.handed(item_of)
    return self.jitted.lower([*written, *given], handed, *([read] if read else []))

  def renamed(self, error: Exception) -> Exception:
    """An error of JAX that names the user's arguments, and not those of the compiled function."""
    text = _OURS.sub(self._named, str(error))
    if "incompatible devices" in text:
      text += _ON_ONE_MESH
    return error if text == str(error) else type(error)(text)

  def _named(self, match: re.Match) -> str:
    sort, index, path = match[1], int(match[2]), match[3]
    if sort == "arrays":
      at, path = self.items.place(index, path)
      return self._names()[at] + path
    if sort == "written" and index >= len(self.written):
      return self._names()[self.items.given[index - len(self.written)]] + path
    key = (self.written if sort == "written" else self.read)[index]
    if not isinstance(key, int):
      return "a Variable that came by closure"
    return self._names()[next(i for i, span in self._spans.items() if key in span)] + path


_ON_ONE_MESH = (
  "\n  fix: lay all of them out on one mesh: nnx.device_put(model, sharding), or "
  "nnx.shard(model, mesh, plan); or call inside `with jax.set_mesh(mesh)`"
)
_OURS = re.compile(
  r"(?:(?<=argument )|(?<=argument path is ))(written|read|arrays)\[(\d+)\]((?:\[[^\]]*\])*)"
)


_places: dict[Any, Any] = {}


def _the(sharding: Any) -> Any:
  """The one of all equal shardings: JAX compares two in Python, 1 us for each array and call."""
  if len(_places) > 1024:
    _places.clear()
  return _places.setdefault(sharding, sharding)


def _in_two(leaves: Sequence[Any], mask: Sequence[bool]) -> tuple[tuple, tuple]:
  """The leaves that are kept, and those that may be overwritten."""
  kept, given = (
    [x for x, m in zip(leaves, mask, strict=True) if m is is_] for is_ in (False, True)
  )
  return tuple(kept), tuple(given)


def _spans(leaves: Sequence[Any], order: list[int]) -> dict[int, range]:
  """Which of the flat leaves each of these leaves becomes."""
  ends = itertools.accumulate((len(jax.tree.leaves(leaves[i])) for i in order), initial=0)
  return {i: range(*ends) for i, ends in zip(order, itertools.pairwise(ends), strict=True)}


def _pure(call: Callable) -> Callable:
  """The same function without Refs inside.

  `jax_debug_nans` runs a function once more, eagerly, to find where a value has become infinite;
  Refs in it would give up the buffers of the caller.
  """

  def pure(*args: Any, **kwargs: Any) -> Any:
    closed, out = jax.make_jaxpr(call, return_shape=True)(*args, **kwargs)
    run = _jax.jaxpr_as_fun(_jax.discharge(closed, differentiable=False))
    return jax.tree.unflatten(jax.tree.structure(out), run(*jax.tree.leaves((args, kwargs))))

  return pure


def _settled(jitted: Any, call: Callable) -> Callable:
  """A compiled function that returns when nothing of it can fail any more.

  JAX does not always look for NaNs in what a function returns that it has called before (its C++
  path may skip it): that is done here. The function is then run eagerly, where JAX says which
  operation it was.
  """

  def settled(*args: Any, **kwargs: Any) -> Any:
    out = jax.block_until_ready(jitted(*args, **kwargs))
    jax.effects_barrier()
    if _jax.checks_results() and not all(map(_is_allowed, out)):
      call(*args, **kwargs)
      raise FloatingPointError(f"invalid value (nan or inf) in what {jitted.__name__} returns")
    return out

  return settled


def _is_allowed(x: jax.Array) -> bool:
  """Whether JAX's debug flags let an array pass."""
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    return True
  with jax.debug_nans(False), jax.debug_infs(False):
    nan, inf = bool(jnp.isnan(x).any()), bool(jnp.isinf(x).any())
  return not (nan and _jax.flag("jax_debug_nans")) and not (inf and _jax.flag("jax_debug_infs"))
