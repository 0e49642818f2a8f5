"""What layers ask of their arguments, so that a mistake is named by the layer and not by XLA."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from refax import _jax
from refax.core.array_protocol import unwrap
from refax.core.variable import Variable
from refax.errors import InvalidArgumentError, ShapeMismatchError
from refax.nn import dtypes
from refax.rngs import Rngs
from refax.typing import ArrayLike, describe


def as_input(x: ArrayLike) -> jax.Array:
  """An input as a JAX array; a Variable as its value."""
  x = unwrap(x)
  is_array = isinstance(x, jax.Array) and not _jax.is_ref(x)
  return x if is_array else jnp.asarray(x)  # which takes 10 us of an array, too


def size(layer: str, name: str, value: Any) -> int:
  """`value` as an int that can be the size of an axis; raises InvalidArgumentError."""
  try:
    number = operator.index(value)
  except TypeError:
    number = 0
  if number < 1 or isinstance(value, bool):
    raise InvalidArgumentError.value(layer, name, value, "an int of at least 1")
  return number


def streams(layer: str, rngs: Any) -> Rngs:
  """`rngs` as it is, if it is an Rngs; raises InvalidArgumentError."""
  if not isinstance(rngs, Rngs):
    raise InvalidArgumentError.value(layer, "rngs", rngs, "rngs=nnx.Rngs(0)")
  return rngs


def last_axis(layer: str, x: jax.Array, want: int, parameter: Variable | None) -> None:
  """Raise ShapeMismatchError unless `x` ends in an axis of size `want`."""
  if x.ndim == 0 or x.shape[-1] != want:
    raise ShapeMismatchError(
      f"{layer} maps vectors of size {want}",
      at="" if parameter is None else origin(parameter),
      got=f"an input of shape {x.shape}",
      fix=f"make the last axis {want}, or build {layer} with the input's size",
    )


def spatial(layer: str, x: jax.Array, rank: int, at: Any = "") -> None:
  """Raise ShapeMismatchError if `x` has no room for `rank` spatial axes and the channels."""
  if x.ndim <= rank:
    raise ShapeMismatchError(
      f"{layer} works on {rank} spatial axes and one of channels",
      at=at,
      got=f"an input of shape {x.shape}",
      fix="pass an input of shape (..., " + "size, " * rank + "channels)",
    )


def features(
  layer: str, x: jax.Array, axes: Sequence[int], want: int, parameters: Sequence[Variable | None]
) -> tuple[int, ...]:
  """The axes of the features of a normalization, none negative.

  Args:
    layer: the name of the layer.
    x: its input.
    axes: the axes that should hold the features.
    want: how many features there should be on them together.
    parameters: Variables of the layer, for the message; None is skipped.

  Raises:
    ShapeMismatchError: `x` lacks an axis or has another number of features.
  """
  axes = normalized_axes(layer, x, axes)
  count = 1
  for axis in axes:
    count *= x.shape[axis]
  if count != want:
    where = next((origin(p) for p in parameters if p is not None), "")
    axis = f"axis {axes[0]}" if len(axes) == 1 else f"axes {axes}"
    raise ShapeMismatchError(
      f"{layer} was built for {want} features",
      at=where,
      got=f"an input of shape {x.shape}, with {count} on {axis}",
      fix=f"pass an input with {want} features on {axis}, or build {layer} with {count}",
    )
  return axes


def normalized_axes(layer: str, x: jax.Array, axes: Sequence[int]) -> tuple[int, ...]:
  """Axes of `x`, sorted and none negative; raises ShapeMismatchError if `x` lacks one."""
  for axis in axes:
    if not -x.ndim <= axis < x.ndim:
      raise ShapeMismatchError(
        f"{layer} works on axis {axis}",
        got=f"an input of shape {x.shape}",
        fix=f"pass an input that has this axis, or build {layer} for another one",
      )
  return tuple(sorted({axis % x.ndim for axis in axes}))


def mask(layer: str, x: jax.Array, mask: ArrayLike | None) -> jax.Array | None:
  """A mask as an array; raises ShapeMismatchError if it does not broadcast to `x`."""
  if mask is None:
    return None
  mask = as_input(mask)
  lead = x.ndim - mask.ndim
  if lead < 0 or any(m not in (1, n) for m, n in zip(mask.shape, x.shape[lead:], strict=True)):
    raise ShapeMismatchError(
      f"the mask of {layer} has to broadcast to the input",
      got=f"a mask of shape {mask.shape} for an input of shape {x.shape}",
      fix="give it axes of size 1 where it is to be repeated: mask[:, None]",
    )
  return mask.astype(bool)


def kernel_mask(layer: str, kernel: Variable, mask: ArrayLike | None) -> None:
  """Raise ShapeMismatchError unless a mask has the shape of the kernel that it is for."""
  if mask is not None and jnp.shape(mask) != kernel.shape:
    raise ShapeMismatchError(
      f"the mask of {layer} has to have the kernel's shape",
      at=origin(kernel),
      got=f"a mask of shape {jnp.shape(mask)}",
      fix=f"pass a mask of shape {kernel.shape}",
    )


def integers(layer: str, x: jax.Array, parameter: Variable) -> jax.Array:
  """Integers, in a dtype that sizes fit; raises ShapeMismatchError if `x` holds others."""
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise ShapeMismatchError(
      f"{layer} looks up integers",
      at=origin(parameter),
      got=f"an input of {describe(x)}",
      fix="pass indices of an integer dtype: x.astype(int)",
    )
  return dtypes.wide_integers(x)


def origin(variable: Any) -> Any:
  """Where a Variable of a layer was created and lives: the `at:` of an error.

  A quantized weight that has been put in its place says nothing of that.
  """
  return variable._def.origin if isinstance(variable, Variable) else None
