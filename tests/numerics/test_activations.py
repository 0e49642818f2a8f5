import jax.numpy as jnp
import pytest

from refax import nnx
from tests.numerics.twin import assert_twins, linen, normal, share_weights


@pytest.mark.parametrize("slope", [0.01, 0.25, -0.5])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_prelu_equals_linen(dtype, slope):
  model = nnx.PReLU(slope, param_dtype=dtype)
  layer = linen.PReLU(negative_slope_init=slope, param_dtype=dtype)
  x = normal(1, (3, 4), dtype).at[0, 0].set(0)
  assert_twins(model, layer, share_weights(model, layer, x), x)
