"""What orbax sees of an object: arrays, for it knows no Refs.

orbax-checkpoint takes pytrees of arrays apart by JAX's functions. A State or a Module that it
flattens shows it the arrays that the Refs hold at that moment; what it puts together again holds
arrays, in lojax Variables. Nobody else sees this: who flattens asks `_jax.orbax_flattens`.
"""

from collections.abc import Iterable
from typing import Any

import jax

from refax import _jax
from refax.core.variable import Variable


def on_arrays(leaves: Iterable[Any]) -> list[Any]:
  """The leaves, with Variables on arrays in the place of those on Refs. Nothing is copied."""
  return [_on_array(x) if isinstance(x, Variable) and x.is_hijax else x for x in leaves]


def _on_array(variable: Variable) -> Variable:
  array = lambda cell: _jax.peek_cell(cell) if _jax.is_ref(cell) else cell
  return variable._handle(jax.tree.map(array, variable.get_raw_value()), variable._def)
