"""Which dtype a layer computes in: decided here, for all layers.

Sums, means and squares take `wide_dtype`: bfloat16 counts to 256 only, float16 ends at 65504.
Whatever indexes, or is compared with a size, goes through `wide_integers`: JAX computes with a
Python int in the dtype of the array, where 256 is 0 for uint8.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from refax.errors import InvalidArgumentError
from refax.typing import Dtype, wide_dtype

PromoteDtype: TypeAlias = Callable[..., Any]
"""A function like `promote_dtype`, which a layer can be given instead."""


def canonicalize_dtype(*args: Any, dtype: Dtype | None = None, inexact: bool = True) -> Dtype:
  """The dtype in which to compute with these arrays.

  Args:
    *args: arrays and numbers; None is skipped.
    dtype: the answer, if it is not None.
    inexact: whether it has to be floating-point or complex: integers then become float32.

  Returns:
    `dtype`, or what JAX promotes the arrays to.

  Raises:
    InvalidArgumentError: `dtype` is not inexact though it has to be.

  >>> import jax.numpy as jnp
  >>> canonicalize_dtype(jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.float32), None)
  dtype('float32')
  """
  if dtype is None:
    dtype = jnp.result_type(*(jnp.asarray(x) for x in args if x is not None))
    if inexact and not jnp.issubdtype(dtype, jnp.inexact):
      dtype = jnp.dtype(jnp.float32)
  if inexact and not jnp.issubdtype(dtype, jnp.inexact):
    raise InvalidArgumentError.value("a layer", "dtype", dtype, "a floating-point dtype, or None")
  return dtype


def promote_dtype(args: Any, /, *, dtype: Dtype | None = None, inexact: bool = True) -> Any:
  """Arrays as arrays of one dtype.

  Args:
    args: a tuple of arrays and numbers; None stays None.
    dtype: the dtype; by default what JAX promotes the arrays to.
    inexact: whether it has to be floating-point or complex: integers then become float32.

  Returns:
    A tuple as long as `args`.

  Raises:
    InvalidArgumentError: `dtype` is not inexact though it has to be.

  >>> import jax.numpy as jnp
  >>> x, y, z = promote_dtype((jnp.ones(2, jnp.int8), jnp.ones(2, jnp.bfloat16), None))
  >>> x.dtype, y.dtype, z
  (dtype(bfloat16), dtype(bfloat16), None)
  """
  if (dtype is None and inexact) and _are_alike(args):
    return tuple(args)
  dtype = canonicalize_dtype(*args, dtype=dtype, inexact=inexact)
  return tuple(None if x is None else jnp.asarray(x, dtype) for x in args)


def _are_alike(args: Any) -> bool:
  """Whether all are JAX arrays of one inexact dtype: mostly there is nothing to promote."""
  given = [x for x in args if x is not None]
  if not all(isinstance(x, jax.Array) and not getattr(x, "weak_type", False) for x in given):
    return False
  dtypes = {x.dtype for x in given}
  return len(dtypes) == 1 and jnp.issubdtype(dtypes.pop(), jnp.inexact)


def wide(x: jax.Array) -> jax.Array:
  """`x` in float32 or better; float32 stays as it is.

  >>> import jax.numpy as jnp
  >>> float(wide(jnp.full(70_000, 1.0, jnp.float16)).sum())
  70000.0
  """
  return x.astype(wide_dtype(x.dtype))


def wide_integers(x: jax.Array) -> jax.Array:
  """`x`, with integers of fewer than 32 bits as int32: a size fits beside them.

  >>> import jax.numpy as jnp
  >>> (wide_integers(jnp.array([200], jnp.uint8)) + 100).tolist()
  [300]
  """
  small = jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.itemsize < 4
  return x.astype(jnp.int32) if small else x


def divided(x: jax.Array, number: float) -> jax.Array:
  """`x / number`, rounded once: a half-precision `x` does not round the number to its dtype.

  >>> import jax.numpy as jnp
  >>> divided(jnp.array([1.0], jnp.float16), 1e-4).tolist()
  [10000.0]
  """
  y = wide(x) / number
  return y.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else y
