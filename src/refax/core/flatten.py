"""The one traversal: a graph of Pytrees, Variables and arrays, flat and back.

Flattening starts at a root and goes all the way down. It lists the distinct Variables and arrays
(a cell that is reached twice is listed once) and describes everything else in a `GraphDef`, which
is hashable: sharing, cycles, classes and static attributes. Unflattening rebuilds the same graph.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import jax
from jax.core import Tracer

from refax import _jax
from refax.core.definition import kind
from refax.core.epoch import epoch
from refax.core.variable import Variable, identity
from refax.typing import Path, path_str

# The four sorts of entries of a node, each a tuple that starts with its sort.
STATIC, LEAF, NODE, REGION = range(4)


class NodeState:
  """What the traversal keeps on each node, apart from the user's attributes."""

  __slots__ = ("cache", "changed", "dynamic", "home", "rebuilt", "trace", "visited")

  def __init__(self):
    self.dynamic: set[str] = set()  # the names of attributes that hold data
    self.visited = False  # a cached flattening depends on this node
    self.cache: tuple[int, Flat] | None = None
    self.changed = False  # since JAX rebuilt it
    self.rebuilt: Rebuilt | None = None
    self.trace = _jax.trace_state()
    self.home: tuple[weakref.ref | None, Any] = (None, None)


class Node:
  """What the traversal walks: an object with named entries, each data or static."""

  __slots__ = ("__dict__", "__weakref__", "_pytree")
  _pytree: NodeState

  def __new__(cls, *args, **kwargs):
    self = object.__new__(cls)
    object.__setattr__(self, "_pytree", NodeState())
    return self

  def _entries(self) -> Iterable[tuple[Any, Any, bool]]:
    """(key, value, is it data) of every attribute, in a deterministic order."""
    attributes, dynamic = self.__dict__, self._pytree.dynamic
    return [(key, attributes[key], key in dynamic) for key in sorted(attributes)]

  def _fill(self, entries: Iterable[tuple[Any, Any, bool]]) -> None:
    """Take the entries as they are; nothing is checked."""
    attributes, dynamic = self.__dict__, self._pytree.dynamic
    for key, value, is_dynamic in entries:
      attributes[key] = value
      if is_dynamic:
        dynamic.add(key)

  def _clear(self) -> None:
    self.__dict__.clear()
    self._pytree.dynamic.clear()

  def _structure_changed(self) -> None:
    self._pytree.changed = True
    if self._pytree.visited:
      epoch.bump()


class GraphDef:
  """The static half of an object: everything but the values. Hashable.

  Two GraphDefs are equal when the structures are: classes, attribute names, static attributes
  (compared with their types: 1 is not 1.0), and which places share a Variable or a Module.

  >>> from refax import nnx
  >>> a, b = (nnx.graphdef(nnx.Linear(2, 3, rngs=nnx.Rngs(s))) for s in (0, 1))
  >>> a == b
  True
  """

  __slots__ = ("_hash", "_plain", "_paths", "leaf_count", "nodes", "root")

  def __init__(self, root: tuple, nodes: tuple, leaf_count: int):
    self.root = root
    self.nodes = nodes
    self.leaf_count = leaf_count
    self._hash: int | None = None
    self._plain: bool | None = None
    self._paths: tuple[Path, ...] | None = None

  def __hash__(self) -> int:
    if self._hash is None:
      self._hash = hash((self.root, self.nodes))
    return self._hash

  def __eq__(self, other) -> bool:
    if self is other:
      return True
    return (
      isinstance(other, GraphDef)
      and hash(self) == hash(other)
      and self.root == other.root
      and self.nodes == other.nodes
    )

  @property
  def is_plain(self) -> bool:
    """Whether it is of Nodes and leaves only, without other pytrees between them."""
    if self._plain is None:
      entries = [self.root, *(entry for _, node in self.nodes for _, entry in node)]
      self._plain = all(entry[0] != REGION for entry in entries)
    return self._plain

  @property
  def paths(self) -> tuple[Path, ...]:
    """The path at which each Variable or array is first reached, in flattening order."""
    if self._paths is None:
      found: dict[int, Path] = {}
      for path, entry in self.walk():
        if entry[0] == LEAF:
          found.setdefault(entry[1], path)
      self._paths = tuple(found[i] for i in range(self.leaf_count))
    return self._paths

  def walk(self, root: tuple | None = None) -> Iterator[tuple[Path, tuple]]:
    """(path, entry) of every place that an entry reaches; a node is entered once."""
    entered: set[int] = set()

    def visit(path: Path, entry: tuple) -> Iterator[tuple[Path, tuple]]:
      yield path, entry
      if entry[0] == NODE and entry[1] not in entered:
        entered.add(entry[1])
        for key, child in self.nodes[entry[1]][1]:
          yield from visit((*path, key), child)
      elif entry[0] == REGION:
        for keys, child in zip(region_paths(entry[1]), entry[2], strict=True):
          yield from visit(path + keys, child)

    return visit((), self.root if root is None else root)

  def __getstate__(self):
    return self.root, self.nodes, self.leaf_count

  def __setstate__(self, state):
    self.__init__(*state)

  def __repr__(self) -> str:
    kind = self.nodes[self.root[1]][0].__name__ if self.root[0] == NODE else "pytree"
    return f"GraphDef({kind}, nodes={len(self.nodes)}, leaves={self.leaf_count})"


