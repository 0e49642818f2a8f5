"""nnx.intervene puts another result in the place of a layer's, in every transform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import FilterError


class Net(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.layers = [nnx.Linear(4, 4, rngs=rngs) for _ in range(3)]
    self.stack = nnx.Stack(nnx.Linear, 2, 4, 4, rngs=rngs)

  def __call__(self, x):
    for layer in self.layers:
      x = jnp.sin(layer(x))
    return self.stack(x)


X = jax.random.normal(jax.random.key(0), (5, 4))


def ablated(net, x, change=jnp.zeros_like):
  for i, layer in enumerate(net.layers):
    y = layer(x)
    x = jnp.sin(change(y) if i == 1 else y)
  return net.stack(x)


WAYS = {
  "eager": lambda f: f,
  "jax.jit": jax.jit,
  "nnx.jit": nnx.jit,
  "remat": nnx.remat,
  "grad": lambda f: nnx.grad(lambda net, x: f(net, x).sum()),
  "vmap": lambda f: lambda net, x: nnx.vmap(f, in_axes=(None, 0))(net, x),
}


@pytest.mark.parametrize("name", WAYS)
def test_a_layer_is_silenced_and_comes_back(name):
  net, call = Net(), WAYS[name](lambda net, x: net(x))
  plain = call(net, X)
  changed = nnx.intervene(call, {"layers/1": jnp.zeros_like})
  want = WAYS[name](ablated)(net, X)
  for _ in range(2):
    for a, b in ((changed(net, X), want), (call(net, X), plain)):
      jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def test_steering_by_type_in_a_stack_and_of_a_model():
  net = Net()
  double = nnx.intervene(net, {nnx.Linear: lambda y: 2 * y})
  x = X
  for layer in net.layers:
    x = jnp.sin(2 * layer(x))
  for layer in net.stack:
    x = 2 * layer(x)
  np.testing.assert_allclose(double(X), x, rtol=1e-5)


def test_several_changes_and_a_capture_of_what_comes_of_them():
  net = Net()
  changed = nnx.intervene(net, {"layers/0": jnp.zeros_like, "stack": lambda y: y + 1})
  y, kept = nnx.capture(lambda x: changed(x), nnx.Stack)(X)
  np.testing.assert_array_equal(kept["stack"]["__call__"][0], y)
  want = net.stack(jnp.sin(net.layers[2](jnp.sin(net.layers[1](jnp.zeros_like(X)))))) + 1
  np.testing.assert_allclose(y, want, rtol=1e-5)


def test_a_path_that_leads_nowhere_is_refused():
  with pytest.raises(FilterError, match=r"'layers/9'"):
    nnx.intervene(Net(), {"layers/9": jnp.zeros_like})(X)


def test_an_error_in_a_change_ends_the_intervention():
  net = Net()
  with pytest.raises(ZeroDivisionError):
    nnx.intervene(net, {"layers/0": lambda y: 1 // 0})(X)
  np.testing.assert_allclose(net(X), Net()(X), rtol=1e-6)


def test_a_call_through_super_is_one_call():
  class Base(nnx.Module):
    def __call__(self, x):
      return x + 1

  class Child(Base):
    def __call__(self, x):
      return super().__call__(x) + 1

  class Borrower(nnx.Module):
    __call__ = Base.__call__

  x = jnp.array(1.0)
  assert float(nnx.intervene(Child(), {"": lambda y: 10 * y})(x)) == 30
  assert float(nnx.intervene(Borrower(), {"": lambda y: 10 * y})(x)) == 20
  assert len(nnx.capture(Child())(x)[1]["__call__"].get_value()) == 1
