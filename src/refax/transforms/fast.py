"""The steady state of nnx.jit: a call is known by its arguments and goes to the executable at once.

An Entry describes one call: the objects among its arguments, by identity and by a Watch that knows
when their structure changes; the types of arrays; the values of static arguments; and of containers
of these (lists of Modules, States), what is in them. A call that an entry describes takes its
buffers out of the cells and makes one donated call (`refax.transforms.compiled`). Any other is
flattened first, and found by its structure.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from refax import _jax
from refax.core.definition import kind
from refax.core.epoch import epoch
from refax.core.node import Node
from refax.core.variable import Variable
from refax.core.watch import Watch
from refax.transforms.bind import Sources, bind
from refax.transforms.commit import leaves_of
from refax.transforms.compiled import Compiled, Retraced
from refax.transforms.lift import Inputs
from refax.transforms.reach import Slot
from refax.transforms.tree import Tree, is_array_of, is_like, type_of

LIMIT = 1024  # entries of one function; more calls than that are not a steady state
_ALIKE = 64  # entries for the same object, as for batches of many lengths
_VERSIONS = 256  # executables of one function


class Entry:
  """One call that is known.

  Args:
    seen: the call that was made.
    compiled: what was compiled for it.
    slots: places where the function finds objects without being given them.
    forget: called with the entry when an object among the arguments is gone, or a cell.
  """

  __slots__ = (
    "__weakref__", "_cells", "_compiled", "_constants", "_count", "_epoch", "_names",
    "_objects", "_parts", "_slots", "_types", "_watch", "quick", "run",
  )  # fmt: skip

  def __init__(
    self, seen: "Seen", compiled: Compiled, slots: Sequence[Slot], forget: Callable[["Entry"], None]
  ):
    self._epoch, self._watch, self._names = seen.epoch, seen.watch, seen.names
    self._compiled, self._count = compiled, len(seen.values)
    self._slots, self._constants = slots, seen.constants
    this = weakref.ref(self)

    def gone(_: Any) -> None:
      if (entry := this()) is not None:
        forget(entry)

    self._objects = [(i, weakref.ref(x, gone)) for i, x in seen.objects]
    # `run` holds the buffers of all cells: what it holds of a model must not outlive the model.
    cells = (ref for refs in compiled.cells(seen.inputs.leaves) for ref in refs)
    self._cells = [weakref.ref(ref, gone) for ref in cells]
    self._types = [is_array_of(x, i) for i, x in seen.arrays]
    sources = seen.sources()
    self.run = bind(compiled, seen.inputs.leaves, sources)
    # Without `self`: a cycle would keep the buffers of `run` until the collector comes.
    self._parts = functools.partial(_parts_of, seen.trees, seen.distinct) if seen.trees else None
    self.quick = (
      self._epoch, self._watch, _jax.steady_check(), self._count, self._names,
      self._objects, self._types, self._constants, slots, self._parts, self.run,
    )  # fmt: skip
    """What `steady` looks at: a tuple, for an attribute takes as long as a check."""

  @property
  def may_hold(self) -> bool:
    """Whether the entry may ever describe a call again."""
    return self._epoch == epoch.value and not self._watch.is_dead

  def matches(self, values: tuple, names: tuple[str, ...]) -> Any:
    """What to run on, if this entry describes a call; else None.

    Args:
      values: the arguments, positional ones first.
      names: the keywords of the last ones.
    """
    if len(values) != self._count or names != self._names or epoch.value != self._epoch:
      return None
    if any(ref() is not values[i] for i, ref in self._objects) or not self._watch.holds():
      return None
    if not all(is_like(values[i], *rest) for i, *rest in self._types):
      return None
    for i, value, kind_ in self._constants:
      if values[i] is not value and not (kind(values[i]) == kind_ and values[i] == value):
        return None
    if any(read() is not value for read, value in self._slots):
      return None
    return values if self._parts is None else self._parts(values)

  def renamed(self, error: Exception) -> Exception:
    """An error of JAX that names the user's arguments."""
    return self._compiled.renamed(error)


