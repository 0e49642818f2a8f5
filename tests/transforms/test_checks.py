"""nnx.checkify: checks in functions that read and write state."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import checkify

from refax import nnx

STORAGE = pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
JIT = pytest.mark.parametrize("jit", [lambda f: f, nnx.jit], ids=["eager", "jit"])


def root(v, x):
  v[...] += x
  checkify.check(v[...] >= 0, "negative: {x}", x=v[...])
  return jnp.sqrt(v[...])


@JIT
@STORAGE
def test_the_error_is_a_value_and_state_is_written(hijax, jit):
  v = nnx.Variable(3.0, is_hijax=hijax)
  f = jit(nnx.checkify(root))
  error, y = f(v, 1.0)
  error.throw()
  assert float(y) == 2.0 and float(v) == 4.0
  error, _ = f(v, -5.0)
  with pytest.raises(checkify.JaxRuntimeError, match=r"negative: -1\.0"):
    error.throw()
  assert float(v) == -1.0


@JIT
def test_state_by_closure_and_keywords(jit):
  v = nnx.Variable(0.0)
  error, y = jit(nnx.checkify(lambda *, x: root(v, x)))(x=4.0)
  assert error.get() is None and float(y) == 2.0 and float(v) == 4.0


def test_sets_of_errors():
  v = nnx.Variable(jnp.zeros(3))
  get = lambda v, i: v[i]
  assert nnx.checkify(get)(v, 5)[0].get() is None
  assert "out-of-bounds" in nnx.checkify(get, errors=checkify.index_checks)(v, 5)[0].get()
  log = nnx.checkify(lambda v: jnp.log(v[...] - 1), errors=checkify.float_checks)
  assert "nan generated" in log(v)[0].get()


def test_checks_in_a_loop_and_a_branch():
  v = nnx.Variable(2.0)

  def f(v):
    def step(i, v):
      v[...] -= 1
      checkify.check(v[...] > -2, "too low at {i}", i=i)
      return v

    nnx.fori_loop(0, 5, step, v)
    return nnx.cond(v > 0, lambda v: v + 0, lambda v: v + 1, v)

  error, y = nnx.checkify(f)(v)
  assert error.get().startswith("too low at 3")
  assert float(v) == -3.0 and float(y) == -2.0


def test_an_error_undoes_a_transaction():
  v = nnx.Variable(1.0)
  with pytest.raises(checkify.JaxRuntimeError), nnx.transaction(v):
    error, _ = nnx.checkify(root)(v, -9.0)
    error.throw()
  assert float(v) == 1.0


def test_what_is_created_is_returned():
  error, m = nnx.checkify(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))()
  assert error.get() is None and type(m) is nnx.Linear and m.kernel.is_hijax
  assert jax.tree.leaves(m(jnp.ones(2)))[0].shape == (3,)
