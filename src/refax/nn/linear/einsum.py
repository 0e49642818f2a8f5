"""Einsum: a product with a learned array, written in Einstein's notation."""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from refax.core.module import Module
from refax.core.variable import Param
from refax.errors import InvalidArgumentError, ShapeMismatchError
from refax.nn import check, dtypes, explicit, initializers
from refax.rngs import Rngs
from refax.typing import ArrayLike, Dtype, Initializer, PrecisionLike, Shape


class Einsum(Module):
  """Sum of products `einsum(einsum_str, x, kernel) + bias`.

  Args:
    einsum_str: as in `jax.numpy.einsum`, of two operands: the input and then the kernel.
    kernel_shape: the shape of the kernel.
    bias_shape: the shape of the bias: sizes of the kernel's axes that the output has, in the order
      of the output. Without it there is no bias and `bias` is None.
    dtype: what to compute in; by default what input and parameters promote to.
    param_dtype: the dtype of the parameters.
    precision: of the product, as in `jax.numpy.einsum`.
    kernel_init: initializer of the kernel.
    bias_init: initializer of the bias.
    promote_dtype: as in `nnx.Linear`.
    einsum_op: the product; called as `jax.numpy.einsum`.
    preferred_element_type: the dtype to accumulate in, as in `jax.numpy.einsum`.
    rngs: the stream `params` initialises the parameters.
    kernel_metadata: metadata of the kernel, such as a sharding.
    bias_metadata: metadata of the bias.

  Raises:
    InvalidArgumentError: `einsum_str` is not of the form "ab,bc->ac", or a shape does not fit it.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> heads = nnx.Einsum("nta,hab->nthb", (4, 16, 8), (4, 8), rngs=nnx.Rngs(0))
  >>> heads(jnp.ones((2, 5, 16))).shape
  (2, 5, 4, 8)
  """

  def __init__(
    self,
    einsum_str: str,
    kernel_shape: Shape,
    bias_shape: Shape | None = None,
    *,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    precision: PrecisionLike = None,
    kernel_init: Initializer = initializers.default_kernel_init,
    bias_init: Initializer = initializers.zeros,
    promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    einsum_op: Callable[..., jax.Array] = jnp.einsum,
    preferred_element_type: Dtype | None = None,
    rngs: Rngs,
    kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
    bias_metadata: Mapping[str, Any] = MappingProxyType({}),
  ):
    self.kernel_shape = tuple(check.size("Einsum", "kernel_shape", n) for n in kernel_shape)
    self.bias_shape = None
    if bias_shape is not None:
      bias_shape = (bias_shape,) if isinstance(bias_shape, int) else bias_shape
      self.bias_shape = tuple(check.size("Einsum", "bias_shape", n) for n in bias_shape)
    self.einsum_str = self._checked(einsum_str)
    rngs = check.streams("Einsum", rngs)
    kernel = kernel_init(rngs.params(), self.kernel_shape, param_dtype)
    self.kernel = Param(kernel, **kernel_metadata)
    self.bias: Param[jax.Array] | None = None
    if self.bias_shape is not None:
      bias = bias_init(rngs.params(), self.bias_shape, param_dtype)
      self.bias = Param(bias, **bias_metadata)
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.precision = precision
    self.promote_dtype = promote_dtype
    self.einsum_op = einsum_op
    self.preferred_element_type = preferred_element_type

  def __call__(
    self, inputs: ArrayLike, einsum_str: str | None = None, out_sharding: Any = None
  ) -> jax.Array:
    """Multiply and sum.

    Args:
      inputs: the first operand.
      einsum_str: goes before the attribute, if not None.
      out_sharding: the sharding of the output, where the mesh has explicit axes.

    Returns:
      The output, with the axes that `einsum_str` names.

    Raises:
      InvalidArgumentError: `einsum_str` is not of the right form, or not one for these parameters.
      ShapeMismatchError: the input has other axes than `einsum_str` says.
    """
    einsum_str = self.einsum_str if einsum_str is None else self._checked(einsum_str)
    x = check.as_input(inputs)
    self._check_input(einsum_str, x)
    bias = None if self.bias is None else self.bias[...]
    x, kernel, bias = self.promote_dtype((x, self.kernel[...], bias), dtype=self.dtype)
    # A user's function may not know these two: they are passed only where they are wanted.
    wanted = {"preferred_element_type": self.preferred_element_type, "out_sharding": out_sharding}
    product = lambda x, kernel: self.einsum_op(
      einsum_str,
      x,
      kernel,
      precision=self.precision,
      **{name: value for name, value in wanted.items() if value is not None},
    )
    free = self.einsum_op is jnp.einsum and out_sharding is None
    out = lambda: _out_names(einsum_str, x, kernel)
    y = explicit.call(product, x, kernel, out=out if free else None)
    if bias is None:
      return y
    return explicit.add(y, bias.reshape(self._bias_sizes(einsum_str, y.ndim)))

  def _checked(self, einsum_str: Any) -> str:
    """`einsum_str` without spaces, if it fits the parameters; raises InvalidArgumentError."""
    text = einsum_str.replace(" ", "") if isinstance(einsum_str, str) else ""
    if not _FORM.fullmatch(text):
      want = 'two operands, input and kernel, and an output: "ab,bc->ac"'
      raise InvalidArgumentError.value("Einsum", "einsum_str", einsum_str, want)
    _, kernel, out = _operands(text)
    named = len(kernel) - kernel.count(_REST)
    if named > len(self.kernel_shape) or (_REST not in kernel and named != len(self.kernel_shape)):
      want = f"{named} sizes, as {einsum_str!r} names so many axes of the kernel"
      raise InvalidArgumentError.value("Einsum", "kernel_shape", self.kernel_shape, want)
    if self.bias_shape is not None:
      sizes = _axis_sizes(kernel, self.kernel_shape)
      shape = tuple(n for label in out if label in sizes for n in sizes[label])
      if self.bias_shape != shape:
        raise InvalidArgumentError.value("Einsum", "bias_shape", self.bias_shape, str(shape))
    return text

  def _bias_sizes(self, einsum_str: str, rank: int) -> list[int]:
    """The shape of the bias with axes of size 1 where the output has those of the input only."""
    _, kernel, out = _operands(einsum_str)
    sizes = _axis_sizes(kernel, self.kernel_shape)
    shape: list[int] = []
    for label in out:
      own = sizes.get(label, ())
      width = rank - len(out) + 1 if label == _REST else 1
      shape += [*(1,) * (width - len(own)), *own]
    return shape

  def _check_input(self, einsum_str: str, x: jax.Array) -> None:
    """Raise ShapeMismatchError unless `x` has the axes that `einsum_str` says."""
    labels, kernel, _ = _operands(einsum_str)
    sizes = _axis_sizes(kernel, self.kernel_shape)
    want = {label: sizes[label][0] for label in labels if label in sizes and label != _REST}
    missing = len(labels) - labels.count(_REST) - x.ndim
    if missing > 0 or (_REST not in labels and missing):
      want, shown = {}, f"{x.ndim} axes"
    else:
      got = _axis_sizes(labels, x.shape)
      wrong = [label for label in want if got[label][0] != want[label]]
      if not wrong:
        return
      shown = ", ".join(f"{label} of size {got[label][0]}" for label in wrong)
    names = "".join(labels)
    expected = ", ".join(f"{k} of size {n}" for k, n in want.items()) or f"axes {names}"
    raise ShapeMismatchError(
      f"Einsum {einsum_str!r} takes an input of axes {names}",
      at=check.origin(self.kernel),
      got=f"an input of shape {x.shape}: {shown}",
      fix=f"pass an input with {expected}, or build Einsum with other sizes",
    )


