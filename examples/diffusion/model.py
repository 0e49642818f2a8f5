"""The model: in which direction each pixel of a noisy digit has to move."""

import jax
import jax.numpy as jnp

from refax import nnx

PIXELS, CLASSES = 64, 10
ANY = CLASSES  # the label that stands for every digit


class Block(nnx.Module):
  """A residual step whose scale and shift depend on the condition: time and label."""

  def __init__(self, hidden: int, dropout: float, *, rngs: nnx.Rngs):
    self.norm = nnx.LayerNorm(hidden, use_bias=False, use_scale=False, rngs=rngs)
    self.modulate = nnx.Linear(hidden, 3 * hidden, kernel_init=nnx.initializers.zeros, rngs=rngs)
    self.up = nnx.Linear(hidden, hidden, rngs=rngs)
    self.down = nnx.Linear(hidden, hidden, rngs=rngs)
    self.dropout = nnx.Dropout(dropout, rngs=rngs)

  def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
    scale, shift, gate = jnp.split(self.modulate(condition), 3, axis=-1)
    y = self.norm(x) * (1 + scale) + shift
    return x + gate * self.down(self.dropout(nnx.silu(self.up(y))))


class Velocity(nnx.Module):
  """`[batch, 64]` at times `[batch]` from 0 (noise) to 1 (a digit), to velocities `[batch, 64]`."""

  def __init__(self, hidden: int, blocks: int, dropout: float, *, rngs: nnx.Rngs):
    self.time = nnx.Linear(2 * FREQUENCIES, hidden, rngs=rngs)
    self.label = nnx.Embed(CLASSES + 1, hidden, rngs=rngs)
    self.first = nnx.Linear(PIXELS, hidden, rngs=rngs)
    self.blocks = [Block(hidden, dropout, rngs=rngs) for _ in range(blocks)]
    self.norm = nnx.LayerNorm(hidden, rngs=rngs)
    self.last = nnx.Linear(hidden, PIXELS, rngs=rngs)
    self.rngs = rngs  # noise, times and batches are drawn from it, in place

  def __call__(self, x: jax.Array, time: jax.Array, label: jax.Array) -> jax.Array:
    condition = nnx.silu(self.time(waves(time)) + self.label(label))
    x = self.first(x)
    for block in self.blocks:
      x = block(x, condition)
    return self.last(self.norm(x))


FREQUENCIES = 16


def waves(time: jax.Array) -> jax.Array:
  """Sines and cosines of times: `[batch]` to `[batch, 32]`."""
  angles = time[:, None] * 2.0 ** jnp.linspace(0, 8, FREQUENCIES)
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
