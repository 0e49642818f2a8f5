"""Places in an object that hold an array, with all their names: what goes to a file and back."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refax import _jax
from refax.core.filters import Filter, to_predicate
from refax.core.flatten import flatten
from refax.core.graphdef import LEAF, NODE, REGION, STATIC, GraphDef, region_paths
from refax.core.node import Node
from refax.core.pytree import data
from refax.core.storage import is_array_like
from refax.core.variable import Variable
from refax.core.write import write
from refax.errors import InvalidArgumentError
from refax.graph.split import set_entry
from refax.graph.state import State
from refax.io.keys import is_key
from refax.typing import Path, path_str


class Slot(NamedTuple):
  """One array of an object: the value of a Variable, a leaf of its value, or an array itself."""

  name: str
  path: Path
  leaf: int
  """Which leaf of the object it belongs to; the parts of one Variable have this in common."""
  part: int
  """Which leaf of the Variable's value it is."""
  holder: Any
  """The Variable, or the array."""
  cell: Any
  """A `jax.Ref`, an array, a `jax.ShapeDtypeStruct` or a number."""

  @property
  def dtype(self) -> Any:
    """The dtype that is read and written."""
    dtype = getattr(self.cell, "dtype", None)
    return np.asarray(self.cell).dtype if dtype is None else dtype

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape that is read and written."""
    return np.shape(self.cell) if isinstance(self.cell, int | float | complex) else self.cell.shape

  @property
  def is_key(self) -> bool:
    """Whether it holds typed PRNG keys."""
    return is_key(self)

  def read(self) -> Any:
    """The value, an array that no later step changes or donates, of another thread either."""
    return _jax.read_cell(self.cell) if _jax.is_ref(self.cell) else self.cell


class Slots(NamedTuple):
  """The slots that a filter selects, in the order of the object."""

  selected: list[Slot]
  by_name: dict[str, Slot]
  """By each of their names: what is shared has several, and the first is `slot.name`."""
  others: set[str]
  """The names of what the filter does not select."""

  def by_leaf(self) -> list[list[Slot]]:
    """The selected slots, those of one leaf together: they are filled at once."""
    leaves: dict[int, list[Slot]] = {}
    for slot in self.selected:
      leaves.setdefault(slot.leaf, []).append(slot)
    return list(leaves.values())


def slots_of(function: str, tree: Any, only: Filter, sep: str) -> Slots:
  """The slots of an object, named by their paths.

  Raises:
    InvalidArgumentError: two have one name, or one holds neither an array nor a number.
  """
  if not isinstance(sep, str) or not sep:
    raise InvalidArgumentError.value(function, "sep", sep, "a string such as '.' or '/'")
  flat, predicate = flatten(tree), to_predicate(only)
  slots, first = Slots([], {}, set()), {}
  for path, i in _places(flat.graphdef):
    leaf = flat.leaves[i]
    if i not in first:
      first[i] = _parts(function, leaf, i, path, sep) if predicate(path, leaf) else None
      named = [(slot.name, slot) for slot in first[i] or ()]
      slots.selected.extend(first[i] or ())
    else:  # another place of what is shared
      parts = zip(_part_paths(leaf), first[i] or (), strict=first[i] is not None)
      named = [(_name(path + part, sep), slot) for part, slot in parts]
    if first[i] is None:
      slots.others.update(_name(path + part, sep) for part in _part_paths(leaf))
    for name, slot in named:
      if slots.by_name.setdefault(name, slot) is not slot:
        raise _one_name(function, name, sep)
  return slots


def _one_name(function: str, name: str, sep: str) -> InvalidArgumentError:
  """The error for two arrays that would have one name."""
  has_sep = function.endswith(("safetensors", "gguf"))
  fix = "a string that no key contains" if has_sep else "keys without dots"
  want = f"{fix}; the name {name!r} stands for two arrays"
  what, got = ("sep", sep) if has_sep else ("name", name)
  return InvalidArgumentError.value(function, what, got, want)


def _name(path: Path, sep: str) -> str:
  """The name for a path; a key that is a path itself, as in `WeightNorm`, counts as its steps."""
  if tuple in map(type, path):
    path = tuple(step for key in path for step in (key if isinstance(key, tuple) else (key,)))
  return sep.join(map(str, path))


def _places(graphdef: GraphDef) -> Iterator[tuple[Path, int]]:
  """(path, index) of every place of a leaf, without cycles.

  A shared Module is walked again at each place that the first walk finds, but only once in each of
  these: a chain of n Modules that each hold the next one twice has 2**n paths.
  """

  def visit(path: Path, entry: tuple, above: tuple, seen: set[int]) -> Iterator[tuple[Path, int]]:
    if entry[0] == LEAF:
      yield path, entry[1]
    elif entry[0] == REGION:
      for keys, child in zip(region_paths(entry[1]), entry[2], strict=True):
        yield from visit(path + keys, child, above, seen)
    elif entry[0] == NODE and entry[1] not in above:
      if entry[1] in seen and seen is not first:
        return
      seen = set() if entry[1] in seen else seen
      seen.add(entry[1])
      for key, child in graphdef.nodes[entry[1]][1]:
        if child[0] == LEAF:  # without a generator: there are many
          yield (*path, key), child[1]
        elif child[0] != STATIC:
          yield from visit((*path, key), child, (*above, entry[1]), seen)

  first: set[int] = set()
  return visit((), graphdef.root, (), first)


def _cells(leaf: Any) -> tuple[list[Any], Any]:
  cell = leaf.get_raw_value() if isinstance(leaf, Variable) else leaf
  return ([cell], _ARRAY) if isinstance(cell, _ARRAYS) else jax.tree.flatten(cell)


_ARRAY = jax.tree.structure(0)  # what an array is, as a pytree
_ARRAYS = (jax.Ref, np.ndarray)  # `jax.Array` takes longer to ask than to flatten


def _part_paths(leaf: Any) -> list[Path]:
  return _paths(_cells(leaf)[1])


def _paths(treedef: Any) -> list[Path]:
  return [()] if treedef is _ARRAY else region_paths(treedef)


def _parts(function: str, leaf: Any, index: int, path: Path, sep: str) -> list[Slot]:
  cells, treedef = _cells(leaf)
  if type(cells[0] if treedef is _ARRAY else None) is jax.Ref:  # as most are
    return [Slot(_name(path, sep), path, index, 0, leaf, cells[0])]
  slots = []
  for i, (part, cell) in enumerate(zip(_paths(treedef), cells, strict=True)):
    ours = _jax.is_ref(cell) or is_array_like(cell) or isinstance(cell, jax.ShapeDtypeStruct)
    if not ours:
      what = f"leaf at {path_str(path + part)}"
      fix = "arrays and numbers; only=nnx.Param, or another filter, leaves the rest out"
      raise InvalidArgumentError.value(function, what, cell, fix)
    slots.append(Slot(_name(path + part, sep), path, index, i, leaf, cell))
  return slots


def fill(tree: Any, slots: list[Slot], values: list[Any]) -> None:
  """Write what was read for the slots of one leaf; shapes and dtypes are known to fit."""
  holder = slots[0].holder
  values = [_like(slot.cell, x) for slot, x in zip(slots, values, strict=True)]
  if not isinstance(holder, Variable):
    _fill_place(tree, slots[0].path, values[0])
  elif slots[0].cell is holder.get_raw_value():
    holder.set_value(values[0])
  else:
    leaves, treedef = jax.tree.flatten(holder.get_value())  # a file may have some of them only
    for slot, x in zip(slots, values, strict=True):
      leaves[slot.part] = x
    holder.set_value(treedef.unflatten(leaves))
  if _jax.no_trace_active():  # JAX copies while Python goes on, and would hold several tensors
    cells = _cells(holder)[0] if isinstance(holder, Variable) else values
    jax.block_until_ready([_jax.peek_cell(x) if _jax.is_ref(x) else x for x in cells])


def is_ref_slot(slot: Slot) -> bool:
  """Whether a slot is all of a Variable on a Ref, of no keys: to fill it is to give it a buffer."""
  cell = slot.cell
  own = isinstance(slot.holder, Variable) and slot.holder.get_raw_value() is cell
  return own and type(cell) is jax.Ref and not slot.is_key and _jax.no_trace_active()


def on_one_device(slot: Slot) -> bool:
  """Whether a slot `is_ref_slot` on one device: it takes an array of the host as a whole."""
  return is_ref_slot(slot) and len(_jax.peek_cell(slot.cell).sharding.device_set) == 1


def hand_over(slot: Slot, x: Any) -> None:
  """Let a slot `is_ref_slot` have an array that nobody else has; NumPy's, if `on_one_device`."""
  if isinstance(x, np.ndarray):
    x = _jax.put(x, _jax.peek_cell(slot.cell).sharding)
  write((slot.holder, x), fresh=True)
  jax.block_until_ready(x)


