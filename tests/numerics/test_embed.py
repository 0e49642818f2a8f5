import jax.numpy as jnp
import pytest

from refax import nnx
from tests.numerics.twin import assert_twins, linen, normal, share_weights


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_embed_equals_linen(dtype, param_dtype, shape):
  model = nnx.Embed(7, 3, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
  layer = linen.Embed(7, 3, dtype=dtype, param_dtype=param_dtype)
  x = jnp.arange(jnp.zeros(shape).size).reshape(shape) * 5 % 7  # some of them twice
  assert_twins(model, layer, share_weights(model, layer, x), x)


@pytest.mark.parametrize("input_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_attend_equals_linen(input_dtype, dtype):
  model = nnx.Embed(7, 3, dtype=dtype, rngs=nnx.Rngs(0))
  layer = linen.Embed(7, 3, dtype=dtype)
  x = normal(1, (2, 4, 3), input_dtype)
  variables = share_weights(model, layer, jnp.array([0]))
  attend = {"ours": lambda model, x: model.attend(x), "kwargs": {"method": "attend"}}
  assert_twins(model, layer, variables, x, **attend)
