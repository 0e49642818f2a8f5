"""The training: an epoch is one compiled call, and no key goes in or comes out."""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.vae.model import LEVELS, VAE, Normal
from refax import nnx

# How many ways there are to have a count of 16: a pixel has a binomial distribution.
WAYS = jnp.log(jnp.array([math.comb(LEVELS, count) for count in range(LEVELS + 1)]))


class Epoch(NamedTuple):
  """One pass over the training digits; both in nats for each digit, higher is better."""

  train: float  # mean over the steps
  test: float  # on the test digits, at the end


def log_likelihood(logits: jax.Array, counts: jax.Array) -> jax.Array:
  """The logarithm of the probability of digits given their codes, `[batch]`."""
  on, off = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
  each = WAYS[counts.astype(int)] + counts * on + (LEVELS - counts) * off
  return each.sum(-1)


def elbo(model: VAE, counts: jax.Array) -> jax.Array:
  """A lower bound of the log-probability of digits, `[batch]`; each call draws codes anew."""
  posterior, _, logits = model(counts)
  return log_likelihood(logits, counts) - posterior.kl_to_standard()


@jax.jit
def train_epoch(model: VAE, optimizer: nnx.Optimizer, batches: jax.Array) -> jax.Array:
  """All batches `[steps, batch, 64]` in one `jax.lax.scan`, which carries nothing."""

  def step(_, counts):
    loss, grads = nnx.value_and_grad(lambda model: -elbo(model, counts).mean())(model)
    optimizer.update(model, grads)
    return None, -loss

  return jax.lax.scan(step, None, batches)[1].mean()


@jax.jit
def evaluate(model: VAE, counts: jax.Array) -> jax.Array:
  """The ELBO of digits, a mean over all of them and over four draws of their codes."""
  return jax.lax.map(lambda _: elbo(model, counts).mean(), jnp.arange(4)).mean()


@partial(jax.jit, static_argnames="draws")
def weighted_bound(model: VAE, counts: jax.Array, *, draws: int) -> jax.Array:
  """A tighter bound: importance weighting over several draws (arXiv:1509.00519), `[batch]`."""
  standard = Normal(jnp.zeros(model.latent), jnp.ones(model.latent))

  def weight(_):
    posterior, code, logits = model(counts)
    prior = standard.log_density(code)
    return log_likelihood(logits, counts) + prior - posterior.log_density(code)

  weights = jax.lax.map(weight, jnp.arange(draws))
  return jax.nn.logsumexp(weights, axis=0) - math.log(draws)


def fit(
  model: VAE, train: np.ndarray, test: np.ndarray, *, epochs: int, batch_size: int, lr: float
) -> Iterator[Epoch]:
  """Train `model`, and say after each epoch how it went."""
  steps = len(train) // batch_size
  schedule = optax.cosine_decay_schedule(lr, epochs * steps)
  transform = optax.chain(optax.clip_by_global_norm(100.0), optax.adam(schedule))
  optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
  for _ in range(epochs):
    order = jax.random.permutation(model.rngs.order(), len(train))[: steps * batch_size]
    batches = train[np.asarray(order)].reshape(steps, batch_size, -1)
    bound = train_epoch(model, optimizer, batches)
    yield Epoch(float(bound), float(evaluate(model, test)))