def copy_in(slot: Slot, x: np.ndarray) -> None:
  """Copy an array of the host to a slot `on_one_device`; its memory may then be used again."""
  hand_over(slot, _jax.copied_from_host(x, _jax.peek_cell(slot.cell).sharding))


def _like(old: Any, x: Any) -> Any:
  """`x` as what `old` is, and where `old` lies: JAX's array, NumPy's, or a number."""
  if isinstance(old, np.ndarray | int | float | complex | np.generic):
    x = np.asarray(x)
    if isinstance(old, np.ndarray):
      return x.astype(old.dtype, copy=False)  # it may have another byte order
    return x[()] if isinstance(old, np.generic) else x.item()
  sharding = getattr(old, "sharding", None)
  if sharding is not None and len(sharding.device_set) > 1:
    return _jax.put(x, sharding)  # at once: it may be too large for one of them
  if _jax.is_ref(old):
    return x  # the write copies it there
  x = x if isinstance(x, jax.Array) else jnp.array(x)
  # What was on the default device without being bound to it stays so.
  bound = sharding is not None and getattr(old, "committed", True)
  return jax.device_put(x, sharding) if bound else x


def can_fill(tree: Any, slot: Slot) -> bool:
  """Whether a slot can be written: a Variable, or an array in something that can be changed.

  Raises:
    TraceContextError, DifferentiatedWriteError: the Variable cannot be written here and now.
  """
  if isinstance(slot.holder, Variable):
    slot.holder._check_writable()
    return True
  place = place_of(tree, slot.path)
  return place is not None and place.position is not None


