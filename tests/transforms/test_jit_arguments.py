"""Every kind of argument through nnx.jit, on the first call and on later ones, beside jax.jit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from refax import _jax, nnx
from refax.errors import ArgumentError
from refax.transforms.lift import Inputs

NUMPY = ["bool", "int8", "uint8", "int32", "uint32", "int64", "float16", "float32", "float64"]
SMALL = [jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int4, jnp.uint4]

ARGUMENTS = {
  "typed key": lambda: jax.random.key(0),
  "typed keys": lambda: jax.random.split(jax.random.key(0), 3),
  "rbg key": lambda: jax.random.key(0, impl="rbg"),
  "raw key": lambda: jax.random.PRNGKey(0),
  "key in a dict": lambda: {"rng": jax.random.key(0), "x": jnp.ones(2)},
  "None": lambda: None,
  "empty dict": lambda: {},
  "empty tuple": lambda: (),
  "empty list": lambda: [],
  "nested None": lambda: {"mask": None, "x": jnp.ones(2)},
  "zero size": lambda: jnp.zeros((0, 3)),
  "0-d": lambda: jnp.float32(2.0),
  "weak": lambda: jnp.asarray(2.0) * 1,
  "int": lambda: 3,
  "float": lambda: 3.0,
  "bool": lambda: True,
  "complex": lambda: 1j,
  "NumPy array": lambda: np.ones((2, 3), np.float32),
  "bfloat16 of NumPy": lambda: np.ones(2, ml_dtypes.bfloat16),
  "state": lambda: nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Param),
  "Rngs": lambda: nnx.Rngs(0),
  "Rngs in a dict": lambda: {"rngs": nnx.Rngs(0)},
  "list of Modules": lambda: [nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i in range(2)],
  "lojax Module": lambda: nnx.to_lojax(nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
  "lojax Rngs in a dict": lambda: {"rngs": nnx.to_lojax(nnx.Rngs(0))},
  **{f"np.{name}": lambda name=name: np.dtype(name).type(1) for name in NUMPY},
  **{jnp.dtype(d).name: lambda d=d: jnp.ones((2,), d) for d in SMALL},
}


def data(x):
  if x is not None and jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
    return jax.random.key_data(x)
  return np.asarray(x).astype(np.complex64)


@pytest.mark.parametrize("where", ["first", "last", "keyword", "alone"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_kind_of_argument_works_in_every_place(name, where):
  count = nnx.Variable(0)

  @nnx.jit
  def step(*args, **kwargs):
    for v in args:
      if isinstance(v, nnx.Variable):
        v += 1
    leaves = jax.tree.leaves(nnx.to_lojax((args, kwargs)))
    return [x[None] if hasattr(x, "ndim") else x for x in leaves]

  for _ in range(4):
    x = ARGUMENTS[name]()
    if where == "keyword":
      out = step(count, x=x)
    else:
      out = step(*{"first": (x, count), "last": (count, x), "alone": (x,)}[where])
    want = jax.tree.leaves(nnx.to_lojax(x))
    got = out[:-1] if where == "first" else out if where == "alone" else out[1:]
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
      b = jnp.asarray(b)
      assert a.dtype == b.dtype
      np.testing.assert_array_equal(data(a).reshape(-1), data(b).reshape(-1))
  assert int(count) == (0 if where == "alone" else 4)


class Config:
  """Something that is no array."""


@pytest.mark.parametrize(
  ("x", "at", "got"),
  [
    ("adam", r"at:  mode\n", r"str \('adam'\)"),
    ({"cfg": Config()}, r"at:  mode.cfg\n", "Config"),
    ([np.array(["a"])], r"at:  mode\[0\]", "ndarray"),
    (np.array([object()]), r"at:  mode\n", "ndarray"),
    (jax.ShapeDtypeStruct((2,), jnp.float32), r"at:  mode\n", "ShapeDtypeStruct"),
    (len, r"at:  mode\n", "builtin_function"),
  ],
)
def test_what_is_no_array_is_refused_by_the_name_of_its_argument(x, at, got):
  v = nnx.Variable(0)

  @nnx.jit
  def step(v, mode):
    v += 1

  for call in (lambda: step(v, x), lambda: step(v, mode=x)):
    with pytest.raises(ArgumentError, match=rf"{at}(.|\n)*got: {got}(.|\n)*fix: pass "):
      call()
  assert int(v) == 0


def test_a_string_is_fine_where_it_is_declared_static():
  v = nnx.Variable(0)

  @nnx.jit(static_argnames="mode")
  def step(v, mode):
    v += 1 if mode == "up" else -1

  for mode in ("up", "up", "down"):
    step(v, mode=mode)
  assert int(v) == 1


def test_a_donated_array_of_the_shape_of_a_written_variable():
  v = nnx.Variable(jnp.zeros(1000))

  @nnx.jit(donate_argnums=1)
  def step(v, x):
    v += x
    return x * 2

  for _ in range(3):
    x = jnp.ones(1000)
    assert float(step(v, x)[0]) == 2.0
    assert x.is_deleted() or not _jax.no_trace_active()
  np.testing.assert_array_equal(v, np.full(1000, 3.0))


def test_an_error_of_jax_names_the_arguments_of_the_user():
  model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  compiled = nnx.jit(lambda m, x: m(x))
  compiled(model, jnp.ones((1, 2)))
  fast = next(iter(compiled._fast._compiled.values()), None)
  if fast is None:
    pytest.skip("calls go through Refs without the private API")
  text = "Got argument read[1] of f with shape 3 and argument arrays[0] of f; x['read[1]']"
  want = "Got argument m.kernel of f with shape 3 and argument x of f; x['read[1]']"
  assert str(fast.renamed(ValueError(text))) == want
  other = ValueError("something else")
  assert fast.renamed(other) is other


def test_a_compiled_call_is_made_with_the_arguments_of_the_function():
  model, x = nnx.BatchNorm(2, rngs=nnx.Rngs(0)), jnp.ones((3, 2))
  twin = nnx.clone(model)

  def f(m, x):
    return m(x) * 2

  compiled = nnx.jit(f).lower(model, x).compile()
  for _ in range(2):
    np.testing.assert_allclose(compiled(model, x), f(twin, x), rtol=1e-6)
    np.testing.assert_allclose(model.mean, twin.mean, rtol=1e-6)
  other = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
  compiled(other, x)  # another object of the same structure
  assert "dot" in compiled.as_text() or compiled.as_text()
  assert compiled.cost_analysis() is not None
  mean = np.asarray(model.mean)
  for args in ((model, x[:2]), (model, x, x), (x, model)):
    with pytest.raises(ArgumentError, match="compiled for other arguments"):
      compiled(*args)
  np.testing.assert_array_equal(model.mean, mean)


def by_closure(m):
  return (lambda x: m(x)), lambda f, m, x: f(x)


def by_keyword(m):
  return (lambda m, *, x: m(x)), lambda f, m, x: f(m, x=x)


def returning(m):
  return (lambda m, x: (m(x), m)), lambda f, m, x: f(m, x)[0]


def plain(m):
  return (lambda m, x: m(x)), lambda f, m, x: f(m, x)


@pytest.mark.parametrize("way", [plain, by_keyword, by_closure, returning])
@pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
def test_many_calls_of_what_was_compiled_ahead_are_known(way, hijax):
  with nnx.use_hijax(hijax):
    model, x = nnx.BatchNorm(2, rngs=nnx.Rngs(0)), jnp.arange(6.0).reshape(3, 2)
    if way is by_closure and not hijax:
      model.eval()
    twin = nnx.clone(model)
    f, call = way(model)
    lower = lambda *args, **kwargs: nnx.jit(f).lower(*args, **kwargs).compile()
    compiled = call(lambda *args, **kwargs: (lower(*args, **kwargs),), model, x)
    compiled = compiled[0] if isinstance(compiled, tuple) else compiled
    for i in range(4):
      np.testing.assert_allclose(call(compiled, model, x + i), twin(x + i), rtol=1e-5)
      np.testing.assert_allclose(model.mean, twin.mean, rtol=1e-5)
    mean = np.asarray(model.mean)
    with pytest.raises(ArgumentError, match="compiled for other arguments"):
      call(compiled, model, x[:2])
    model.eval() if model.use_running_average is not True else model.train()
    with pytest.raises(ArgumentError, match="compiled for other arguments"):
      call(compiled, model, x)
    np.testing.assert_array_equal(model.mean, mean)


@pytest.mark.parametrize("static", [(0, 2), (0, 4), (2, 4)])
def test_what_was_compiled_ahead_with_static_arguments_is_known(static, monkeypatch):
  def step(scale, model, flag, batch, shift):
    return model(batch["x"]) * scale + jnp.where(flag, shift, 0)

  model, x = nnx.BatchNorm(2, rngs=nnx.Rngs(0)), jnp.arange(6.0).reshape(3, 2)
  twin = nnx.clone(model)
  given = lambda i: (2.0, model, True, {"x": x + i}, 3.0)
  dynamic = lambda i: [a for n, a in enumerate(given(i)) if n not in static]
  compiled = nnx.jit(step, static_argnums=static).lower(*given(0)).compile()
  want = lambda i: twin(x + i) * 2 + 3
  np.testing.assert_allclose(compiled(*dynamic(0)), want(0), rtol=1e-5)
  monkeypatch.setattr(Inputs, "of", None)  # nothing is walked through again
  for i in range(1, 4):
    np.testing.assert_allclose(compiled(*dynamic(i)), want(i), rtol=1e-5)
  monkeypatch.undo()
  np.testing.assert_allclose(model.mean, twin.mean, rtol=1e-5)
  with pytest.raises(ArgumentError, match="compiled for other arguments"):
    compiled(*dynamic(0)[:-1])


def test_a_number_that_is_too_large_is_named():
  model, f = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.jit(lambda m, batch: m(batch["x"]))
  with pytest.raises(OverflowError, match=r"argument path is batch\.x"):
    f(model, {"x": 10**30})
