"""Filling objects, all or nothing: an error or Ctrl-C leaves them as they were."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from refax import _jax
from refax.core.variable import Variable
from refax.io.parts import Parted
from refax.io.slots import Slot, place_of


@contextlib.contextmanager
def undo_on_error(tree: Any, slots: list[Slot], parted: Parted) -> Iterator[None]:
  """If the block raises, slots, iterators and dicts of the user get back what they had.

  The old buffers are held meanwhile, not copied: filling installs others, and donates none.
  """
  undo = _undo_slots(tree, slots)
  dicts = [(original, dict(original)) for original, _ in parted.copies]
  states = [(x, *_state(x)) for x in parted.iterators.values()]
  try:
    yield
  except BaseException:
    undo()
    for original, before in dicts:
      original.update(before)
    for iterator, known, state in states:
      if known:
        with contextlib.suppress(Exception):
          iterator.set_state(state)
    raise


def _state(iterator: Any) -> tuple[bool, Any]:
  """(True, state); an iterator that has not begun may have none."""
  try:
    return True, iterator.get_state()
  except Exception:
    return False, None


def _undo_slots(tree: Any, slots: list[Slot]) -> Callable[[], None]:
  holders = {id(s.holder): s.holder for s in slots if isinstance(s.holder, Variable)}
  cells = [(variable, variable.get_raw_value()) for variable in holders.values()]
  refs = [
    x
    for _, cell in cells
    for x in jax.tree.leaves(cell)
    if _jax.is_ref(x) and not _jax.is_tracer(x)
  ]
  buffers = [_jax.peek_cell(ref) for ref in refs]
  places = [place_of(tree, s.path) for s in slots if not isinstance(s.holder, Variable)]

  def undo() -> None:
    _jax.put_back(refs, buffers)
    for variable, cell in cells:
      if variable.get_raw_value() is not cell:
        variable.set_raw_value(cell)
    for place in reversed([x for x in places if x is not None]):
      place.put(place.child)

  return undo
