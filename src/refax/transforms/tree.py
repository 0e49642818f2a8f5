"""Arguments of nnx.jit that are containers: what is in them, compared from call to call.

A list of Modules, a dict of arrays, a State of gradients, a Variable by itself: the caller may make
these anew for each call, so they are known by what is in them and not by their identity.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from refax import _jax
from refax.core.by_value import ByValue
from refax.core.callables import CALLABLES, taken_apart
from refax.core.definition import kind
from refax.core.flatten import is_followed
from refax.core.graphdef import LEAF, REGION, STATIC
from refax.core.node import Node
from refax.core.variable import Variable
from refax.graph.state import State

flatten = jax.tree_util.tree_flatten


class Tree(NamedTuple):
  """What one argument is to have in it."""

  argument: int
  treedef: Any
  shape: "_Shape | None"
  """For a State of Variables and arrays, in place of the treedef: JAX takes five times as long."""
  is_leaf: Callable[[Any], bool] | None
  entries: list[int | None]
  """For each leaf its index among the leaves of the call; None for an object."""
  arrays: list[tuple[int, Any, Any, Any, Any]]
  """The place of each array and number, and what it is compared with, a `Like`."""
  objects: list[tuple[int, Callable[[], Any]]]
  """The place of each object, and of each Ref that no Variable holds, and which one it is."""
  variables: list[tuple[int, type, Any, Any]]
  """The place, type and definition of each Variable, and what is known of its cell."""
  alike: "_Alike | None" = None
  """In place of `variables`, where all leaves are lojax Variables of arrays."""
  constants: Sequence[tuple[int, Any, Any]] = ()
  """Of a bound method or a partial, the place, value and kind of each part that is static."""

  @classmethod
  def of(cls, index: int, x: Any, entry: tuple) -> "Tree | None":
    """The description of an argument, or None if that cannot be compared later on.

    Args:
      index: which argument it is.
      x: the argument.
      entry: what the walk made of it.
    """
    leaves, treedef = taken_apart(x) if is_followed(x) else flatten(x, is_object)
    children = entry[2] if entry[0] == REGION else [entry]
    if len(children) != len(leaves) or any(e[0] == REGION or e[1] is ByValue for e in children):
      return None
    entries = [e[1] if e[0] == LEAF else None for e in children]
    static = [(j, leaves[j], e[1]) for j, e in enumerate(children) if e[0] == STATIC]
    tree = cls(index, treedef, _shape_of(x), None, entries, [], [], [], constants=static)
    if (alike := _Alike.of(leaves)) is not None:
      return tree._replace(is_leaf=is_object, alike=alike)
    for j, leaf in enumerate(leaves):
      if children[j][0] == STATIC:
        continue
      if isinstance(leaf, Node) or _jax.is_ref(leaf):
        tree.objects.append((j, weakref.ref(leaf)))
      elif isinstance(leaf, Variable):
        tree.variables.append((j, type(leaf), leaf._def, _known(leaf._cell)))
      elif type_of(leaf) is not None:
        tree.arrays.append((j, *Like.of(leaf)))
      else:
        return None
    return tree._replace(is_leaf=is_object if tree.objects or tree.variables else None)

  def collect(self, x: Any, leaves: list[Any], cells: list[Any], lojax: list[Variable]) -> bool:
    """Whether an argument has the same in it.

    Args:
      x: the argument.
      leaves: its leaves are added to this list,
      cells: and these as arrays to this one,
      lojax: and the lojax Variables among them to this one.
    """
    if self.shape is not None:
      found: list[Any] = []
      if not _take(x, self.shape, found):
        return False
    else:
      found, treedef = taken_apart(x) if type(x) in CALLABLES else flatten(x, self.is_leaf)
      # JAX says of a treedef and of something else that they are neither equal nor unequal.
      if type(treedef) is not type(self.treedef) or treedef != self.treedef:
        return False
      for j, value, kind_ in self.constants:
        if found[j] is not value and not is_equal(found[j], value, kind_):
          return False
    if self.alike is not None:
      arrays = self.alike.arrays_of(found)
      if arrays is None:
        return False
      lojax += found
      leaves += found
      cells += arrays
      return True
    if not all(is_like(found[j], *rest) for j, *rest in self.arrays):
      return False
    for j, ref in self.objects:
      if ref() is not found[j]:
        return False
    if not self.variables:
      leaves += found
      cells += found
      return True
    arrays = list(found)
    for j, cls, definition, want in self.variables:
      leaf = found[j]
      if type(leaf) is not cls:
        return False
      ((cell,), now) = leaf._node
      if now is not definition and now != definition:
        return False
      if type(want) is weakref.ref:
        if want() is not cell:
          return False
      elif getattr(cell, "aval", want) is want.aval or want.holds(cell):
        if want.is_lojax:
          lojax.append(leaf)
      else:
        return False
      arrays[j] = cell
    leaves += found
    cells += arrays
    return True


class _Alike:
  """What lojax Variables of arrays are compared with, all in C: row by row.

  What has been found to be equal is what the next ones are compared with: mostly they are the same
  definitions and shardings, which are not looked into then.
  """

  __slots__ = ("_rows",)

  def __init__(self, leaves: list[Any], arrays: list[Any]):
    types = _jax.types_of(arrays)
    self._rows = (list(map(type, leaves)), [x._def for x in leaves], {type(arrays[0])}, types)

  @classmethod
  def of(cls, leaves: list[Any]) -> "_Alike | None":
    """What is like these leaves; None if there are others among them, or none at all."""
    if not leaves or not all(isinstance(x, Variable) for x in leaves):
      return None
    arrays = [x._cell for x in leaves]
    (array, *others) = set(map(type, arrays))
    if others or not issubclass(array, jax.Array) or issubclass(array, jax.Ref):
      return None
    return cls(leaves, arrays)

  def arrays_of(self, found: list[Any]) -> list[Any] | None:
    """The arrays of Variables that are like these; None if they are not."""
    classes, definitions, array, types = self._rows
    if list(map(type, found)) != classes:
      return None
    nodes = [x._node for x in found]
    arrays, now = [cells[0] for cells, _ in nodes], [x for _, x in nodes]
    if now != definitions or set(map(type, arrays)) != array:
      return None
    types_now = _jax.types_of(arrays)
    if types_now != types:
      return None
    self._rows = classes, now, array, types_now
    return arrays


class _Shape(NamedTuple):
  """The keys of a State, and for each the shape of the State there, or None for a leaf."""

  keys: list
  children: tuple | None
  """None where there are leaves only."""


def _shape_of(x: Any) -> _Shape | None:
  """The shape of a State of Variables and arrays; None for anything else."""
  if type(x) is not State:
    return None
  shapes = []
  for value in x.values():
    is_leaf = is_object(value) or type_of(value) is not None
    shapes.append(None if is_leaf else _shape_of(value))
    if not is_leaf and shapes[-1] is None:
      return None
  return _Shape(list(x), tuple(shapes) if any(shapes) else None)


def _take(state: Any, shape: _Shape, leaves: list[Any]) -> bool:
  """Whether this is a State of a shape; its leaves are added to a list, in the order of JAX."""
  keys, children = shape
  if type(state) is not State or [*(mapping := state._ordered())] != keys:
    return False
  if children is None:
    leaves += mapping.values()
    return True
  for value, below in zip(mapping.values(), children, strict=True):
    if below is None:
      leaves.append(value)
    elif not _take(value, below, leaves):
      return False
  return True


def is_built_in(treedef: Any) -> bool:
  """Whether there are only lists, tuples and dicts in a container, whose keys are plain.

  JAX compares what a call is given in C++, where nothing in Python may run: see `traced.Static`.
  """
  if not isinstance(treedef, jax.tree_util.PyTreeDef):
    return False
  open_ = [treedef]
  while open_:  # there may be more levels than Python's stack has
    at = open_.pop()
    node: Any = at.node_data()
    if node is None:
      continue
    cls, keys = node
    if cls not in (list, tuple, dict, type(None)):
      return False
    if cls is dict and not all(type(key) in (str, int) for key in keys):
      return False
    open_ += at.children()
  return True


def is_object(x: Any) -> bool:
  """Whether a value is looked at as a whole."""
  return isinstance(x, Node | Variable)


class _Array(NamedTuple):
  """The cell of a lojax Variable: one of the same `aval` is like it, and of another one may be."""

  aval: Any
  type: Any
  is_lojax = True

  def holds(self, cell: Any) -> bool:
    return type_of(cell) == self.type


class _Cells(NamedTuple):
  """A pytree of Refs, or of arrays, whose types are left to JAX."""

  treedef: Any
  refs: list[Callable[[], Any]]
  aval = NotImplemented  # of no cell

  @property
  def is_lojax(self) -> bool:
    return not self.refs

  def holds(self, cell: Any) -> bool:
    cells, treedef = flatten(cell)
    refs = [x for x in cells if _jax.is_ref(x)]
    same = len(refs) == len(self.refs) and all(
      r() is x for r, x in zip(self.refs, refs, strict=True)
    )
    return same and treedef == self.treedef


def _known(cell: Any) -> Any:
  """What the cell of a Variable is known by."""
  if _jax.is_ref(cell):
    return weakref.ref(cell)
  if (type_ := type_of(cell)) is not None:
    return _Array(getattr(cell, "aval", None), type_)
  cells, treedef = flatten(cell)
  return _Cells(treedef, [weakref.ref(x) for x in cells if _jax.is_ref(x)])


class Like(NamedTuple):
  """What a later array or number is compared with. Arrays from one source mostly share the aval."""

  aval: Any
  place: Any
  is_committed: Any
  type: Any

  @classmethod
  def of(cls, x: Any) -> "Like":
    """What is like `x`; its type is None if nothing is."""
    if not isinstance(x, jax.Array) or _jax.bits(x) is not x:
      return cls(NO_AVAL, None, None, type_of(x))
    return cls(getattr(x, "aval", NO_AVAL), x.sharding, getattr(x, "committed", None), type_of(x))


NO_AVAL = object()
"""In place of an aval: numbers have none, and typed keys make theirs anew in 9 us."""


def is_like(x: Any, aval: Any, place: Any, is_committed: Any, type_: Any) -> bool:
  """Whether `x` is an array or number like the one that a `Like` was made of.

  JAX compiles anew for any other one, in Python, where a signal may come between two lines.
  """
  if type(x) is type_:
    return True
  if (
    aval is not NO_AVAL
    and getattr(x, "aval", None) is aval
    and x.committed is is_committed
    and x.sharding == place
  ):
    return True
  return type_of(x) == type_


def is_equal(x: Any, value: Any, kind_: Any) -> bool:
  """Whether a static value is the same as one that was of this kind: 1 is not True."""
  return kind(x) == kind_ and bool(x == value)


def type_of(x: Any) -> Any:
  """The type that JAX traces an array or number with; None for anything else, a Ref too."""
  if type(x) is np.ndarray:  # a batch: to ask whether it is one of JAX takes as long as the rest
    return np.ndarray, x.shape, x.dtype
  if isinstance(x, jax.Array) and type(x) is not jax.Ref:
    if (data := _jax.bits(x)) is not x:  # typed keys, whose sharding takes 6 us
      return x.dtype, type_of(data)
    weak = getattr(x, "weak_type", False)
    return x.shape, x.dtype, weak, x.sharding, getattr(x, "committed", True)
  if isinstance(x, np.ndarray):
    return type(x), x.shape, x.dtype
  is_scalar = type(x) in (bool, int, float, complex) or isinstance(x, np.generic)
  return type(x) if is_scalar else None


def signature(leaf: Any) -> Any:
  """What a trace depends on, of a Variable or an array."""
  if not isinstance(leaf, Variable):
    return type_of(leaf)
  cells, treedef = jax.tree.flatten(leaf.get_raw_value())
  return type(leaf), leaf._def, treedef, *map(_cell_type, cells)


def _cell_type(cell: Any) -> Any:
  if not _jax.is_ref(cell):
    return type_of(cell)
  return jax.Ref, cell.shape, cell.dtype, _jax.peek_cell(cell).sharding
