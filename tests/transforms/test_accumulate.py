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
  assert caught.value.args[0] == (
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


N, SIZE = 4, 6


class Table(nnx.Module):
  """Parameters that a function reaches in the ways that have rules of their own in JAX."""

  def __init__(self, dtype=jnp.float32):
    normal = lambda i, *shape: nnx.Param(0.3 * jax.random.normal(jax.random.key(i), shape, dtype))
    self.a, self.b, self.c = normal(0, N, SIZE, SIZE), normal(1, N, SIZE), normal(2, SIZE, SIZE)
    self.unused = normal(3, 2)


def layer(x, kernel, bias):
  return jnp.tanh(x @ kernel + bias)


def indexed(m, x):
  for i in range(N):
    x = layer(x, m.a[i], m.b[i])
  return x


def sliced(m, x):
  return x @ m.c[1::2].T @ m.c[:3] + m.b[1:2, ::-1]


def dynamically(m, x):
  i = jnp.argmax(x[0]) % N
  return layer(x, m.a[i], jax.lax.dynamic_index_in_dim(m.b[...], i, keepdims=False))


def gathered(m, x):
  return x + m.c[jnp.array([1, 1, 0])].sum(0) + jnp.take(m.b[...], jnp.array([0, 3, 3]), 0).mean(0)


def scanned(m, x):
  return jax.lax.scan(lambda x, p: (layer(x, *p), None), x, (m.a[...], m.b[...]))[0]


def scanned_with_constants(m, x):
  def step(carry, p):
    x, total = carry
    x = layer(x, p[1] @ m.c[...], p[0]) * m.b[0]
    return (x, total + (p[0] * m.c[0]).sum()), x @ m.c[...]

  (x, total), ys = jax.lax.scan(step, (x, 0.0), (m.b[...], m.a[...]), reverse=True)
  return x + ys.sum(0) + total


def constant_and_scanned(m, x):
  return jax.lax.scan(lambda x, b: (x + b * m.b[0] * m.b[...].sum(), None), x, m.b[...])[0]


def scan_in_scan(m, x):
  outer = lambda x, p: (scanned(m, x @ p), None)
  return jax.lax.scan(outer, x, m.a[...])[0]


def unrolled_scan(m, x):
  return jax.lax.scan(lambda x, p: (layer(x, *p), x), x, (m.a[...], m.b[...]), unroll=2)[1].sum(0)


def rematerialized(m, x):
  return jax.checkpoint(lambda a, x: layer(x, a[0], a[1, 0]))(m.a[...], x) @ m.c[...]


def remat_in_scan(m, x):
  step = jax.checkpoint(lambda x, p: (layer(x, p[0] @ m.c[...], p[1]), None))
  return jax.lax.scan(step, x, (m.a[...], m.b[...]))[0]


def branch(m, x):
  return jax.lax.cond(x[0, 0] > 0, lambda: x @ m.c[...], lambda: x + m.b[1])


def branch_in_scan(m, x):
  step = lambda x, p: (jax.lax.cond(x[0, 0] > 0, lambda: x @ p[0] @ m.c[...], lambda: x + p[1]), 0)
  return jax.lax.scan(step, x, (m.a[...], m.b[...]))[0]


def compiled(m, x):
  return jax.jit(lambda c, x: jax.jit(jnp.matmul)(x, c.T) + c[0])(m.c[...], x)


def mapped(m, x):
  return jax.vmap(lambda a: x @ a)(m.a[...]).mean(0) + jax.vmap(lambda x: x @ m.c[...])(x)


def reused(m, x):
  return x @ m.c[...] @ m.c[...].T + (m.c[...] * m.c[...]).sum() + m.b[...].sum(0) * m.b[2]


def reshaped(m, x):
  c = jnp.concatenate([m.c[...], m.c[...].T]).reshape(2, -1).sum(0).reshape(SIZE, SIZE)
  return x @ jnp.where(c > 0, c, m.c[0, 0]) + jnp.sort(m.b[3])


@jax.custom_vjp
def doubled(c):
  return c


doubled.defvjp(lambda c: (c, None), lambda _, g: (2 * g,))


def with_a_rule(m, x):
  return jax.nn.relu(x @ doubled(m.c[...]))


def of_nothing(m, x):
  return x


def stop(m, x):
  return x @ jax.lax.stop_gradient(m.c[...]) * m.b[0]


WAYS = [
  indexed,
  sliced,
  dynamically,
  gathered,
  scanned,
  scanned_with_constants,
  constant_and_scanned,
  scan_in_scan,
  unrolled_scan,
  rematerialized,
  remat_in_scan,
  branch,
  branch_in_scan,
  compiled,
  mapped,
  reused,
  reshaped,
  with_a_rule,
  of_nothing,
  stop,
]


def one_after_the_other(f, m, batch, steps):
  """The mean of the gradients, in the plain form."""
  parts = [nnx.value_and_grad(f)(m, x) for x in jnp.split(batch, steps)]
  return jax.tree.map(lambda *xs: sum(x.astype(jnp.float32) for x in xs) / steps, *parts)


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_that_is_added_in_place_is_the_plain_one(way):
  batch = jax.random.normal(jax.random.key(9), (6, 3, SIZE)).reshape(18, SIZE)
  f = lambda m, x: (way(m, x) ** 2).mean()
  m = Table()
  want = nnx.jit(lambda m, x: one_after_the_other(f, m, x, 6))(m, batch)
  got = nnx.jit(lambda m, x: nnx.accumulate_grads(f, steps=6)(m, x))(m, batch)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, want)


