"""What looking inside costs where it is on all the time: names of layers, and a checked step."""

import jax

from benchmarks.dispatch import threaded
from benchmarks.measure import BASE, Steps
from benchmarks.mlp import data, mlp
from benchmarks.tracing import afresh
from benchmarks.training import functional, train_step, trained
from refax import nnx


def checked_step(depth: int) -> Steps:
  """A step of Adam that looks for NaN, and the same step without."""
  x, y = data()
  build = lambda lib: mlp(lib, depth)
  step, leaves = functional(build)
  fast, checked = nnx.jit(train_step(nnx)), nnx.debug.check(train_step(nnx))
  one, two = trained(nnx, build), trained(nnx, build)
  return {
    BASE: threaded(jax.jit(step, donate_argnums=0), leaves, x, y),
    "Refax nnx.jit": lambda: fast(*one, x, y),
    "Refax, nnx.debug.check": lambda: checked(*two, x, y),
  }


def names(depth: int) -> Steps:
  """Tracing and lowering with the names of layers, and without; by hand: functions of arrays."""
  x, y = data()
  build = lambda lib: mlp(lib, depth)
  step, leaves = functional(build)
  ours = trained(nnx, build)
  lower = lambda: jax.jit(train_step(nnx)).lower(*ours, x, y)
  return {
    BASE: afresh(lambda: jax.jit(step).lower(leaves, x, y)),
    "Refax, jax.jit": afresh(lower),
    "Refax, jax.jit, no names": afresh(nnx.use_named_scopes(False)(lower)),
  }
