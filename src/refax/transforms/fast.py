"""The steady state of nnx.jit: a call is known by its objects and goes straight to the executable.

Later calls with the same objects, unchanged in structure, take their buffers out of the cells and
make one donated call (`refax.transforms.compiled`). Whatever is not known by the identity of its
arguments is flattened first, and found by structure.
"""

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from refax import _jax, config
from refax.core.epoch import epoch
from refax.core.flatten import flatten
from refax.core.node import Node
from refax.core.variable import Variable
from refax.transforms.compiled import Compiled, Retraced
from refax.transforms.lift import Inputs
from refax.transforms.reach import Slot

LIMIT = 64  # entries of one function; more objects than that are not a steady state


class Entry(NamedTuple):
  """One call that is known; `run(args)` makes it, on the buffers of the cells of its objects."""

  epoch: int
  may_run: Callable[[], bool]
  arguments: int
  slots: Sequence[Slot]
  objects: list[tuple[int, weakref.ref]]
  types: list[tuple[int, Any, Any, Any]]
  run: Callable
  renamed: Callable[[Exception], Exception]

  @classmethod
  def of(
    cls, args: tuple, flat: list, compiled: Compiled, slots: Sequence[Slot], forget: Callable
  ) -> "Entry":
    """The entry for a call of what was compiled; `forget` is called when an object is gone."""
    objects = [(i, x) for i, x in enumerate(args) if isinstance(x, Node | Variable)]
    arrays = sorted(set(range(len(args))) - {i for i, _ in objects})
    result = compiled.result
    assert result is not None
    return cls(
      epoch.value,
      _jax.steady_check(),
      len(args),
      slots,
      [(i, weakref.ref(x, forget)) for i, x in objects],
      [(i, getattr(args[i], "aval", None), _place(args[i]), _types_of(args[i])) for i in arrays],
      _jax.exchange(compiled.call, *compiled.cells(flat), picker(arrays), result),
      compiled.renamed,
    )

  def is_of(self, args: tuple) -> bool:
    """Whether these are the objects of the entry, and not new ones at the same addresses."""
    return (
      self.epoch == epoch.value
      and all(ref() is args[i] for i, ref in self.objects)
      and all(slot.holds() for slot in self.slots)
    )


def picker(arrays: list[int]) -> Callable[[tuple], Any]:
  """The function from the arguments of a call to those that are arrays."""
  return operator.itemgetter(*arrays) if arrays else lambda _: ()


NO_CALL = Entry(-1, bool, 0, (), [], [], lambda _: None, lambda error: error)


def steady(calls: "FastCalls", general: Callable[[tuple, dict[str, Any]], Any]) -> Callable:
  """A function that makes the call of last time at once, and any other by `general(args, kwargs)`.

  This is what a training loop waits for: it is one plain function, as every attribute and every
  frame takes as long as a check. Another `use_hijax` is not looked for: it is a context that JAX
  traces again for.
  """

  def call(*args: Any, **kwargs: Any) -> Any:
    then, may_run, count, slots, objects, types, run, renamed = calls.last
    if kwargs or epoch.value != then or len(args) != count or not may_run():
      return general(args, kwargs)
    for i, ref in objects:
      if ref() is not args[i]:
        return general(args, kwargs)
    for i, aval, place, type_ in types:
      x = args[i]  # arrays from one source mostly share their aval and their place
      if aval is not None and getattr(x, "aval", None) is aval and x.sharding == place:
        continue
      if _types_of(x) != type_:
        return general(args, kwargs)
    for read, value in slots:
      if read() is not value:
        return general(args, kwargs)
    try:
      return run(args)
    except Retraced:
      calls.clear()
      return general(args, kwargs)
    except (ValueError, TypeError) as error:
      raise renamed(error) from None

  return call


