"""What a lifted call does to the caller's objects, and how what it returned is built.

A Commit is made of the structure of the arguments and of what the function gave back, and of no
value: a compiled function has one (a CompiledCommit) for all its calls.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import jax

from refax import _jax
from refax.core.epoch import epoch
from refax.core.graphdef import LEAF, REGION, STATIC, GraphDef
from refax.core.node import Node
from refax.core.rebuild import Blueprint, adopt
from refax.core.variable import Variable, VariableDef, make_variables
from refax.errors import TraceContextError

ARRAY = jax.tree.structure(0)


class OutputSpec(NamedTuple):
  """The static half of what a lifted function gives back."""

  graphdef: GraphDef
  written: tuple[int, ...]  # which inputs the written values belong to
  hijax: tuple[bool, ...]  # the storage of each fresh leaf
  redefined: tuple[tuple[int, VariableDef], ...]  # inputs whose metadata changed


class Outputs:
  """What a lifted function gives back: a pytree of arrays that any JAX transform can carry."""

  __slots__ = ("fresh", "spec", "written")

  def __init__(self, written: Sequence[Any], fresh: Sequence[Any], spec: OutputSpec):
    self.written = tuple(written)  # final values of input Variables
    self.fresh = tuple(fresh)  # lojax Variables and arrays that were not among the inputs
    self.spec = spec


jax.tree_util.register_pytree_node(
  Outputs,
  lambda out: ((out.written, out.fresh), out.spec),
  lambda spec, children: Outputs(*children, spec),
)


class Change(NamedTuple):
  """What becomes of one of the caller's objects."""

  place: int
  entries: tuple  # those that are new or others; of a container, all
  removed: tuple[Any, ...]
  added: tuple[Any, ...]  # the keys under which there is data that was not there


class Fresh:
  """A leaf that was not among the inputs: a Variable, or an array, or None.

  Args:
    leaf: the leaf, of an array or its type.
    hijax: whether the Variable is to have a Ref.
  """

  __slots__ = ("cls", "definition", "hijax", "treedef")

  def __init__(self, leaf: Any, hijax: bool):
    is_variable = isinstance(leaf, Variable)
    self.cls = type(leaf) if is_variable else None
    self.definition: Any = leaf._def if is_variable else None
    self.hijax = hijax
    self.treedef = _tree(leaf._cell if is_variable else leaf)


class Commit:
  """What a call does to the caller's objects, and the structure of its result.

  Args:
    before: the structure of the arguments.
    spec: the static half of what the function gave back.
  """

  def __init__(self, before: GraphDef, spec: OutputSpec):
    self.spec = spec
    count, nodes = len(before.nodes), spec.graphdef.nodes
    self.start = before.leaf_count
    """The index of the first fresh leaf."""
    self._changes = [
      _change(i, before.nodes[i], nodes[i]) for i in range(count) if nodes[i] != before.nodes[i]
    ]
    self._count = count
    self._new = Blueprint(nodes[count:], count)

  @property
  def is_quiet(self) -> bool:
    """Whether the caller's objects keep their structure and their metadata."""
    return not self._changes and not self.spec.redefined

  def check(self, leaves: Sequence[Any], objects: Sequence[Node]) -> None:
    """Raise TraceContextError if an object from another trace would have to change."""
    now = _jax.trace_state()
    for change in self._changes:
      node = objects[change.place]
      if node._pytree.trace != now:
        raise TraceContextError.attribute(type(node).__name__)
    for index in self.spec.written:
      variable = leaves[index]
      if not variable.is_hijax and variable._trace != now:
        definition = variable._def
        raise TraceContextError.variable(definition.origin, is_array_for_now=definition.hijax)

  def build(self, leaves: list[Any], objects: Sequence[Node]) -> Any:
    """Change the caller's objects, and build what the function returned.

    Args:
      leaves: the input leaves, and the fresh ones.
      objects: the caller's objects.
    """
    for index, definition in self.spec.redefined:
      leaves[index]._def = definition
      epoch.bump()
    _, value = self._new.build(leaves, objects)
    for change in self._changes:
      _apply(change, objects[change.place], value)
    return value(self.spec.graphdef.root)


