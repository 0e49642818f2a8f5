"""The steady state of nnx.jit: a call is known by its arguments and goes to the executable at once.

An Entry describes one call: the objects among its arguments, by identity and by a Watch that knows
when their structure changes; the types of arrays; the values of static arguments; and of containers
of these (lists of Modules, States), what is in them. A call that an entry describes takes its
buffers out of the cells and makes one donated call (`refax.transforms.compiled`). Any other is
flattened first, and found by its structure.
"""

import functools
import itertools
import operator
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from refax import _jax
from refax.core.by_value import hashes_content
from refax.core.definition import kind
from refax.core.epoch import epoch
from refax.core.node import Node
from refax.core.variable import Variable
from refax.core.watch import Watch
from refax.transforms.bind import Sources, bind
from refax.transforms.commit import leaves_of
from refax.transforms.compiled import Compiled, Container, Retraced
from refax.transforms.lift import Inputs
from refax.transforms.places import Slot
from refax.transforms.tree import NO_AVAL, Like, Tree, flatten, is_equal, is_like, type_of

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
    executable: what is run, if it is not the compiled function's own.
  """

  __slots__ = ("__weakref__", "_cells", "_compiled", "_objects", "quick", "run")

  def __init__(
    self,
    seen: "Seen",
    compiled: Compiled,
    slots: Sequence[Slot],
    forget: Callable[["Entry"], None],
    executable: Any = None,
  ):
    self._compiled = compiled
    this = weakref.ref(self)

    def gone(_: Any) -> None:
      if (entry := this()) is not None:
        forget(entry)

    self._objects = [(i, weakref.ref(x, gone)) for i, x in seen.objects]
    # `run` holds the buffers of all cells: what it holds of a model must not outlive the model.
    cells = (ref for refs in compiled.cells(seen.inputs.leaves) for ref in refs)
    self._cells = [weakref.ref(ref, gone) for ref in cells]
    self.run = bind(compiled, seen.inputs.leaves, seen.sources(compiled), executable)
    # Without `self`: a cycle would keep the buffers of `run` until the collector comes.
    parts = functools.partial(_parts_of, seen.trees, seen.distinct) if seen.trees else None
    self.quick: Quick = (
      seen.epoch, seen.watch, _jax.steady_check(), len(seen.values), seen.names, self._objects,
      [(i, *Like.of(x)) for i, x in seen.arrays], seen.constants,
      [*slots, *(Slot.unchanged(x) for _, x, _ in seen.constants if hashes_content(type(x)))],
      seen.row(), parts,
      self.run,
    )  # fmt: skip

  @property
  def may_hold(self) -> bool:
    """Whether the entry may ever describe a call again."""
    then, watch, *_ = self.quick
    return then == epoch.value and not watch.is_dead

  def renamed(self, error: Exception) -> Exception:
    """An error of JAX that names the user's arguments."""
    return self._compiled.renamed(error)


Quick = tuple[Any, ...]
"""What a call is compared with, see `given_by`: a tuple, for an attribute takes as long as a check.

The epoch, the watch of the objects, whether a call may run at all, the number of arguments, the
keywords of the last ones, the objects, the arrays and numbers, the constants, the slots of what is
reached by closure, the containers of arrays, those of objects, and what runs it.
"""

_NO_CALL: Quick = (-1, None, bool, -1, (), [], [], [], (), None, None, None)


