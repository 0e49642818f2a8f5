"""After an error inside any transform everything is as before; what is compiled when; the messages."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import (
  AliasError,
  DifferentiatedWriteError,
  FilterError,
  MissingRngError,
  ShapeMismatchError,
  SharedWriteError,
  TraceContextError,
  TreeMismatchError,
)

X = jnp.array([1.0, 2.0])


class Model(nnx.Module):
  """A Variable of each sort, an array, a list, and a static attribute."""

  def __init__(self):
    self.w = nnx.Param(jnp.array([3.0, 4.0]))
    self.stat = nnx.BatchStat(jnp.zeros(2))
    self.memory = nnx.Variable(jnp.array(0.5))
    self.count = nnx.Variable(0)
    self.local = nnx.Variable(jnp.array(0.25), is_hijax=False)
    self.array = jnp.array([7.0, 8.0])
    self.layers = [nnx.Dropout(0.5, rngs=nnx.Rngs(0))]
    self.mode = "train"


def snapshot(model):
  """Everything in a model: Variables bit by bit, attributes by identity or value."""
  found = {}
  for path, value in nnx.iter_graph(model):
    if isinstance(value, nnx.Variable):
      x = value[...]
      x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
      found[path] = (type(value), np.asarray(x).tobytes(), value.get_metadata())
    elif isinstance(value, nnx.Pytree):
      found[path] = (type(value), id(value), sorted(vars(value)))
    else:
      found[path] = value if isinstance(value, str | int | float | bool | None) else id(value)
  return found


def tracers(model):
  """The paths at which a tracer is left."""
  is_tracer = lambda x: isinstance(x, jax.core.Tracer)
  return [
    path
    for path, value in nnx.iter_graph(model)
    if any(
      map(
        is_tracer,
        jax.tree.leaves(
          value.get_raw_value() if isinstance(value, nnx.Variable) else [value]
          if not isinstance(value, nnx.Pytree)
          else list(vars(value).values()),
          is_leaf=lambda x: isinstance(x, nnx.Variable | nnx.Pytree),
        ),
      )
    )
  ]


# what each transform does with a function of a model that returns a scalar
def _nnx_while(f, m):
  def body(carry):
    i, _, m = carry
    return i + 1, f(m), m

  return nnx.while_loop(lambda carry: carry[0] < 1, body, (0, jnp.array(0.0), m))


def _vjp(f, m):
  return nnx.vjp(f, m)[1](1.0)


def _jvp(f, m):
  return nnx.jvp(f, (m,), (nnx.state(m, nnx.Param),))


NNX = {
  "nnx.jit": lambda f, m: nnx.jit(f)(m),
  "nnx.jit, closure": lambda f, m: nnx.jit(lambda: f(m))(),
  "nnx.vmap": lambda f, m: nnx.vmap(lambda m, x: f(m) + x, in_axes=(None, 0))(m, X),
  "nnx.vmap, closure": lambda f, m: nnx.vmap(lambda x: f(m) + x)(X),
  "nnx.scan": lambda f, m: nnx.scan(
    lambda c, m: c + f(m), in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=1
  )(0.0, m),
  "nnx.scan, closure": lambda f, m: nnx.scan(lambda c, x: (c + f(m), x))(0.0, X[:1]),
  "nnx.scan, carry": lambda f, m: nnx.scan(
    lambda m: (m, f(m)), in_axes=(nnx.Carry,), out_axes=(nnx.Carry, 0), length=1
  )(m),
  "nnx.while_loop": _nnx_while,
  "nnx.fori_loop": lambda f, m: nnx.fori_loop(0, 1, lambda i, c: (c[0] + f(c[1]), c[1]), (0.0, m)),
  "nnx.cond": lambda f, m: nnx.cond(True, f, f, m),
  "nnx.cond, closure": lambda f, m: nnx.cond(True, lambda: f(m), lambda: jnp.array(0.0)),
  "nnx.switch": lambda f, m: nnx.switch(1, [lambda m: jnp.array(0.0), f], m),
  "nnx.remat": lambda f, m: nnx.remat(f)(m),
  "nnx.remat, closure": lambda f, m: nnx.remat(lambda: f(m))(),
  "nnx.eval_shape": lambda f, m: nnx.eval_shape(f, m),
  "nnx.make_jaxpr": lambda f, m: nnx.make_jaxpr(f)(m),
  "nnx.effects": lambda f, m: nnx.effects(f)(m),
  "nnx.no_update": lambda f, m: nnx.no_update(f)(m),
  "nnx.checkify": lambda f, m: nnx.checkify(f)(m),
  "nnx.jit of nnx.grad": lambda f, m: nnx.jit(nnx.grad(f))(m),
  "nnx.jit of nnx.vjp": lambda f, m: nnx.jit(lambda m: _vjp(f, m))(m),
  "nnx.jit of nnx.jvp": lambda f, m: nnx.jit(lambda m: _jvp(f, m))(m),
  "nnx.jit of nnx.split_rngs": lambda f, m: nnx.jit(nnx.split_rngs(splits=2)(f))(m),
  "nnx.jit of nnx.fork_rngs": lambda f, m: nnx.jit(nnx.fork_rngs()(f))(m),
  "nnx.grad of nnx.remat of nnx.cond": lambda f, m: nnx.grad(
    nnx.remat(lambda m: nnx.cond(m.count < 9, f, f, m))
  )(m),
  "nnx.vmap of nnx.grad": lambda f, m: nnx.vmap(
    lambda m, x: nnx.grad(lambda m: f(m) * x)(m), in_axes=(None, 0)
  )(m, X),
  "nnx.accumulate_grads": lambda f, m: nnx.jit(
    nnx.accumulate_grads(lambda m, x: f(m) * x.mean(), steps=1)
  )(m, X),
  "nnx.transaction": lambda f, m: _in_transaction(f, m),
}


def _in_transaction(f, m):
  with nnx.transaction(m):
    return f(m)


PLAIN = {
  "jax.jit": lambda f, m: jax.jit(f)(m),
  "jax.jit, closure": lambda f, m: jax.jit(lambda: f(m))(),
  "jax.jit of jax.grad": lambda f, m: jax.jit(lambda m, x: jax.grad(lambda x: f(m) * x)(x))(m, 1.0),
  "jax.jit of jax.vmap": lambda f, m: jax.jit(lambda m: jax.vmap(lambda x: f(m) * x)(X))(m),
  "jax.lax.scan": lambda f, m: jax.lax.scan(lambda c, _: (c + f(m), None), 0.0, length=1),
  "jax.checkpoint": lambda f, m: jax.checkpoint(f)(m),
  "jax.lax.cond": lambda f, m: jax.lax.cond(m.count[...] < 9, lambda: f(m), lambda: 0.0),
  "jax.eval_shape": lambda f, m: jax.eval_shape(f, m),
}


# functions that write, then fail
def write(m):
  """What every function does first; lojax Variables only where the transform hands them out."""
  m.count[...] += 1
  m.stat[...] += 1.0
  m.memory[...] *= 2


def python_exception(m):
  write(m)
  raise RuntimeError("boom")


def shape_error(m):
  write(m)
  return (m.w[...] + jnp.ones(3)).sum()


def misfit(m):
  write(m)
  m.memory[...] = jnp.ones(3)
  return m.w.sum()


def not_exhaustive(m):
  write(m)
  nnx.split(m, nnx.Param)
  return m.w.sum()


def differentiated_write(m):
  write(m)

  def inner(x):
    m.memory[...] = x * 2
    return x

  return jax.grad(inner)(1.0)


ERRORS = {
  "python exception": (python_exception, RuntimeError),
  "shape error": (shape_error, TypeError),
  "misfit": (misfit, ShapeMismatchError),
  "filter": (not_exhaustive, FilterError),
  "differentiated write": (differentiated_write, DifferentiatedWriteError),
}


def right(m):
  write(m)
  return m.w.sum() + m.memory


def check_unharmed(run, error):
  function, exception = ERRORS[error]
  model, twin = Model(), Model()
  before = snapshot(model)
  with pytest.raises(exception):
    run(function, model)
  assert snapshot(model) == before
  assert tracers(model) == []
  got, want = run(right, model), run(right, twin)  # the next call works, as if nothing had been
  assert snapshot_values(model) == snapshot_values(twin)
  if not isinstance(got, nnx.Effects) and "jaxpr" not in type(got).__name__.lower():
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      assert isinstance(a, jax.ShapeDtypeStruct) or _bits(a) == _bits(b)
  assert tracers(model) == []


def _bits(x):
  if isinstance(x, jax.Ref):
    x = x[...]
  x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return np.asarray(x).tobytes()


def snapshot_values(model):
  return {path: x[1] for path, x in snapshot(model).items() if isinstance(x, tuple) and x[2] == {}}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", NNX)
def test_an_error_inside_an_nnx_transform_leaves_everything_as_it_was(name, error):
  check_unharmed(NNX[name], error)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", PLAIN)
def test_an_error_inside_a_plain_transform_leaves_everything_as_it_was(name, error):
  check_unharmed(PLAIN[name], error)
