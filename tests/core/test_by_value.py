"""Static values without a hash: compared by what is in them, seen when they change, not aliased."""

import copy
import dataclasses
import functools
import pickle
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.core.by_value import ByValue, NotByValue, Unchanged
from refax.errors import StaticAttributeError


@dataclasses.dataclass
class Config:
  width: int = 2
  layers: Any = dataclasses.field(default_factory=lambda: [1, 2])
  options: Any = dataclasses.field(default_factory=lambda: {"act": "relu", "sizes": [3]})


class Block(nnx.Module):
  def __init__(self, config):
    self.config = config
    self.w = nnx.Param(jnp.ones(config.width))

  def __call__(self, x):
    return self.w[...] * x * sum(self.config.layers)


class Model(nnx.Module):
  def __init__(self, config):
    self.config = config
    self.blocks = nnx.List([Block(config), Block(config)])

  def __call__(self, x):
    for block in self.blocks:
      x = block(x)
    return x * self.config.options["sizes"][0]


VALUES = [
  lambda: [1, [2, {"a": 3}]],
  lambda: {"b": 1, "a": [2]},
  lambda: {1, 2},
  lambda: ([1], {2}),
  lambda: Config(),
  lambda: types.SimpleNamespace(a=[1], f=jax.nn.relu),
  lambda: {"x": np.arange(3)},
  lambda: Config(layers=jnp.arange(3.0)),
  lambda: [jnp.array([0.0, jnp.nan]), jax.random.key(0), jax.random.split(jax.random.key(1))],
]


@pytest.mark.parametrize("make", VALUES)
def test_two_that_are_the_same_inside_are_equal_and_copies_are_apart(make):
  a, b = ByValue(make()), ByValue(make())
  assert a == b and hash(a) == hash(b)
  assert a.holds(make())
  first, second = a.fresh(), a.fresh()
  assert first is not second and ByValue(first) == ByValue(second) == a
  assert pickle.loads(pickle.dumps(ByValue([1]))) == ByValue([1])


@pytest.mark.parametrize(
  ("a", "b"),
  [
    ([1], [1.0]),
    ([1], [True]),
    ([0.0], [-0.0]),
    ([1], [1, 2]),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),  # a loop over it goes another way
    ([1], ([1],)),
    (Config(3), Config(4)),
    ({"x": np.arange(3)}, {"x": np.arange(3.0)}),
    ([jnp.arange(3)], [jnp.arange(1, 4)]),
    ([jnp.arange(3)], [jnp.arange(3.0)]),
    ([jnp.arange(4)], [jnp.arange(4).reshape(2, 2)]),
    ([jnp.zeros(1)], [-jnp.zeros(1)]),
    ([jnp.arange(3)], [np.arange(3, dtype=np.int32)]),
    ([jnp.asarray(1.0)], [jnp.ones(())]),  # a weak type is another one
    ([jax.random.key(0)], [jax.random.key(1)]),
    ([jax.random.key(0)], [jax.random.key(0, impl="rbg")]),
    ([jax.random.key(0)], [jax.random.key_data(jax.random.key(0))]),
  ],
)
def test_what_could_be_traced_otherwise_is_not_equal(a, b):
  assert ByValue(a) != ByValue(b)


@pytest.mark.parametrize(
  "make",
  [
    lambda: [jax.new_ref(jnp.ones(2))],
    lambda: Config(layers=[nnx.Param(1.0)]),
    lambda: {"f": functools.partial(print, nnx.Dropout(0.5))},
    lambda: types.SimpleNamespace(m=nnx.Dropout(0.5), a=[]),
  ],
)
def test_state_inside_is_refused(make):
  with pytest.raises(NotByValue):
    ByValue(make())


def test_a_config_that_holds_itself_is_refused():
  config = Config()
  config.options["me"] = config
  with pytest.raises(StaticAttributeError, match="a value that holds itself"):
    Block(config)


