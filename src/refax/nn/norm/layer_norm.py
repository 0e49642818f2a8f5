"""Normalization: inputs of mean 0 and variance 1, then scaled and shifted as is learned.

Here is what all normalizations share, and the two that work on each example's features.

Statistics are computed in float32 or better whatever the dtype of the input. The fast variance is
`E[|x|^2] - |E[x]|^2`, in one pass over the input; the other one is `E[|x - E[x]|^2]`.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Shaped

from refax.core.module import Module
from refax.core.variable import Param
from refax.nn import check, dtypes, explicit, initializers
from refax.rngs import Rngs
from refax.typing import ArrayLike, Dtype, Initializer


class Norm(Module):
  """What normalizations share: a scale, a bias, and how statistics are computed and applied."""

  axis_name: str | None
  axis_index_groups: Any
  use_fast_variance: bool
  epsilon: float
  dtype: Dtype | None
  promote_dtype: dtypes.PromoteDtype
  scale: Param[jax.Array] | None
  bias: Param[jax.Array] | None

  def _statistics(
    self, x: jax.Array, axes: Sequence[int], mask: Any, *, keepdims: bool = True
  ) -> tuple[Any, Any]:
    """Mean and variance over `axes`, which stay as axes of size 1 if `keepdims`."""
    x, mask = self._wide(x, mask)

    def moments(x: jax.Array, mask: jax.Array | None) -> tuple[Any, Any]:
      if mask is None and self.axis_name is None:
        return _plain_moments(x, tuple(axes), keepdims, self.use_fast_variance)
      means = lambda xs, keepdims: self._means(xs, axes, mask, keepdims)
      return _moments(x, means, tuple(axes), keepdims, self.use_fast_variance)

    return explicit.call(moments, x, mask, out=lambda: (_kept(x, axes, keepdims),) * 2)

  def _mean_square(self, x: jax.Array, axes: Sequence[int], mask: Any) -> jax.Array:
    """Mean of `|x|^2` over `axes`, which stay as axes of size 1."""
    x, mask = self._wide(x, mask)
    mean = lambda x, mask: self._means((_abs_square(x),), axes, mask, True)[0]
    return explicit.call(mean, x, mask, out=lambda: _kept(x, axes, keepdims=True))

  def _wide(self, x: jax.Array, mask: Any) -> tuple[jax.Array, jax.Array | None]:
    """The input in the dtype that statistics are computed in, and a mask that fits it."""
    mask = check.mask(type(self).__name__, x, mask)
    dtype = jnp.promote_types(self.dtype or x.dtype, jnp.float32)
    return x.astype(jnp.promote_types(x.dtype, dtype)), mask

  def _means(
    self, xs: Sequence[jax.Array], axes: Sequence[int], mask: Any, keepdims: bool
  ) -> Sequence[Any]:
    """Means over `axes` and the mapped axis `axis_name`, with one collective for all of them."""
    axis, groups = self.axis_name, self.axis_index_groups
    if mask is None:
      means = _plain_means(xs, axes, keepdims)
      return means if axis is None else lax.pmean(means, axis, axis_index_groups=groups)
    # Shards may differ in how many elements the mask leaves, so it is sums that are added up.
    count = jnp.broadcast_to(mask, xs[0].shape).sum(axes, keepdims=keepdims)
    sums = [x.sum(axes, keepdims=keepdims, where=mask) for x in xs]
    if axis is not None:
      count, sums = lax.psum((count, sums), axis, axis_index_groups=groups)
    return [x / count for x in sums]

  def _normalize(self, x: jax.Array, mean: Any, var: Any, axes: Sequence[int]) -> jax.Array:
    """Apply statistics that broadcast to `x`; scale and bias belong to `axes`."""
    scale, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
    dtype = self.promote_dtype((x, scale, bias), dtype=self.dtype)[0].dtype
    fixed = (self.epsilon, tuple(along(x, axes)), dtype)
    apply = lambda *arrays: _normalized(*arrays, *fixed)
    return explicit.call_like(apply, x, mean, var, scale, bias)


def _moments(
  x: jax.Array,
  means: Callable[[Sequence[jax.Array], bool], Sequence[Any]],
  axes: tuple[int, ...],
  keepdims: bool,
  use_fast_variance: bool,
) -> tuple[Any, Any]:
  """Mean and variance over `axes`, by a function of arrays to their means."""
  if use_fast_variance:
    mean, square = means((x, _abs_square(x)), keepdims)
    return mean, jnp.maximum(0.0, square - _abs_square(mean))  # rounding may make it negative
  (mean,) = means((x,), True)
  (var,) = means((_abs_square(x - mean),), keepdims)
  return mean if keepdims else mean.squeeze(axes), var


def _kept(x: jax.Array, reduced: Sequence[int], keepdims: bool) -> explicit.Names:
  """How statistics are split: as `x`, along the axes that are not reduced."""
  names = [None if axis in reduced else n for axis, n in enumerate(explicit.names(x))]
  return names if keepdims else [n for axis, n in enumerate(names) if axis not in reduced]


def _plain_means(xs: Sequence[jax.Array], axes: Sequence[int], keepdims: bool) -> list[jax.Array]:
  return [x.mean(axes, keepdims=keepdims) for x in xs]


# Compiled by themselves, these are traced and differentiated once for all layers of one shape:
# with ten operations each, they would be most of what tracing a deep model takes.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _plain_moments(
  x: jax.Array, axes: tuple[int, ...], keepdims: bool, use_fast_variance: bool
) -> tuple[jax.Array, jax.Array]:
  """`_moments` of all elements, in this process."""
  means = lambda xs, keepdims: _plain_means(xs, axes, keepdims)
  return _moments(x, means, axes, keepdims, use_fast_variance)


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _normalized(
  x: jax.Array,
  mean: Any,
  var: Any,
  scale: jax.Array | None,
  bias: jax.Array | None,
  epsilon: float,
  shape: tuple[int, ...],
  dtype: Any,
) -> jax.Array:
  """The input with these statistics, of mean 0 and variance 1, scaled and moved."""
  factor = lax.rsqrt(var + epsilon)
  if scale is not None:
    factor = factor * scale.reshape(shape)
  y = (x - mean) * factor
  return (y if bias is None else y + bias.reshape(shape)).astype(dtype)


def along(x: jax.Array, axes: Sequence[int]) -> list[int]:
  """The shape in which what belongs to `axes` broadcasts to `x`."""
  return [n if axis in axes else 1 for axis, n in enumerate(x.shape)]


class LayerNorm(Norm):
  """Normalize each example over its features.

  Args:
    num_features: the number of features: the product of the sizes of `feature_axes`.
    epsilon: added to the variance.
    dtype: the dtype of the output; by default what input and parameters promote to.
    param_dtype: the dtype of the parameters.
    use_bias: whether to add a bias; without one `bias` is None.
    use_scale: whether to multiply with a scale; without one `scale` is None.
    bias_init: initializer of the bias `[num_features]`.
    scale_init: initializer of the scale `[num_features]`.
    reduction_axes: the axes to take statistics over.
    feature_axes: the axes that scale and bias belong to.
    axis_name: an axis of `jax.vmap` or `jax.shard_map` to take statistics over as well.
    axis_index_groups: groups of indices of that axis, each with statistics of its own.
    use_fast_variance: whether to compute the variance in one pass.
    promote_dtype: as in `nnx.Linear`; decides the dtype of the output.
    rngs: the stream `params` initialises the parameters.
    bias_metadata: metadata of the bias.
    scale_metadata: metadata of the scale.

  Raises:
    InvalidArgumentError: `num_features` is not a positive int.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> norm = nnx.LayerNorm(4, rngs=nnx.Rngs(0))
  >>> norm(jnp.array([1.0, 1.0, 3.0, 3.0])).round(3).tolist()
  [-1.0, -1.0, 1.0, 1.0]
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
    reduction_axes: int | Sequence[int] = -1,
    feature_axes: int | Sequence[int] = -1,
    axis_name: str | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    use_fast_variance: bool = True,
    promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    rngs: Rngs,
    bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    scale_metadata: Mapping[str, Any] = MappingProxyType({}),
  ):
    self.num_features = check.size("LayerNorm", "num_features", num_features)
    shape = (self.num_features,)
    rngs = check.streams("LayerNorm", rngs)
    self.scale = parameter(use_scale, scale_init, rngs, shape, param_dtype, scale_metadata)
    self.bias = parameter(use_bias, bias_init, rngs, shape, param_dtype, bias_metadata)
    self.epsilon = epsilon
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.use_bias = use_bias
    self.use_scale = use_scale
    self.reduction_axes = axis_tuple(reduction_axes)
    self.feature_axes = axis_tuple(feature_axes)
    self.axis_name = axis_name
    self.axis_index_groups = group_tuples(axis_index_groups)
    self.use_fast_variance = use_fast_variance
    self.promote_dtype = promote_dtype

  def __call__(
    self, x: Shaped[ArrayLike, "*shape"], *, mask: ArrayLike | None = None
  ) -> Shaped[jax.Array, "*shape"]:
    """Normalize.

    Args:
      x: an array with `num_features` features on its axes `feature_axes`.
      mask: True where an element is to count in the statistics; broadcasts to `x`.

    Returns:
      An array of the shape of `x`.

    Raises:
      ShapeMismatchError: `x` has other features, or the mask does not broadcast to it.
    """
    x = check.as_input(x)
    parameters = (self.scale, self.bias)
    axes = check.features("LayerNorm", x, self.feature_axes, self.num_features, parameters)
    reduced = check.normalized_axes("LayerNorm", x, self.reduction_axes)
    mean, var = self._statistics(x, reduced, mask)
    return self._normalize(x, mean, var, axes)


