"""An MLP with BatchNorm and Dropout: train step, evaluation, construction, compilation."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx as flax

from benchmarks.dispatch import threaded
from benchmarks.measure import BASE, Steps
from benchmarks.training import TX, train_steps
from refax import nnx

SIZE, BATCH = 64, 32


def data() -> tuple[jax.Array, jax.Array]:
  return jnp.ones((BATCH, SIZE)), jnp.zeros((BATCH, SIZE))


def mlp(lib: Any, depth: int) -> Any:
  """The model in Refax or Flax NNX: the code is the same."""

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


def train(depth: int) -> Steps:
  steps = train_steps(lambda lib: mlp(lib, depth), *data())
  donating = eqx.filter_jit(equinox_step, donate="all-except-first")
  equinox = lambda state, batch: donating(batch, state)
  return steps | {"Equinox filter_jit": threaded(equinox, equinox_trained(depth), data())}


def evaluate(depth: int) -> Steps:
  x, _ = data()

  def made(lib):
    model = mlp(lib, depth)
    model.eval()
    return model

  call = lambda model, x: model(x)
  graphdef, state = nnx.split(nnx.to_lojax(made(nnx)))
  leaves, treedef = jax.tree.flatten(state)
  by_hand = jax.jit(lambda leaves, x: nnx.merge(graphdef, treedef.unflatten(leaves))(x))
  fast, plain, flax_jit = nnx.jit(call), jax.jit(call), flax.jit(call)
  one, two, three = made(nnx), made(nnx), made(flax)
  cached = flax.cached_partial(flax.jit(call), made(flax))
  partial = flax.jit_partial(call, made(flax), graph=False)
  model, state, *_ = equinox_trained(depth)
  model = eqx.nn.inference_mode(model)
  equinox = eqx.filter_jit(lambda model, state, x: _equinox_apply(model, state, x, None)[0])
  return {
    BASE: lambda: by_hand(leaves, x),
    "Refax nnx.jit": lambda: fast(one, x),
    "Refax, jax.jit": lambda: plain(two, x),
    "Flax nnx.jit": lambda: flax_jit(three, x),
    "Flax cached_partial": lambda: cached(x),
    "Flax jit_partial": lambda: partial(x),
    "Equinox filter_jit": lambda: equinox(model, state, x),
  }


def construct(n: int) -> Steps:
  """`n` Linears built eagerly; by hand: the keys, initializers and zeros that they need."""
  init = jax.nn.initializers.lecun_normal()

  def by_hand():
    root, layers = jax.random.key(0), []
    for i in range(n):
      kernel = init(jax.random.fold_in(root, 2 * i), (SIZE, SIZE), jnp.float32)
      jax.random.fold_in(root, 2 * i + 1)  # the bias has a key too
      layers.append((kernel, jnp.zeros((SIZE,), jnp.float32)))
    return layers

  def built(lib):
    rngs = lib.Rngs(0)
    layers = [lib.Linear(SIZE, SIZE, rngs=rngs) for _ in range(n)]
    return layers[-1].kernel[...]

  def equinox():
    keys = jax.random.split(jax.random.key(0), n)
    return [eqx.nn.Linear(SIZE, SIZE, key=key).weight for key in keys][-1]

  return {
    BASE: by_hand,
    "Refax": lambda: built(nnx),
    "Flax": lambda: built(flax),
    "Equinox": equinox,
  }


class EquinoxLayer(eqx.Module):
  linear: eqx.nn.Linear
  norm: eqx.nn.BatchNorm
  dropout: eqx.nn.Dropout

  def __init__(self, key):
    self.linear = eqx.nn.Linear(SIZE, SIZE, key=key)
    self.norm = eqx.nn.BatchNorm(SIZE, axis_name="batch", mode="batch")
    self.dropout = eqx.nn.Dropout(0.1)

  def __call__(self, x, state, key):
    x, state = self.norm(self.linear(x), state)
    return self.dropout(jax.nn.relu(x), key=key), state


class EquinoxMLP(eqx.Module):
  layers: list

  def __init__(self, depth, key):
    self.layers = [EquinoxLayer(k) for k in jax.random.split(key, depth)]

  def __call__(self, x, state, key):
    keys = [None] * len(self.layers) if key is None else jax.random.split(key, len(self.layers))
    for layer, k in zip(self.layers, keys, strict=True):
      x, state = layer(x, state, k)
    return x, state


def equinox_trained(depth: int) -> tuple:
  model, state = eqx.nn.make_with_state(EquinoxMLP)(depth, jax.random.key(0))
  return model, state, TX.init(eqx.filter(model, eqx.is_array)), jax.random.key(1)


def _equinox_apply(model, state, x, key):
  keys = None if key is None else jax.random.split(key, len(x))
  axes = (0, None, None if key is None else 0)
  return jax.vmap(model, axes, (0, None), axis_name="batch")(x, state, keys)


def equinox_step(batch, everything):
  x, y = batch
  model, state, opt_state, key = everything
  key, now = jax.random.split(key)

  def loss(model, state):
    out, state = _equinox_apply(model, state, x, now)
    return ((out - y) ** 2).mean(), state

  (value, state), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model, state)
  updates, opt_state = TX.update(grads, opt_state)
  return (eqx.apply_updates(model, updates), state, opt_state, key), value
