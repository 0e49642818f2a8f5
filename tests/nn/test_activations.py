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
