"""Multi-head attention, with a memory of keys and values for decoding step by step."""

from collections.abc import Callable, Mapping
from numbers import Real
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from refax.core.module import Module
from refax.core.variable import Cache
from refax.errors import (
  InvalidArgumentError,
  MissingArgumentError,
  MissingRngError,
  ShapeMismatchError,
)
from refax.nn import check, dtypes, explicit, initializers
from refax.nn.attention.dot_product import (
  Implementation,
  check_extra,
  check_implementation,
  check_shapes,
  dot_product_attention,
)
from refax.nn.attention.kv_cache import Memory, poisoned
from refax.nn.attention.rope import RoPE
from refax.nn.linear.linear import LinearGeneral
from refax.nn.norm.layer_norm import LayerNorm
from refax.rngs import Rngs, RngStream
from refax.typing import ArrayLike, Dtype, Initializer, PrecisionLike, describe

_NAME = "MultiHeadAttention"
_NONE: Mapping[str, Any] = MappingProxyType({})


class MultiHeadAttention(Module):
  """Attention of several heads, each with projections of its own (arXiv:1706.03762).

  With `decode`, keys and values of earlier calls are remembered: `init_cache` makes the memory, and
  each call adds the next positions, one or many, and looks at all that it has seen.

  Args:
    num_heads: how many heads queries have.
    in_features: size of the last axis of the input of the queries.
    qkv_features: size of all heads together; by default `in_features`.
    out_features: size of the last axis of the output; by default `in_features`.
    num_kv_heads: how many heads keys and values have; by default `num_heads`, of which it is a
      divisor: each serves neighbouring heads of queries (arXiv:2305.13245).
    in_kv_features: size of the last axis of the input of keys and values; by default `in_features`.
    dtype: what to compute in; by default what inputs and parameters promote to.
    param_dtype: the dtype of the parameters.
    broadcast_dropout: whether all heads and elements of the batch drop the same weights.
    dropout_rate: the probability that a weight is dropped.
    deterministic: whether to drop none; None to be told at each call, if there is dropout.
    precision: of all products, as in `jax.lax.dot_general`.
    kernel_init: initializer of the kernels of `query`, `key`, `value`, and of `out`.
    out_kernel_init: initializer of the kernel of `out`, if not None.
    bias_init: initializer of the biases.
    out_bias_init: initializer of the bias of `out`, if not None.
    use_bias: whether the projections add a bias.
    attention_fn: called as `nnx.dot_product_attention`.
    decode: whether to use the memory; None as False, or to be told at each call.
    normalize_qk: whether queries and keys are normalized (arXiv:2302.05442).
    qkv_promote_dtype: as in `nnx.Linear`, of `query`, `key` and `value`.
    out_promote_dtype: as in `nnx.Linear`, of `out`.
    ln_promote_dtype: as in `nnx.LayerNorm`, of what normalizes queries and keys.
    qkv_dot_general: the product of `query`, `key` and `value`.
    out_dot_general: the product of `out`.
    qkv_dot_general_cls: a function that makes `qkv_dot_general`; goes before it.
    out_dot_general_cls: a function that makes `out_dot_general`; goes before it.
    rngs: the stream `params` initialises the parameters.
    keep_rngs: whether to fork the stream `dropout`, if there is dropout.
    kernel_metadata: metadata of the kernels, and of that of `out`.
    out_kernel_metadata: metadata of the kernel of `out`, if not empty.
    bias_metadata: metadata of the biases.
    out_bias_metadata: metadata of the bias of `out`, if not empty.
    query_ln_scale_metadata: metadata of the scale of the queries' normalization.
    key_ln_scale_metadata: metadata of the scale of the keys' normalization.
    rope: rotates queries and keys, after they are normalized; while decoding, by their position
      in the memory.
    implementation: as in `nnx.dot_product_attention`.
    sliding_window: how many positions a query of self-attention sees, its own and those before it;
      None for all. The memory for decoding is then a ring of so many, and is never full.
    num_key_value_heads: another name of `num_kv_heads`, that of published configurations.

  Raises:
    InvalidArgumentError: sizes do not divide, or an argument makes no sense.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> layer = nnx.MultiHeadAttention(num_heads=4, in_features=8, rngs=nnx.Rngs(0))
  >>> x = jnp.ones((2, 5, 8))
  >>> layer(x).shape, layer(x, jnp.ones((2, 7, 8))).shape
  ((2, 5, 8), (2, 5, 8))
  >>> layer.init_cache((2, 5, 8))
  >>> steps = [layer(x[:, i : i + 1], decode=True) for i in range(5)]
  >>> bool(jnp.allclose(jnp.concatenate(steps, 1), layer(x, is_causal=True), atol=1e-6))
  True
  """

  def __init__(
    self,
    num_heads: int,
    in_features: int,
    qkv_features: int | None = None,
    out_features: int | None = None,
    num_kv_heads: int | None = None,
    in_kv_features: int | None = None,
    *,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    broadcast_dropout: bool = True,
    dropout_rate: float = 0.0,
    deterministic: bool | None = None,
    precision: PrecisionLike = None,
    kernel_init: Initializer = initializers.default_kernel_init,
    out_kernel_init: Initializer | None = None,
    bias_init: Initializer = initializers.zeros,
    out_bias_init: Initializer | None = None,
    use_bias: bool = True,
    attention_fn: Callable[..., jax.Array] = dot_product_attention,
    decode: bool | None = None,
    normalize_qk: bool = False,
    qkv_promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    out_promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    ln_promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    qkv_dot_general: Callable[..., jax.Array] | None = None,
    out_dot_general: Callable[..., jax.Array] | None = None,
    qkv_dot_general_cls: Callable[[], Callable[..., jax.Array]] | None = None,
    out_dot_general_cls: Callable[[], Callable[..., jax.Array]] | None = None,
    rngs: Rngs,
    keep_rngs: bool = True,
    kernel_metadata: Mapping[str, Any] = _NONE,
    out_kernel_metadata: Mapping[str, Any] = _NONE,
    bias_metadata: Mapping[str, Any] = _NONE,
    out_bias_metadata: Mapping[str, Any] = _NONE,
    query_ln_scale_metadata: Mapping[str, Any] = _NONE,
    key_ln_scale_metadata: Mapping[str, Any] = _NONE,
    rope: RoPE | None = None,
    implementation: Implementation | None = None,
    sliding_window: int | None = None,
    num_key_value_heads: int | None = None,
  ):
    if num_key_value_heads is not None:
      if num_kv_heads not in (None, num_key_value_heads):
        want = f"one of num_key_value_heads and num_kv_heads={num_kv_heads}, which are the same"
        raise InvalidArgumentError.value(_NAME, "num_key_value_heads", num_key_value_heads, want)
      num_kv_heads = num_key_value_heads
    self._set_sizes(
      num_heads, in_features, qkv_features, out_features, num_kv_heads, in_kv_features
    )
    if not isinstance(dropout_rate, Real) or not 0 <= dropout_rate <= 1:
      want = "a number from 0 to 1"
      raise InvalidArgumentError.value(_NAME, "dropout_rate", dropout_rate, want)
    if rope is not None and not isinstance(rope, RoPE):
      raise InvalidArgumentError.value(_NAME, "rope", rope, "an nnx.RoPE")
    rngs = check.streams(_NAME, rngs)
    common = {
      "use_bias": use_bias,
      "dtype": dtype,
      "param_dtype": param_dtype,
      "precision": precision,
      "rngs": rngs,
    }
    inner = common | {
      "kernel_init": kernel_init,
      "bias_init": bias_init,
      "promote_dtype": qkv_promote_dtype,
      "dot_general": qkv_dot_general,
      "dot_general_cls": qkv_dot_general_cls,
      "kernel_metadata": kernel_metadata,
      "bias_metadata": bias_metadata,
    }
    self.query = LinearGeneral(self.in_features, (self.num_heads, self.head_dim), **inner)
    self.key = LinearGeneral(self.in_kv_features, (self.num_kv_heads, self.head_dim), **inner)
    self.value = LinearGeneral(self.in_kv_features, (self.num_kv_heads, self.head_dim), **inner)
    self.query_ln: LayerNorm | None = None
    self.key_ln: LayerNorm | None = None
    if normalize_qk:
      norm = lambda metadata: LayerNorm(
        self.head_dim,
        use_bias=False,
        dtype=dtype,
        param_dtype=param_dtype,
        promote_dtype=ln_promote_dtype,
        rngs=rngs,
        scale_metadata=metadata,
      )
      self.query_ln, self.key_ln = norm(query_ln_scale_metadata), norm(key_ln_scale_metadata)
    self.out = LinearGeneral(
      (self.num_heads, self.head_dim),
      self.out_features,
      axis=(-2, -1),
      kernel_init=out_kernel_init or kernel_init,
      bias_init=out_bias_init or bias_init,
      promote_dtype=out_promote_dtype,
      dot_general=out_dot_general,
      dot_general_cls=out_dot_general_cls,
      kernel_metadata=out_kernel_metadata or kernel_metadata,
      bias_metadata=out_bias_metadata or bias_metadata,
      **common,
    )
    keep = keep_rngs and dropout_rate > 0
    self.rngs: RngStream | None = rngs["dropout"].fork() if keep else None
    self.cached_key: Cache[jax.Array] | None = None
    self.cached_value: Cache[jax.Array] | None = None
    self.cache_index: Cache[jax.Array] | None = None
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.broadcast_dropout = broadcast_dropout
    self.dropout_rate = dropout_rate
    self.deterministic = deterministic
    self.precision = precision
    self.use_bias = use_bias
    self.attention_fn = attention_fn
    self.decode = decode
    self.normalize_qk = normalize_qk
    self.rope = rope
    self.implementation: Implementation | None = implementation
    self.sliding_window = sliding_window
    if sliding_window is not None:
      self.sliding_window = check.size(_NAME, "sliding_window", sliding_window)

  def _set_sizes(
    self,
    num_heads: int,
    in_features: int,
    qkv_features: int | None,
    out_features: int | None,
    num_kv_heads: int | None,
    in_kv_features: int | None,
  ) -> None:
    """Fill in the sizes that were not given, and check that they divide."""
    size = lambda name, value, default: check.size(_NAME, name, default if value is None else value)
    self.num_heads = size("num_heads", num_heads, None)
    self.in_features = size("in_features", in_features, None)
    self.qkv_features = size("qkv_features", qkv_features, in_features)
    self.out_features = size("out_features", out_features, in_features)
    self.num_kv_heads = size("num_kv_heads", num_kv_heads, num_heads)
    self.in_kv_features = size("in_kv_features", in_kv_features, in_features)
    if self.qkv_features % self.num_heads:
      want = f"a multiple of num_heads={self.num_heads}"
      raise InvalidArgumentError.value(_NAME, "qkv_features", self.qkv_features, want)
    if self.num_heads % self.num_kv_heads:
      want = f"a divisor of num_heads={self.num_heads}"
      raise InvalidArgumentError.value(_NAME, "num_kv_heads", self.num_kv_heads, want)
    self.head_dim = self.qkv_features // self.num_heads

  def __call__(
    self,
    inputs_q: Shaped[ArrayLike, "*batch queries in_features"],
    inputs_k: Shaped[ArrayLike, "*batch keys in_kv_features"] | None = None,
    inputs_v: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    deterministic: bool | None = None,
    rngs: Rngs | RngStream | None = None,
    sow_weights: bool = False,
    decode: bool | None = None,
    is_causal: bool = False,
    out_sharding: Any = None,
    qkv_sharding: Any = None,
    input_positions: ArrayLike | None = None,
  ) -> Shaped[jax.Array, "*batch queries {self.out_features}"]:
    """Attend.

    Args:
      inputs_q: of the queries, `[batch..., queries, in_features]`.
      inputs_k: of the keys, `[batch..., keys, in_kv_features]`; None for `inputs_q`.
      inputs_v: of the values, `[batch..., keys, in_kv_features]`; None for `inputs_k`.
      mask: not 0 where a query may look at a key; broadcasts to
        `[batch..., num_heads, queries, keys]`. While decoding there are as many keys as the memory
        holds.
      deterministic: goes before the attribute, if not None.
      rngs: streams for dropout; they go before the layer's own stream, if not None.
      sow_weights: whether to keep the weights as `attention_weights`, by `Module.sow`.
      decode: goes before the attribute, if not None. Keys and values are added to the memory, and
        a query looks at all positions up to its own.
      is_causal: whether query i may look at keys 0 to i only; while decoding it may anyway.
      out_sharding: the sharding of the output, where the mesh has explicit axes.
      qkv_sharding: that of queries, keys and values.
      input_positions: `[batch..., length]`, for `rope`, or else for `attention_fn`; by default
        0, 1, 2 and so on, or what follows the memory.

    Returns:
      `[batch..., queries, out_features]`.

    Raises:
      ShapeMismatchError: shapes do not fit, or the memory is full. Inside a transform nothing can
        be raised: what has no room is left out of the memory, the output for it is NaN, and
        `nnx.checkify` names the layer.
      MissingArgumentError: there is dropout, and `deterministic` is None in both places; or there
        is no memory to decode with.
      MissingRngError: random numbers are needed and there is no stream.
      InvalidArgumentError: there are `inputs_v` and no `inputs_k`, or `rngs` is no stream.
    """
    decode = bool(self.decode if decode is None else decode)
    dropped = self._is_dropped(deterministic)
    stream = self._stream(rngs) if dropped else None
    expressible = not dropped and not sow_weights and self.precision is None
    check_implementation(self.implementation, expressible)
    query, key, value = self._project(inputs_q, inputs_k, inputs_v, qkv_sharding)
    memory = self._memory(query, key, value) if decode else None
    # All that may be wrong is found before the memory and the stream change.
    check_shapes(query, key, value)
    mask = self._mask(mask, query, key, memory)
    if self.rope is not None:
      if memory is not None and input_positions is None:
        input_positions = memory.next_positions(key.shape[-3])
      query = self.rope.rotate_heads(query, input_positions)
      key = self.rope.rotate_heads(key, input_positions)
      input_positions = None
    fits = None
    if memory is not None:
      fits = memory.fits(_NAME, key.shape[-3])
      key, value, visible = memory.add(key, value)
      mask = visible if mask is None else explicit.together(jnp.logical_and, visible, mask)
    out = self.attention_fn(
      query,
      key,
      value,
      mask=mask,
      dropout_rng=None if stream is None else stream(),
      dropout_rate=self.dropout_rate,
      broadcast_dropout=self.broadcast_dropout,
      deterministic=not dropped,
      dtype=self.dtype,
      precision=self.precision,
      module=self if sow_weights else None,
      # What other functions may not know is passed only where it is wanted.
      **({"is_causal": True} if is_causal and not decode else {}),
      **({} if self.implementation is None else {"implementation": self.implementation}),
      **({} if input_positions is None else {"input_positions": input_positions}),
    )
    return poisoned(self.out(out, out_sharding=out_sharding), fits)

  def init_cache(
    self,
    input_shape: tuple[int, ...],
    dtype: Dtype = jnp.float32,
    *,
    per_sequence: bool = False,
    spare: int = 0,
  ) -> None:
    """Make an empty memory for decoding: `cached_key`, `cached_value` and `cache_index`.

    Args:
      input_shape: the shape of the inputs, `(batch..., max_length, features)`.
      dtype: the dtype of keys and values in the memory.
      per_sequence: whether sequences of the batch are of different lengths: `cache_index` then has
        the shape `(batch...)`.
      spare: with `sliding_window`, how many positions more than the window the ring keeps, so that
        `nnx.truncate_cache` can take back so many.

    Raises:
      ShapeMismatchError: `input_shape` has less than two sizes.
    """
    if len(input_shape) < 2:
      raise ShapeMismatchError(
        f"the memory of {_NAME} has positions",
        got=f"input_shape={tuple(input_shape)}",
        fix="pass (batch..., max_length, features)",
      )
    shape = (*input_shape[:-1], self.num_kv_heads, self.head_dim)
    memory = Memory.empty(shape, dtype, self.sliding_window, per_sequence, spare)
    self.cached_key, self.cached_value, self.cache_index, _ = memory

  def truncate_cache(self, length: ArrayLike) -> None:
    """Forget all decoded positions but the first ones, in place.

    Args:
      length: how many stay: a number, or one for each sequence, `[batch...]`, of a memory that was
        made `per_sequence`.

    Raises:
      MissingArgumentError: there is no memory.
      InvalidArgumentError: there are not so many positions, or newer ones have taken their places
        in the ring of a `sliding_window`. Inside a transform nothing can be raised: what is
        computed from there on is NaN, and `nnx.checkify` names the layer.
    """
    self._own_memory().cut(_NAME, length)

  def set_view(
    self,
    deterministic: bool | None = None,
    decode: bool | None = None,
    batch_size: int | tuple[int, ...] | None = None,
    max_length: int | None = None,
  ) -> None:
    """What `nnx.view` sets.

    Args:
      deterministic: whether dropout is off.
      decode: whether calls decode step by step, from a memory.
      batch_size: the batch axes of a memory that is made.
      max_length: the positions of a memory that is made.

    Raises:
      MissingArgumentError: there is no memory for `decode`, and no sizes for one.
    """
    if deterministic is not None:
      self.deterministic = deterministic
    if decode is None:
      return
    self.decode = decode
    if self.cached_key is not None:
      return
    for name, size in (("batch_size", batch_size), ("max_length", max_length)):
      if size is None:
        raise MissingArgumentError.memory(_NAME, name)
    batch = (batch_size,) if isinstance(batch_size, int) else tuple(batch_size or ())
    self.init_cache((*batch, max_length or 0, 0), self.dtype or jnp.float32)

  def _project(self, inputs_q: Any, inputs_k: Any, inputs_v: Any, sharding: Any) -> list[jax.Array]:
    """Queries, keys and values, `[batch..., length, heads, size]`."""
    if inputs_k is None and inputs_v is not None:
      want = "them as inputs_k, which inputs_v follows, or pass both"
      raise InvalidArgumentError.value(_NAME, "inputs_v", describe(inputs_v), want)
    inputs_k = inputs_q if inputs_k is None else inputs_k
    inputs_v = inputs_k if inputs_v is None else inputs_v
    layers = {"inputs_q": self.query, "inputs_k": self.key, "inputs_v": self.value}
    inputs = [check.as_input(x) for x in (inputs_q, inputs_k, inputs_v)]
    for (name, layer), x in zip(layers.items(), inputs, strict=True):
      size = layer.in_features[0]
      if x.ndim < 2 or x.shape[-1] != size:
        raise ShapeMismatchError(
          f"{_NAME} maps {name} of shape (..., length, {size})",
          at=check.origin(getattr(layer, "kernel", None)),  # of a LoRA, there is none
          got=f"{name} of shape {x.shape}",
          fix=f"make the last axis {size}, or build {_NAME} with the input's size",
        )
    query, key, value = (
      layer(x, out_sharding=sharding) for layer, x in zip(layers.values(), inputs, strict=True)
    )
    if self.query_ln is not None and self.key_ln is not None:
      query, key = self.query_ln(query), self.key_ln(key)
    return [query, key, value]

  def _mask(self, mask: Any, query: jax.Array, key: jax.Array, memory: Memory | None) -> Any:
    """The mask of the call, with that of the sliding window where there is no memory."""
    if memory is not None and memory.is_ring and mask is not None:
      want = "None: the memory of a sliding window has no order that a mask could speak of"
      raise InvalidArgumentError.value(_NAME, "mask", describe(mask), want)
    keys = key.shape[-3] if memory is None else memory.slots
    queries = query.shape[-3]
    mask = check_extra("mask", mask, (*query.shape[:-3], self.num_heads, queries, keys))
    if self.sliding_window is None or memory is not None:
      return mask
    window = jnp.arange(keys) > jnp.arange(queries)[:, None] - self.sliding_window
    window = jnp.expand_dims(window, tuple(range(query.ndim - 2)))
    return window if mask is None else explicit.together(jnp.logical_and, window, mask)

  def _memory(self, query: jax.Array, key: jax.Array, value: jax.Array) -> Memory:
    """The memory, which has room for what was projected."""
    memory = self._own_memory()
    memory.check_room(_NAME, query, key, value)
    return memory

  def _own_memory(self) -> Memory:
    if self.cached_key is None or self.cached_value is None or self.cache_index is None:
      raise MissingArgumentError(
        f"{_NAME} has no memory to decode with",
        got="decode=True, before init_cache",
        fix="call layer.init_cache((batch, max_length, features)) first",
      )
    return Memory(self.cached_key, self.cached_value, self.cache_index, self.sliding_window)

  def _is_dropped(self, deterministic: bool | None) -> bool:
    """Whether weights are dropped in this call."""
    if self.dropout_rate == 0:
      return False
    deterministic = self.deterministic if deterministic is None else deterministic
    if deterministic is None:
      raise MissingArgumentError.flag(_NAME, "deterministic")
    return not deterministic

  def _stream(self, rngs: Any) -> RngStream:
    """The stream of dropout, from what came with the call or else the layer's own."""
    rngs = self.rngs if rngs is None else rngs
    if rngs is None:
      raise MissingRngError.layer(_NAME, "dropout")
    stream = rngs["dropout"] if isinstance(rngs, Rngs) else rngs
    if not isinstance(stream, RngStream):
      raise InvalidArgumentError.value(_NAME, "rngs", rngs, "rngs=nnx.Rngs(dropout=0)")
    return stream
