"""nnx.remat: what is recomputed is computed alike, and what is written is written once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import _jax, nnx


class Node(nnx.Module):
  """An object with any attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


STORAGE = pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
REMATS = pytest.mark.parametrize("remat", [nnx.remat, jax.checkpoint], ids=["nnx", "jax"])
X = jnp.linspace(-1.0, 2.0, 12).reshape(6, 2)


def close(got, want):
  np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-5, atol=1e-6)


@REMATS
def test_dropout_has_the_same_mask_forward_and_backward(remat):
  drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
  f = remat(lambda drop, x: jnp.sin(drop(jnp.exp(x))) * 3)
  ones = jnp.ones(64)
  y, pull = jax.vjp(lambda x: f(drop, x), ones)
  (dx,) = pull(jnp.ones(64))
  assert 0 < int((y != 0).sum()) < 64
  np.testing.assert_array_equal(y != 0, dx != 0)
  assert int(drop.rngs.count) == 1
  mask = y != 0
  close(dx, jnp.where(mask, jnp.cos(2 * jnp.exp(ones)) * 2 * jnp.exp(ones) * 3, 0))


@STORAGE
def test_batch_norm_is_written_once(hijax):
  norm = nnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
  norm = norm if hijax else nnx.to_lojax(norm)
  twin = nnx.clone(norm)
  loss = lambda f: lambda m: (jnp.sin(f(m, X)) * X).sum()
  call = lambda m, x: m(x)
  grads = nnx.grad(loss(nnx.remat(call)))(norm)
  want = nnx.grad(loss(call))(twin)
  jax.tree.map(close, grads, want)
  close(norm.mean[...], twin.mean[...])
  close(norm.mean[...], X.mean(0) * 0.5)


@pytest.mark.parametrize("outer", [lambda f: f, jax.jit, nnx.jit], ids=["eager", "jax", "nnx"])
def test_state_that_is_read_and_written_keeps_its_old_value_for_the_backward_pass(outer):
  v = nnx.Variable(1.0)

  def f(x):
    y = jnp.sin(x * v)
    v[...] = 100.0
    return y * v

  dx = outer(jax.grad(nnx.remat(f)))(0.5)
  close(dx, np.cos(0.5) * 100)
  assert float(v) == 100.0


def test_writes_by_argument_keyword_and_closure():
  a, b, c = nnx.Variable(0), nnx.Variable(0), nnx.Variable(0)

  @nnx.remat
  def f(x, *, a, b):
    for v in (a, b, c):
      v[...] += 1
    return x * 2

  assert float(f(2.0, a=a, b=b)) == 4.0
  jax.grad(lambda x: f(x, a=a, b=b))(1.0)
  assert (int(a), int(b), int(c)) == (2, 2, 2)


def residuals(f, *args):
  """The shapes of what a gradient keeps from the forward pass."""
  _, pull = jax.vjp(f, *args)
  return sorted(x.shape for x in jax.tree.leaves(pull) if hasattr(x, "shape"))


def test_a_policy_decides_what_is_kept():
  kernel = jnp.full((2, 7), 0.1)
  f = lambda x: jnp.sin(jnp.sin(x @ kernel)).sum()
  policies = jax.checkpoint_policies
  kept = lambda **kw: residuals(nnx.remat(f, **kw), X).count((6, 7))
  assert kept(policy=policies.everything_saveable) > kept(policy=policies.dots_saveable) == 1
  assert kept() == kept(policy=policies.nothing_saveable) == 0
  close(jax.grad(nnx.remat(f, policy=policies.dots_saveable))(X), jax.grad(f)(X))


@pytest.mark.parametrize("static", [1, -2, (1,), [-2]], ids=str)
def test_static_arguments_are_passed_as_they_are(static):
  seen = []

  def f(m, flag, x):
    seen.append(flag)
    return m(x) if flag else x

  m = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  f = nnx.remat(f, static_argnums=static)
  close(f(m, True, X), m(X))
  close(f(m, False, X), X)
  assert seen == [True, False]


def test_as_a_decorator_with_options_and_as_a_method():
  class Block(nnx.Module):
    def __init__(self):
      self.linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      self.calls = nnx.Variable(0)

    @nnx.remat(prevent_cse=False)
    def __call__(self, x):
      self.calls += 1
      return jnp.tanh(self.linear(x))

  block = Block()
  grads = nnx.grad(lambda m: m(m(X)).sum())(block)
  want = jax.grad(
    lambda k: jnp.tanh(jnp.tanh(X @ k + block.linear.bias[...]) @ k + block.linear.bias[...]).sum()
  )(block.linear.kernel[...])
  close(grads["linear"]["kernel"][...], want)
  assert int(block.calls) == 2


def test_what_is_created_inside_is_returned():
  m = nnx.remat(lambda rngs: nnx.Linear(2, 3, rngs=rngs))(nnx.Rngs(0))
  assert type(m) is nnx.Linear and m.kernel.is_hijax
  node = Node()
  nnx.remat(lambda node: setattr(node, "cache", nnx.Cache(1.0)))(node)
  assert float(node.cache) == 1.0


def test_second_derivatives():
  v = nnx.Variable(2.0)
  f = nnx.remat(lambda x: jnp.sin(x * v) * x)
  want = jax.grad(jax.grad(lambda x: jnp.sin(x * 2.0) * x))(0.7)
  close(jax.grad(jax.grad(f))(0.7), want)
  assert nnx.checkpoint is nnx.remat


def test_inside_of_any_transform_it_recomputes():
  f = lambda x: jnp.sin(jnp.sin(x)).sum()
  text = str(jax.make_jaxpr(nnx.remat(f))(X))
  assert "remat" in text.lower() or "checkpoint" in text
  assert residuals(nnx.remat(f), X) != residuals(f, X)


@pytest.mark.skipif(not _jax.no_trace_active(), reason="the private API is switched off")
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_outside_of_a_trace_it_is_the_function_and_all_is_undone_if_it_raises(closure, error):
  """Also what a compiled function inside has written, which no Variable sees."""
  model = nnx.Dict(count=nnx.Variable(0.0), inner=nnx.Dict(), last=nnx.Variable(0, is_hijax=False))
  add = jax.jit(lambda v: v.set_value(v + 1))

  def f(model, fails):
    add(model.count)
    model.count[...] += 1
    model.last[...] = model.last + 1
    model.inner["new"] = nnx.Param(jnp.ones(2))
    if fails:
      raise error("in the middle")
    return model.inner["new"], float(model.count)  # a number: nothing is traced

  call = nnx.remat(lambda fails: f(model, fails)) if closure else nnx.remat(f)
  run = call if closure else lambda fails: call(model, fails)
  with pytest.raises(error, match="middle"):
    run(True)
  assert float(model.count) == int(model.last) == len(model.inner) == 0
  for i in (1, 2):
    new, count = run(False)
    assert new is model.inner["new"] and count == float(model.count) == 2 * i
    assert int(model.last) == i
