"""Dot-product attention: each query gets a weighted mean of the values.

`softmax(query @ key / sqrt(size) + bias) @ value` (Vaswani et al., arXiv:1706.03762). What
`jax.nn.dot_product_attention` can express goes to it, for it may fuse all of that. The weights are
made here where they are dropped out or handed out.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from refax.core.module import Module
from refax.core.variable import Intermediate
from refax.errors import InvalidArgumentError, MissingRngError, ShapeMismatchError
from refax.nn import check, dtypes, explicit
from refax.typing import ArrayLike, Dtype, PrecisionLike

Implementation = Literal["xla", "cudnn"]


def dot_product_attention(
  query: Shaped[ArrayLike, "*batch queries heads size"],
  key: Shaped[ArrayLike, "*batch keys key_heads size"],
  value: Shaped[ArrayLike, "*batch keys key_heads value_size"],
  bias: ArrayLike | None = None,
  mask: ArrayLike | None = None,
  broadcast_dropout: bool = True,
  dropout_rng: jax.Array | None = None,
  dropout_rate: float = 0.0,
  deterministic: bool = False,
  dtype: Dtype | None = None,
  precision: PrecisionLike = None,
  module: Module | None = None,
  promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
  is_causal: bool = False,
  *,
  implementation: Implementation | None = None,
) -> Shaped[jax.Array, "*batch queries heads value_size"]:
  """Attention: for each query and head, a mean of the values, weighted by how the keys fit.

  There may be fewer heads of keys and values than of queries: each serves as many neighbouring
  heads of queries (grouped-query attention, arXiv:2305.13245). A query that may look at no key
  gets the plain mean of all values.

  Args:
    query: `[batch..., queries, heads, size]`.
    key: `[batch..., keys, key_heads, size]`; `key_heads` divides `heads`.
    value: `[batch..., keys, key_heads, value_size]`.
    bias: added to the logits; broadcasts to `[batch..., heads, queries, keys]`.
    mask: not 0 where a query may look at a key; broadcasts as the bias.
    broadcast_dropout: whether all heads and elements of the batch drop the same weights.
    dropout_rng: a key for dropout.
    dropout_rate: the probability that a weight is dropped.
    deterministic: whether to drop none.
    dtype: what to compute in; by default what the inputs promote to. Logits and softmax take
      float32 or better.
    precision: of the products, as in `jax.lax.dot_general`.
    module: the weights are kept in it as `attention_weights`, by `Module.sow`.
    promote_dtype: as in `nnx.Linear`.
    is_causal: whether query i may look at keys 0 to i only.
    implementation: of `jax.nn.dot_product_attention`.

  Returns:
    `[batch..., queries, heads, value_size]`.

  Raises:
    ShapeMismatchError: shapes do not fit.
    MissingRngError: there is dropout and no `dropout_rng`.
    InvalidArgumentError: `implementation` is unknown, or cannot do what is asked for.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> query, key = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 3, 4, 8))
  >>> nnx.dot_product_attention(query, key, key).shape
  (2, 5, 4, 8)
  """
  query, key, value = promote_dtype(_inputs(query, key, value), dtype=dtype)
  check_shapes(query, key, value)
  bias, mask = _extras(query, key, bias, mask)
  dropped = dropout_rate > 0 and not deterministic
  # jax.nn takes no precision, and its softmax is float32 at most.
  fused = not dropped and module is None and precision is None and key.shape == value.shape
  fused = fused and jnp.promote_types(query.dtype, jnp.float32) == jnp.float32
  # Compiled, its product of float16 is refused by XLA on CPU (jax 0.10 to 0.12).
  fused = fused and (query.dtype != jnp.float16 or implementation == "cudnn")
  check_implementation(implementation, fused)
  if fused:
    fuse = functools.partial(_fused, is_causal=is_causal, how=implementation)
    return explicit.call(fuse, query, key, value, bias, mask, out=lambda: _mean_names(query, value))
  weights = dot_product_attention_weights(
    query,
    key,
    bias,
    mask,
    broadcast_dropout,
    dropout_rng,
    dropout_rate,
    deterministic,
    dtype,
    precision,
    module,
    promote_dtype,
    is_causal,
  )

  def mean(weights: jax.Array, value: jax.Array) -> jax.Array:
    groups = weights.reshape(*weights.shape[:-3], key.shape[-2], -1, *weights.shape[-2:])
    out = jnp.einsum("...hgqk,...khd->...qhgd", groups, value, precision=precision)
    return out.reshape(*query.shape[:-1], value.shape[-1])

  return explicit.call(mean, weights, value, out=lambda: _mean_names(query, value))


def dot_product_attention_weights(
  query: Shaped[ArrayLike, "*batch queries heads size"],
  key: Shaped[ArrayLike, "*batch keys key_heads size"],
  bias: ArrayLike | None = None,
  mask: ArrayLike | None = None,
  broadcast_dropout: bool = True,
  dropout_rng: jax.Array | None = None,
  dropout_rate: float = 0.0,
  deterministic: bool = False,
  dtype: Dtype | None = None,
  precision: PrecisionLike = None,
  module: Module | None = None,
  promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
  is_causal: bool = False,
) -> Shaped[jax.Array, "*batch heads queries keys"]:
  """The weights of attention, after dropout.

  Args:
    query: `[batch..., queries, heads, size]`.
    key: `[batch..., keys, key_heads, size]`; `key_heads` divides `heads`.
    bias: as in `nnx.dot_product_attention`, like all that follow.
    mask: not 0 where a query may look at a key.
    broadcast_dropout: whether all heads and elements of the batch drop the same weights.
    dropout_rng: a key for dropout.
    dropout_rate: the probability that a weight is dropped.
    deterministic: whether to drop none.
    dtype: what to compute in.
    precision: of the product.
    module: the weights before dropout are kept in it as `attention_weights`.
    promote_dtype: as in `nnx.Linear`.
    is_causal: whether query i may look at keys 0 to i only.

  Returns:
    `[batch..., heads, queries, keys]`; without dropout the last axis sums to 1.

  Raises:
    ShapeMismatchError: shapes do not fit.
    MissingRngError: there is dropout and no `dropout_rng`.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> x = jnp.ones((2, 1, 8))
  >>> nnx.dot_product_attention_weights(x, x, is_causal=True).tolist()
  [[[1.0, 0.0], [0.5, 0.5]]]
  """
  query, key = promote_dtype(_inputs(query, key), dtype=dtype)
  check_shapes(query, key, key)
  bias, mask = _extras(query, key, bias, mask)
  dropped = dropout_rate > 0 and not deterministic
  if dropped and dropout_rng is None:
    raise MissingRngError(
      "attention with dropout needs random numbers",
      got="dropout_rng=None",
      fix="pass dropout_rng=jax.random.key(0), or deterministic=True",
    )

  def normalized(query: jax.Array, key: jax.Array, bias: Any, mask: Any) -> jax.Array:
    logits = _masked_logits(query, key, bias, mask, is_causal, precision)
    return jax.nn.softmax(logits).astype(query.dtype)

  out = lambda: _weights_names(query, key)
  weights = explicit.call(normalized, query, key, bias, mask, out=out)
  if module is not None:
    module.sow(Intermediate, "attention_weights", weights)
  drop = lambda weights, key: _drop(weights, key, dropout_rate, broadcast_dropout)
  return explicit.call_like(drop, weights, dropout_rng) if dropped else weights


def _inputs(*xs: ArrayLike) -> tuple[jax.Array, ...]:
  return tuple(map(check.as_input, xs))


def _extras(query: jax.Array, key: jax.Array, bias: Any, mask: Any) -> tuple[Any, Any]:
  """Bias and mask as arrays that broadcast to the weights."""
  shape = _weights_shape(query, key)
  return check_extra("bias", bias, shape), check_extra("mask", mask, shape, bool)


def check_extra(name: str, x: Any, shape: tuple[int, ...], dtype: Any = None) -> Any:
  """A bias or mask as an array; raises ShapeMismatchError if it does not broadcast to `shape`."""
  if x is None:
    return None
  x = check.as_input(x)
  lead = len(shape) - x.ndim
  if lead < 0 or any(m not in (1, n) for m, n in zip(x.shape, shape[lead:], strict=True)):
    raise ShapeMismatchError(
      f"the {name} of attention has to broadcast to (batch..., heads, queries, keys)",
      got=f"a {name} of shape {x.shape} for weights of shape {shape}",
      fix=f"give it axes of size 1 where it is to be repeated: {name}[:, None]",
    )
  return x if dtype is None else x.astype(dtype)


def _weights_shape(query: jax.Array, key: jax.Array) -> tuple[int, ...]:
  *batch, queries, heads, _ = query.shape
  return (*batch, heads, queries, key.shape[-3])


def _weights_names(query: jax.Array, key: jax.Array) -> explicit.Names:
  """How weights are split, in a mesh with explicit axes."""
  *batch, queries, heads, _ = explicit.names(query)
  return [*batch, heads, queries, explicit.names(key)[-3]]


def _mean_names(query: jax.Array, value: jax.Array) -> explicit.Names:
  """The same of means of values."""
  return [*explicit.names(query)[:-1], explicit.names(value)[-1]]


def _fused(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  bias: Any,
  mask: Any,
  is_causal: bool,
  how: Any,
) -> jax.Array:
  """`jax.nn.dot_product_attention`, which knows one axis of the batch."""
  batch = query.shape[:-3]
  flat = lambda x: x.reshape(math.prod(batch), *x.shape[-3:])

  def extra(x: Any) -> Any:
    if x is None:
      return None
    x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
    if all(n == 1 for n in x.shape[:-3]):  # stays small, where all of the batch share it
      return x.reshape(1, *x.shape[-3:])
    return flat(jnp.broadcast_to(x, batch + x.shape[-3:]))

  out = jax.nn.dot_product_attention(
    flat(query),
    flat(key),
    flat(value),
    extra(bias),
    extra(mask),
    is_causal=is_causal,
    implementation=how,
  )
  return out.reshape(query.shape)


def _masked_logits(
  query: jax.Array, key: jax.Array, bias: Any, mask: Any, is_causal: bool, precision: Any
) -> jax.Array:
  """Logits in float32 or better, far below 0 where a query may not look."""
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  *batch, queries, heads, size = query.shape
  groups = query.reshape(*batch, queries, key.shape[-2], heads // key.shape[-2], size)
  logits = jnp.einsum(
    "...qhgd,...khd->...hgqk", groups, key, precision=precision, preferred_element_type=dtype
  )
  logits = logits.reshape(_weights_shape(query, key)) / math.sqrt(size)
  if bias is not None:
    logits = (logits + bias).astype(dtype)
  if is_causal:
    causal = jnp.tri(*logits.shape[-2:], dtype=bool)
    mask = causal if mask is None else mask & causal
  if mask is not None:
    # Not -inf: where a query may look nowhere, softmax would be 0 / 0.
    logits = jnp.where(mask, logits, jnp.finfo(dtype).min / 2)
  return logits


def _drop(weights: jax.Array, key: Any, rate: float, broadcast: bool) -> jax.Array:
  """Set weights to zero at random, and scale the others so that the mean stays."""
  rate = float(rate)  # a NumPy scalar would decide on the dtype
  if rate >= 1:  # 0 / 0 where the kept ones are scaled
    return jnp.zeros_like(weights)
  lead = weights.ndim - 2
  shape = (1,) * lead + weights.shape[-2:] if broadcast else weights.shape
  keep = jax.random.bernoulli(key, 1 - rate, shape)
  return jnp.where(keep, dtypes.divided(weights, 1 - rate), 0)


def check_shapes(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
  """Raise ShapeMismatchError unless attention can be computed with these."""
  shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
  if min(query.ndim, key.ndim, value.ndim) < 3 or not query.ndim == key.ndim == value.ndim:
    fix = "pass three arrays of shape (batch..., length, heads, size), with equally many axes"
  elif not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
    fix = "give them the same axes of the batch; jnp.broadcast_to repeats one"
  elif key.shape[:-1] != value.shape[:-1]:
    fix = "give key and value the same length and the same heads"
  elif query.shape[-1] != key.shape[-1]:
    fix = "give query and key the same size"
  elif key.shape[-2] == 0 or query.shape[-2] % key.shape[-2]:
    fix = "let the number of heads of the key divide that of the query"
  else:
    return
  raise ShapeMismatchError("attention cannot compare these queries and keys", got=shapes, fix=fix)


def check_implementation(implementation: Any, fused: bool) -> None:
  """Raise InvalidArgumentError unless the call can be done with this implementation."""
  layer, name = "dot_product_attention", "implementation"
  if implementation not in (None, "xla", "cudnn"):
    raise InvalidArgumentError.value(layer, name, implementation, "'xla', 'cudnn' or None")
  if implementation == "cudnn" and not fused:
    raise InvalidArgumentError.value(
      layer,
      name,
      implementation,
      "None: jax.nn has cuDNN without dropout, weights, precision, float64 and other value sizes",
    )
