"""Conv: convolution over any number of spatial axes."""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Shaped

from refax.core.module import Module
from refax.core.variable import Param, Variable
from refax.errors import InvalidArgumentError
from refax.nn import check, dtypes, explicit, initializers
from refax.nn.conv import window
from refax.rngs import Rngs
from refax.typing import ArrayLike, Dtype, Initializer, Padding, PrecisionLike

PADDINGS = ("SAME", "VALID", "CIRCULAR", "CAUSAL", "REFLECT")


class Conv(Module):
  """Convolution over inputs `[..., *spatial, in_features]`: channels last.

  Args:
    in_features: the number of channels of the input.
    out_features: the number of channels of the output.
    kernel_size: the size of the window on each spatial axis; an int means one spatial axis.
    strides: how far the window moves at each step, an int or one for each spatial axis.
    padding: "SAME"; "VALID", none; "CIRCULAR", around the other end; "REFLECT"; "CAUSAL", on the
      left of one spatial axis; an int; or for each spatial axis an int or a pair (low, high).
    input_dilation: 1 plus the number of zeros put between elements of the input.
    kernel_dilation: 1 plus the number of zeros put between elements of the kernel.
    feature_group_count: channels are split into so many groups that do not see each other.
    use_bias: whether to add a bias; without one `bias` is None.
    mask: an array with the kernel's shape that it is multiplied with.
    dtype: what to compute in; by default what input and parameters promote to.
    param_dtype: the dtype of the parameters.
    precision: of the products, as in `jax.lax.conv_general_dilated`.
    kernel_init: initializer of the kernel `[*kernel_size, in_features / groups, out_features]`.
    bias_init: initializer of the bias `[out_features]`.
    conv_general_dilated: the convolution; called as `jax.lax.conv_general_dilated`.
    promote_dtype: as in `nnx.Linear`.
    preferred_element_type: the dtype to accumulate in.
    rngs: the stream `params` initialises the parameters.
    kernel_metadata: metadata of the kernel, such as a sharding.
    bias_metadata: metadata of the bias.

  Raises:
    InvalidArgumentError: a size, the padding or the groups make no sense.
    ShapeMismatchError: the mask has not the kernel's shape.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> conv = nnx.Conv(3, 8, kernel_size=(3, 3), strides=2, rngs=nnx.Rngs(0))
  >>> conv(jnp.ones((1, 28, 28, 3))).shape
  (1, 14, 14, 8)
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] | None = 1,
    *,
    padding: Padding = "SAME",
    input_dilation: int | Sequence[int] | None = 1,
    kernel_dilation: int | Sequence[int] | None = 1,
    feature_group_count: int = 1,
    use_bias: bool = True,
    mask: ArrayLike | None = None,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    precision: PrecisionLike = None,
    kernel_init: Initializer = initializers.default_kernel_init,
    bias_init: Initializer = initializers.zeros,
    conv_general_dilated: Callable[..., jax.Array] = lax.conv_general_dilated,
    promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    preferred_element_type: Dtype | None = None,
    rngs: Rngs,
    kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
    bias_metadata: Mapping[str, Any] = MappingProxyType({}),
  ):
    rank = len(kernel_size) if isinstance(kernel_size, Sequence) else 1
    self.in_features = check.size("Conv", "in_features", in_features)
    self.out_features = check.size("Conv", "out_features", out_features)
    self.kernel_size = window.per_axis("Conv", "kernel_size", kernel_size, rank)
    self.strides = window.per_axis("Conv", "strides", strides, rank)
    self.input_dilation = window.per_axis("Conv", "input_dilation", input_dilation, rank)
    self.padding = _paddings(padding, rank, self.input_dilation)
    self.kernel_dilation = window.per_axis("Conv", "kernel_dilation", kernel_dilation, rank)
    self.feature_group_count = _groups(feature_group_count, self.in_features, self.out_features)
    channels = self.in_features // self.feature_group_count, self.out_features
    self.kernel_shape = (*self.kernel_size, *channels)
    rngs = check.streams("Conv", rngs)
    kernel = kernel_init(rngs.params(), self.kernel_shape, param_dtype)
    self.kernel = Param(kernel, **kernel_metadata)
    self.bias: Param[jax.Array] | None = None
    if use_bias:
      bias = bias_init(rngs.params(), (self.out_features,), param_dtype)
      self.bias = Param(bias, **bias_metadata)
    self.use_bias = use_bias
    self.mask = mask if mask is None or isinstance(mask, Variable) else jnp.asarray(mask)
    check.kernel_mask("Conv", self.kernel, self.mask)
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.precision = precision
    self.conv_general_dilated = conv_general_dilated
    self.promote_dtype = promote_dtype
    self.preferred_element_type = preferred_element_type

  def __call__(
    self, inputs: Shaped[ArrayLike, "*batch_and_spatial in_features"], out_sharding: Any = None
  ) -> Shaped[jax.Array, "*windows {self.out_features}"]:
    """Convolve.

    Args:
      inputs: `[..., *spatial, in_features]`, with any number of batch axes.
      out_sharding: the sharding of the output, where the mesh has explicit axes.

    Returns:
      `[..., *windows, out_features]`.

    Raises:
      ShapeMismatchError: the input has too few axes, or another number of channels.
    """
    x = check.as_input(inputs)
    rank = len(self.kernel_size)
    check.spatial("Conv", x, rank, check.origin(self.kernel))
    check.features("Conv", x, (-1,), self.in_features, (self.kernel,))
    bias = None if self.bias is None else self.bias[...]
    x, kernel, bias = self.promote_dtype((x, self._kernel(), bias), dtype=self.dtype)
    ours = self.conv_general_dilated is lax.conv_general_dilated and out_sharding is None
    convolve = functools.partial(self._convolve, out_sharding=out_sharding)
    out = lambda: [*explicit.names(x)[:-1], explicit.names(kernel)[-1]]
    return explicit.fitted(convolve, x, kernel, bias, out=out if ours else None)

  def _convolve(self, x: jax.Array, kernel: jax.Array, bias: Any, out_sharding: Any) -> jax.Array:
    """The output, from what it is computed of."""
    rank = len(self.kernel_size)
    x, batch = window.fold_batch(x, rank)
    x, padding = self._pad(x)
    # A user's function may not know these two: they are passed only where they are wanted.
    wanted = {"preferred_element_type": self.preferred_element_type, "out_sharding": out_sharding}
    y = self.conv_general_dilated(
      x,
      kernel,
      self.strides,
      padding,
      lhs_dilation=self.input_dilation,
      rhs_dilation=self.kernel_dilation,
      dimension_numbers=_channels_last(rank),
      feature_group_count=self.feature_group_count,
      precision=self.precision,
      **{name: value for name, value in wanted.items() if value is not None},
    )
    y = y if bias is None else y + bias
    return y.reshape(*batch, *y.shape[1:])

  def _kernel(self) -> jax.Array:
    """The kernel, masked."""
    kernel = self.kernel[...]
    if self.mask is None:
      return kernel
    check.kernel_mask("Conv", self.kernel, self.mask)
    return kernel * check.as_input(self.mask).astype(kernel.dtype)

  def _pad(self, x: jax.Array) -> tuple[jax.Array, Any]:
    """The input padded where XLA has no such padding, and what is left for XLA to do."""
    none = ((0, 0),) * len(self.kernel_size)  # XLA takes no "VALID" with an input_dilation
    if self.padding == "VALID":
      return x, none
    if self.padding not in ("CIRCULAR", "REFLECT", "CAUSAL"):
      return x, self.padding
    spans = [(k - 1) * d for k, d in zip(self.kernel_size, self.kernel_dilation, strict=True)]
    if self.padding == "CAUSAL":
      return jnp.pad(x, [(0, 0), (spans[0], 0), (0, 0)]), none
    pairs = [(span // 2, (span + 1) // 2) for span in spans]
    mode = "wrap" if self.padding == "CIRCULAR" else "reflect"
    return jnp.pad(x, [(0, 0), *pairs, (0, 0)], mode=mode), none


def _paddings(padding: Padding, rank: int, input_dilation: Sequence[int]) -> Any:
  padding = window.paddings("Conv", padding, rank, PADDINGS)
  if padding == "CAUSAL" and rank != 1:
    raise InvalidArgumentError.value("Conv", "padding", padding, "CAUSAL with one spatial axis")
  if padding == "SAME" and max(input_dilation) > 1:  # the same size as what?
    raise InvalidArgumentError.value(
      "Conv", "padding", padding, "numbers, if there is an input_dilation"
    )
  return padding


def _groups(count: int, *channels: int) -> int:
  count = check.size("Conv", "feature_group_count", count)
  if any(n % count for n in channels):
    raise InvalidArgumentError.value(
      "Conv",
      "feature_group_count",
      count,
      "a divisor of in_features={} and out_features={}".format(*channels),
    )
  return count


def _channels_last(rank: int) -> lax.ConvDimensionNumbers:
  """Where XLA finds batch, channels and space: in input and output, and in the kernel."""
  outside = (0, rank + 1, *range(1, rank + 1))
  return lax.ConvDimensionNumbers(outside, (rank + 1, rank, *range(rank)), outside)
