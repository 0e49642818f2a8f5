"""Recurrent cells: one step of a recurrent network, `(carry, input) -> (carry, output)`."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from refax.core.module import Module
from refax.core.variable import Variable
from refax.errors import InvalidArgumentError, MissingRngError, ShapeMismatchError
from refax.nn import check, dtypes, explicit, initializers
from refax.nn.linear.linear import Linear
from refax.rngs import Rngs, RngStream
from refax.typing import ArrayLike, Dtype, Initializer

Activation = Callable[..., jax.Array]
Pair = tuple[jax.Array, jax.Array]


def orthogonal(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
  """An orthogonal matrix, computed in float32 or better: QR knows no half precision."""
  wide = jnp.promote_types(dtype, jnp.float32)
  return initializers.orthogonal()(key, shape, wide).astype(dtype)


class RNNCellBase(Module):
  """The base of cells for `nnx.RNN`: a subclass has `__call__` and `initialize_carry`.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> class Sum(nnx.RNNCellBase):
  ...   def initialize_carry(self, input_shape, rngs=None, carry_init=None):
  ...     return jnp.zeros(input_shape)
  ...   def __call__(self, carry, inputs):
  ...     return carry + inputs, carry + inputs
  >>> nnx.RNN(Sum())(jnp.array([[1.0], [2.0], [3.0]])).tolist()
  [[1.0], [3.0], [6.0]]
  """

  @property
  def num_feature_axes(self) -> int:
    """How many axes of the input are features; those before are the batch."""
    return 1

  def initialize_carry(
    self,
    input_shape: tuple[int, ...],
    rngs: Rngs | RngStream | None = None,
    carry_init: Initializer | None = None,
  ) -> Any:
    """The carry of the first step.

    Args:
      input_shape: the shape of the input of one step, `(batch..., features)`.
      rngs: streams for an initializer that draws.
      carry_init: initializer of the carry; None for that of the cell.

    Returns:
      An array, or a pytree of arrays.
    """
    raise NotImplementedError(f"{type(self).__name__}.initialize_carry")

  def __call__(self, carry: Any, inputs: Any) -> tuple[Any, Any]:
    """One step.

    Args:
      carry: what the step before returned.
      inputs: `[batch..., features]`.

    Returns:
      The carry for the next step, and the output of this one.
    """
    raise NotImplementedError(f"{type(self).__name__}.__call__")


class Cell(RNNCellBase):
  """What the cells of Refax share: sizes, and a carry of one or more arrays."""

  states: ClassVar[int] = 1
  """How many arrays the carry has; the last one is what the step before put out."""

  activation_fn: Activation
  dtype: Dtype | None
  param_dtype: Dtype
  promote_dtype: dtypes.PromoteDtype
  carry_init: Initializer | None

  def _setup(self, options: Mapping[str, Any]) -> Callable[..., Linear]:
    """Keep the arguments of a constructor, and return what makes a Linear of the cell."""
    name = type(self).__name__
    self.in_features = check.size(name, "in_features", options["in_features"])
    self.hidden_features = check.size(name, "hidden_features", options["hidden_features"])
    rngs = check.streams(name, options["rngs"])
    self.rngs: RngStream | None = rngs["carry"].fork() if options["keep_rngs"] else None
    for attribute in ("activation_fn", "dtype", "param_dtype", "promote_dtype", "carry_init"):
      setattr(self, attribute, options[attribute])

    def linear(gates: int, *, recurrent: bool = False, use_bias: bool = False) -> Linear:
      prefix = "recurrent_" if recurrent else ""
      return Linear(
        self.hidden_features if recurrent else self.in_features,
        gates * self.hidden_features,
        use_bias=use_bias,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        kernel_init=options[f"{prefix}kernel_init"],
        bias_init=options["bias_init"],
        promote_dtype=self.promote_dtype,
        rngs=rngs,
        kernel_metadata=options[f"{prefix}kernel_metadata"],
        bias_metadata=options["bias_metadata"],
      )

    return linear

  def initialize_carry(
    self,
    input_shape: tuple[int, ...],
    rngs: Rngs | RngStream | None = None,
    carry_init: Initializer | None = None,
  ) -> Any:
    """The carry of the first step: zeros, or what an initializer draws.

    Args:
      input_shape: the shape of the input of one step, `(batch..., in_features)`.
      rngs: streams, of which `carry` is used; None for the cell's own.
      carry_init: initializer of each array of the carry; None for that of the cell.

    Returns:
      `[batch..., hidden_features]`, or a tuple of such arrays.

    Raises:
      MissingRngError: there is an initializer and no stream.
      InvalidArgumentError: `rngs` is no stream.
    """
    init = self.carry_init if carry_init is None else carry_init
    shape = (*input_shape[:-1], self.hidden_features)
    if init is None:
      carry = tuple(jnp.zeros(shape, self.param_dtype) for _ in range(self.states))
    else:
      stream = self._stream(rngs)
      carry = tuple(init(stream(), shape, self.param_dtype) for _ in range(self.states))
    return carry if self.states > 1 else carry[0]

  def _stream(self, rngs: Any) -> RngStream:
    rngs = self.rngs if rngs is None else rngs
    name = type(self).__name__
    if rngs is None:
      raise MissingRngError(
        f"the carry_init of {name} needs random numbers",
        got="no rngs, neither when it was built (with keep_rngs=True) nor now",
        fix="pass rngs=nnx.Rngs(carry=0)",
      )
    stream = rngs["carry"] if isinstance(rngs, Rngs) else rngs
    if not isinstance(stream, RngStream):
      raise InvalidArgumentError.value(name, "rngs", rngs, "nnx.Rngs(carry=0)")
    return stream

  def _arrays(self, carry: Any, inputs: ArrayLike, parameter: Variable) -> list[jax.Array]:
    """The input and the arrays of the carry, checked."""
    name, size = type(self).__name__, self.hidden_features
    x = check.as_input(inputs)
    check.last_axis(name, x, self.in_features, parameter)
    parts = carry if self.states > 1 else (carry,)
    count = len(parts) if isinstance(parts, tuple | list) else 1
    shapes = jax.tree.map(jnp.shape, parts)
    if count != self.states or any(s[-1:] != (size,) for s in shapes):
      one = f"[..., {size}]"
      raise ShapeMismatchError(
        f"{name} carries {' and '.join([one] * self.states)}",
        at=check.origin(parameter),
        got=f"a carry of shape {shapes if self.states > 1 else shapes[0]}",
        fix="start with cell.initialize_carry(inputs.shape)",
      )
    return [x, *(_beside(check.as_input(part), x) for part in parts)]


def _beside(h: jax.Array, x: jax.Array) -> jax.Array:
  """An array of the carry with the axes of the batch split as in the input."""
  if h.ndim != x.ndim:
    return h
  batch = lambda: explicit.broadcast(explicit.names(x)[:-1], explicit.names(h)[:-1])
  return explicit.put(h, lambda: [*batch(), explicit.names(h)[-1]])


class GRUCell(Cell):
  """Gated recurrent unit.

  `r, z = gate(x @ Wi + b + h @ Wh)`, `n = tanh(x @ Wi + b + r * (h @ Wh))`, each with matrices and
  a bias of its own, and `h' = (1 - z) * n + z * h` (Cho et al., arXiv:1406.1078). `dense_i` and
  `dense_h` hold r, z and n side by side; Flax Linen has one bias more, next to `r`.

  Args:
    in_features: size of the last axis of the input.
    hidden_features: size of the last axis of the carry and of the output.
    gate_fn: the activation of r and z.
    activation_fn: the activation of n.
    kernel_init: initializer of the matrix for the input `[in_features, 3 * hidden_features]`.
    recurrent_kernel_init: initializer of that for the carry
      `[hidden_features, 3 * hidden_features]`.
    bias_init: initializer of the bias `[3 * hidden_features]`.
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

  >>> from refax import nnx; import jax.numpy as jnp
  >>> cell = nnx.GRUCell(3, 5, rngs=nnx.Rngs(0))
  >>> h, y = cell(cell.initialize_carry((2, 3)), jnp.ones((2, 3)))
  >>> h.shape, h is y
  ((2, 5), True)
  """

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
    self.dense_i = linear(3, use_bias=True)
    self.dense_h = linear(3, recurrent=True)

  def __call__(
    self,
    carry: Shaped[ArrayLike, "*batch hidden_features"],
    inputs: Shaped[ArrayLike, "*batch in_features"],
  ) -> tuple[
    Shaped[jax.Array, "*batch hidden_features"], Shaped[jax.Array, "*batch hidden_features"]
  ]:
    """One step.

    Args:
      carry: `[batch..., hidden_features]`.
      inputs: `[batch..., in_features]`.

    Returns:
      The new carry, which is the output too, `[batch..., hidden_features]`.

    Raises:
      ShapeMismatchError: the input or the carry has another size.
    """
    x, h = self._arrays(carry, inputs, self.dense_i.kernel)
    xr, xz, xn = jnp.split(self.dense_i(x), 3, axis=-1)
    hr, hz, hn = jnp.split(self.dense_h(h), 3, axis=-1)
    r, z = self.gate_fn(xr + hr), self.gate_fn(xz + hz)
    n = self.activation_fn(xn + r * hn)
    h = (1 - z) * n + z * h
    return h, h


class SimpleCell(Cell):
  """The plain recurrent cell: `h' = tanh(x @ Wi + b + h @ Wh)` (Elman 1990).

  Args:
    in_features: size of the last axis of the input.
    hidden_features: size of the last axis of the carry and of the output.
    dtype: what the products are computed in; None for what input and parameters promote to.
    param_dtype: the dtype of the parameters and of the first carry.
    carry_init: initializer of the first carry; None for zeros.
    residual: whether to add `h` before the activation.
    activation_fn: the activation.
    kernel_init: initializer of the matrix for the input `[in_features, hidden_features]`.
    recurrent_kernel_init: initializer of that for the carry `[hidden_features, hidden_features]`.
    bias_init: initializer of the bias `[hidden_features]`.
    promote_dtype: as in `nnx.Linear`.
    keep_rngs: whether to fork the stream `carry` for `carry_init`.
    rngs: the stream `params` initialises the parameters.
    kernel_metadata: metadata of the matrix for the input.
    recurrent_kernel_metadata: metadata of that for the carry.
    bias_metadata: metadata of the bias.

  Raises:
    InvalidArgumentError: a size is not a positive int, or `rngs` is not an `nnx.Rngs`.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> cell = nnx.SimpleCell(3, 5, rngs=nnx.Rngs(0))
  >>> h, y = cell(cell.initialize_carry((2, 3)), jnp.ones((2, 3)))
  >>> h.shape, h is y
  ((2, 5), True)
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    dtype: Dtype | None = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    carry_init: Initializer | None = None,
    residual: bool = False,
    activation_fn: Activation = jnp.tanh,
    kernel_init: Initializer = initializers.default_kernel_init,
    recurrent_kernel_init: Initializer = orthogonal,
    bias_init: Initializer = initializers.zeros,
    promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
    keep_rngs: bool = False,
    rngs: Rngs,
    kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
    recurrent_kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
    bias_metadata: Mapping[str, Any] = MappingProxyType({}),
  ):
    linear = self._setup(locals())
    self.residual = residual
    self.dense_h = linear(1, recurrent=True)
    self.dense_i = linear(1, use_bias=True)

  def __call__(
    self,
    carry: Shaped[ArrayLike, "*batch hidden_features"],
    inputs: Shaped[ArrayLike, "*batch in_features"],
  ) -> tuple[
    Shaped[jax.Array, "*batch hidden_features"], Shaped[jax.Array, "*batch hidden_features"]
  ]:
    """One step.

    Args:
      carry: `[batch..., hidden_features]`.
      inputs: `[batch..., in_features]`.

    Returns:
      The new carry, which is the output too, `[batch..., hidden_features]`.

    Raises:
      ShapeMismatchError: the input or the carry has another size.
    """
    x, h = self._arrays(carry, inputs, self.dense_i.kernel)
    new = self.dense_i(x) + self.dense_h(h)
    new = self.activation_fn(new + h if self.residual else new)
    return new, new
