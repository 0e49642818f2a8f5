"""stage: derivatives and batching rules of the user's own survive, whatever holds them."""

import inspect
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_batching import custom_vmap
from jax.experimental import hijax

from refax import nnx

HiPrim: Any = getattr(hijax, "HiPrim", None) or getattr(hijax, "VJPHiPrimitive")  # noqa: B009
OLD_HIJAX = not hasattr(hijax, "HiPrim")
GENERIC = "generic_batching" in inspect.signature(jax.custom_vjp.defvjp).parameters


class TripleGradient(HiPrim):
  """The identity, whose gradient is 3."""

  def __init__(self, aval):
    self.in_avals, self.out_aval, self.params = (aval,), aval, {}
    super().__init__()

  def expand(self, x):
    return x * 1.0

  def vjp_fwd(self, nonzero, x):
    return self(x), None

  def vjp_bwd_retval(self, residuals, g):
    return (3.0 * g,)

  def jvp(self, primals, tangents):
    return self(*primals), 3.0 * tangents[0]

  def batch(self, axis_data, args, dims):
    return TripleGradient(jax.typeof(args[0]))(args[0]), dims[0]


def by_custom_jvp():
  f = jax.custom_jvp(lambda x: x * 1.0)
  f.defjvp(lambda primals, tangents: (f(*primals), 3.0 * tangents[0]))
  return f


def by_custom_vjp(**options):
  f = jax.custom_vjp(lambda x: x * 1.0)
  f.defvjp(lambda x: (f(x), None), lambda residuals, g: (3.0 * g,), **options)
  return f


RULES = {
  "custom_jvp": by_custom_jvp,
  "custom_vjp": by_custom_vjp,
  "generic_batching": lambda: by_custom_vjp(generic_batching=True),
  "HiPrim": lambda: lambda x: TripleGradient(jax.typeof(x))(x),
}
if not GENERIC:
  del RULES["generic_batching"]

REFAX = {
  "nnx.cond": lambda f: lambda x: nnx.cond(jnp.bool_(True), f, f, x),
  "nnx.switch": lambda f: lambda x: nnx.switch(jnp.int32(1), [f, f], x),
  "nnx.scan": lambda f: nnx.scan(f, length=1, in_axes=nnx.Carry, out_axes=nnx.Carry),
  "nnx.fori_loop": lambda f: lambda x: nnx.fori_loop(0, 1, lambda i, x: f(x), x),
  "nnx.remat": nnx.remat,
  "nnx.vmap": lambda f: lambda x: nnx.vmap(f, axis_size=1)(x[None])[0],
  "nnx.checkify": lambda f: lambda x: nnx.checkify(f)(x)[1],
  "nnx.jit": nnx.jit,
}
PLAIN = {
  "jax.lax.cond": lambda f: lambda x: jax.lax.cond(jnp.bool_(True), f, f, x),
  "jax.lax.scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, 1)[0],
  "jax.checkpoint": jax.checkpoint,
  "jax.jit": jax.jit,
}
ALL = REFAX | PLAIN


def gradient(rule, transforms):
  """The gradient through a rule inside transforms, the innermost first; how often state moved."""
  count = nnx.Variable(0)

  def f(x):
    count[...] += 1
    return RULES[rule]()(x)

  for name in transforms:
    f = ALL[name](f)
  return float(jax.grad(lambda x: f(jnp.asarray(x)))(1.0)), int(count)


def is_jax_refusal(error, rule, transforms):
  """Whether it is JAX itself that refuses the program, aloud."""
  if OLD_HIJAX and rule == "HiPrim" and "'closed_call' has is_high=True" in str(error):
    return True  # inside a scan with state, up to 0.10
  branch = "State effect not supported in cond partial-eval" in str(error)
  return branch and ("jax.lax.cond", "jax.lax.scan") in itertools.pairwise(transforms)