def given_by(quick: Quick, values: tuple, names: Iterable[str]) -> Any:
  """What to run on, if an entry describes a call; else None.

  This is what a training loop waits for. Another `use_hijax` is not looked for: it is a context
  that JAX traces again for.

  Args:
    quick: what the entry is known by.
    values: the arguments, positional ones first.
    names: the keywords of the last ones.
  """
  then, watch, may_run, count, known, objects, arrays, constants, slots, rows, parts, _ = quick
  if len(values) != count or epoch.value != then or not may_run():
    return None
  if (watch.mark is not watch.held and not watch.holds()) or (
    (names or known) and tuple(names) != known
  ):
    return None
  for i, ref in objects:
    if ref() is not values[i]:
      return None
  for i, aval, place, is_committed, type_ in arrays:  # `is_like`, without a frame
    x = values[i]
    if type(x) is type_:
      continue
    is_alike = aval is not NO_AVAL and getattr(x, "aval", None) is aval
    if is_alike and x.committed is is_committed and (x.sharding is place or x.sharding == place):
      continue
    if type_of(x) != type_:
      return None
  for i, value, kind_ in constants:
    x = values[i]
    if x is not value and not is_equal(x, value, kind_):
      return None
  for read, known in slots:
    if (now := read()) is None or now is not known():
      return None
  if rows is not None:
    pick, treedef, *likes = rows
    found, tree = flatten(pick(values))
    if tree != treedef or not all(map(is_like, found, *likes)):
      return None
  return values if parts is None else parts(values)


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


def steady(
  calls: "FastCalls", general: Callable[[tuple, dict[str, Any], tuple, tuple[str, ...]], Any]
) -> Callable:
  """A function that makes a call that is known at once, first of all that of last time.

  Args:
    calls: what is known.
    general: makes any other call, of `(args, kwargs, values, names)`: the arguments, and all of
      them in one row with the keywords of the last ones.
  """

  def call(*args: Any, **kwargs: Any) -> Any:
    values, quick = (*args, *kwargs.values()) if kwargs else args, calls.last
    given = given_by(quick, values, kwargs)
    if given is None:
      found = calls.find(values, names := tuple(kwargs), besides=quick)
      if found is None:
        return general(args, kwargs, values, names)
      entry, given = found
      quick = entry.quick
    run = quick[-1]
    try:
      return run(given)
    except Retraced:
      calls.drop(run)
      return general(args, kwargs, values, tuple(kwargs))
    except (ValueError, TypeError, OverflowError) as error:
      raise calls.renamed(run, error) from None

  return call


