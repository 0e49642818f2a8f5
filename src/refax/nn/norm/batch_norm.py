"""BatchNorm: each feature normalized over the batch, with running statistics for evaluation."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from refax import _jax
from refax.core.variable import BatchStat
from refax.errors import InvalidArgumentError, MissingArgumentError
from refax.nn import check, dtypes, explicit, initializers
from refax.nn.norm.layer_norm import Norm, along, group_tuples, parameter
from refax.rngs import Rngs
from refax.typing import ArrayLike, Dtype, Initializer


class BatchNorm(Norm):
  """Normalize each feature over the batch, and keep running statistics for evaluation.

  It is built for training: `model.eval()` switches to the running statistics, `mean` and `var`.
  In training they move in place: `mean = momentum * mean + (1 - momentum) * batch_mean`.

  Args:
    num_features: the number of features.
    use_running_average: whether to normalize with the running statistics and leave them as they
      are; None to be told at each call.
    axis: the axis of the features.
    momentum: how much of the running statistics stays at each step.
    epsilon: added to the variance.
    dtype: the dtype of the output; by default what input and parameters promote to.
    param_dtype: the dtype of the parameters.
    use_bias: whether to add a bias; without one `bias` is None.
    use_scale: whether to multiply with a scale; without one `scale` is None.
    bias_init: initializer of the bias `[num_features]`.
    scale_init: initializer of the scale `[num_features]`.
    axis_name: an axis of `jax.vmap` or `jax.shard_map` to take statistics over as well.
    axis_index_groups: groups of indices of that axis, each with statistics of its own.
    use_fast_variance: whether to compute the variance in one pass.
    promote_dtype: as in `nnx.Linear`; decides the dtype of the output.
    rngs: the stream `params` initialises the parameters.
    bias_metadata: metadata of the bias.
    scale_metadata: metadata of the scale.

  Raises:
    InvalidArgumentError: `num_features`, `axis` or `momentum` makes no sense.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> norm = nnx.BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
  >>> norm(jnp.array([[1.0], [3.0]])).round(3).tolist(), norm.mean[...].tolist()
  ([[-1.0], [1.0]], [1.0])
  >>> norm.eval(); norm(jnp.array([[1.0]])).tolist()
  [[0.0]]
  """

  def __init__(
    self,
    num_features: int,
    *,
    use_running_average: bool | None = False,
    axis: int = -1,
    momentum: float = 0.99,
    epsilon: float = 1e-5,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    use_bias: bool = True,
    use_scale: bool = True,
    bias_init: Initializer = initializers.zeros,
    scale_init: Initializer = initializers.ones,
    axis_name: str | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    use_fast_variance: bool = True,
    promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    rngs: Rngs,
    bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    scale_metadata: Mapping[str, Any] = MappingProxyType({}),
  ):
    if not isinstance(axis, int):
      raise InvalidArgumentError.value("BatchNorm", "axis", axis, "one int")
    if not 0 <= momentum <= 1:
      raise InvalidArgumentError.value("BatchNorm", "momentum", momentum, "a number from 0 to 1")
    self.num_features = check.size("BatchNorm", "num_features", num_features)
    shape = (self.num_features,)
    rngs = check.streams("BatchNorm", rngs)
    self.mean = BatchStat(jnp.zeros(shape, jnp.promote_types(param_dtype, jnp.float32)))
    self.var = BatchStat(jnp.ones(shape, jnp.finfo(self.mean.dtype).dtype))
    self.scale = parameter(use_scale, scale_init, rngs, shape, param_dtype, scale_metadata)
    self.bias = parameter(use_bias, bias_init, rngs, shape, param_dtype, bias_metadata)
    self.use_running_average = use_running_average
    self.axis = axis
    self.momentum = momentum
    self.epsilon = epsilon
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.use_bias = use_bias
    self.use_scale = use_scale
    self.axis_name = axis_name
    self.axis_index_groups = group_tuples(axis_index_groups)
    self.use_fast_variance = use_fast_variance
    self.promote_dtype = promote_dtype

  def set_view(self, use_running_average: bool | None = None) -> None:
    """What `nnx.view` sets.

    Args:
      use_running_average: whether to normalize with the running statistics.
    """
    if use_running_average is not None:
      self.use_running_average = use_running_average

  def __call__(
    self,
    x: Shaped[ArrayLike, "*shape"],
    use_running_average: bool | None = None,
    *,
    mask: ArrayLike | None = None,
  ) -> Shaped[jax.Array, "*shape"]:
    """Normalize, and in training update the running statistics.

    Args:
      x: an array with `num_features` features on its axis `axis`.
      use_running_average: goes before the attribute, if not None.
      mask: True where an element is to count in the statistics; broadcasts to `x`.

    Returns:
      An array of the shape of `x`.

    Raises:
      MissingArgumentError: `use_running_average` is None in both places.
      InvalidArgumentError: in `jax.shard_map`, each shard has statistics of its own, without
        `axis_name`, and the running ones are those of all.
      ShapeMismatchError: `x` has other features, or the mask does not broadcast to it.
    """
    if use_running_average is None:
      use_running_average = self.use_running_average
    if use_running_average is None:
      raise MissingArgumentError.flag("BatchNorm", "use_running_average")
    x = check.as_input(x)
    axes = check.features("BatchNorm", x, (self.axis,), self.num_features, (self.mean,))
    others = tuple(axis for axis in range(x.ndim) if axis not in axes)
    if use_running_average:
      mean, var = self.mean[...], self.var[...]
    else:
      mean, var = self._statistics(x, others, mask, keepdims=False)
      self._move(self.mean, mean)
      self._move(self.var, var)
    shape = along(x, axes)
    return self._normalize(x, mean.reshape(shape), var.reshape(shape), axes)

  def _move(self, running: BatchStat, new: jax.Array) -> None:
    """Move a running statistic towards that of the batch."""
    new = jax.lax.stop_gradient(new)  # a statistic has no gradient: JAX need not trace one
    if jnp.isrealobj(new):  # float64 into float32, but complex into real is an error
      new = new.astype(running.dtype)
    old = running[...]
    if alone := _jax.varying(new) - _jax.varying(old):
      names = repr(tuple(sorted(alone)) if len(alone) > 1 else min(alone))
      want = f"axis_name={names}: the running statistics are the same in all shards"
      raise InvalidArgumentError.value("BatchNorm", "axis_name", self.axis_name, want)
    move = lambda old, new: self.momentum * old + (1 - self.momentum) * new
    running[...] = explicit.call_like(move, old, new)
