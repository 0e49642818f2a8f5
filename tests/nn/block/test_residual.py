import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError, ShapeMismatchError


def test_the_input_is_added():
  layer, x = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 3))
  np.testing.assert_array_equal(nnx.Residual(layer)(x), x + layer(x))


def test_a_shortcut_makes_the_input_fit():
  rngs, x = nnx.Rngs(0), jnp.ones((2, 3))
  layer, shortcut = nnx.Linear(3, 5, rngs=rngs), nnx.Linear(3, 5, use_bias=False, rngs=rngs)
  block = nnx.Residual(layer, shortcut=shortcut)
  np.testing.assert_array_equal(block(x), shortcut(x) + layer(x))
  assert len(nnx.to_flat_state(nnx.state(block, nnx.Param))) == 3


def test_arguments_reach_the_layer():
  block = nnx.Residual(lambda x, a, *, b: a * x + b)
  assert float(block(jnp.ones(()), 3.0, b=10.0)) == 14.0
  assert float(block(nnx.Variable(1.0), 3.0, b=10.0)) == 14.0


def test_errors_say_what_fits():
  block = nnx.Residual(nnx.Linear(3, 5, rngs=nnx.Rngs(0)))
  with pytest.raises(ShapeMismatchError) as info:
    block(jnp.ones((2, 3)))
  assert info.value.args[0] == (
    "Residual adds two arrays of one shape\n"
    "  got: shape (2, 5) from the layer, (2, 3) to add\n"
    "  fix: pass a shortcut that makes the input fit: nnx.Residual(layer, shortcut=...)"
  )
  with pytest.raises(InvalidArgumentError, match="layer=None"):
    nnx.Residual(None)
  with pytest.raises(InvalidArgumentError, match="shortcut=3"):
    nnx.Residual(nnx.relu, shortcut=3)
