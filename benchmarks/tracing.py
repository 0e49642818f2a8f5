"""What it takes to trace and lower a train step, and to compile it, by the depth of the model.

By hand: the same MLP with BatchNorm and Dropout as functions of nested dicts of arrays; and once
more with a `jax.Ref` for each array, which is what the state of Refax costs in JAX itself.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import nnx as flax

from benchmarks.measure import BASE, Steps
from benchmarks.mlp import SIZE, data, equinox_step, equinox_trained, mlp
from benchmarks.training import TX, train_step, trained
from refax import nnx


def lower(depth: int) -> Steps:
  """Tracing and lowering: all that is done in Python."""
  x, y = data()
  ours, theirs = (trained(lib, lambda lib: mlp(lib, depth)) for lib in (nnx, flax))
  state, hand = equinox_trained(depth), _by_hand(depth)
  refs = jax.tree.map(jax.new_ref, hand)
  equinox = lambda: eqx.filter_jit(equinox_step).lower((x, y), state)
  return {
    BASE: afresh(lambda: jax.jit(_step).lower(hand, x, y)),
    "Refax nnx.jit": afresh(lambda: nnx.jit(train_step(nnx)).lower(*ours, x, y)),
    "Refax, jax.jit": afresh(lambda: jax.jit(train_step(nnx)).lower(*ours, x, y)),
    "raw Refs, jax.jit": afresh(lambda: jax.jit(_step_of_refs).lower(refs, x, y)),
    "Flax nnx.jit": afresh(lambda: flax.jit(train_step(flax)).lower(*theirs, x, y)),
    "Equinox filter_jit": afresh(equinox),
  }


def first_call(depth: int) -> Steps:
  """The first call: tracing, lowering, compiling, and one step."""
  x, y = data()
  ours, theirs = (trained(lib, lambda lib: mlp(lib, depth)) for lib in (nnx, flax))
  state, hand = equinox_trained(depth), _by_hand(depth)
  return {
    BASE: afresh(lambda: jax.jit(_step)(hand, x, y)),
    "Refax nnx.jit": afresh(lambda: nnx.jit(train_step(nnx))(*ours, x, y)),
    "Refax, jax.jit": afresh(lambda: jax.jit(train_step(nnx))(*ours, x, y)),
    "Flax nnx.jit": afresh(lambda: flax.jit(train_step(flax))(*theirs, x, y)),
    "Equinox filter_jit": afresh(lambda: eqx.filter_jit(equinox_step)((x, y), state)),
  }


def afresh(do: Callable[[], Any]) -> Callable[[], Any]:
  """The same from empty caches."""

  def call():
    jax.clear_caches()
    do()
    return 0

  return call


def _by_hand(depth: int) -> dict:
  """The state of a training: parameters, statistics, the state of Adam, a key."""
  layer = lambda: {
    "kernel": jnp.zeros((SIZE, SIZE)),
    "bias": jnp.zeros(SIZE),
    "scale": jnp.ones(SIZE),
    "offset": jnp.zeros(SIZE),
  }
  params = [layer() for _ in range(depth)]
  stats = [{"mean": jnp.zeros(SIZE), "var": jnp.ones(SIZE)} for _ in range(depth)]
  return {"params": params, "stats": stats, "tx": TX.init(params), "key": jax.random.key(0)}


def _layer(params: dict, stats: dict, key: jax.Array, x: jax.Array) -> tuple[jax.Array, dict]:
  x = x @ params["kernel"] + params["bias"]
  mean, var = x.mean(0), x.var(0)
  momentum = lambda old, new: 0.99 * old + 0.01 * new
  stats = {"mean": momentum(stats["mean"], mean), "var": momentum(stats["var"], var)}
  x = (x - mean) * jax.lax.rsqrt(var + 1e-5) * params["scale"] + params["offset"]
  keep = jax.random.bernoulli(key, 0.9, x.shape)
  return jnp.where(keep, jax.nn.relu(x) / 0.9, 0.0), stats


def _step(state: dict, x: jax.Array, y: jax.Array) -> tuple[dict, jax.Array]:
  key, now = jax.random.split(state["key"])

  def loss_of(params):
    out, stats = x, []
    keys = jax.random.split(now, len(params))
    for layer, old, layer_key in zip(params, state["stats"], keys, strict=True):
      out, new = _layer(layer, old, layer_key, out)
      stats.append(new)
    return ((out - y) ** 2).mean(), stats

  (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
  updates, tx = TX.update(grads, state["tx"], state["params"])
  params = optax.apply_updates(state["params"], updates)
  return {"params": params, "stats": stats, "tx": tx, "key": key}, loss


def _step_of_refs(refs: dict, x: jax.Array, y: jax.Array) -> jax.Array:
  """The same on Refs, without Refax: each is read once, and written once."""
  state, loss = _step(jax.tree.map(lambda ref: ref[...], refs), x, y)
  for ref, new in zip(jax.tree.leaves(refs), jax.tree.leaves(state), strict=True):
    ref[...] = new
  return loss