@pytest.mark.parametrize("outer", REFAX)
@pytest.mark.parametrize("inner", ["jax.jit", "jax.lax.cond", "jax.checkpoint"])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_beside_state_survives(rule, inner, outer):
  assert gradient(rule, (inner, outer)) == (3.0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("middle", ["nnx.cond", "nnx.vmap", "jax.lax.scan"])
def test_a_rule_beside_state_survives_three_deep(rule, middle):
  for inner, outer in itertools.product(PLAIN, REFAX):
    transforms = (inner, middle, outer)
    try:
      assert gradient(rule, transforms) == (3.0, 1), transforms
    except NotImplementedError as error:
      assert is_jax_refusal(error, rule, transforms), transforms


def test_relu_in_a_branch_that_writes_state():
  class Gated(nnx.Module):
    def __init__(self):
      self.linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      self.calls = nnx.Variable(0)

    def __call__(self, x):
      @jax.jit
      def positive(x):
        self.calls[...] += 1
        return jax.nn.relu(self.linear(x))

      return nnx.cond(x.sum() > 0, positive, lambda x: x, x)

  model, x = Gated(), jnp.array([[1.0, -2.0], [3.0, 4.0]])
  grads: Any = nnx.grad(lambda m: m(x).sum())(model)
  linear: Any = model.linear
  kernel, bias = linear.kernel[...], linear.bias[...]
  want = jax.grad(lambda k: jax.nn.relu(x @ k + bias).sum())(kernel)
  np.testing.assert_allclose(grads["linear"]["kernel"][...], want, rtol=1e-6)
  # At 0 the derivative of relu is 0 by its rule; by what it computes, `max`, it is a half.
  at_zero = jax.grad(lambda x: nnx.remat(jax.jit(lambda x: (count_up(), jax.nn.relu(x))[1]))(x))
  count = nnx.Variable(0)
  count_up = lambda: count.set_value(count + 1)
  assert float(at_zero(0.0)) == 0.0 and int(count) == 1 and int(model.calls) == 1


@pytest.mark.parametrize("outer", ["nnx.cond", "nnx.scan", "nnx.remat"])
def test_a_batching_rule_survives(outer):
  @custom_vmap
  def f(x):
    return x * 1.0

  f.def_vmap(lambda size, batched, x: (x * 5.0, batched[0]))
  count = nnx.Variable(0)

  @jax.jit
  def g(x):
    count[...] += 1
    return f(x)

  y = nnx.vmap(ALL[outer](g))(jnp.ones(2))
  assert y.tolist() == [5.0, 5.0] and int(count) == 1


@pytest.mark.parametrize("outer", ["nnx.cond", "nnx.scan", "nnx.remat", "nnx.fori_loop"])
def test_a_rule_around_state_is_kept_or_refused(outer):
  count = nnx.Variable(0)

  @jax.custom_vjp
  def f(x):
    count[...] += 1
    return x * 1.0

  f.defvjp(lambda x: (f(x), None), lambda residuals, g: (3.0 * g,))
  try:
    dx = float(jax.grad(ALL[outer](f))(1.0))
  except Exception as error:  # JAX's own refusals are of several types
    assert str(error) and int(count) == 0
  else:
    assert dx == 3.0


@pytest.mark.skipif(OLD_HIJAX, reason="jax.checkpoint has its new form from 0.11 on")
def test_the_new_remat_with_state_keeps_its_policy():
  kept = []

  def policy(prim, *_, **__):
    kept.append(prim.name)
    return False

  count = nnx.Variable(1.0)

  def f(x):
    count[...] += 1
    return jnp.sin(x) * count

  with flags(jax_remat3=True):
    g = nnx.vmap(jax.checkpoint(f, policy=policy))
    dx = jax.grad(lambda x: g(x[None])[0])(0.5 * jnp.ones(()))
  np.testing.assert_allclose(dx, np.cos(0.5) * 2, rtol=1e-6)
  assert kept and float(count) == 2.0


class flags:
  """JAX's flags for a while."""

  def __init__(self, **values):
    self.values = values

  def __enter__(self):
    self.old = {name: getattr(jax.config, name) for name in self.values}
    self.set(self.values)

  def __exit__(self, *_):
    self.set(self.old)

  def set(self, values):
    for name, value in values.items():
      jax.config.update(name, value)


class Printing(TripleGradient):
  """One that calls back."""

  def expand(self, x):
    return jax.pure_callback(fails_below_zero, jax.typeof(x), x)


def fails_below_zero(x):
  if x < 0:
    raise ValueError("below zero")
  return x


def test_state_survives_a_callback_that_fails_inside_a_new_primitive():
  v = nnx.Variable(jnp.ones(3))

  @nnx.jit
  def f(v, x):
    v[...] += 1
    return Printing(jax.typeof(x))(x)

  f(v, jnp.float32(1.0))
  with pytest.raises(Exception, match="below zero"):
    jax.block_until_ready(f(v, jnp.float32(-1.0)))
  assert v[...].tolist() == [2.0, 2.0, 2.0]
