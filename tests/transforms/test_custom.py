"""nnx.custom_vjp: the user's rule is used, state is written once, misuse is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import DifferentiatedWriteError, MissingRuleError, TreeMismatchError

X = jnp.array([0.3, 0.4])


class Net(nnx.Module):
  def __init__(self):
    self.w = nnx.Param(jnp.array([1.0, 2.0]))
    self.calls = nnx.Variable(0)
    self.last = nnx.BatchStat(jnp.zeros(2))


def make(factor=2.0):
  """The sine of `w * x`, with `factor` times its gradient."""

  @nnx.custom_vjp
  def f(net, x):
    net.calls += 1
    net.last[...] = x
    return jnp.sin(net.w * x)

  def fwd(net, x):
    return f(net, x), (net, x)

  def bwd(residuals, g):
    net, x = residuals
    d = factor * g * jnp.cos(net.w * x)
    return {"w": d * x}, d * net.w

  f.defvjp(fwd, bwd)
  return f


def true_gradients(net, x):
  return nnx.grad(lambda net, x: jnp.sin(net.w * x).sum(), argnums=(0, 1))(net, x)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit, nnx.jit], ids=["eager", "jit", "nnx.jit"])
def test_the_rule_is_used_and_state_is_written_once(jit):
  f, net = make(), Net()
  step = jit(lambda net, x: nnx.value_and_grad(lambda n, x: f(n, x).sum(), argnums=(0, 1))(net, x))
  value, (dnet, dx) = step(net, X)
  want_net, want_x = true_gradients(net, X)
  np.testing.assert_allclose(value, jnp.sin(net.w * X).sum(), rtol=1e-6)
  np.testing.assert_allclose(dnet["w"], 2 * want_net["w"], rtol=1e-6)
  np.testing.assert_allclose(dx, 2 * want_x, rtol=1e-6)
  assert int(net.calls) == 1
  np.testing.assert_array_equal(net.last, X)


def test_without_a_gradient_it_is_the_function():
  f, net = make(), Net()
  np.testing.assert_allclose(f(net, X), jnp.sin(net.w * X), rtol=1e-6)
  assert int(net.calls) == 1


def test_the_rule_is_used_under_nnx_vmap_scan_remat_and_cond():
  f = make()
  mapped = lambda net, xs: nnx.vmap(lambda x: f(net, x), reduce={nnx.BatchStat: "first"})(xs)
  net = Net()
  grads = nnx.grad(lambda net: mapped(net, jnp.stack([X, X])).sum())(net)
  np.testing.assert_allclose(grads["w"], 4 * true_gradients(net, X)[0]["w"], rtol=1e-6)

  for transformed in (
    lambda net: nnx.scan(lambda t, n: t + f(n, X).sum(), in_axes=(nnx.Carry, None),
                         out_axes=nnx.Carry, length=3)(0.0, net),
    lambda net: 3 * nnx.remat(lambda n: f(n, X).sum())(net),
    lambda net: 3 * nnx.cond(True, lambda n: f(n, X).sum(), lambda n: n.w.sum(), net),
  ):  # fmt: skip
    net = Net()
    grads = nnx.grad(transformed)(net)
    np.testing.assert_allclose(grads["w"], 6 * true_gradients(net, X)[0]["w"], rtol=1e-6)


def test_variables_without_a_gradient_get_zero_and_none_is_zero():
  f = nnx.custom_vjp(lambda net, x: net.w * x)
  f.defvjp(lambda net, x: (f(net, x), None), lambda _, g: (None, g * 10))
  dnet, dx = nnx.grad(lambda net, x: f(net, x).sum(), argnums=(0, 1))(Net(), X)
  np.testing.assert_array_equal(dnet["w"], [0.0, 0.0])
  np.testing.assert_array_equal(dx, [10.0, 10.0])


def test_nondiff_arguments_are_passed_as_they_are_and_come_first():
  seen = []
  f = nnx.custom_vjp(lambda n, x: x * n, nondiff_argnums=(0,))
  f.defvjp(lambda n, x: (x * n, x), lambda n, x, g: (seen.append(n), (g * n * 10,))[1])
  np.testing.assert_array_equal(nnx.grad(lambda x: f(3, x).sum())(X), [30.0, 30.0])
  assert seen == [3]


def test_calling_it_before_defvjp_is_an_error():
  @nnx.custom_vjp
  def f(x):
    return x

  with pytest.raises(MissingRuleError, match=r"f has no derivative yet(.|\n)*call f\.defvjp"):
    f(X)


@pytest.mark.parametrize(
  ("fwd", "bwd", "message"),
  [
    (lambda x: x, lambda r, g: (g,), r"what fwd returns do not fit"),
    (lambda x: ((x, x), None), lambda r, g: (g,), r"fwd of a custom_vjp returns another structure"),
    (lambda x: (x, None), lambda r, g: g, r"expected a tuple of 1 gradients"),
    (lambda x: (x, None), lambda r, g: ({"w": g},), r"one for \.w, expected gradients for argu"),
  ],
)
def test_a_rule_of_the_wrong_form_is_named(fwd, bwd, message):
  f = nnx.custom_vjp(lambda x: x)
  f.defvjp(fwd, bwd)
  with pytest.raises(TreeMismatchError, match=message):
    nnx.grad(lambda x: f(x).sum())(X)


def counted(write):
  """A function with a rule, of a model that writes a float Variable in it."""

  class Counted(nnx.Module):
    def __init__(self):
      self.w, self.seen = nnx.Param(jnp.ones(3)), nnx.Variable(jnp.zeros(3))

    def __call__(self, x):
      write(self, x)
      return (self.w[...] * x).sum()

  f = nnx.custom_vjp(lambda m, x: m(x))
  f.defvjp(lambda m, x: (f(m, x), None), lambda _, g: (None, jnp.full(3, 2 * g)))
  return Counted(), f


FREE = {
  "a count": lambda m, x: m.seen.set_value(m.seen + 1.0),
  "a comparison": lambda m, x: m.seen.set_value(m.seen + (x > 0)),
  "stop_gradient": lambda m, x: m.seen.set_value(m.seen + jax.lax.stop_gradient(x)),
  "in a loop": lambda m, x: m.seen.set_value(
    jax.lax.fori_loop(0, 1, lambda _, c: c + jax.lax.stop_gradient(x), m.seen[...])
  ),
}
CALLS = {
  "argument": lambda m, f, x: nnx.grad(f, argnums=1)(m, x),
  "closure": lambda m, f, x: nnx.grad(lambda x: f(m, x))(x),
  "jit": lambda m, f, x: nnx.jit(nnx.grad(f, argnums=1))(m, x),
  "jax": lambda m, f, x: jax.grad(lambda x: f(m, x))(x),
  "jax.jit": lambda m, f, x: jax.jit(jax.grad(lambda x: f(m, x)))(x),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("write", FREE.values(), ids=FREE)
def test_a_rule_may_write_what_depends_on_nothing_that_is_differentiated(write, call):
  (m, f), x = counted(write), jnp.ones(3)
  np.testing.assert_array_equal(call(m, f, x), jnp.full(3, 2.0))
  np.testing.assert_array_equal(m.seen, jnp.ones(3))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_rule_may_not_write_what_is_differentiated(call):
  m, f = counted(lambda m, x: m.seen.set_value(m.seen + x * (x > 0)))
  with pytest.raises(DifferentiatedWriteError):
    call(m, f, jnp.ones(3))
  np.testing.assert_array_equal(m.seen, jnp.zeros(3))


@jax.custom_jvp
def rounded(x):
  """Quantized; the gradient is that of the identity."""
  return x.astype(jnp.int8).astype(jnp.float32)


rounded.defjvp(lambda primals, tangents: (rounded(*primals), tangents[0]))

MOVING = {
  "a rule inside": lambda x: rounded(x * 5),
  "a branch": lambda x: jax.lax.cond(x.sum() > 0, lambda x: x * 2, lambda x: x * 0, x),
  "a loop": lambda x: jax.lax.fori_loop(0, 2, lambda _, c: c * x, x),
  "jit": jax.jit(lambda x: jnp.where(x > 0, x, 0.0)),
}


@pytest.mark.parametrize("call", [CALLS["argument"], CALLS["closure"], CALLS["jit"]])
@pytest.mark.parametrize("value", MOVING.values(), ids=MOVING)
@pytest.mark.parametrize("by_closure", [False, True])
def test_no_gradient_of_what_a_rule_writes_is_lost(value, call, by_closure):
  other = nnx.Variable(jnp.zeros(3))
  target = lambda m: other if by_closure else m.seen
  m, f = counted(lambda m, x: target(m).set_value(value(x)))
  with pytest.raises(DifferentiatedWriteError):
    call(m, f, jnp.ones(3))
  np.testing.assert_array_equal(target(m), jnp.zeros(3))


def test_a_rule_may_write_a_detached_variable_by_closure():
  stat = nnx.BatchStat(jnp.zeros(3))
  m, f = counted(lambda m, x: stat.set_value(x * 5))
  np.testing.assert_array_equal(nnx.grad(f, argnums=1)(m, jnp.ones(3)), jnp.full(3, 2.0))
  np.testing.assert_array_equal(stat, jnp.full(3, 5.0))
