"""GraphDef: the static half of an object, what a traversal finds besides values. Hashable."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from types import GenericAlias
from typing import Any

import jax

from refax.core.by_value import ByValue
from refax.core.callables import CallableDef
from refax.typing import Path

# The four sorts of entries of a node, each a tuple that starts with its sort.
STATIC, LEAF, NODE, REGION = range(4)


class GraphDef:
  """The static half of an object: everything but the values. Hashable.

  Two GraphDefs are equal when the structures are: classes, attribute names, static attributes
  (compared with their types: 1 is not 1.0), and which places share a Variable or a Module.

  >>> from refax import nnx
  >>> a, b = (nnx.graphdef(nnx.Linear(2, 3, rngs=nnx.Rngs(s))) for s in (0, 1))
  >>> a == b
  True
  """

  __class_getitem__ = classmethod(GenericAlias)
  __slots__ = (
    "_hash",
    "_paths",
    "_plain",
    "blueprint",
    "leaf_count",
    "nodes",
    "origins",
    "places",
    "root",
    "templates",
  )

  def __init__(
    self,
    root: tuple,
    nodes: tuple,
    leaf_count: int,
    templates: tuple = (),
    origins: tuple[weakref.ref, ...] = (),
    places: tuple[Path, ...] = (),
  ):
    self.root = root
    self.nodes = nodes
    self.leaf_count = leaf_count
    self.templates = templates
    """For each leaf what makes a Variable of an array, or None. Not compared: for `nnx.merge`."""
    self.origins = origins
    """The objects that were described, by node, while they live. Not compared: for paths."""
    self.places = places
    """Where they are, while calls of Modules are observed. Compared: see `calls.places_of`."""
    self.blueprint: Any = None
    """How the objects are built of leaves, once it has been asked for; see `rebuild`."""
    self._hash: int | None = None
    self._plain: bool | None = None
    self._paths: tuple[Path, ...] | None = None

  def __hash__(self) -> int:
    if self._hash is None:
      self._hash = hash((self.root, self.nodes, self.places))
    return self._hash

  def __eq__(self, other) -> bool:
    if self is other:
      return True
    return (
      isinstance(other, GraphDef)
      and hash(self) == hash(other)
      and self.root == other.root
      and self.nodes == other.nodes
      and self.places == other.places
    )

  def at(self, places: tuple[Path, ...]) -> "GraphDef":
    """The same, of objects that are at these places."""
    if places == self.places:
      return self
    return GraphDef(self.root, self.nodes, self.leaf_count, self.templates, self.origins, places)

  @property
  def is_plain(self) -> bool:
    """Whether it is of Nodes and leaves only: no other pytrees between them, no ByValue."""
    if self._plain is None:
      entries = [self.root, *(entry for _, node in self.nodes for _, entry in node)]
      self._plain = all(
        entry[0] != REGION and not (entry[0] == STATIC and entry[1] is ByValue) for entry in entries
      )
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
    below: list[Iterator[tuple[Path, tuple]]] = [iter([((), self.root if root is None else root)])]
    while below:
      found = next(below[-1], None)
      if found is None:
        below.pop()
        continue
      yield found
      path, entry = found
      if entry[0] == NODE and entry[1] not in entered:
        entered.add(entry[1])
        below.append(_below(path, (((key,), child) for key, child in self.nodes[entry[1]][1])))
      elif entry[0] == REGION:
        below.append(_below(path, zip(region_paths(entry[1]), entry[2], strict=True)))

  def static_parts(self) -> Iterator[Any]:
    """The classes, static values and other constants in it: what code may call that uses it."""
    yield from (cls for cls, _ in self.nodes)
    open_ = [self.root, *(entry for _, entries in self.nodes for _, entry in entries)]
    while open_:
      sort, *rest = open_.pop()
      if sort == STATIC:
        yield rest[1].fresh() if rest[0] is ByValue else rest[1]
      elif sort == REGION:
        open_ += rest[1]
        yield from _constants(rest[0])

  def apply(self, *states: Any) -> Any:
    """A call of the object that has these States: the result, and its GraphDef and State after it.

    Args:
      *states: as for `nnx.merge`.

    Returns:
      What is called like the object; attributes and items of it lead to methods.

    >>> from refax import nnx; import jax.numpy as jnp
    >>> graphdef, state = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> y, (graphdef, state) = graphdef.apply(state)(jnp.ones((1, 2)))
    >>> y.shape
    (1, 3)
    """
    return on_apply(self, *states)

  def __getstate__(self):
    return self.root, self.nodes, self.leaf_count, self.templates

  def __setstate__(self, state):
    self.__init__(*state)

  def __repr__(self) -> str:
    kind = self.nodes[self.root[1]][0].__name__ if self.root[0] == NODE else "pytree"
    return f"GraphDef({kind}, nodes={len(self.nodes)}, leaves={self.leaf_count})"


jax.tree_util.register_static(GraphDef)

on_apply: Callable[..., Any] = lambda graphdef, *states: None
"""What `GraphDef.apply` does; see `graph.apply`."""


def _below(path: Path, children: Iterable[tuple[Path, tuple]]) -> Iterator[tuple[Path, tuple]]:
  for steps, child in children:
    yield path + steps, child


def _constants(treedef: Any) -> Iterator[Any]:
  """The types of the containers in a pytree, and what these keep besides children."""
  open_ = [treedef] if isinstance(treedef, jax.tree_util.PyTreeDef) else []
  while open_:
    at = open_.pop()
    yield from at.node_data() or ()
    open_ += at.children()


def region_paths(treedef: Any) -> list[Path]:
  """The paths of the leaves of a plain pytree, as attribute names, indices and keys."""
  if isinstance(treedef, CallableDef):
    return treedef.paths
  tree = treedef.unflatten(range(treedef.num_leaves))
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [tuple(map(path_step, keys)) for keys, _ in flat]


def path_step(key: Any) -> Any:
  """The step of a key path of JAX, as an attribute's name, an index or a key."""
  for name in ("name", "key", "idx"):
    if hasattr(key, name):
      return getattr(key, name)
  return str(key)
