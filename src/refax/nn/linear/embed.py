"""Embed: a table of vectors."""

import math
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Shaped

from refax.core.module import Module
from refax.core.variable import Param
from refax.nn import check, dtypes, explicit, initializers
from refax.nn.quantization import quantized
from refax.rngs import Rngs
from refax.typing import ArrayLike, Dtype, Initializer


class Embed(Module):
  """A table of vectors, looked up by integers.

  A negative index counts from the end; one that the table does not have gives NaNs.

  Args:
    num_embeddings: the number of vectors.
    features: their size.
    dtype: the dtype of the output; by default that of the table, and in `attend` what it and the
      query promote to.
    param_dtype: the dtype of the table.
    embedding_init: initializer of the table `[num_embeddings, features]`.
    promote_dtype: as in `nnx.Linear`.
    rngs: the stream `params` initialises the table.
    embedding_metadata: metadata of the table, such as a sharding.

  Raises:
    InvalidArgumentError: a size is not a positive int, or `rngs` is not an `nnx.Rngs`.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> embed = nnx.Embed(10, 4, rngs=nnx.Rngs(0))
  >>> embed(jnp.array([[1, 2, 3]])).shape
  (1, 3, 4)
  """

  def __init__(
    self,
    num_embeddings: int,
    features: int,
    *,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    embedding_init: Initializer = initializers.default_embed_init,
    promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    rngs: Rngs,
    embedding_metadata: Mapping[str, Any] = MappingProxyType({}),
  ):
    self.num_embeddings = check.size("Embed", "num_embeddings", num_embeddings)
    self.features = check.size("Embed", "features", features)
    key = check.streams("Embed", rngs).params()
    table = embedding_init(key, (self.num_embeddings, self.features), param_dtype)
    self.embedding = Param(table, **embedding_metadata)
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.promote_dtype = promote_dtype

  def __call__(
    self, inputs: Shaped[ArrayLike, "*batch"], out_sharding: Any = None
  ) -> Shaped[jax.Array, "*batch {self.features}"]:
    """Look up vectors.

    Args:
      inputs: integers `[...]`.
      out_sharding: the sharding of the output, where the mesh has explicit axes.

    Returns:
      `[..., features]`.

    Raises:
      ShapeMismatchError: the inputs are not integers.
    """
    indices = check.integers("Embed", check.as_input(inputs), self.embedding)
    table = self._table()
    if self.dtype is not None or self.promote_dtype is not dtypes.promote_dtype:
      (table,) = quantized.promoted(self.promote_dtype, (table,), dtype=self.dtype, inexact=False)
    out = lambda: [*explicit.names(indices), quantized.names(table)[1]]
    look_up = partial(_look_up, out_sharding=out_sharding)
    return explicit.call(look_up, table, indices, out=out if out_sharding is None else None)

  def _table(self) -> quantized.Weight:
    """The table; a user's function could keep it, Refax's own does not."""
    return quantized.read(self.embedding, self.promote_dtype is dtypes.promote_dtype)

  def attend(
    self, query: Shaped[ArrayLike, "*batch features"], out_sharding: Any = None
  ) -> Shaped[jax.Array, "*batch {self.num_embeddings}"]:
    """The product of queries with each vector: logits that share the table's parameters.

    Args:
      query: `[..., features]`.
      out_sharding: the sharding of the output, where the mesh has explicit axes.

    Returns:
      `[..., num_embeddings]`, of the dtype `dtype`, or else of what query and table promote to.

    Raises:
      ShapeMismatchError: the last axis has another size.

    >>> from refax import nnx; import jax.numpy as jnp
    >>> nnx.Embed(10, 4, rngs=nnx.Rngs(0)).attend(jnp.ones((2, 4))).shape
    (2, 10)
    """
    query = check.as_input(query)
    check.last_axis("Embed.attend", query, self.features, self.embedding)
    operands = (query, self._table())
    query, table = quantized.promoted(self.promote_dtype, operands, dtype=self.dtype)
    out = lambda: [*explicit.names(query)[:-1], quantized.names(table)[0]]
    products = partial(_products, out_sharding=out_sharding)
    return explicit.call(products, query, table, out=out if out_sharding is None else None)


# Compiled: by itself, the lookup is 20 calls of JAX, 15 times as slow.
@partial(jax.jit, inline=True, static_argnames="out_sharding")
def _look_up(table: quantized.Weight, indices: jax.Array, *, out_sharding: Any) -> jax.Array:
  if isinstance(table, quantized.Packed):
    return quantized.placed(lambda t, i: t.at(i).array(), table, indices, out_sharding)
  return table.at[indices].get(mode="fill", out_sharding=out_sharding)


@partial(jax.jit, inline=True, static_argnames="out_sharding")
def _products(query: jax.Array, table: quantized.Weight, *, out_sharding: Any) -> jax.Array:
  last = query.ndim - 1
  if isinstance(table, quantized.Packed):
    dims = (((last,), (1,)), ((), ()))
    return quantized.dot_general(query, table, dims, out_sharding=out_sharding)
  axis = 1
  if _TRANSPOSED_FOR_ONE_ROW and math.prod(query.shape[:-1]) == 1:
    table, axis = table.T, 0
  return lax.dot_general(query, table, (((last,), (axis,)), ((), ())), out_sharding=out_sharding)


# One row is a step of decoding. With a transpose, XLA on CPU takes two thirds of the time before
# jax 0.11, and three times as long after it.
_TRANSPOSED_FOR_ONE_ROW = jax.__version_info__ < (0, 11)
