"""An array is owned by a list if nothing else refers to it and it shares memory with nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax.core.owned import Owned

DEVICE = jax.devices()[0]


def fresh():
  return jax.device_put(jnp.arange(8.0) + 1, DEVICE)


def test_what_only_the_list_has_is_owned():
  arrays = [fresh(), fresh()]
  owned = Owned(arrays)
  assert owned(0) and owned(1)


def test_what_something_else_refers_to_is_not():
  kept = fresh()
  arrays = [kept, fresh()]
  owned = Owned(arrays)
  assert not owned(0) and owned(1)
  del kept
  assert owned(0)


def test_an_array_in_two_places_is_owned_by_neither():
  twice = fresh()
  arrays = [twice, twice]
  del twice
  owned = Owned(arrays)
  assert not owned(0) and not owned(1)


def test_another_array_on_the_same_memory_is_seen():
  given = fresh()
  arrays = [jax.device_put(given, DEVICE), fresh()]
  assert arrays[0] is not given
  assert arrays[0].unsafe_buffer_pointer() == given.unsafe_buffer_pointer()
  owned = Owned(arrays, [given])
  assert not owned(0) and owned(1)
  again = [arrays.pop(0)]
  again.append(jax.device_put(again[0], DEVICE))
  owned = Owned(again)
  assert not owned(0) and not owned(1)


@pytest.mark.parametrize(
  "make",
  [
    lambda: jax.random.key(0),
    lambda: np.ones(3),
    lambda: jnp.ones((0, 3)),
    lambda: jax.ShapeDtypeStruct((2,), jnp.float32),
    lambda: jax.new_ref(jnp.ones(2)),
    lambda: 1.0,
  ],
  ids=["key", "numpy", "empty", "abstract", "ref", "number"],
)
def test_anything_else_is_not_owned(make):
  arrays = [make()]
  assert not Owned(arrays)(0)


def test_a_tracer_is_not_owned():
  @jax.jit
  def f(x):
    arrays = [x + 1]
    assert not Owned(arrays)(0)
    return arrays[0]

  f(1.0)
