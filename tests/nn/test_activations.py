import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.nn import activations

ALIASES = {"hard_swish": "hard_silu", "swish": "silu"}
NAMES = [n for n in vars(activations) if not n.startswith("_") and hasattr(jax.nn, n)]
FLOAT_NAMES = [name for name in NAMES if name != "one_hot"]


def test_every_activation_of_jax_is_there():
  others = {"dot_product_attention", "get_scaled_dot_general_config", "scaled_dot_general",
            "scaled_matmul", "initializers"}  # fmt: skip
  assert set(NAMES) >= {n for n in dir(jax.nn) if not n.startswith("_")} - others


@pytest.mark.parametrize("hijax", [True, False])
@pytest.mark.parametrize("name", FLOAT_NAMES)
def test_an_activation_of_a_variable_is_that_of_its_value(name, hijax):
  x = jnp.array([0.5, 1.5])
  want = getattr(jax.nn, name)(x)
  got = getattr(nnx, name)(nnx.Variable(x, is_hijax=hijax))
  assert isinstance(got, jax.Array)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", FLOAT_NAMES)
def test_an_activation_of_a_variable_is_differentiated(name):
  x = jnp.array([0.5, 1.5])
  loss = lambda fn: lambda x: (fn(x) ** 2).sum()
  want = jax.grad(loss(getattr(jax.nn, name)))(x)
  got = jax.grad(loss(getattr(nnx, name)))(nnx.Param(x, is_hijax=False))
  np.testing.assert_array_equal(got[...], want)


@pytest.mark.parametrize("name", NAMES)
def test_an_activation_is_static_picklable_and_named(name):
  fn = getattr(nnx, name)
  assert pickle.loads(pickle.dumps(fn)) is fn
  assert fn.__name__ == ALIASES.get(name, name)
  assert not jax.tree.leaves(nnx.split(nnx.Sequential(fn))[1])


def test_further_arguments_are_passed_on():
  x = jnp.array([[1.0, -2.0], [0.0, 3.0]])
  np.testing.assert_array_equal(nnx.softmax(x, axis=0), jax.nn.softmax(x, axis=0))
  np.testing.assert_array_equal(nnx.leaky_relu(x, 0.5), jax.nn.leaky_relu(x, 0.5))
  assert nnx.one_hot(nnx.Variable(1), 3, dtype=jnp.int32).tolist() == [0, 1, 0]


def test_prelu_has_a_slope_of_its_own():
  model, x = nnx.PReLU(0.5), jnp.array([-2.0, 0.0, 3.0])
  assert model(x).tolist() == [-1.0, 0.0, 3.0]
  assert model.negative_slope.shape == ()
  assert model(nnx.Variable(x)).tolist() == [-1.0, 0.0, 3.0]
  assert float(nnx.PReLU().negative_slope) == pytest.approx(0.01)
  grads = nnx.grad(lambda model: model(x).sum())(model)
  assert float(grads["negative_slope"][...]) == -2.0


def test_prelu_has_the_dtype_that_is_asked_for():
  x = jnp.ones(2, jnp.bfloat16)
  assert nnx.PReLU()(x).dtype == jnp.float32
  assert nnx.PReLU(dtype=jnp.bfloat16)(x).dtype == jnp.bfloat16
  assert nnx.PReLU(param_dtype=jnp.bfloat16)(x).dtype == jnp.bfloat16
  assert nnx.PReLU(negative_slope_metadata={"tag": "s"}).negative_slope.tag == "s"
  assert nnx.PReLU()(jnp.array([-100, 1])).tolist() == pytest.approx([-1.0, 1.0])


@pytest.mark.parametrize("hijax", [True, False])
def test_prelu_under_transforms(hijax):
  with nnx.use_hijax(hijax):
    model = nnx.PReLU(0.25)
  apply, x = lambda model, x: model(x), jnp.array([-2.0, 0.0, 3.0])
  transforms = (jax.jit, nnx.jit, nnx.remat, lambda f: jax.vmap(f, (None, 0)))
  assert [t(apply)(model, x).tolist() for t in transforms] == [[-0.5, 0.0, 3.0]] * 4
  assert nnx.merge(*nnx.split(model))(x).tolist() == [-0.5, 0.0, 3.0]
  assert nnx.graphdef(model) == nnx.graphdef(nnx.clone(model))


def test_the_first_argument_may_come_by_keyword():
  x = jnp.array([1.0, 2.0], jnp.float16)
  np.testing.assert_array_equal(nnx.logsumexp(a=x, keepdims=True), nnx.logsumexp(x, keepdims=True))
  np.testing.assert_array_equal(nnx.softmax(x=x, axis=0), nnx.softmax(x, 0))
  with pytest.raises(TypeError, match="missing a required argument: 'x'"):
    nnx.softmax(axis=0)


def test_numbers_are_arguments_too():
  assert float(nnx.sigmoid(0)) == 0.5 == float(nnx.sigmoid(0.0))
  assert float(nnx.hard_tanh(3.0)) == 1.0
  assert nnx.one_hot(1, 3).tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", FLOAT_NAMES)
@pytest.mark.parametrize("shape", [(6,), (3, 4)])
def test_float32_is_computed_as_jax_does_bit_for_bit(name, shape):
  x = jnp.asarray(np.random.default_rng(0).standard_normal(shape) * 3, jnp.float32)
  x = jnp.abs(x) if name == "log1mexp" else x
  np.testing.assert_array_equal(getattr(nnx, name)(x), getattr(jax.nn, name)(x))


def test_all_outputs_of_half_precision_have_its_dtype():
  x = jnp.full(70_000, 2.0, jnp.float16)
  value, sign = nnx.logsumexp(x, return_sign=True)
  assert (value.dtype, sign.dtype, float(sign)) == (jnp.float16, jnp.float16, 1.0)
  assert float(value) == pytest.approx(2 + np.log(70_000), rel=1e-3)
  assert nnx.softmax(x, where=jnp.arange(70_000) < 2)[:3].tolist() == [0.5, 0.5, 0.0]
  assert nnx.logsumexp(x, b=jnp.ones(70_000)).dtype == jnp.float32
  gradient = jax.grad(lambda x: nnx.logsumexp(x).astype(jnp.float32))(x)
  assert gradient.dtype == jnp.float16
  np.testing.assert_allclose(gradient, np.full(70_000, 1 / 70_000), rtol=3e-3)
