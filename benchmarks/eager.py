"""What happens outside of `jit`: copies and updates of models, optimizers, metrics, small layers.

By hand, a copy of a model is a copy of each of its arrays, by a compiled copy. Flax NNX's copies
share their arrays with the original, for nothing is written in place there.
"""

import copy
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import nnx as flax

from benchmarks.measure import BASE, Steps
from benchmarks.mlp import mlp
from refax import nnx

DEPTH = 16
_copy = jax.jit(jnp.copy)


def _models() -> tuple[Any, Any, list[jax.Array]]:
  """An MLP in Refax and in Flax NNX, and its arrays."""
  ours = mlp(nnx, DEPTH)
  return ours, mlp(flax, DEPTH), jax.tree.leaves(nnx.to_lojax(ours))


def _both(make: Callable[[Any], Callable[[], Any]]) -> Steps:
  return {"Refax": make(nnx), "Flax": make(flax)}


def clone() -> Steps:
  """A copy of a model with 128 arrays."""
  ours, theirs, arrays = _models()
  return {
    BASE: lambda: list(map(_copy, arrays)),
    "Refax": lambda: nnx.clone(ours).layers[-1].linear.bias[...],
    "Flax": lambda: flax.clone(theirs).layers[-1].linear.bias[...],
  }


def deepcopy() -> Steps:
  """The same by `copy.deepcopy`; by hand, of a list of arrays."""
  ours, theirs, arrays = _models()
  return {
    BASE: lambda: copy.deepcopy(arrays),
    "Refax": lambda: copy.deepcopy(ours).layers[-1].linear.bias[...],
    "Flax": lambda: copy.deepcopy(theirs).layers[-1].linear.bias[...],
  }


def update() -> Steps:
  """The values of a State are written to a model with 128 arrays."""
  ours, theirs, arrays = _models()
  state, other = nnx.state(mlp(nnx, DEPTH)), flax.state(mlp(flax, DEPTH))
  return {
    BASE: lambda: list(map(_copy, arrays)),
    "Refax": lambda: nnx.update(ours, state),
    "Flax": lambda: flax.update(theirs, other),
  }


def optimizer() -> Steps:
  """An optimizer with the state of Adam is made for 64 parameters."""
  ours, theirs, _ = _models()
  tx = optax.adam(1e-3)
  params = nnx.to_pure_dict(nnx.state(ours, nnx.Param))
  return {
    BASE: lambda: tx.init(params),
    "Refax": lambda: nnx.Optimizer(ours, tx, wrt=nnx.Param).step[...],
    "Flax": lambda: flax.Optimizer(theirs, tx, wrt=flax.Param).step[...],
  }


def _metrics(lib: Any) -> Any:
  return lib.MultiMetric(loss=lib.metrics.Average("loss"), accuracy=lib.metrics.Accuracy())


def _batch() -> dict[str, jax.Array]:
  return {
    "loss": jnp.ones(()),
    "logits": jax.random.normal(jax.random.key(0), (32, 10)),
    "labels": jnp.arange(32) % 10,
  }


def metrics_update() -> Steps:
  """A batch is counted by an average and an accuracy."""
  batch, zeros = _batch(), [jnp.zeros(()), jnp.zeros((), int)] * 2

  def by_hand():
    total, count, right, seen = zeros
    hits = batch["logits"].argmax(-1) == batch["labels"]
    return total + batch["loss"], count + 1, right + hits.sum(), seen + hits.size

  def step(lib):
    metrics = _metrics(lib)
    return lambda: metrics.update(**batch)

  return {BASE: by_hand} | _both(step)


def metrics_compute() -> Steps:
  """Both of them are computed."""
  total, count = jnp.ones(()), jnp.ones((), int)

  def step(lib):
    metrics = _metrics(lib)
    metrics.update(**_batch())
    return metrics.compute

  return {BASE: lambda: [total / count for _ in range(2)]} | _both(step)


def metrics_reset() -> Steps:
  """Both of them begin again."""

  def step(lib):
    metrics = _metrics(lib)
    return metrics.reset

  zeros = lambda: [jnp.zeros((), dtype) for dtype in ("float32", "int32") * 2]
  return {BASE: zeros} | _both(step)


def embed() -> Steps:
  """Rows of a table are looked up."""
  indices = jnp.arange(32)
  table = jax.random.normal(jax.random.key(0), (1000, 64))
  embedding = eqx.nn.Embedding(1000, 64, key=jax.random.key(0))
  look_up = jax.vmap(embedding)

  def step(lib):
    layer = lib.Embed(1000, 64, rngs=lib.Rngs(0))
    return lambda: layer(indices)

  by_hand = lambda: jnp.take(table, indices, axis=0)
  return {BASE: by_hand} | _both(step) | {"Equinox": lambda: look_up(indices)}


