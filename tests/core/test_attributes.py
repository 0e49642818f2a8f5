"""What is set past `__setattr__`, and what kinds of classes may be Modules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx
from refax.errors import StaticAttributeError, TraceContextError


class Net(nnx.Module):
  def __init__(self):
    self.w = nnx.Param(jnp.ones(3))

  @functools.cached_property
  def doubled(self):
    return self.w * 2

  @functools.cached_property
  def size(self):
    return self.w.size


WAYS = {
  "vars": lambda net, name, x: vars(net).__setitem__(name, x),
  "update": lambda net, name, x: net.__dict__.update({name: x}),
  "keywords": lambda net, name, x: net.__dict__.update(**{name: x}),
  "setdefault": lambda net, name, x: net.__dict__.setdefault(name, x),
  "or": lambda net, name, x: net.__dict__.__ior__({name: x}),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_attribute_set_in_the_dict_is_an_attribute(way):
  net = Net()
  step = nnx.jit(lambda net: net.w.sum() + (net.b.sum() if hasattr(net, "b") else 0.0))
  assert float(step(net)) == 3.0
  nnx.state(net)
  WAYS[way](net, "b", nnx.Param(jnp.ones(2)))
  assert list(nnx.state(net)) == ["b", "w"]
  assert float(step(net)) == 5.0
  assert nnx.grad(lambda n: n.b.sum())(net)["b"].shape == (2,)
  WAYS[way](net, "layers", [nnx.Param(1.0)])
  if way != "setdefault":
    assert type(net.layers) is nnx.List
  with pytest.raises(StaticAttributeError, match="a part that can be neither: bytearray"):
    WAYS[way](net, "bad", bytearray())


def test_an_attribute_is_removed_from_the_dict():
  net = Net()
  net.b = nnx.Param(1.0)
  assert len(jax.tree.leaves(net)) == 2
  assert isinstance(vars(net).pop("b"), nnx.Param)
  assert len(jax.tree.leaves(net)) == 1
  net.b = nnx.Param(1.0)
  jax.tree.leaves(net)
  del vars(net)["b"]
  assert list(nnx.state(net)) == ["w"]
  assert vars(net).pop("b", None) is None
  with pytest.raises(KeyError):
    del vars(net)["b"]
  vars(net).clear()
  assert jax.tree.leaves(net) == []


def test_a_cached_property_is_a_memory_of_one_object_and_no_part_of_its_structure():
  net, twin = Net(), Net()
  assert net.size == 3 and float(net.doubled.sum()) == 6.0
  assert nnx.graphdef(net) == nnx.graphdef(twin)
  assert "doubled" in vars(net)
  for model in (net, twin):  # inside a transform it is computed anew, from what is differentiated
    for _ in range(2):
      grads = nnx.grad(lambda m: (m.doubled**2).sum())(model)
      np.testing.assert_array_equal(grads["w"], np.full(3, 8.0))
  assert "doubled" not in vars(twin)
  assert float(nnx.jit(lambda m: m.doubled.sum())(twin)) == 6.0
  twin.w[...] = jnp.zeros(3)
  assert float(nnx.jit(lambda m: m.doubled.sum())(twin)) == 0.0
  assert float(jax.jit(lambda m: m.doubled.sum())(twin)) == 0.0


def test_a_cached_property_takes_no_tracer_into_an_object_from_outside():
  net = Net()
  with pytest.raises(TraceContextError, match=r"Net\.doubled"):
    jax.jit(lambda x: net.doubled * x)(1.0)
  assert "doubled" not in vars(net)
  assert float(jax.jit(lambda x: net.size * x)(1.0)) == 3.0


def test_a_new_dict_and_a_variable_set_past_everything_are_seen():
  net = Net()
  nnx.state(net)
  net.__dict__ = {"b": nnx.Param(1.0), "n": 2}
  assert list(nnx.state(net)) == ["b"] and net.n == 2 and not hasattr(net, "w")
  other = Net()
  object.__setattr__(other, "b", nnx.Param(1.0))
  assert list(nnx.state(other)) == ["b", "w"]
  assert float(nnx.grad(lambda m: m.b * 2.0)(other)["b"]) == 2.0


@dataclasses.dataclass(frozen=True)
class Frozen(nnx.Module):
  w: nnx.Param
  layers: list
  scale: float = 2.0
  act: object = jnp.tanh

  def __call__(self, x):
    return self.scale * self.act(self.w * x) + self.layers[0](x)


def test_a_frozen_dataclass_is_a_module():
  net = Frozen(nnx.Param(jnp.ones(3)), [nnx.Linear(3, 3, rngs=nnx.Rngs(0))])
  optimizer = nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)
  loss = lambda m: (m(jnp.ones((1, 3))) ** 2).sum()
  before = float(loss(net))

  @nnx.jit
  def step(net, optimizer):
    value, grads = nnx.value_and_grad(loss)(net)
    optimizer.update(net, grads)
    return value

  for _ in range(5):
    step(net, optimizer)
  assert float(loss(net)) < before
  assert len(jax.tree.leaves(net)) == 3
  assert len(jax.tree.leaves(nnx.clone(net))) == 3
  with pytest.raises(dataclasses.FrozenInstanceError):
    net.scale = 1.0
  assert float(jax.jit(loss)(net)) == pytest.approx(float(loss(net)))


def test_slots_are_refused_when_the_class_is_made():
  with pytest.raises(StaticAttributeError, match=r"__dict__(.|\n)*Slotted(.|\n)*fix: leave out"):

    class Slotted(nnx.Module):
      __slots__ = ("w",)

  with pytest.raises(StaticAttributeError, match="slots=True"):

    @dataclasses.dataclass(slots=True)
    class Data(nnx.Module):
      w: nnx.Param

  class Empty(nnx.Module):
    __slots__ = ()


def test_a_dataclass_is_a_module():
  @dataclasses.dataclass
  class Data(nnx.Module):
    w: nnx.Param
    n: int = 2

  net = Data(nnx.Param(jnp.ones(2)))
  assert len(jax.tree.leaves(net)) == 1
  assert float(nnx.grad(lambda m: (m.w * m.n).sum())(net)["w"][0]) == 2.0


class Link(nnx.Module):
  def __init__(self, child, w=None):
    self.child, self.w = child, w

  def depth(self):
    node, n = self, 0
    while node is not None:
      node, n = node.child, n + 1
    return n


@pytest.mark.parametrize("depth", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_model_may_be_deeper_than_the_stack(depth):
  import copy

  model = Link(None, nnx.Param(2.0))
  for _ in range(depth - 1):
    model = Link(model)
  assert len(nnx.to_flat_state(nnx.state(model))) == 1
  assert repr(model).count("Link(") > 10
  assert float(nnx.jit(lambda m: m.depth() * 1.0)(model)) == depth
  assert float(jax.jit(lambda m: m.depth() * 1.0)(model)) == depth
  for other in (copy.deepcopy(model), nnx.clone(model), nnx.merge(*nnx.split(model))):
    assert other.depth() == depth
  assert len(list(nnx.iter_modules(model))) == depth
  model.eval()


def test_a_name_that_an_interrupt_has_left_half_set_does_no_harm():
  net = Net()
  nnx.state(net)
  net._pytree.dynamic.add("half")
  net._structure_changed(None)
  assert list(nnx.state(net)) == ["w"]
  net.half = 3
  assert nnx.graphdef(net) == nnx.graphdef(nnx.clone(net)) and len(jax.tree.leaves(net)) == 1
