"""Every layer of `refax.nn` with inputs whose axes have names, for `test_meshes.py`.

An input is a shape written with one letter for each axis: `b` the batch, `s` a sequence or space,
`f` features, `h` heads, `-` an axis that is never sharded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refax import nnx

SIZES = {"b": 8, "s": 4, "f": 8, "h": 2, "-": 3}


class Case(NamedTuple):
  """A layer, made by `build(rngs)`, and how to call it."""

  build: Callable[[nnx.Rngs], Any]
  inputs: tuple[str, ...] = ("bsf",)
  call: Callable[..., Any] = lambda model, *xs: model(*xs)
  integers: bool = False
  differentiable: bool = True
  """Whether it may run inside `nnx.grad`: what decodes writes what is differentiated."""
  in_shards: bool = True
  """Whether it can be called with a shard of its inputs, in `jax.shard_map`."""
  is_random: bool = False
  """Whether it draws: each shard then draws the same, and not a part of what the whole would."""
  wrong: dict[str, str] = {}
  """Layouts in which XLA computes something else, for JAX's own functions too, and what."""


def arrays(case: Case) -> list[np.ndarray]:
  """The inputs of a case, the same ones each time."""
  draw = np.random.default_rng(0)
  shapes = [tuple(SIZES[letter] for letter in axes) for axes in case.inputs]
  if case.integers:
    return [draw.integers(0, 8, shape).astype(np.int32) for shape in shapes]
  return [draw.normal(size=shape).astype(np.float32) for shape in shapes]


class Function(nnx.Module):
  """A function with a scale before it, so that there is something to differentiate."""

  def __init__(self, fn: Callable[..., Any]):
    self.fn = fn
    self.scale = nnx.Param(jnp.full((), 0.7))

  def __call__(self, *xs: Any) -> Any:
    return self.fn(*(x * self.scale for x in xs))


def function(fn: Callable[..., Any], *inputs: str, **options: Any) -> Case:
  return Case(lambda rngs: Function(fn), inputs or ("bsf",), **options)


def attention(**options: Any) -> Callable[[nnx.Rngs], Any]:
  return lambda rngs: nnx.MultiHeadAttention(2, 8, rngs=rngs, **options)


def block(**options: Any) -> Callable[[nnx.Rngs], Any]:
  return lambda rngs: nnx.TransformerBlock(8, 2, hidden_features=16, rngs=rngs, **options)


def recurrent(cell: Any, **options: Any) -> Callable[[nnx.Rngs], Any]:
  return lambda rngs: nnx.RNN(cell(8, 8, rngs=rngs), **options)


def masked(model: Any, x: jax.Array) -> jax.Array:
  """Attention with all that makes masks, of what is no padding by the sum of its features."""
  kept = (jax.lax.stop_gradient(x).sum(-1) > -2).astype(jnp.float32)
  padding = nnx.make_attention_mask(kept, kept)
  return model(x, mask=nnx.combine_masks(nnx.make_causal_mask(kept), padding))


def remembering(build: Callable[[nnx.Rngs], Any]) -> Callable[[nnx.Rngs], Any]:
  """With a memory for decoding."""

  def built(rngs: nnx.Rngs) -> Any:
    model = build(rngs)
    model.init_cache((8, 4, 8))
    return model

  return built


def padded(model: Any, x: jax.Array) -> Any:
  """An RNN over sequences whose lengths are 1 or 3, as the sum of their elements says."""
  lengths = 1 + 2 * (jax.lax.stop_gradient(x).sum((1, 2)) > 0).astype(jnp.int32)
  return model(x, seq_lengths=lengths, return_carry=True)


def decoded(model: Any, x: jax.Array) -> jax.Array:
  return jnp.concatenate([model(x[:, i : i + 1], decode=True) for i in range(x.shape[1])], 1)