class RMSNorm(Norm):
  """Divide each example by the root of the mean square of its features; the mean stays.

  As in "Root Mean Square Layer Normalization", Zhang and Sennrich 2019, arXiv:1910.07467.

  Args:
    num_features: the number of features: the product of the sizes of `feature_axes`.
    epsilon: added to the mean square.
    dtype: the dtype of the output; by default what input and parameters promote to.
    param_dtype: the dtype of the scale.
    use_scale: whether to multiply with a scale; without one `scale` is None.
    scale_init: initializer of the scale `[num_features]`.
    reduction_axes: the axes to take the mean over.
    feature_axes: the axes that the scale belongs to.
    axis_name: an axis of `jax.vmap` or `jax.shard_map` to take the mean over as well.
    axis_index_groups: groups of indices of that axis, each with a mean of its own.
    use_fast_variance: without effect, for there is no mean to subtract.
    promote_dtype: as in `nnx.Linear`; decides the dtype of the output.
    rngs: the stream `params` initialises the scale.
    scale_metadata: metadata of the scale.

  Raises:
    InvalidArgumentError: `num_features` is not a positive int.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> norm = nnx.RMSNorm(2, rngs=nnx.Rngs(0))
  >>> norm(jnp.array([3.0, 3.0])).round(3).tolist()
  [1.0, 1.0]
  """

  bias: Param[jax.Array] | None = None

  def __init__(
    self,
    num_features: int,
    *,
    epsilon: float = 1e-6,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    use_scale: bool = True,
    scale_init: Initializer = initializers.ones,
    reduction_axes: int | Sequence[int] = -1,
    feature_axes: int | Sequence[int] = -1,
    axis_name: str | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    use_fast_variance: bool = True,
    promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    rngs: Rngs,
    scale_metadata: Mapping[str, Any] = MappingProxyType({}),
  ):
    self.num_features = check.size("RMSNorm", "num_features", num_features)
    shape = (self.num_features,)
    rngs = check.streams("RMSNorm", rngs)
    self.scale = parameter(use_scale, scale_init, rngs, shape, param_dtype, scale_metadata)
    self.epsilon = epsilon
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.use_scale = use_scale
    self.reduction_axes = axis_tuple(reduction_axes)
    self.feature_axes = axis_tuple(feature_axes)
    self.axis_name = axis_name
    self.axis_index_groups = group_tuples(axis_index_groups)
    self.use_fast_variance = use_fast_variance
    self.promote_dtype = promote_dtype

  def __call__(
    self, x: Shaped[ArrayLike, "*shape"], mask: ArrayLike | None = None
  ) -> Shaped[jax.Array, "*shape"]:
    """Normalize.

    Args:
      x: an array with `num_features` features on its axes `feature_axes`.
      mask: True where an element is to count in the mean; broadcasts to `x`.

    Returns:
      An array of the shape of `x`.

    Raises:
      ShapeMismatchError: `x` has other features, or the mask does not broadcast to it.
    """
    x = check.as_input(x)
    axes = check.features("RMSNorm", x, self.feature_axes, self.num_features, (self.scale,))
    reduced = check.normalized_axes("RMSNorm", x, self.reduction_axes)
    return self._normalize(x, 0.0, self._mean_square(x, reduced, mask), axes)


def _abs_square(x: jax.Array) -> jax.Array:
  return lax.square(x.real) + lax.square(x.imag) if jnp.iscomplexobj(x) else lax.square(x)


def parameter(
  use: bool,
  init: Initializer,
  rngs: Rngs,
  shape: tuple[int, ...],
  dtype: Dtype,
  metadata: Mapping[str, Any],
) -> Param[jax.Array] | None:
  """A Param if it is used: a scale or a bias of a normalization."""
  return Param(init(rngs.params(), shape, dtype), **metadata) if use else None


def axis_tuple(axes: int | Sequence[int]) -> tuple[int, ...]:
  """Axes as a tuple, which is hashable."""
  return tuple(map(operator.index, axes if isinstance(axes, Sequence) else (axes,)))


def group_tuples(groups: Sequence[Sequence[int]] | None) -> tuple[tuple[int, ...], ...] | None:
  """Groups as tuples, which are hashable."""
  return None if groups is None else tuple(map(tuple, groups))
