"""Functions in attributes that hold objects: bound methods and partials follow, closures do not."""

import copy
import functools
import gc
import pickle
import weakref

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import StaticAttributeError

X = jnp.arange(3.0)


class Block(nnx.Module):
  def __init__(self):
    self.w = nnx.Param(jnp.full(3, 2.0))

  def __call__(self, x, k=1.0):
    return self.w * x * k


class Net(nnx.Module):
  """A way to hold a method, in an attribute that sorts before the layers."""

  def __init__(self, way):
    self.block = Block()
    self.w = nnx.Param(jnp.ones(3))
    self.count = nnx.Variable(0)
    self.apply = WAYS[way](self)

  def plain(self, x):
    self.count += 1
    return self.block(x) + self.w

  def scaled(self, k, x):
    return k * self.plain(x)

  def __call__(self, x):
    return (self.apply(x) ** 2).sum()


def by_hand(x, net):
  return net.plain(x)


WAYS = {
  "bound method": lambda self: self.plain,
  "partial of a bound method": lambda self: functools.partial(self.scaled, 1.0),
  "partial with the object": lambda self: functools.partial(by_hand, net=self),
  "partial of a partial": lambda self: functools.partial(functools.partial(self.scaled, 1.0)),
  "partial of a layer": lambda self: functools.partial(lambda self, x: self.plain(x), self),
}


@pytest.fixture(params=WAYS)
def net(request):
  return Net(request.param)


WANT = np.asarray(2 * (2.0 * X + 1))  # the gradient for Net.w


def test_gradients_flow_through_a_held_method(net):
  np.testing.assert_allclose(nnx.grad(lambda m: m(X))(net)["w"], WANT)
  lojax = nnx.to_lojax(net)
  np.testing.assert_allclose(jax.grad(lambda m: m(X), allow_int=True)(lojax).w, WANT)
  graphdef, params, rest = nnx.split(net, nnx.Param, ...)
  np.testing.assert_allclose(nnx.grad(lambda p: nnx.merge(graphdef, p, rest)(X))(params)["w"], WANT)


def test_state_is_written_through_a_held_method(net):
  for transform in (nnx.jit, jax.jit, nnx.remat, lambda f: f):
    before = int(net.count)
    transform(lambda m: m(X))(net)
    assert int(net.count) == before + 1


def test_a_copy_holds_its_own_method(net):
  copies = [copy.deepcopy(net), nnx.clone(net), nnx.merge(*nnx.split(net)), nnx.to_lojax(net)]
  copies += [pickle.loads(cloudpickle.dumps(net)), jax.tree.map(lambda x: x, nnx.to_lojax(net))]
  for other in copies:
    before = float(net(X))
    other.w[...] = jnp.zeros(3)
    if other is not copies[2]:  # merge shares the cells
      assert float(net(X)) == before
    assert float(other(X)) == float(((2.0 * X) ** 2).sum())
    net.w[...] = jnp.ones(3)


def test_paths_are_those_of_the_attributes(net):
  assert sorted(map("/".join, (p for p, _ in nnx.to_flat_state(nnx.state(net))))) == [
    "block/w",
    "count",
    "w",
  ]
  assert nnx.graphdef(net) == nnx.graphdef(nnx.clone(net))
  assert "bound method" in repr(net) or "partial" in repr(net)


def test_dropped_models_are_not_kept_and_not_traced_anew():
  traces = []

  @nnx.jit
  def step(net):
    traces.append(None)
    return net(X)

  nets = [Net("bound method") for _ in range(5)]
  for n in nets:
    step(n)
  assert len(traces) == 1
  alive = [weakref.ref(n) for n in nets]
  del nets, n
  gc.collect()
  assert not any(ref() for ref in alive)


def holds_self(self):
  return lambda x: self.plain(x)


def holds_layer(self):
  block = self.block
  return lambda x: block(x)


def holds_variable(self):
  w = self.w
  return lambda x: w * x


def holds_in_a_list(self):
  layers = [self.block]
  return lambda x: layers[0](x)


def default_argument(self):
  return lambda x, net=self: net.plain(x)


@functools.wraps(holds_self)
def wrapped(self):
  @functools.wraps(self.plain)
  def call(*args):
    return self.plain(*args)

  return call


NOT_FOLLOWED = {
  "a lambda over self": holds_self,
  "a lambda over a layer": holds_layer,
  "a lambda over a Variable": holds_variable,
  "a lambda over a list": holds_in_a_list,
  "a default argument": default_argument,
  "a wrapper": wrapped,
  "jax.jit of a method": lambda self: jax.jit(self.plain),
  "nnx.jit of a method": lambda self: nnx.jit(self.plain),
  "nnx.vmap of a method": lambda self: nnx.vmap(self.plain),
  "a partial of a lambda over self": lambda self: functools.partial(holds_self(self), self.w),
  "nnx.static": lambda self: nnx.static(holds_self(self)),
  "nnx.static of a method": lambda self: nnx.static(self.plain),
  "in a tuple": lambda self: (holds_self(self), self.w),
  "in a dict": lambda self: {"f": holds_self(self)},
}


@pytest.mark.parametrize("way", NOT_FOLLOWED)
def test_what_cannot_be_followed_is_refused_when_it_is_assigned(way):
  net = Net("bound method")
  graphdef = nnx.graphdef(net)
  with pytest.raises(
    StaticAttributeError, match=r"holds an object(.|\n)*at: (.|\n)*fix: write it as"
  ):
    net.f = NOT_FOLLOWED[way](net)
  assert nnx.graphdef(net) == graphdef and not hasattr(net, "f")


def test_functions_that_hold_no_object_are_static():
  net, scale = Net("bound method"), 3.0
  net.f = lambda x: scale * x
  net.g = functools.partial(jnp.multiply, 2.0)
  net.h = jax.jit(lambda x: x + scale)
  net.k = jnp.tanh
  assert len(jax.tree.leaves(net)) == 3
  assert float(nnx.jit(lambda m: m.h(m.g(m.f(1.0))))(net)) == 9.0


def test_a_method_of_another_object_means_that_object():
  a = Net("bound method")

  class Other(nnx.Module):
    def __init__(self):
      self.call = a.block.__call__

  other = Other()
  grads = nnx.grad(lambda o: o.call(X).sum())(other)
  np.testing.assert_allclose(jax.tree.leaves(grads)[0], X)
  assert len(jax.tree.leaves(nnx.grad(lambda o: o[0].call(X).sum())([other, a])[0])) == 1


def test_a_bound_method_is_an_argument_like_its_object():
  net = Net("bound method")
  np.testing.assert_allclose(nnx.jit(lambda f, x: f(x))(net.plain, X), net.plain(X))
  assert int(net.count) == 2
