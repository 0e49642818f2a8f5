"""LossScale: training with float16, whose small numbers end at 6e-8."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refax.core.array_protocol import unwrap
from refax.core.filters import Filter
from refax.core.pytree import Pytree
from refax.core.variable import Param
from refax.core.write import write
from refax.errors import InvalidArgumentError
from refax.nn import dtypes
from refax.train.finite import all_finite
from refax.train.optimizer import OptState
from refax.transforms.autodiff import value_and_grad


class LossScale(Pytree):
  """Multiplies the loss by a number, so that no gradient is too small for float16.

  As in "Mixed Precision Training", Micikevicius et al. 2017, arXiv:1710.03740, section 3.2: the
  number is divided by `factor` after gradients that are not finite, and multiplied by it after
  `period` steps without any.

  Keep the Params in float32 and compute in float16: `nnx.Linear(..., dtype=jnp.float16)`. The
  gradients are then float32, and dividing by the number loses nothing. For a model that is sharded
  over several devices build it `with jax.set_mesh(mesh)`.

  Args:
    initial: the number at the start.
    factor: by what it changes; a power of 2 changes no digit of a gradient.
    period: after how many finite steps it grows.
    minimum: it does not fall below.

  Attributes:
    value: the number, float32.
    finite_steps: how many finite steps there were since it has changed, uint32.

  Raises:
    InvalidArgumentError: `initial` or `minimum` is not a positive number, or `minimum` is larger;
      `factor` is not above 1; `period` is not a positive int.

  >>> from refax import nnx; import jax, jax.numpy as jnp, optax
  >>> model = nnx.Linear(2, 1, dtype=jnp.float16, rngs=nnx.Rngs(0))
  >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param, skip_nonfinite=True)
  >>> loss_scale = nnx.LossScale(2.0**24)
  >>> @jax.jit
  ... def step(model, optimizer, loss_scale, x):
  ...   loss, grads = loss_scale.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
  ...   optimizer.update(model, grads)
  ...   return loss
  >>> losses = [step(model, optimizer, loss_scale, jnp.ones((4, 2))) for _ in range(20)]
  >>> bool(losses[-1] < losses[0]), bool(optimizer.skipped > 0), bool(loss_scale.value < 2**24)
  (True, True, True)
  """

  def __init__(
    self,
    initial: float = 2**15,
    *,
    factor: float = 2.0,
    period: int = 2000,
    minimum: float = 1.0,
  ):
    for name, value in (("initial", initial), ("minimum", minimum)):
      if not 0 < _float32(value) < float("inf"):
        want = "a positive number that float32 holds"
        raise InvalidArgumentError.value("LossScale", name, value, want)
    if minimum > initial:
      raise InvalidArgumentError.value("LossScale", "minimum", minimum, "at most `initial`")
    if not 1 < _float32(factor) < float("inf"):
      raise InvalidArgumentError.value("LossScale", "factor", factor, "a number above 1")
    if not isinstance(period, int) or not 1 <= period < 2**32:
      want = "an int of at least 1, below 2**32"
      raise InvalidArgumentError.value("LossScale", "period", period, want)
    self.factor = float(factor)
    self.period = period
    self.minimum = float(minimum)
    self.value = OptState(jnp.asarray(initial, jnp.float32))
    self.finite_steps = OptState(jnp.zeros((), jnp.uint32))

  def scale(self, loss: Any) -> jax.Array:
    """The loss multiplied by the number, in float32 or better: float16 ends at 65504."""
    return _scaled(loss, self.value[...])

  def unscale(self, grads: Any) -> Any:
    """Gradients of the scaled loss, divided by the number; each keeps its dtype.

    Args:
      grads: what `nnx.grad` returned, or any pytree of arrays and lojax Variables.

    Returns:
      The same structure.
    """
    number = self.value[...]

    def divided(g: jax.Array) -> jax.Array:
      return (dtypes.wide(g) / number).astype(g.dtype)

    return jax.tree.map(divided, grads)

  def update(self, grads_finite: Any) -> None:
    """Change the number after a step, in place.

    Args:
      grads_finite: whether the gradients were finite: `nnx.all_finite(grads)`.
    """
    finite, value = jnp.asarray(unwrap(grads_finite)), self.value[...]
    steps, period = self.finite_steps[...] + 1, np.uint32(self.period)
    grown = value * self.factor
    grown = jnp.where((steps >= period) & jnp.isfinite(grown), grown, value)
    value = jnp.where(finite, grown, jnp.maximum(value / self.factor, self.minimum))
    steps = jnp.where(finite & (steps < period), steps, 0)
    write((self.value, value), (self.finite_steps, steps))

  def value_and_grad(
    self,
    f: Callable,
    *,
    argnums: Any = 0,
    has_aux: bool = False,
    wrt: Filter = Param,
    through: Filter = None,
  ) -> Callable[..., Any]:
    """As `nnx.value_and_grad`, with the loss scaled while it is differentiated.

    The number is changed, in place, by whether the gradients are finite.

    Args:
      f: a function that returns a scalar, or `(scalar, aux)`.
      argnums: as in `nnx.value_and_grad`.
      has_aux: whether `f` returns `(scalar, aux)`.
      wrt: which Variables of these arguments.
      through: as in `nnx.value_and_grad`.

    Returns:
      A function that returns `(value, gradient)`, or `((value, aux), gradient)`, neither scaled.
      Where the scaled gradients overflow they are not finite: give them to an
      `nnx.Optimizer(..., skip_nonfinite=True)`.
    """

    def scaled(number: jax.Array, *args: Any, **kwargs: Any) -> Any:
      out = f(*args, **kwargs)
      loss, aux = out if has_aux else (out, None)
      return _scaled(loss, number), (unwrap(loss), aux)

    @wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
      differentiated = value_and_grad(
        partial(scaled, self.value[...]), argnums=argnums, has_aux=True, wrt=wrt, through=through
      )
      (_, (loss, aux)), grads = differentiated(*args, **kwargs)
      grads = self.unscale(grads)
      self.update(all_finite(grads))
      return ((loss, aux) if has_aux else loss), grads

    return wrapper


def _float32(x: Any) -> float:
  """A number as float32 has it: without end above 3.4e38, 0 below 1e-45."""
  with np.errstate(over="ignore"):
    return float(np.float32(x))


def _scaled(loss: Any, number: jax.Array) -> jax.Array:
  return dtypes.wide(jnp.asarray(unwrap(loss))) * number
