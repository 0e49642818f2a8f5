"""Writes of several Variables: all or none."""

from typing import Any

from refax.core.variable import Variable


def write(*writes: tuple[Variable, Any]) -> None:
  """Write a value to each Variable; if one does not fit, nothing is written.

  Raises:
    ShapeMismatchError: a value has another shape or dtype than its Variable.

  >>> from refax import nnx
  >>> a, b = nnx.Variable(1), nnx.Variable(2)
  >>> write((a, 3), (b, 4)); int(a), int(b)
  (3, 4)
  """
  prepared = [(variable, variable.prepare(value)) for variable, value in writes]
  for variable, write in prepared:
    variable.commit(write)