jax.tree_util.register_static(GraphDef)


class Flat(NamedTuple):
  """A flattened object: its distinct Variables and arrays, and all the rest."""

  leaves: tuple
  graphdef: GraphDef


class Walk:
  """One traversal. Several roots may be flattened together; what they share is seen."""

  def __init__(self):
    self.leaves: list[Any] = []
    self.objects: list[Node] = []  # by node index
    self.nodes: list[Any] = []
    self.cacheable = True
    self._leaf_index: dict[int, int] = {}
    self._node_index: dict[int, int] = {}

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
      walk.nodes[i] = walk._describe(node, dict(graphdef.nodes[i][1]))
    return walk

  def graphdef(self, root: tuple) -> GraphDef:
    return GraphDef(root, tuple(self.nodes), len(self.leaves))

  def entry(self, value: Any, before: tuple | None = None) -> tuple:
    """The entry for a piece of data, and with it everything below; `before` if it had one."""
    if isinstance(value, Variable):
      return (LEAF, self._leaf(identity(value), value))
    if isinstance(value, Node):
      return (NODE, self._node(value))
    leaves, treedef = jax.tree.flatten(value, is_leaf=lambda x: isinstance(x, Node | Variable))
    if value is None or (len(leaves) == 1 and leaves[0] is value):
      if before is not None and before[0] == LEAF and self.leaves[before[1]] is value:
        return before
      self.leaves.append(value)
      return (LEAF, len(self.leaves) - 1)
    self.cacheable = self.cacheable and _tracked(value)
    same = before is not None and before[0] == REGION and before[1] == treedef
    children = before[2] if before is not None and same else [None] * len(leaves)
    return (REGION, treedef, tuple(map(self.entry, leaves, children)))

  def value(self, entry: tuple) -> Any:
    """The Variable, array or Node that an entry stands for; None for the other sorts."""
    if entry[0] == LEAF:
      return self.leaves[entry[1]]
    return self.objects[entry[1]] if entry[0] == NODE else None

  def _leaf(self, key: int, value: Any) -> int:
    index = self._leaf_index.setdefault(key, len(self.leaves))
    if index == len(self.leaves):
      self.leaves.append(value)
    return index

  def _node(self, node: Node) -> int:
    known = self._node_index.get(id(node))
    if known is not None:
      return known
    index = self._node_index[id(node)] = len(self.nodes)
    self.nodes.append(None)
    self.objects.append(node)
    self.nodes[index] = self._describe(node)
    return index

  def _describe(self, node: Node, before: dict[Any, tuple] | None = None) -> tuple:
    before = before or {}
    entries = tuple(
      (key, self.entry(value, before.get(key)) if dynamic else (STATIC, kind(value), value))
      for key, value, dynamic in node._entries()
    )
    return type(node), entries


class Tracked:
  """A container that is no Node but reports its changes, so that a cache may pass through it."""

  __slots__ = ()
  _tracked: ClassVar[bool] = True

  def _visit(self) -> Iterable[Any]:
    """Note that a cache depends on this container; the values in it."""
    raise NotImplementedError


def _tracked(value: Any) -> bool:
  """Whether every container in a region is immutable or reports its changes."""
  if isinstance(value, tuple):
    return all(map(_tracked, value))
  if isinstance(value, Tracked):
    return all(map(_tracked, value._visit()))
  return value is None or isinstance(value, Node | Variable) or jax.tree_util.all_leaves([value])


def flatten(root: Any) -> Flat:
  """Flatten any object; a Node keeps the result until a structure that it visited changes."""
  state = root._pytree if isinstance(root, Node) else None
  if state is not None and state.cache is not None and state.cache[0] == epoch.value:
    return state.cache[1]
  rebuilt = None if state is None or state.changed else state.rebuilt
  if rebuilt is not None and rebuilt.holds():
    flat, objects, cacheable = rebuilt.flat, rebuilt.objects, True
  else:
    walk = Walk()
    entry = walk.entry(root)
    flat = Flat(tuple(walk.leaves), walk.graphdef(entry))
    objects, cacheable = walk.objects, walk.cacheable
  if state is not None:
    state.rebuilt = None
    if cacheable:
      for node in (root, *objects):
        node._pytree.visited = True
      state.cache = (epoch.value, flat)
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
      and all(map(_is_array_type, {type(leaf._cell) for leaf in leaves}))
    )


def _is_array_type(cls: type) -> bool:
  """Whether what is of this type is an array, of its own: no Ref, and no tracer of one."""
  return issubclass(cls, jax.Array) and not issubclass(cls, jax.Ref | Tracer)


