"""Where state is kept: on the devices of the parameters that it belongs to.

A Ref stays on its devices, and JAX refuses to compute with arrays on other ones: the counter of an
optimizer on one device could not be used with parameters that are sharded over several.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from refax import _jax
from refax.core.variable import is_variable
from refax.graph.state import State, to_flat_state


def sharding_of(tree: Any) -> Sharding | None:
  """The sharding of the first Variable of a tree that has been given a place.

  None while JAX traces, and for arrays that JAX may still move to where they are used.

  >>> from refax import nnx
  >>> sharding_of(nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
  SingleDeviceSharding(...)
  """
  is_state = isinstance(tree, State)
  leaves = to_flat_state(tree).leaves if is_state else jax.tree.leaves(tree, is_leaf=is_variable)
  cells = (v.get_raw_value() for v in leaves if is_variable(v))
  return next((c.sharding for c in cells if _is_placed(c)), None)


def _is_placed(cell: Any) -> bool:
  if _jax.is_tracer(cell):
    return False
  return isinstance(cell, jax.Ref) or (isinstance(cell, jax.Array) and cell.committed)


def is_beside(x: Any, sharding: Sharding | None) -> bool:
  """Whether `x` is on the devices of a sharding, or is nothing that could be moved.

  >>> import jax.numpy as jnp
  >>> is_beside(jnp.zeros(3), jnp.ones(3).sharding)
  True
  """
  if sharding is None or not isinstance(x, jax.Array) or _jax.is_tracer(x):
    return True
  return x.sharding.device_set == sharding.device_set


def beside(x: Any, sharding: Sharding | None) -> Any:
  """`x` on the devices of a sharding: as it is if it is there, else a copy on each of them.

  >>> import jax.numpy as jnp
  >>> int(beside(jnp.zeros((), int), jnp.ones(3).sharding))
  0
  """
  if sharding is None or is_beside(x, sharding):
    return x
  if isinstance(sharding, NamedSharding):
    sharding = NamedSharding(sharding.mesh, PartitionSpec())
  return _jax.put(x, sharding) if sharding.is_fully_replicated else x
