"""Decoding with a stack of transformer blocks: a step a token, and a whole loop in one call.

By hand, the blocks are a list of dicts, and their memories are donated.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx as flax
from jax import lax

from benchmarks.dispatch import threaded
from benchmarks.measure import BASE, Steps
from benchmarks.transformer import block_of
from refax import nnx

SIZE, HEADS, DEPTH, LENGTH = 128, 4, 6, 2048
"""Of the memory, twice `DEPTH * LENGTH * SIZE` numbers: 12 MiB; the weights are 4.5 MiB."""

TOKENS = 32
"""Of a whole loop."""

TOKEN = jnp.ones((1, 1, SIZE))


def step() -> Steps:
  """One token through all blocks, at position 0 again and again once the memory is full."""
  one, each = stacked(), listed()
  fast = nnx.jit(_step)
  flax_jit, flax_fast = flax.jit(_step), flax.jit(_step)
  theirs, same = flax_listed(), flax_listed()
  cached = flax.cached_partial(flax_fast, same)
  return {
    BASE: threaded(jax.jit(by_hand_step, donate_argnums=0), *by_hand_state(), TOKEN),
    "Refax nnx.jit": lambda: fast(one, TOKEN),
    "Refax, a List": lambda: fast(each, TOKEN),
    "Flax nnx.jit": lambda: flax_jit(theirs, TOKEN),
    "Flax cached_partial": lambda: cached(TOKEN),
  }


def loop() -> Steps:
  """`TOKENS` tokens in one call, each the output of the one before."""
  one, each = stacked(), listed()
  fast = nnx.jit(_loop)
  theirs = flax_listed()
  cached = flax.cached_partial(flax.jit(_flax_loop), theirs)
  return {
    BASE: threaded(jax.jit(by_hand_loop, donate_argnums=0), *by_hand_state(), TOKEN),
    "Refax nnx.jit": lambda: fast(one, TOKEN),
    "Refax, a List": lambda: fast(each, TOKEN),
    "Flax cached_partial": lambda: cached(TOKEN),
  }


def stacked() -> nnx.TransformerDecoder:
  decoder = nnx.TransformerDecoder(DEPTH, SIZE, HEADS, rngs=nnx.Rngs(0))
  decoder.init_cache((1, LENGTH, SIZE))
  return decoder


class Listed(nnx.Module):
  """The same blocks, one by one."""

  def __init__(self, rngs: nnx.Rngs):
    make = lambda: nnx.TransformerBlock(SIZE, HEADS, is_causal=True, rngs=rngs)
    self.blocks = [make() for _ in range(DEPTH)]
    self.norm = nnx.LayerNorm(SIZE, rngs=rngs)
    for block in self.blocks:
      block.init_cache((1, LENGTH, SIZE))

  def __call__(self, x: jax.Array, *, decode: bool) -> jax.Array:
    for block in self.blocks:
      x = block(x, decode=decode)
    return self.norm(x)


def listed() -> Listed:
  return Listed(nnx.Rngs(0))


def flax_listed() -> Any:
  Block = block_of(flax, SIZE, HEADS, memory=LENGTH)

  class Transformer(flax.Module):
    def __init__(self, rngs):
      self.blocks = flax.List([Block(rngs) for _ in range(DEPTH)])
      self.norm = flax.LayerNorm(SIZE, rngs=rngs)

    def __call__(self, x, *, decode):
      for block in self.blocks:
        x = block(x)
      return self.norm(x)

  return Transformer(flax.Rngs(0))


def _step(model: Any, x: jax.Array) -> jax.Array:
  return model(x, decode=True)


def _loop(model: Any, x: jax.Array) -> jax.Array:
  return lax.fori_loop(0, TOKENS, lambda _, x: model(x, decode=True), x)


def _flax_loop(model: Any, x: jax.Array) -> jax.Array:
  body = flax.scan(
    lambda carry, _: ((carry[0], _step(*carry)), None), length=TOKENS, in_axes=(flax.Carry, None)
  )
  return body((model, x), None)[0][1]


def by_hand_state() -> tuple[Any, Any]:
  """(memory, weights): what a step writes, which is donated, and what it reads."""
  head = SIZE // HEADS
  keys = iter(jax.random.split(jax.random.key(0), 6 * DEPTH))
  normal = lambda *shape: jax.random.normal(next(keys), shape) * SIZE**-0.5
  norm = lambda: (jnp.ones(SIZE), jnp.zeros(SIZE))

  def block() -> dict[str, Any]:
    return {
      "norms": (norm(), norm()),
      "qkv": [(normal(SIZE, HEADS, head), jnp.zeros((HEADS, head))) for _ in range(3)],
      "out": (normal(SIZE, SIZE), jnp.zeros(SIZE)),
      "up": (normal(SIZE, 4 * SIZE), jnp.zeros(4 * SIZE)),
      "down": (normal(4 * SIZE, SIZE), jnp.zeros(SIZE)),
    }

  memory = lambda: jnp.zeros((1, LENGTH, HEADS, head))
  weights: Any = [block() for _ in range(DEPTH)], norm()
  return ([(memory(), memory()) for _ in range(DEPTH)], jnp.zeros((), jnp.int32)), weights


def by_hand_step(memory: Any, weights: Any, x: jax.Array) -> tuple[Any, jax.Array]:
  (memories, used), (blocks, last) = memory, weights
  visible = (jnp.arange(LENGTH) <= used)[None, None, None]
  after = []
  for p, (keys, values) in zip(blocks, memories, strict=True):
    y = _norm(p["norms"][0], x)
    query, key, value = (jnp.einsum("blf,fhd->blhd", y, w) + b for w, b in p["qkv"])
    keys = lax.dynamic_update_slice(keys, key, (0, used, 0, 0))
    values = lax.dynamic_update_slice(values, value, (0, used, 0, 0))
    y = jax.nn.dot_product_attention(query, keys, values, mask=visible)
    x = x + y.reshape(x.shape) @ p["out"][0] + p["out"][1]
    y = _norm(p["norms"][1], x)
    x = x + jax.nn.gelu(y @ p["up"][0] + p["up"][1]) @ p["down"][0] + p["down"][1]
    after.append((keys, values))
  return (after, used + 1), _norm(last, x)


def _norm(p: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
  mean = x.mean(-1, keepdims=True)
  var = jnp.maximum((x * x).mean(-1, keepdims=True) - mean * mean, 0)
  return (x - mean) * (lax.rsqrt(var + 1e-6) * p[0]) + p[1]


def by_hand_loop(memory: Any, weights: Any, x: jax.Array) -> tuple[Any, jax.Array]:
  body = lambda _, carry: by_hand_step(carry[0], weights, carry[1])
  return lax.fori_loop(0, TOKENS, body, (memory, x))
