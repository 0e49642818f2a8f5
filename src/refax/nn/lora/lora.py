"""LoRA: a learned product of two thin matrices, added to a layer that stays as it is.

Train the two alone: `nnx.grad(loss, wrt=nnx.LoRAParam)`, `nnx.Optimizer(..., wrt=nnx.LoRAParam)`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from refax.core.annotation import reshaped
from refax.core.module import Module
from refax.core.variable import Param, Variable
from refax.errors import InvalidArgumentError, ShapeMismatchError
from refax.nn import check, dtypes, explicit, initializers
from refax.nn.linear.linear import Linear
from refax.rngs import Rngs
from refax.typing import ArrayLike, Dtype, Initializer

A = TypeVar("A")
DEFAULT_A_INIT = initializers.he_uniform()


class LoRAParam(Param[A]):
  """A Param of `LoRA`: a type of its own, so that a filter can select it.

  >>> from refax import nnx
  >>> model = nnx.LoRALinear(3, 5, lora_rank=2, rngs=nnx.Rngs(0))
  >>> sorted(nnx.state(model, nnx.LoRAParam)["lora"])
  ['lora_a', 'lora_b']
  """


class LoRA(Module):
  """A map `x @ a @ b` of low rank, added to what another module gives.

  With `b` zero, as it is at first, the sum is what that module gives. As in "LoRA: Low-Rank
  Adaptation of Large Language Models", Hu et al. 2021, arXiv:2106.09685.

  Args:
    in_features: size of the last axis of the input; or the sizes of its last axes, as a
      `nnx.LinearGeneral` has them.
    lora_rank: the number of columns of `a` and of rows of `b`.
    out_features: size of the last axis of the output, or the sizes of its last axes.
    base_module: what the map is added to; None for the map alone.
    dtype: what to compute in; by default what input and parameters promote to.
    param_dtype: the dtype of the parameters.
    a_initializer: initializer of `lora_a`, `[*in_features, lora_rank]`; called for a matrix.
    b_initializer: initializer of `lora_b`, `[lora_rank, *out_features]`; called for a matrix.
    lora_param_type: the Variable type of both.
    promote_dtype: `((x, a, b), dtype=) -> (x, a, b)` of one dtype.
    rngs: the stream `params` initialises the parameters.
    a_metadata: metadata of `lora_a`.
    b_metadata: metadata of `lora_b`.
    alpha: scales the map by `alpha / lora_rank`, so that one learning rate suits several ranks;
      None for no scale.

  Raises:
    InvalidArgumentError: a size is not a positive int, `alpha` not a positive number,
      `base_module` cannot be called, or `lora_param_type` is no Variable type.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> rngs = nnx.Rngs(0)
  >>> base = nnx.Linear(3, 5, rngs=rngs)
  >>> model = nnx.LoRA(3, 2, 5, base_module=base, rngs=rngs)
  >>> bool((model(jnp.ones(3)) == base(jnp.ones(3))).all())
  True
  """

  def __init__(
    self,
    in_features: int | Sequence[int],
    lora_rank: int,
    out_features: int | Sequence[int],
    *,
    base_module: Callable[..., Any] | None = None,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    a_initializer: Initializer = DEFAULT_A_INIT,
    b_initializer: Initializer = initializers.zeros,
    lora_param_type: type[Variable] = LoRAParam,
    promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    rngs: Rngs,
    a_metadata: Mapping[str, Any] = MappingProxyType({}),
    b_metadata: Mapping[str, Any] = MappingProxyType({}),
    alpha: float | None = None,
  ):
    self.in_features = _checked("in_features", in_features)
    self.lora_rank = check.size("LoRA", "lora_rank", lora_rank)
    self.out_features = _checked("out_features", out_features)
    is_number = isinstance(alpha, Real) and not isinstance(alpha, bool) and 0 < alpha < math.inf
    if alpha is not None and not is_number:
      want = "a positive number, twice the rank for example, or None"
      raise InvalidArgumentError.value("LoRA", "alpha", alpha, want)
    if base_module is not None and not callable(base_module):
      want = "a Module or function, or None"
      raise InvalidArgumentError.value("LoRA", "base_module", base_module, want)
    if not isinstance(lora_param_type, type) or not issubclass(lora_param_type, Variable):
      want = "a type of Variables: nnx.LoRAParam"
      raise InvalidArgumentError.value("LoRA", "lora_param_type", lora_param_type, want)
    rngs = check.streams("LoRA", rngs)
    self.base_module = base_module
    inputs, outputs = sizes(self.in_features), sizes(self.out_features)
    a = a_initializer(rngs.params(), (math.prod(inputs), self.lora_rank), param_dtype)
    a = reshaped(a, (*inputs, self.lora_rank))
    self.lora_a: Variable[jax.Array] = lora_param_type(a, **a_metadata)
    b = b_initializer(rngs.params(), (self.lora_rank, math.prod(outputs)), param_dtype)
    b = reshaped(b, (self.lora_rank, *outputs))
    self.lora_b: Variable[jax.Array] = lora_param_type(b, **b_metadata)
    self.alpha = alpha
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.lora_param_type = lora_param_type
    self.promote_dtype = promote_dtype

  def __call__(self, x: ArrayLike, **kwargs: Any) -> jax.Array:
    """Map the last axis or axes, and add what `base_module` gives.

    Args:
      x: `[..., *in_features]`.
      **kwargs: keyword arguments of `base_module`.

    Returns:
      `[..., *out_features]`.

    Raises:
      ShapeMismatchError: the last axes have other sizes.
    """
    inputs = check.as_input(x)
    axes = self._axes(inputs)
    factors = (inputs, self.lora_a[...], self.lora_b[...])
    inputs, a, b = self.promote_dtype(factors, dtype=self.dtype)

    def product(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
      thin = jnp.tensordot(x, a, axes)
      return jnp.tensordot(thin if self.alpha is None else thin * self.scale, b, 1)

    out = lambda: explicit.names(inputs)[:-axes] + explicit.names(b)[1:]
    y = explicit.call(product, inputs, a, b, out=out)
    return y if self.base_module is None else explicit.add(y, self.base_module(x, **kwargs))

  @property
  def scale(self) -> float:
    """What the product is multiplied with: `alpha / lora_rank`."""
    return 1.0 if self.alpha is None else self.alpha / self.lora_rank

  def _axes(self, x: jax.Array) -> int:
    """How many axes of an input are mapped; raises ShapeMismatchError if they have other sizes."""
    want = sizes(self.in_features)
    if len(want) == 1:
      check.last_axis("LoRA", x, *want, self.lora_a)
    elif x.shape[-len(want) :] != want:
      raise ShapeMismatchError(
        f"LoRA maps axes of sizes {want}",
        at=check.origin(self.lora_a),
        got=f"an input of shape {x.shape}",
        fix=f"make the last axes {want}, or build LoRA with the input's sizes",
      )
    return len(want)


class LoRALinear(Linear):
  """A `Linear` with a `LoRA` beside it.

  Args:
    in_features: size of the last axis of the input.
    out_features: size of the last axis of the output.
    lora_rank: as in `nnx.LoRA`.
    lora_dtype: what the LoRA computes in; by default what input and parameters promote to.
    lora_param_dtype: the dtype of the parameters of the LoRA.
    a_initializer: as in `nnx.LoRA`.
    b_initializer: as in `nnx.LoRA`.
    lora_param_type: the Variable type of the parameters of the LoRA.
    lora_promote_dtype: as in `nnx.LoRA`.
    rngs: the stream `params` initialises the parameters.
    a_metadata: as in `nnx.LoRA`.
    b_metadata: as in `nnx.LoRA`.
    **kwargs: options of `nnx.Linear`.

  Raises:
    InvalidArgumentError: as `nnx.Linear` and `nnx.LoRA`.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> model = nnx.LoRALinear(3, 5, lora_rank=2, rngs=nnx.Rngs(0))
  >>> model(jnp.ones((4, 3))).shape, model.lora.lora_a.shape
  ((4, 5), (3, 2))
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    lora_rank: int,
    lora_dtype: Dtype | None = None,
    lora_param_dtype: Dtype = jnp.float32,
    a_initializer: Initializer = DEFAULT_A_INIT,
    b_initializer: Initializer = initializers.zeros,
    lora_param_type: type[Variable] = LoRAParam,
    lora_promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    rngs: Rngs,
    a_metadata: Mapping[str, Any] = MappingProxyType({}),
    b_metadata: Mapping[str, Any] = MappingProxyType({}),
    **kwargs: Any,
  ):
    super().__init__(in_features, out_features, rngs=rngs, **kwargs)
    self.lora = LoRA(
      in_features,
      lora_rank,
      out_features,
      dtype=lora_dtype,
      param_dtype=lora_param_dtype,
      a_initializer=a_initializer,
      b_initializer=b_initializer,
      lora_param_type=lora_param_type,
      promote_dtype=lora_promote_dtype,
      rngs=rngs,
      a_metadata=a_metadata,
      b_metadata=b_metadata,
    )

  def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] - Flax's name
    self, x: Shaped[ArrayLike, "*batch in_features"], out_sharding: Any = None
  ) -> Shaped[jax.Array, "*batch {self.out_features}"]:
    """Map the last axis.

    Args:
      x: `[..., in_features]`.
      out_sharding: the sharding of the output of the `Linear`.

    Returns:
      `[..., out_features]`.

    Raises:
      ShapeMismatchError: the last axis has another size.
    """
    check.last_axis("LoRALinear", check.as_input(x), self.in_features, self.kernel)
    return explicit.add(super().__call__(x, out_sharding=out_sharding), self.lora(x))


def sizes(features: int | Sequence[int]) -> tuple[int, ...]:
  """`in_features` or `out_features` as the sizes of axes."""
  return tuple(features) if isinstance(features, Sequence) else (features,)


def _checked(name: str, value: int | Sequence[int]) -> int | tuple[int, ...]:
  """Features as they were given; raises InvalidArgumentError if they are no sizes."""
  if not isinstance(value, Sequence):
    return check.size("LoRA", name, value)
  if not value:
    raise InvalidArgumentError.value("LoRA", name, value, "an int, or at least one")
  return tuple(check.size("LoRA", name, size) for size in value)
