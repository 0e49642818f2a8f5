"""The cases: each gives, for every way of writing it, a function that makes one call."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.__main__ import BASE
from refax import nnx

Steps = dict[str, Callable[[], Any]]


def keeping(step: Callable, *state: Any) -> Callable[[], Any]:
  """A step that takes state and returns it first, as a function without arguments."""
  box = list(state)

  def call() -> Any:
    *box[:], out = step(*box)
    return out

  return call


def dispatch(n: int) -> Steps:
  """A call that adds one to each of `n` small Variables."""
  x = jnp.ones(())

  class Model(nnx.Module):
    def __init__(self):
      self.variables = [nnx.Variable(jnp.zeros(8)) for _ in range(n)]

  def increment(model, x):
    for v in model.variables:
      v[...] += x
    return x

  @functools.partial(jax.jit, donate_argnums=0)
  def by_hand(arrays):
    return [a + x for a in arrays], x

  fast, plain, model, other = nnx.jit(increment), jax.jit(increment), Model(), Model()
  steps: Steps = {
    BASE: keeping(by_hand, [jnp.zeros(8) for _ in range(n)]),
    "Refax nnx.jit": lambda: fast(model, x),
    "Refax, plain jax.jit": lambda: plain(other, x),
  }
  return steps | _flax_dispatch(n, x)


def _flax_dispatch(n: int, x: jax.Array) -> Steps:
  try:
    from flax import nnx as flax
  except ImportError:
    return {}

  class Model(flax.Module):
    def __init__(self):
      self.variables = flax.List([flax.Variable(jnp.zeros(8)) for _ in range(n)])

  @flax.jit
  def increment(model, x):
    for v in model.variables:
      v[...] += x
    return x

  model = Model()
  return {"Flax nnx.jit": lambda: increment(model, x)}


SIZE, BATCH = 64, 32


def train(depth: int) -> Steps:
  """A step of Adam on an MLP with BatchNorm and Dropout."""
  x, y = jnp.ones((BATCH, SIZE)), jnp.zeros((BATCH, SIZE))

  def step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(lambda m: ((m(x) - y) ** 2).mean())(model)
    optimizer.update(model, grads)
    return loss

  def make():
    model = _mlp(nnx, depth)
    return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

  fast, plain, one, two = nnx.jit(step), jax.jit(step), make(), make()
  steps: Steps = {
    BASE: _functional_step(make(), x, y),
    "Refax nnx.jit": lambda: fast(*one, x, y),
    "Refax, plain jax.jit": lambda: plain(*two, x, y),
  }
  return steps | _flax_train(depth, x, y)


def _functional_step(objects: tuple, x: jax.Array, y: jax.Array) -> Callable:
  """The same step with its state as arrays, threaded and donated."""
  graphdef, state = nnx.split(nnx.to_lojax(objects))
  leaves, treedef = jax.tree.flatten(state)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(leaves):
    model, optimizer = nnx.merge(graphdef, treedef.unflatten(leaves))
    loss, grads = nnx.value_and_grad(lambda m: ((m(x) - y) ** 2).mean())(model)
    optimizer.update(model, grads)
    return jax.tree.leaves(nnx.split((model, optimizer))[1]), loss

  box = [leaves]

  def call():
    box[0], loss = step(box[0])
    return loss

  return call


def _mlp(lib: Any, depth: int) -> Any:
  class Layer(lib.Module):
    def __init__(self, rngs):
      self.linear = lib.Linear(SIZE, SIZE, rngs=rngs)
      self.norm = lib.BatchNorm(SIZE, rngs=rngs)
      self.dropout = lib.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
      return self.dropout(lib.relu(self.norm(self.linear(x))))

  class MLP(lib.Module):
    def __init__(self, rngs):
      self.layers = lib.List([Layer(rngs) for _ in range(depth)])

    def __call__(self, x):
      for layer in self.layers:
        x = layer(x)
      return x

  return MLP(lib.Rngs(0))


def _flax_train(depth: int, x: jax.Array, y: jax.Array) -> Steps:
  try:
    from flax import nnx as flax
  except ImportError:
    return {}

  @flax.jit
  def step(model, optimizer, x, y):
    loss, grads = flax.value_and_grad(lambda m: ((m(x) - y) ** 2).mean())(model)
    optimizer.update(model, grads)
    return loss

  model = _mlp(flax, depth)
  optimizer = flax.Optimizer(model, optax.adam(1e-3), wrt=flax.Param)
  return {"Flax nnx.jit": lambda: step(model, optimizer, x, y)}


CASES: dict[str, Callable[[], Steps]] = {
  "10 Variables": lambda: dispatch(10),
  "100": lambda: dispatch(100),
  "400": lambda: dispatch(400),
  "train step, depth 4": lambda: train(4),
  "depth 32": lambda: train(32),
}