@pytest.mark.parametrize("hijax", [True, False])
@pytest.mark.parametrize("jit", [nnx.jit, jax.jit])
def test_a_change_of_a_config_is_seen_and_one_without_is_not_traced(hijax, jit):
  with nnx.use_hijax(hijax):
    config = Config()
    model = Model(config)
    traces = []

    @jit
    def f(model, x):
      traces.append(1)
      return model(x)

    x = jnp.ones(2)
    for _ in range(4):
      assert f(model, x)[0] == 27.0
    assert len(traces) == 1
    config.options["sizes"][0] = 5
    for _ in range(3):
      assert f(model, x)[0] == 45.0
    assert len(traces) == 2
    config.options["sizes"][0] = 3
    assert f(model, x)[0] == 27.0
    assert len(traces) == 2


def test_a_model_with_a_config_is_a_known_call_of_nnx_jit():
  model = Model(Config())
  f = nnx.jit(lambda model, x: model(x))
  for _ in range(3):
    f(model, jnp.ones(2))
  assert f._fast.find((model, jnp.ones(2)), ()) is not None


def test_copies_share_no_config_and_keep_what_is_shared_inside():
  config = Config()
  model = Model(config)
  copies = [nnx.clone(model), copy.deepcopy(model), nnx.merge(*nnx.split(model))]
  copies += [
    jax.tree.map(lambda x: x, model),
    nnx.to_lojax(model),
    pickle.loads(pickle.dumps(model)),
  ]
  for twin in copies:
    assert twin.config == config and twin.config is not config
    assert twin.blocks[0].config is twin.blocks[1].config is twin.config
    twin.config.layers.append(7)
  assert config == Config()
  assert model.config is config


def test_a_graphdef_keeps_what_was():
  config = Config()
  graphdef, state = nnx.split(Model(config))
  config.width = 9
  assert nnx.merge(graphdef, state).config.width == 2
  assert nnx.graphdef(Model(Config())) == graphdef


@pytest.mark.parametrize("hijax", [True, False])
def test_a_config_that_a_step_changes_is_changed_outside(hijax):
  with nnx.use_hijax(hijax):
    model = Block(Config())

    @nnx.jit
    def step(model):
      model.config.layers.append(len(model.config.layers))

    step(model)
    step(model)
    assert model.config.layers == [1, 2, 2, 3]


def test_a_frozen_dataclass_with_a_list_is_accepted():
  @dataclasses.dataclass(frozen=True)
  class Frozen:
    sizes: Any

  block = Block(Config())
  block.other = Frozen([1])
  block.other.sizes.append(2)
  assert jax.tree.map(lambda x: x, block).other == Frozen([1, 2])


def test_a_configuration_that_layers_share_is_looked_at_once_a_call(monkeypatch):
  config, looks = Config(), []
  model = nnx.List([Block(config) for _ in range(20)])
  f = nnx.jit(lambda model, x: model[0](x))
  for _ in range(3):
    f(model, jnp.ones(2))
  holds = Unchanged.holds
  monkeypatch.setattr(Unchanged, "holds", lambda self, value: looks.append(1) or holds(self, value))
  f(model, jnp.ones(2))
  assert 1 <= len(looks) <= 2


class Odd(list):
  """A list with attributes."""


@dataclasses.dataclass(slots=True)
class Slotted:
  sizes: list = dataclasses.field(default_factory=lambda: [1])


def with_attribute(value):
  value.note = [1]
  return value


MUTATIONS = [
  (lambda: [1, [2, {"a": 3}]], lambda v: v[1][1].update(a=4)),
  (lambda: [1, [2, {"a": 3}]], lambda v: v[1][1].update(b=3)),
  (lambda: [1, [2, {"a": 3}]], lambda v: v[1].append(1)),
  (lambda: {"b": 1, "a": [2]}, lambda v: v.update(b=True)),
  (lambda: {"b": 0.0}, lambda v: v.update(b=-0.0)),
  (lambda: {"b": 1, "a": [2]}, lambda v: v.update(b=v.pop("b"))),
  (lambda: {1, 2}, lambda v: v.add(3)),
  (lambda: ([1], {2}), lambda v: v[0].clear()),
  (lambda: Config(), lambda v: v.options["sizes"].append(1)),
  (lambda: Config(), lambda v: setattr(v, "extra", 1)),
  (lambda: Config(), lambda v: delattr(v, "layers")),
  (lambda: {"x": np.arange(3)}, lambda v: v["x"].fill(7)),
  (lambda: {"x": [np.arange(3)]}, lambda v: v["x"][0].fill(7)),
  (lambda: types.SimpleNamespace(a=[1], f=jax.nn.relu), lambda v: v.a.append(1)),
  (lambda: types.SimpleNamespace(a=[1], f=jax.nn.relu), lambda v: setattr(v, "f", jax.nn.gelu)),
  (lambda: Odd([1, [2]]), lambda v: v[1].append(1)),
  (lambda: with_attribute(Odd([1])), lambda v: v.note.append(1)),
  (lambda: Slotted(), lambda v: v.sizes.append(2)),
  (lambda: [Slotted()], lambda v: setattr(v[0], "sizes", [3])),
  (lambda: Config(layers=jnp.arange(3.0)), lambda v: setattr(v, "layers", jnp.arange(4.0))),
]


