"""PReLU: an activation with a learned parameter."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from refax.core.module import Module
from refax.core.variable import Param
from refax.nn import check, dtypes
from refax.typing import ArrayLike, Dtype


class PReLU(Module):
  """`x` where it is not negative, and elsewhere a learned slope times `x`.

  As in "Delving Deep into Rectifiers", He et al. 2015, arXiv:1502.01852.

  Args:
    negative_slope_init: the slope at first.
    dtype: the dtype of the output; by default what input and slope promote to.
    param_dtype: the dtype of the slope.
    promote_dtype: as in `nnx.Linear`.
    negative_slope_metadata: metadata of the slope.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> nnx.PReLU(0.5)(jnp.array([-2.0, 3.0])).tolist()
  [-1.0, 3.0]
  """

  def __init__(
    self,
    negative_slope_init: float = 0.01,
    *,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    negative_slope_metadata: Mapping[str, Any] = MappingProxyType({}),
  ):
    slope = jnp.asarray(negative_slope_init, param_dtype)
    self.negative_slope = Param(slope, **negative_slope_metadata)
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.promote_dtype = promote_dtype

  def __call__(self, inputs: Shaped[ArrayLike, "*shape"]) -> Shaped[jax.Array, "*shape"]:
    """Apply the function to each element.

    Args:
      inputs: `[...]`.

    Returns:
      An array of the same shape.
    """
    pair = (check.as_input(inputs), self.negative_slope[...])
    x, slope = self.promote_dtype(pair, dtype=self.dtype)
    return jnp.where(x >= 0, x, slope * x)
