"""testing: each assertion holds for what is right, and fails on a program that is broken."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import _jax, nnx, testing
from refax.errors import BrokenLawError

X = jnp.linspace(-1.0, 2.0, 12).reshape(6, 2)


class Net(nnx.Module):
  """State of every kind: parameters, statistics, random streams, a counter."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.linear = nnx.Linear(2, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.calls = nnx.Variable(0)

  def __call__(self, x):
    self.calls[...] += 1
    return self.drop(self.norm(self.linear(x)))


@pytest.mark.parametrize("transform", testing.TRANSFORMS)
def test_a_program_with_state_is_the_same_as_its_twin(transform):
  net = Net()
  testing.assert_same_as_functional(lambda m, x: m(x), net, X, transforms=[transform])
  assert int(net.calls) == 0  # the arguments stay as they are


@pytest.mark.parametrize("transform", ["eager", "jax.jit", "nnx.jit", "scan"])
def test_a_training_step_is_the_same_as_its_twin(transform):
  net = Net()
  optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)

  def step(net, optimizer, x):
    loss, grads = nnx.value_and_grad(lambda net: (net(x) ** 2).mean())(net)
    optimizer.update(net, grads)
    return loss

  testing.assert_same_as_functional(step, net, optimizer, X, transforms=[transform])


def test_arguments_that_share_a_variable():
  a = nnx.Variable(1.0)
  pair = nnx.List([a, a])
  testing.assert_same_as_functional(lambda p: p[0].set_value(p[1] + 1), pair)


def test_nan_is_equal_to_nan_and_other_values_are_compared_as_they_are():
  def program(v):
    return {"nan": v * jnp.nan, "key": jax.random.key(0), "flag": True, "count": 3}

  testing.assert_same_as_functional(program, nnx.Variable(jnp.ones(2)), transforms=["eager"])


# broken programs
def fails(program, *args, match, **options):
  with pytest.raises(BrokenLawError, match=match) as caught:
    testing.assert_same_as_functional(program, *args, **options)
  assert isinstance(caught.value, AssertionError) and "fix:" in str(caught.value)


def test_state_in_a_list_is_found():
  kept = []

  def program(v):
    kept.append(0)
    v[...] += len(kept)

  match = (
    r"end with different state(.|\n)*under eager \[0\](.|\n)*array\(9, dtype=int32\) of the program"
  )
  fails(program, nnx.Variable(0), match=match, transforms=["eager"])


@pytest.mark.parametrize("transform", testing.TRANSFORMS[:-1])
def test_state_by_closure_is_found(transform):
  hidden = nnx.Variable(0.0)

  def program(v):
    hidden[...] += 1.0
    return v + hidden

  match = rf"return different values(.|\n)*under {transform}"
  fails(program, nnx.Variable(0.0), match=match, transforms=[transform])


def test_a_gradient_that_differs_is_found():
  calls = []

  def program(m, x):
    calls.append(0)
    return m(x) * len(calls)

  linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  fails(program, linear, X, match="under grad step 1 .*(bias|kernel)", transforms=["grad"])


def test_another_structure_is_found():
  calls = []

  def program(v):
    calls.append(0)
    return (v + 1,) * len(calls)

  fails(program, nnx.Variable(0), match="only its functional twin has", transforms=["eager"])


def test_another_dtype_is_found():
  flips = iter([jnp.float32, jnp.int32])
  program = lambda v: jnp.ones((), next(flips)) * jnp.int32(1)
  match = "float32.* of the program.*int32.* of the twin"
  fails(program, nnx.Variable(0), match=match, transforms=["eager"])


def test_an_unknown_transform_names_those_there_are():
  fails(lambda: None, match="no such transform(.|\n)*'pmap'(.|\n)*nnx.jit", transforms=["pmap"])


# traces
@pytest.mark.parametrize("compiled", [jax.jit, nnx.jit])
def test_traces_are_counted_and_limited(compiled):
  f = testing.assert_max_traces(lambda x: x + 1, 2)
  step = compiled(f)
  for x in (jnp.ones(2), jnp.zeros(2), jnp.ones(3), jnp.ones(2)):
    step(x)
  assert f.traces == 2
  with pytest.raises(BrokenLawError, match=r"(?s)traced 3 times.*float32\[3\] -> int32\[2\]"):
    step(jnp.arange(2))


def test_a_function_that_may_not_be_traced():
  f = testing.assert_max_traces(lambda x: x, 0)
  with pytest.raises(BrokenLawError, match="may be traced 0 times"):
    f(1.0)


def test_closures_of_a_counted_function_are_followed():
  net = Net()
  f = testing.assert_max_traces(lambda x: net(x), 2)
  step = nnx.jit(f)
  for _ in range(2):
    step(X)
  assert f.traces == 1
  net.eval()
  np.testing.assert_array_equal(step(X), step(X))
  assert f.traces == 2


# leaks
@pytest.mark.parametrize("traces", [True, False])
def test_a_block_without_leaks(traces):
  net = Net()
  with testing.assert_no_leaks(traces=traces):
    nnx.jit(lambda m, x: m(x))(net, X)
    jax.jit(lambda m, x: m(x))(net, X)
    nnx.grad(lambda m, x: m(x).sum())(net, X)


def test_a_tracer_in_a_variable_is_found():
  kept = []

  def program(x):
    kept.append(nnx.Cache(x))
    return x

  found = pytest.raises(BrokenLawError, match=r"tracer whose trace has ended(.|\n)*Cache")
  with found, testing.assert_no_leaks(traces=False):
    jax.jit(program)(jnp.ones(2))
  with testing.assert_no_leaks(traces=False):  # what was there before is not this block's doing
    pass


def test_a_tracer_in_an_attribute_is_found():
  kept = []

  class Holder(nnx.Module):
    def __init__(self, x):
      self.last = x

  found = pytest.raises(BrokenLawError, match=r"at: +Holder\.last")
  with found, testing.assert_no_leaks(traces=False):
    jax.jit(lambda x: (kept.append(Holder(x)), x)[1])(jnp.ones(2))


def test_a_tracer_anywhere_is_found_by_jax():
  kept = []
  with pytest.raises(Exception, match=r"[Ll]eaked"), testing.assert_no_leaks():
    jax.jit(lambda x: (kept.append(x), x)[1])(jnp.ones(2))


def test_a_deleted_buffer_is_found():
  v = nnx.Variable(jnp.ones(3))
  with pytest.raises(BrokenLawError, match="a deleted buffer"), testing.assert_no_leaks():
    _jax.peek_cell(v._cell).delete()


def test_an_error_of_the_block_arrives():
  with pytest.raises(ZeroDivisionError), testing.assert_no_leaks():
    raise ZeroDivisionError
