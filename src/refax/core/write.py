"""Writes of several Variables: all or none."""

from typing import Any

import jax

from refax import _jax
from refax.core import storage
from refax.core.interrupt import uninterrupted
from refax.core.observe import before_write, note
from refax.core.variable import Variable, Writes

Prepared = list[tuple[Variable, Writes]]
"""Writes that `Variable.prepare` has checked."""


def write(*writes: tuple[Variable, Any], fresh: bool = False) -> None:
  """Write a value to each Variable; if one does not fit, nothing is written.

  Args:
    *writes: a Variable and its value.
    fresh: whether nobody else knows the values, and no two share a buffer, as it is with what a
      compiled function returns: then they need not be copied.

  Raises:
    ShapeMismatchError: a value has another shape or dtype than its Variable.

  >>> from refax import nnx
  >>> a, b = nnx.Variable(1), nnx.Variable(2)
  >>> write((a, 3), (b, 4)); int(a), int(b)
  (3, 4)
  """
  commit([(variable, variable.prepare(value)) for variable, value in writes], fresh=fresh)


def commit(prepared: Prepared, *, fresh: bool = False) -> None:
  """Store what `Variable.prepare` has checked; no signal comes between two of them.

  All copies are made before anything is stored: what can fail has failed then.
  """
  if not _jax.no_trace_active():
    for variable, writes in prepared:
      variable.commit(writes)
    return
  refs: list[jax.Ref] = []
  buffers: list[jax.Array] = []
  others: Prepared = []
  for variable, writes in prepared:
    if not all(_is_concrete(ref, new) for ref, new, _ in writes.refs):
      others.append((variable, writes))
      continue
    for ref, new, given in writes.refs:
      buffers.append(storage.settled(ref, new, copy=new is given and not fresh))
      refs.append(ref)
      note(variable, ref)
      before_write(ref)
    if not writes.refs:
      others.append((variable, writes))

  def store() -> None:
    _jax.put_back(refs, buffers)
    for variable, writes in others:
      variable.commit(writes)

  if len(refs) == 1 and not others:
    store()  # one buffer is exchanged at once, by itself
  else:
    uninterrupted(store)


def _is_concrete(ref: Any, value: Any) -> bool:
  return not _jax.is_tracer(ref) and not _jax.is_tracer(value)
