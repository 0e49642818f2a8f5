"""The network: two convolutions, each with BatchNorm, and a linear layer on top."""

import jax

from refax import nnx


class CNN(nnx.Module):
  """Read digits: images `[batch, 8, 8, 1]` to logits `[batch, 10]`."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
    self.norm1 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
    self.conv2 = nnx.Conv(32, 64, (3, 3), rngs=rngs)
    self.norm2 = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
    self.dropout = nnx.Dropout(0.3, rngs=rngs)
    self.linear = nnx.Linear(4 * 4 * 64, 10, rngs=rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    x = nnx.relu(self.norm1(self.conv1(images)))
    x = nnx.relu(self.norm2(self.conv2(x)))
    x = nnx.max_pool(x, (2, 2), strides=(2, 2))
    x = self.dropout(x.reshape(x.shape[0], -1))
    return self.linear(x)
