"""Sums over any number of batches: a float32 with what rounding took from it, a count of 64 bits.

JAX has no float64 and no int64 unless it is told so; two numbers of 32 bits do the work of one.
"""

import math

import jax
import jax.numpy as jnp

from refax.nn import dtypes


def add(high: jax.Array, low: jax.Array, *terms: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Add numbers to the sum `high + low`, where `low` is what `high` could not hold.

  The error of an addition is computed exactly by "TwoSum", Knuth, The Art of Computer Programming,
  volume 2, section 4.2.2; the sum has about 48 bits.

  Args:
    high: the sum, rounded to float32.
    low: the rest.
    *terms: float32.

  Returns:
    The new `(high, low)`.

  >>> high, low = add(jnp.float32(2.0**24), jnp.float32(0), jnp.float32(1))
  >>> float(high), float(low)
  (16777216.0, 1.0)
  """
  for x in terms:
    high, error = _two_sum(high, x)
    high, low = _two_sum(high, low + error)
  return high, low


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  total = a + b
  rest = total - a
  error = (a - (total - rest)) + (b - rest)
  return total, jnp.where(jnp.isfinite(total), error, 0)  # inf - inf would make the sum nan


def sum_parts(x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, ...]:
  """The sum of an array as float32 terms: exact for booleans, else as exact as `jnp.sum`."""
  if x.dtype == jnp.bool_:
    return _parts(jnp.sum(x, dtype=jnp.uint32, where=mask))
  dtype = dtypes.wide_dtype(x.dtype)
  total = jnp.sum(x.astype(dtype), where=mask)
  high = total.astype(jnp.float32)
  return (high,) if dtype == jnp.float32 else (high, (total - high).astype(jnp.float32))


def _parts(n: jax.Array) -> tuple[jax.Array, jax.Array]:
  """A uint32 as two float32, each exact."""
  return (n >> 16).astype(jnp.float32) * 65536, (n & 0xFFFF).astype(jnp.float32)


def size(x: jax.Array, mask: jax.Array | None) -> int | jax.Array:
  """How many elements of `x` the mask leaves."""
  if mask is None:
    return math.prod(x.shape)
  return jnp.sum(jnp.broadcast_to(mask, x.shape), dtype=jnp.uint32)


def add_count(low: jax.Array, high: jax.Array, n: int | jax.Array) -> tuple[jax.Array, jax.Array]:
  """Add to the count `high * 2^32 + low`.

  >>> low, high = add_count(jnp.uint32(2**32 - 1), jnp.uint32(0), 3)
  >>> int(low), int(high)
  (2, 1)
  """
  n_high, n_low = divmod(n, 2**32) if isinstance(n, int) else (0, n)
  total = low + jnp.uint32(n_low)
  return total, high + jnp.uint32(n_high) + (total < low).astype(jnp.uint32)


def count_as_float(low: jax.Array, high: jax.Array) -> jax.Array:
  """The count `high * 2^32 + low`, rounded to float32."""
  return high.astype(jnp.float32) * 2.0**32 + low.astype(jnp.float32)
