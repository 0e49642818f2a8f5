"""Habits of Linen, torch and Keras: what to write in Refax, and nothing of it in anyone's way."""

import copy
import inspect
import pickle
import re

import jax
import jax.numpy as jnp
import pytest

from refax import nnx
from refax.core.habits import HABITS
from refax.errors import ForeignNameError


class Plain(nnx.Module):
  """Pickled by name."""

  def __init__(self):
    self.w = nnx.Param(jnp.ones(2))


@pytest.mark.parametrize("name", HABITS)
def test_a_habit_says_what_to_write_and_is_no_attribute(name):
  model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  for holder in (model, nnx.Linear):
    assert not hasattr(holder, name)
    with pytest.raises(
      AttributeError, match=rf"Linear has no attribute '{name}'\n  fix: \S"
    ) as info:
      getattr(holder, name)
    assert type(info.value) is ForeignNameError
  assert name not in dir(model)


def test_what_the_advice_names_exists():
  names = {name for fix in HABITS.values() for name in re.findall(r"\bnnx\.(\w+)", fix)}
  assert {"state", "split", "device_put"} <= names
  assert [name for name in names if not hasattr(nnx, name)] == []
  methods = {
    name for fix in HABITS.values() for name in re.findall(r"\b(?:self|model)\.(\w+)\(", fix)
  }
  assert [name for name in methods if not hasattr(nnx.Module, name)] == []


def test_advice_that_can_be_run_does_what_the_habit_does():
  model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  x = jnp.ones((1, 2))
  graphdef, state = nnx.split(model)
  assert jnp.array_equal(nnx.merge(graphdef, state)(x), model(x))
  zeros = jax.tree.map(jnp.zeros_like, nnx.to_pure_dict(nnx.state(model)))
  nnx.replace_by_pure_dict(nnx.state(model), zeros)
  assert not model.kernel[...].any()
  nnx.update(model, nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(1))))
  assert model.kernel[...].any()


def test_a_users_own_name_is_found_wherever_it_is_defined():
  class Above:
    def summary(self):
      return "above"

    @property
    def parameters(self):
      return "a property above"

    @classmethod
    def init(cls):
      return cls.__name__

  class Net(nnx.Module, Above):
    cuda = 3

    def __init__(self):
      self.apply = nnx.relu
      self.weights = nnx.Param(jnp.ones(2))
      self.param = nnx.Param(jnp.ones(2))
      self.fit = "yes"

    def to(self, device):
      return device

  class Below(Net):
    pass

  for net in (Net(), Below()):
    assert net.apply is nnx.relu and net.param[0] == 1 and net.cuda == 3 and net.fit == "yes"
    assert net.to("d") == "d" and net.summary() == "above"
    assert net.parameters == "a property above" and net.init() == type(net).__name__
    assert {"apply", "param", "cuda", "fit", "to", "summary", "parameters", "init"} <= set(dir(net))
    assert not hasattr(net, "bind") and "bind" not in dir(net)
    assert set(nnx.state(net)) == {"weights", "param"}
    net.fit = "no"
    assert net.fit == "no"
    del net.fit
    assert not hasattr(net, "fit")
  assert Below.init() == "Below"


def test_an_attribute_error_of_a_property_is_not_masked():
  class Net(nnx.Module):
    @property
    def buffers(self):
      return self.mising

  with pytest.raises(AttributeError, match="mising"):
    _ = Net().buffers


def test_a_users_getattr_is_asked():
  class Wrapper(nnx.Module):
    def __init__(self, inner):
      self.inner = inner

    def __getattr__(self, name):
      if name == "inner":
        raise AttributeError(name)
      return getattr(self.inner, name)

  class Inner(nnx.Module):
    def summary(self):
      return "inner"

  assert Wrapper(Inner()).summary() == "inner"
  assert not hasattr(Wrapper(Inner()), "fit")


def test_containers_may_have_items_of_these_names():
  heads = nnx.Dict(apply=nnx.relu, init=nnx.Param(jnp.ones(2)))
  assert heads.apply is nnx.relu and heads.init is heads["init"]
  heads.param = 3
  assert heads["param"] == 3
  with pytest.raises(AttributeError, match="Dict has no item 'bind'"):
    _ = heads.bind


def test_nothing_else_sees_them():
  model = Plain()
  assert [path for path, _ in nnx.iter_graph(model)] == [("w",), ()]
  assert set(vars(model)) == {"w"}
  for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
    assert jax.tree.structure(other) == jax.tree.structure(model)
  with pytest.raises(ValueError, match="no Module in Plain has these attributes"):
    model.set_attributes(fit=1)
  members = dict(inspect.getmembers(model))
  assert "w" in members and not HABITS.keys() & members.keys()
