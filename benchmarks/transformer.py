"""A train step of a stack of transformer blocks, written once for Refax and Flax NNX."""

from typing import Any

import jax

from benchmarks.measure import Steps
from benchmarks.training import train_steps

SIZE, HEADS, LENGTH, BATCH = 64, 4, 32, 4


def train(depth: int) -> Steps:
  x = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, SIZE))
  return train_steps(lambda lib: transformer(lib, depth), x, x[:, ::-1])


def transformer(lib: Any, depth: int) -> Any:
  class Block(lib.Module):
    def __init__(self, rngs):
      self.norms = lib.List([lib.LayerNorm(SIZE, rngs=rngs) for _ in range(2)])
      self.attention = lib.MultiHeadAttention(HEADS, SIZE, decode=False, rngs=rngs)
      self.up = lib.Linear(SIZE, 4 * SIZE, rngs=rngs)
      self.down = lib.Linear(4 * SIZE, SIZE, rngs=rngs)

    def __call__(self, x):
      x = x + self.attention(self.norms[0](x))
      return x + self.down(lib.gelu(self.up(self.norms[1](x))))

  class Transformer(lib.Module):
    def __init__(self, rngs):
      self.blocks = lib.List([Block(rngs) for _ in range(depth)])

    def __call__(self, x):
      for block in self.blocks:
        x = block(x)
      return x

  return Transformer(lib.Rngs(0))
