"""split, merge and update: an object as a GraphDef and States, and back.

The Variables of a State are handles of their own on the same cells: in hijax mode a write through
either is seen by both; in lojax mode they hold the same immutable array.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from refax.core.containers import Dict, List
from refax.core.filters import Filter
from refax.core.flatten import (
  Walk,
  flatten,
  region_items,
  variable_places,
  walk_nodes,
)
from refax.core.graphdef import GraphDef
from refax.core.node import Node
from refax.core.rebuild import unflatten
from refax.core.storage import is_array_like, needs_guard
from refax.core.variable import Variable, handles, identity, is_variable, replaced
from refax.core.watch import Watch
from refax.core.write import copied, write
from refax.errors import FilterError, TreeMismatchError
from refax.graph.state import State, from_flat_state, partition, to_flat_state
from refax.typing import Path, path_str


def split(node: Any, *filters: Filter) -> tuple[Any, ...]:
  """Split an object into its static structure and its state.

  Args:
    node: a Module, Pytree, Variable, or any pytree of these.
    *filters: one State is returned for each; without any, one State with everything.

  Returns:
    `(graphdef, state, ...)`. What is shared is in the State once, at the first of its paths.

  Raises:
    FilterError: something matches none of the filters.

  >>> from refax import nnx
  >>> graphdef, params, rest = nnx.split(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Param, ...)
  >>> list(params), list(rest)
  (['bias', 'scale'], ['mean', 'var'])
  """
  flat = flatten(node)
  pairs = list(zip(flat.graphdef.paths, handles(flat.leaves), strict=True))
  states = map(as_state, partition(pairs, filters or (...,)))
  return (flat.graphdef, *states)


def as_state(pairs: list[tuple[Path, Any]]) -> Any:
  """A State of (path, leaf) pairs; of an object that is one leaf itself, the leaf."""
  return pairs[0][1] if len(pairs) == 1 and pairs[0][0] == () else from_flat_state(pairs)


def _one_or_all(states: list[Any]) -> Any:
  return states[0] if len(states) == 1 else tuple(states)


def _flat(state: Any) -> list[tuple[Path, Any]]:
  """(path, leaf) of a State, of a nested mapping, or of lists and tuples of these; of one leaf."""
  if isinstance(state, State | Mapping):
    return list(to_flat_state(state))
  if isinstance(state, list | tuple) and any(isinstance(x, State | Mapping) for x in state):
    return [pair for part in state for pair in _flat(part)]
  return [((), state)]


def merge(graphdef: GraphDef, /, *states: Any) -> Any:
  """The object that `split` took apart.

  Args:
    graphdef: the static structure.
    *states: the States or nested dicts, in any order, or lists of these; leaves are Variables, or
      arrays, which become the Variables that the object had in their place. Or one list of leaves,
      in the order of `jax.tree.leaves(state)`.

  Returns:
    A new object. In hijax mode its cells are those of the States.

  Raises:
    TreeMismatchError: a path is missing, or is not in the structure.

  >>> from refax import nnx
  >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  >>> twin = nnx.merge(*nnx.split(model))
  >>> twin.kernel[0, 0] = 7.0; float(model.kernel[0, 0])
  7.0
  """
  return unflatten(graphdef, handles(leaves_of(graphdef, states)))[0]


def leaves_of(graphdef: GraphDef, states: Sequence[Any]) -> list[Any]:
  """The leaves of an object in the order of its GraphDef; see `merge`."""
  wanted = graphdef.paths
  if len(states) == 1 and _is_leaves(states[0], len(wanted)):
    values = dict(zip(wanted, states[0], strict=True))
  else:
    values = {path: leaf for state in states for path, leaf in _flat(state)}
  missing = [path_str(p) for p in wanted if p not in values]
  unexpected = [path_str(p) for p in values.keys() - set(wanted)]
  if missing or unexpected:
    raise TreeMismatchError.merge(missing, sorted(unexpected))
  leaves = [values[path] for path in wanted]
  if graphdef.templates:
    leaves = [_as_variable(x, t) for x, t in zip(leaves, graphdef.templates, strict=True)]
  return leaves


def _is_leaves(state: Any, count: int) -> bool:
  """Whether this is a list of the leaves of an object."""
  if not isinstance(state, list | tuple) or len(state) != count:
    return False
  return not any(isinstance(x, State | Mapping) for x in state)


def _as_variable(leaf: Any, template: tuple[type[Variable], dict, bool] | None) -> Any:
  """An array as the Variable that the object had in its place; anything else as it is.

  A traced array stays one (lojax): inside `jax.grad`, a Ref would drop its gradient.
  """
  if template is None or not (is_array_like(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)):
    return leaf
  cls, metadata, hijax = template
  return cls(leaf, is_hijax=hijax and not needs_guard(leaf), **metadata)


def state(node: Any, *filters: Filter) -> Any:
  """The State of an object: handles of their own on its Variables, and its arrays.

  Args:
    node: a Module, Pytree, or any pytree of these.
    *filters: one State is returned for each; what matches none is left out.

  Returns:
    A State, or a tuple of them if there are several filters.

  >>> from refax import nnx
  >>> list(nnx.state(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.BatchStat))
  ['mean', 'var']
  """
  flat = flatten(node)
  pairs = zip(flat.graphdef.paths, handles(flat.leaves), strict=True)
  return _one_or_all(
    [as_state(part) for part in partition(pairs, filters or (...,), exhaustive=False)]
  )


def variables(node: Any, *filters: Filter) -> Any:
  """Like `state`, but with the object's own Variables, and without its arrays.

  >>> from refax import nnx
  >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  >>> nnx.variables(model)["kernel"] is model.kernel
  True
  """
  flat = flatten(node)
  pairs = [
    (path, leaf)
    for path, leaf in zip(flat.graphdef.paths, flat.leaves, strict=True)
    if isinstance(leaf, Variable)
  ]
  return _one_or_all(
    [as_state(part) for part in partition(pairs, filters or (...,), exhaustive=False)]
  )


def graphdef(node: Any, /) -> GraphDef:
  """The static structure of an object.

  >>> from refax import nnx
  >>> nnx.graphdef(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
  GraphDef(Linear, nodes=1, leaves=2)
  """
  return flatten(node).graphdef


def clone(node: Any, variables: bool = True, *, arrays: bool = False) -> Any:
  """A copy of an object with the same sharing inside.

  Args:
    node: a Module, Pytree, or any pytree of these.
    variables: whether the Variables are copied; else both have the same ones.
    arrays: whether nothing of the copy shares memory with the object, so that either may be
      donated. Cells of hijax Variables never share any; the arrays of lojax ones do.

  >>> from refax import nnx
  >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0)); twin = nnx.clone(model)
  >>> twin.kernel[...] = 0.0; bool((model.kernel == 0).any())
  False
  """
  flat = flatten(node)
  leaves = replaced(flat.leaves, copied) if variables else flat.leaves
  if arrays:
    leaves = [_with_arrays(x) for x in leaves]
  return unflatten(flat.graphdef, leaves)[0]


def _with_arrays(leaf: Any) -> Any:
  if isinstance(leaf, Variable) and leaf.is_hijax:
    return leaf
  return jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, leaf)


def update(node: Any, state: Any, /, *states: Any) -> None:
  """Write the values of States to the Variables of an object, in place.

  Args:
    node: a Module or Pytree.
    state: a State, or nested dicts; a leaf is a Variable or an array. A path that the object does
      not have becomes a new attribute of its parent.
    *states: more of them; a later one wins.

  Raises:
    TreeMismatchError: a path has no parent in the object, or leads to a Module; nothing has been
      written.
    ShapeMismatchError: a value has another shape or dtype; nothing has been written.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> model = nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))
  >>> nnx.update(model, {"kernel": jnp.full((2, 3), 3.0)})
  >>> float(model.kernel[1, 2])
  3.0
  """
  values = {path: leaf for s in (state, *states) for path, leaf in _flat(s)}
  flat = flatten(node)
  known = dict(zip(flat.graphdef.paths, flat.leaves, strict=True))
  writes, additions = [], []
  for path, leaf in values.items():
    parent, old = None, known.get(path)
    if not isinstance(old, Variable):  # another name of it, an array, or a new place
      parent, old = _lookup(node, path)
    if isinstance(old, Variable):
      writes.append((old, leaf))
    elif isinstance(old, Node):
      raise TreeMismatchError.object_there(path_str(path), type(old).__name__)
    elif parent is not None and _has_place(parent, path[-1], additions):
      additions.append((parent, path[-1], copy.copy(leaf) if is_variable(leaf) else leaf))
    else:
      raise TreeMismatchError.no_place(path_str(path), type(node).__name__)
  write(*writes)
  for parent, key, leaf in additions:
    set_entry(parent, key, leaf)


def _lookup(value: Any, path: Path, parent: Any = None) -> tuple[Any, Any]:
  """What is at a path, and the Node, dict or list it is an entry of; (None, None) if nothing."""
  if not path:
    return parent, value
  if isinstance(value, Node):
    for key, child, _ in value._entries():
      if key == path[0]:
        return _lookup(child, path[1:], value)
    return (value, None) if len(path) == 1 else (None, None)
  if not isinstance(value, Variable):
    for keys, leaf in region_items(value):
      if keys and path[: len(keys)] == keys:
        return _lookup(leaf, path[len(keys) :], _container(value, keys[:-1]))
    if len(path) == 1 and isinstance(value, dict):
      return value, None
  return None, None


def _container(value: Any, path: Path) -> dict | list | State | None:
  """The dict, list or State at a path of such containers and tuples."""
  for key in path:
    value = value[key] if isinstance(value, dict | list | tuple | State) else None
  return value if isinstance(value, dict | list | State) else None


def _has_place(parent: Any, key: Any, additions: list[tuple]) -> bool:
  """Whether an entry may be set or added: a List grows at its end only."""
  if not isinstance(parent, List):
    return True
  end = len(parent) + sum(p is parent and k >= len(parent) for p, k, _ in additions)
  return isinstance(key, int) and 0 <= key <= end


def set_entry(parent: Any, key: Any, value: Any) -> None:
  """Set an attribute, or an element of a List or Dict; the next one of a List is appended."""
  if not isinstance(parent, List | Dict | dict | list | State):
    setattr(parent, key, value)
  elif isinstance(parent, List) and key == len(parent):
    parent.append(value)
  else:
    parent[key] = value


def pop(node: Any, *filters: Filter) -> Any:
  """Remove Variables from an object and return them as a State.

  Args:
    node: a Module or Pytree, or dicts, lists and tuples of these.
    *filters: which Variables; one State is returned for each filter.

  Returns:
    A State, or a tuple of them if there are several filters.

  Raises:
    FilterError: no filter is given.
    TreeMismatchError: a Variable is in a tuple, or in another pytree that cannot lose it; all stay.

  >>> from refax import nnx
  >>> class Net(nnx.Module):
  ...   def __call__(self, x):
  ...     self.sow(nnx.Intermediate, "h", x); return x
  >>> net = Net(); _ = net(1.0)
  >>> list(nnx.pop(net, nnx.Intermediate)), hasattr(net, "h")
  (['h'], False)
  """
  if not filters:
    raise FilterError.none("nnx.pop")
  variables = _added_since(node, filters)
  if variables is None:
    variables = variable_places(node)
  places = [(identity(v), path, owner, v) for path, owner, v in variables]
  firsts = {key: (path, v) for key, path, _, v in reversed(places)}
  parts = partition(reversed(firsts.values()), filters, exhaustive=False)
  taken = {id(leaf) for part in parts for _, leaf in part}
  popped = {key for key, (_, leaf) in firsts.items() if id(leaf) in taken}
  found = [(path, owner) for key, path, owner, _ in places if key in popped]
  homes = [(owner or _home(node, path), path[-1]) for path, owner in found]
  once = {(id(home), key): (home, key) for home, key in homes}  # a dict may be reached twice
  for home, key in reversed(once.values()):  # of a list, the last element first
    _delete_child(home, key)
  _remember(node, filters)
  return _one_or_all(list(map(from_flat_state, parts)))


def _added_since(node: Any, filters: tuple) -> list[tuple[Path, Any, Variable]] | None:
  """The Variables that came to an object since it was left without any that these filters match.

  A loop that sows and pops in each step need not walk through the model. None if it is not known.
  """
  kept = node._pytree.popped if isinstance(node, Node) else None
  if kept is None or kept[1] != filters or kept[0] is None:
    return None
  watch, _, paths = kept
  added = watch.additions()
  known = [x for owner, _, x in added or () if isinstance(x, Variable) and id(owner) in paths]
  is_shared = len(known) > 1 and len(set(map(identity, known))) < len(known)
  if added is None or len(known) < len(added) or is_shared:
    node._pytree.popped = None
    return None
  return [((*paths[id(owner)], key), owner, x) for owner, key, x in added]


def _remember(node: Any, filters: tuple) -> None:
  """An object was left without Variables that match; of these, types alone never match later."""
  if not isinstance(node, Node) or not all(isinstance(f, type) for f in filters):
    return
  kept = node._pytree.popped
  if kept is None or kept[1] != filters:
    node._pytree.popped = (None, filters, {})  # who pops once need not be watched
    return
  if kept[0] is not None and not kept[0].is_dead:
    return
  watch = Watch()
  Walk(watch).entry(node)
  paths = {id(x): path for path, x in walk_nodes(node)}
  node._pytree.popped = (watch, filters, paths)


def _home(node: Any, path: Path) -> Any:
  """The plain dict or list, or the State, that has a Variable."""
  home = _lookup(node, path)[0] if path else None
  if home is None:
    raise TreeMismatchError.not_removable(path_str(path))
  return home


def _delete_child(parent: Any, key: Any) -> None:
  if isinstance(parent, Node) and not parent._is_container:
    delattr(parent, key)
  else:
    del parent[key]  # pyright: ignore[reportIndexIssue]
