"""Ring attention: the sequence is divided over devices, and keys and values travel in a ring."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from refax.core.annotation import axes_by_sort
from refax.errors import InvalidArgumentError, ShapeMismatchError, ShardingError
from refax.nn import explicit
from refax.nn.attention.dot_product import check_shapes
from refax.nn.dtypes import promote_dtype as promote

_NAME = "ring_attention"


def ring_attention(axis: str = "seq", *, mesh: Any = None) -> Callable[..., jax.Array]:
  """An `attention_fn` for sequences that are divided over an axis of the mesh.

  Each device keeps its queries. In as many steps as there are devices it attends to one part of the
  keys and values, and hands this part on to its neighbour. No device ever has all keys, nor all
  logits of a query: memory falls with the number of devices, in the backward pass too.

  Args:
    axis: the axis of the mesh that divides queries, keys and values along their length.
    mesh: the mesh; by default that of `jax.set_mesh`.

  Returns:
    A function that is called as `nnx.dot_product_attention`, for
    `nnx.MultiHeadAttention(attention_fn=...)`. It takes masks and grouped heads. It has no dropout
    of weights and no memory for decoding.

  Raises:
    ShardingError: on use, where there is no mesh or it lacks the axis, or it does not divide the
      length evenly.
    InvalidArgumentError: on use, for dropout or for weights that are to be kept.

  Source: H. Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context",
  2023, https://arxiv.org/abs/2310.01889.

  >>> from refax import nnx; import jax, jax.numpy as jnp
  >>> mesh = jax.make_mesh((1,), ("seq",))
  >>> attend = nnx.ring_attention("seq", mesh=mesh)
  >>> layer = nnx.MultiHeadAttention(2, 8, attention_fn=attend, rngs=nnx.Rngs(0))
  >>> layer(jnp.ones((3, 4, 8))).shape
  (3, 4, 8)
  """

  def attend(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    promote_dtype: Any = promote,
    is_causal: bool = False,
    **_: Any,
  ) -> jax.Array:
    if dropout_rate > 0 and not deterministic:
      raise InvalidArgumentError.value(_NAME, "dropout_rate", dropout_rate, "0")
    if module is not None or bias is not None:
      name, got = ("bias", "an array") if module is None else ("sow_weights", True)
      raise InvalidArgumentError.value(_NAME, name, got, "none: no device has all weights")
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    check_shapes(query, key, value)
    over = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    size = _size(over, axis, query.shape[-3], key.shape[-3])
    query, key, value = (_divided(x, axis, over) for x in (query, key, value))
    spec = PartitionSpec(*[None] * (query.ndim - 3), axis, None, None)
    arrays, specs = [query, key, value], [spec] * 3
    if mask is not None:
      mask = jnp.asarray(mask)
      mask = mask.reshape((1,) * (2 - mask.ndim) + mask.shape)
      divided = axis if mask.shape[-2] > 1 else None
      arrays.append(_divided(mask, axis, over, -2) if divided else mask)
      specs.append(PartitionSpec(*[None] * (mask.ndim - 2), divided, None))
    ring = _compiled(over, tuple(specs), axis, size, is_causal, precision)
    return ring(*arrays)

  return attend


def _divided(x: jax.Array, axis: str, mesh: Any, place: int = -3) -> jax.Array:
  """An array divided along its length; where axes are explicit, `shard_map` does not do it."""
  if axis not in axes_by_sort(mesh)[0]:
    return x
  names = explicit.names(x)
  names[place] = axis
  return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*names)))


@functools.lru_cache(maxsize=64)
def _compiled(
  mesh: Any, specs: tuple, axis: str, size: int, is_causal: bool, precision: Any
) -> Callable[..., jax.Array]:
  """The ring as a compiled function; the same one for calls of one kind, which JAX then knows."""
  run = functools.partial(_ring, axis=axis, size=size, is_causal=is_causal, precision=precision)
  names = frozenset({axis})
  return jax.jit(
    jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs[0], axis_names=names)
  )


def _size(mesh: Any, axis: str, queries: int, keys: int) -> int:
  if mesh.empty:
    raise ShardingError.no_mesh("nnx.ring_attention")
  sizes = dict(mesh.shape)
  spec = PartitionSpec(axis)
  if axis not in sizes:
    raise ShardingError.unknown("", spec, axis, sizes)
  for length in (queries, keys):
    if length % sizes[axis]:
      raise ShardingError.uneven("", spec, (length,), 0, sizes[axis])
  if queries != keys:
    raise ShapeMismatchError(
      "ring attention has as many queries as keys",
      got=f"{queries} queries and {keys} keys",
      fix="use nnx.dot_product_attention for attention to another sequence, and for decoding",
    )
  return sizes[axis]


def _ring(
  query: Any,
  key: Any,
  value: Any,
  *masks: Any,
  axis: str,
  size: int,
  is_causal: bool,
  precision: Any,
) -> jax.Array:
  """What one device does: an online softmax over the parts of the keys that come by."""
  place, length, heads = jax.lax.axis_index(axis), query.shape[-3], key.shape[-2]
  grouped = (*query.shape[:-2], heads, query.shape[-2] // heads, query.shape[-1])
  wide = jnp.promote_types(query.dtype, jnp.float32)
  scaled = query.reshape(grouped) * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
  products = functools.partial(jnp.einsum, precision=precision, preferred_element_type=wide)
  onward = [(i, (i + 1) % size) for i in range(size)]

  @jax.checkpoint
  def attend(state: Any, key: Any, value: Any, source: Any) -> Any:
    total, weight, top = state
    logits = products("...qhgd,...khd->...hgqk", scaled, key)
    seen = _seen(place, source, length, is_causal, masks)
    if seen is not None:
      logits = jnp.where(_grouped(seen, logits, heads), logits, jnp.finfo(wide).min)
    new_top = jnp.maximum(top, logits.max(-1, keepdims=True))
    shrink, part = jnp.exp(top - new_top), jnp.exp(logits - new_top)
    weight = weight * shrink + part.sum(-1, keepdims=True)
    mean = products("...hgqk,...khd->...hgqd", part.astype(value.dtype), value)
    return total * shrink + mean, weight, new_top

  def step(carry: Any, i: Any) -> Any:
    state, key, value = carry
    state = attend(state, key, value, (place - i) % size)
    key, value = (jax.lax.ppermute(x, axis, onward) for x in (key, value))
    return (state, key, value), None

  like = products("...qhgd,...khd->...hgqk", scaled, key)[..., :1] * 0  # varies as what is to come
  start = (like * jnp.zeros(value.shape[-1], wide), like, like + jnp.finfo(wide).min)
  (total, weight, _), *_ = jax.lax.scan(step, (start, key, value), jnp.arange(size))[0]
  out = jnp.moveaxis((total / weight).astype(value.dtype), -2, -4)
  return out.reshape(*query.shape[:-1], value.shape[-1])


def _seen(place: Any, source: Any, length: int, is_causal: bool, masks: tuple) -> Any:
  """Which keys of the part from a device the queries here may look at; None for all."""
  seen = None
  if is_causal:
    rows, columns = place * length + jnp.arange(length), source * length + jnp.arange(length)
    seen = rows[:, None] >= columns
  for mask in masks:
    part = mask != 0
    if mask.shape[-1] > 1:
      part = jax.lax.dynamic_slice_in_dim(part, source * length, length, axis=-1)
    seen = part if seen is None else seen & part
  return seen


def _grouped(seen: jax.Array, logits: jax.Array, heads: int) -> jax.Array:
  """A mask `[..., heads, q, k]` for logits `[..., key_heads, group, q, k]`."""
  if seen.ndim < 3:
    return seen
  shape = seen.shape[-3]
  split = (heads, shape // heads) if shape > 1 else (1, 1)
  return seen.reshape(*seen.shape[:-3], *split, *seen.shape[-2:])