NORMS = {
  "BatchNorm": Case(lambda rngs: nnx.BatchNorm(8, momentum=0.5, rngs=rngs), in_shards=False),
  "BatchNorm, running": Case(lambda rngs: nnx.BatchNorm(8, use_running_average=True, rngs=rngs)),
  "BatchNorm, mask": Case(
    lambda rngs: nnx.BatchNorm(8, momentum=0.5, rngs=rngs),
    call=lambda model, x: model(x, mask=(x > 0).any(-1, keepdims=True)),
    in_shards=False,
  ),
  "LayerNorm": Case(lambda rngs: nnx.LayerNorm(8, rngs=rngs)),
  "LayerNorm, mask": Case(
    lambda rngs: nnx.LayerNorm(8, use_fast_variance=False, rngs=rngs),
    call=lambda model, x: model(x, mask=x > -1),
  ),
  "RMSNorm": Case(lambda rngs: nnx.RMSNorm(8, rngs=rngs)),
  "GroupNorm": Case(lambda rngs: nnx.GroupNorm(8, num_groups=4, rngs=rngs)),
  "GroupNorm, mask": Case(
    lambda rngs: nnx.GroupNorm(8, num_groups=2, rngs=rngs),
    call=lambda model, x: model(x, mask=x > -1),
  ),
  "InstanceNorm": Case(lambda rngs: nnx.InstanceNorm(8, rngs=rngs)),
  "WeightNorm": Case(lambda rngs: nnx.WeightNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs)),
  "SpectralNorm": Case(lambda rngs: nnx.SpectralNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs)),
  "SpectralNorm of Conv": Case(
    lambda rngs: nnx.SpectralNorm(nnx.Conv(8, 8, 3, rngs=rngs), rngs=rngs)
  ),
}

PRODUCTS = {
  "Linear": Case(lambda rngs: nnx.Linear(8, 8, rngs=rngs)),
  "Linear, no axis of the batch": Case(
    lambda rngs: nnx.Linear(8, 8, rngs=rngs), ("f",), in_shards=False
  ),
  "LinearGeneral": Case(lambda rngs: nnx.LinearGeneral(8, (2, 4), rngs=rngs)),
  "LinearGeneral, two axes": Case(
    lambda rngs: nnx.LinearGeneral((4, 8), (2, 4), axis=(-2, -1), rngs=rngs)
  ),
  "LinearGeneral, batch axis": Case(
    lambda rngs: nnx.LinearGeneral(8, 4, batch_axis={0: 8}, rngs=rngs), in_shards=False
  ),
  "Einsum": Case(lambda rngs: nnx.Einsum("bsf,fhd->bshd", (8, 2, 4), (2, 4), rngs=rngs)),
  "Einsum, ellipsis": Case(lambda rngs: nnx.Einsum("...f,fd->...d", (8, 8), rngs=rngs)),
  "LoRA": Case(lambda rngs: nnx.LoRA(8, 2, 8, b_initializer=nnx.initializers.normal(), rngs=rngs)),
  "LoRALinear": Case(
    lambda rngs: nnx.LoRALinear(
      8, 8, lora_rank=2, b_initializer=nnx.initializers.normal(), rngs=rngs
    )
  ),
  "Embed": Case(lambda rngs: nnx.Embed(8, 8, rngs=rngs), ("bs",), integers=True),
  "Embed.attend": Case(
    lambda rngs: nnx.Embed(16, 8, rngs=rngs), call=lambda model, x: model.attend(x)
  ),
}

