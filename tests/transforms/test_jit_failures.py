"""What raises while a compiled call runs leaves all state as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import _jax, nnx

pytestmark = pytest.mark.skipif(
  not _jax.no_trace_active(), reason="without the private API, calls go through Refs, as in jax.jit"
)


class Net(nnx.Module):
  def __init__(self):
    self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    self.count = nnx.Variable(0)

  def __call__(self, x):
    self.count += 1
    return self.linear(x)


def state_of(*objects):
  return [np.asarray(x) for x in jax.tree.leaves(nnx.to_lojax(objects))]


def assert_same(a, b):
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(x, y)


class Refused(Exception):
  """What the callback raises."""


def refuse(x):
  if x > 2:
    raise Refused(f"cannot take {x}")
  return x


def by_pure_callback(net, x):
  y = jax.pure_callback(refuse, jax.ShapeDtypeStruct((), jnp.float32), x)
  net.count += 1
  return net(y * jnp.ones(3))


def by_io_callback(net, x):
  net.count += 1
  jax.experimental.io_callback(refuse, jax.ShapeDtypeStruct((), jnp.float32), x, ordered=True)
  return net(x * jnp.ones(3))


def by_debug_callback(net, x):
  net.count += 1
  jax.debug.callback(refuse, x)
  return net(x * jnp.ones(3))


def by_scan(net, x):
  def body(c, _):
    return jax.pure_callback(refuse, jax.ShapeDtypeStruct((), jnp.float32), c + 0.1), None

  y, _ = jax.lax.scan(body, x, None, length=2)
  return net(y * jnp.ones(3))


@pytest.mark.parametrize("f", [by_pure_callback, by_io_callback, by_debug_callback, by_scan])
def test_an_error_in_a_callback_leaves_the_state(f):
  net, step = Net(), nnx.jit(f)
  fine = jnp.float32(0.5)
  step(net, fine)
  for _ in range(2):
    before = state_of(net)
    with pytest.raises(Exception, match="cannot take"):
      step(net, jnp.float32(5.0))
      jax.effects_barrier()
    assert_same(state_of(net), before)
    step(net, fine)
  assert int(net.count) == (3 if f is by_scan else 6)


def diverge(model, optimizer, x):
  loss, grads = nnx.value_and_grad(lambda m: (jnp.log(x - 1.0) + m(jnp.ones(3))).sum())(model)
  optimizer.update(model, grads)
  return loss


@pytest.mark.parametrize("flag", ["jax_debug_nans", "jax_debug_infs"])
def test_a_debug_flag_raises_the_error_of_jax_and_leaves_the_state(flag):
  model, step = Net(), nnx.jit(diverge)
  optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
  step(model, optimizer, 3.0)
  jax.config.update(flag, True)
  try:
    for x in (3.0, 4.0):
      step(model, optimizer, x)
    before = state_of(model, optimizer)
    for _ in range(2):
      with pytest.raises(FloatingPointError):
        step(model, optimizer, 1.0 if flag == "jax_debug_infs" else 0.5)
      assert_same(state_of(model, optimizer), before)
    step(model, optimizer, 3.0)
  finally:
    jax.config.update(flag, False)
  step(model, optimizer, 3.0)
  assert int(optimizer.step) == 5


@pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
def test_tracers_do_not_leak(hijax):
  with nnx.use_hijax(hijax), jax.checking_leaks():
    model = nnx.Sequential(
      nnx.Linear(3, 3, rngs=nnx.Rngs(0)),
      nnx.BatchNorm(3, rngs=nnx.Rngs(0)),
      nnx.Dropout(0.5, rngs=nnx.Rngs(0)),
    )
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    x = jnp.ones((4, 3))

    @nnx.jit
    def step(model, optimizer, x):
      loss = lambda m: nnx.remat(lambda m, x: m(x))(m, x).sum()
      value, grads = nnx.value_and_grad(loss)(model)
      optimizer.update(model, grads)
      value += nnx.cond(value > 0, lambda m: m(x).sum(), lambda m: m(2 * x).sum(), model)
      steps = nnx.scan(
        lambda c, m: c + m(x).sum(), in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=2
      )
      return steps(value, model)

    for _ in range(3):
      assert jnp.isfinite(step(model, optimizer, x))
    plain = jax.jit(lambda m, x: m(x).sum())
    if hijax:
      plain(model, x), plain(model, x)
    closed = nnx.jit(lambda x: model(x) if hijax else model.layers[0](x))
    closed(x), closed(x)


def test_an_interrupt_by_an_exception_of_a_signal_handler():
  """A handler that raises while nnx.jit runs for the first time: after the call, and not within."""
  import signal

  class Alarm(Exception):
    pass

  def handler(*_):
    raise Alarm

  net, x = Net(), jnp.ones(3)

  def slow(x):
    signal.raise_signal(signal.SIGUSR1)  # arrives while the call is made
    return x

  @nnx.jit
  def step(net, x):
    y = jax.pure_callback(slow, jax.ShapeDtypeStruct((3,), jnp.float32), x)
    return net(y)

  old = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
  try:
    step(net, x)
    signal.signal(signal.SIGUSR1, handler)
    with pytest.raises(Alarm):
      step(net, x)
    assert int(net.count) == 2
    assert signal.getsignal(signal.SIGUSR1) is handler
  finally:
    signal.signal(signal.SIGUSR1, old)


def test_a_result_that_is_no_array_is_told_of_the_users_function():
  def step(x):
    return {"a": x, "b": "text"}

  with pytest.raises(TypeError) as error:
    nnx.jit(step)(jnp.ones(2))
  assert "function step at " in str(error.value) and "test_jit_failures.py" in str(error.value)
  assert "<class 'str'> in its result" in str(error.value)
  assert "traced.py" not in str(error.value)
