"""Several Variables at once: writes, all or none, and copies and values of one moment."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax

from refax import _jax
from refax.core import storage
from refax.core.array_protocol import unwrap
from refax.core.gather import as_kept
from refax.core.interrupt import uninterrupted
from refax.core.mesh import enter_mesh
from refax.core.observe import before_write, is_quiet, note
from refax.core.variable import Variable, Writes, borrowed, make_variables


def write(*writes: tuple[Variable, Any], fresh: bool = False) -> None:
  """Write a value to each Variable; if one does not fit, nothing is written.

  Args:
    *writes: a Variable and its value, or the Variable that has it.
    fresh: whether nobody else knows the values, and no two share a buffer, as it is with what a
      compiled function returns: then they need not be copied.

  Raises:
    ShapeMismatchError: a value has another shape or dtype than its Variable.

  >>> from refax import nnx
  >>> a, b = nnx.Variable(1), nnx.Variable(2)
  >>> write((a, 3), (b, 4)); int(a), int(b)
  (3, 4)
  """
  buffers = _Buffers()
  others: list[tuple[Variable, Writes]] = []
  is_eager = _jax.no_trace_active()
  is_simple = is_eager and is_quiet() and _jax.wide_mesh() is None
  for variable, value in writes:
    if is_simple and buffers.took(variable, value, fresh):
      continue
    checked = variable.prepare(_given(value, variable))
    if not (is_eager and buffers.took_checked(variable, checked, fresh)):
      others.append((variable, checked))
  if is_eager:
    buffers.exchange(others)
    return
  for variable, checked in others:
    variable.commit(checked)


def copied(variables: Sequence[Variable], hijax: bool | None = None) -> list[Variable]:
  """A copy of each Variable, with a cell of its own.

  Args:
    variables: the Variables, each with another cell.
    hijax: the storage of the copies; by default each has that of its Variable.

  >>> from refax import nnx
  >>> a = nnx.Param(1.0); (b,) = copied([a], hijax=False)
  >>> float(b), b.is_hijax
  (1.0, False)
  """
  is_eager = _jax.no_trace_active()
  are_refs = [is_eager and type(v._node[0][0]) is jax.Ref for v in variables]
  together = [v for v, is_ref in zip(variables, are_refs, strict=True) if is_ref]
  copies = iter(_copied_together(together, hijax is None or hijax))
  return [
    next(copies) if is_ref else v.with_storage(v.is_hijax if hijax is None else hijax)
    for v, is_ref in zip(variables, are_refs, strict=True)
  ]


def values_at_once(leaves: Sequence[Any]) -> list[Any]:
  """The value of each Variable among some leaves, read where it lies; the others as they are.

  Those of Refs are of one moment: the step of another thread is in all of them, or in none.
  """
  values, is_eager = list(leaves), _jax.no_trace_active()
  refs: dict[int, Variable] = {}
  with as_kept():
    for i, x in enumerate(leaves):
      if not isinstance(x, Variable):
        continue
      reads_cell = type(x).get_value is Variable.get_value  # no class that reads another way
      if is_eager and reads_cell and type(x._node[0][0]) is jax.Ref:
        refs[i] = x
      else:
        values[i] = x.get_value()
  if refs:
    copies = _jax.copies_of_cells(_read_now(refs.values()))
    for i, x in zip(refs, copies, strict=True):
      values[i] = x
  return values


def _read_now(variables: Iterable[Variable]) -> list[Any]:
  """The concrete Refs of Variables that are being read."""
  cells = [v._node[0][0] for v in variables]
  enter_mesh(cells)
  if not is_quiet():
    for variable, cell in zip(variables, cells, strict=True):
      note(variable, cell)
  return cells


def _copied_together(variables: list[Variable], hijax: bool) -> list[Variable]:
  """Copies of Variables that have a concrete Ref each."""
  cells = _read_now(variables)
  new: Sequence[Any] = (_jax.copied_cells if hijax else _jax.copies_of_cells)(cells)
  definitions = [v._def.elsewhere(hijax) for v in variables]
  return make_variables(map(type, variables), zip(new), definitions, _jax.trace_state())


def _given(value: Any, target: Variable) -> Any:
  """What is written: a Ref's own buffer goes to another Ref, which copies it."""
  if isinstance(value, Variable) and type(target.get_raw_value()) is jax.Ref:
    return borrowed(value)
  return unwrap(value)


class _Buffers:
  """What several Refs will hold."""

  def __init__(self):
    self._cells: list[jax.Ref] = []
    self._values: list[jax.Array] = []
    self._given: list[bool] = []
    """Whether somebody else knows the value."""

  def took(self, variable: Variable, value: Any, fresh: bool) -> bool:
    """Whether a write is one of an array to a Ref as it is, as most are; then it is taken.

    It is not told to anybody: to be called where nobody wants to know (`is_quiet`).
    """
    (ref,), definition = variable._node
    if type(ref) is not jax.Ref or definition.selected:
      return False
    if is_variable := isinstance(value, Variable):
      value = value._node[0][0]
      if type(value) is not jax.Ref:
        return False
      value = _jax.peek_cell(value)
    if not _jax.is_write_now(ref, value):
      return False
    self._cells.append(ref)
    self._values.append(value)
    self._given.append(is_variable or not fresh)
    return True

  def took_checked(self, variable: Variable, writes: Writes, fresh: bool) -> bool:
    """Whether a checked write is one of arrays to Refs; then it is taken."""
    if not writes.refs or any(_jax.is_tracer(x) for ref, new, _ in writes.refs for x in (ref, new)):
      return False
    for ref, new, was in writes.refs:
      self._cells.append(ref)
      self._values.append(new)
      self._given.append(new is was and not fresh)
      note(variable, ref)
      before_write(ref)
    return True

  def exchange(self, others: list[tuple[Variable, Writes]]) -> None:
    """Store what was taken, and these; no signal comes between two of them.

    All copies are made before anything is stored: what can fail has failed then.
    """
    buffers = storage.settled(self._cells, self._values, self._given)

    def store() -> None:
      _jax.put_back(self._cells, buffers)
      for variable, writes in others:
        variable.commit(writes)

    if len(buffers) == 1 and not others:
      store()  # one buffer is exchanged at once, by itself
    else:
      uninterrupted(store)
