"""Pooling: one number for each window of an input `[..., *spatial, channels]`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Shaped

from refax.errors import InvalidArgumentError
from refax.nn import check, dtypes, explicit
from refax.nn.conv import window
from refax.typing import ArrayLike, Padding


def pool(
  inputs: ArrayLike,
  init: Any,
  reduce_fn: Callable[[Any, Any], Any],
  window_shape: Sequence[int],
  strides: int | Sequence[int] | None,
  padding: Padding,
) -> jax.Array:
  """Reduce each window with a function; `jax.lax.reduce_window` with batch and channels.

  Args:
    inputs: `[..., *spatial, channels]`, with any number of batch axes.
    init: the number that `reduce_fn` starts from, and that pads.
    reduce_fn: `(a, b) -> c` on numbers. JAX differentiates sums, maxima and minima.
    window_shape: the size of the window on each spatial axis.
    strides: how far the window moves at each step; by default 1.
    padding: "SAME", "VALID", an int, or for each spatial axis an int or a pair (low, high).

  Returns:
    `[..., *windows, channels]`.

  Raises:
    ShapeMismatchError: the input has too few axes.
    InvalidArgumentError: window, strides or padding do not fit together.

  >>> from refax import nnx; import jax; import jax.numpy as jnp
  >>> nnx.pool(jnp.ones((1, 6, 6, 1)), 0.0, jax.lax.add, (3, 3), (3, 3), "VALID")[0, :, :, 0]
  Array([[9., 9.],
         [9., 9.]], dtype=float32)
  """
  return _pool("pool", inputs, init, reduce_fn, window_shape, strides, padding)


def avg_pool(
  inputs: Shaped[ArrayLike, "*batch_and_spatial channels"],
  window_shape: Sequence[int],
  strides: int | Sequence[int] | None = None,
  padding: Padding = "VALID",
  count_include_pad: bool = True,
) -> Shaped[jax.Array, "*windows channels"]:
  """The mean of each window.

  Args:
    inputs: `[..., *spatial, channels]`, with any number of batch axes.
    window_shape: the size of the window on each spatial axis.
    strides: how far the window moves at each step; by default 1.
    padding: as in `nnx.pool`.
    count_include_pad: whether the zeros that pad count as elements.

  Returns:
    `[..., *windows, channels]`.

  Raises:
    ShapeMismatchError: the input has too few axes.
    InvalidArgumentError: window, strides or padding do not fit together.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> nnx.avg_pool(jnp.ones((4, 1)), (2,), padding=((1, 0),))[:, 0].tolist()
  [0.5, 1.0, 1.0, 1.0]
  """
  (x,) = dtypes.promote_dtype((check.as_input(inputs),))
  y = _pool("avg_pool", dtypes.wide(x), 0.0, lax.add, window_shape, strides, padding)
  if count_include_pad:
    return (y / math.prod(map(int, window_shape))).astype(x.dtype)
  # One channel of one example suffices.
  ones = jnp.ones((*x.shape[-1 - len(window_shape) : -1], 1))
  counts = _pool("avg_pool", ones, 0.0, lax.add, window_shape, strides, padding)
  return (y / counts).astype(x.dtype)


def max_pool(
  inputs: Shaped[ArrayLike, "*batch_and_spatial channels"],
  window_shape: Sequence[int],
  strides: int | Sequence[int] | None = None,
  padding: Padding = "VALID",
) -> Shaped[jax.Array, "*windows channels"]:
  """The maximum of each window; what pads never is one.

  Args:
    inputs: `[..., *spatial, channels]`, with any number of batch axes.
    window_shape: the size of the window on each spatial axis.
    strides: how far the window moves at each step; by default 1.
    padding: as in `nnx.pool`.

  Returns:
    `[..., *windows, channels]`.

  Raises:
    ShapeMismatchError: the input has too few axes.
    InvalidArgumentError: window, strides or padding do not fit together.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> nnx.max_pool(jnp.arange(6.0)[:, None], (2,), strides=(2,))[:, 0].tolist()
  [1.0, 3.0, 5.0]
  """
  x = check.as_input(inputs)
  return _pool("max_pool", x, _limits(x.dtype)[0], lax.max, window_shape, strides, padding)


def min_pool(
  inputs: Shaped[ArrayLike, "*batch_and_spatial channels"],
  window_shape: Sequence[int],
  strides: int | Sequence[int] | None = None,
  padding: Padding = "VALID",
) -> Shaped[jax.Array, "*windows channels"]:
  """The minimum of each window; what pads never is one.

  Args:
    inputs: `[..., *spatial, channels]`, with any number of batch axes.
    window_shape: the size of the window on each spatial axis.
    strides: how far the window moves at each step; by default 1.
    padding: as in `nnx.pool`.

  Returns:
    `[..., *windows, channels]`.

  Raises:
    ShapeMismatchError: the input has too few axes.
    InvalidArgumentError: window, strides or padding do not fit together.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> nnx.min_pool(jnp.arange(6.0)[:, None], (2,), strides=(2,))[:, 0].tolist()
  [0.0, 2.0, 4.0]
  """
  x = check.as_input(inputs)
  return _pool("min_pool", x, _limits(x.dtype)[1], lax.min, window_shape, strides, padding)


def _limits(dtype: Any) -> tuple[Any, Any]:
  """A number that no number of a dtype is below, and one that none is above."""
  if dtype == jnp.bool_:
    return False, True
  if not jnp.issubdtype(dtype, jnp.inexact):
    info = jnp.iinfo(dtype)
    return int(info.min), int(info.max)
  if np.isinf(np.asarray(np.inf, dtype)):
    return -jnp.inf, jnp.inf
  info = jnp.finfo(dtype)  # some dtypes of 8 bits have no infinity
  return float(info.min), float(info.max)


def _pool(
  layer: str,
  inputs: ArrayLike,
  init: Any,
  reduce_fn: Callable[[Any, Any], Any],
  window_shape: Sequence[int],
  strides: int | Sequence[int] | None,
  padding: Padding,
) -> jax.Array:
  """`pool` for the function that its errors name."""
  if not isinstance(window_shape, Sequence):
    raise InvalidArgumentError.value(
      layer, "window_shape", window_shape, "a tuple with a size for each spatial axis"
    )
  rank = len(window_shape)
  sizes = window.per_axis(layer, "window_shape", window_shape, rank)
  steps = window.per_axis(layer, "strides", strides, rank)
  pads = window.paddings(layer, padding, rank, ("SAME", "VALID"))
  x = check.as_input(inputs)
  check.spatial(layer, x, rank)
  if not isinstance(pads, str):
    pads = ((0, 0), *pads, (0, 0))
  if isinstance(init, int | float):  # JAX makes an int an int32, also for an input of int8
    try:
      init = np.asarray(init, x.dtype)
    except OverflowError:
      want = f"a number that {x.dtype} holds, or cast the input"
      raise InvalidArgumentError.value(layer, "init", init, want) from None

  def reduce(x: jax.Array) -> jax.Array:
    x, batch = window.fold_batch(x, rank)
    y = lax.reduce_window(x, init, reduce_fn, (1, *sizes, 1), (1, *steps, 1), pads)
    return y.reshape(*batch, *y.shape[1:])

  return explicit.fitted(reduce, x, out=lambda: explicit.names(x))
