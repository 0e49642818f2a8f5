"""Gradients of training itself: they flow through the optimizer's state, as in optax by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx
from refax.errors import DifferentiatedWriteError

X = jnp.linspace(-1.0, 1.0, 16)[:, None]
Y = jnp.sin(3 * X)
RATE = jnp.array(0.1)
TX = {
  "momentum": lambda lr: optax.sgd(lr, momentum=0.9),
  "adam": optax.adam,
  "trace of trace": lambda lr: optax.chain(optax.trace(0.5), optax.sgd(lr, momentum=0.9)),
}


def loss(model):
  return ((model(X) - Y) ** 2).mean()


def made():
  return nnx.Linear(1, 1, rngs=nnx.Rngs(0))


def by_hand(tx):
  start = nnx.to_pure_dict(nnx.state(made()))

  def trained(lr):
    params, state = start, tx(lr).init(start)
    loss = lambda p: ((X @ p["kernel"] + p["bias"] - Y) ** 2).mean()
    for _ in range(4):
      updates, state = tx(lr).update(jax.grad(loss)(params), state, params)
      params = optax.apply_updates(params, updates)
    return loss(params)

  return jax.value_and_grad(trained)(RATE)


def steps(model, optimizer):
  for _ in range(4):
    optimizer.update(model, nnx.grad(loss)(model))
  return loss(model)


def inside(tx, convert=lambda x: x):
  """The model and its optimizer are made in the function that is differentiated."""

  def trained(lr):
    model = convert(made())
    return steps(model, convert(nnx.Optimizer(model, tx(lr), wrt=nnx.Param)))

  return trained


def functional(tx):
  """They are made outside, in hijax storage, and are differentiated through as arrays."""

  def trained(lr, model):
    model = nnx.to_lojax(model)
    return steps(model, nnx.Optimizer(model, tx(lr), wrt=nnx.Param))

  return lambda lr: trained(lr, made())


WAYS = {
  "nnx": lambda tx: nnx.value_and_grad(inside(tx))(RATE),
  "jax": lambda tx: jax.value_and_grad(inside(tx))(RATE),
  "jax, lojax": lambda tx: jax.value_and_grad(inside(tx, nnx.to_lojax))(RATE),
  "jit of nnx": lambda tx: nnx.jit(nnx.value_and_grad(inside(tx)))(RATE),
  "nnx of jit": lambda tx: nnx.value_and_grad(nnx.jit(inside(tx)))(RATE),
  "functional": lambda tx: jax.value_and_grad(functional(tx))(RATE),
}


@pytest.mark.parametrize("tx", TX.values(), ids=TX)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_gradient_of_a_learning_rate(way, tx):
  for got, want in zip(way(tx), by_hand(tx), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4)


def scaled(model, optimizer, scale):
  for _ in range(4):
    grads = nnx.grad(loss)(model)
    optimizer.update(model, jax.tree.map(lambda g: g * scale, grads))
  return loss(model)


@pytest.mark.parametrize("hijax", [True, False])
def test_through_lets_it_flow_through_an_optimizer_from_outside(hijax):
  def hand(scale):
    params = nnx.to_pure_dict(nnx.state(made()))
    tx = optax.sgd(0.1, momentum=0.9)
    state = tx.init(params)
    loss = lambda p: ((X @ p["kernel"] + p["bias"] - Y) ** 2).mean()
    for _ in range(4):
      grads = jax.tree.map(lambda g: g * scale, jax.grad(loss)(params))
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    return loss(params), (params, state)

  with nnx.use_hijax(hijax):
    model = made()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
  if hijax:
    with pytest.raises(DifferentiatedWriteError):
      nnx.grad(scaled, argnums=2)(model, optimizer, jnp.array(1.0))
    assert int(optimizer.step) == 0
  grad = nnx.grad(scaled, argnums=2, through=...)(model, optimizer, jnp.array(1.0))
  want, (params, state) = jax.grad(hand, has_aux=True)(jnp.array(1.0))
  np.testing.assert_allclose(grad, want, rtol=1e-4)
  np.testing.assert_allclose(model.kernel, params["kernel"], rtol=1e-4)
  got = jax.tree.leaves(nnx.pure(optimizer.opt_state))
  for a, b in zip(got, jax.tree.leaves(state), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4)


@pytest.mark.parametrize("kind", [nnx.BatchStat, nnx.metrics.MetricState])
@pytest.mark.parametrize("hijax", [True, False])
def test_through_names_a_detached_type_too(kind, hijax):
  v = kind(jnp.ones(3), is_hijax=hijax)

  def f(v, x):
    v[...] = v * x
    v[...] = v * x
    return v[...].sum()

  x = jnp.arange(1.0, 4.0)
  grad = nnx.grad(f, argnums=1, through=kind)(v, x)
  np.testing.assert_allclose(grad, 2 * x)
  np.testing.assert_allclose(v, x**2)
  v[...] = jnp.ones(3)
  np.testing.assert_allclose(nnx.grad(f, argnums=1)(v, x), jnp.zeros(3))  # without it, none does


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit, jax.checkpoint])
@pytest.mark.parametrize("hijax", [True, False])
def test_a_trace_that_drops_gradients_is_not_used_where_they_are_kept(jit, hijax):
  class Pair(nnx.Module):
    def __init__(self):
      self.a, self.b = (nnx.BatchStat(jnp.ones(3), is_hijax=hijax) for _ in range(2))

  pair, x = Pair(), jnp.arange(1.0, 4.0)

  @jit
  def f(pair, x):
    pair.a[...], pair.b[...] = pair.a * x, pair.b * x * 2
    return pair.a[...].sum() + pair.b[...].sum()

  def grad(through):
    pair.a[...] = pair.b[...] = jnp.ones(3)
    return nnx.grad(f, argnums=1, through=through)(pair, x)

  for _ in range(2):
    np.testing.assert_allclose(grad(None), jnp.zeros(3))
    np.testing.assert_allclose(grad(nnx.BatchStat), jnp.full(3, 3.0))
    np.testing.assert_allclose(grad(lambda path, v: path == ("a",)), jnp.ones(3))
    np.testing.assert_allclose(grad(lambda path, v: path == ("b",)), jnp.full(3, 2.0))


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit, jax.checkpoint, lambda f: f])
def test_one_function_of_what_keeps_its_gradient_and_of_what_drops_it(jit):
  class Layer(nnx.Module):
    def __init__(self):
      self.stat = nnx.BatchStat(jnp.ones(3), is_hijax=False)

  class Pair(nnx.Module):
    def __init__(self):
      self.a, self.b = Layer(), Layer()

  @jit
  def f(layer, x):
    layer.stat[...] = layer.stat + x * 3
    return layer.stat[...].sum()

  both = lambda pair, x: f(pair.a, x) + f(pair.b, x)
  for name in ("a", "b"):
    through = lambda path, v, name=name: path[:1] == (name,)
    grad = nnx.grad(both, argnums=1, through=through)(Pair(), jnp.ones(3))
    np.testing.assert_allclose(grad, jnp.full(3, 3.0))
