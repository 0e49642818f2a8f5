import jax
import jax.numpy as jnp
import pytest

from refax import nnx
from tests.numerics.twin import GRADIENT_TOLERANCE, assert_close, linen, normal


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("broadcast_dims", [(), (0,), (-1,)])
def test_dropout_with_the_same_key_equals_linen(dtype, rate, broadcast_dims):
  x, key = normal(1, (6, 5), dtype), jax.random.key(3)
  model = nnx.Dropout(rate, broadcast_dims=broadcast_dims)
  layer = linen.Dropout(rate, broadcast_dims=broadcast_dims, deterministic=False)
  ours = lambda x: model(x, rngs=key)
  theirs = lambda x: layer.apply({}, x, rng=key)  # given so, the key is used as it is
  assert_close(ours(x), theirs(x), of=("Dropout", "Flax Linen"))
  slope = lambda fn: jax.grad(lambda x: (fn(x).astype(jnp.float32) ** 2).sum())(x)
  assert_close(slope(ours), slope(theirs), GRADIENT_TOLERANCE)
