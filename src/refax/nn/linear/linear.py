"""Linear and LinearGeneral: affine maps of one axis, and of several."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Shaped

from refax.core.annotation import reshaped
from refax.core.module import Module
from refax.core.variable import Param
from refax.errors import InvalidArgumentError, ShapeMismatchError
from refax.nn import check, dtypes, explicit, initializers
from refax.nn.quantization import quantized
from refax.rngs import Rngs
from refax.typing import ArrayLike, Dtype, Initializer, PrecisionLike


class Linear(Module):
  """Affine map `y = x @ kernel + bias` over the last axis.

  Args:
    in_features: size of the last axis of the input.
    out_features: size of the last axis of the output.
    use_bias: whether to add a bias; without one `bias` is None.
    dtype: what to compute in; by default what input and parameters promote to.
    param_dtype: the dtype of the parameters.
    precision: of the product, as in `jax.lax.dot_general`.
    kernel_init: initializer of the kernel `[in_features, out_features]`.
    bias_init: initializer of the bias `[out_features]`.
    dot_general: the product; called as `jax.lax.dot_general`.
    promote_dtype: `((x, kernel, bias), dtype=) -> (x, kernel, bias)` of one dtype.
    preferred_element_type: the dtype to accumulate in, as in `jax.lax.dot_general`.
    rngs: the stream `params` initialises the parameters.
    kernel_metadata: metadata of the kernel, such as a sharding.
    bias_metadata: metadata of the bias.

  Raises:
    InvalidArgumentError: a size is not a positive int, or `rngs` is not an `nnx.Rngs`.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> nnx.Linear(3, 5, rngs=nnx.Rngs(0))(jnp.ones((2, 3))).shape
  (2, 5)
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = True,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    precision: PrecisionLike = None,
    kernel_init: Initializer = initializers.default_kernel_init,
    bias_init: Initializer = initializers.zeros,
    dot_general: Callable[..., jax.Array] = lax.dot_general,
    promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    preferred_element_type: Dtype | None = None,
    rngs: Rngs,
    kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
    bias_metadata: Mapping[str, Any] = MappingProxyType({}),
  ):
    self.in_features = check.size("Linear", "in_features", in_features)
    self.out_features = check.size("Linear", "out_features", out_features)
    rngs = check.streams("Linear", rngs)
    kernel = kernel_init(rngs.params(), (self.in_features, self.out_features), param_dtype)
    self.kernel = Param(kernel, **kernel_metadata)
    self.bias: Param[jax.Array] | None = None
    if use_bias:
      bias = bias_init(rngs.params(), (self.out_features,), param_dtype)
      self.bias = Param(bias, **bias_metadata)
    self.use_bias = use_bias
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.precision = precision
    self.dot_general = dot_general
    self.promote_dtype = promote_dtype
    self.preferred_element_type = preferred_element_type

  def __call__(
    self, inputs: Shaped[ArrayLike, "*batch in_features"], out_sharding: Any = None
  ) -> Shaped[jax.Array, "*batch {self.out_features}"]:
    """Map the last axis.

    Args:
      inputs: `[..., in_features]`.
      out_sharding: the sharding of the output, where the mesh has explicit axes.

    Returns:
      `[..., out_features]`.

    Raises:
      ShapeMismatchError: the last axis has another size.
    """
    x = check.as_input(inputs)
    check.last_axis("Linear", x, self.kernel.shape[0], self.kernel)  # of a shard, it is smaller
    ours = self.dot_general is lax.dot_general
    kernel, bias = _parameters(self.kernel, self.bias, self.promote_dtype, ours)
    x, kernel, bias = quantized.promoted(self.promote_dtype, (x, kernel, bias), dtype=self.dtype)
    dot_general = quantized.product_of(kernel, self.dot_general)
    # A user's `dot_general` may not know these two: they are passed only where they are wanted.
    wanted = {"preferred_element_type": self.preferred_element_type, "out_sharding": out_sharding}
    product = lambda x, kernel: dot_general(
      x,
      kernel,
      (((x.ndim - 1,), (0,)), ((), ())),
      precision=self.precision,
      **{name: value for name, value in wanted.items() if value is not None},
    )
    out = lambda: [*explicit.names(x)[:-1], *quantized.names(kernel)[1:]]
    y = explicit.call(product, x, kernel, out=out if ours and out_sharding is None else None)
    return y if bias is None else explicit.add(y, bias)


