"""Loops and branches outside of compiled functions are compiled once, and are never stale."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import _jax, nnx
from refax.transforms import eager

X = jnp.arange(6.0).reshape(2, 3)
SCALE = 2.0
WAYS = ["scan", "while_loop", "fori_loop", "cond", "switch"]


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
  """What was compiled in the test, by computation."""
  found = type(eager._compiled)()
  monkeypatch.setattr(eager, "_compiled", found)
  return found


def run(way: str, f, model, x, flag=True):
  """`f(model, x)` twice, or once in a branch."""
  if way == "scan":
    steps = nnx.scan(
      lambda x, model: f(model, x), in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=2
    )
    return steps(x, model)
  if way == "fori_loop":
    return nnx.fori_loop(0, 2, lambda i, c: (c[0], f(*c)), (model, x))[1]
  if way == "while_loop":
    body = lambda c: (c[0], f(c[0], c[1]), c[2] + 1)
    return nnx.while_loop(lambda c: c[2] < 2, body, (model, x, 0))[1]
  if way == "cond":
    return nnx.cond(flag, f, lambda model, x: x, model, x)
  return nnx.switch(int(flag), [lambda model, x: x, f], model, x)


def linear(width=3, seed=0):
  return nnx.Linear(width, width, rngs=nnx.Rngs(seed))


@pytest.mark.parametrize("way", WAYS)
def test_another_trace_of_the_same_operations_is_not_compiled_again(way, compiled):
  models = [linear(seed=i) for i in range(3)]
  for i, model in enumerate(models):  # another function each time, another model, other numbers
    got = run(way, lambda m, x: nnx.relu(m(x)), model, X + i)
    with jax.disable_jit():
      want = run(way, lambda m, x: nnx.relu(m(x)), model, X + i)
    np.testing.assert_allclose(got, want, rtol=1e-6)
  assert len(compiled) == 1
  (jitted,) = compiled.values()
  assert jitted._cache_size() == 1


@pytest.mark.parametrize("way", WAYS)
def test_what_has_changed_around_the_function_is_seen(way, monkeypatch):
  model, factors = linear(), [3.0]
  f = lambda m, x: m(x) * SCALE + factors[0]
  for scale, factor, dtype in (
    (2.0, 3.0, "float32"),
    (5.0, 3.0, "float32"),
    (5.0, 7.0, "bfloat16"),
  ):
    monkeypatch.setitem(globals(), "SCALE", scale)
    factors[0] = factor
    model.dtype = jnp.dtype(dtype)
    with jax.disable_jit():
      want = run(way, f, model, X.astype(dtype))
    np.testing.assert_allclose(run(way, f, model, X.astype(dtype)), want, rtol=2e-2)


@pytest.mark.parametrize("way", WAYS)
def test_python_runs_in_each_call(way):
  seen = []

  def f(model, x):
    seen.append(type(x))
    return x

  for n in range(1, 4):
    run(way, f, linear(), X)
    assert len(seen) == n * (len(seen) // n)
  assert len(seen) >= 3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
def test_state_is_written_in_each_call(way, hijax):
  with nnx.use_hijax(hijax):
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    twin = nnx.clone(model)
    for i in range(4):
      got = run(way, lambda m, x: m(x), model, X + i)
      with jax.disable_jit():
        want = run(way, lambda m, x: m(x), twin, X + i)
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
      np.testing.assert_allclose(model.mean, twin.mean, rtol=1e-5)


def test_state_by_closure_is_written_in_each_call(compiled):
  models = [nnx.BatchNorm(3, rngs=nnx.Rngs(0)) for _ in range(2)]
  for model in (*models, models[0]):
    before = np.asarray(model.mean)
    nnx.cond(True, lambda x: model(x), lambda x: x, X + 1)  # noqa: B023
    np.testing.assert_allclose(model.mean, 0.99 * before + 0.01 * (X + 1).mean(0), rtol=1e-5)


NUMBERS = [1, 1.0, True, -0.0, 0.0, np.nan, np.float16(1), np.int8(1), 2**20]


def test_numbers_that_python_takes_for_equal_are_others():
  found = [nnx.cond(True, lambda x, n=n: x * 0 + n, lambda x, n=n: x * 0 - n, X) for n in NUMBERS]
  for got, n in zip(found, NUMBERS, strict=True):
    want = X * 0 + n
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


def test_a_zero_below_zero_is_another():
  for n in (0.0, -0.0, 0.0):
    got = nnx.cond(True, lambda x, n=n: jnp.full(2, n), lambda x: x, jnp.ones(2))
    np.testing.assert_array_equal(np.signbit(got), np.signbit(np.full(2, n)))


def sums(c, y):
  return c + y, c


@pytest.mark.parametrize(
  "pairs",
  [
    [lambda x: x.sum(0), lambda x: x.sum(1), lambda x: x.max(0)],
    [lambda x: x - 1, lambda x: 1 - x],
    [lambda x, p=p: jnp.dot(x, x.T, precision=p) for p in ("highest", "default")],
    [lambda x: (x, x + 1), lambda x: (x + 1, x), lambda x: [x, x + 1], lambda x: (x, x)],
    [lambda x, k=k: jax.lax.scan(lambda c, y: (c + y * k, c), x[0], x)[1] for k in (1, 2)],
    [lambda x, r=r: jax.lax.scan(sums, x[0], x, reverse=r)[1] for r in (True, False)],
    [jax.nn.relu, jax.nn.silu, jax.nn.gelu, jax.nn.relu6],
    [jax.jit(jnp.sin), jax.jit(jnp.cos)],
    [lambda x: jnp.sin(x) + jnp.cos(x * 2), lambda x: jnp.sin(x * 2) + jnp.cos(x)],
  ],
  ids=["axes", "order", "precision", "results", "bodies", "reverse", "rules", "jits", "operands"],
)
def test_other_operations_are_compiled_apart(pairs, compiled):
  for _ in range(2):
    for f in pairs:
      got = nnx.fori_loop(0, 1, lambda i, c, f=f: (c[0], f(c[0])), (X, f(X)))[1]
      want = f(X)
      assert jax.tree.structure(got) == jax.tree.structure(want)
      jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, want)
  assert len(compiled) <= len(pairs)


def custom(factor):
  @jax.custom_vjp
  def f(x):
    return x * factor

  f.defvjp(lambda x: (f(x), None), lambda _, g: (g * 100,))
  return f


def custom_jvp(factor):
  f = jax.custom_jvp(lambda x: x * factor)
  f.defjvp(lambda primals, tangents: (f(*primals), tangents[0] * 100))
  return f


@pytest.mark.parametrize("make", [custom, custom_jvp])
def test_functions_with_derivatives_of_their_own(make, compiled):
  for factor in (2.0, 3.0, 2.0):
    got = nnx.cond(True, make(factor), lambda x: x, X)
    np.testing.assert_array_equal(got, X * factor)
  model = linear()
  for _ in range(2):  # inside of a gradient they are what they are
    grad = jax.grad(lambda x: nnx.cond(True, make(2.0), lambda x: x, x).sum())(X)
    np.testing.assert_array_equal(grad, np.full(X.shape, 100))
    run("scan", lambda m, x: make(2.0)(m(x)), model, X)


def test_gradients_through_loops_are_those_of_a_loop_in_python():
  model = linear()
  for _ in range(2):
    got = nnx.grad(lambda m: run("scan", lambda m, x: jnp.tanh(m(x)), m, X).sum())(model)
    want = nnx.grad(lambda m: jnp.tanh(m(jnp.tanh(m(X)))).sum())(model)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, want)
    run("scan", lambda m, x: jnp.tanh(m(x)), model, X)


@pytest.mark.parametrize("way", WAYS)
def test_what_calls_python_calls_it_each_time(way):
  seen = []
  for n in range(1, 4):
    f = lambda m, x: (jax.debug.callback(lambda: seen.append(1)), m(x))[1]
    run(way, f, linear(), X)
    jax.effects_barrier()
    assert len(seen) in (n, 2 * n)
  kind = jax.ShapeDtypeStruct(X.shape, X.dtype)
  for k in (1.0, 2.0):
    add = functools.partial(np.add, np.float32(k))
    f = lambda m, x, add=add: jax.pure_callback(lambda x: add(np.asarray(x)), kind, x)
    times = 1 if way in ("cond", "switch") else 2
    np.testing.assert_array_equal(run(way, f, linear(), X), X + times * k)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_a_call_is_kept_alive(way, compiled):
  model, constant = linear(), jnp.ones(3)
  gone = [weakref.ref(model), weakref.ref(constant), weakref.ref(model.kernel.get_raw_value())]
  rule = custom(3.0)
  gone.append(weakref.ref(rule))
  f = lambda m, x, c=constant, rule=rule: rule(nnx.relu(m(x))) + c
  run(way, f, model, X)
  assert len(compiled) == 1
  del model, constant, rule, f
  gc.collect()
  assert [ref() for ref in gone] == [None] * len(gone)


def test_the_number_of_computations_is_bounded(compiled, monkeypatch):
  monkeypatch.setattr(eager, "_MOST", 3)
  add = lambda n: int(nnx.cond(True, lambda x, n=n: x + n, lambda x: x, 1))
  assert [add(n) for n in range(6)] == list(range(1, 7))
  assert len(compiled) == 3
  kept = next(iter(compiled.values()))
  add(3)  # the oldest of them is used, and another one goes
  add(7)
  assert kept in compiled.values()


@pytest.mark.parametrize("way", WAYS)
def test_an_error_leaves_state_as_it_was(way):
  model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
  run(way, lambda m, x: m(x), model, X)
  mean = np.asarray(model.mean)

  def fails(m, x):
    m(x)
    raise KeyError("no")

  with pytest.raises(KeyError, match="no"):
    run(way, fails, model, X)
  np.testing.assert_array_equal(model.mean, mean)


@pytest.mark.parametrize("way", WAYS)
def test_nan_is_looked_for(way):
  f = lambda m, x: m(x) / 0
  run(way, f, linear(), X)
  with jax.debug_nans(True), pytest.raises(FloatingPointError):
    run(way, lambda m, x: (m(x) - m(x)) / 0, linear(), X)


def test_other_precision_and_dtypes_are_compiled_apart():
  model = linear()
  want = run("scan", lambda m, x: m(x), model, X)
  with jax.default_matmul_precision("bfloat16"):
    run("scan", lambda m, x: m(x), model, X)
  with jax.enable_x64(True):
    got = nnx.fori_loop(0, 2, lambda i, x: x * 0.1, jnp.ones(2, jnp.float64))
    assert got.dtype == jnp.float64
  got = nnx.fori_loop(0, 2, lambda i, x: x * 0.1, jnp.ones(2))
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(run("scan", lambda m, x: m(x), model, X), want)


@pytest.mark.parametrize("upper", [3, np.int32(3), jnp.int32(3)])
def test_the_bounds_of_a_loop_may_be_others(upper):
  count = lambda n: int(nnx.fori_loop(0, n, lambda i, x: x + 1, 0))
  assert [count(upper), count(upper + 2), count(upper - 1)] == [3, 5, 2]


@pytest.mark.parametrize("flag", [True, False, 1, 0, np.bool_(True), jnp.array(False), 2.0])
def test_a_condition_is_what_it_is_in_each_call(flag):
  for now in (flag, not flag, flag):
    got = nnx.cond(now, lambda x: x + 1, lambda x: x - 1, X)
    np.testing.assert_array_equal(got, X + 1 if now else X - 1)


@pytest.mark.parametrize("wrong", ["yes", None, jnp.ones(2), [True, False]])
def test_a_wrong_condition_is_refused_in_the_words_of_jax(wrong):
  with pytest.raises(TypeError) as ours:
    nnx.cond(wrong, lambda x: x, lambda x: x, X)
  with pytest.raises(TypeError) as theirs:
    jax.lax.cond(wrong, lambda x: x, lambda x: x, X)
  assert str(ours.value) == str(theirs.value)


def test_a_compiled_function_inside_is_not_compiled_again(compiled):
  inner = nnx.jit(lambda m, x: m(x))
  for i in range(3):
    model = linear(seed=i)
    got = run("scan", lambda m, x: inner(m, x), model, X)
    np.testing.assert_allclose(got, model(model(X)), rtol=1e-6)
  assert len(compiled) == 1


def test_a_stack_and_a_recurrent_layer_are_compiled_once(compiled):
  stack = nnx.Stack.of([linear(seed=i) for i in range(3)])
  layer = nnx.RNN(nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0)))
  for i in range(3):
    stack(X + i)
    layer(X[None] + i)
  assert len(compiled) == 2


def test_keys_move_on():
  rngs = nnx.Rngs(0)
  draw = nnx.scan(lambda c, rngs: (c, rngs.normal(())), in_axes=(nnx.Carry, None), length=3)
  draws = [draw(jnp.zeros(()), rngs)[1] for _ in range(3)]
  assert len(set(np.concatenate(draws).tolist())) == 9


@pytest.mark.parametrize("make", [custom, custom_jvp])
def test_rules_that_jax_keeps_in_another_way_are_not_looked_into(make, monkeypatch, compiled):
  monkeypatch.setattr(_jax, "without_rules", lambda closed: closed)
  for factor in (2.0, 3.0):
    got = nnx.cond(True, make(factor), lambda x: x, X)
    np.testing.assert_array_equal(got, X * factor)
  assert not compiled


def test_what_was_interrupted_is_not_kept(monkeypatch):
  calls = []

  def jit(f, **options):
    def run(*args):
      calls.append(None)
      raise KeyboardInterrupt

    return run

  f = lambda: nnx.fori_loop(0, 3, lambda _, x: x * 1.25 + 7, X)
  with monkeypatch.context() as patch:
    patch.setattr(eager.jax, "jit", jit)
    with pytest.raises(KeyboardInterrupt):
      f()
  assert calls
  np.testing.assert_allclose(f(), jax.lax.fori_loop(0, 3, lambda _, x: x * 1.25 + 7, X))