def unflatten(graphdef: GraphDef, leaves: Iterable[Any]) -> tuple[Any, list[Node]]:
  """The object that `graphdef` describes, with these leaves, and its nodes by index."""
  leaves = list(leaves)
  objects = [Node.__new__(cls) for cls, _ in graphdef.nodes]
  value = resolver(leaves, objects)
  for node, (_, entries) in zip(objects, graphdef.nodes, strict=True):
    fill(node, entries, value)
  return value(graphdef.root), objects


def resolver(leaves: list[Any], objects: list[Node]) -> Callable[[tuple], Any]:
  """The function from an entry to the value that it stands for."""

  def value(entry: tuple) -> Any:
    sort = entry[0]
    if sort == LEAF:
      return leaves[entry[1]]
    if sort == NODE:
      return objects[entry[1]]
    if sort == STATIC:
      return entry[2]
    return entry[1].unflatten(map(value, entry[2]))

  return value


def fill(node: Node, entries: tuple, value: Callable[[tuple], Any]) -> None:
  """Give an empty node its entries."""
  filled = [(key, value(entry), entry[0] != STATIC) for key, entry in entries]
  node._fill(filled)
  for key, child, _ in filled:
    adopt(node, key, child)


def adopt(parent: Node, key: Any, child: Any, *, moved: bool = False) -> None:
  """Note where `child` lives, if it has no living home: error messages name the path.

  With `moved`, a child that lives in `parent` already gets this key.
  """
  if isinstance(child, Variable):
    origin = child._def.origin
    if _settles(origin.owner, parent, moved):
      origin.owner, origin.name = weakref.ref(parent), key
  elif isinstance(child, Node) and _settles(child._pytree.home[0], parent, moved):
    child._pytree.home = (weakref.ref(parent), key)


def _settles(owner: weakref.ref | None, parent: Node, moved: bool) -> bool:
  old = None if owner is None else owner()
  return old is None or (moved and old is parent)


def region_paths(treedef: Any) -> list[Path]:
  """The paths of the leaves of a plain pytree, as attribute names, indices and keys."""
  tree = treedef.unflatten(range(treedef.num_leaves))
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [tuple(map(_key, keys)) for keys, _ in flat]


def _key(key: Any) -> Any:
  for name in ("name", "key", "idx"):
    if hasattr(key, name):
      return getattr(key, name)
  return str(key)


class PathKey:
  """A key path's step that holds a whole path: from the root of a Module to a Variable."""

  __slots__ = ("path",)

  def __init__(self, path: Path):
    self.path = path

  def __str__(self) -> str:
    return path_str(self.path)

  __repr__ = __str__

  def __hash__(self) -> int:
    return hash(self.path)

  def __eq__(self, other) -> bool:
    return isinstance(other, PathKey) and self.path == other.path


def register(cls: type[Node]) -> None:
  """Make a class of Nodes a JAX pytree."""

  def flatten_with_keys(node: Node):
    flat = flatten(node)
    keys = map(PathKey, flat.graphdef.paths)
    return tuple(zip(keys, flat.leaves, strict=True)), flat.graphdef

  jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, _rebuild, flatten)


def _rebuild(graphdef: GraphDef, leaves: Iterable[Any]) -> Any:
  leaves = tuple(leaves)
  root, objects = unflatten(graphdef, leaves)
  rebuilt = Rebuilt(epoch.value, Flat(leaves, graphdef), [x for x in objects if x is not root])
  root._pytree.rebuilt, root._pytree.changed = rebuilt, False
  return root


def walk_nodes(root: Any) -> Iterator[tuple[Path, Node]]:
  """(path, node) of every distinct Node below `root` and itself, children before parents."""
  for path, value in walk_graph(root):
    if isinstance(value, Node):
      yield path, value


def walk_graph(root: Any) -> Iterator[tuple[Path, Any]]:
  """(path, value) of everything below `root`, each distinct Node and Variable once, children first.

  Static attributes and arrays are yielded too.
  """
  seen: set[int] = set()

  def visit(path: Path, value: Any, dynamic: bool) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Node | Variable):
      key = identity(value) if isinstance(value, Variable) else id(value)
      if key in seen:
        return
      seen.add(key)
    if isinstance(value, Node):
      for name, child, is_data in value._entries():
        yield from visit((*path, name), child, is_data)
    elif dynamic and not isinstance(value, Variable):
      for keys, leaf in region_items(value):
        if keys:
          yield from visit(path + keys, leaf, True)
    yield path, value

  return visit((), root, True)


def region_items(value: Any) -> list[tuple[Path, Any]]:
  """(path, leaf) of a plain pytree, down to its Nodes, Variables and other leaves."""
  is_leaf = lambda x: isinstance(x, Node | Variable)
  flat, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=is_leaf)
  return [(tuple(map(_key, keys)), leaf) for keys, leaf in flat]
