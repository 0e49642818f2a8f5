"""Writes of several Variables: all or none."""

from typing import Any

from refax import _jax
from refax.core.interrupt import uninterrupted
from refax.core.variable import Variable, Writes


def write(*writes: tuple[Variable, Any]) -> None:
  """Write a value to each Variable; if one does not fit, nothing is written.

  Raises:
    ShapeMismatchError: a value has another shape or dtype than its Variable.

  >>> from refax import nnx
  >>> a, b = nnx.Variable(1), nnx.Variable(2)
  >>> write((a, 3), (b, 4)); int(a), int(b)
  (3, 4)
  """
  commit([(variable, variable.prepare(value)) for variable, value in writes])


def commit(prepared: list[tuple[Variable, Writes]]) -> None:
  """Store what `Variable.prepare` has checked; no signal comes between two of them."""

  def store() -> None:
    for variable, writes in prepared:
      variable.commit(writes)

  uninterrupted(store) if _jax.no_trace_active() else store()