def summed_axes(layer: Einsum) -> tuple[int, ...]:
  """The axes of the kernel that an output is a sum over, counted from the end."""
  inputs, kernel, out = _operands(layer.einsum_str)
  places = _axis_sizes(kernel, tuple(range(-len(layer.kernel_shape), 0)))
  labels = [label for label in kernel if label in inputs and label not in out]
  return tuple(axis for label in labels for axis in places[label])


_REST = "..."
_TERM = r"[A-Za-z]*(\.\.\.)?[A-Za-z]*"
_FORM = re.compile(f"{_TERM},{_TERM}->{_TERM}")


def _operands(einsum_str: str) -> list[list[str]]:
  """The labels of the input, of the kernel and of the output; "..." counts as one."""
  return [re.findall(r"[A-Za-z]|\.\.\.", term) for term in re.split(",|->", einsum_str)]


def _out_names(einsum_str: str, x: jax.Array, kernel: jax.Array) -> explicit.Names:
  """How the output is split: as the input, and where the input has no such axis, as the kernel."""
  *labels, out = _operands(einsum_str)
  pairs = zip(labels, (x, kernel), strict=True)
  parts = [_axis_sizes(own, tuple(explicit.names(y))) for own, y in pairs]
  return [name for label in out for name in explicit.broadcast(*(p.get(label, ()) for p in parts))]


def _axis_sizes(labels: list[str], shape: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
  """For each label the sizes of its axes: of one axis, or of any number for "..."."""
  rest = len(shape) - len(labels) + 1
  sizes, start = {}, 0
  for label in labels:
    end = start + (rest if label == _REST else 1)
    sizes[label] = tuple(shape[start:end])
    start = end
  return sizes
