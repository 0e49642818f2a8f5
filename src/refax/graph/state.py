"""State: the values of an object as a nested mapping from path steps to Variables or arrays."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from types import GenericAlias
from typing import Any

import jax

from refax import _jax
from refax.core import text
from refax.core.brief import summary
from refax.core.filters import Filter, Predicate, to_predicates
from refax.core.flatten import ref_in
from refax.core.mesh import objects_enter_mesh
from refax.core.node import Tracked
from refax.core.orbax import on_arrays
from refax.core.variable import Variable
from refax.core.watch import Watch, Watches
from refax.core.write import write
from refax.errors import FilterError, RefArgumentError, ReturnedRefError, TreeMismatchError
from refax.typing import Key, Path, path_str


def _order(key: Key) -> tuple[str, Any]:
  return type(key).__name__, key


class State(MutableMapping, Tracked):
  """A nested mapping of Variables or arrays; a JAX pytree.

  Args:
    mapping: nested mappings, or pairs of a key and a value.

  >>> from refax import nnx
  >>> state = nnx.state(nnx.Linear(1, 2, rngs=nnx.Rngs(0)))
  >>> list(state), state["bias"].shape, state.bias.shape
  (['bias', 'kernel'], (2,), (2,))
  """

  __slots__ = ("__weakref__", "_is_sorted", "_mapping", "_watches")
  __class_getitem__ = classmethod(GenericAlias)
  _mapping: dict[Key, Any]

  def __init__(self, mapping: Mapping[Key, Any] | Iterable[tuple[Key, Any]] = (), /):
    self._take(dict(mapping))
    open_: list[State] = [self]
    while open_:  # nested dicts become States; there may be more levels than Python's stack has
      state = open_.pop()
      for key, value in state._mapping.items():
        if type(value) is dict:
          state._mapping[key] = new = object.__new__(State)
          new._take(dict(value))
          open_.append(new)

  def _take(self, mapping: dict[Key, Any]) -> None:
    _set_mapping(self, mapping)
    _set_is_sorted(self, False)
    _set_watches(self, None)

  def _visit(self, watch: Watch | None) -> Iterable[Any]:
    if watch is not None:
      if self._watches is None:
        _set_watches(self, Watches())
      self._watches.add(watch)
    return self._mapping.values()

  def __getitem__(self, key: Key) -> Any:
    return self._mapping[key]

  def __setitem__(self, key: Key, value: Any) -> None:
    if key not in self._mapping:
      _set_is_sorted(self, False)
    self._mapping[key] = State(value) if type(value) is dict else value
    if self._watches is not None:
      self._watches.touch(self, None)

  def __delitem__(self, key: Key) -> None:
    del self._mapping[key]
    if self._watches is not None:
      self._watches.touch(self, None)

  def _ordered(self) -> dict[Key, Any]:
    """What the State maps, sorted by key: once, for JAX asks in each call."""
    if not self._is_sorted:
      _set_mapping(self, {key: self._mapping[key] for key in sorted(self._mapping, key=_order)})
      _set_is_sorted(self, True)
    return self._mapping

  def __iter__(self) -> Iterator[Key]:
    return iter(tuple(self._ordered()))

  def __len__(self) -> int:
    return len(self._mapping)

  def __getattr__(self, name: str) -> Any:
    if name.startswith("__") or name not in self._mapping:
      raise AttributeError(f"State has no {name!r}; it has {sorted(map(str, self._mapping))}")
    return self._mapping[name]

  def __setattr__(self, name: str, value: Any) -> None:
    self[name] = value

  def __getstate__(self) -> Any:
    return self._mapping

  def __setstate__(self, mapping: Any) -> None:
    self.__init__(mapping)

  def flat_state(self) -> "FlatState":
    """All (path, leaf) pairs."""
    return to_flat_state(self)

  def filter(self, first: Filter, /, *filters: Filter) -> Any:
    """The parts that match each filter; what matches none is left out."""
    parts = partition(self.flat_state(), (first, *filters), exhaustive=False)
    states = tuple(map(from_flat_state, parts))
    return states if filters else states[0]

  def split(self, first: Filter, /, *filters: Filter) -> Any:
    """The parts that match each filter; together they must cover everything."""
    states = tuple(map(from_flat_state, partition(self.flat_state(), (first, *filters))))
    return states if filters else states[0]

  def map(self, fn: Callable[[Path, Any], Any]) -> "State":
    """A State with `fn(path, leaf)` in place of each leaf."""
    return from_flat_state((path, fn(path, leaf)) for path, leaf in self.flat_state())

  def to_pure_dict(self, extract_fn: Callable[[Any], Any] | None = None) -> dict[Key, Any]:
    """See `nnx.to_pure_dict`."""
    return to_pure_dict(self, extract_fn)

  def replace_by_pure_dict(
    self, pure_dict: Mapping, replace_fn: Callable[[Any, Any], Any] | None = None
  ) -> None:
    """See `nnx.replace_by_pure_dict`."""
    replace_by_pure_dict(self, pure_dict, replace_fn)

  @staticmethod
  def merge(*states: Mapping) -> "State":
    """One State with the leaves of all; a later one wins."""
    return merge_state(*states)

  def __repr_parts__(self, style: Any) -> tuple[text.Parts, Any]:
    comment, open_, close = "", "State({", "})"
    if id(self) in style.seen[:-1] or len(style.seen) > 1:
      open_, close = "{", "}"
    items = ((f"{key!r}: ", self[key]) for key in self)
    return text.Parts(open_, comment, items, close), style

  def __repr_line__(self, style: Any) -> text.Line | None:
    if not style.shapes or style.full:
      return None
    leaves = self.flat_state().leaves
    return text.Line(f"State({len(leaves)} leaves)", summary(leaves))

  def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
    return text.as_tree(self, path, subtree_renderer)

  def __repr__(self) -> str:
    return text.render(self)


def _flatten_with_keys(state: State):
  mapping = state._ordered()
  children = mapping.values() if not _jax.orbax_flattens() else on_arrays(mapping.values())
  keys = map(jax.tree_util.DictKey, mapping)
  return list(zip(keys, children, strict=True)), tuple(mapping)


def _flatten(state: State):
  mapping = state._ordered()
  keys, children = tuple(mapping), list(mapping.values())
  if not any(isinstance(x, Variable) and x.is_hijax for x in children):
    return children, keys  # no Refs: who asks makes no difference, and takes as long as all of this
  objects_enter_mesh(children)
  function, returning = _jax.refusing_function(), _jax.returning_function()
  if function:
    raise RefArgumentError.function(function, "State")
  if returning is not None:
    for key, child in zip(keys, children, strict=True):
      if (ref := ref_in(child)) is not None:
        raise ReturnedRefError.result(*returning(), "State", path_str((key,)), ref)
  return children if not _jax.orbax_flattens() else on_arrays(children), keys


def _unflatten(keys: tuple, children: Iterable[Any]) -> State:
  state = object.__new__(State)
  _set_mapping(state, dict(zip(keys, children, strict=True)))
  _set_is_sorted(state, True)  # as `_flatten` has found them
  _set_watches(state, None)
  return state


_set_mapping, _set_is_sorted, _set_watches = (
  vars(State)[slot].__set__ for slot in ("_mapping", "_is_sorted", "_watches")
)
jax.tree_util.register_pytree_with_keys(State, _flatten_with_keys, _unflatten, _flatten)


class FlatState(Sequence):
  """(path, leaf) pairs of a State, sorted by path.

  >>> from refax import nnx
  >>> flat = nnx.to_flat_state(nnx.State({"a": {"b": 1}, "c": 2}))
  >>> flat.paths, flat.leaves
  ((('a', 'b'), ('c',)), (1, 2))
  """

  __slots__ = ("_items",)

  def __init__(self, items: Iterable[tuple[Path, Any]]):
    self._items = tuple(items)

  @property
  def paths(self) -> tuple[Path, ...]:
    """The paths."""
    return tuple(path for path, _ in self._items)

  @property
  def leaves(self) -> tuple[Any, ...]:
    """The leaves."""
    return tuple(leaf for _, leaf in self._items)

  def __getitem__(self, index):
    return self._items[index]

  def __len__(self) -> int:
    return len(self._items)

  def __repr_parts__(self, style: Any) -> tuple[text.Parts, Any]:
    return text.Parts("FlatState([", "", (("", item) for item in self._items), "])"), style

  def __repr__(self) -> str:
    return text.render(self)


jax.tree_util.register_pytree_node(
  FlatState,
  lambda flat: (flat.leaves, flat.paths),
  lambda paths, leaves: FlatState(zip(paths, leaves, strict=True)),
)


def to_flat_state(state: Mapping) -> FlatState:
  """All (path, leaf) pairs of a nested mapping, sorted by path.

  >>> from refax import nnx
  >>> nnx.to_flat_state(nnx.state(nnx.Linear(1, 2, rngs=nnx.Rngs(0)))).paths
  (('bias',), ('kernel',))
  """
  found: list[tuple[Path, Any]] = []
  open_: list[tuple[Path, Any]] = [((), state)]
  while open_:
    path, value = open_.pop()
    if isinstance(value, State):
      open_ += [((*path, key), child) for key, child in reversed(value._ordered().items())]
    elif isinstance(value, dict) or value is state:
      keys = sorted(value, key=_order, reverse=True)
      open_ += [((*path, key), value[key]) for key in keys]
    else:
      found.append((path, value))
  return FlatState(found)


def from_flat_state(flat: Mapping[Path, Any] | Iterable[tuple[Path, Any]]) -> State:
  """The State with these (path, leaf) pairs; the inverse of `to_flat_state`.

  >>> from refax import nnx
  >>> nnx.from_flat_state({("a", "b"): 1})["a"]["b"]
  1
  """
  root: dict[Key, Any] = {}
  for path, leaf in flat.items() if isinstance(flat, Mapping) else flat:
    node = root
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = leaf
  return State(root)


def map_state(fn: Callable[[Path, Any], Any], state: State) -> State:
  """A State with `fn(path, leaf)` in place of each leaf.

  >>> from refax import nnx
  >>> nnx.map_state(lambda path, x: (path, 2 * x), nnx.State({"a": 1}))["a"]
  (('a',), 2)
  """
  return state.map(fn)


def to_pure_dict(state: Mapping, extract_fn: Callable[[Any], Any] | None = None) -> dict[Key, Any]:
  """Nested plain dicts of arrays.

  Args:
    state: a State.
    extract_fn: what to take from a leaf; by default a Variable's value.

  >>> from refax import nnx
  >>> nnx.to_pure_dict(nnx.State({"a": nnx.Param(1.0)}))
  {'a': Array(1., dtype=float32)}
  """
  extract = extract_fn or (lambda x: x.get_value() if isinstance(x, Variable) else x)
  return {
    key: to_pure_dict(value, extract_fn) if isinstance(value, State | dict) else extract(value)
    for key, value in ((key, state[key]) for key in state)
  }


def replace_by_pure_dict(
  state: State, pure_dict: Mapping, replace_fn: Callable[[Any, Any], Any] | None = None
) -> None:
  """Write the values of nested dicts to the leaves of a State at the same paths.

  Args:
    state: the State; its Variables are written, its arrays replaced.
    pure_dict: nested dicts of arrays; it may hold a part of the paths.
    replace_fn: `(leaf, value) -> leaf`, instead of writing.

  Raises:
    TreeMismatchError: a path is not in the State; nothing has been written.
    ShapeMismatchError: a value has another shape or dtype; nothing has been written.

  >>> from refax import nnx
  >>> state = nnx.State({"a": nnx.Param(1.0)})
  >>> nnx.replace_by_pure_dict(state, {"a": 2.0}); float(state["a"])
  2.0
  """
  current = dict(to_flat_state(state))
  values = dict(_match_keys(to_flat_state(pure_dict), current))
  unknown = [path_str(path) for path in values if path not in current]
  if unknown:
    raise TreeMismatchError.merge([], unknown)
  writes, replacements = [], []
  for path, value in values.items():
    old = current[path]
    if replace_fn is not None:
      replacements.append((path, replace_fn(old, value)))
    elif isinstance(old, Variable):
      writes.append((old, value))
    else:
      replacements.append((path, value))
  write(*writes)
  for path, new in replacements:
    parent: Any = state
    for key in path[:-1]:
      parent = parent[key]
    parent[path[-1]] = new


def _match_keys(flat: FlatState, known: Mapping[Path, Any]) -> Iterator[tuple[Any, Any]]:
  """Paths from files have strings where the State has ints: `'0'` means 0 if only that exists."""
  by_text = {tuple(map(str, path)): path for path in known}
  for path, value in flat:
    yield path if path in known else by_text.get(tuple(map(str, path)), path), value


def filter_state(state: State, first: Filter, /, *filters: Filter) -> Any:
  """The parts of a State that match each filter; what matches none is left out.

  >>> from refax import nnx
  >>> state = nnx.State({"a": nnx.Param(1.0), "b": nnx.BatchStat(0.0)})
  >>> list(nnx.filter_state(state, nnx.Param))
  ['a']
  """
  return state.filter(first, *filters)


def split_state(state: State, first: Filter, /, *filters: Filter) -> Any:
  """The parts of a State that match each filter; together they must cover everything.

  Raises:
    FilterError: something matches no filter.

  >>> from refax import nnx
  >>> state = nnx.State({"a": nnx.Param(1.0), "b": nnx.BatchStat(0.0)})
  >>> params, rest = nnx.split_state(state, nnx.Param, ...); list(rest)
  ['b']
  """
  return state.split(first, *filters)


def merge_state(*states: Mapping) -> State:
  """One State with the leaves of all; a later one wins.

  >>> from refax import nnx
  >>> list(nnx.merge_state(nnx.State({"a": 1}), nnx.State({"b": 2})))
  ['a', 'b']
  """
  merged: dict[Path, Any] = {}
  for state in states:
    merged.update(dict(to_flat_state(state)))
  return from_flat_state(merged)


def partition(
  flat: Iterable[tuple[Path, Any]], filters: Sequence[Filter], *, exhaustive: bool = True
) -> list[list[tuple[Path, Any]]]:
  """The pairs that match each filter, the first that matches taking a pair.

  Raises:
    FilterError: `exhaustive`, and a pair matches no filter.
  """
  predicates: list[Predicate] = to_predicates(filters)
  parts: list[list[tuple[Path, Any]]] = [[] for _ in predicates]
  rest = []
  for path, leaf in flat:
    for part, matches in zip(parts, predicates, strict=True):
      if matches(path, leaf):
        part.append((path, leaf))
        break
    else:
      rest.append((path, leaf))
  if rest and exhaustive:
    raise FilterError.remainder([path_str(path) for path, _ in rest])
  return parts