class FastCalls:
  """The entries of one jitted function, and what was compiled for each structure.

  A model that goes back and forth between training and evaluation has two entries, and is compiled
  twice in all.
  """

  def __init__(self):
    self.last = _NO_CALL
    """What the last call was known by: mostly that of the next one."""
    self._entries: dict[int | None, list[Entry]] = {}
    self._compiled: dict[tuple, Compiled] = {}

  def find(
    self, values: tuple, names: tuple[str, ...] = (), besides: Quick | None = None
  ) -> tuple[Entry, Any] | None:
    """The entry for a call, and what it is run on.

    Args:
      values: the arguments.
      names: the keywords of the last ones.
      besides: what does not describe the call, as is known already.
    """
    lot = self._entries.get(_first(values), [])
    for i, entry in enumerate(lot):
      if entry.quick is besides:
        continue
      given = given_by(entry.quick, values, names)
      if given is not None:
        if i > 1:  # a loop mostly does again what it did last, or goes back and forth
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

  def learn(
    self, seen: "Seen", compiled: Compiled, slots: Sequence[Slot], executable: Any = None
  ) -> None:
    """A new entry for a call that has been made, if it can be known by its arguments.

    Args:
      seen: the call.
      compiled: what was compiled for it.
      slots: places where the function finds objects without being given them.
      executable: what is run, if it is not the compiled function's own.
    """
    if _jax.checks_results() or compiled.commit.spec.redefined or seen.watch.is_dead:
      return
    if not seen.describe(compiled.items.containers):
      return
    key, calls = _first(seen.values), weakref.ref(self)

    def forget(entry: Entry) -> None:
      if (living := calls()) is not None:
        living.drop(entry.run)

    if sum(map(len, self._entries.values())) >= LIMIT:
      self._entries.clear()
    lot = self._entries.setdefault(key, [])
    entry = Entry(seen, compiled, slots, forget, executable)
    lot[:] = [entry, *(e for e in lot if e.may_hold)][:_ALIKE]
    self.last = entry.quick

  def drop(self, run: Callable) -> None:
    """Forget an entry, by its `run`: JAX would trace again for it."""
    self.last = _NO_CALL
    for key, lot in list(self._entries.items()):  # of objects that die meanwhile, lots go
      lot[:] = [entry for entry in lot if entry.run is not run]
      if not lot:
        self._entries.pop(key, None)

  def forget(self, key: tuple) -> None:
    """Forget all entries, and what was compiled for a structure."""
    self.forget_entries()
    self._compiled.pop(key, None)

  def forget_entries(self) -> None:
    """Forget which calls are known, and nothing that was compiled."""
    self.last = _NO_CALL
    self._entries.clear()

  def forget_all(self, is_meant: Callable[[tuple], bool]) -> None:
    """Forget all entries, and what was compiled for some structures."""
    self.forget_entries()
    self._compiled = {k: c for k, c in list(self._compiled.items()) if not is_meant(k)}

  def renamed(self, run: Callable, error: Exception) -> Exception:
    """An error of JAX in an entry's `run`, in the user's words."""
    entries = [e for lot in list(self._entries.values()) for e in lot if e.run is run]
    return entries[0].renamed(error) if entries else error

  def clear(self) -> None:
    """Forget everything."""
    self.forget_entries()
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
    left_out: which positional arguments of `inputs` are not among the values: static ones, of which
      what is compiled ahead of time is not told again.
  """

  def __init__(
    self,
    values: tuple,
    names: tuple[str, ...],
    static: Iterable[int],
    inputs: Inputs,
    watch: Watch,
    then: int,
    left_out: Collection[int] = (),
  ):
    self.values, self.names = values, names
    self.inputs, self.watch, self.epoch = inputs, watch, then
    self._static, self._left_out = frozenset(static), left_out
    self.constants = [(i, values[i], kind(values[i])) for i in self._static]
    self.objects: list[tuple[int, Node]] = []
    self.arrays: list[tuple[int, Any]] = []
    self.containers: list[int] = []
    """Those of arrays and numbers, which JAX is given as they are."""
    self.trees: list[Tree] = []
    """The others."""
    self.distinct: tuple[int, frozenset[int]] | None = None
    """How many lojax Variables are in containers, and who is none of them, where that matters."""
    self._places: dict[int, tuple[int, int]] = {}  # of a leaf: in the values, or in the trees

  def describe(self, containers: Iterable[Container]) -> bool:
    """Sort the arguments; whether all of them can be compared with those of another call.

    Args:
      containers: those that JAX is given as they are.
    """
    first = len(self.values) - len(self.names)
    names = [first + self.names.index(name) for name in self.inputs.names]
    handed = {c.argument for c in containers}
    numbers = (n for n in itertools.count() if n not in self._left_out)
    for n, i in zip(numbers, (*range(first), *names), strict=False):
      x, entry = self.values[i], self.inputs.arguments[n]
      if i in self._static:
        continue
      if n in handed:
        self.containers.append(i)
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
    row = self.row()
    return (row is None or None not in row[-1]) and self._are_apart()

  def row(self) -> tuple | None:
    """How to take the containers of arrays out of `values`, and each field of their `Like`s."""
    if not self.containers:
      return None
    pick = operator.itemgetter(*self.containers)
    leaves, treedef = flatten(pick(self.values))
    likes = zip(*map(Like.of, leaves), strict=True) if leaves else [[]] * len(Like._fields)
    return pick, treedef, *likes

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

  def sources(self, compiled: Compiled) -> Sources:
    """Where later calls find their leaves and objects."""
    return Sources(
      self.inputs,
      self._places,
      self.containers,
      has_trees=bool(self.trees),
      gives_up=bool(compiled.written),
    )


def _first(values: tuple) -> int | None:
  """What entries are found by: the first object among the arguments."""
  for x in values:
    if isinstance(x, Node):
      return id(x)
  return None


def is_eager() -> bool:
  """Whether calls run now, compiled: not inside a trace, and not under `jax.disable_jit`."""
  return _jax.no_trace_active() and not _jax.flag("jax_disable_jit")
