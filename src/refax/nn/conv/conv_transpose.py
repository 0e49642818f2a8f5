"""ConvTranspose: convolution that makes its input larger, as the gradient of Conv does."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Shaped

from refax.core.module import Module
from refax.core.variable import Param, Variable
from refax.nn import check, dtypes, explicit, initializers
from refax.nn.conv import window
from refax.rngs import Rngs
from refax.typing import ArrayLike, Dtype, Initializer, Padding, PrecisionLike

PADDINGS = ("SAME", "VALID", "CIRCULAR")


class ConvTranspose(Module):
  """Transposed convolution over inputs `[..., *spatial, in_features]`: channels last.

  With strides the output has so many windows for each element of the input. As in "Deconvolutional
  Networks", Zeiler et al. 2010, and as `jax.lax.conv_transpose`.

  Args:
    in_features: the number of channels of the input.
    out_features: the number of channels of the output.
    kernel_size: the size of the window on each spatial axis; an int means one spatial axis.
    strides: how much larger the output is, an int or one for each spatial axis; None means 1.
    padding: "SAME", the input's size times the strides; "VALID", all that the input reaches;
      "CIRCULAR", as "SAME", and what is beyond an end is added at the other one; an int; or for
      each spatial axis an int or a pair (low, high) of zeros around the dilated input.
    kernel_dilation: 1 plus the number of zeros put between elements of the kernel; None means 1.
    use_bias: whether to add a bias; without one `bias` is None.
    mask: an array with the kernel's shape that it is multiplied with.
    dtype: what to compute in; by default what input and parameters promote to.
    param_dtype: the dtype of the parameters.
    precision: of the products, as in `jax.lax.conv_transpose`.
    kernel_init: initializer of the kernel.
    bias_init: initializer of the bias `[out_features]`.
    transpose_kernel: whether to flip the kernel, `[*kernel_size, out_features, in_features]` then
      and not `[*kernel_size, in_features, out_features]`: that of the Conv whose gradient this is.
    promote_dtype: as in `nnx.Linear`.
    preferred_element_type: the dtype to accumulate in.
    rngs: the stream `params` initialises the parameters.
    kernel_metadata: metadata of the kernel, such as a sharding.
    bias_metadata: metadata of the bias.

  Raises:
    InvalidArgumentError: a size or the padding makes no sense.
    ShapeMismatchError: the mask has not the kernel's shape.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> conv = nnx.ConvTranspose(8, 3, kernel_size=(3, 3), strides=2, rngs=nnx.Rngs(0))
  >>> conv(jnp.ones((1, 14, 14, 8))).shape
  (1, 28, 28, 3)
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    *,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] | None = None,
    use_bias: bool = True,
    mask: ArrayLike | None = None,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    precision: PrecisionLike = None,
    kernel_init: Initializer = initializers.default_kernel_init,
    bias_init: Initializer = initializers.zeros,
    transpose_kernel: bool = False,
    promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    preferred_element_type: Dtype | None = None,
    rngs: Rngs,
    kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
    bias_metadata: Mapping[str, Any] = MappingProxyType({}),
  ):
    rank = len(kernel_size) if isinstance(kernel_size, Sequence) else 1
    self.in_features = check.size("ConvTranspose", "in_features", in_features)
    self.out_features = check.size("ConvTranspose", "out_features", out_features)
    self.kernel_size = window.per_axis("ConvTranspose", "kernel_size", kernel_size, rank)
    self.strides = window.per_axis("ConvTranspose", "strides", strides, rank)
    self.padding = window.paddings("ConvTranspose", padding, rank, PADDINGS)
    dilation = window.per_axis("ConvTranspose", "kernel_dilation", kernel_dilation, rank)
    self.kernel_dilation = dilation
    channels = (self.in_features, self.out_features)
    self.kernel_shape = (*self.kernel_size, *(channels[::-1] if transpose_kernel else channels))
    rngs = check.streams("ConvTranspose", rngs)
    kernel = kernel_init(rngs.params(), self.kernel_shape, param_dtype)
    self.kernel = Param(kernel, **kernel_metadata)
    self.bias: Param[jax.Array] | None = None
    if use_bias:
      bias = bias_init(rngs.params(), (self.out_features,), param_dtype)
      self.bias = Param(bias, **bias_metadata)
    self.use_bias = use_bias
    self.mask = mask if mask is None or isinstance(mask, Variable) else jnp.asarray(mask)
    check.kernel_mask("ConvTranspose", self.kernel, self.mask)
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.precision = precision
    self.transpose_kernel = transpose_kernel
    self.promote_dtype = promote_dtype
    self.preferred_element_type = preferred_element_type

  def __call__(
    self, inputs: Shaped[ArrayLike, "*batch_and_spatial in_features"]
  ) -> Shaped[jax.Array, "*windows {self.out_features}"]:
    """Convolve.

    Args:
      inputs: `[..., *spatial, in_features]`, with any number of batch axes.

    Returns:
      `[..., *windows, out_features]`.

    Raises:
      ShapeMismatchError: the input has too few axes, or another number of channels.
    """
    x = check.as_input(inputs)
    rank = len(self.kernel_size)
    check.spatial("ConvTranspose", x, rank, check.origin(self.kernel))
    check.features("ConvTranspose", x, (-1,), self.in_features, (self.kernel,))
    bias = None if self.bias is None else self.bias[...]
    x, kernel, bias = self.promote_dtype((x, self._kernel(), bias), dtype=self.dtype)
    features = -2 if self.transpose_kernel else -1
    out = lambda: [*explicit.names(x)[:-1], explicit.names(kernel)[features]]
    return explicit.fitted(self._convolve, x, kernel, bias, out=out)

  def _convolve(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """The output, from what it is computed of."""
    x, batch = window.fold_batch(x, len(self.kernel_size))
    y = lax.conv_transpose(
      x,
      kernel,
      self.strides,
      "VALID" if self.padding == "CIRCULAR" else self.padding,
      rhs_dilation=self.kernel_dilation,
      transpose_kernel=self.transpose_kernel,
      precision=self.precision,
      preferred_element_type=self.preferred_element_type,
    )
    if self.padding == "CIRCULAR":
      for axis, stride in enumerate(self.strides, 1):
        y = self._wrapped(y, axis, x.shape[axis] * stride)
    y = y if bias is None else y + bias
    return y.reshape(*batch, *y.shape[1:])

  def _kernel(self) -> jax.Array:
    """The kernel, masked."""
    kernel = self.kernel[...]
    if self.mask is None:
      return kernel
    check.kernel_mask("ConvTranspose", self.kernel, self.mask)
    return kernel * check.as_input(self.mask).astype(kernel.dtype)

  def _wrapped(self, y: jax.Array, axis: int, period: int) -> jax.Array:
    """One axis wound around a circle of `period` elements; what meets there is added up.

    Of what is too much, half is before the first element. Of an odd number, as an even kernel
    gives, the larger half is there with `transpose_kernel`: so Flax aligns kernels.
    """
    excess = y.shape[axis] - period
    before = (excess + 1) // 2 if self.transpose_kernel else excess // 2
    pads = [(0, 0)] * y.ndim
    pads[axis] = (0, -y.shape[axis] % period)
    turns = jnp.pad(y, pads)
    turns = turns.reshape(*y.shape[:axis], -1, period, *y.shape[axis + 1 :])
    return jnp.roll(turns.sum(axis), -before, axis)