class FastCalls:
  """The fast calls of one jitted function.

  An entry is found by the identity of objects and the types of arrays; it holds while the structure
  epoch stands. What is compiled is found by structure, so that a model that goes back and forth
  between training and evaluation is compiled twice in all.
  """

  def __init__(self):
    self.last = NO_CALL
    """The entry of the last call by positional arguments: mostly that of the next one."""
    self._entries: dict[tuple | None, Entry] = {}
    self._compiled: dict[tuple, Compiled] = {}

  def find(self, args: tuple, names: tuple[str, ...] = ()) -> Entry | None:
    """The entry for a call, if there is one that still holds; `names` are of the last arguments."""
    if not self._entries or not is_eager() or _jax.checks_results():
      return None
    entry = self._entries.get(_key(args, names))
    if entry is None or not entry.is_of(args):
      return None
    self.last = NO_CALL if names else entry
    return entry

  def compiled(self, key: tuple) -> Compiled | None:
    """What was compiled for a structure."""
    return self._compiled.get(key)

  def keep(self, key: tuple, compiled: Compiled) -> None:
    """Remember what was compiled for a structure."""
    if len(self._compiled) >= LIMIT:
      self._compiled.clear()
    self._compiled[key] = compiled

  def learn(
    self,
    args: tuple,
    names: tuple[str, ...],
    flat: list,
    compiled: Compiled,
    slots: Sequence[Slot],
  ) -> None:
    """A new entry for a call that has been made, if it is known by its arguments alone."""
    key = _key(args, names)
    if key is None or not is_steady(args, compiled):
      return
    if len(self._entries) >= LIMIT:
      self._entries.clear()
    calls = weakref.ref(self)

    def forget(_):
      if (living := calls()) is not None:
        living.last = NO_CALL
        living._entries.pop(key, None)

    self._entries[key] = entry = Entry.of(args, flat, compiled, slots, forget)
    self.last = NO_CALL if names else entry

  def clear(self) -> None:
    """Forget everything."""
    self.last = NO_CALL
    self._entries.clear()
    self._compiled.clear()


def is_steady(args: tuple, compiled: Compiled) -> bool:
  """Whether the objects among the arguments, as long as they are the same, make the same call."""
  return (
    compiled.result is not None
    and compiled.picks is not None
    and not compiled.careful
    and all(_is_cached(x) for x in args if isinstance(x, Node))
  )


def is_eager() -> bool:
  """Whether calls run now, compiled: not inside a trace, and not under `jax.disable_jit`."""
  return _jax.no_trace_active() and not _jax.flag("jax_disable_jit")


def signature(leaf: Any) -> Any:
  """What a trace depends on, of a Variable or an array."""
  if not isinstance(leaf, Variable):
    return _type_of(leaf)
  cells, treedef = jax.tree.flatten(leaf.get_raw_value())
  return type(leaf), leaf._def, treedef, *map(_cell_type, cells)


def _cell_type(cell: Any) -> Any:
  if not _jax.is_ref(cell):
    return _type_of(cell)
  return jax.Ref, cell.shape, cell.dtype, _jax.peek_cell(cell).sharding


def takes_arrays_as_they_are(args: tuple, inputs: Inputs) -> bool:
  """Whether the arguments are pytrees of arrays, and objects with nothing but Refs."""
  count = len(jax.tree.leaves([x for x in args if not isinstance(x, Node | Variable)]))
  variables = [x for x in inputs.leaves if isinstance(x, Variable)]
  others = [x for x in inputs.leaves if not isinstance(x, Variable) and x is not None]
  cells = [c for x in variables for c in jax.tree.leaves(x.get_raw_value())]
  return count == len(others) and all(map(_jax.is_ref, cells))


def _type_of(x: Any) -> Any:
  """The type that JAX traces an array or number with; None for anything else, a Ref too."""
  if isinstance(x, jax.Array) and type(x) is not jax.Ref:
    weak = getattr(x, "weak_type", False)  # typed keys have none
    return x.shape, x.dtype, weak, x.sharding, getattr(x, "committed", True)
  if isinstance(x, np.ndarray | np.generic):
    return type(x), x.shape, x.dtype
  return type(x) if type(x) in (bool, int, float, complex) else None


def _place(x: Any) -> Any:
  return x.sharding if isinstance(x, jax.Array) else None


def _key(args: tuple, names: tuple[str, ...]) -> tuple | None:
  """What an entry is found by, or None if an argument holds more than arrays, or is no object."""
  key: list[Any] = [config.using_hijax(), names]
  for x in args:
    part = id(x) if isinstance(x, Node | Variable) else _types_of(x)
    if part is None:
      return None
    key.append(part)
  return tuple(key)


def _types_of(x: Any) -> Any:
  """The type of an array, or those of a pytree of arrays; None if there is anything else in it."""
  if (type_ := _type_of(x)) is not None:
    return type_
  leaves, treedef = jax.tree.flatten(x)
  types = tuple(map(_type_of, leaves))
  return None if None in types else (treedef, types)


def _is_cached(node: Node) -> bool:
  """Whether changes below an object reach the structure epoch."""
  flatten(node)
  return node._pytree.cache is not None and node._pytree.visited
