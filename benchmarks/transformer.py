"""A train step of a stack of transformer blocks, written once for Refax and Flax NNX."""

from typing import Any

import jax

from benchmarks.measure import Steps
from benchmarks.training import train_steps

SIZE, HEADS, LENGTH, BATCH = 64, 4, 32, 4


def train(depth: int) -> Steps:
  x = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, SIZE))
  return train_steps(lambda lib: transformer(lib, depth), x, x[:, ::-1])


def block_of(lib: Any, size: int, heads: int, memory: int | None = None) -> type:
  """The class of a block; with a memory of so many positions, it decodes."""

  class Block(lib.Module):
    def __init__(self, rngs):
      self.norms = lib.List([lib.LayerNorm(size, rngs=rngs) for _ in range(2)])
      self.attention = lib.MultiHeadAttention(heads, size, decode=memory is not None, rngs=rngs)
      if memory is not None:
        self.attention.init_cache((1, memory, size))
      self.up = lib.Linear(size, 4 * size, rngs=rngs)
      self.down = lib.Linear(4 * size, size, rngs=rngs)

    def __call__(self, x):
      x = x + self.attention(self.norms[0](x))
      return x + self.down(lib.gelu(self.up(self.norms[1](x))))

  return Block


def transformer(lib: Any, depth: int) -> Any:
  Block = block_of(lib, SIZE, HEADS)

  class Transformer(lib.Module):
    def __init__(self, rngs):
      self.blocks = lib.List([Block(rngs) for _ in range(depth)])

    def __call__(self, x):
      for block in self.blocks:
        x = block(x)
      return x

  return Transformer(lib.Rngs(0))
