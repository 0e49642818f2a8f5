"""Linear: the affine map."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from refax.core.module import Module
from refax.core.variable import Param
from refax.nn import check, dtypes, initializers
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

  def __call__(self, inputs: ArrayLike, out_sharding: Any = None) -> jax.Array:
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
    check.last_axis("Linear", x, self.in_features, self.kernel)
    bias = None if self.bias is None else self.bias[...]
    x, kernel, bias = self.promote_dtype((x, self.kernel[...], bias), dtype=self.dtype)
    # A user's `dot_general` may not know these two: they are passed only where they are wanted.
    wanted = {"preferred_element_type": self.preferred_element_type, "out_sharding": out_sharding}
    y = self.dot_general(
      x,
      kernel,
      (((x.ndim - 1,), (0,)), ((), ())),
      precision=self.precision,
      **{name: value for name, value in wanted.items() if value is not None},
    )
    return y if bias is None else y + bias
