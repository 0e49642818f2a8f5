"""CartPole in JAX: the dynamics of gymnasium's CartPole-v1, for one pole whose state is Variables.

The model is that of Barto, Sutton and Anderson, "Neuronlike adaptive elements that can solve
difficult learning control problems", 1983: a pole stands on a cart that is pushed left or right.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from refax import nnx

GRAVITY, CART_MASS, POLE_MASS = 9.8, 1.0, 0.1
HALF_LENGTH = 0.5  # of the pole, in metres
FORCE, SECONDS = 10.0, 0.02  # of one push
X_LIMIT, ANGLE_LIMIT = 2.4, 12 * 2 * jnp.pi / 360
TIME_LIMIT = 500  # steps of an episode, and so the highest return
START = 0.05  # each number of the first state lies between minus this and this


class Transition(NamedTuple):
  """What one step of a pole shows: the numbers that a Q-network learns from."""

  observation: jax.Array  # position, speed, angle, angular speed of the pole, before the step
  action: jax.Array  # 0 pushes left, 1 pushes right
  following: jax.Array  # the observation after the step, before a new episode begins
  fell: jax.Array  # the episode ended because the pole or the cart is beyond its limit
  length: jax.Array  # the steps of the episode that ended here, 0 if none did


class CartPole(nnx.Module):
  """One pole on a cart. `step` changes it in place, and begins a new episode when one is over.

  Args:
    rngs: where the first states come from.
  """

  def __init__(self, *, rngs: nnx.Rngs):
    self.rngs = rngs
    self.state = nnx.Variable(self._first_state())
    self.time = nnx.Variable(jnp.int32(0))

  def step(self, action: jax.Array) -> Transition:
    before = self.state[...]
    after = push(before, action)
    time = self.time[...] + 1
    fell = (jnp.abs(after[0]) > X_LIMIT) | (jnp.abs(after[2]) > ANGLE_LIMIT)
    over = fell | (time >= TIME_LIMIT)
    self.state[...] = jnp.where(over, self._first_state(), after)
    self.time[...] = jnp.where(over, 0, time)
    return Transition(before, action, after, fell, jnp.where(over, time, 0))

  def _first_state(self) -> jax.Array:
    return self.rngs.uniform((4,), minval=-START, maxval=START)


def push(state: jax.Array, action: jax.Array) -> jax.Array:
  """The state after one push, by a step of Euler's method."""
  _, speed, angle, turning = state  # where the cart is does not matter here
  mass, moment = CART_MASS + POLE_MASS, POLE_MASS * HALF_LENGTH
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  force = jnp.where(action == 1, FORCE, -FORCE)
  pushed = (force + moment * turning**2 * sin) / mass
  inertia = HALF_LENGTH * (4 / 3 - POLE_MASS * cos**2 / mass)
  turning_faster = (GRAVITY * sin - cos * pushed) / inertia
  speeding_up = pushed - moment * turning_faster * cos / mass
  return state + SECONDS * jnp.stack([speed, speeding_up, turning, turning_faster])