def temporaries(f, *args):
  return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


def by_hand(loss, weights, batch, steps):
  """`jax.vjp(...)[1].with_refs`, as its documentation has it."""
  totals = jax.tree.map(lambda w: jax.new_ref(jnp.zeros_like(w)), weights)

  def step(total, x):
    value, pull = jax.vjp(lambda w: loss(w, x), weights)
    pull.with_refs(totals)(jnp.full_like(value, 1 / steps))
    return total + value / steps, None

  batch = batch.reshape(steps, -1, *batch.shape[1:])
  value, _ = jax.lax.scan(step, jnp.zeros(()), batch)
  return value, jax.tree.map(jax.freeze, totals)


WIDE, DEEP = 256, 6
BATCH = jnp.ones((16, WIDE))


class Tanh(nnx.Module):
  def __init__(self, *, rngs):
    self.linear = nnx.Linear(WIDE, WIDE, use_bias=False, rngs=rngs)

  def __call__(self, x):
    return jnp.tanh(self.linear(x))


def square(model, x):
  return (model(x) ** 2).mean()


def gradients(model, x):
  value, grads = nnx.accumulate_grads(square, steps=4)(model, x)
  return value, nnx.to_pure_dict(grads)


@pytest.mark.parametrize("hijax", [True, False])
def test_memory_holds_one_gradient_of_layers_one_by_one(hijax):
  def loss(weights, x):
    for w in weights:
      x = jnp.tanh(x @ w)
    return (x**2).mean()

  weights = [jnp.ones((WIDE, WIDE)) for _ in range(DEEP)]
  with nnx.use_hijax(hijax):
    model = nnx.Sequential(*[Tanh(rngs=nnx.Rngs(0)) for _ in range(DEEP)])
  want = temporaries(lambda w, x: by_hand(loss, w, x, 4), weights, BATCH)
  assert temporaries(gradients, model, BATCH) <= 1.05 * want


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="its scans add wrongly: jax#38929")
@pytest.mark.parametrize("hijax", [True, False])
def test_memory_holds_one_gradient_of_a_stack(hijax):
  def loss(weights, x):
    return (jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0] ** 2).mean()

  with nnx.use_hijax(hijax):
    model = nnx.Stack(Tanh, DEEP, rngs=nnx.Rngs(0))
  want = temporaries(lambda w, x: by_hand(loss, w, x, 4), jnp.ones((DEEP, WIDE, WIDE)), BATCH)
  assert temporaries(gradients, model, BATCH) <= 1.05 * want


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("way", [indexed, scanned_with_constants, reused])
def test_half_precision_is_added_up_in_float32(way, dtype):
  m, x = Table(dtype), jax.random.normal(jax.random.key(5), (24, SIZE), dtype)
  f = lambda m, x: (way(m, x).astype(jnp.float32) ** 2).mean()
  _, want = one_after_the_other(f, m, x, 6)
  value, grads = nnx.jit(nnx.accumulate_grads(f, steps=6))(m, x)
  assert value.dtype == jnp.float32
  eps = float(jnp.finfo(dtype).eps)
  for got, exact in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
    assert got.dtype == dtype
    atol = 2 * eps * float(jnp.abs(exact).max())  # where terms of both signs are added up
    np.testing.assert_allclose(np.asarray(got, np.float32), exact, rtol=eps, atol=atol)


