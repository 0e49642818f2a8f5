"""What Flax NNX has beside split and merge: GraphState, flat leaves, trees, Variables of a kind."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from types import GenericAlias
from typing import Any

import jax

from refax.compat.contexts import ContextDef, merge_context, split_context
from refax.core.filters import All, Filter, to_predicate
from refax.core.flatten import flatten as _flatten
from refax.core.graphdef import GraphDef
from refax.core.node import Node
from refax.core.rebuild import unflatten as _unflatten
from refax.core.variable import Variable
from refax.graph import split as splitting
from refax.graph.apply import Applied
from refax.graph.inspect import find_duplicates
from refax.graph.state import FlatState, State, from_flat_state, partition, to_flat_state
from refax.graph.storage import to_hijax, to_lojax
from refax.typing import path_str


class GraphState(MutableMapping):
  """A State that brings its GraphDef along: what `unpack` returns and `merge` takes.

  >>> from refax.compat import nnx
  >>> state = nnx.unpack(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
  >>> list(state), nnx.merge(state).out_features
  (['bias', 'kernel'], 3)
  """

  __class_getitem__ = classmethod(GenericAlias)
  __slots__ = ("_graphdef", "_state")

  def __init__(self, graphdef: GraphDef, state: State):
    object.__setattr__(self, "_graphdef", graphdef)
    object.__setattr__(self, "_state", state)

  def __getattr__(self, name: str) -> Any:
    if name.startswith("__"):
      raise AttributeError(name)
    return getattr(self._state, name)

  def __setattr__(self, name: str, value: Any) -> None:
    setattr(self._state, name, value)

  def __getitem__(self, key: Any) -> Any:
    return self._state[key]

  def __setitem__(self, key: Any, value: Any) -> None:
    self._state[key] = value

  def __delitem__(self, key: Any) -> None:
    del self._state[key]

  def __iter__(self) -> Iterator:
    return iter(self._state)

  def __len__(self) -> int:
    return len(self._state)

  def __repr__(self) -> str:
    return f"GraphState({self._graphdef!r}, {self._state!r})"


jax.tree_util.register_pytree_with_keys(
  GraphState,
  lambda x: (((jax.tree_util.GetAttrKey("_state"), x._state),), x._graphdef),
  lambda graphdef, children: GraphState(graphdef, *children),  # pyright: ignore[reportArgumentType]
)


def split(node: Any, *filters: Filter, graph: Any = None) -> tuple[Any, ...]:
  """`nnx.split`, whose States have the object's own Variables, as in Flax.

  >>> from refax.compat import nnx
  >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  >>> graphdef, state = nnx.split(model); state["kernel"] is model.kernel
  True
  """
  flat = _flatten(node)
  pairs = list(zip(flat.graphdef.paths, flat.leaves, strict=True))
  parts = partition(pairs, filters or (...,))
  return (flat.graphdef, *map(splitting.as_state, parts))


def state(node: Any, *filters: Filter, graph: Any = None) -> Any:
  """`nnx.state`, whose States have the object's own Variables, as in Flax.

  >>> from refax.compat import nnx
  >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  >>> nnx.state(model, nnx.Param)["kernel"] is model.kernel
  True
  """
  flat = _flatten(node)
  pairs = list(zip(flat.graphdef.paths, flat.leaves, strict=True))
  parts = partition(pairs, filters or (...,), exhaustive=False)
  states = tuple(map(splitting.as_state, parts))
  return states[0] if len(states) == 1 else states


def unpack(node: Any, *filters: Filter, graph: Any = None) -> Any:
  """One GraphState for each filter; one with everything without any.

  >>> from refax.compat import nnx
  >>> params, rest = nnx.unpack(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), nnx.Param, ...)
  >>> list(params), list(rest)
  (['bias', 'scale'], ['mean', 'var'])
  """
  graphdef, *states = split(node, *filters)
  found = tuple(GraphState(graphdef, state) for state in states)
  return found[0] if len(found) == 1 else found


def merge(
  graphdef: Any, /, *states: Any, copy: bool = False, recreate_variables: bool = True
) -> Any:
  """`nnx.merge` of a GraphDef and States, or of GraphStates.

  Args:
    graphdef: a GraphDef or GraphState.
    *states: States, or GraphStates of the same object.
    copy: whether the Variables get cells of their own.
    recreate_variables: taken for Flax's sake; Variables are always handles of their own.

  >>> from refax.compat import nnx
  >>> nnx.merge(*nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))).out_features
  3
  """
  if isinstance(graphdef, GraphState):
    states = (graphdef, *states)
    if any(not isinstance(s, GraphState) or s._graphdef != graphdef._graphdef for s in states):
      raise ValueError("the GraphDef must be the same for all GraphStates, and each a GraphState")
    graphdef = graphdef._graphdef
  elif not isinstance(graphdef, GraphDef | ContextDef):
    raise TypeError(f"merge takes a GraphDef or GraphState first, got {type(graphdef).__name__}")
  if not states:
    raise TypeError("merge() missing 1 required positional argument: 'state'")
  graphdef = graphdef.graphdef if isinstance(graphdef, ContextDef) else graphdef
  states = tuple(s._state if isinstance(s, GraphState) else s for s in states)
  new = _unflatten(graphdef, splitting.leaves_of(graphdef, states))[0]
  return splitting.clone(new) if copy else new


def flatten(
  node: Any, /, *, with_paths: bool = True, ref_index: Any = None, graph: Any = None
) -> tuple[GraphDef, Any]:
  """The GraphDef of an object, and its leaves: with their paths as a FlatState, or as a list.

  >>> from refax.compat import nnx
  >>> graphdef, flat = nnx.flatten(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
  >>> flat.paths
  (('bias',), ('kernel',))
  """
  flat = _flatten(node)
  if not with_paths:
    return flat.graphdef, list(flat.leaves)
  return flat.graphdef, FlatState(zip(flat.graphdef.paths, flat.leaves, strict=True))


def unflatten(graphdef: GraphDef, state: Any, /, **_: Any) -> Any:
  """The object of a GraphDef and a State, a FlatState, or a list of leaves.

  >>> from refax.compat import nnx
  >>> nnx.unflatten(*nnx.flatten(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))).in_features
  2
  """
  if isinstance(state, FlatState):
    return merge(graphdef, list(state.leaves))
  return merge(graphdef, state)


def call(graphdef_state: tuple, /) -> Applied:
  """A call of the object of `(graphdef, state)`: the result, and its new `(graphdef, state)`.

  >>> from refax.compat import nnx; import jax.numpy as jnp
  >>> y, pair = nnx.call(nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))(jnp.ones((1, 2)))
  >>> y.shape
  (1, 3)
  """
  graphdef, *states = graphdef_state
  return graphdef.apply(*states)


def with_vars(
  node: Any,
  /,
  *,
  hijax: bool | None = None,
  ref: bool | None = None,
  mutable: bool | None = None,
  only: Filter = ...,
  allow_duplicates: bool = False,
) -> Any:
  """A copy of an object whose Variables have another storage: `nnx.to_hijax`, `nnx.to_lojax`.

  >>> from refax.compat import nnx
  >>> nnx.with_vars(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), ref=True).kernel.is_hijax
  True
  """
  wanted = [x for x in (hijax, ref, mutable) if x is not None]
  if not wanted:
    return splitting.clone(node, variables=False)
  new = any(wanted)
  other = lambda _, x: isinstance(x, Variable) and x.is_hijax != new
  predicate = to_predicate(All(other, only))
  if not allow_duplicates and (found := find_duplicates(node, only=predicate)):
    shown = "\n".join("  " + ", ".join(map(path_str, paths)) for paths in found)
    raise ValueError(f"the same Variable is at several paths:\n{shown}")
  return (to_hijax if new else to_lojax)(node, only=predicate)


def restore_int_paths(pure_dict: Mapping[Any, Any]) -> dict[Any, Any]:
  """Nested dicts with ints for the keys that are digits, as files have them.

  >>> restore_int_paths({"layers": {"0": 1.0}})
  {'layers': {0: 1.0}}
  """

  def key(k: Any) -> Any:
    return int(k) if isinstance(k, str) and k.isdigit() else k

  return {
    key(k): restore_int_paths(v) if isinstance(v, Mapping) else v for k, v in pure_dict.items()
  }


@dataclasses.dataclass(frozen=True)
class NodeStates:
  """An object as a GraphDef and States in one pytree: what `to_tree` puts in its place."""

  _graphdef: Any
  states: tuple
  metadata: Any = None

  @property
  def graphdef(self) -> Any:
    """The GraphDef."""
    if self._graphdef is None:
      raise ValueError("these NodeStates have no GraphDef")
    return self._graphdef

  @property
  def state(self) -> Any:
    """The State, if there is one only."""
    if len(self.states) != 1:
      raise ValueError(f"these NodeStates have {len(self.states)} States, not one")
    return self.states[0]

  @classmethod
  def from_split(cls, graphdef: Any, state: Any, /, *states: Any, metadata: Any = None):
    """Of what `split` returned."""
    return cls(graphdef, (state, *states), metadata)

  @classmethod
  def from_states(cls, state: Any, *states: Any):
    """Of States only."""
    return cls(None, (state, *states))

  @classmethod
  def from_prefixes(cls, prefixes: Any, /, *, metadata: Any = None):
    """Of what stands for the States, axes for example."""
    return cls(None, tuple(prefixes), metadata)


jax.tree_util.register_dataclass(NodeStates, ["_graphdef", "states"], ["metadata"])


def _is_object(x: Any) -> bool:
  return isinstance(x, Node | Variable)


def to_tree(
  tree: Any,
  /,
  *,
  prefix: Any = None,
  split_fn: Callable[..., Any] | None = None,
  map_non_graph_nodes: bool = False,
  ctxtag: Any = None,
  check_aliasing: bool = True,
) -> Any:
  """A pytree with NodeStates in place of the objects: a pytree of arrays for any JAX transform.

  >>> from refax.compat import nnx
  >>> tree = nnx.to_tree({"m": nnx.Linear(2, 3, rngs=nnx.Rngs(0))})
  >>> nnx.from_tree(tree)["m"].out_features
  3
  """
  split_fn = split_fn or (lambda ctx, path, prefix, x: NodeStates.from_split(*ctx.split(x)))
  prefixes = _prefixes(prefix, tree, _is_object)
  with split_context(ctxtag) as ctx:

    def one(path: Any, x: Any) -> Any:
      at = next(prefixes)
      return split_fn(ctx, path, at, x) if _is_object(x) or map_non_graph_nodes else x

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=_is_object)


def from_tree(
  tree: Any,
  /,
  *,
  prefix: Any = None,
  merge_fn: Callable[..., Any] | None = None,
  is_node_leaf: Callable[[Any], bool] = lambda x: isinstance(x, NodeStates),
  is_leaf: Callable[[Any], bool] = lambda x: isinstance(x, NodeStates),
  map_non_graph_nodes: bool = False,
  is_inner: bool | None = None,
  ctxtag: Any = None,
) -> Any:
  """The pytree of objects that `to_tree` took apart.

  >>> from refax.compat import nnx
  >>> nnx.from_tree(nnx.to_tree([nnx.Param(1.0)]))[0].is_hijax
  False
  """
  merge_fn = merge_fn or (lambda ctx, path, prefix, x: ctx.merge(x.graphdef, *x.states))
  prefixes = _prefixes(prefix, tree, is_leaf)
  with merge_context(ctxtag, is_inner) as ctx:

    def one(path: Any, x: Any) -> Any:
      at = next(prefixes)
      return merge_fn(ctx, path, at, x) if is_node_leaf(x) or map_non_graph_nodes else x

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_leaf)


def _prefixes(prefix: Any, tree: Any, is_leaf: Callable[[Any], bool]) -> Iterator[Any]:
  """The part of a prefix for each leaf of a tree."""
  if prefix is None:
    return iter([None] * len(jax.tree.leaves(tree, is_leaf=is_leaf)))
  ends = lambda x: x is None or is_leaf(x)
  spread = lambda p, sub: [p] * len(jax.tree.leaves(sub, is_leaf=is_leaf))
  found: list[Any] = []
  jax.tree.map(lambda p, sub: found.extend(spread(p, sub)), prefix, tree, is_leaf=ends)
  return iter(found)


def diff(state: State, other: State) -> State:
  """The part of a State whose paths another has not.

  >>> from refax.compat import nnx
  >>> list(diff(nnx.State({"a": 1, "b": 2}), nnx.State({"a": 1})))
  ['b']
  """
  known = {path for path, _ in to_flat_state(other)}
  return from_flat_state((path, x) for path, x in to_flat_state(state) if path not in known)
