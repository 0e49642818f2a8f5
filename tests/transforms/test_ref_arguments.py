"""Functions of JAX that would differentiate, or move, a jax.Ref: refused by name, never zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from refax import nnx
from refax.errors import AliasError, RefArgumentError

X = jnp.ones((4, 2))
NEWEST = not hasattr(jax, "pmap") or jax.__version_info__ >= (0, 11)


def model():
  return nnx.Linear(2, 3, rngs=nnx.Rngs(0))


def loss(m):
  return (m(X) ** 2).mean()


TRANSFORMS = {
  "grad": lambda f, m: jax.grad(f)(m),
  "value_and_grad": lambda f, m: jax.value_and_grad(f)(m),
  "grad in jit": lambda f, m: jax.jit(jax.grad(f))(m),
  "grad of jit": lambda f, m: jax.grad(jax.jit(f))(m),
  "grad of checkpoint": lambda f, m: jax.grad(jax.checkpoint(f))(m),
  "grad in nnx.jit": lambda f, m: nnx.jit(jax.grad(f))(m),
  "second argument": lambda f, m: jax.grad(lambda s, m: s * f(m), argnums=1)(1.0, m),
  "both arguments": lambda f, m: jax.grad(lambda s, m: s * f(m), argnums=(0, 1))(1.0, m),
  "jvp": lambda f, m: jax.jvp(f, (m,), (nnx.clone(m),)),
  "vjp": lambda f, m: jax.vjp(f, m)[1](1.0),
  "linearize": lambda f, m: jax.linearize(f, m)[1](nnx.clone(m)),
  "jacrev": lambda f, m: jax.jacrev(f)(m),
  "jacfwd": lambda f, m: jax.jacfwd(f)(m),
  "hessian": lambda f, m: jax.hessian(f)(m),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_derivative_with_respect_to_a_hijax_model_is_refused(name):
  m = model()
  before = np.asarray(m.kernel)
  with pytest.raises(RefArgumentError, match=r"hijax(.|\n)*nnx\.grad(.|\n)*nnx\.to_lojax\(model\)"):
    TRANSFORMS[name](loss, m)
  np.testing.assert_array_equal(m.kernel, before)


def test_a_derivative_of_many_models_is_refused():
  models = nnx.vmap(lambda rngs: nnx.Linear(2, 3, rngs=rngs))(nnx.Rngs(0).split(2))
  with pytest.raises(RefArgumentError, match=r"nnx\.grad"):
    jax.vmap(jax.grad(loss))(models)


@pytest.mark.parametrize("form", ["state", "merge", "list", "Variable"])
def test_a_derivative_with_respect_to_its_parts_is_refused(form):
  m = model()
  graphdef, params = nnx.split(m)
  f, argument = {
    "state": (lambda p: (p["kernel"][...] ** 2).sum(), params),
    "merge": (lambda p: loss(nnx.merge(graphdef, p)), params),
    "list": (lambda p: (p[0][...] ** 2).sum(), [m.kernel]),
    "Variable": (lambda p: (p[...] ** 2).sum(), m.kernel),
  }[form]
  # Of a bare Variable, JAX's newest grad asks nothing that we could answer: the error is JAX's own.
  with pytest.raises(TypeError if form in ("list", "Variable") else RefArgumentError):
    jax.grad(f)(argument)
  with pytest.raises(RefArgumentError, match=r"Linear\.|hijax"):
    jax.vjp(f, argument)


def test_what_the_errors_name_works():
  m = model()
  want = nnx.grad(loss)(m)
  got = jax.grad(loss)(nnx.to_lojax(m))
  np.testing.assert_allclose(got.kernel, want["kernel"], rtol=1e-6)
  graphdef, params = nnx.split(m)
  by_parts = nnx.grad(lambda p: loss(nnx.merge(graphdef, p)))(params)
  np.testing.assert_allclose(by_parts["kernel"], want["kernel"], rtol=1e-6)
  pure = nnx.to_pure_dict(params)
  by_arrays = jax.grad(lambda p: loss(nnx.merge(graphdef, p)))(pure)
  np.testing.assert_allclose(by_arrays["kernel"], want["kernel"], rtol=1e-6)


def test_a_model_beside_what_is_differentiated_is_fine():
  m = model()
  assert jax.grad(lambda x, m: (m(x) ** 2).mean())(X, m).shape == X.shape
  assert jax.grad(lambda m, x: (m(x) ** 2).mean(), argnums=1)(m, X).shape == X.shape
  assert jax.grad(lambda x: loss(m) * x.sum())(X).shape == X.shape
  assert jax.grad(lambda x: jax.jit(lambda m, x: m(x).sum())(m, x))(X).shape == X.shape

  def local(x):
    inner = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    inner = jax.tree.map(lambda r: r, inner)
    return jax.checkpoint(lambda m, x: m(x).sum())(inner, x)

  assert jax.grad(local)(X).shape == X.shape
  assert jax.vjp(local, X)[1](1.0)[0].shape == X.shape


@pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
@pytest.mark.parametrize(
  "jit", [lambda f: f, nnx.jit, jax.jit], ids=["eager", "nnx.jit", "jax.jit"]
)
def test_a_read_of_what_is_differentiated_through_another_object_is_refused(hijax, jit):
  with nnx.use_hijax(hijax):
    outer = model()
  slips = [
    lambda m: (outer(X) ** 2).mean(),
    lambda m: loss(m) + outer.kernel.sum(),
    lambda m: loss(m) + sum(x.sum() for x in jax.tree.leaves(nnx.to_lojax(outer))),
  ]
  for slip in slips:
    with pytest.raises(AliasError, match=r"without a gradient(.|\n)*at:  Linear\.(.|\n)*not model"):
      nnx.grad(slip)(outer)
  with pytest.raises(AliasError, match="another object"):
    jit(lambda x: nnx.grad(lambda m: (outer(x) ** 2).mean())(outer)["kernel"])(X)
  old = nnx.clone(outer)
  nnx.grad(lambda m: ((m(X) - old(X)) ** 2).mean())(outer)  # a constant
  nnx.grad(lambda m: loss(m) + outer.bias.sum(), wrt=nnx.PathContains("kernel"))(outer)
  loss(outer)  # afterwards it is read as ever


def test_a_nested_derivative_reads_its_own_argument():
  m = model()
  inner = lambda m: nnx.grad(loss)(m)["kernel"].sum()
  assert nnx.grad(inner)(m)["kernel"].shape == (2, 3)


WITH_ARRAYS = {
  "ravel_pytree": (lambda m: ravel_pytree(nnx.state(m)), r"ravel_pytree\(nnx\.pure"),
  "ravel_pytree of a model": (ravel_pytree, r"ravel_pytree\(nnx\.pure"),
  "apply_updates": (
    lambda m: optax.apply_updates(nnx.state(m), nnx.grad(loss)(m)),
    r"nnx\.pure\(state\) and nnx\.pure\(updates\)",
  ),
  "with_sharding_constraint": (
    lambda m: jax.jit(lambda s: jax.lax.with_sharding_constraint(s, one_device()))(nnx.state(m)),
    r"with_sharding_constraint\(variable\[\.\.\.\], sharding\)",
  ),
}


def one_device():
  return jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",)), jax.P())


@pytest.mark.parametrize(("call", "fix"), WITH_ARRAYS.values(), ids=WITH_ARRAYS)
def test_functions_of_arrays_name_what_to_give_them(call, fix):
  m = model()
  before = np.asarray(m.kernel)
  with pytest.raises(RefArgumentError, match=rf"computes with arrays(.|\n)*fix: .*{fix}"):
    call(m)
  np.testing.assert_array_equal(m.kernel, before)


def test_what_functions_of_arrays_name_works():
  m, twin = model(), nnx.to_lojax(model())
  flat, unravel = ravel_pytree(nnx.pure(nnx.state(m)))
  np.testing.assert_array_equal(flat, ravel_pytree(nnx.state(twin))[0])  # lojax holds arrays
  nnx.update(m, unravel(flat * 2))
  np.testing.assert_array_equal(m.kernel, 2 * twin.kernel)
  state, grads = nnx.state(m), nnx.grad(loss)(m)
  want = m.kernel[...] + grads["kernel"][...]
  nnx.update(m, optax.apply_updates(nnx.pure(state), nnx.pure(grads)))
  np.testing.assert_array_equal(m.kernel, want)
  constrained = lambda m: jax.lax.with_sharding_constraint(m.kernel[...], one_device())
  np.testing.assert_array_equal(jax.jit(constrained)(m), want)


def test_a_function_of_the_user_of_the_same_name_is_none_of_these():
  def ravel_pytree(tree):
    return jax.tree.leaves(tree)

  assert len(ravel_pytree(model())) == 2
