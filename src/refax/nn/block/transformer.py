"""The transformer: blocks of attention and a feed-forward network, and stacks of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from refax.core.containers import List
from refax.core.module import Module
from refax.errors import InvalidArgumentError, ShapeMismatchError
from refax.nn import check, explicit, initializers
from refax.nn.activations import gelu
from refax.nn.attention.dot_product import Implementation
from refax.nn.attention.multi_head import MultiHeadAttention
from refax.nn.attention.rope import RoPE
from refax.nn.block.stack import Stack
from refax.nn.dropout import Dropout
from refax.nn.linear.linear import Linear
from refax.nn.norm.layer_norm import LayerNorm
from refax.rngs import Rngs
from refax.transforms.mapping import vmap
from refax.transforms.remat import remat
from refax.typing import ArrayLike, Dtype, Initializer

Activation = Callable[[jax.Array], jax.Array]


class FeedForward(Module):
  """Two affine maps with an activation between them, of each vector by itself.

  Args:
    features: size of the last axis of input and output.
    hidden_features: size between the maps; by default four times `features`.
    activation: a function of arrays.
    gated: whether the activation is multiplied with a third map, `activation(gate(x)) * up(x)`,
      as in "GLU Variants Improve Transformer", Shazeer 2020, arXiv:2002.05202.
    dropout_rate: the probability that an element between the maps is set to zero.
    use_bias: whether the maps add biases.
    dtype: what to compute in; by default what input and parameters promote to.
    param_dtype: the dtype of the parameters.
    kernel_init: initializer of the kernels.
    rngs: the stream `params` initialises the parameters, `dropout` is forked.

  Raises:
    InvalidArgumentError: a size is not a positive int, or `rngs` is not an `nnx.Rngs`.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> layer = nnx.FeedForward(4, activation=nnx.silu, gated=True, rngs=nnx.Rngs(0))
  >>> layer(jnp.ones((2, 3, 4))).shape, layer.up.kernel.shape
  ((2, 3, 4), (4, 16))
  """

  def __init__(
    self,
    features: int,
    hidden_features: int | None = None,
    *,
    activation: Activation = gelu,
    gated: bool = False,
    dropout_rate: float = 0.0,
    use_bias: bool = True,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    kernel_init: Initializer = initializers.default_kernel_init,
    rngs: Rngs,
  ):
    features = check.size("FeedForward", "features", features)
    hidden = 4 * features if hidden_features is None else hidden_features
    hidden = check.size("FeedForward", "hidden_features", hidden)
    options: dict[str, Any] = {
      "use_bias": use_bias,
      "dtype": dtype,
      "param_dtype": param_dtype,
      "kernel_init": kernel_init,
      "rngs": check.streams("FeedForward", rngs),
    }
    self.features = features
    self.up = Linear(features, hidden, **options)
    self.gate: Linear | None = Linear(features, hidden, **options) if gated else None
    self.down = Linear(hidden, features, **options)
    self.activation = activation
    self.dropout: Dropout | None = Dropout(dropout_rate, rngs=rngs) if dropout_rate else None

  def __call__(
    self, x: Shaped[ArrayLike, "*batch features"]
  ) -> Shaped[jax.Array, "*batch features"]:
    """Map the last axis.

    Args:
      x: `[..., features]`.

    Returns:
      `[..., features]`.

    Raises:
      ShapeMismatchError: the last axis has another size.
    """
    x = check.as_input(x)
    check.last_axis("FeedForward", x, self.features, getattr(self.up, "kernel", None))
    up = self.up(x)
    hidden = self.activation(up) if self.gate is None else self.activation(self.gate(x)) * up
    return self.down(hidden if self.dropout is None else self.dropout(hidden))


class TransformerBlock(Module):
  """Self-attention, attention to a context if there is one, and a feed-forward network.

  Each is a residual step: with `pre_norm` `x + f(norm(x))`, which trains deep stacks without
  warm-up (arXiv:2002.04745), else `norm(x + f(x))` as in "Attention Is All You Need", Vaswani et
  al. 2017, arXiv:1706.03762.

  Args:
    features: size of the last axis of input and output.
    num_heads: how many heads attention has.
    hidden_features: of the feed-forward network; by default four times `features`.
    num_kv_heads: how many heads keys and values have; by default `num_heads`.
    context_features: size of the last axis of the context; None for a block without one.
    activation: of the feed-forward network.
    gated: whether the feed-forward network is gated, see `nnx.FeedForward`.
    norm: called as `norm(features, dtype=, param_dtype=, rngs=)`.
    pre_norm: whether to normalize what goes into a step, or else what comes out of the sum.
    is_causal: whether each position attends to itself and earlier ones only.
    dropout_rate: the probability that an element of what a step adds is set to zero.
    attention_dropout_rate: the probability that a weight of attention is; by default the same.
    use_bias: whether the linear maps add biases.
    rope: rotates queries and keys of self-attention by their positions.
    sliding_window: how many positions a query of self-attention sees, its own and those before it;
      None for all.
    dtype: what to compute in; by default what input and parameters promote to.
    param_dtype: the dtype of the parameters.
    kernel_init: initializer of the kernels.
    implementation: of attention, as in `nnx.dot_product_attention`.
    rngs: the stream `params` initialises the parameters, `dropout` is forked.

  Raises:
    InvalidArgumentError: sizes do not divide, or an argument makes no sense.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> block = nnx.TransformerBlock(8, num_heads=2, is_causal=True, rngs=nnx.Rngs(0))
  >>> block(jnp.ones((2, 5, 8))).shape
  (2, 5, 8)
  """

  def __init__(
    self,
    features: int,
    num_heads: int,
    *,
    hidden_features: int | None = None,
    num_kv_heads: int | None = None,
    context_features: int | None = None,
    activation: Activation = gelu,
    gated: bool = False,
    norm: Callable[..., Any] = LayerNorm,
    pre_norm: bool = True,
    is_causal: bool = False,
    dropout_rate: float = 0.0,
    attention_dropout_rate: float | None = None,
    use_bias: bool = True,
    rope: RoPE | None = None,
    sliding_window: int | None = None,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    kernel_init: Initializer = initializers.default_kernel_init,
    implementation: Implementation | None = None,
    rngs: Rngs,
  ):
    types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    common: dict[str, Any] = {"use_bias": use_bias, "kernel_init": kernel_init, **types}
    weights_rate = dropout_rate if attention_dropout_rate is None else attention_dropout_rate
    attention = lambda **kwargs: MultiHeadAttention(
      num_heads,
      features,
      num_kv_heads=num_kv_heads,
      dropout_rate=weights_rate,
      deterministic=False,
      implementation=implementation,
      **common,
      **kwargs,
    )
    self.attention = attention(rope=rope, sliding_window=sliding_window)
    self.attention_norm = norm(features, **types)
    self.cross_attention: MultiHeadAttention | None = None
    self.cross_norm: Any = None
    if context_features is not None:
      self.cross_attention = attention(in_kv_features=context_features)
      self.cross_norm = norm(features, **types)
    self.feed_forward = FeedForward(
      features, hidden_features, activation=activation, gated=gated, **common
    )
    self.feed_forward_norm = norm(features, **types)
    self.dropout: Dropout | None = Dropout(dropout_rate, rngs=rngs) if dropout_rate else None
    self.pre_norm = pre_norm
    self.is_causal = is_causal

  def __call__(
    self,
    x: Shaped[ArrayLike, "*batch length features"],
    context: Shaped[ArrayLike, "*batch context_length context_features"] | None = None,
    *,
    mask: ArrayLike | None = None,
    context_mask: ArrayLike | None = None,
    decode: bool | None = None,
  ) -> Shaped[jax.Array, "*batch length features"]:
    """Apply the block.

    Args:
      x: `[batch..., length, features]`.
      context: `[batch..., context_length, context_features]`, if the block was built for one.
      mask: not 0 where a position may attend to another; broadcasts to
        `[batch..., num_heads, length, length]`.
      context_mask: the same for the context, `[batch..., num_heads, length, context_length]`.
      decode: whether `x` continues what is in the memory that `init_cache` made.

    Returns:
      `[batch..., length, features]`.

    Raises:
      ShapeMismatchError: shapes do not fit.
      InvalidArgumentError: there is a context and the block was built for none, or the reverse.
    """
    x = check.as_input(x)
    self._check(x, context)
    attend = lambda y: self.attention(
      y, mask=mask, decode=decode, is_causal=self.is_causal and not decode
    )
    x = self._add(x, attend, self.attention_norm)
    if (cross := self.cross_attention) is not None:
      look = lambda y: cross(y, context, mask=context_mask)
      x = self._add(x, look, self.cross_norm)
    return self._add(x, self.feed_forward, self.feed_forward_norm)

  def init_cache(
    self, input_shape: tuple[int, ...], dtype: Dtype = jnp.float32, **options: Any
  ) -> None:
    """Make an empty memory of keys and values, as `nnx.MultiHeadAttention.init_cache`.

    Args:
      input_shape: `(batch..., max_length, features)`.
      dtype: the dtype of keys and values in the memory.
      **options: `per_sequence` and `spare`, as there.

    Raises:
      ShapeMismatchError: `input_shape` has less than two sizes.
    """
    self.attention.init_cache(input_shape, dtype, **options)

  def _check(self, x: jax.Array, context: Any) -> None:
    features = self.feed_forward.features
    if x.ndim < 2 or x.shape[-1] != features:
      raise ShapeMismatchError(
        f"TransformerBlock takes inputs of shape (..., length, {features})",
        at=check.origin(getattr(self.attention.query, "kernel", None)),
        got=f"an input of shape {x.shape}",
        fix=f"make the last axis {features}, or build the block with the input's size",
      )
    if (context is None) != (self.cross_attention is None):
      want = "a context, it was built with context_features" if context is None else "no context"
      raise InvalidArgumentError.value(
        "TransformerBlock", "context", None if context is None else jnp.shape(context), want
      )

  def _add(self, x: jax.Array, step: Callable[[jax.Array], jax.Array], norm: Any) -> jax.Array:
    y = step(norm(x) if self.pre_norm else x)
    y = explicit.add(x, y if self.dropout is None else self.dropout(y))
    return y if self.pre_norm else norm(y)


class TransformerEncoder(Module):
  """A stack of `TransformerBlock`s over a whole sequence.

  Args:
    num_layers: how many blocks.
    features: size of the last axis of input and output.
    num_heads: how many heads attention has.
    final_norm: whether to normalize the output; by default as `pre_norm` says, for blocks that
      normalize their inputs leave their outputs as they are.
    remat: whether to recompute blocks in the backward pass, see `nnx.Stack`.
    policy: with `remat`, what to keep all the same.
    scan_layers: whether the blocks are a `nnx.Stack`, compiled once for all; or else a `nnx.List`,
      each compiled by itself. A list takes longer to compile, and decodes faster: a scan copies the
      weights of a layer before it uses them, where one position at a time does little else.
    rngs: the stream `params` initialises the parameters, `dropout` is forked.
    **kwargs: options of `nnx.TransformerBlock`.

  Raises:
    InvalidArgumentError: sizes do not divide, or an argument makes no sense.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> encoder = nnx.TransformerEncoder(6, 8, num_heads=2, dropout_rate=0.1, rngs=nnx.Rngs(0))
  >>> encoder(jnp.ones((2, 5, 8))).shape
  (2, 5, 8)
  >>> encoder.blocks[0].attention.num_heads
  2
  """

  is_causal = False

  def __init__(
    self,
    num_layers: int,
    features: int,
    num_heads: int,
    *,
    final_norm: bool | None = None,
    remat: bool = False,
    policy: Callable[..., bool] | None = None,
    scan_layers: bool = True,
    rngs: Rngs,
    **kwargs: Any,
  ):
    kwargs = {"is_causal": self.is_causal} | kwargs
    self.blocks: Stack | List
    if scan_layers:
      options = {"rngs": rngs, "remat": remat, "policy": policy}
      self.blocks = Stack(TransformerBlock, num_layers, features, num_heads, **options, **kwargs)
    else:
      num_layers = check.size(type(self).__name__, "num_layers", num_layers)
      block = lambda: TransformerBlock(features, num_heads, rngs=rngs, **kwargs)
      self.blocks = List(block() for _ in range(num_layers))
    self.remat = remat
    self.policy = policy
    types = {name: kwargs[name] for name in ("dtype", "param_dtype") if name in kwargs}
    norm = kwargs.get("norm", LayerNorm)
    wanted = kwargs.get("pre_norm", True) if final_norm is None else final_norm
    self.norm: Any = norm(features, rngs=rngs, **types) if wanted else None

  def __call__(
    self,
    x: Shaped[ArrayLike, "*batch length features"],
    context: Shaped[ArrayLike, "*batch context_length context_features"] | None = None,
    *,
    mask: ArrayLike | None = None,
    context_mask: ArrayLike | None = None,
    decode: bool | None = None,
  ) -> Shaped[jax.Array, "*batch length features"]:
    """Apply the blocks; arguments and result are those of `nnx.TransformerBlock`."""
    options = {"mask": mask, "context_mask": context_mask, "decode": decode}
    x = check.as_input(x)
    if isinstance(self.blocks, Stack):
      x = self.blocks(x, context, **options)
    else:
      call = lambda block, x: block(x, context, **options)
      call = remat(call, policy=self.policy) if self.remat and not decode else call
      for block in self.blocks:
        x = call(block, x)
    return x if self.norm is None else self.norm(x)


class TransformerDecoder(TransformerEncoder):
  """A `TransformerEncoder` whose positions attend to earlier ones only, and that decodes.

  With `context_features` it attends to an encoder's output as well.

  Args:
    num_layers: how many blocks.
    features: size of the last axis of input and output.
    num_heads: how many heads attention has.
    **kwargs: as in `nnx.TransformerEncoder`.

  >>> from refax import nnx; import jax, jax.numpy as jnp
  >>> decoder = nnx.TransformerDecoder(2, 8, num_heads=2, rope=nnx.RoPE(), rngs=nnx.Rngs(0))
  >>> x = jax.random.normal(jax.random.key(0), (1, 5, 8))
  >>> decoder.init_cache((1, 5, 8))
  >>> step = jax.jit(lambda decoder, x: decoder(x, decode=True))
  >>> steps = [step(decoder, x[:, i : i + 1]) for i in range(5)]
  >>> bool(jnp.allclose(jnp.concatenate(steps, 1), decoder(x), atol=1e-5))
  True
  """

  is_causal = True

  def init_cache(
    self, input_shape: tuple[int, ...], dtype: Dtype = jnp.float32, **options: Any
  ) -> None:
    """Make an empty memory of keys and values in each block.

    Args:
      input_shape: `(batch..., max_length, features)`.
      dtype: the dtype of keys and values in the memory.
      **options: `per_sequence` and `spare`, as in `nnx.MultiHeadAttention.init_cache`.

    Raises:
      ShapeMismatchError: `input_shape` has less than two sizes.
    """
    make = lambda block: block.init_cache(input_shape, dtype, **options)
    if isinstance(self.blocks, Stack):
      vmap(make)(self.blocks.layers)
    else:
      for block in self.blocks:
        make(block)
