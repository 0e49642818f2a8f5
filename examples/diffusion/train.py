"""The training: weights, their average, moments and random streams change in place in one step."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.diffusion.model import ANY, Velocity
from refax import nnx

UNLABELLED = 0.1  # the part of the digits whose label is hidden, so that the model knows ANY
DRAWS = 8  # of noise and times, for each number that is reported


class Data(NamedTuple):
  """Digits `[n, 64]` with pixels from -1 to 1, and their labels."""

  images: jax.Array
  labels: jax.Array


class Progress(NamedTuple):
  """How training goes: the mean squared error of the velocity."""

  step: int
  train: float  # of this step
  test: float | None  # of the averaged weights on other digits; measured after some steps only


def error(model: Velocity, data: Data) -> jax.Array:
  """Flow matching (arXiv:2210.02747): on the line from noise to a digit, the velocity is constant.

  Noise, times and hidden labels are drawn from the model's own stream.
  """
  images, labels = data
  noise = jax.random.normal(model.rngs.noise(), images.shape)
  time = jax.random.uniform(model.rngs.time(), labels.shape)
  hidden = jax.random.bernoulli(model.rngs.hide(), UNLABELLED, labels.shape)
  x = noise + time[:, None] * (images - noise)
  velocity = model(x, time, jnp.where(hidden, ANY, labels))
  return ((velocity - (images - noise)) ** 2).mean()


@partial(nnx.jit, static_argnames="batch_size")
def train_step(
  model: Velocity, optimizer: nnx.Optimizer, ema: nnx.EMA, data: Data, *, batch_size: int
) -> jax.Array:
  """One step on a batch that the model's own stream chooses."""
  chosen = jax.random.randint(model.rngs.batch(), (batch_size,), 0, len(data.labels))
  batch = jax.tree.map(lambda x: x[chosen], data)
  loss, grads = nnx.value_and_grad(error)(model, batch)
  optimizer.update(model, grads)
  ema.update(model)
  return loss


@nnx.jit
def evaluate(model: Velocity, data: Data) -> jax.Array:
  """The error on digits, a mean over several draws of noise and times."""
  return jax.lax.map(lambda _: error(model, data), jnp.arange(DRAWS)).mean()


def fit(
  model: Velocity,
  ema: nnx.EMA,
  train: Data,
  test: Data,
  *,
  steps: int,
  batch_size: int,
  lr: float,
) -> Iterator[Progress]:
  """Train `model`, keep its average in `ema`, and say after each step how it goes."""
  schedule = optax.warmup_cosine_decay_schedule(0.0, lr, steps // 20, steps)
  transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
  optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
  every = max(1, steps // 15)
  for step in range(1, steps + 1):
    loss = float(train_step(model, optimizer, ema, train, batch_size=batch_size))
    measured = None
    if step % every == 0:
      model.eval()
      with ema.applied(model):
        measured = float(evaluate(model, test))
      model.train()
    yield Progress(step, loss, measured)


def as_data(images: np.ndarray, labels: np.ndarray) -> Data:
  """Images `[n, 8, 8, 1]` between 0 and 1, as the model has them."""
  return Data(jnp.asarray(images.reshape(len(images), -1) * 2 - 1), jnp.asarray(labels))
