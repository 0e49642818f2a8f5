"""The model: an encoder, a decoder, and the random stream between them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from refax import nnx

PIXELS, LEVELS = 64, 16  # an image has 8x8 pixels, and a pixel is a whole number from 0 to 16


class Normal(NamedTuple):
  """Independent normal distributions, a vector of them for each digit."""

  mean: jax.Array
  deviation: jax.Array

  def log_density(self, z: jax.Array) -> jax.Array:
    """Summed over the last axis."""
    scaled = (z - self.mean) / self.deviation
    each = scaled**2 / 2 + jnp.log(self.deviation) + jnp.log(2 * jnp.pi) / 2
    return -each.sum(-1)

  def kl_to_standard(self) -> jax.Array:
    """The Kullback-Leibler divergence to mean 0 and deviation 1, in closed form."""
    variance = self.deviation**2
    return (self.mean**2 + variance - 1 - jnp.log(variance)).sum(-1) / 2


class Parts(NamedTuple):
  """What the model made of some digits, `[batch]` first."""

  posterior: Normal  # of the code
  code: jax.Array  # drawn from it
  logits: jax.Array  # of each pixel, given the code


class MLP(nnx.Module):
  def __init__(self, size: int, hidden: int, out: int, *, rngs: nnx.Rngs):
    self.first = nnx.Linear(size, hidden, rngs=rngs)
    self.second = nnx.Linear(hidden, hidden, rngs=rngs)
    self.last = nnx.Linear(hidden, out, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.last(nnx.gelu(self.second(nnx.gelu(self.first(x)))))


class VAE(nnx.Module):
  """Digits `[batch, 64]`, counts from 0 to 16, to what is likely behind them and back.

  `self.rngs` counts in place how often it was asked, so every call draws new codes: in `jax.jit`,
  under a gradient and in each turn of a `jax.lax.scan`.
  """

  def __init__(self, latent: int, hidden: int, *, rngs: nnx.Rngs):
    self.latent = latent
    self.encoder = MLP(PIXELS, hidden, 2 * latent, rngs=rngs)
    self.decoder = MLP(latent, hidden, PIXELS, rngs=rngs)
    self.rngs = rngs

  def encode(self, counts: jax.Array) -> Normal:
    mean, raw = jnp.split(self.encoder(counts / LEVELS - 0.5), 2, axis=-1)
    return Normal(mean, nnx.softplus(raw) + 1e-4)

  def decode(self, code: jax.Array) -> jax.Array:
    """The mean image of a code, between 0 and 1."""
    return jax.nn.sigmoid(self.decoder(code))

  def __call__(self, counts: jax.Array) -> Parts:
    posterior = self.encode(counts)
    noise = jax.random.normal(self.rngs.noise(), posterior.mean.shape)
    code = posterior.mean + posterior.deviation * noise
    return Parts(posterior, code, self.decoder(code))

  def draw(self, count: int) -> jax.Array:
    """Mean images of codes that are drawn from the prior: `[count, 64]`."""
    return self.decode(jax.random.normal(self.rngs.noise(), (count, self.latent)))
