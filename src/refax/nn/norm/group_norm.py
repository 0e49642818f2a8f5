"""GroupNorm and InstanceNorm: normalization of each example over its spatial axes."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from refax.errors import InvalidArgumentError, ShapeMismatchError
from refax.nn import check, dtypes, explicit, initializers
from refax.nn.norm.layer_norm import Norm, axis_tuple, group_tuples, parameter
from refax.rngs import Rngs
from refax.typing import ArrayLike, Dtype, Initializer


class GroupNorm(Norm):
  """Normalize each example over its spatial axes and groups of its features.

  Inputs are `[batch, ..., num_features]`: the features on the last axis. As in "Group
  Normalization", Wu and He 2018, arXiv:1803.08494.

  Args:
    num_features: the number of features.
    num_groups: how many groups the features are split into; None if `group_size` is given.
    group_size: the number of features in a group.
    epsilon: added to the variance.
    dtype: the dtype of the output; by default what input and parameters promote to.
    param_dtype: the dtype of the parameters.
    use_bias: whether to add a bias; without one `bias` is None.
    use_scale: whether to multiply with a scale; without one `scale` is None.
    bias_init: initializer of the bias `[num_features]`.
    scale_init: initializer of the scale `[num_features]`.
    reduction_axes: the axes to take statistics over, the last one among them; by default all but
      the first.
    axis_name: an axis of `jax.vmap` or `jax.shard_map` to take statistics over as well.
    axis_index_groups: groups of indices of that axis, each with statistics of its own.
    use_fast_variance: whether to compute the variance in one pass.
    promote_dtype: as in `nnx.Linear`; decides the dtype of the output.
    rngs: the stream `params` initialises the parameters.
    bias_metadata: metadata of the bias.
    scale_metadata: metadata of the scale.

  Raises:
    InvalidArgumentError: the groups do not divide the features, or are given twice or not at all.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> norm = nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))
  >>> norm(jnp.array([[1.0, 3.0, 10.0, 30.0]])).round(3).tolist()
  [[-1.0, 1.0, -1.0, 1.0]]
  """

  def __init__(
    self,
    num_features: int,
    num_groups: int | None = 32,
    group_size: int | None = None,
    *,
    epsilon: float = 1e-6,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    use_bias: bool = True,
    use_scale: bool = True,
    bias_init: Initializer = initializers.zeros,
    scale_init: Initializer = initializers.ones,
    reduction_axes: int | Sequence[int] | None = None,
    axis_name: str | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    use_fast_variance: bool = True,
    promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    rngs: Rngs,
    bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    scale_metadata: Mapping[str, Any] = MappingProxyType({}),
  ):
    self.num_features = check.size("GroupNorm", "num_features", num_features)
    self.num_groups = _count(self.num_features, num_groups, group_size)
    self.group_size = self.num_features // self.num_groups
    shape = (self.num_features,)
    rngs = check.streams("GroupNorm", rngs)
    self.scale = parameter(use_scale, scale_init, rngs, shape, param_dtype, scale_metadata)
    self.bias = parameter(use_bias, bias_init, rngs, shape, param_dtype, bias_metadata)
    self.feature_axis = -1
    self.epsilon = epsilon
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.use_bias = use_bias
    self.use_scale = use_scale
    self.reduction_axes = None if reduction_axes is None else axis_tuple(reduction_axes)
    self.axis_name = axis_name
    self.axis_index_groups = group_tuples(axis_index_groups)
    self.use_fast_variance = use_fast_variance
    self.promote_dtype = promote_dtype

  def __call__(
    self, x: Shaped[ArrayLike, "*shape"], *, mask: ArrayLike | None = None
  ) -> Shaped[jax.Array, "*shape"]:
    """Normalize.

    Args:
      x: `[batch, ..., num_features]`.
      mask: True where an element is to count in the statistics; broadcasts to `x`.

    Returns:
      An array of the shape of `x`.

    Raises:
      ShapeMismatchError: `x` has other features or no batch axis, `reduction_axes` leave out the
        features, or the mask does not broadcast to `x`.
    """
    x = check.as_input(x)
    axes = check.features("GroupNorm", x, (-1,), self.num_features, (self.scale, self.bias))
    reduced = self._reduced(x)
    mask = check.mask("GroupNorm", x, mask)
    kept = lambda: [None if i in reduced[:-1] else n for i, n in enumerate(explicit.names(x))]
    grouped = lambda x, mask: self._grouped(x, mask, reduced)
    mean, var = explicit.call(grouped, x, mask, out=lambda: (kept(), kept()))
    return self._normalize(x, mean, var, axes)

  def _grouped(self, x: jax.Array, mask: Any, reduced: Sequence[int]) -> tuple[jax.Array, ...]:
    """Mean and variance, for each feature those of its group."""
    shape = (*x.shape[:-1], self.num_groups, self.group_size)
    if mask is not None:
      mask = jnp.broadcast_to(mask, x.shape).reshape(shape)
    # The statistics are [..., num_groups, 1]: each one is for the features of its group.
    statistics = self._statistics(x.reshape(shape), (*reduced[:-1], x.ndim), mask)
    return tuple(jnp.repeat(v.squeeze(-1), self.group_size, axis=-1) for v in statistics)

  def _reduced(self, x: jax.Array) -> tuple[int, ...]:
    """The axes to take statistics over, none negative; the features are last."""
    if self.reduction_axes is None:
      _at_least_two_axes("GroupNorm", x)
      return tuple(range(1, x.ndim))
    axes = check.normalized_axes("GroupNorm", x, self.reduction_axes)
    if x.ndim - 1 not in axes:
      raise ShapeMismatchError(
        "GroupNorm takes statistics over features: the last axis",
        got=f"reduction_axes={self.reduction_axes} for an input of shape {x.shape}",
        fix=f"build GroupNorm with reduction_axes={(*axes, -1)}",
      )
    return axes


class InstanceNorm(Norm):
  """Normalize each feature of each example over the spatial axes.

  Inputs are `[batch, ...]`, with the features on `feature_axes`. As in "Instance Normalization:
  The Missing Ingredient for Fast Stylization", Ulyanov et al. 2016, arXiv:1607.08022.

  Args:
    num_features: the number of features: the product of the sizes of `feature_axes`.
    epsilon: added to the variance.
    dtype: the dtype of the output; by default what input and parameters promote to.
    param_dtype: the dtype of the parameters.
    use_bias: whether to add a bias; without one `bias` is None.
    use_scale: whether to multiply with a scale; without one `scale` is None.
    bias_init: initializer of the bias `[num_features]`.
    scale_init: initializer of the scale `[num_features]`.
    feature_axes: the axes of the features; statistics are taken over all others but the first.
    axis_name: an axis of `jax.vmap` or `jax.shard_map` to take statistics over as well.
    axis_index_groups: groups of indices of that axis, each with statistics of its own.
    use_fast_variance: whether to compute the variance in one pass.
    promote_dtype: as in `nnx.Linear`; decides the dtype of the output.
    rngs: the stream `params` initialises the parameters.
    bias_metadata: metadata of the bias.
    scale_metadata: metadata of the scale.

  Raises:
    InvalidArgumentError: `num_features` is not a positive int, or axis 0 is to hold features.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> norm = nnx.InstanceNorm(2, rngs=nnx.Rngs(0))
  >>> norm(jnp.array([[[1.0, 10.0], [3.0, 30.0]]])).round(3).tolist()
  [[[-1.0, -1.0], [1.0, 1.0]]]
  """

  def __init__(
    self,
    num_features: int,
    *,
    epsilon: float = 1e-6,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    use_bias: bool = True,
    use_scale: bool = True,
    bias_init: Initializer = initializers.zeros,
    scale_init: Initializer = initializers.ones,
    feature_axes: int | Sequence[int] = -1,
    axis_name: str | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    use_fast_variance: bool = True,
    promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    rngs: Rngs,
    bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    scale_metadata: Mapping[str, Any] = MappingProxyType({}),
  ):
    self.num_features = check.size("InstanceNorm", "num_features", num_features)
    self.feature_axes = axis_tuple(feature_axes)
    if 0 in self.feature_axes:
      raise InvalidArgumentError.value(
        "InstanceNorm", "feature_axes", feature_axes, "axes other than 0, which is the batch"
      )
    shape = (self.num_features,)
    rngs = check.streams("InstanceNorm", rngs)
    self.scale = parameter(use_scale, scale_init, rngs, shape, param_dtype, scale_metadata)
    self.bias = parameter(use_bias, bias_init, rngs, shape, param_dtype, bias_metadata)
    self.epsilon = epsilon
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.use_bias = use_bias
    self.use_scale = use_scale
    self.axis_name = axis_name
    self.axis_index_groups = group_tuples(axis_index_groups)
    self.use_fast_variance = use_fast_variance
    self.promote_dtype = promote_dtype

  def __call__(
    self, x: Shaped[ArrayLike, "*shape"], *, mask: ArrayLike | None = None
  ) -> Shaped[jax.Array, "*shape"]:
    """Normalize.

    Args:
      x: `[batch, ...]`, with `num_features` features on its axes `feature_axes`.
      mask: True where an element is to count in the statistics; broadcasts to `x`.

    Returns:
      An array of the shape of `x`.

    Raises:
      ShapeMismatchError: `x` has other features or no batch axis, or the mask does not broadcast
        to it.
    """
    x = check.as_input(x)
    _at_least_two_axes("InstanceNorm", x)
    parameters = (self.scale, self.bias)
    axes = check.features("InstanceNorm", x, self.feature_axes, self.num_features, parameters)
    if 0 in axes:  # a negative axis, of an input with few axes
      raise ShapeMismatchError(
        "InstanceNorm takes axis 0 as the batch",
        got=f"an input of shape {x.shape}, with features on axis 0",
        fix="add a batch axis in front: x[None]",
      )
    spatial = tuple(axis for axis in range(1, x.ndim) if axis not in axes)
    mean, var = self._statistics(x, spatial, mask)
    return self._normalize(x, mean, var, axes)


def _count(num_features: int, num_groups: int | None, group_size: int | None) -> int:
  """How many groups there are, given one of their number and their size."""
  if (num_groups is None) == (group_size is None):
    both = (num_groups, group_size)
    fix = "one of the two: num_groups=, or num_groups=None and group_size="
    raise InvalidArgumentError.value("GroupNorm", "(num_groups, group_size)", both, fix)
  name, value = "num_groups", num_groups
  if num_groups is None:
    name, value = "group_size", group_size
  count = check.size("GroupNorm", name, value)
  if num_features % count:
    divisor = f"a divisor of num_features={num_features}"
    raise InvalidArgumentError.value("GroupNorm", name, value, divisor)
  return count if name == "num_groups" else num_features // count


def _at_least_two_axes(layer: str, x: jax.Array) -> None:
  if x.ndim < 2:
    raise ShapeMismatchError(
      f"{layer} takes axis 0 as the batch",
      got=f"an input of shape {x.shape}",
      fix="add a batch axis in front: x[None]",
    )
