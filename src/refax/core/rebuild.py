"""Objects are built of leaves and what a walk has found besides: the way back from `flatten`.

Every transform hands a function objects that are rebuilt, JAX rebuilds what it returns, `nnx.merge`
and `nnx.clone` rebuild. So what can be known of the new objects is worked out once for a structure,
in a `Blueprint`, and most of what is left is done in C.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from refax import _jax
from refax.core.by_value import ByValue
from refax.core.graphdef import LEAF, NODE, REGION, STATIC, GraphDef
from refax.core.node import Node, make_nodes
from refax.core.variable import Variable


class _Plan(NamedTuple):
  """How one object gets its entries."""

  template: dict[Any, Any]
  """All of its keys, in order, with the values of static attributes."""
  keys: tuple
  """The keys of entries that are a leaf or an object, ..."""
  places: tuple[int, ...]
  """... and which: the objects are counted first, then the leaves."""
  others: tuple[tuple[Any, tuple], ...]
  """(key, entry) of those that are made anew each time."""
  dynamic: frozenset
  """The keys of data."""


class Blueprint:
  """How some objects are built, of leaves and of objects that exist.

  Args:
    nodes: what the objects are, as in a GraphDef.
    first: the index of the first of them; those before it exist.
  """

  __slots__ = ("_classes", "_homes", "_other_homes", "_plans")

  def __init__(self, nodes: Sequence[tuple], first: int = 0):
    self._classes = [cls for cls, _ in nodes]
    count = first + len(nodes)
    self._plans = [_plan(entries, count) for _, entries in nodes]
    homes: dict[int, tuple[int, Any]] = {}
    for parent, plan in enumerate(self._plans):
      for key, place in zip(plan.keys, plan.places, strict=True):
        homes.setdefault(place, (parent, key))
    places = [(place, parent, key) for place, (parent, key) in homes.items()]
    self._homes = [x for x in places if first <= x[0] < count]
    self._other_homes = [x for x in places if not first <= x[0] < count]

  def build(
    self, leaves: Sequence[Any], existing: Sequence[Node] = ()
  ) -> tuple[list[Node], Callable[[tuple], Any]]:
    """All objects by index, and the function from an entry to the value that it stands for.

    Args:
      leaves: the leaves.
      existing: the objects before the first new one.
    """
    if not self._plans:
      return list(existing), resolver(leaves, existing)
    new = make_nodes(self._classes)
    objects = [*existing, *new]
    value = resolver(leaves, objects)
    parts = [*objects, *leaves]
    for node, plan in zip(new, self._plans, strict=True):
      entries = plan.template.copy()
      entries.update(zip(plan.keys, map(parts.__getitem__, plan.places), strict=True))
      for key, entry in plan.others:
        entries[key] = value(entry)
      node._fill(entries, plan.dynamic)
    refs = list(map(weakref.ref, new))
    for place, parent, key in self._homes:
      objects[place]._pytree.home = (refs[parent], key)
    for place, parent, key in self._other_homes:
      child = parts[place]
      if isinstance(child, Variable):  # `adopt`, in one frame for all
        origin = child._node[1].origin
        if origin.owner is None or origin.owner() is None:
          origin.owner, origin.name = refs[parent], key
      else:
        adopt(new[parent], key, child)
    return objects, value


def _plan(entries: tuple, count: int) -> _Plan:
  """How an object gets these entries, when there are `count` objects."""
  template: dict[Any, Any] = {}
  direct: dict[Any, int] = {}
  others = []
  for key, entry in entries:
    template[key] = None
    if entry[0] == NODE:
      direct[key] = entry[1]
    elif entry[0] == LEAF:
      direct[key] = count + entry[1]
    elif entry[0] == REGION or entry[1] is ByValue:
      others.append((key, entry))
    else:
      template[key] = entry[2]
  dynamic = frozenset(key for key, entry in entries if entry[0] != STATIC)
  return _Plan(template, tuple(direct), tuple(direct.values()), tuple(others), dynamic)


def unflatten(graphdef: GraphDef, leaves: Iterable[Any]) -> tuple[Any, list[Node]]:
  """The object that `graphdef` describes, with these leaves, and its nodes by index."""
  if graphdef.blueprint is None:
    graphdef.blueprint = Blueprint(graphdef.nodes)
  objects, value = graphdef.blueprint.build(list(leaves))
  if not _jax.no_trace_active():
    for node, origin in zip(objects, graphdef.origins, strict=False):
      node._pytree.origin = origin
    for node, place in zip(objects, graphdef.places, strict=False):
      node._pytree.place = place
  return value(graphdef.root), objects


def resolver(leaves: Sequence[Any], objects: Sequence[Node]) -> Callable[[tuple], Any]:
  """The function from an entry to the value that it stands for."""
  # Not a closure that calls itself: that is a cycle, and holds leaves until the garbage collector
  # comes, arrays of gigabytes too.
  return functools.partial(_value_of, leaves, objects, {})


def _value_of(
  leaves: Sequence[Any], objects: Sequence[Node], fresh: dict[int, Any], entry: tuple
) -> Any:
  sort = entry[0]
  if sort == LEAF:
    return leaves[entry[1]]
  if sort == NODE:
    return objects[entry[1]]
  if sort == STATIC:
    static = entry[2]
    if type(static) is not ByValue:
      return static
    if id(static) not in fresh:  # one copy, where several objects share it
      fresh[id(static)] = static.fresh()
    return fresh[id(static)]
  _, treedef, children = entry
  return treedef.unflatten(
    [leaves[e[1]] if e[0] == LEAF else _value_of(leaves, objects, fresh, e) for e in children]
  )


def fill(node: Node, entries: tuple, value: Callable[[tuple], Any]) -> None:
  """Give an empty node its entries."""
  filled = {key: value(entry) for key, entry in entries}
  dynamic = {key for key, entry in entries if entry[0] != STATIC}
  node._fill(filled, dynamic)
  for key in filled:
    adopt(node, key, filled[key])


def adopt(parent: Node, key: Any, child: Any, *, moved: bool = False) -> None:
  """Note where `child` lives, if it has no living home: error messages name the path.

  With `moved`, a child that lives in `parent` already gets this key.
  """
  if isinstance(child, Variable):
    origin = child._node[1].origin
    if _settles(origin.owner, parent, moved):
      origin.owner, origin.name = weakref.ref(parent), key
  elif isinstance(child, Node) and _settles(child._pytree.home[0], parent, moved):
    child._pytree.home = (weakref.ref(parent), key)


def _settles(owner: weakref.ref | None, parent: Node, moved: bool) -> bool:
  old = None if owner is None else owner()
  return old is None or (moved and old is parent)
