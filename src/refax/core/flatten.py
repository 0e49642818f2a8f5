"""The one traversal: a graph of Pytrees, Variables and arrays, flat and back.

Flattening starts at a root and goes all the way down. It lists the distinct Variables and arrays
(a cell that is reached twice is listed once) and describes everything else in a `GraphDef`, which
is hashable: sharing, cycles, classes and static attributes. Unflattening rebuilds the same graph.
Nothing here calls itself for what is nested in a Node: a model may be deeper than Python's stack.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from refax import _jax
from refax.core import callables
from refax.core.by_value import ByValue, SameHash, Unchanged, has_hash, hashes_content
from refax.core.callables import CALLABLES, taken_apart
from refax.core.calls import places_of
from refax.core.definition import kind
from refax.core.epoch import epoch
from refax.core.graphdef import LEAF, NODE, REGION, STATIC, GraphDef, path_step
from refax.core.mesh import objects_enter_mesh
from refax.core.node import Node, Tracked
from refax.core.orbax import on_arrays
from refax.core.rebuild import unflatten
from refax.core.variable import Variable, identity
from refax.core.watch import Parts, Watch, Watches
from refax.errors import RefArgumentError, ReturnedRefError
from refax.typing import Path, path_str


class Flat(NamedTuple):
  """A flattened object: its distinct Variables and arrays, and all the rest."""

  leaves: tuple
  graphdef: GraphDef


class Walk:
  """One traversal. Several roots may be flattened together; what they share is seen.

  Args:
    watch: is told of changes to all objects that the walk sees.
  """

  def __init__(self, watch: Watch | None = None):
    self.leaves: list[Any] = []
    self.objects: list[Node] = []  # by node index
    self.nodes: list[Any] = []
    self._watch = watch
    self._leaf_index: dict[int, int] = {}
    self._node_index: dict[int, int] = {}
    self._compared: dict[int, tuple[Any, ByValue]] = {}  # static values without a hash, by id

  @classmethod
  def seeded(cls, graphdef: GraphDef, leaves: list[Any], objects: list[Node]) -> "Walk":
    """A walk that knows these leaves and nodes by their indices, and describes the nodes anew.

    Variables and nodes are known wherever they are; any other leaf only where it was.
    """
    walk = cls()
    walk.leaves, walk.objects, walk.nodes = list(leaves), list(objects), [None] * len(objects)
    for i, leaf in enumerate(leaves):
      if isinstance(leaf, Variable):
        walk._leaf_index[identity(leaf)] = i
    walk._node_index = {id(node): i for i, node in enumerate(objects)}
    for i, node in enumerate(objects):
      walk._describe(i, node, dict(graphdef.nodes[i][1]))
    return walk

  def graphdef(self, root: tuple) -> GraphDef:
    templates = tuple(map(_template, self.leaves))
    origins = tuple(map(weakref.ref, self.objects))
    return GraphDef(root, tuple(self.nodes), len(self.leaves), templates, origins)

  def entry(self, value: Any, before: tuple | None = None) -> tuple:
    """The entry for a piece of data, and with it everything below; `before` if it had one."""
    if isinstance(value, Variable):
      return (LEAF, self._leaf(identity(value), value))
    if isinstance(value, Node):
      return (NODE, self._node(value))
    if is_followed(value):
      parts, treedef = taken_apart(value)
      children = (self.entry(x) if is_part(x) else self._static(x) for x in parts)
      return (REGION, treedef, tuple(children))
    leaves, treedef = jax.tree.flatten(value, is_leaf=lambda x: isinstance(x, Node | Variable))
    if value is None or (len(leaves) == 1 and leaves[0] is value):
      if before is not None and before[0] == LEAF and self.leaves[before[1]] is value:
        return before
      self.leaves.append(value)
      return (LEAF, len(self.leaves) - 1)
    same = before is not None and before[0] == REGION and before[1] == treedef
    children = before[2] if before is not None and same else [None] * len(leaves)
    return (REGION, treedef, tuple(map(self.entry, leaves, children)))

  def value(self, entry: tuple) -> Any:
    """The Variable, array or Node that an entry stands for; None for the other sorts."""
    if entry[0] == LEAF:
      return self.leaves[entry[1]]
    return self.objects[entry[1]] if entry[0] == NODE else None

  def _static(self, value: Any) -> tuple:
    if has_hash(value):
      if self._watch is not None and hashes_content(type(value)):
        self._watch.compare(value, SameHash(value))
      return (STATIC, kind(value), value)
    if id(value) not in self._compared:  # a model's layers share their configuration
      self._compared[id(value)] = value, (seen := ByValue(value))
      if self._watch is not None:
        self._watch.compare(value, Unchanged(value, seen))
    return (STATIC, ByValue, self._compared[id(value)][1])

  def _leaf(self, key: int, value: Any) -> int:
    index = self._leaf_index.setdefault(key, len(self.leaves))
    if index == len(self.leaves):
      self.leaves.append(value)
    return index

  def _node(self, node: Node) -> int:
    """The index of a node; it and all new nodes below are described, each after its children."""
    known = self._node_index.get(id(node))
    if known is not None:
      return known
    index = self._new_node(node)
    self._describe(index, node, {})
    return index

  def _new_node(self, node: Node) -> int:
    if self._watch is not None:
      _watch(node, self._watch)
    index = self._node_index[id(node)] = len(self.nodes)
    self.nodes.append(None)
    self.objects.append(node)
    return index

  def _describe(self, index: int, node: Node, before: dict[Any, tuple]) -> None:
    """Describe a node, and all new nodes below it, each after its children."""
    open_ = [(index, self._describing(node, before))]
    while open_:
      at, describing = open_[-1]
      try:
        child, value = next(describing)
      except StopIteration as done:
        self.nodes[at] = done.value
        open_.pop()
      else:
        open_.append((child, self._describing(value, {})))

  def _describing(self, node: Node, before: dict[Any, tuple]) -> Any:
    """Yields the index and the node of each new child; returns what the node is."""
    entries = []
    for key, value, dynamic in node._entries():
      if not dynamic:
        entries.append((key, self._static(value)))
      elif isinstance(value, Node):
        index = self._node_index.get(id(value))
        if index is None:
          index = self._new_node(value)
          yield index, value
        entries.append((key, (NODE, index)))
      else:
        entries.append((key, entry := self.entry(value, before.get(key))))
        if entry[0] == REGION:
          _track(value, self._watch)
    return type(node), tuple(entries)


def _template(leaf: Any) -> tuple[type, dict[str, Any], bool] | None:
  """What `nnx.merge` needs to make a Variable of an array: type, metadata, storage."""
  if not isinstance(leaf, Variable):
    return None
  return type(leaf), leaf._def.metadata, leaf.is_hijax


def _watch(node: Node, watch: Watch) -> None:
  """Let a watch know of changes to an object."""
  state = node._pytree
  if state.watches is None:
    state.watches = Watches()
  state.watches.add(watch)


def _track(value: Any, watch: Watch | None) -> None:
  """Let a watch know of changes to all that is in a region: they are reported, or looked for."""
  if value is None or isinstance(value, Node | Variable):
    return
  if isinstance(value, tuple):
    children: Iterable[Any] = value
  elif isinstance(value, Tracked):
    children = value._visit(watch)
  elif jax.tree_util.all_leaves([value]):
    return
  else:
    parts = Parts(value)
    children = parts.items()
    if watch is not None:
      watch.compare(value, parts)
  for child in children:
    _track(child, watch)


def flatten(root: Any) -> Flat:
  """Flatten any object; a Node keeps the result until a structure that it visited changes."""
  state = root._pytree if isinstance(root, Node) else None
  if state is None:
    walk = Walk()
    entry = walk.entry(root)
    return Flat(tuple(walk.leaves), walk.graphdef(entry))
  if state.cache is not None:
    watch, then, flat = state.cache
    if then == epoch.value and watch.holds():
      return flat
  watch, then = Watch(), epoch.value
  rebuilt = None if state.changed else state.rebuilt
  if rebuilt is not None and rebuilt.holds():
    flat = rebuilt.flat
    for node in (root, *rebuilt.objects):
      _watch(node, watch)
  else:
    walk = Walk(watch)
    entry = walk.entry(root)
    flat = Flat(tuple(walk.leaves), walk.graphdef(entry))
  state.rebuilt, state.cache = None, (watch, then, flat)
  return flat


class Rebuilt(NamedTuple):
  """What JAX rebuilt an object from: what it flattens to, as long as nothing has changed.

  In a functional program, each step returns a new model: it need not be walked through again.
  """

  epoch: int
  flat: Flat
  objects: list[Node]  # all but the root

  def holds(self) -> bool:
    """Whether this is what a walk would find, for sure."""
    leaves, graphdef = self.flat
    return (
      self.epoch == epoch.value
      and graphdef.is_plain
      and not any(node._pytree.changed for node in self.objects)
      and len(set(map(object.__hash__, leaves))) == len(leaves)  # `id` is audited: 0.2 us each
      and all(issubclass(cls, Variable) for cls in set(map(type, leaves)))
      and all(map(_is_array_type, {type(leaf._node[0][0]) for leaf in leaves}))
    )


def _is_array_type(cls: type) -> bool:
  """Whether what is of this type is an array, of its own: no Ref, and no tracer of one."""
  return issubclass(cls, jax.Array) and not issubclass(cls, jax.Ref | Tracer)


def is_part(x: Any) -> bool:
  """Whether a part of a bound method or a partial is data; all else is static."""
  if isinstance(x, Node | Variable | Tracked | np.ndarray | jax.Array):
    return True
  return is_followed(x)


def is_followed(x: Any) -> bool:
  """Whether a value is a bound method or a partial that holds an object."""
  return type(x) in CALLABLES and captured(x) is not None


def captured(value: Any) -> Any:
  """An object that a function holds (by closure, as a method, in a partial), or None."""
  return callables.captured(value, lambda x: isinstance(x, Node | Variable))


class PathKey(jax.tree_util.GetAttrKey):
  """A key path's step that holds a whole path: from the root of a Module to a Variable.

  By name it is an attribute, `layers.0.kernel`: who looks at key paths knows JAX's own keys.
  """

  def __init__(self, path: Path):
    super().__init__(".".join(map(str, path)))
    self.path = path

  def __str__(self) -> str:
    return path_str(self.path)

  __repr__ = __str__


def register(cls: type[Node]) -> None:
  """Make a class of Nodes a JAX pytree."""

  def flatten_for_jax(node: Node) -> Flat:
    function, returning = _jax.refusing_function(), _jax.returning_function()
    flat = flatten(node)
    objects_enter_mesh(flat.leaves)
    if returning is not None:
      _check_returned(returning, node, flat)
    if node._pytree.in_trace:
      on_handed_out(x for _, x in walk_nodes(node))
    if function is not None and any(_is_hijax(leaf) for leaf in flat.leaves):
      raise RefArgumentError.function(function, type(node).__name__)
    if _jax.orbax_flattens():
      return Flat(tuple(on_arrays(flat.leaves)), flat.graphdef)
    places = places_of((node,))
    return flat if not places else Flat(flat.leaves, flat.graphdef.at(places))

  def flatten_with_keys(node: Node):
    flat = flatten(node)
    leaves = flat.leaves if not _jax.orbax_flattens() else on_arrays(flat.leaves)
    keys, places = map(PathKey, flat.graphdef.paths), places_of((node,))
    graphdef = flat.graphdef if not places else flat.graphdef.at(places)
    return tuple(zip(keys, leaves, strict=True)), graphdef

  own = {name for name, x in vars(cls).items() if isinstance(x, functools.cached_property)}
  cls._memoized = cls._memoized.difference(vars(cls)) | own
  jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, _rebuild, flatten_for_jax)


on_handed_out: Callable[[Iterable[Node]], None] = lambda nodes: None
"""Called when JAX takes an object out of a trace; see `structure`."""


def _is_hijax(leaf: Any) -> bool:
  return isinstance(leaf, Variable) and leaf.is_hijax


def _check_returned(returning: Callable[[], tuple[str, str]], node: Node, flat: Flat) -> None:
  """Raise ReturnedRefError if an object that must be arrays, outside, holds Refs."""
  for path, leaf in zip(flat.graphdef.paths, flat.leaves, strict=True):
    if (ref := ref_in(leaf)) is not None:
      raise ReturnedRefError.result(*returning(), type(node).__name__, path_str(path), ref)


def ref_in(leaf: Any) -> Any:
  """The first Ref of a Variable; None for anything else."""
  cells = jax.tree.leaves(leaf.get_raw_value()) if isinstance(leaf, Variable) else ()
  return next(filter(_jax.is_ref, cells), None)


def _rebuild(graphdef: GraphDef, leaves: Iterable[Any]) -> Any:
  leaves = tuple(leaves)
  root, objects = unflatten(graphdef, leaves)
  rebuilt = Rebuilt(epoch.value, Flat(leaves, graphdef), [x for x in objects if x is not root])
  root._pytree.rebuilt, root._pytree.changed = rebuilt, False
  if _jax.is_tracing():
    for node in objects:
      node._pytree.in_trace = True
  return root


def walk_nodes(root: Any) -> Iterator[tuple[Path, Node]]:
  """(path, node) of every distinct Node below `root` and itself, children before parents."""
  for path, value in walk_graph(root):
    if isinstance(value, Node):
      yield path, value


def variable_places(root: Any) -> Iterator[tuple[Path, Node | None, Variable]]:
  """(path, owner, Variable) of every place of a Variable, in flattening order.

  The owner is the Node whose entry the Variable is; None for one inside another pytree there.
  """
  seen: set[int] = set()
  open_: list[tuple[Path, Node | None, Iterator]] = [((), None, iter([((), root, True)]))]
  while open_:
    above, owner, children = open_[-1]
    for steps, value, is_data in children:
      if not is_data:
        continue
      path = above + steps
      if isinstance(value, Variable):
        yield path, owner, value
      elif isinstance(value, Node):
        if id(value) not in seen:
          seen.add(id(value))
          open_.append((path, value, _children(value, True)))
          break
      elif not isinstance(value, jax.Array | np.ndarray):
        open_.append((path, None, _children(value, True)))
        break
    else:
      open_.pop()


def walk_graph(root: Any) -> Iterator[tuple[Path, Any]]:
  """(path, value) of everything below `root`, each distinct Node and Variable once, children first.

  Static attributes and arrays are yielded too.
  """
  seen: set[int] = set()
  open_: list[tuple[Path, Any, Iterator]] = [((), None, iter([((), root, True)]))]
  while open_:
    above, owner, children = open_[-1]
    child = next(children, None)
    if child is None:
      open_.pop()
      if open_:
        yield above, owner
      continue
    steps, value, dynamic = child
    path = above + steps
    if isinstance(value, Node | Variable):
      key = identity(value) if isinstance(value, Variable) else id(value)
      if key in seen:
        continue
      seen.add(key)
    open_.append((path, value, _children(value, dynamic)))


def _children(value: Any, dynamic: bool) -> Iterator[tuple[Path, Any, bool]]:
  """(steps, child, is it data) of everything directly below a value."""
  if isinstance(value, Node):
    return (((name,), child, is_data) for name, child, is_data in value._entries())
  if not dynamic or isinstance(value, Variable):
    return iter(())
  return ((keys, leaf, True) for keys, leaf in region_items(value) if keys)


def region_items(value: Any) -> list[tuple[Path, Any]]:
  """(path, leaf) of a plain pytree, down to its Nodes, Variables and other leaves."""
  if is_followed(value):
    parts, treedef = taken_apart(value)
    return list(zip(treedef.paths, parts, strict=True))
  is_leaf = lambda x: isinstance(x, Node | Variable)
  flat, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=is_leaf)
  return [(tuple(map(path_step, keys)), leaf) for keys, leaf in flat]
