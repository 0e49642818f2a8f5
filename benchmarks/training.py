"""A train step of a model that is written once for Refax and Flax NNX, in all its ways."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx as flax

from benchmarks.dispatch import threaded
from benchmarks.measure import BASE, Steps
from refax import nnx

TX = optax.adam(1e-3)
Build = Callable[[Any], Any]
"""From the library, `refax.nnx` or `flax.nnx`, to a model."""


def train_step(lib: Any) -> Callable:
  def step(model, optimizer, x, y):
    loss, grads = lib.value_and_grad(lambda m: ((m(x) - y) ** 2).mean())(model)
    optimizer.update(model, grads)
    return loss

  return step


def trained(lib: Any, build: Build) -> tuple[Any, Any]:
  model = build(lib)
  return model, lib.Optimizer(model, TX, wrt=lib.Param)


def functional(build: Build) -> tuple[Callable, Any]:
  """The train step as `(arrays, x, y) -> (arrays, loss)`; objects exist while it is traced."""
  graphdef, state = nnx.split(nnx.to_lojax(trained(nnx, build)))
  leaves, treedef = jax.tree.flatten(state)
  run = train_step(nnx)

  def step(leaves, x, y):
    objects = nnx.merge(graphdef, treedef.unflatten(leaves))
    loss = run(*objects, x, y)
    return jax.tree.leaves(nnx.split(objects)[1]), loss

  return step, leaves


def train_steps(build: Build, x: jax.Array, y: jax.Array) -> Steps:
  by_hand, leaves = functional(build)
  fast, plain = nnx.jit(train_step(nnx)), jax.jit(train_step(nnx))
  flax_jit = flax.jit(train_step(flax))
  one, two, three = trained(nnx, build), trained(nnx, build), trained(flax, build)
  cached = flax.cached_partial(flax.jit(train_step(flax)), *trained(flax, build))
  partial = flax.jit_partial(train_step(flax), *trained(flax, build), graph=False)
  return {
    BASE: threaded(jax.jit(by_hand, donate_argnums=0), leaves, x, y),
    "Refax nnx.jit": lambda: fast(*one, x, y),
    "Refax, jax.jit": lambda: plain(*two, x, y),
    "Flax nnx.jit": lambda: flax_jit(*three, x, y),
    "Flax cached_partial": lambda: cached(x, y),
    "Flax jit_partial": lambda: partial(x, y),
  }