class CompiledCommit(Commit):
  """A Commit of what a compiled function returns: arrays, always of the same types.

  Args:
    before: the structure of the arguments.
    outputs: what the function gave back; of arrays only the types are looked at.
  """

  def __init__(self, before: GraphDef, outputs: Outputs):
    super().__init__(before, outputs.spec)
    self.written = [(i, _tree(x)) for i, x in zip(self.spec.written, outputs.written, strict=True)]
    """The input Variables that the call gives values to, and their structures."""
    self.fresh = list(map(Fresh, outputs.fresh, self.spec.hijax))
    variables = [(i, x) for i, x in enumerate(self.fresh) if x.cls is not None]
    self._places = [i for i, _ in variables]
    self._classes: list[Any] = [x.cls for _, x in variables]
    self._definitions = [x.definition for _, x in variables]
    self._are_arrays = all(x.treedef is ARRAY for x in self.fresh)
    have_refs = [x.hijax for x in self.fresh for _ in range(x.treedef.num_leaves)]
    self._ref_places = [i for i, has_ref in enumerate(have_refs) if has_ref]
    """Which of the fresh arrays go into a Ref."""
    self._new_cells: Callable[[list], list] | None = None
    """What makes the Refs."""
    self.leaves = self._needed_leaves()
    """The input leaves that `build` asks for: the result, or an object, will hold them anew."""
    self.plain_result = self._plain_result()
    """From the fresh arrays of a call to its result, where that is nothing else than arrays."""

  def make(self, arrays: Iterator, trace: Any) -> list[Any]:
    """The fresh leaves.

    Args:
      arrays: what the compiled function returned, after the written values.
      trace: the trace state of now.
    """
    found = self._made(arrays)
    all_are_variables = len(self._places) == len(found)
    cells = zip(found) if all_are_variables else [(found[i],) for i in self._places]
    variables = make_variables(self._classes, cells, self._definitions, trace)
    if all_are_variables:
      return variables
    for i, variable in zip(self._places, variables, strict=True):
      found[i] = variable
    return found

  def _made(self, arrays: Iterator) -> list[Any]:
    """What the fresh leaves hold; nobody else may hold the arrays that go into a Ref."""
    found = list(arrays)
    if places := self._ref_places:
      buffers = found if len(places) == len(found) else [found[i] for i in places]
      if self._new_cells is None:
        self._new_cells = _jax.cells_like(buffers)
      for i, ref in zip(places, self._new_cells(buffers), strict=True):
        found[i] = ref
    if self._are_arrays:
      return found
    parts = iter(found)
    return [x.treedef.unflatten(islice(parts, x.treedef.num_leaves)) for x in self.fresh]

  def _needed_leaves(self) -> list[int]:
    entries = [e for c in self._changes for _, e in c.entries]
    entries += [e for _, node in self.spec.graphdef.nodes[self._count :] for _, e in node]
    found = {i for e in (self.spec.graphdef.root, *entries) for i in leaves_of(e)}
    return sorted({i for i in found if i < self.start} | {i for i, _ in self.spec.redefined})

  def _plain_result(self) -> Callable[[Iterator], Any] | None:
    root = self.spec.graphdef.root
    entries = [root] if root[0] == LEAF else root[2] if root[0] == REGION else []
    if root[0] not in (LEAF, REGION) or not self.is_quiet:
      return None
    if not all(e[0] == LEAF and e[1] >= self.start for e in entries):
      return None
    if any(fresh.cls is not None for fresh in self.fresh):
      return None
    count = iter(range(len(self.fresh)))
    places = [None if x.treedef is not ARRAY else next(count) for x in self.fresh]
    order = [places[e[1] - self.start] for e in entries]  # JAX returns no None
    if root[0] == LEAF:
      return next if order == [0] else lambda arrays: next(arrays, None)  # it asks for the call
    treedef = root[1]
    if order == list(range(len(order))):
      return treedef.unflatten

    def result(arrays: Iterator) -> Any:
      flat = list(arrays)
      return treedef.unflatten([None if i is None else flat[i] for i in order])

    return result


def _tree(value: Any) -> Any:
  treedef = jax.tree.structure(value)
  return ARRAY if treedef == ARRAY else treedef


def leaves_of(entry: tuple) -> Iterator[int]:
  """The leaves that an entry is, or has directly inside."""
  if entry[0] == LEAF:
    yield entry[1]
  elif entry[0] == REGION:
    for child in entry[2]:
      yield from leaves_of(child)


def _change(index: int, before: tuple, after: tuple) -> Change:
  was, now = dict(before[1]), dict(after[1])
  others = tuple((k, entry) for k, entry in now.items() if was.get(k) != entry)
  removed = tuple(k for k in was if k not in now)
  added = tuple(k for k, entry in others if entry[0] != STATIC)
  return Change(index, others if after[0]._altered_by_key else after[1], removed, added)


def _apply(change: Change, node: Node, value: Callable[[tuple], Any]) -> None:
  """Give a caller's object its new entries."""
  entries = [(key, value(entry), entry[0] != STATIC) for key, entry in change.entries]
  before = node._alter(entries, change.removed)
  for key, child, is_data in entries:
    if is_data:
      adopt(node, key, child)
  node._structure_changed(before, change.added, change.removed)
