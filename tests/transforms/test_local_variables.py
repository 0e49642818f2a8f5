"""A Variable made while a function is differentiated carries its gradient, in both modes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import config, nnx
from refax.errors import DifferentiatedWriteError


class Loss(nnx.Variable):
  pass


class Model(nnx.Module):
  def __init__(self):
    self.w = nnx.Param(jnp.array([1.0, 2.0]))

  def __call__(self, x):
    h = self.w[...] * x
    self.kl = Loss((h**2).sum())
    self.cache = nnx.Cache(jnp.zeros(2))
    self.cache[...] = h
    self.cache[0] += h[1]
    self.calls = nnx.Variable(jnp.zeros((), int))
    self.calls[...] += 1
    return h.sum() + self.cache[...].sum()


X = jnp.array([1.0, 2.0])


def loss(model):
  return model(X) + model.kl[...]


def by_hand(w):
  h = w * X
  return 2 * h.sum() + h[1] + (h**2).sum()


WANT = jax.grad(by_hand)(jnp.array([1.0, 2.0]))
WAYS = {
  "grad": lambda m: nnx.grad(loss)(m),
  "value_and_grad": lambda m: nnx.value_and_grad(loss)(m)[1],
  "jit of grad": lambda m: nnx.jit(nnx.grad(loss))(m),
  "grad of jit": lambda m: nnx.grad(nnx.jit(loss))(m),
  "grad of jax.jit": lambda m: nnx.grad(jax.jit(loss))(m),
  "jax.jit of grad": lambda m: jax.jit(lambda m: nnx.pure(nnx.grad(loss)(m)))(m),
  "remat": lambda m: nnx.grad(nnx.remat(loss))(m),
  "jax.checkpoint": lambda m: nnx.grad(jax.checkpoint(loss))(m),
  "vjp": lambda m: nnx.vjp(loss, m)[1](1.0)[0],
  "by closure": lambda m: nnx.grad(lambda w: loss(nnx.merge(*_with(m, w))))(m.w[...]),
  "grad of grad's aux": lambda m: nnx.grad(lambda m: (loss(m), m.kl[...]), has_aux=True)(m)[0],
}


def _with(model, w):
  graphdef, state = nnx.split(model)
  return graphdef, {"w": w} | {k: v for k, v in state.items() if k != "w"}


@pytest.mark.parametrize("hijax", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore::refax.errors.StructureWarning")
def test_it_carries_its_gradient(way, hijax):
  with nnx.use_hijax(hijax):
    model = Model()
    for _ in range(2):
      np.testing.assert_allclose(*map(np.asarray, (*jax.tree.leaves(WAYS[way](model)), WANT)))
    assert config.using_hijax() is hijax


@pytest.mark.parametrize("hijax", [True, False])
@pytest.mark.parametrize("way", ["grad", "jit of grad", "grad of jit", "remat", "vjp"])
def test_what_is_handed_out_has_the_storage_of_all_others(way, hijax):
  with nnx.use_hijax(hijax):
    model = Model()
    WAYS[way](model)
    assert [v.is_hijax for v in (model.kl, model.cache, model.calls)] == [hijax] * 3
    np.testing.assert_allclose(model.kl[...], 17.0)
    np.testing.assert_allclose(model.cache[...], [5.0, 4.0])
    assert int(model.calls) == 1


@pytest.mark.parametrize("hijax", [True, False])
def test_jax_grad_jvp_and_second_derivatives(hijax):
  def f(w):
    v = nnx.Variable(jnp.zeros(2))
    v[...] = w * 2
    v[0] += w[1]
    return (v[...] ** 2).sum()

  def twin(w):
    return ((w * 2).at[0].add(w[1]) ** 2).sum()

  w = jnp.array([1.0, 2.0])
  with nnx.use_hijax(hijax):
    np.testing.assert_allclose(jax.grad(f)(w), jax.grad(twin)(w))
    np.testing.assert_allclose(jax.jvp(f, (w,), (w,))[1], jax.jvp(twin, (w,), (w,))[1])
    np.testing.assert_allclose(jax.hessian(f)(w), jax.hessian(twin)(w))
    np.testing.assert_allclose(jax.vmap(jax.grad(f))(w[None])[0], jax.grad(twin)(w))
    np.testing.assert_allclose(jax.jit(jax.grad(f))(w), jax.grad(twin)(w))
    hessian = nnx.grad(lambda w: (nnx.grad(f)(w) ** 2).sum())(w)
    np.testing.assert_allclose(hessian, jax.grad(lambda w: (jax.grad(twin)(w) ** 2).sum())(w))


def test_a_model_made_in_the_loss_and_given_out_is_hijax():
  def f(w):
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    model.kernel[...] *= w
    return model(X[None]).sum(), model

  grad, model = nnx.grad(f, has_aux=True)(3.0)
  assert model.kernel.is_hijax and grad != 0
  model.kernel[...] = 1.0


def test_what_asks_for_a_ref_gets_one_and_a_refusal():
  def f(w):
    return nnx.Variable(w, is_hijax=True)[...] * 2

  with pytest.raises(DifferentiatedWriteError, match=r"is_hijax=False"):
    nnx.grad(f)(1.0)


def test_integers_and_keys_made_in_a_loss_are_refs():
  seen = []

  def f(w):
    seen.append(nnx.Rngs(0)["default"].count.is_hijax)
    seen.append(nnx.Variable(0).is_hijax)
    return w * 2

  nnx.grad(f)(1.0)
  assert seen == [True, True]
