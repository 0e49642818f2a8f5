"""Rotary position embedding: attention that depends on how far apart two positions are."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from refax.core.module import Module
from refax.errors import InvalidArgumentError, ShapeMismatchError
from refax.nn import check, dtypes, explicit
from refax.nn.attention.dot_product import dot_product_attention
from refax.typing import ArrayLike, describe


class RoPE(Module):
  """Rotate pairs of features by angles that grow with the position.

  Features `j` and `j + size / 2` are the real and the imaginary part of a complex number, which
  position `p` multiplies with `exp(i * p * theta ** (-2 * j / size))`. The dot product of a rotated
  query and a rotated key depends on the difference of their positions only (Su et al., RoFormer,
  arXiv:2104.09864). The angles are computed in float32 at each call; nothing is stored.

  Args:
    theta: how slowly the slowest pair turns.
    embedding_size: the number of features, which is even; None for any.
    max_seq_len: the largest length; None for any. Comes together with `embedding_size`.

  Raises:
    InvalidArgumentError: `embedding_size` is odd, or only one of the sizes is given.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> rope = nnx.RoPE()
  >>> jnp.round(rope(jnp.array([[1.0, 0.0], [1.0, 0.0]])) * 100).tolist()
  [[100.0, 0.0], [54.0, 84.0]]
  >>> jnp.round(rope(jnp.array([[1.0, 0.0]]), input_positions=jnp.array([1])) * 100).tolist()
  [[54.0, 84.0]]
  """

  def __init__(
    self,
    theta: float = 10000.0,
    embedding_size: int | None = None,
    max_seq_len: int | None = None,
  ):
    if (embedding_size is None) != (max_seq_len is None):
      missing = "embedding_size" if embedding_size is None else "max_seq_len"
      raise InvalidArgumentError.value("RoPE", missing, None, "both sizes, or neither")
    if embedding_size is not None:
      embedding_size = check.size("RoPE", "embedding_size", embedding_size)
      max_seq_len = check.size("RoPE", "max_seq_len", max_seq_len)
      if embedding_size % 2:
        raise InvalidArgumentError.value("RoPE", "embedding_size", embedding_size, "an even number")
    self.theta = float(theta)  # an int may be too large for JAX
    self.embedding_size = embedding_size
    self.max_seq_len = max_seq_len

  def __call__(
    self, x: Shaped[ArrayLike, "*batch length size"], input_positions: ArrayLike | None = None
  ) -> Shaped[jax.Array, "*batch length size"]:
    """Rotate the features of each position.

    Args:
      x: `[..., length, size]`.
      input_positions: `[..., length]`, broadcasts to the axes of `x` before the features; by
        default 0, 1, 2 and so on.

    Returns:
      An array of the shape and dtype of `x`; integers become float32.

    Raises:
      ShapeMismatchError: the size is odd or not `embedding_size`, there are more than
        `max_seq_len` positions, or `input_positions` does not fit.
    """
    return self._rotated(check.as_input(x), input_positions, heads=0)

  def rotate_heads(self, x: ArrayLike, input_positions: ArrayLike | None = None) -> jax.Array:
    """Rotate queries or keys, whose heads come after the positions.

    Args:
      x: `[..., length, heads, size]`.
      input_positions: `[..., length]`; by default 0, 1, 2 and so on.

    Returns:
      An array of the shape and dtype of `x`.

    Raises:
      ShapeMismatchError: as in a call.
    """
    return self._rotated(check.as_input(x), input_positions, heads=1)

  def _rotated(self, x: jax.Array, positions: Any, heads: int) -> jax.Array:
    """`x` with `heads` axes between the positions and the features, rotated."""
    self._check_features(x, heads)
    positions = self._positions(x.shape[: x.ndim - 1 - heads], positions)
    turn = lambda x, positions: self._turned(x, positions, heads)
    return explicit.call_like(turn, x, positions)

  def _turned(self, x: jax.Array, positions: jax.Array, heads: int) -> jax.Array:
    half = x.shape[-1] // 2
    dtype = dtypes.canonicalize_dtype(x)
    positions = positions[..., None].astype(jnp.promote_types(dtype, jnp.float32))
    angles = positions * self.theta ** (-jnp.arange(half) / half)
    angles = jnp.expand_dims(angles, tuple(range(-1 - heads, -1)))
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    real, imaginary = x[..., :half], x[..., half:]
    parts = (real * cos - imaginary * sin, imaginary * cos + real * sin)
    return jnp.concatenate(parts, axis=-1).astype(dtype)

  def _check_features(self, x: jax.Array, heads: int) -> None:
    """Raise ShapeMismatchError unless `x` has positions and pairs of features."""
    size = self.embedding_size
    if x.ndim < 2 + heads or x.shape[-1] % 2 or size not in (None, x.shape[-1]):
      want = "an even size" if size is None else f"size {size}"
      raise ShapeMismatchError(
        f"RoPE rotates pairs of features, in vectors of {want}",
        got=f"an input of shape {x.shape}",
        fix=f"pass an input of shape (..., length, {'heads, ' * heads}{size or 'even size'})",
      )

  def _positions(self, shape: tuple[int, ...], positions: Any) -> jax.Array:
    """The positions of an input whose axes before heads and features are `shape`."""
    if self.max_seq_len is not None and shape[-1] > self.max_seq_len:
      raise ShapeMismatchError(
        f"RoPE was built for at most {self.max_seq_len} positions",
        got=f"an input with {shape[-1]}",
        fix=f"build it with max_seq_len={shape[-1]}, or without sizes",
      )
    if positions is None:
      return jnp.arange(shape[-1])
    positions = check.as_input(positions)
    fits = 0 < positions.ndim <= len(shape) and positions.shape[-1] == shape[-1]
    tail = shape[len(shape) - positions.ndim :]
    if not fits or any(p not in (1, n) for p, n in zip(positions.shape, tail, strict=True)):
      raise ShapeMismatchError(
        "RoPE needs one position for each vector",
        got=f"input_positions of {describe(positions)}",
        fix=f"pass an array that broadcasts to the shape {shape}",
      )
    return positions


def dot_product_attention_with_rope(
  query: ArrayLike,
  key: ArrayLike,
  value: ArrayLike,
  *,
  rope: RoPE,
  input_positions: ArrayLike | None = None,
  **kwargs: Any,
) -> jax.Array:
  """`nnx.dot_product_attention` of rotated queries and keys.

  Args:
    query: `[batch..., queries, heads, size]`.
    key: `[batch..., keys, heads, size]`.
    value: `[batch..., keys, heads, value_size]`.
    rope: rotates queries and keys.
    input_positions: `[batch..., length]`, of queries and keys; by default 0, 1, 2 and so on.
    **kwargs: as in `nnx.dot_product_attention`.

  Returns:
    `[batch..., queries, heads, value_size]`.

  Raises:
    ShapeMismatchError: shapes do not fit.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> x = jnp.ones((2, 5, 4, 8))
  >>> nnx.dot_product_attention_with_rope(x, x, x, rope=nnx.RoPE()).shape
  (2, 5, 4, 8)
  """
  query = rope.rotate_heads(query, input_positions)
  key = rope.rotate_heads(key, input_positions)
  return dot_product_attention(query, key, value, **kwargs)
