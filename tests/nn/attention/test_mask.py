import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import ShapeMismatchError


def test_a_mask_says_for_each_query_and_key_whether_both_count():
  queries, keys = np.array([[1, 1, 0], [1, 0, 0]]), np.array([[1, 0, 1, 1], [0, 1, 1, 1]])
  mask = nnx.make_attention_mask(queries, keys)
  assert mask.shape == (2, 1, 3, 4)
  assert mask.dtype == jnp.float32
  np.testing.assert_array_equal(mask[:, 0], queries[:, :, None] * keys[:, None, :])


def test_the_pairwise_function_and_the_dtype_are_the_callers():
  a, b = jnp.array([1, 2]), jnp.array([2, 1])
  mask = nnx.make_attention_mask(a, b, jnp.equal, extra_batch_dims=2, dtype=bool)
  assert mask.shape == (1, 1, 1, 2, 2)
  assert mask[0, 0, 0].tolist() == [[False, True], [True, False]]


def test_a_causal_mask_is_a_lower_triangle():
  mask = nnx.make_causal_mask(jnp.zeros((2, 4)), extra_batch_dims=1, dtype=jnp.int8)
  assert mask.shape == (1, 2, 1, 4, 4)
  assert mask.dtype == jnp.int8
  np.testing.assert_array_equal(mask[0, 1, 0], np.tri(4))


def test_combined_masks_let_through_what_all_do():
  a, b = jnp.array([[1, 1, 0]]), jnp.array([[1], [0]])
  np.testing.assert_array_equal(nnx.combine_masks(a, None, b), [[1, 1, 0], [0, 0, 0]])
  assert nnx.combine_masks(a, dtype=bool).dtype == bool
  assert nnx.combine_masks(None, None) is None


@pytest.mark.parametrize("shapes", [((2, 3), (3,)), ((2, 3), (2, 4))])
def test_masks_that_do_not_fit_are_named(shapes):
  with pytest.raises(ShapeMismatchError) as error:
    nnx.combine_masks(*map(jnp.ones, shapes))
  assert error.value.args[0] == (
    "masks that are combined have to broadcast to each other, axis by axis\n"
    f"  got: masks of shape {shapes[0]}, {shapes[1]}\n"
    "  fix: give them equally many axes, of size 1 where they are to be repeated"
  )


@pytest.mark.parametrize("make", [
  lambda: nnx.make_attention_mask(jnp.ones(2), 1.0), lambda: nnx.make_causal_mask(1.0),
])  # fmt: skip
def test_a_scalar_makes_no_mask(make):
  with pytest.raises(ShapeMismatchError) as error:
    make()
  assert error.value.args[0] == (
    "a mask is made from one number for each query and key\n"
    "  got: a scalar\n"
    "  fix: pass arrays of shape (..., length)"
  )


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.int32, jnp.uint32])
def test_a_product_that_wraps_around_is_not_0(dtype):
  number = 2 ** (jnp.iinfo(dtype).bits // 2)  # its square is 0 in the dtype
  x = jnp.array([number, 0], dtype)
  assert (nnx.make_attention_mask(x, x) != 0).tolist() == [[[True, False], [False, False]]]


@pytest.mark.parametrize("dtype", [bool, jnp.int4, jnp.int8, jnp.uint8, jnp.float16, jnp.int32])
@pytest.mark.parametrize("x", [
  np.array([16, 0], np.int32), np.array([256, 0], np.int32), np.array([1e-4, 0], np.float16),
  np.array([0.5, 0], np.float32),
])  # fmt: skip
def test_a_mask_is_0_in_every_dtype_only_where_it_was(x, dtype):
  mask = nnx.make_attention_mask(x, x, dtype=dtype)
  assert mask.dtype == dtype
  assert (mask != 0).tolist() == [[[True, False], [False, False]]]
  assert (nnx.combine_masks(jnp.asarray(x), dtype=dtype) != 0).tolist() == [True, False]
