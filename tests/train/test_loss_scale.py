"""LossScale: float16 trains as float32 does, and comes back from an overflow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError


class Net(nnx.Module):
  """Two layers that compute in a dtype, with float32 Params."""

  def __init__(self, dtype):
    self.a = nnx.Linear(4, 16, dtype=dtype, rngs=nnx.Rngs(0))
    self.b = nnx.Linear(16, 1, dtype=dtype, rngs=nnx.Rngs(1))
    self.calls = nnx.BatchStat(0)

  def __call__(self, x):
    self.calls[...] += 1
    return self.b(jnp.tanh(self.a(x)))


X = np.random.default_rng(0).standard_normal((32, 4)).astype(np.float32)
Y = np.sin(X.sum(1, keepdims=True))


def loss(net, factor=1.0):
  """Its gradient in the output is about `factor / 32`."""
  return ((net(X) - Y).astype(jnp.float32) ** 2).mean() * factor


def arrays(tree):
  return [np.asarray(x) for x in jax.tree.leaves(nnx.to_lojax(tree))]


RUNS = {"eager": lambda f: f, "jax.jit": jax.jit, "nnx.jit": nnx.jit}


def train(net, loss_scale, factor=1.0, steps=60, run=jax.jit, rate=0.1):
  optimizer = nnx.Optimizer(
    net, optax.sgd(rate / factor, momentum=0.9), wrt=nnx.Param, skip_nonfinite=True
  )

  @run
  def step(net, optimizer, loss_scale):
    if loss_scale is None:
      value, grads = nnx.value_and_grad(loss)(net, factor)
    else:
      value, grads = loss_scale.value_and_grad(loss)(net, factor)
    optimizer.update(net, grads)
    return value

  losses = [float(step(net, optimizer, loss_scale)) / factor for _ in range(steps)]
  return losses, optimizer


def test_float16_overflows_recovers_and_equals_float32_closely():
  scale = nnx.LossScale(2.0**30, period=10**6)
  half, single = Net(jnp.float16), Net(jnp.float32)
  losses, optimizer = train(half, scale)
  skipped = int(optimizer.skipped)
  assert 3 < skipped < 25 and int(optimizer.step) == 60 - skipped
  assert float(scale.value) == 2.0 ** (30 - skipped)
  want, _ = train(single, None, steps=60 - skipped)
  assert losses[:skipped] == [losses[0]] * skipped, "a skipped step changes nothing"
  np.testing.assert_allclose(losses[skipped:], want, rtol=0.02, atol=1e-4)
  assert want[-1] < 0.3 * want[0]
  for a, b in zip(arrays(half), arrays(single), strict=True):
    if a.dtype == np.float32:
      np.testing.assert_allclose(a, b, rtol=0.05, atol=5e-3)


def test_gradients_too_small_for_float16_need_it():
  tiny = 2.0**-25
  single, plain, scaled = Net(jnp.float32), Net(jnp.float16), Net(jnp.float16)
  want, _ = train(single, None, tiny)
  got, optimizer = train(scaled, nnx.LossScale(2.0**20, period=10**6), tiny)
  np.testing.assert_allclose(got, want, rtol=0.02, atol=1e-4)
  assert int(optimizer.skipped) == 0
  stuck, _ = train(plain, None, tiny)
  assert stuck[-1] > 5 * want[-1], "the test would not see a LossScale without effect"


@pytest.mark.parametrize("run", RUNS)
def test_every_way_to_run_a_step_gives_the_same(run):
  results = []
  for how in (RUNS[run], jax.jit):
    net, scale = Net(jnp.float16), nnx.LossScale(2.0**19, period=2)
    losses, optimizer = train(net, scale, steps=5, run=how)
    results.append((losses, float(scale.value), int(scale.finite_steps), int(optimizer.skipped)))
  np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-2)
  assert results[0][1:] == results[1][1:]


def test_it_equals_nnx_value_and_grad_in_float32():
  net, scale = Net(jnp.float32), nnx.LossScale()
  want_value, want = nnx.value_and_grad(loss)(net)
  calls = int(net.calls)
  value, grads = jax.jit(lambda n, s: s.value_and_grad(loss)(n))(net, scale)
  assert int(net.calls) == calls + 1
  np.testing.assert_allclose(value, want_value, rtol=1e-6)
  assert jax.tree.structure(grads) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_the_options_of_value_and_grad_are_passed():
  scale = nnx.LossScale(2.0**10)
  f = lambda x, net: ((x * net(X)).mean(), {"twice": 2 * x})
  net = Net(jnp.float32)
  (value, aux), grads = scale.value_and_grad(
    f, argnums=(0, 1), has_aux=True, wrt=nnx.PathContains("b")
  )(3.0, net)
  (want, _), want_grads = nnx.value_and_grad(
    f, argnums=(0, 1), has_aux=True, wrt=nnx.PathContains("b")
  )(3.0, net)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  assert float(aux["twice"]) == 6.0 and list(grads[1]) == ["b"]
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_scale_and_unscale_by_hand():
  net, scale = Net(jnp.float32), nnx.LossScale(2.0**12)
  assert scale.scale(jnp.float16(30.0)).dtype == jnp.float32
  assert float(scale.scale(jnp.float16(30.0))) == 30 * 2.0**12, "float16 ends at 65504"
  grads = nnx.grad(lambda n: scale.scale(loss(n)))(net)
  want = nnx.grad(loss)(net)
  for tree in (grads, nnx.to_pure_dict(grads)):
    got = scale.unscale(tree)
    assert type(got) is type(tree)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)
  half = scale.unscale({"g": jnp.full(2, 2.0**-10, jnp.float16)})["g"]
  assert half.dtype == jnp.float16 and half.tolist() == [2.0**-22] * 2


def run_updates(scale, finite):
  values = []
  update = jax.jit(lambda s, f: s.update(f))
  for f in finite:
    update(scale, f)
    values.append(float(scale.value))
  return values


def test_it_grows_after_a_period_and_falls_at_once():
  scale = nnx.LossScale(8.0, factor=2.0, period=3, minimum=2.0)
  up, down = True, False
  finite = [up, up, up, up, up, down, up, up, up, down, down, down, down, up, up, up]
  want = [8, 8, 16, 16, 16, 8, 8, 8, 16, 8, 4, 2, 2, 2, 2, 4]
  assert run_updates(scale, finite) == want
  assert int(scale.finite_steps) == 0


def test_it_stays_finite():
  scale = nnx.LossScale(2.0**126, factor=4.0, period=1)
  assert run_updates(scale, [True] * 3) == [2.0**126] * 3


def test_a_period_of_one_and_another_factor():
  assert run_updates(nnx.LossScale(9.0, factor=3.0, period=1), [True, False, False]) == [27, 9, 3]


def test_defaults_and_attributes():
  scale = nnx.LossScale()
  assert float(scale.value) == 2.0**15 and scale.value.dtype == jnp.float32
  assert (scale.factor, scale.period, scale.minimum) == (2.0, 2000, 1.0)
  twin = nnx.merge(*nnx.split(scale))
  twin.update(False)
  assert float(scale.value) == 2.0**14


def test_an_update_is_traced_once_and_runs_in_a_scan():
  scale = nnx.LossScale(8.0, period=2)
  finite = jnp.array([True, True, False, True, True, True])
  jax.jit(lambda s, xs: jax.lax.scan(lambda c, f: (c, s.update(f)), None, xs)[1])(scale, finite)
  assert float(scale.value) == 16.0 and int(scale.finite_steps) == 1


REFUSED = {
  "initial": {"initial": 0.0},
  "minimum": {"minimum": -1.0},
  "factor": {"factor": 1.0},
  "period": {"period": 0},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(name):
  with pytest.raises(InvalidArgumentError, match=f"LossScale cannot work with this {name}\n"):
    nnx.LossScale(**REFUSED[name])


def test_a_minimum_above_the_start_is_refused():
  with pytest.raises(InvalidArgumentError, match=r"this minimum(.|\n)*at most `initial`"):
    nnx.LossScale(2.0, minimum=4.0)


@pytest.mark.parametrize(("name", "value"), [
  ("initial", 1e39), ("initial", 1e-50), ("minimum", 1e-50), ("factor", 1 + 1e-9),
  ("factor", 1e39), ("period", 2**32),
])  # fmt: skip
def test_a_number_that_the_state_does_not_hold_is_refused(name, value):
  with pytest.raises(InvalidArgumentError, match=f"LossScale cannot work with this {name}\n"):
    nnx.LossScale(**{name: value})
  nnx.LossScale(period=2**32 - 1).update(True)
