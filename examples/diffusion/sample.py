"""Sampling: from noise to digits in one `jax.lax.scan`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.diffusion.model import ANY, PIXELS
from refax import nnx


def guided(model: Any, x: jax.Array, time: jax.Array, labels: jax.Array, guidance: Any):
  """The velocity towards a label; guidance above 1 goes further from what suits every digit."""
  times = jnp.broadcast_to(time, 2 * len(labels))
  both = jnp.concatenate([labels, jnp.full_like(labels, ANY)])
  wanted, unwanted = jnp.split(model(jnp.concatenate([x, x]), times, both), 2)
  return unwanted + guidance * (wanted - unwanted)


@nnx.jit
def sample(model: Any, labels: jax.Array, times: jax.Array, guidance: jax.Array | float):
  """Digits of the labels, `[steps + 1, batch, 64]`: the noise first, what came of it last.

  The noise is from the model's own stream, so each call makes new digits.
  """
  noise = jax.random.normal(model.rngs.noise(), (len(labels), PIXELS))

  def step(x, interval):
    """Heun's method: the mean of the velocities at both ends."""
    start, end = interval
    first = guided(model, x, start, labels, guidance)
    second = guided(model, x + (end - start) * first, end, labels, guidance)
    x = x + (end - start) * (first + second) / 2
    return x, x

  _, path = jax.lax.scan(step, noise, (times[:-1], times[1:]))
  return jnp.concatenate([noise[None], path])


def draw(
  model: nnx.Module, ema: nnx.EMA, labels: Any, *, steps: int = 40, guidance: float = 1.5
) -> np.ndarray:
  """Digits made with the averaged weights; the model's own are as before afterwards."""
  times = jnp.linspace(0.0, 1.0, steps + 1)
  model.eval()
  with ema.applied(model):
    return np.asarray(sample(model, jnp.asarray(labels), times, guidance))
