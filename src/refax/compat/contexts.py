"""split_context, merge_context and update_context: several objects that share, cut and rebuilt.

Flax NNX's own transforms are made of them, and so are transforms that others have written.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from refax import _jax
from refax.core.filters import Filter
from refax.core.flatten import Walk
from refax.core.graphdef import LEAF, GraphDef
from refax.core.node import Node
from refax.core.rebuild import Blueprint
from refax.core.variable import Variable, handles
from refax.graph.split import as_state, set_entry
from refax.graph.state import partition, to_flat_state
from refax.typing import Path


class ContextDef:
  """The GraphDef of an object that was split in a context, after others.

  Args:
    graphdef: of all objects until then; its root is this one.
    first_leaf: the number of the first leaf that no object before has.
    first_node: the number of the first such node.
  """

  __slots__ = ("first_leaf", "first_node", "graphdef")

  def __init__(self, graphdef: GraphDef, first_leaf: int, first_node: int):
    self.graphdef, self.first_leaf, self.first_node = graphdef, first_leaf, first_node

  @property
  def paths(self) -> list[Path]:
    """The paths of the leaves that no object before has."""
    found: dict[int, Path] = {}
    for path, entry in self.graphdef.walk():
      if entry[0] == LEAF and entry[1] >= self.first_leaf:
        found.setdefault(entry[1], path)
    return [found[i] for i in sorted(found)]

  def __getattr__(self, name: str) -> Any:
    if name.startswith("__"):
      raise AttributeError(name)
    return getattr(self.graphdef, name)

  def _key(self) -> tuple:
    return self.graphdef, self.first_leaf, self.first_node

  def __hash__(self) -> int:
    return hash(self._key())

  def __eq__(self, other: object) -> bool:
    return isinstance(other, ContextDef) and self._key() == other._key()


jax.tree_util.register_static(ContextDef)


class UpdateContext:
  """What `update_context` keeps: the caller's objects, in the order in which they were split."""

  def __init__(self, tag: Any):
    self.tag = tag
    self.outer: list[Any] | None = None


class _Local(threading.local):
  def __init__(self):
    self.open: dict[Any, list[UpdateContext]] = {}


_local = _Local()


class SplitContext:
  """Splits objects one after the other; what they share is in the State of the first."""

  def __init__(self) -> None:
    self._walk = Walk()
    self.roots: list[Any] = []

  def split(self, node: Any, /, *filters: Filter) -> Any:
    """`nnx.split`, without what an object before has already."""
    walk = self._walk
    first_leaf, first_node = len(walk.leaves), len(walk.nodes)
    definition = ContextDef(walk.graphdef(walk.entry(node)), first_leaf, first_node)
    self.roots.append(node)
    leaves = walk.leaves[first_leaf:]
    pairs = list(zip(definition.paths, handles(leaves), strict=True))
    parts = [as_state(part) for part in partition(pairs, filters or (...,))]
    return (definition, *parts)

  flatten = split


class MergeContext:
  """Rebuilds objects one after the other, in the order in which they were split."""

  def __init__(self, outer: list[Any] | None = None):
    self._leaves: list[Any] = []
    self._nodes: list[Node] = []
    self._outer = None if outer is None else iter(outer)

  def merge(self, graphdef: ContextDef, /, *states: Any) -> Any:
    """`nnx.merge`; if the caller's objects are known, these take over and are returned."""
    values: dict[Path, Any] = {}
    for state in states:
      values |= dict(to_flat_state(state)) if isinstance(state, Mapping) else {(): state}
    self._leaves += [values[path] for path in graphdef.paths]
    described = graphdef.graphdef.nodes[graphdef.first_node :]
    self._nodes, value = Blueprint(described, graphdef.first_node).build(self._leaves, self._nodes)
    new = value(graphdef.graphdef.root)
    old = None if self._outer is None else next(self._outer, None)
    if old is None:
      return new
    transplant(old, new)
    return old

  unflatten = merge


