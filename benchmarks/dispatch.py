"""What a call costs that does next to nothing: one is added to each of `n` small Variables."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx as flax

from benchmarks.measure import BASE, Steps
from refax import nnx


def dispatch(n: int) -> Steps:
  x = jnp.ones(())
  zeros = lambda: [jnp.zeros(8) for _ in range(n)]

  def increment(model, x):
    for v in model.variables:
      v[...] += x
    return x

  @functools.partial(jax.jit, donate_argnums=0)
  def by_hand(arrays, x):
    return [a + x for a in arrays], x

  class Model(nnx.Module):
    def __init__(self):
      self.variables = list(map(nnx.Variable, zeros()))

  class Flax(flax.Module):
    def __init__(self):
      self.variables = flax.List(map(flax.Variable, zeros()))

  one, two, refs, f1, f2, f3 = (
    Model(),
    Model(),
    list(map(jax.new_ref, zeros())),
    *(Flax() for _ in range(3)),
  )
  fast, plain, flax_jit = nnx.jit(increment), jax.jit(increment), flax.jit(increment)
  raw = jax.jit(_increment_refs)
  cached = flax.cached_partial(flax.jit(increment), f2)
  partial = flax.jit_partial(increment, f3, graph=False)
  equinox = eqx.filter_jit(
    lambda x, arrays: ([a + x for a in arrays], x), donate="all-except-first"
  )
  return {
    BASE: threaded(by_hand, zeros(), x),
    "Refax nnx.jit": lambda: fast(one, x),
    "Refax, jax.jit": lambda: plain(two, x),
    "raw Refs, jax.jit": lambda: raw(refs, x),
    "Flax nnx.jit": lambda: flax_jit(f1, x),
    "Flax cached_partial": lambda: cached(x),
    "Flax jit_partial": lambda: partial(x),
    "Equinox filter_jit": threaded(lambda arrays, x: equinox(x, arrays), zeros(), x),
  }


def _increment_refs(refs, x):
  for ref in refs:
    ref[...] += x
  return x


def threaded(step, state, *args):
  """A function `(state, *args) -> state, out` as one without arguments that keeps its state."""
  box = [state]

  def call():
    box[0], out = step(box[0], *args)
    return out

  return call
