"""nnx.vmap: what depends on nothing mapped is a number inside, as under jax.vmap."""

import jax.numpy as jnp
import numpy as np

from refax.compat import nnx


def test_a_constant_is_a_number_in_a_mapped_function():
  scaled = nnx.vmap(lambda x: x * float(jnp.ones(())))
  np.testing.assert_array_equal(scaled(jnp.arange(3.0)), jnp.arange(3.0))


def test_a_mapped_constructor_may_compute_its_configuration():
  @nnx.split_rngs(splits=3)
  @nnx.vmap
  def create(rngs):
    rates = jnp.linspace(0, 0.5, 3)
    model = nnx.Linear(2, 4, rngs=rngs)
    model.rates = tuple(float(x) for x in rates)
    return model

  model = create(nnx.Rngs(0))
  assert model.rates == (0.0, 0.25, 0.5)
  assert model.kernel.shape == (3, 2, 4)


def test_with_refs_each_element_has_its_own():
  @nnx.vmap
  def last(x):
    kept = nnx.Variable(jnp.zeros(()))
    kept[...] = x
    return kept

  with nnx.use_hijax(True):
    np.testing.assert_array_equal(last(jnp.arange(3.0))[...], jnp.arange(3.0))