WINDOWS = {
  "Conv": Case(lambda rngs: nnx.Conv(8, 8, 3, rngs=rngs)),
  "Conv, 2D, strides": Case(
    lambda rngs: nnx.Conv(8, 8, (3, 3), strides=2, padding="VALID", rngs=rngs), ("bssf",)
  ),
  "Conv, groups": Case(
    lambda rngs: nnx.Conv(8, 8, 3, feature_group_count=2, rngs=rngs),
    wrong=dict.fromkeys(("batch", "sharded parameters"), "the gradient of the kernel"),
  ),
  "Conv, causal": Case(lambda rngs: nnx.Conv(8, 8, 3, padding="CAUSAL", rngs=rngs)),
  "Conv, circular": Case(lambda rngs: nnx.Conv(8, 8, 3, padding="CIRCULAR", rngs=rngs)),
  "Conv, reflect, mask": Case(
    lambda rngs: nnx.Conv(8, 8, 3, padding="REFLECT", mask=np.tri(8)[None].repeat(3, 0), rngs=rngs)
  ),
  "Conv, two axes of the batch": Case(lambda rngs: nnx.Conv(8, 8, 3, rngs=rngs), ("b-sf",)),
  "ConvTranspose": Case(lambda rngs: nnx.ConvTranspose(8, 8, 3, strides=2, rngs=rngs)),
  "ConvTranspose, circular": Case(
    lambda rngs: nnx.ConvTranspose(8, 8, 3, padding="CIRCULAR", rngs=rngs)
  ),
  "avg_pool": function(lambda x: nnx.avg_pool(x, (2,), strides=(2,))),
  "avg_pool, padded": function(lambda x: nnx.avg_pool(x, (3,), None, "SAME", False)),
  "max_pool": function(
    lambda x: nnx.max_pool(x, (3,), padding="SAME"), wrong={"sequence": "the gradient"}
  ),
  "min_pool": function(
    lambda x: nnx.min_pool(x, (2, 2)), "b-ssf", wrong={"sequence": "the gradient"}
  ),
  "pool": function(lambda x: nnx.pool(x, 0.0, jax.lax.add, (2,), (1,), "VALID")),
}

ELEMENTS = {
  "Dropout": Case(lambda rngs: nnx.Dropout(0.5, rngs=rngs), is_random=True),
  "Dropout, shared": Case(
    lambda rngs: nnx.Dropout(0.5, broadcast_dims=(0, 1), rngs=rngs), is_random=True
  ),
  "Dropout, all": Case(lambda rngs: nnx.Dropout(1.0, rngs=rngs)),
  "PReLU": Case(lambda rngs: nnx.PReLU(0.5)),
  "RoPE": function(lambda x: nnx.RoPE()(x)),
  "RoPE, positions": function(lambda x: nnx.RoPE()(x, jnp.arange(1, 5)[None])),
  "RoPE, heads": function(lambda x: nnx.RoPE().rotate_heads(x), "bshf"),
  "Residual": Case(lambda rngs: nnx.Residual(nnx.Linear(8, 8, rngs=rngs))),
  "Sequential": Case(
    lambda rngs: nnx.Sequential(
      nnx.Linear(8, 16, rngs=rngs), nnx.gelu, nnx.Dropout(0.5, rngs=rngs), nnx.glu, nnx.softmax
    ),
    is_random=True,
  ),
}
# fmt: off
ACTIVATIONS = (
  "celu", "elu", "gelu", "glu", "hard_sigmoid", "hard_silu", "hard_tanh", "identity", "leaky_relu",
  "log_sigmoid", "log_softmax", "logmeanexp", "logsumexp", "mish", "relu", "relu6", "selu",
  "sigmoid", "silu", "soft_sign", "softmax", "softplus", "sparse_plus", "sparse_sigmoid",
  "squareplus", "standardize", "tanh",
)
# fmt: on


def all_activations(x: jax.Array) -> tuple[jax.Array, ...]:
  """All activations in one program: each takes as long to compile as a layer."""
  axis = lambda name: {"axis": -1} if name in ("logsumexp", "logmeanexp") else {}
  return tuple(getattr(nnx, name)(x, **axis(name)) for name in ACTIVATIONS)


ELEMENTS["activations"] = function(all_activations)
ELEMENTS["log1mexp"] = function(lambda x: nnx.log1mexp(nnx.softplus(x)))
ELEMENTS["one_hot"] = Case(
  lambda rngs: nnx.Linear(8, 8, rngs=rngs),
  ("bs",),
  lambda model, x: model(nnx.one_hot(x, 8)),
  integers=True,
)

