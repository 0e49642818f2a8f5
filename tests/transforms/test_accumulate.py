"""nnx.accumulate_grads: microbatches give the gradient of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import TreeMismatchError


class Net(nnx.Module):
  """Two layers with tied weights, and a count of calls."""

  def __init__(self):
    self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    self.again = self.linear
    self.scale = nnx.Variable(2.0)
    self.calls = nnx.Variable(0)

  def __call__(self, x):
    self.calls += 1
    return self.again(jnp.tanh(self.linear(x))) * self.scale


X = jnp.linspace(-1.0, 1.0, 24).reshape(8, 3)
Y = jnp.cos(X)


def loss(model, x, y):
  return ((model(x) - y["target"]) ** 2).mean()


def close(got, want):
  np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit, nnx.jit], ids=["eager", "jax", "nnx"])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_value_and_gradients_are_those_of_the_whole_batch(steps, jit):
  m, twin = Net(), Net()
  value, grads = jit(lambda m, x, y: nnx.accumulate_grads(loss, steps=steps)(m, x, y))(
    m, X, {"target": Y}
  )
  want, want_grads = nnx.value_and_grad(loss)(twin, X, {"target": Y})
  close(value, want)
  assert jax.tree.structure(grads) == jax.tree.structure(want_grads)
  jax.tree.map(close, grads, want_grads)
  assert int(m.calls) == steps


def test_a_lojax_model():
  m, twin = nnx.to_lojax(Net()), Net()
  value, grads = nnx.accumulate_grads(loss, steps=4)(m, X, {"target": Y})
  want, want_grads = nnx.value_and_grad(loss)(twin, X, {"target": Y})
  close(value, want)
  jax.tree.map(close, grads, want_grads)
  assert int(m.calls) == 4 and not m.calls.is_hijax


def test_aux_of_all_microbatches_is_stacked():
  def f(model, x):
    y = model(x)
    return (y**2).mean(), {"y": y, "calls": model.calls + 0}

  m, twin = Net(), Net()
  (value, aux), grads = nnx.accumulate_grads(f, steps=4, has_aux=True)(m, X)
  (want, want_aux), want_grads = nnx.value_and_grad(f, has_aux=True)(twin, X)
  close(value, want)
  jax.tree.map(close, grads, want_grads)
  assert aux["y"].shape == (4, 2, 3) and aux["calls"].tolist() == [1, 2, 3, 4]
  close(aux["y"].reshape(8, 3), want_aux["y"])


def test_wrt_chooses_what_is_differentiated():
  m = Net()
  only = lambda path, x: path == ("scale",)
  _, grads = nnx.accumulate_grads(lambda m, x: m(x).mean(), steps=2, wrt=only)(m, X)
  assert list(grads) == ["scale"]
  close(grads["scale"][...], Net()(X).mean() / 2)


def test_as_a_decorator():
  @nnx.accumulate_grads(steps=2)
  def step(m, x):
    return m(x).sum()

  value, _ = step(Net(), X)
  close(value, Net()(X).sum() / 2)  # a mean over microbatches of what the function returns


@pytest.mark.parametrize(("batch", "got"), [(X, "float32[8,3]"), (jnp.array(1.0), "float32[]")])
def test_a_batch_that_does_not_divide(batch, got):
  m = Net()
  with pytest.raises(TreeMismatchError) as caught:
    nnx.accumulate_grads(lambda m, x: m(x).mean(), steps=3)(m, batch)
  assert str(caught.value) == (
    "the batch does not divide into microbatches\n"
    f"  got: {got}, and steps=3\n"
    "  fix: choose steps that divide the first axis of every array of the batch"
  )
  assert int(m.calls) == 0


class Weight(nnx.Module):
  def __init__(self, dtype, value=0.0):
    self.w = nnx.Param(jnp.asarray(value, dtype))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit, nnx.jit], ids=["eager", "jax", "nnx"])
def test_a_sum_of_many_small_terms_is_cast_once(dtype, jit):
  loss = lambda m, x: (m.w * x).mean() + jnp.ones((), dtype)
  run = jit(lambda m, x: nnx.accumulate_grads(loss, steps=512)(m, x))
  value, grads = run(Weight(dtype), jnp.ones(1024, dtype))
  assert (value.dtype, float(value)) == (dtype, 1.0)
  assert (grads["w"].dtype, float(grads["w"][...])) == (dtype, 1.0)


def test_a_term_that_float16_does_not_hold_is_added_up():
  scale = 2.0**-20
  f = lambda m, x: (m.w * x).mean()
  _, grads = nnx.accumulate_grads(f, steps=512)(Weight(jnp.float16), jnp.full(512, scale, "f2"))
  assert float(grads["w"][...]) == scale


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_equals_float64(dtype):
  x = np.random.default_rng(0).standard_normal(256) + 3
  x = jnp.asarray(x, dtype)
  f = lambda m, x: ((m.w - x) ** 2).mean()
  value, grads = nnx.accumulate_grads(f, steps=256)(Weight(dtype, 1.0), x)
  exact = np.asarray(x, np.float64)
  eps = float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(float(value), ((1 - exact) ** 2).mean(), rtol=eps)
  np.testing.assert_allclose(float(grads["w"][...]), (2 * (1 - exact)).mean(), rtol=eps)
