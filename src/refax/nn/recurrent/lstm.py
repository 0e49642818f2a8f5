"""Long short-term memory: recurrent cells with a memory that gates protect."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from refax.nn import dtypes, initializers
from refax.nn.recurrent.cell import Activation, Cell, Pair, orthogonal
from refax.rngs import Rngs
from refax.typing import ArrayLike, Dtype, Initializer


class LSTMCell(Cell):
  """Long short-term memory, with one matrix for each gate.

  `i, f, o = gate(x @ Wi + h @ Wh + b)`, `g = tanh(x @ Wi + h @ Wh + b)`, each with matrices and a
  bias of its own; `c' = f * c + i * g` and `h' = o * tanh(c')` (Hochreiter and Schmidhuber 1997,
  https://www.bioinf.jku.at/publications/older/2604.pdf).

  Args:
    in_features: size of the last axis of the input.
    hidden_features: size of the last axis of the carry and of the output.
    gate_fn: the activation of the gates i, f and o.
    activation_fn: the activation of g and of the memory.
    kernel_init: initializer of the matrices for the input `[in_features, hidden_features]`.
    recurrent_kernel_init: initializer of those for the carry `[hidden_features, hidden_features]`.
    bias_init: initializer of the biases `[hidden_features]`.
    dtype: what the products are computed in; by default what input and parameters promote to.
    param_dtype: the dtype of the parameters and of the first carry.
    carry_init: initializer of the first carry; None for zeros.
    promote_dtype: as in `nnx.Linear`.
    keep_rngs: whether to fork the stream `carry` for `carry_init`.
    rngs: the stream `params` initialises the parameters.
    kernel_metadata: metadata of the matrices for the input.
    recurrent_kernel_metadata: metadata of those for the carry.
    bias_metadata: metadata of the biases.

  Raises:
    InvalidArgumentError: a size is not a positive int, or `rngs` is not an `nnx.Rngs`.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> cell = nnx.LSTMCell(3, 5, rngs=nnx.Rngs(0))
  >>> (c, h), y = cell(cell.initialize_carry((2, 3)), jnp.ones((2, 3)))
  >>> c.shape, h is y
  ((2, 5), True)
  """

  states = 2

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    gate_fn: Activation = jax.nn.sigmoid,
    activation_fn: Activation = jnp.tanh,
    kernel_init: Initializer = initializers.default_kernel_init,
    recurrent_kernel_init: Initializer = orthogonal,
    bias_init: Initializer = initializers.zeros,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    carry_init: Initializer | None = None,
    promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    keep_rngs: bool = False,
    rngs: Rngs,
    kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
    recurrent_kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
    bias_metadata: Mapping[str, Any] = MappingProxyType({}),
  ):
    linear = self._setup(locals())
    self.gate_fn = gate_fn
    self.ii, self.if_, self.ig, self.io = (linear(1) for _ in range(4))
    self.hi, self.hf, self.hg, self.ho = (
      linear(1, recurrent=True, use_bias=True) for _ in range(4)
    )

  def __call__(
    self, carry: Pair, inputs: Shaped[ArrayLike, "*batch in_features"]
  ) -> tuple[Pair, Shaped[jax.Array, "*batch hidden_features"]]:
    """One step.

    Args:
      carry: memory and output of the step before, each `[batch..., hidden_features]`.
      inputs: `[batch..., in_features]`.

    Returns:
      The new carry, and the output `[batch..., hidden_features]`.

    Raises:
      ShapeMismatchError: the input or the carry has another size.
    """
    x, c, h = self._arrays(carry, inputs, self.ii.kernel)
    i = self.gate_fn(self.ii(x) + self.hi(h))
    f = self.gate_fn(self.if_(x) + self.hf(h))
    g = self.activation_fn(self.ig(x) + self.hg(h))
    o = self.gate_fn(self.io(x) + self.ho(h))
    c = f * c + i * g
    h = o * self.activation_fn(c)
    return (c, h), h


class OptimizedLSTMCell(Cell):
  """`nnx.LSTMCell` with one matrix for all gates: two large products a step instead of eight.

  Its matrices `dense_i` and `dense_h` hold the gates i, f, g and o side by side.

  Args:
    in_features: size of the last axis of the input.
    hidden_features: size of the last axis of the carry and of the output.
    gate_fn: the activation of the gates i, f and o.
    activation_fn: the activation of g and of the memory.
    kernel_init: initializer of the matrix for the input `[in_features, 4 * hidden_features]`.
    recurrent_kernel_init: initializer of that for the carry
      `[hidden_features, 4 * hidden_features]`.
    bias_init: initializer of the bias `[4 * hidden_features]`.
    dtype: what the products are computed in; by default what input and parameters promote to.
    param_dtype: the dtype of the parameters and of the first carry.
    carry_init: initializer of the first carry; None for zeros.
    promote_dtype: as in `nnx.Linear`.
    keep_rngs: whether to fork the stream `carry` for `carry_init`.
    rngs: the stream `params` initialises the parameters.
    kernel_metadata: metadata of the matrix for the input.
    recurrent_kernel_metadata: metadata of that for the carry.
    bias_metadata: metadata of the bias.

  Raises:
    InvalidArgumentError: a size is not a positive int, or `rngs` is not an `nnx.Rngs`.

  >>> from refax import nnx
  >>> cell = nnx.OptimizedLSTMCell(3, 5, rngs=nnx.Rngs(0))
  >>> cell.dense_i.kernel.shape, cell.dense_h.kernel.shape
  ((3, 20), (5, 20))
  """

  states = 2

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    gate_fn: Activation = jax.nn.sigmoid,
    activation_fn: Activation = jnp.tanh,
    kernel_init: Initializer = initializers.default_kernel_init,
    recurrent_kernel_init: Initializer = orthogonal,
    bias_init: Initializer = initializers.zeros,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    carry_init: Initializer | None = None,
    promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    keep_rngs: bool = False,
    rngs: Rngs,
    kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
    recurrent_kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
    bias_metadata: Mapping[str, Any] = MappingProxyType({}),
  ):
    linear = self._setup(locals())
    self.gate_fn = gate_fn
    self.dense_i = linear(4)
    self.dense_h = linear(4, recurrent=True, use_bias=True)

  def __call__(
    self, carry: Pair, inputs: Shaped[ArrayLike, "*batch in_features"]
  ) -> tuple[Pair, Shaped[jax.Array, "*batch hidden_features"]]:
    """One step, as in `nnx.LSTMCell`.

    Args:
      carry: memory and output of the step before, each `[batch..., hidden_features]`.
      inputs: `[batch..., in_features]`.

    Returns:
      The new carry, and the output `[batch..., hidden_features]`.

    Raises:
      ShapeMismatchError: the input or the carry has another size.
    """
    x, c, h = self._arrays(carry, inputs, self.dense_i.kernel)
    i, f, g, o = jnp.split(self.dense_i(x) + self.dense_h(h), 4, axis=-1)
    c = self.gate_fn(f) * c + self.gate_fn(i) * self.activation_fn(g)
    h = self.gate_fn(o) * self.activation_fn(c)
    return (c, h), h
