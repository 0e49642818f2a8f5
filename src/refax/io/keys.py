"""Typed PRNG keys as what every format knows: their bits, and the name of their implementation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_key(x: Any) -> bool:
  """Whether `x` is, or has the dtype of, typed keys."""
  dtype = getattr(x, "dtype", None)
  if dtype is None or isinstance(dtype, np.dtype):
    return False
  return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def as_data(x: Any) -> Any:
  """Typed keys as their bits, another array as it is."""
  return jax.random.key_data(x) if is_key(x) else x


def implementation(x: Any) -> str | None:
  """The name of the implementation of typed keys; None for another array."""
  return str(jax.random.key_impl(x)) if is_key(x) else None


def as_value(data: Any, impl: str | None) -> Any:
  """What `as_data` was given, from its bits and the name of its implementation."""
  return data if impl is None else jax.random.wrap_key_data(data, impl=impl)
