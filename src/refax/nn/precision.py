"""Precision: which dtypes a whole model stores, computes in and returns."""

from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from refax.core.flatten import flatten, walk_nodes
from refax.core.module import Module
from refax.core.variable import Param, is_variable
from refax.errors import InvalidArgumentError
from refax.typing import Dtype, PrecisionLike

T = TypeVar("T")


@dataclass(frozen=True)
class Precision:
  """The dtypes of a model, as one policy for all its layers; None leaves a thing as it is.

  As in "Mixed Precision Training", Micikevicius et al. 2017, arXiv:1710.03740: parameters are kept
  and updated in float32, and cast to a smaller dtype where they are used.

  Args:
    param: the dtype of floating-point Params.
    compute: what layers compute in: their `dtype`.
    output: what `cast_output` casts to.
    accumulate: what matrix products and convolutions add up in: their `preferred_element_type`.
    matmul: how precisely they multiply: their `precision`, as in `jax.lax.dot_general`.

  Raises:
    InvalidArgumentError: something is no floating-point dtype.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.LayerNorm(3, rngs=nnx.Rngs(0)))
  >>> policy = nnx.Precision(param=jnp.float32, compute=jnp.bfloat16, output=jnp.float32)
  >>> policy.apply(model)
  >>> y = model(jnp.ones((1, 2)))
  >>> y.dtype, policy.cast_output(y).dtype, model[0].kernel.dtype
  (dtype(bfloat16), dtype('float32'), dtype('float32'))
  """

  param: Dtype | None = None
  compute: Dtype | None = None
  output: Dtype | None = None
  accumulate: Dtype | None = None
  matmul: PrecisionLike = None

  def __post_init__(self):
    for name in ("param", "compute", "output", "accumulate"):
      dtype = getattr(self, name)
      if dtype is not None and not _is_float(dtype):
        raise InvalidArgumentError.value("Precision", name, dtype, "a floating-point dtype")

  def apply(self, model: Any) -> None:
    """Set the dtypes of a model, in place.

    Every Module below that has the attribute `dtype`, `preferred_element_type` or `precision` gets
    the one of the policy. Params are cast where they are; build the optimizer afterwards, for its
    state has the dtype of the Params that it was built for. Statistics are not cast.

    Args:
      model: a Module, or any pytree of Modules.
    """
    wanted = {
      "dtype": self.compute,
      "param_dtype": self.param,
      "preferred_element_type": self.accumulate,
      "precision": self.matmul,
    }
    for _, module in walk_nodes(model):
      for name, value in wanted.items():
        if value is not None and isinstance(module, Module) and name in vars(module):
          setattr(module, name, value)
    if self.param is not None:
      for leaf in flatten(model).leaves:
        if isinstance(leaf, Param):
          _cast_param(leaf, self.param)

  def cast_param(self, tree: T) -> T:
    """A pytree with its floating-point arrays in the dtype of the Params."""
    return _cast(tree, self.param)

  def cast_compute(self, tree: T) -> T:
    """A pytree with its floating-point arrays in the dtype that layers compute in."""
    return _cast(tree, self.compute)

  def cast_output(self, tree: T) -> T:
    """A pytree with its floating-point arrays in the dtype of the output."""
    return _cast(tree, self.output)


def _is_float(dtype: Any) -> bool:
  try:
    return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
  except TypeError:
    return False


def _cast(tree: Any, dtype: Dtype | None) -> Any:
  if dtype is None:
    return tree
  cast = lambda x: jnp.asarray(x, dtype) if _is_float(getattr(x, "dtype", None)) else x
  values = jax.tree.map(lambda x: x[...] if is_variable(x) else x, tree, is_leaf=is_variable)
  return jax.tree.map(cast, values)


def _cast_param(param: Param, dtype: Dtype) -> None:
  """Give a Param a cell of another dtype; all who share the Param see it."""
  value = param.get_value()
  new = _cast(value, dtype)
  if jax.tree.map(jnp.result_type, new) != jax.tree.map(jnp.result_type, value):
    param.set_raw_value(param.copy(new).get_raw_value())
