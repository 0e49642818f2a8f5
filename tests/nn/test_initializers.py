import jax
import jax.numpy as jnp
import pytest

from refax import nnx


def test_the_initializers_are_those_of_jax():
  for name in dir(jax.nn.initializers):
    if not name.startswith("_") and name != "Initializer":
      assert getattr(nnx.initializers, name) is getattr(jax.nn.initializers, name)


@pytest.mark.parametrize(("make", "value"), [
  (nnx.initializers.zeros_init, 0), (nnx.initializers.ones_init, 1),
])  # fmt: skip
def test_zeros_and_ones_in_the_form_of_the_others(make, value):
  x = make()(jax.random.key(0), (2, 3), jnp.bfloat16)
  assert (x.shape, x.dtype) == ((2, 3), jnp.bfloat16)
  assert (x == value).all()


def test_all_is_sorted_and_exists():
  names = nnx.initializers.__all__
  assert names == sorted(names)
  assert all(hasattr(nnx.initializers, name) for name in names)
