import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError
from refax.nn import dtypes


@pytest.mark.parametrize(("args", "want"), [
  ((jnp.bfloat16, jnp.float32), jnp.float32), ((jnp.bfloat16, jnp.float16), jnp.float32),
  ((jnp.int32,), jnp.float32), ((jnp.int8, jnp.bfloat16), jnp.bfloat16),
  ((jnp.float32, jnp.complex64), jnp.complex64), ((jnp.bool_,), jnp.float32),
])  # fmt: skip
def test_arrays_get_the_dtype_that_they_promote_to(args, want):
  arrays = dtypes.promote_dtype((None, *(jnp.ones(2, dtype) for dtype in args)))
  assert arrays[0] is None
  assert {x.dtype for x in arrays[1:]} == {jnp.dtype(want)}


def test_numbers_do_not_widen():
  assert dtypes.promote_dtype((1.0, jnp.ones(2, jnp.bfloat16)))[0].dtype == jnp.bfloat16


def test_a_given_dtype_is_taken():
  (x,) = dtypes.promote_dtype((nnx.Variable(jnp.ones(2)),), dtype=jnp.float16)
  assert x.dtype == jnp.float16


def test_integers_stay_where_they_may():
  (x,) = dtypes.promote_dtype((jnp.ones(2, jnp.int8),), inexact=False)
  assert x.dtype == jnp.int8


def test_an_integer_dtype_is_refused_where_it_has_to_be_inexact():
  with pytest.raises(
    InvalidArgumentError, match=r"this dtype\n  got: dtype=.*int32.*\n  fix: pass a"
  ):
    dtypes.promote_dtype((jnp.ones(2),), dtype=jnp.int32)


@pytest.mark.parametrize(("dtype", "want"), [
  (jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float32), (jnp.float8_e4m3fn, jnp.float32),
  (jnp.int4, jnp.float32), (jnp.uint8, jnp.float32), (jnp.bool_, jnp.float32),
  (jnp.int32, jnp.float32), (jnp.float32, jnp.float32), (jnp.complex64, jnp.complex64),
])  # fmt: skip
def test_sums_are_in_float32_or_better(dtype, want):
  assert dtypes.wide_dtype(dtype) == want
  assert dtypes.wide(jnp.ones(2, dtype)).dtype == want


@pytest.mark.parametrize(("dtype", "want"), [
  (jnp.int4, jnp.int32), (jnp.uint8, jnp.int32), (jnp.int16, jnp.int32), (jnp.int32, jnp.int32),
  (jnp.uint32, jnp.uint32), (jnp.bool_, jnp.bool_), (jnp.float16, jnp.float16),
])  # fmt: skip
def test_a_size_fits_beside_wide_integers(dtype, want):
  assert dtypes.wide_integers(jnp.ones(2, dtype)).dtype == want


def test_a_quotient_keeps_the_dtype_of_floats_and_is_rounded_once():
  x = jnp.array([1.0, 3.0], jnp.bfloat16)
  np.testing.assert_array_equal(dtypes.divided(x, 0.9), (np.array([1, 3]) / 0.9).astype(x.dtype))
  assert dtypes.divided(jnp.array([1, 3]), 2).tolist() == [0.5, 1.5]
