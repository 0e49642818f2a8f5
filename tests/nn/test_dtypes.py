import jax.numpy as jnp
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
