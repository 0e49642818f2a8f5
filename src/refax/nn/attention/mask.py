"""Masks of attention: which query may look at which key."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from refax.errors import ShapeMismatchError
from refax.nn import check, dtypes, explicit
from refax.typing import ArrayLike, Dtype


def make_attention_mask(
  query_input: ArrayLike,
  key_input: ArrayLike,
  pairwise_fn: Callable[..., Any] = jnp.multiply,
  extra_batch_dims: int = 0,
  dtype: Dtype = jnp.float32,
) -> jax.Array:
  """A mask from one number for each query and one for each key, such as "is no padding".

  Args:
    query_input: `[batch..., queries]`.
    key_input: `[batch..., keys]`.
    pairwise_fn: of a query's number and a key's number; where it is not 0, they may meet.
    extra_batch_dims: how many axes of size 1 to put before the others.
    dtype: the dtype of the mask.

  Returns:
    `[batch..., 1, queries, keys]`; the axis of size 1 is that of the heads.

  Raises:
    ShapeMismatchError: one of the inputs is a scalar.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> nnx.make_attention_mask(jnp.array([1, 1, 0]), jnp.array([1, 0])).astype(int).tolist()
  [[[1, 0], [1, 0], [0, 0]]]
  """
  queries, keys = check.as_input(query_input), check.as_input(key_input)
  for x in (queries, keys):
    if x.ndim == 0:
      raise ShapeMismatchError(
        "a mask is made from one number for each query and key",
        got="a scalar",
        fix="pass arrays of shape (..., length)",
      )
  # A product of integers may wrap around to 0; as floats it is 0 only where one of them is.
  wide = dtypes.wide if pairwise_fn is jnp.multiply else dtypes.wide_integers
  # In an explicit mesh, one name cannot split both: the queries have it.
  pairs = lambda: [*explicit.names(queries), *explicit.names(keys)[-1:]]
  kept = lambda: [*explicit.names(keys)[:-1], explicit.distinct(pairs())[-1]]
  keys = explicit.put(keys, kept)
  mask = pairwise_fn(wide(queries)[..., :, None], wide(keys)[..., None, :])
  mask = jnp.expand_dims(mask, -3)
  return _cast(jnp.expand_dims(mask, tuple(range(extra_batch_dims))), dtype)


def make_causal_mask(
  x: ArrayLike, extra_batch_dims: int = 0, dtype: Dtype = jnp.float32
) -> jax.Array:
  """A mask for self attention that lets a position see itself and those before it.

  Args:
    x: `[batch..., length]`; only its shape counts.
    extra_batch_dims: how many axes of size 1 to put before the others.
    dtype: the dtype of the mask.

  Returns:
    `[batch..., 1, length, length]`.

  Raises:
    ShapeMismatchError: `x` is a scalar.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> nnx.make_causal_mask(jnp.ones(3)).astype(int).tolist()
  [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]
  """
  shape = jnp.shape(check.as_input(x))
  positions = jnp.broadcast_to(jnp.arange(shape[-1]), shape) if shape else jnp.zeros(())
  return make_attention_mask(positions, positions, jnp.greater_equal, extra_batch_dims, dtype)


def combine_masks(*masks: ArrayLike | None, dtype: Dtype = jnp.float32) -> jax.Array | None:
  """A mask that lets through what all masks let through.

  Args:
    *masks: masks that broadcast to each other, with equally many axes; None is skipped.
    dtype: the dtype of the mask.

  Returns:
    The mask, or None if there is none to combine.

  Raises:
    ShapeMismatchError: the masks differ in their number of axes, or do not broadcast.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> causal = nnx.make_causal_mask(jnp.ones(2))
  >>> nnx.combine_masks(causal, None, jnp.array([[[0, 1]]])).astype(int).tolist()
  [[[0, 0], [0, 1]]]
  """
  given = [check.as_input(mask) for mask in masks if mask is not None]
  if not given:
    return None
  shapes = [mask.shape for mask in given]
  try:
    jnp.broadcast_shapes(*shapes)
    fits = len({len(shape) for shape in shapes}) == 1
  except ValueError:
    fits = False
  if not fits:
    raise ShapeMismatchError(
      "masks that are combined have to broadcast to each other, axis by axis",
      got=f"masks of shape {', '.join(map(str, shapes))}",
      fix="give them equally many axes, of size 1 where they are to be repeated",
    )
  combined = given[0]
  for mask in given[1:]:
    combined = explicit.together(jnp.logical_and, combined, mask)
  return _cast(combined, dtype)


def _cast(mask: jax.Array, dtype: Dtype) -> jax.Array:
  """A mask in a dtype, 0 only where it was: 256 as uint8 and 1e-9 as float16 are 1."""
  cast = mask.astype(dtype)
  if jnp.bool_ in (mask.dtype, cast.dtype) or cast.dtype == jnp.float32:
    return cast
  return jnp.where((cast == 0) & (mask != 0), jnp.ones((), dtype), cast)
