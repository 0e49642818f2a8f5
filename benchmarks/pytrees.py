"""Models as pytrees of arrays in plain `jax.jit`: what it costs that they are no dicts."""

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx as flax

from benchmarks.dispatch import threaded
from benchmarks.measure import BASE, Steps
from refax import nnx


def _models(n: int) -> dict:
  """`n` small arrays as a dict, in a lojax model, in a State of Flax, in a Module of Equinox."""
  zeros = lambda: [jnp.zeros(8) for _ in range(n)]

  class Model(nnx.Module):
    def __init__(self):
      self.variables = [nnx.Variable(x, is_hijax=False) for x in zeros()]

  class Flax(flax.Module):
    def __init__(self):
      self.variables = flax.List(map(flax.Variable, zeros()))

  class Equinox(eqx.Module):
    variables: list[jax.Array]

  return {
    BASE: {f"variable_{i}": x for i, x in enumerate(zeros())},
    "Refax lojax": Model(),
    "Flax State": flax.state(Flax()),
    "Equinox Module": Equinox(zeros()),
  }


def read(n: int) -> Steps:
  """All arrays go in and are read; one number comes out."""
  x = jnp.ones(())
  total = jax.jit(lambda model, x: sum(leaf.sum() for leaf in jax.tree.leaves(model)) * x)
  return {
    way: lambda model=model: total(model, x)
    for way, model in _models(n).items()
  }  # fmt: skip


def update(n: int) -> Steps:
  """A model goes in, one with other arrays comes out: a functional program's loop."""
  x = jnp.ones(())
  step = jax.jit(lambda model, x: (jax.tree.map(lambda leaf: leaf + x, model), x), donate_argnums=0)
  return {way: threaded(step, model, x) for way, model in _models(n).items()}
