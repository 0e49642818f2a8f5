"""nnx.find_nonfinite names the first operation whose result is not finite."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx


@jax.custom_vjp
def breaks_backward(x):
  return x


breaks_backward.defvjp(lambda x: (x, None), lambda _, g: (g * jnp.nan,))


class Block(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(4, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)

  def __call__(self, x):
    return jnp.sin(self.norm(self.linear(x)))


class Net(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.layers = [Block(rngs), Block(rngs)]
    self.stack = nnx.Stack(Block, 3, rngs=rngs, remat=True)
    self.head = nnx.Linear(4, 2, rngs=rngs)

  def __call__(self, x):
    for layer in self.layers:
      x = layer(x)
    return self.head(self.stack(x))


X = jax.random.normal(jax.random.key(0), (5, 4))


def step(net, optimizer, x):
  loss, grads = nnx.value_and_grad(lambda net: (net(x) ** 2).mean())(net)
  optimizer.update(net, grads)
  return loss


def trained():
  net = Net()
  return net, nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)


def state_of(*objects):
  return [np.asarray(x) for x in jax.tree.leaves(nnx.pure(objects)) if x.dtype == jnp.float32]


def assert_same(before, after):
  for a, b in zip(before, after, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, nnx.jit], ids=["eager", "jax", "nnx"])
def test_a_step_in_which_all_is_finite_gives_none_and_changes_nothing(wrap):
  net, optimizer = trained()
  before = state_of(net, optimizer)
  assert nnx.find_nonfinite(wrap(step))(net, optimizer, X) is None
  assert_same(before, state_of(net, optimizer))


INJECTIONS = {
  "nan": lambda y: y.at[2, 1].set(jnp.nan),
  "log": lambda y: jnp.log(y - y[2, 1]),
  "overflow": lambda y: jnp.exp(y.at[2, 1].set(1000.0)),
}


CASES = [
  *((path, "nan", jax.jit) for path in ("layers/0/linear", "stack/layers/norm", "head")),
  *((path, "backward", jax.jit) for path in ("layers/0/linear", "stack/layers/norm", "head")),
  ("layers/1", "log", jax.jit),
  ("stack/layers/norm", "overflow", jax.jit),
  ("stack/layers/norm", "nan", nnx.jit),
  ("stack/layers/norm", "backward", nnx.jit),
]


@pytest.mark.parametrize(("path", "how", "wrap"), CASES)
def test_the_layer_is_named_forward_and_backward(path, how, wrap):
  net, optimizer = trained()
  before = state_of(net, optimizer)
  change = INJECTIONS.get(how, breaks_backward)
  found = nnx.find_nonfinite(nnx.intervene(wrap(step), {path: change}))(net, optimizer, X)
  assert found.module == path
  assert found.is_backward == (how == "backward")
  if how in ("nan", "overflow"):
    assert found.element == (2, 1)
  if "stack" in path:
    assert found.steps == ((2 if how == "backward" else 0, 3),)
  assert f"{path} (" in str(found)
  assert_same(before, state_of(net, optimizer))


def test_the_line_the_numbers_and_the_element_are_those_of_the_operation():
  def loss(net, x):
    y = net(x)
    return jnp.log(y).sum()  # here

  lines, start = inspect.getsourcelines(loss)
  number = start + next(i for i, line in enumerate(lines) if "# here" in line)
  net = nnx.Sequential(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), jnp.square)
  net.layers[0].kernel[...] = jnp.ones((4, 2))
  x = jnp.ones((3, 4)).at[1].set(0.0)
  found = nnx.find_nonfinite(loss)(net, x)
  assert found.operation == "log"
  assert f"test_nonfinite.py:{number}" in found.line
  assert found.element == (1, 0)
  (given,) = found.inputs
  assert (given.shape, given.least, given.greatest, given.nans) == ((3, 2), 0.0, 16.0, 0)
  assert (found.output.infinities, found.output.shape) == (2, (3, 2))
  assert str(found).startswith("the first value that is not finite: log in outside of all layers")


def test_infinities_that_are_masked_out_are_none():
  def loss(net, x):
    y = net(x)
    safe = jnp.where(x > 0, jnp.log(x), 0.0)  # minus infinity, and not used
    weights = jax.nn.softmax(jnp.where(x > 0, y, -jnp.inf))
    return (weights * safe).sum()

  net = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
  x = jnp.abs(X).at[0, 0].set(0.0)
  assert nnx.find_nonfinite(loss)(net, x) is None
  bad = nnx.find_nonfinite(lambda net, x: loss(net, x) + jnp.sqrt(-x).sum())(net, x)
  assert bad.operation == "sqrt"


def test_the_gradient_of_a_mask_is_found_in_the_backward_pass():
  loss = lambda net, x: jnp.where(x > 0, jnp.sqrt(net(x) * 0.0), 0.0).sum()
  net = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
  assert nnx.find_nonfinite(loss)(net, X) is None
  found = nnx.find_nonfinite(nnx.grad(loss))(net, X)
  assert found.is_backward
  assert found.output.infinities or found.output.nans


def test_what_comes_in_not_finite_is_named_by_its_path():
  net, optimizer = trained()
  found = nnx.find_nonfinite(step)(net, optimizer, X.at[3, 1].set(jnp.nan))
  assert (found.operation, found.module, found.element) == ("argument", "x", (3, 1))
  net.layers[1].linear.kernel[...] = net.layers[1].linear.kernel[...].at[0, 2].set(jnp.inf)
  found = nnx.find_nonfinite(step)(net, optimizer, X)
  assert (found.module, found.element) == ("net.layers[1].linear.kernel", (0, 2))


def test_steps_of_loops_and_members_under_vmap():
  def loop(net, xs):
    def body(carry, x):
      return carry + net(x), jnp.log(x[0, 0])

    carry, logs = jax.lax.scan(body, jnp.zeros((5, 2)), xs)
    return carry.sum() + logs.sum()

  net = Net()
  net.eval()
  xs = jnp.ones((4, 5, 4)).at[2].set(0.0)
  found = nnx.find_nonfinite(loop)(net, xs)
  assert (found.operation, found.steps) == ("log", ((2, 4),))
  mapped = lambda net, xs: jax.vmap(lambda x: jnp.log(x).sum() + net(x).sum())(xs)
  found = nnx.find_nonfinite(mapped)(net, xs)
  assert found.operation == "log"
  assert found.element[0] == 2


def test_a_branch_a_while_loop_and_a_custom_rule():
  net = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
  choose = lambda net, x, p: jax.lax.cond(p, lambda x: net(x), lambda x: jnp.log(net(x) * 0), x)
  assert nnx.find_nonfinite(choose)(net, X, jnp.array(True)) is None
  assert nnx.find_nonfinite(choose)(net, X, jnp.array(False)).operation == "log"
  grow = lambda x: jax.lax.while_loop(lambda x: x.sum() < 1e38, lambda x: x * x, x)
  assert nnx.find_nonfinite(grow)(jnp.full(3, 3.0)).operation == "while"
  assert nnx.find_nonfinite(lambda x: jax.nn.softplus(x) / 0)(X).operation == "div"


def test_integers_keys_flags_and_functions_among_the_arguments():
  def f(net, rngs, x, train, activation, n):
    x = activation(x) if train else x
    return net(x + rngs.normal(x.shape)) / (n - n)

  net = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
  found = nnx.find_nonfinite(f)(net, nnx.Rngs(0), X, True, jnp.sin, jnp.array(3))
  assert found.operation == "div"
  assert nnx.find_nonfinite(lambda x: x + 1)(jnp.arange(3)) is None


@pytest.mark.parametrize("is_hijax", [True, False])
def test_both_storages(is_hijax):
  with nnx.use_hijax(is_hijax):
    net = Net()
  found = nnx.find_nonfinite(nnx.intervene(lambda net, x: net(x), {"layers/1": jnp.log}))(net, X)
  assert (found.module, found.operation) == ("layers/1", "log")


def test_what_is_written_counts_as_a_result():
  total = nnx.Variable(jnp.zeros(()))

  def f(total, x):
    total[...] = jnp.log(x.min() * 0)
    return x

  assert nnx.find_nonfinite(f)(total, X).operation == "log"
  assert float(total) == 0
