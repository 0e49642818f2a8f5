"""WeightNorm and SpectralNorm: wrappers that call a layer with its weights normalized.

The wrapped layer keeps its own weights. In each call a copy of it runs, with arrays computed from
them in their place, so that gradients flow through the normalization; everything else that the
copy holds is shared with the layer, and what it changes is the layer's. What a wrapper keeps for a
weight has the weight's path for a key, as in Flax NNX: `scales[("kernel",)]`.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from refax.core.filters import Filter, PathContains, to_predicate
from refax.core.flatten import flatten
from refax.core.module import Module
from refax.core.variable import BatchStat, Param
from refax.errors import InvalidArgumentError, ShapeMismatchError, UnwantedWriteError
from refax.nn import check, dtypes, explicit, initializers
from refax.nn.norm.layer_norm import axis_tuple
from refax.rngs import Rngs, RngStream
from refax.transforms.lift import Entered, Inputs
from refax.typing import ArrayLike, Dtype, Initializer, Path

KERNELS = PathContains("kernel")


class WeightNorm(Module):
  """A layer whose weights are directions of length 1, times a learned scale for each feature.

  As in "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural
  Networks", Salimans and Kingma 2016, arXiv:1602.07868.

  Args:
    layer_instance: the layer.
    feature_axes: axes of a weight; each index of them has a length and a scale of its own. None
      for one length of the whole weight.
    use_scale: whether there are scales; without them `scales` is None.
    scale_init: initializer of the scales.
    epsilon: added to squares of lengths.
    dtype: the dtype of normalized weights; by default what weight and scale promote to.
    param_dtype: the dtype of the scales.
    variable_filter: which Params of the layer to normalize; by default those named `kernel`.
    promote_dtype: as in `nnx.Linear`; decides the dtype of normalized weights.
    rngs: the stream `params` initialises the scales; it gives no key, as in Flax NNX, so that the
      layers which are built next have the same weights as there.

  Raises:
    InvalidArgumentError: `layer_instance` is no layer, `variable_filter` matches none of its
      Params, or one of these lacks an axis.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> rngs = nnx.Rngs(0)
  >>> model = nnx.WeightNorm(nnx.Linear(3, 5, rngs=rngs), rngs=rngs)
  >>> columns = model(jnp.eye(3)); (columns**2).sum(0).round(3).tolist()
  [1.0, 1.0, 1.0, 1.0, 1.0]
  >>> model.scales[("kernel",)].shape
  (5,)
  """

  def __init__(
    self,
    layer_instance: Module,
    *,
    feature_axes: int | Sequence[int] | None = -1,
    use_scale: bool = True,
    scale_init: Initializer = initializers.ones,
    epsilon: float = 1e-12,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    variable_filter: Filter = KERNELS,
    promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    rngs: Rngs,
  ):
    rngs = check.streams("WeightNorm", rngs)
    self.layer_instance = _layer("WeightNorm", layer_instance)
    self.feature_axes = () if feature_axes is None else axis_tuple(feature_axes)
    self.variable_filter = to_predicate(variable_filter)
    shapes = {
      path: tuple(weight.shape[axis] for axis in self._axes(weight))
      for path, weight in self._weights()
    }
    if not shapes:
      want = "a filter that matches Params of the layer: nnx.PathContains('kernel')"
      raise InvalidArgumentError.value("WeightNorm", "variable_filter", variable_filter, want)
    self.scales: dict[Path, Param[jax.Array]] | None = None
    if use_scale:
      keys = _keys(rngs.params)
      init = lambda shape: Param(scale_init(next(keys), shape, param_dtype))
      self.scales = {path: init(shape) for path, shape in shapes.items()}
    self.use_scale = use_scale
    self.scale_init = scale_init
    self.epsilon = epsilon
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.promote_dtype = promote_dtype

  def __call__(self, x: ArrayLike, *args: Any, **kwargs: Any) -> Any:
    """Call the layer with normalized weights.

    Args:
      x: the first argument of the layer.
      *args: more of them.
      **kwargs: its keyword arguments.

    Returns:
      What the layer returns.

    Raises:
      UnwantedWriteError: the layer writes a weight that is normalized.
    """
    weights = {path: self._normalized(path, weight) for path, weight in self._weights()}
    return _call(self.layer_instance, weights, "WeightNorm", x, *args, **kwargs)

  def _weights(self) -> Iterator[tuple[Path, Param]]:
    return (
      (path, weight)
      for path, weight in _params(self.layer_instance)
      if self.variable_filter(path, weight)
    )

  def _axes(self, weight: Param) -> tuple[int, ...]:
    """The axes of the features, none negative."""
    if any(not -weight.ndim <= axis < weight.ndim for axis in self.feature_axes):
      want = f"axes of each weight; the shape of {check.origin(weight)} is {weight.shape}"
      raise InvalidArgumentError.value("WeightNorm", "feature_axes", self.feature_axes, want)
    return tuple(sorted({axis % weight.ndim for axis in self.feature_axes}))

  def _normalized(self, path: Path, weight: Param) -> jax.Array:
    axes, value = self._axes(weight), weight[...]
    others = tuple(axis for axis in range(value.ndim) if axis not in axes)
    scale = None if self.scales is None else self.scales[path][...]
    dtype = self.promote_dtype((value, scale), dtype=self.dtype)[0].dtype

    def scaled(value: jax.Array, scale: jax.Array | None) -> jax.Array:
      direction = _unit(dtypes.wide(value), self.epsilon, others)
      if scale is not None:
        direction = direction * jnp.expand_dims(scale, others)
      return direction.astype(dtype)

    return explicit.call_like(scaled, value, scale)


class SpectralNorm(Module):
  """A layer whose weights are divided by their largest singular values.

  These are estimated by power iteration, which in training goes on from call to call; after
  `model.eval()` each call starts where training ended. A weight with more than two axes counts as
  a matrix with its last axis as columns; Params with fewer are left as they are. As in "Spectral
  Normalization for Generative Adversarial Networks", Miyato et al. 2018, arXiv:1802.05957.

  Args:
    layer_instance: the layer.
    n_steps: how many steps of power iteration a call does.
    epsilon: added to squares of lengths.
    dtype: the dtype of normalized weights; by default what weights and estimates promote to.
    param_dtype: the dtype of the estimates.
    error_on_non_matrix: whether to refuse a layer that has weights with more than two axes.
    update_stats: whether calls keep their estimates, for the next one to start from.
    rngs: the stream `params` initialises the estimates of the singular vectors.

  Raises:
    InvalidArgumentError: `layer_instance` is no layer, or `n_steps` is not a positive int.
    ShapeMismatchError: a weight has more than two axes, and `error_on_non_matrix` is True.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> rngs = nnx.Rngs(0)
  >>> model = nnx.SpectralNorm(nnx.Linear(3, 5, rngs=rngs), n_steps=50, rngs=rngs)
  >>> float(jnp.linalg.norm(model(jnp.eye(3)), ord=2).round(3))
  1.0
  >>> sorted(model.batch_stats)
  [('kernel', 'sigma'), ('kernel', 'u')]
  """

  def __init__(
    self,
    layer_instance: Module,
    *,
    n_steps: int = 1,
    epsilon: float = 1e-12,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    error_on_non_matrix: bool = False,
    update_stats: bool = True,
    rngs: Rngs,
  ):
    rngs = check.streams("SpectralNorm", rngs)
    self.layer_instance = _layer("SpectralNorm", layer_instance)
    self.n_steps = check.size("SpectralNorm", "n_steps", n_steps)
    self.epsilon = epsilon
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.error_on_non_matrix = error_on_non_matrix
    self.use_running_average = not update_stats
    stats = {}
    for path, weight in self._weights():
      if error_on_non_matrix and weight.ndim > 2:
        raise ShapeMismatchError(
          "SpectralNorm with error_on_non_matrix=True takes matrices",
          at=check.origin(weight),
          got=f"a weight of shape {weight.shape}",
          fix="build it with error_on_non_matrix=False, or wrap another layer",
        )
      u = initializers.normal()(rngs.params(), (1, weight.shape[-1]), param_dtype)
      stats[*path, "u"] = BatchStat(u)
      stats[*path, "sigma"] = BatchStat(jnp.ones((), param_dtype))
    self.batch_stats: dict[Path, BatchStat[jax.Array]] = stats

  def __call__(self, x: ArrayLike, update_stats: bool | None = None, **kwargs: Any) -> Any:
    """Call the layer with normalized weights.

    Args:
      x: the first argument of the layer.
      update_stats: whether to keep the estimates; None for what the attribute
        `use_running_average` says.
      **kwargs: keyword arguments of the layer.

    Returns:
      What the layer returns.

    Raises:
      UnwantedWriteError: the layer writes a weight that is normalized.
    """
    update = not self.use_running_average if update_stats is None else update_stats
    weights, moved = {}, []
    for path, weight in self._weights():
      u, sigma = (self.batch_stats[*path, which] for which in ("u", "sigma"))
      weights[path], new_u, new_sigma = self._normalized(weight[...], u[...])
      moved += [(u, new_u), (sigma, new_sigma)] if update else []
    out = _call(self.layer_instance, weights, "SpectralNorm", x, **kwargs)
    for variable, new in moved:  # last: a call that fails has changed nothing
      variable[...] = new.astype(variable.dtype)
    return out

  def _weights(self) -> Iterator[tuple[Path, Param]]:
    return (pair for pair in _params(self.layer_instance) if pair[1].ndim > 1)

  def _normalized(self, value: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weight, and the estimates of its right singular vector and of its singular value."""
    out = lambda: (explicit.names(value), explicit.names(u), [])
    return explicit.call(self._iterated, value, u, out=out)

  def _iterated(self, value: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    dtype = dtypes.canonicalize_dtype(value, u, dtype=self.dtype)
    matrix, u = dtypes.wide(value.reshape(-1, value.shape[-1])), dtypes.wide(u)
    fixed = lax.stop_gradient(matrix)
    v = jnp.zeros((1, matrix.shape[0]), matrix.dtype)
    for _ in range(self.n_steps):
      v = _unit(u @ fixed.T, self.epsilon)
      u = _unit(v @ fixed, self.epsilon)
    # The vectors count as constants: this gives the gradient of the singular value.
    sigma = (v @ matrix @ u.T)[0, 0]
    return (value / jnp.where(sigma != 0, sigma, 1)).astype(dtype), u, sigma


def wrapper_above(nodes: Mapping[Path, Any], path: Path) -> "WeightNorm | SpectralNorm | None":
  """The wrapper that computes the weights of what is at a path, the outermost; None without one.

  Args:
    nodes: the objects of a model by their paths.
    path: where a layer or its weight is.
  """
  above = (nodes.get(path[:i]) for i in range(len(path)))
  return next((x for x in above if isinstance(x, WeightNorm | SpectralNorm)), None)


def _unit(x: jax.Array, epsilon: float, axes: tuple[int, ...] | None = None) -> jax.Array:
  """`x` divided by its length over `axes`; float32 or better, for squares leave float16."""
  return x * lax.rsqrt(lax.square(x).sum(axes, keepdims=True) + epsilon)


def _layer(wrapper: str, layer: Any) -> Module:
  if not isinstance(layer, Module) or not callable(layer):
    raise InvalidArgumentError.value(
      wrapper, "layer_instance", layer, "a Module that can be called: nnx.Linear(...)"
    )
  return layer


def _params(layer: Module) -> Iterator[tuple[Path, Param]]:
  """The Params of a layer and where they are; each one once."""
  flat = flatten(layer)
  for path, leaf in zip(flat.graphdef.paths, flat.leaves, strict=True):
    if isinstance(leaf, Param):
      yield path, leaf


def _call(layer: Module, weights: dict[Path, jax.Array], wrapper: str, *args: Any, **kwargs: Any):
  """Call a layer with arrays in the place of some of its Variables."""
  inputs = Inputs.of((layer,), {})
  paths = [path[2:] for path in inputs.graphdef.paths]  # without the place among the arguments
  places = {i: weights[path] for i, path in enumerate(paths) if path in weights}
  frame = inputs.enter({i: Entered(value, hijax=False) for i, value in places.items()})
  (inner,), _ = frame.args
  outputs = frame.collect(inner(*args, **kwargs))
  for index in outputs.spec.written:
    if index in places:
      raise UnwantedWriteError(
        f"{wrapper} computes this weight anew in each call",
        at=check.origin(inputs.leaves[index]),
        got="a write of the layer that it wraps",
        fix="write it outside of the call, or wrap a layer that does not write its weights",
      )
  return inputs.commit(outputs)


def _keys(stream: RngStream) -> Iterator[jax.Array]:
  """Keys that come of the next key of a stream, which stays its next one."""
  following = jax.random.fold_in(stream.key[...], stream.count[...])
  return (jax.random.fold_in(following, i) for i in itertools.count())