class LinearGeneral(Module):
  """Affine map of several axes to several others, with weights for each index of batch axes.

  Args:
    in_features: sizes of the axes `axis` of the input, in the order in which the input has them.
    out_features: sizes of the axes that take their place, at the end of the output.
    axis: the axes to map.
    batch_axis: leading axes and their sizes, such as `{0: 7}`; each index has its own weights.
    use_bias: whether to add a bias; without one `bias` is None.
    dtype: what to compute in; by default what input and parameters promote to.
    param_dtype: the dtype of the parameters.
    kernel_init: initializer of the kernel `[*batch, *in_features, *out_features]`; called for a
      matrix `[batch * inputs, outputs]`.
    bias_init: initializer of the bias `[*batch, *out_features]`; called for a vector.
    precision: of the product, as in `jax.lax.dot_general`.
    promote_dtype: as in `nnx.Linear`.
    dot_general: the product; by default `jax.lax.dot_general`.
    dot_general_cls: a function without arguments that makes `dot_general`; goes before it.
    preferred_element_type: the dtype to accumulate in, as in `jax.lax.dot_general`.
    rngs: the stream `params` initialises the parameters.
    kernel_metadata: metadata of the kernel, such as a sharding.
    bias_metadata: metadata of the bias.

  Raises:
    InvalidArgumentError: a size or an axis makes no sense, or there are more of one.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> heads = nnx.LinearGeneral(16, (4, 8), rngs=nnx.Rngs(0))
  >>> heads(jnp.ones((2, 5, 16))).shape
  (2, 5, 4, 8)
  >>> nnx.LinearGeneral((4, 8), 16, axis=(-2, -1), rngs=nnx.Rngs(0))(jnp.ones((2, 5, 4, 8))).shape
  (2, 5, 16)
  """

  def __init__(
    self,
    in_features: int | Sequence[int],
    out_features: int | Sequence[int],
    *,
    axis: int | Sequence[int] = -1,
    batch_axis: Mapping[int, int] = MappingProxyType({}),
    use_bias: bool = True,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    kernel_init: Initializer = initializers.default_kernel_init,
    bias_init: Initializer = initializers.zeros,
    precision: PrecisionLike = None,
    promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    dot_general: Callable[..., jax.Array] | None = None,
    dot_general_cls: Callable[[], Callable[..., jax.Array]] | None = None,
    preferred_element_type: Dtype | None = None,
    rngs: Rngs,
    kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
    bias_metadata: Mapping[str, Any] = MappingProxyType({}),
  ):
    self.in_features = _sizes("in_features", in_features)
    self.out_features = _sizes("out_features", out_features)
    self.axis = tuple(map(operator.index, axis if isinstance(axis, Sequence) else (axis,)))
    if len(self.axis) != len(self.in_features):
      want = f"{len(self.in_features)} axes, one for each of in_features={self.in_features}"
      raise InvalidArgumentError.value("LinearGeneral", "axis", axis, want)
    self.batch_axis = _batch(batch_axis)
    batch = tuple(size for _, size in self.batch_axis)
    rngs = check.streams("LinearGeneral", rngs)
    # One matrix for all: so the initializers see how many numbers each output is a sum of.
    inputs, outputs = (*batch, *self.in_features), self.out_features
    kernel = kernel_init(rngs.params(), (math.prod(inputs), math.prod(outputs)), param_dtype)
    self.kernel = Param(reshaped(kernel, (*inputs, *outputs)), **kernel_metadata)
    self.bias: Param[jax.Array] | None = None
    if use_bias:
      shape = (*batch, *outputs)
      bias = bias_init(rngs.params(), (math.prod(shape),), param_dtype)
      self.bias = Param(reshaped(bias, shape), **bias_metadata)
    self.use_bias = use_bias
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.precision = precision
    self.promote_dtype = promote_dtype
    self.dot_general = dot_general
    self.dot_general_cls = dot_general_cls
    self.preferred_element_type = preferred_element_type

  def __call__(self, inputs: ArrayLike, out_sharding: Any = None) -> jax.Array:
    """Map the axes.

    Args:
      inputs: an array with axes `axis` of the sizes `in_features`, and `batch_axis` in front.
      out_sharding: the sharding of the output, where the mesh has explicit axes.

    Returns:
      `[*batch, ..., *out_features]`: the mapped axes are gone, the others stay in their order.

    Raises:
      ShapeMismatchError: the axes have other sizes.
    """
    x = check.as_input(inputs)
    batch, axes = self._axes(x)
    dot_general = self.dot_general or lax.dot_general
    if self.dot_general_cls is not None:
      dot_general = self.dot_general_cls()
    ours = dot_general is lax.dot_general
    kernel, bias = _parameters(self.kernel, self.bias, self.promote_dtype, ours)
    x, kernel, bias = quantized.promoted(self.promote_dtype, (x, kernel, bias), dtype=self.dtype)
    contracted = tuple(range(len(batch), len(batch) + len(axes)))
    dot_general = quantized.product_of(kernel, dot_general)
    # A user's `dot_general` may not know these two: they are passed only where they are wanted.
    wanted = {"preferred_element_type": self.preferred_element_type, "out_sharding": out_sharding}
    product = lambda x, kernel: dot_general(
      x,
      kernel,
      ((axes, contracted), (batch, batch)),
      precision=self.precision,
      **{name: value for name, value in wanted.items() if value is not None},
    )

    def out() -> explicit.Names:
      kept = [name for axis, name in enumerate(explicit.names(x)) if axis not in axes]
      return kept + quantized.names(kernel)[len(batch) + len(axes) :]

    y = explicit.call(product, x, kernel, out=out if ours and out_sharding is None else None)
    if bias is None:
      return y
    lead = tuple(range(len(batch), y.ndim - len(self.out_features)))
    return explicit.add(y, jnp.expand_dims(bias, lead))

  def _axes(self, x: jax.Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The batch axes of `x` and those to map, none negative; raises ShapeMismatchError."""
    batch = check.normalized_axes("LinearGeneral", x, [axis for axis, _ in self.batch_axis])
    axes = check.normalized_axes("LinearGeneral", x, self.axis)
    sizes = tuple(size for _, size in self.batch_axis)
    for what, where, want in (("has batch", batch, sizes), ("maps", axes, self.in_features)):
      got = tuple(x.shape[axis] for axis in where)
      if got != want:
        raise ShapeMismatchError(
          f"LinearGeneral {what} axes of sizes {want}",
          at=check.origin(self.kernel),
          got=f"an input of shape {x.shape}, with {got} on axes {where}",
          fix=f"pass an input with {want} on these axes, or build LinearGeneral with {got}",
        )
    if set(axes) & set(batch):
      raise ShapeMismatchError(
        "LinearGeneral cannot map a batch axis",
        at=check.origin(self.kernel),
        got=f"an input of shape {x.shape}, with batch axes {batch} and axis={self.axis}",
        fix="pass an input with more axes, or build LinearGeneral with another axis=",
      )
    return batch, axes


def _parameters(
  kernel: Any, bias: Any, promote_dtype: dtypes.PromoteDtype, ours: bool
) -> tuple[quantized.Weight, Any]:
  """The kernel and the bias, uncopied where no function of the user could keep them.

  Args:
    kernel: the kernel.
    bias: the bias, if there is one.
    promote_dtype: the layer's.
    ours: whether the product is that of JAX.
  """
  ours = ours and promote_dtype is dtypes.promote_dtype
  return quantized.read(kernel, ours), None if bias is None else quantized.read(bias, ours)


def _sizes(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
  sizes = value if isinstance(value, Sequence) else (value,)
  return tuple(check.size("LinearGeneral", name, size) for size in sizes)


def _batch(batch_axis: Mapping[int, int]) -> tuple[tuple[int, int], ...]:
  """Batch axes and their sizes, hashable; they have to be the leading axes."""
  if sorted(batch_axis) != list(range(len(batch_axis))):
    want = "leading axes and their sizes: {0: 7}, or {0: 7, 1: 3}"
    raise InvalidArgumentError.value("LinearGeneral", "batch_axis", dict(batch_axis), want)
  items = sorted(batch_axis.items())
  return tuple((i, check.size("LinearGeneral", f"batch_axis[{i}]", n)) for i, n in items)