ATTENTION = {
  "MultiHeadAttention": Case(attention()),
  "MultiHeadAttention, causal, rope, normalized": Case(
    attention(rope=nnx.RoPE(), normalize_qk=True), call=lambda model, x: model(x, is_causal=True)
  ),
  "MultiHeadAttention, masks": Case(attention(), call=masked),
  "MultiHeadAttention, dropout": Case(
    attention(dropout_rate=0.5, deterministic=False, num_kv_heads=1), is_random=True
  ),
  "MultiHeadAttention, dropout for each": Case(
    attention(dropout_rate=0.5, deterministic=False, broadcast_dropout=False), is_random=True
  ),
  "MultiHeadAttention, context": Case(attention(), ("bsf", "b-f")),
  "MultiHeadAttention, decoding": Case(
    remembering(attention(rope=nnx.RoPE())), call=decoded, differentiable=False, in_shards=False
  ),
  "dot_product_attention": function(nnx.dot_product_attention, "bshf", "bshf", "bshf"),
  "dot_product_attention, bias": function(
    lambda q, k, v, bias: nnx.dot_product_attention(q, k, v, bias[:, None]),
    "bshf",
    "b-hf",
    "b-hf",
    "bs-",
  ),
  "dot_product_attention_weights": function(
    lambda q, k: nnx.dot_product_attention_weights(q, k, is_causal=True), "bshf", "bshf"
  ),
  "dot_product_attention_with_rope": function(
    lambda q, k, v: nnx.dot_product_attention_with_rope(q, k, v, rope=nnx.RoPE()),
    "bshf",
    "bshf",
    "bshf",
  ),
}

TRANSFORMERS = {
  "FeedForward": Case(
    lambda rngs: nnx.FeedForward(8, 16, gated=True, dropout_rate=0.5, rngs=rngs),
    is_random=True,
  ),
  "TransformerBlock": Case(block(dropout_rate=0.5, norm=nnx.RMSNorm), in_shards=False),
  "TransformerBlock, context": Case(block(context_features=8, pre_norm=False), ("bsf", "b-f")),
  "TransformerEncoder": Case(
    lambda rngs: nnx.TransformerEncoder(3, 8, 2, hidden_features=16, rngs=rngs)
  ),
  "TransformerDecoder": Case(
    lambda rngs: nnx.TransformerDecoder(3, 8, 2, hidden_features=16, rope=nnx.RoPE(), rngs=rngs)
  ),
  "TransformerDecoder, decoding": Case(
    remembering(lambda rngs: nnx.TransformerDecoder(3, 8, 2, hidden_features=16, rngs=rngs)),
    call=decoded,
    differentiable=False,
    in_shards=False,
  ),
  "Stack": Case(lambda rngs: nnx.Stack(nnx.Linear, 3, 8, 8, rngs=rngs)),
  "Stack of Dropout, remat": Case(
    lambda rngs: nnx.Stack(
      nnx.FeedForward, 3, 8, 8, dropout_rate=0.5, remat=True, policy=None, rngs=rngs
    ),
    is_random=True,
  ),
  "Stack of BatchNorm": Case(
    lambda rngs: nnx.Stack(nnx.BatchNorm, 3, 8, rngs=rngs), in_shards=False
  ),
}

RECURRENT = {
  "SimpleCell": Case(recurrent(nnx.SimpleCell)),
  "GRUCell": Case(recurrent(nnx.GRUCell)),
  "LSTMCell": Case(recurrent(nnx.LSTMCell)),
  "OptimizedLSTMCell": Case(recurrent(nnx.OptimizedLSTMCell)),
  "a step of GRUCell": Case(
    lambda rngs: nnx.GRUCell(8, 8, rngs=rngs),
    ("bf",),
    lambda model, x: model(model.initialize_carry(x.shape), x),
  ),
  "RNN, lengths, reversed": Case(
    recurrent(nnx.GRUCell, reverse=True, keep_order=True),
    call=padded,
  ),
  "RNN, carry drawn": Case(
    lambda rngs: nnx.RNN(
      nnx.GRUCell(8, 8, carry_init=nnx.initializers.normal(), keep_rngs=True, rngs=rngs),
      time_major=True,
    ),
    ("sbf",),
    is_random=True,
  ),
  "Bidirectional": Case(
    lambda rngs: nnx.Bidirectional(
      nnx.RNN(nnx.OptimizedLSTMCell(8, 8, rngs=rngs)), nnx.RNN(nnx.SimpleCell(8, 8, rngs=rngs))
    )
  ),
}

CASES: dict[str, Case] = {
  **PRODUCTS,
  **WINDOWS,
  **NORMS,
  **ELEMENTS,
  **ATTENTION,
  **TRANSFORMERS,
  **RECURRENT,
}
