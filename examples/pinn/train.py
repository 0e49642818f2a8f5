"""The training: one compiled call is hundreds of steps, which also move the points of the equation.

Where the equation is checked is state as well: each step keeps the points at which the model is far
from the equation, and draws the others anew. That is the method of Daw et al., "Mitigating
propagation failures in physics-informed neural networks", 2022, arXiv:2207.02338.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from examples.pinn.burgers import Measurements
from examples.pinn.model import Wave, residual
from refax import nnx


class Training(nnx.Module):
  """All that a run changes: the model, its optimizer, the points and their random stream.

  Args:
    steps: how many there will be; the learning rate falls to nothing over them.
    points: at how many points the equation is checked.
    equation: the weight of the equation; without it, the network follows the measurements only.
    rngs: for the network and the points.
  """

  def __init__(self, steps: int, *, points: int = 1024, equation: float = 1.0, rngs: nnx.Rngs):
    self.model = Wave(rngs=rngs)
    adam = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    self.optimizer = nnx.Optimizer(self.model, adam, wrt=nnx.Param)
    self.equation = equation
    self.rngs = rngs
    self.x = nnx.Variable(rngs.uniform((points,), minval=-1, maxval=1))
    self.t = nnx.Variable(rngs.uniform((points,)))

  def step(self, measured: Measurements) -> tuple[jax.Array, jax.Array]:
    """One step; the viscosity so far, and the mean square of the equation's residual."""
    x, t = self.x[...], self.t[...]

    def loss_fn(model):
      missed = jnp.mean((model(measured.x, measured.t) - measured.u) ** 2)
      if not self.equation:
        return missed, jnp.zeros_like(x)
      far = residual(model, x, t) ** 2
      return missed + self.equation * far.mean(), far

    grads, far = nnx.grad(loss_fn, has_aux=True)(self.model)
    self.optimizer.update(self.model, grads)
    hard = far > far.mean()
    self.x[...] = jnp.where(hard, x, self.rngs.uniform(x.shape, minval=-1, maxval=1))
    self.t[...] = jnp.where(hard, t, self.rngs.uniform(t.shape))
    return self.model.viscosity, far.mean()


@partial(jax.jit, static_argnums=2)
def train(training: Training, measured: Measurements, count: int) -> tuple[jax.Array, jax.Array]:
  """Some steps; the viscosity and the residual after each."""
  return jax.lax.scan(lambda _, __: (None, training.step(measured)), None, length=count)[1]
