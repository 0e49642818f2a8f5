"""What needs a process of its own: peak memory of train steps (Linux), the time of an import."""

import ctypes
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import BASE, Steps

PARAMETERS = 200 * 2**20
"""Bytes of parameters in the memory case; Adam's state is twice as much."""


def imports() -> Steps:
  """Seconds to start Python and import; by hand: what a training script imports anyway."""

  # An installed package has its bytecode; so has a checkout after its first import.
  env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

  def seconds(code: str) -> Callable[[], float]:
    def run() -> float:
      start = time.perf_counter()
      subprocess.run([sys.executable, "-c", code], check=True, env=env)
      return time.perf_counter() - start

    def call() -> float:
      run()
      return run()

    return call

  return {
    BASE: seconds("import jax, optax"),
    "Refax": seconds("import jax, optax; from refax import nnx"),
    "Flax": seconds("import jax, optax; from flax import nnx"),
    "Equinox": seconds("import jax, optax, equinox"),
  }


def memory() -> Steps:
  """Bytes of the process at its peak in five steps of Adam, the first of which compiles."""
  return {
    BASE: lambda: _peak(_by_hand),
    "Refax nnx.jit": lambda: _peak(_refax_nnx),
    "Refax, jax.jit": lambda: _peak(_refax_jax),
    "Flax nnx.jit": lambda: _peak(_flax),
  }


def _peak(make: Callable) -> float:
  import jax

  # What malloc keeps of freed arrays is no memory that anyone needs: large blocks go back at once.
  M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
  libc = ctypes.CDLL(None)
  libc.mallopt(M_MMAP_THRESHOLD, 2**20)
  libc.mallopt(M_TRIM_THRESHOLD, 2**20)
  step = make()
  gc.collect()
  Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
  for _ in range(5):
    jax.block_until_ready(step())
  status = Path("/proc/self/status").read_text()
  return 1024 * int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1])


def _sizes() -> tuple[int, int]:
  width = 1024
  return PARAMETERS // 4 // width // width, width


def _model(lib):
  import jax.numpy as jnp
  import optax

  depth, width = _sizes()

  class Layer(lib.Module):
    def __init__(self):
      self.kernel = lib.Param(jnp.full((width, width), 1 / width))

  class Model(lib.Module):
    def __init__(self):
      self.layers = lib.List([Layer() for _ in range(depth)])

    def __call__(self, x):
      for layer in self.layers:
        x = jnp.tanh(x @ layer.kernel[...])
      return x

  def step(model, optimizer, x):
    loss, grads = lib.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
    optimizer.update(model, grads)
    return loss

  model = Model()
  optimizer = lib.Optimizer(model, optax.adam(1e-3), wrt=lib.Param)
  return model, optimizer, step, jnp.ones((8, width))


def _refax_nnx():
  from refax import nnx

  model, optimizer, step, x = _model(nnx)
  run = nnx.jit(step)
  return lambda: run(model, optimizer, x)


def _refax_jax():
  import jax

  from refax import nnx

  model, optimizer, step, x = _model(nnx)
  run = jax.jit(step)
  return lambda: run(model, optimizer, x)


def _flax():
  from flax import nnx

  model, optimizer, step, x = _model(nnx)
  run = nnx.jit(step)
  return lambda: run(model, optimizer, x)


def _by_hand():
  import functools

  import jax
  import jax.numpy as jnp
  import optax

  depth, width = _sizes()
  tx = optax.adam(1e-3)
  params = [jnp.full((width, width), 1 / width) for _ in range(depth)]
  box = [params, tx.init(params)]
  x = jnp.ones((8, width))

  def loss(params):
    y = x
    for kernel in params:
      y = jnp.tanh(y @ kernel)
    return (y**2).mean()

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  def call():
    box[0], box[1], value = step(*box)
    return value

  del params
  return call