class Place(NamedTuple):
  """Where an array is that is no Variable's: in something that can be changed, perhaps deep inside.

  Attributes:
    parent: a Module, State, dict or list.
    key: where in it.
    child: what is there: the array, or tuples and the like that hold it and cannot be changed.
    position: which leaf of `child` it is; None if that cannot be told.
  """

  parent: Any
  key: Any
  child: Any
  position: int | None

  def put(self, child: Any) -> None:
    """Set the child."""
    if isinstance(self.parent, Node):
      set_entry(self.parent, self.key, data(child))
    else:
      self.parent[self.key] = child


def place_of(tree: Any, path: Path) -> Place | None:
  """The innermost place on the path that can be changed; None if there is none."""
  value, found = tree, None
  for i, key in enumerate(path):
    child = _child(value, key)
    if isinstance(value, Node | State | dict | list):
      found = (value, key, child, path[i + 1 :])
    value = child
  if found is None:
    return None
  parent, key, child, rest = found
  paths = region_paths(_immutable(child)[1])
  return Place(parent, key, child, paths.index(rest) if rest in paths else None)


def _immutable(child: Any) -> tuple[list[Any], Any]:
  return jax.tree.flatten(child, is_leaf=lambda x: isinstance(x, Node | Variable))


def _fill_place(tree: Any, path: Path, x: Any) -> None:
  """Put an array where another one is; tuples around it are built anew."""
  place = place_of(tree, path)
  assert place is not None and place.position is not None  # `can_fill` has been asked
  leaves, treedef = _immutable(place.child)
  leaves[place.position] = x
  place.put(treedef.unflatten(leaves))


def _child(value: Any, key: Any) -> Any:
  if isinstance(value, Node):
    return next(child for k, child, _ in value._entries() if k == key)
  if isinstance(value, State | dict | list):
    return value[key]
  # A named tuple or a dataclass names its fields.
  return getattr(value, key) if isinstance(key, str) else value[key]