def _parts_of(trees: list[Tree], distinct: tuple[int, frozenset[int]] | None, values: tuple) -> Any:
  """The arguments, the leaves of containers among them, and these as arrays; None if unlike."""
  leaves: list[Any] = []
  cells: list[Any] = []
  lojax: list[Variable] = []
  for tree in trees:
    if not tree.collect(values[tree.argument], leaves, cells, lojax):
      return None
  if distinct is not None:
    ids = set(map(object.__hash__, lojax))  # `id` is audited: it takes three times as long
    if len(ids) != distinct[0] or not ids.isdisjoint(distinct[1]):
      return None
  return values, leaves, cells


NO_CALL = (-1, None, bool, -1, (), [], [], [], (), None, lambda _: None)


def steady(calls: "FastCalls", general: Callable[[tuple, dict[str, Any]], Any]) -> Callable:
  """A function that makes the call of last time at once, and any other by `general(args, kwargs)`.

  This is what a training loop waits for: it is one plain function, as every attribute and every
  frame takes as long as a check. Another `use_hijax` is not looked for: it is a context that JAX
  traces again for.
  """

  def call(*args: Any, **kwargs: Any) -> Any:
    then, watch, may_run, count, names, objects, types, constants, slots, parts, run = calls.last
    values = (*args, *kwargs.values()) if kwargs else args
    if len(values) != count or epoch.value != then or not may_run() or not watch.holds():
      return general(args, kwargs)
    if (kwargs or names) and tuple(kwargs) != names:
      return general(args, kwargs)
    for i, ref in objects:
      if ref() is not values[i]:
        return general(args, kwargs)
    for i, aval, place, type_ in types:
      x = values[i]  # `is_like`, without a frame
      if aval is not None and getattr(x, "aval", None) is aval and x.sharding == place:
        continue
      if type_of(x) != type_:
        return general(args, kwargs)
    for i, value, _ in constants:
      if values[i] is not value:
        return general(args, kwargs)
    for read, value in slots:
      if read() is not value:
        return general(args, kwargs)
    given = values if parts is None else parts(values)
    if given is None:
      return general(args, kwargs)
    try:
      return run(given)
    except Retraced:
      calls.drop(run)
      return general(args, kwargs)
    except (ValueError, TypeError, OverflowError) as error:
      raise calls.renamed(run, error) from None

  return call


class FastCalls:
  """The entries of one jitted function, and what was compiled for each structure.

  A model that goes back and forth between training and evaluation has two entries, and is compiled
  twice in all.
  """

  def __init__(self):
    self.last: tuple = NO_CALL
    """What the last call was known by: mostly that of the next one."""
    self._entries: dict[int | None, list[Entry]] = {}
    self._compiled: dict[tuple, Compiled] = {}

  def find(self, values: tuple, names: tuple[str, ...] = ()) -> tuple[Entry, Any] | None:
    """The entry for a call, and what it is run on; `names` are the keywords of the last values."""
    lot = self._entries.get(_first(values))
    if not lot or not is_eager() or _jax.checks_results():
      return None
    for entry in lot:
      given = entry.matches(values, names)
      if given is not None:
        if lot[0] is not entry:  # a loop mostly does again what it did last
          lot[:] = [entry, *(e for e in lot if e is not entry)]
        self.last = entry.quick
        return entry, given
    return None

  def compiled(self, key: tuple) -> Compiled | None:
    """What was compiled for a structure."""
    return self._compiled.get(key)

  def keep(self, key: tuple, compiled: Compiled) -> None:
    """Remember what was compiled for a structure."""
    if len(self._compiled) >= _VERSIONS:
      self._compiled.clear()
    self._compiled[key] = compiled

  def learn(self, seen: "Seen", compiled: Compiled, slots: Sequence[Slot]) -> None:
    """A new entry for a call that has been made, if it can be known by its arguments."""
    if compiled.careful or compiled.commit.spec.redefined or seen.watch.is_dead:
      return
    if not seen.describe():
      return
    key, calls = _first(seen.values), weakref.ref(self)

    def forget(entry: Entry) -> None:
      if (living := calls()) is not None:
        living.drop(entry.run)

    if sum(map(len, self._entries.values())) >= LIMIT:
      self._entries.clear()
    lot = self._entries.setdefault(key, [])
    entry = Entry(seen, compiled, slots, forget)
    lot[:] = [entry, *(e for e in lot if e.may_hold)][:_ALIKE]
    self.last = entry.quick

  def drop(self, run: Callable) -> None:
    """Forget an entry, by its `run`: JAX would trace again for it."""
    self.last = NO_CALL
    for key, lot in list(self._entries.items()):  # of objects that die meanwhile, lots go
      lot[:] = [entry for entry in lot if entry.run is not run]
      if not lot:
        self._entries.pop(key, None)

  def forget(self, key: tuple) -> None:
    """Forget all entries, and what was compiled for a structure."""
    self.last = NO_CALL
    self._entries.clear()
    self._compiled.pop(key, None)

  def renamed(self, run: Callable, error: Exception) -> Exception:
    """An error of JAX in an entry's `run`, in the user's words."""
    entries = [e for lot in list(self._entries.values()) for e in lot if e.run is run]
    return entries[0].renamed(error) if entries else error

  def clear(self) -> None:
    """Forget everything."""
    self.last = NO_CALL
    self._entries.clear()
    self._compiled.clear()


