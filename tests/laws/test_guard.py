"""A gradient is right or refused aloud: what is written to a Variable loses none in silence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import DifferentiatedWriteError

X = jnp.array([0.5, -1.0, 2.0])


def derivative(f):
  return jax.grad(lambda x: f(x).sum())(X)


def forward(f):
  return jax.jvp(f, (X,), (jnp.ones_like(X),))[1]


DERIVATIVES = {
  "grad": derivative,
  "jit of grad": jax.jit(lambda f: derivative(f), static_argnums=0),
  "grad of jit": lambda f: derivative(jax.jit(f)),
  "grad of checkpoint": lambda f: derivative(jax.checkpoint(f)),
  "grad of nnx.remat": lambda f: derivative(nnx.remat(f)),
  "jvp": forward,
  "jvp of jit": lambda f: forward(jax.jit(f)),
  "jvp of checkpoint": lambda f: forward(jax.checkpoint(f)),
  "grad of scan": lambda f: derivative(
    lambda x: jax.lax.scan(lambda c, _: (c, f(c)), x, None, length=1)[1][0]
  ),
  "grad of nnx.scan": lambda f: derivative(
    lambda x: nnx.scan(lambda c: (c, f(c)), in_axes=(nnx.Carry,), length=1)(x)[1][0]
  ),
  "grad of nnx.cond": lambda f: derivative(lambda x: nnx.cond(x[0] > 0, f, lambda x: x, x)),
  "nnx.grad": lambda f: nnx.grad(lambda x: f(x).sum())(X),
}
derivatives = pytest.mark.parametrize("derive", DERIVATIVES.values(), ids=DERIVATIVES)
CARRIED = ("grad", "jit of grad", "jvp", "nnx.grad")
"""Where a Variable that is made inside is known to be differentiated: it carries its gradient."""

inside = pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])


def program(kind, write, inside):
  """y = x * v after `write(v, x)`, with a Variable from outside the function or made inside."""
  outer = kind(jnp.ones(3))

  def f(x):
    v = kind(jnp.ones(3)) if inside else outer
    write(v, x)
    return x * v[...]

  return f


@derivatives
@inside
@pytest.mark.parametrize("kind", [nnx.Variable, nnx.Param, nnx.Cache, nnx.BatchStat])
def test_a_write_that_does_not_depend_on_what_is_differentiated_passes(derive, inside, kind):
  def write(v, x):
    v[...] = v * 2 + 1.0
    v[0] = v[1] * 2

  np.testing.assert_allclose(derive(program(kind, write, inside)), [6.0, 3.0, 3.0], rtol=1e-6)


@derivatives
@inside
@pytest.mark.parametrize("kind", [nnx.Variable, nnx.Param, nnx.Cache])
def test_a_write_whose_gradient_would_be_lost_is_refused_or_kept(derive, inside, kind):
  def write(v, x):
    v[...] = v * x

  if inside and derive in map(DERIVATIVES.get, CARRIED):
    np.testing.assert_allclose(derive(program(kind, write, inside)), 2 * X, rtol=1e-6)
    return
  with pytest.raises(DifferentiatedWriteError, match="its gradient would be lost"):
    derive(program(kind, write, inside))


@derivatives
@inside
def test_a_detached_type_takes_the_value_and_drops_the_gradient(derive, inside):
  def write(v, x):
    v[...] = v * x

  np.testing.assert_allclose(derive(program(nnx.BatchStat, write, inside)), X, rtol=1e-6)


@derivatives
@inside
def test_stop_gradient_is_the_way_out(derive, inside):
  def write(v, x):
    v[...] = jax.lax.stop_gradient(v * x)

  np.testing.assert_allclose(derive(program(nnx.Variable, write, inside)), X, rtol=1e-6)


def test_through_lets_the_gradient_flow_and_writes_the_state_back():
  memory = nnx.Variable(jnp.ones(3))

  def loss(w, memory):
    memory[...] = memory * w
    memory[...] = memory * w
    return memory[...].sum()

  grads = nnx.grad(loss, through=nnx.Variable)(nnx.Param(X), memory)
  np.testing.assert_allclose(grads, 2 * X, rtol=1e-6)
  np.testing.assert_allclose(memory, X**2, rtol=1e-6)