def remat() -> Steps:
  """A layer behind `remat`, where nothing is differentiated."""
  x = jnp.ones((8, 64))
  kernel, bias = jnp.ones((64, 64)), jnp.zeros(64)
  by_hand = jax.checkpoint(lambda kernel, bias, x: jnp.dot(x, kernel) + bias)
  layer = eqx.nn.Linear(64, 64, key=jax.random.key(0))
  equinox = eqx.filter_checkpoint(lambda layer, x: jax.vmap(layer)(x))

  def step(lib):
    layer, call = lib.Linear(64, 64, rngs=lib.Rngs(0)), lib.remat(lambda layer, x: layer(x))
    return lambda: call(layer, x)

  by = {BASE: lambda: by_hand(kernel, bias, x)}
  return by | _both(step) | {"Equinox": lambda: equinox(layer, x)}


def vmap() -> Steps:
  """A layer mapped over a batch."""
  x = jnp.ones((8, 64))
  kernel, bias = jnp.ones((64, 64)), jnp.zeros(64)
  by_hand = jax.vmap(lambda kernel, bias, x: jnp.dot(x, kernel) + bias, (None, None, 0))
  layer = eqx.nn.Linear(64, 64, key=jax.random.key(0))
  equinox = eqx.filter_vmap(lambda layer, x: layer(x), in_axes=(None, 0))

  def step(lib):
    layer = lib.Linear(64, 64, rngs=lib.Rngs(0))
    call = lib.vmap(lambda layer, x: layer(x), in_axes=(None, 0))
    return lambda: call(layer, x)

  by = {BASE: lambda: by_hand(kernel, bias, x)}
  return by | _both(step) | {"Equinox": lambda: equinox(layer, x)}


def scan() -> Steps:
  """A stack of four layers, one after the other; the loop is written once, and called each time."""
  x, kernels, biases = jnp.ones((8, 64)), jnp.ones((4, 64, 64)), jnp.zeros((4, 64))

  def body(x, layer):
    return jax.nn.relu(jnp.dot(x, layer[0]) + layer[1]), None

  def step(lib):
    layers = lib.vmap(lambda key: lib.Linear(64, 64, rngs=lib.Rngs(key)))(
      jax.random.split(jax.random.key(0), 4)
    )
    axes = {"in_axes": (lib.Carry, 0), "out_axes": lib.Carry}
    forward = lib.scan(lambda x, layer: lib.relu(layer(x)), **axes)
    return lambda: forward(x, layers)

  return {BASE: lambda: jax.lax.scan(body, x, (kernels, biases))[0]} | _both(step)


def fori_loop() -> Steps:
  """A layer is applied four times."""
  x, kernel, bias = jnp.ones((8, 64)), jnp.ones((64, 64)), jnp.zeros(64)

  def body(_, given):
    x, kernel, bias = given
    return jnp.dot(x, kernel) + bias, kernel, bias

  def step(lib):
    layer = lib.Linear(64, 64, rngs=lib.Rngs(0))
    body = lambda _, given: (given[0], given[0](given[1]))
    return lambda: lib.fori_loop(0, 4, body, (layer, x))[1]

  return {BASE: lambda: jax.lax.fori_loop(0, 4, body, (x, kernel, bias))[0]} | _both(step)


def while_loop() -> Steps:
  """The same, by a condition on a counter."""
  x, kernel, bias = jnp.ones((8, 64)), jnp.ones((64, 64)), jnp.zeros(64)

  def body(given):
    i, x, kernel, bias = given
    return i + 1, jnp.dot(x, kernel) + bias, kernel, bias

  go_on = lambda given: given[0] < 4

  def step(lib):
    layer = lib.Linear(64, 64, rngs=lib.Rngs(0))
    body = lambda given: (given[0] + 1, given[1], given[1](given[2]))
    return lambda: lib.while_loop(go_on, body, (0, layer, x))[2]

  return {BASE: lambda: jax.lax.while_loop(go_on, body, (0, x, kernel, bias))[1]} | _both(step)


def cond() -> Steps:
  """A layer, or none."""
  x, kernel, bias = jnp.ones((8, 64)), jnp.ones((64, 64)), jnp.zeros(64)
  apply, skip = lambda x, kernel, bias: jnp.dot(x, kernel) + bias, lambda x, kernel, bias: x

  def step(lib):
    layer = lib.Linear(64, 64, rngs=lib.Rngs(0))
    apply, skip = lambda layer, x: layer(x), lambda layer, x: x
    return lambda: lib.cond(True, apply, skip, layer, x)

  return {BASE: lambda: jax.lax.cond(True, apply, skip, x, kernel, bias)} | _both(step)


def recurrent() -> Steps:
  """An LSTM over ten steps; by hand, a loop over a function of arrays."""
  x = jnp.ones((2, 10, 64))
  kernel, bias = jnp.ones((128, 256)), jnp.zeros(256)

  def body(carry, x):
    c, h = carry
    i, f, g, o = jnp.split(jnp.dot(jnp.concatenate([x, h], -1), kernel) + bias, 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (c, h), h

  def by_hand():
    carry = jnp.zeros((2, 64)), jnp.zeros((2, 64))
    return jax.lax.scan(body, carry, jnp.moveaxis(x, 1, 0))[1]

  def step(lib):
    layer = lib.RNN(lib.OptimizedLSTMCell(64, 64, rngs=lib.Rngs(0)))
    return lambda: layer(x)

  return {BASE: by_hand} | _both(step)