class Seen:
  """A call that is being made, and what it will be known by.

  Args:
    values: the arguments, positional ones first.
    names: the keywords of the last ones.
    static: which of `values` are static, by index.
    inputs: the others, flat.
    watch: is told of changes to the objects in them.
    then: the epoch when they were flattened.
  """

  def __init__(
    self,
    values: tuple,
    names: tuple[str, ...],
    static: Iterable[int],
    inputs: Inputs,
    watch: Watch,
    then: int,
  ):
    self.values, self.names = values, names
    self.inputs, self.watch, self.epoch = inputs, watch, then
    self._static = frozenset(static)
    self.constants = [(i, values[i], kind(values[i])) for i in self._static]
    self.objects: list[tuple[int, Node]] = []
    self.arrays: list[tuple[int, Any]] = []
    self.trees: list[Tree] = []
    self.distinct: tuple[int, frozenset[int]] | None = None
    """How many lojax Variables are in containers, and who is none of them, where that matters."""
    self._places: dict[int, tuple[int, int]] = {}  # of a leaf: in the values, or in the trees

  def describe(self) -> bool:
    """Sort the arguments; whether all of them can be compared with those of another call."""
    if not self.inputs.is_watched:
      return False
    first = len(self.values) - len(self.names)
    names = [first + self.names.index(name) for name in self.inputs.names]
    for entry, i in zip(self.inputs.arguments, [*range(first), *names], strict=True):
      x = self.values[i]
      if i in self._static:
        continue
      if x is None:
        self.constants.append((i, None, type(None)))
      elif isinstance(x, Node):
        self.objects.append((i, x))
      elif type_of(x) is not None:
        self._places[entry[1]] = (0, i)
        self.arrays.append((i, x))
      elif not self._add_tree(i, x, entry):
        return False
    return self._are_apart()

  def _add_tree(self, index: int, x: Any, entry: tuple) -> bool:
    tree = Tree.of(index, x, entry)
    if tree is None:
      return False
    start = sum(len(t.entries) for t in self.trees)
    for j, child in enumerate(tree.entries):
      if child is not None:
        self._places.setdefault(child, (1, start + j))
    self.trees.append(tree)
    return True

  def _are_apart(self) -> bool:
    """Whether each lojax Variable in a container is there once: sharing is not looked for later."""
    leaves = self.inputs.leaves
    lojax = lambda i: isinstance(leaves[i], Variable) and not leaves[i].is_hijax
    places = [i for tree in self.trees for i in tree.entries if i is not None and lojax(i)]
    if not places:
      return True
    inside = {i for _, node in self.inputs.graphdef.nodes for _, e in node for i in leaves_of(e)}
    others = frozenset(object.__hash__(leaves[i]) for i in inside if lojax(i))
    self.distinct = (len(places), others)
    return len(set(places)) == len(places) and inside.isdisjoint(places)

  def sources(self) -> Sources:
    """Where later calls find their leaves and objects."""
    return Sources(self.inputs, self._places, has_trees=bool(self.trees))


def _first(values: tuple) -> int | None:
  """What entries are found by: the first object among the arguments."""
  for x in values:
    if isinstance(x, Node):
      return id(x)
  return None


def is_eager() -> bool:
  """Whether calls run now, compiled: not inside a trace, and not under `jax.disable_jit`."""
  return _jax.no_trace_active() and not _jax.flag("jax_disable_jit")
