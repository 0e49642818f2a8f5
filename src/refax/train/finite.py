"""all_finite: whether gradients can be used."""

from typing import Any

import jax
import jax.numpy as jnp

from refax.core.array_protocol import unwrap
from refax.core.variable import is_variable


def all_finite(tree: Any) -> jax.Array:
  """Whether no number of a tree is infinite or nan.

  Args:
    tree: gradients, a model, or any pytree of arrays and Variables.

  Returns:
    A boolean array of shape `[]`.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> bool(nnx.all_finite({"a": jnp.ones(3), "b": jnp.array([1.0, jnp.nan])}))
  False
  """
  leaves = jax.tree.leaves(jax.tree.map(unwrap, tree, is_leaf=is_variable))
  checks = [
    jnp.isfinite(x).all() for x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
  ]
  return jnp.stack(checks).all() if checks else jnp.ones((), bool)
