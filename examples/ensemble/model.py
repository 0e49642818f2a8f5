"""One member of the ensemble: written as if there were no other."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from refax import nnx


class Prediction(NamedTuple):
  """What y is expected for an x, and how far a measured y lies from that: a normal distribution."""

  mean: jax.Array
  deviation: jax.Array  # the same for all x


class MLP(nnx.Module):
  """Two hidden layers of sines, and one number for the noise: `[batch, 1]` to a Prediction."""

  def __init__(self, hidden: int, *, rngs: nnx.Rngs):
    # Waves of many lengths and phases, so that members begin as different curves.
    wide = {"kernel_init": nnx.initializers.normal(2.0), "bias_init": nnx.initializers.normal(2.0)}
    self.first = nnx.Linear(1, hidden, **wide, rngs=rngs)
    self.second = nnx.Linear(hidden, hidden, rngs=rngs)
    self.mean = nnx.Linear(hidden, 1, rngs=rngs)
    self.noise = nnx.Param(jnp.zeros(()))

  def __call__(self, x: jax.Array) -> Prediction:
    hidden = jnp.sin(self.second(jnp.sin(self.first(x))))
    return Prediction(self.mean(hidden), nnx.softplus(self.noise[...]) + 0.01)


class Member(nnx.Module):
  """A network, its optimizer, and the random stream that chooses its batches: all of it state."""

  def __init__(self, hidden: int, lr: float, *, rngs: nnx.Rngs):
    self.model = MLP(hidden, rngs=rngs)
    self.optimizer = nnx.Optimizer(self.model, optax.adam(lr), wrt=nnx.Param)
    self.rngs = rngs

  def train_step(self, x: jax.Array, y: jax.Array, batch_size: int) -> jax.Array:
    """Learn from some points, drawn by this member's own stream; returns the loss."""
    chosen = jax.random.randint(self.rngs.batch(), (batch_size,), 0, len(x))

    def loss_fn(model):
      mean, deviation = model(x[chosen])
      return jnp.mean(((y[chosen] - mean) / deviation) ** 2 / 2 + jnp.log(deviation))

    loss, grads = nnx.value_and_grad(loss_fn)(self.model)
    self.optimizer.update(self.model, grads)
    return loss