def transplant(old: Any, new: Any, done: set[int] | None = None) -> None:
  """Give the objects of `old` what those at the same places of `new` have."""
  done = set() if done is None else done
  if isinstance(old, Variable):
    if old is not new:
      old.set_value(new.get_value())
    return
  if not isinstance(old, Node) or id(old) in done:
    return
  done.add(id(old))
  before = {key: value for key, value, _ in old._entries()}
  after = {key: value for key, value, _ in new._entries()}
  for key, value in after.items():
    kept = before.get(key)
    if isinstance(kept, Node | Variable) and type(kept) is type(value):
      transplant(kept, value, done)
    elif key not in before or (kept is not value and not _equal(kept, value)):
      set_entry(old, key, value)
  for key in before.keys() - after.keys():
    delattr(old, key)


def _equal(a: Any, b: Any) -> bool:
  return type(a) is type(b) and not isinstance(a, jax.Array) and bool(a == b)


@contextlib.contextmanager
def split_context(ctxtag: Any = None) -> Iterator[SplitContext]:
  """A context in which several objects are split together.

  >>> from refax.compat import nnx
  >>> a = nnx.Dict(w=nnx.Param(1.0)); b = nnx.Dict(w=a.w)
  >>> with nnx.split_context() as ctx:
  ...   (def_a, state_a), (def_b, state_b) = ctx.split(a), ctx.split(b)
  >>> len(state_a), len(state_b)
  (1, 0)
  """
  update = current_update_context(ctxtag) if ctxtag is not None else None
  context = SplitContext()
  yield context
  if update is not None and update.outer is None and _jax.no_trace_active():
    update.outer = context.roots


@contextlib.contextmanager
def merge_context(ctxtag: Any = None, inner: bool | None = None) -> Iterator[MergeContext]:
  """A context in which the objects of a `split_context` are rebuilt.

  >>> from refax.compat import nnx
  >>> a = nnx.Dict(w=nnx.Param(1.0)); b = nnx.Dict(w=a.w)
  >>> with nnx.split_context() as ctx:
  ...   parts = ctx.split(a), ctx.split(b)
  >>> with nnx.merge_context() as ctx:
  ...   a, b = (ctx.merge(*part) for part in parts)
  >>> a.w is b.w
  True
  """
  update = current_update_context(ctxtag) if ctxtag is not None else None
  outer = update.outer if update is not None and not inner else None
  yield MergeContext(outer)


class update_context(contextlib.ContextDecorator):
  """A context in which what an inner function did to objects comes back to the caller's.

  >>> from refax.compat import nnx; import jax
  >>> count = nnx.Variable(0)
  >>> with nnx.update_context("doctest"):
  ...   with nnx.split_context("doctest") as ctx:
  ...     parts = ctx.split(count)
  ...   @jax.jit
  ...   def inner(parts):
  ...     with nnx.merge_context("doctest", inner=True) as ctx:
  ...       count = ctx.merge(*parts)
  ...     count[...] += 1
  ...     with nnx.split_context("doctest") as ctx:
  ...       return ctx.split(count)
  ...   parts = inner(parts)
  ...   with nnx.merge_context("doctest", inner=False) as ctx:
  ...     _ = ctx.merge(*parts)
  >>> int(count[...])
  1
  """

  def __init__(self, tag: Any):
    self.tag = tag

  def __enter__(self) -> UpdateContext:
    context = UpdateContext(self.tag)
    _local.open.setdefault(self.tag, []).append(context)
    return context

  def __exit__(self, *_: Any) -> None:
    _local.open[self.tag].pop()


def current_update_context(tag: Any) -> UpdateContext:
  """The innermost open `update_context` of this tag."""
  if not _local.open.get(tag):
    raise ValueError(f"no update_context of the tag {tag!r} is open")
  return _local.open[tag][-1]


def cached_partial(
  f: Callable[..., Any], *cached: Any, graph: Any = None, graph_updates: Any = None
):
  """`functools.partial`: a call of `nnx.jit` with known objects costs next to nothing anyway.

  >>> from refax.compat import nnx
  >>> nnx.cached_partial(nnx.jit(lambda a, b: a[...] * b), nnx.Param(2.0))(3.0)
  Array(6., dtype=float32...)
  """
  return functools.partial(f, *cached)
