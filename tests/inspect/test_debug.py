"""nnx.debug.check lets a good step through and names what made a bad one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx


class Net(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.linear = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.dropout(self.norm(jnp.log(self.linear(x) ** 2)))


def step(net, optimizer, x):
  loss, grads = nnx.value_and_grad(lambda net: (net(x) ** 2).mean())(net)
  optimizer.update(net, grads)
  return loss


def trained(is_hijax=True):
  with nnx.use_hijax(is_hijax):
    net = Net()
    return net, nnx.Optimizer(net, optax.adam(0.1), wrt=nnx.Param)


def bits(*objects):
  leaves = jax.tree.leaves(nnx.pure(objects))
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in leaves]


def assert_same(a, b):
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(x, y)


X = jax.random.normal(jax.random.key(0), (5, 4))
BAD = jnp.zeros((5, 4))  # the logarithm of zero


@pytest.mark.parametrize("is_hijax", [True, False])
def test_good_steps_are_those_of_nnx_jit_and_a_bad_one_changes_nothing(is_hijax):
  mine, theirs = trained(is_hijax), trained(is_hijax)
  checked, plain = nnx.debug.check(step), nnx.jit(step)
  for _ in range(3):
    np.testing.assert_allclose(checked(*mine, X), plain(*theirs, X), rtol=1e-6)
  before = bits(*mine)
  with pytest.raises(nnx.NonFiniteError) as error:
    checked(*mine, BAD)
  assert "log in outside of all layers" in str(error.value)
  assert "test_debug.py" in str(error.value)
  assert_same(before, bits(*mine))
  for _ in range(2):  # it goes on as if nothing had been
    np.testing.assert_allclose(checked(*mine, X), plain(*theirs, X), rtol=1e-5)


@pytest.mark.parametrize("wrap", [jax.jit, nnx.jit], ids=["jax", "nnx"])
def test_a_step_that_is_compiled_already(wrap):
  net, optimizer = trained()
  checked = nnx.debug.check(wrap(step))
  checked(net, optimizer, X)
  with pytest.raises(nnx.NonFiniteError, match="log"):
    checked(net, optimizer, BAD)


def test_a_layer_is_named_by_its_path():
  model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
  bad = nnx.intervene(lambda m, x: m(x), {"layers/0": lambda y: y / 0})
  with pytest.raises(nnx.NonFiniteError, match=r"div in layers/0 \(forward\)"):
    nnx.debug.check(bad)(model, X)


def test_a_step_that_changes_objects_is_undone_as_a_whole():
  class Sower(nnx.Module):
    def __init__(self):
      self.count = nnx.Variable(0)

    def __call__(self, x):
      self.count += 1
      self.sow(nnx.Intermediate, "h", jnp.log(x))
      return x

  model, checked = Sower(), nnx.debug.check(lambda model, x: model(x).sum())
  checked(model, X**2)
  assert nnx.pop(model, nnx.Intermediate)
  checked(model, X**2)
  nnx.pop(model, nnx.Intermediate)
  with pytest.raises(nnx.NonFiniteError):
    checked(model, X * 0)
  assert not hasattr(model, "h")
  assert int(model.count) == 2


def test_methods_flags_closures_and_state_alone():
  total = nnx.Variable(0.0)

  class Layer(nnx.Module):
    def __call__(self, x, train):
      return jnp.log(x) if train else x

  checked = nnx.debug.check(Layer())
  np.testing.assert_array_equal(checked(X, False), X)
  with pytest.raises(nnx.NonFiniteError):
    checked(X * 0, True)

  @nnx.debug.check
  def add(x):
    total[...] += x

  add(jnp.array(1.0))
  with pytest.raises(nnx.NonFiniteError):
    add(jnp.array(jnp.inf))
  assert float(total) == 1.0


def test_inside_another_compiled_function_it_is_the_function_itself():
  f = nnx.jit(lambda x: nnx.debug.check(jnp.log)(x))
  assert not bool(jnp.isfinite(f(X * 0)).any())


def test_results_that_are_no_numbers():
  assert (
    nnx.debug.check(lambda m, x: (m, x, None))(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), X)[2] is None
  )
  assert nnx.debug.check(lambda x: x + 1)(jnp.arange(3))[0] == 1


def test_a_first_step_that_is_bad_leaves_no_attribute_behind():
  model = nnx.Dict(a=nnx.Variable(1.0))

  def step(model, x):
    model["new"] = nnx.Variable(x)
    model["a"] += 1
    return jnp.log(x)

  with pytest.raises(nnx.NonFiniteError):
    nnx.debug.check(step)(model, X * 0)
  assert list(model) == ["a"]
  assert float(model["a"]) == 1.0


def test_a_result_that_is_a_constant_and_not_finite():
  with pytest.raises(nnx.NonFiniteError, match="constant"):
    nnx.debug.check(lambda x: {"best": float("inf"), "x": x})(X)