def test_gradients_of_gradients():
  m, x = Table(), jax.random.normal(jax.random.key(5), (6, SIZE))
  f = lambda m, x: (indexed(m, x) ** 2).mean()
  norm = lambda value_and_grads: sum((g[...] ** 2).sum() for g in jax.tree.leaves(value_and_grads))
  want = nnx.grad(lambda m: norm(nnx.value_and_grad(f)(m, x)))(m)
  got = nnx.grad(lambda m: norm(nnx.accumulate_grads(f, steps=3)(m, x)))(m)
  assert float(jnp.abs(want["a"][...]).max()) > 1e-3
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


@pytest.mark.parametrize("hijax", [True, False])
def test_an_ensemble(hijax):
  with nnx.use_hijax(hijax):
    models = nnx.vmap(lambda rngs: nnx.Stack(Tanh, 2, rngs=rngs))(nnx.Rngs(0).split(3))
  x = jax.random.normal(jax.random.key(1), (8, WIDE))
  run = nnx.vmap(nnx.accumulate_grads(square, steps=4), in_axes=(0, None))
  want = nnx.vmap(nnx.value_and_grad(square), in_axes=(0, None))(models, x)
  for got in (run(models, x), nnx.jit(run)(models, x)):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), got, want)


def test_in_a_scan_over_batches():
  m, twin = Net(), Net()
  batches = jnp.stack([X, -X, X + 1])
  run = nnx.accumulate_grads(lambda m, x: (m(x) ** 2).mean(), steps=4)
  loop = nnx.jit(nnx.scan(lambda m, x: run(m, x), in_axes=(None, 0), out_axes=0))
  values, grads = loop(m, batches)
  for i, x in enumerate(batches):
    value, want = nnx.value_and_grad(lambda m, x: (m(x) ** 2).mean())(twin, x)
    close(values[i], value)
    jax.tree.map(lambda a, b, i=i: close(a[i], b), grads, want)
  assert int(m.calls) == 12


@pytest.mark.parametrize("arg", [1.5, jnp.array(1.5), np.float32(1.5)])
def test_an_argument_that_is_an_array(arg):
  value, grad = nnx.accumulate_grads(lambda w, x: (w * x).mean(), steps=2)(arg, jnp.arange(4.0))
  assert (float(value), float(grad)) == (2.25, 1.5)


def test_what_cannot_be_differentiated_is_refused_as_ever():
  with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs"):
    nnx.accumulate_grads(lambda w, x: (w * x).mean(), steps=2)(jnp.array(1), jnp.arange(4.0))


@pytest.mark.parametrize("writes", [False, True])
def test_a_backward_pass_of_the_users_own_may_reach_state_by_closure(writes):
  scale, seen = nnx.Variable(3.0), nnx.BatchStat(0.0)

  @jax.custom_vjp
  def double(x):
    return x * 2

  def backward(_, g):
    if writes:
      seen[...] = seen[...] + 1
    return (g * scale[...],)

  double.defvjp(lambda x: (x * 2, None), backward)
  model = nnx.Linear(3, 1, use_bias=False, rngs=nnx.Rngs(0))
  loss = lambda model, x: double(model.kernel[...]).sum() * x.sum()
  x = jnp.arange(6.0).reshape(6, 1)
  _, grads = nnx.accumulate_grads(loss, steps=3)(model, x)
  np.testing.assert_allclose(grads["kernel"][...], jnp.full((3, 1), 15.0))
  assert float(seen) == 3.0 * writes
