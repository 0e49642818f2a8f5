import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError


def test_layers_are_called_one_after_the_other():
  rngs = nnx.Rngs(0)
  first, second = nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)
  model, x = nnx.Sequential(first, nnx.relu, second), jnp.ones((4, 2))
  np.testing.assert_array_equal(model(x), second(nnx.relu(first(x))))


def test_it_is_a_sequence_of_its_layers():
  layers = [nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.relu, nnx.tanh]
  model = nnx.Sequential(*layers)
  assert isinstance(model.layers, nnx.List)
  assert len(model) == 3
  assert list(model) == layers
  assert model[0] is layers[0]
  assert model[-1] is nnx.tanh
  assert list(model[1:]) == layers[1:]
  assert model[:1][0] is layers[0]
  model.layers.append(nnx.relu)
  assert len(model) == 4


def test_a_tuple_gives_positional_arguments_and_a_dict_keyword_arguments():
  model = nnx.Sequential(
    lambda x: (x, x + 1),
    lambda a, b: {"low": a, "high": b},
    lambda *, low, high: high - low,
    lambda x: [x],
    lambda x: x,
  )
  assert model(3) == [1]


def test_without_layers_the_arguments_come_back():
  assert nnx.Sequential()(1) == 1
  assert nnx.Sequential()(1, 2) == (1, 2)


def test_keyword_arguments_go_to_the_layers_that_have_such_a_parameter():
  seen = []

  def scaled(x, *, scale):
    seen.append(scale)
    return x * scale

  def anything(x, **kwargs):
    seen.append(kwargs)
    return x

  model = nnx.Sequential(scaled, nnx.relu, lambda x: x, anything, scaled)
  assert model(2.0, scale=3) == 18.0
  assert seen == [3, {"scale": 3}, 3]


def test_a_parameter_that_the_output_fills_takes_no_keyword_argument():
  model = nnx.Sequential(lambda x, y=0: (x, y), lambda x, y: x + 10 * y)
  assert model(1, y=2) == 21  # the second layer has its `y` from the first


def test_keyword_arguments_reach_modules():
  rngs = nnx.Rngs(0)
  model = nnx.Sequential(
    nnx.Linear(2, 9, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(9, rngs=rngs)
  )
  x = jnp.ones((4, 2))
  got = model(x, deterministic=True, use_running_average=True)
  np.testing.assert_allclose(got, model[0](x), rtol=1e-4)


def test_a_keyword_argument_that_no_layer_takes_is_refused():
  with pytest.raises(InvalidArgumentError) as error:
    nnx.Sequential(nnx.relu)(jnp.ones(2), determinstic=True)
  assert error.value.args[0] == (
    "Sequential cannot work with this determinstic\n"
    "  got: determinstic=True\n"
    "  fix: pass what some layer takes"
  )


@pytest.mark.parametrize("layer", [[nnx.relu], 3, None])
def test_what_cannot_be_called_is_refused(layer):
  with pytest.raises(InvalidArgumentError, match=r"got: layer=(.|\n)*nnx.Sequential\(\*layers\)"):
    nnx.Sequential(nnx.relu, layer)


def test_it_is_a_pytree_and_shares_layers():
  layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  model = nnx.Sequential(layer, nnx.relu, layer)
  assert len(jax.tree.leaves(nnx.split(model)[1])) == 2
  x = jnp.ones(2)
  np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(model, x), model(x), rtol=1e-6)