@pytest.mark.parametrize("make, change", MUTATIONS)
def test_every_change_of_a_value_is_noticed_and_undoing_it_too(make, change):
  value = make()
  seen = ByValue(value)
  watched = Unchanged(value, seen)
  assert watched.holds(value) and watched.holds(value)
  change(value)
  assert not watched.holds(value)
  again = make()
  for name in getattr(again, "__dict__", {}):
    setattr(value, name, getattr(again, name))
  if isinstance(value, list | set | dict):
    value.clear()
    (value.extend if isinstance(value, list) else value.update)(again)
    assert watched.holds(value)


# arrays of JAX in a configuration
class Scaled(nnx.Module):
  def __init__(self, config):
    self.config = config
    self.w = nnx.Param(jnp.ones(2))

  def __call__(self, x):
    return self.w * x * self.config.layers


@pytest.mark.parametrize("hijax", [True, False])
@pytest.mark.parametrize("jit", [nnx.jit, jax.jit])
def test_an_array_in_a_config_is_a_constant_and_another_one_is_traced(hijax, jit):
  with nnx.use_hijax(hijax):
    model = Scaled(Config(layers=jnp.arange(2.0)))
  traces = []
  f = jit(lambda m, x: traces.append(None) or m(x))
  assert jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, nnx.Variable)) == [model.w]
  for array, count in [(None, 1), (jnp.arange(2.0), 1), (jnp.full(2, 3.0), 2), (None, 2)]:
    if array is not None:
      model.config.layers = array
    for _ in range(2):
      assert f(model, jnp.ones(2)).tolist() == model.config.layers.tolist()
    assert len(traces) == count


def test_copies_of_a_model_keep_the_arrays_of_its_config():
  model = Scaled(Config(layers=jnp.arange(2.0)))
  for twin in (
    nnx.clone(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
    nnx.merge(*nnx.split(model)), nnx.to_lojax(model),
  ):  # fmt: skip
    assert twin(jnp.ones(2)).tolist() == [0.0, 1.0]
    assert nnx.graphdef(twin) == nnx.graphdef(model) or not twin.w.is_hijax
    twin.config.layers = jnp.ones(2)
    assert model.config.layers.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("jit", [nnx.jit, jax.jit])
def test_a_traced_array_in_a_config_is_refused(jit):
  model = Scaled(Config(layers=jnp.arange(2.0)))

  def assign(model, x):
    model.config = Config(layers=x)

  with pytest.raises(StaticAttributeError, match=r"a part that can be neither: \w*Tracer"):
    jit(assign)(model, jnp.ones(2))
  with pytest.raises(StaticAttributeError, match=r"a part that can be neither: \w*Tracer"):
    jit(lambda x: Scaled(Config(layers=x)).w[...])(jnp.ones(2))
  assert model(jnp.ones(2)).tolist() == [0.0, 1.0]


def test_an_array_that_was_donated_is_not_the_one_that_was_seen():
  x = jnp.arange(2.0)
  model = Scaled(Config(layers=x))
  f = nnx.jit(lambda m: m.w * m.config.layers)
  f(model)
  x.delete()
  model.config.layers = jnp.arange(2.0)
  assert f(model).tolist() == [0.0, 1.0]


def test_a_config_with_arrays_can_be_made_while_jax_traces():
  table = jnp.arange(2.0)
  make = lambda x: Scaled(Config(layers=table))(x)
  assert nnx.jit(make)(jnp.ones(2)).tolist() == [0.0, 1.0]
