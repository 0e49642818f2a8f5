"""The network, the derivatives of its output by its input, and what the equation says of them."""

import jax
import jax.numpy as jnp

from refax import nnx

FIRST_GUESS = 0.2  # of the viscosity: ten times too much


class Wave(nnx.Module):
  """A function of place and time, and the viscosity of its medium: both are learned."""

  def __init__(self, *, width: int = 32, rngs: nnx.Rngs):
    self.layers = [
      nnx.Linear(a, b, kernel_init=nnx.initializers.glorot_normal(), rngs=rngs)
      for a, b in ((2, width), (width, width), (width, width), (width, 1))
    ]
    self.log_viscosity = nnx.Param(jnp.log(FIRST_GUESS))  # the logarithm: it stays positive

  def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
    y = jnp.stack([x, 2 * t - 1], axis=-1)
    for layer in self.layers[:-1]:
      y = nnx.tanh(layer(y))
    return self.layers[-1](y)[..., 0]

  @property
  def viscosity(self) -> jax.Array:
    return jnp.exp(self.log_viscosity[...])


def derivatives(model, x: jax.Array, t: jax.Array) -> tuple[jax.Array, ...]:
  """`u, u_x, u_xx, u_t` at points, each `[count]`; a point's value depends on that point alone."""
  one = jnp.ones_like(x)

  def along_x(x):
    return jax.jvp(lambda x: model(x, t), (x,), (one,))

  (u, u_x), (_, u_xx) = jax.jvp(along_x, (x,), (one,))
  _, u_t = jax.jvp(lambda t: model(x, t), (t,), (one,))
  return u, u_x, u_xx, u_t


def residual(model, x: jax.Array, t: jax.Array) -> jax.Array:
  """How far the model is from Burgers' equation at points: zero for a solution."""
  u, u_x, u_xx, u_t = derivatives(model, x, t)
  return u_t + u * u_x - model.viscosity * u_xx
