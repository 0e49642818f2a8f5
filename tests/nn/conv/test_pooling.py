import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError, ShapeMismatchError

POOLS = [nnx.avg_pool, nnx.max_pool, nnx.min_pool]
REDUCE = {nnx.avg_pool: np.mean, nnx.max_pool: np.max, nnx.min_pool: np.min}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_pooling_reduces_each_window_of_each_example(pool, batch):
  x = np.random.default_rng(0).standard_normal((*batch, 6, 4, 2)).astype(np.float32)
  want = REDUCE[pool](x.reshape(*batch, 3, 2, 2, 2, 2), axis=(-4, -2))
  np.testing.assert_allclose(pool(x, (2, 2), strides=(2, 2)), want, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(pool(x, [2, 2], strides=2), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pool", POOLS)
def test_padding_counts_only_in_a_mean_that_is_told_so(pool):
  x = jnp.full((3, 1), 6.0)
  at_the_border = 4.0 if pool is nnx.avg_pool else 6.0
  assert pool(x, (3,), padding="SAME")[:, 0].tolist() == [at_the_border, 6.0, at_the_border]
  y = nnx.avg_pool(x, (3,), padding="SAME", count_include_pad=False)
  assert y[:, 0].tolist() == [6.0, 6.0, 6.0]


@pytest.mark.parametrize("padding", [1, (1,), ((1, 1),), [[1, 1]], "same"])
def test_ways_to_write_a_padding(padding):
  y = nnx.max_pool(jnp.arange(4.0)[:, None], (3,), padding=padding)
  assert y[:, 0].tolist() == [1, 2, 3, 3]


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32])
def test_pooling_of_integers(dtype):
  x = jnp.array([3, 1, 2], dtype)[:, None]
  high, low = nnx.max_pool(x, (2,), padding=1), nnx.min_pool(x, (2,), padding=1)
  assert (high.dtype, high[:, 0].tolist()) == (dtype, [3, 3, 2, 2])
  assert (low.dtype, low[:, 0].tolist()) == (dtype, [3, 1, 1, 2])
  assert nnx.avg_pool(x, (2,))[:, 0].tolist() == [2.0, 1.5]


def test_the_mean_of_bfloat16_keeps_its_dtype_without_counting_padding():
  y = nnx.avg_pool(jnp.ones((4, 1), jnp.bfloat16), (2,), padding="SAME", count_include_pad=False)
  assert (y.dtype, y[:, 0].tolist()) == (jnp.bfloat16, [1, 1, 1, 1])


def test_a_variable_is_an_input_and_transforms_apply():
  x = nnx.Variable(jnp.arange(8.0).reshape(2, 4, 1))
  want = nnx.max_pool(x[...], (2,))
  np.testing.assert_array_equal(nnx.max_pool(x, (2,)), want)
  pool = lambda x: nnx.max_pool(x, (2,))
  np.testing.assert_array_equal(jax.jit(jax.vmap(pool))(x), want)
  gradient = jax.grad(lambda x: nnx.max_pool(x, (4,)).sum())(x[...])
  assert gradient[:, :, 0].tolist() == [[0, 0, 0, 1]] * 2


def test_too_few_axes_are_refused_by_name():
  with pytest.raises(ShapeMismatchError) as error:
    nnx.max_pool(jnp.ones((4, 4)), (2, 2))
  assert error.value.args[0] == (
    "max_pool works on 2 spatial axes and one of channels\n"
    "  got: an input of shape (4, 4)\n"
    "  fix: pass an input of shape (..., size, size, channels)"
  )


@pytest.mark.parametrize(("args", "got"), [
  (((2, 2), (1,)), "strides=(1,)"), (((2, 0),), "window_shape=0"), ((2,), "window_shape=2"),
  (((2, 2), None, ((0, 0),)), "padding=((0, 0),)"), (((2, 2), 1, "CAUSAL"), "padding='CAUSAL'"),
])  # fmt: skip
@pytest.mark.parametrize("pool", POOLS)
def test_arguments_that_do_not_fit_together_are_refused(pool, args, got):
  with pytest.raises(InvalidArgumentError) as error:
    pool(jnp.ones((4, 4, 1)), *args)
  assert str(error.value).startswith(f"{pool.__name__} cannot work with this ")
  assert f"got: {got}\n" in str(error.value)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("count_include_pad", [True, False])
def test_the_mean_of_many_equal_numbers_is_that_number(dtype, count_include_pad):
  x = jnp.full((32, 32, 1), 1000.0, dtype)
  y = nnx.avg_pool(x, (32, 32), count_include_pad=count_include_pad)
  assert (y.dtype, y.ravel().tolist()) == (dtype, [1000.0])
  gradient = jax.grad(lambda x: nnx.avg_pool(x, (32, 32)).sum())(x)
  assert gradient.dtype == dtype
  np.testing.assert_array_equal(gradient, jnp.full_like(x, 1 / 1024))


def test_sizes_of_numpy_do_not_wrap_around():
  window = (np.int8(16), np.int8(16))
  assert nnx.avg_pool(jnp.ones((16, 16, 1)), window).ravel().tolist() == [1.0]


def test_the_largest_of_booleans_is_whether_any_is_true():
  x = jnp.array([True, False, False])[:, None]
  assert nnx.max_pool(x, (2,), padding="SAME")[:, 0].tolist() == [True, False, False]
  assert nnx.min_pool(x, (2,), padding="SAME")[:, 0].tolist() == [False, False, False]


@pytest.mark.parametrize(("pool", "sign"), [(nnx.max_pool, -1), (nnx.min_pool, 1)])
def test_what_pads_a_dtype_without_infinity_is_its_last_number(pool, sign):
  x = jnp.full((3, 1), sign * 448.0, jnp.float8_e4m3fn)
  assert pool(x, (3,), padding="SAME")[:, 0].tolist() == [sign * 448.0] * 3


@pytest.mark.parametrize("init", [-1, 256])
def test_a_start_that_the_dtype_does_not_hold_is_refused(init):
  with pytest.raises(InvalidArgumentError) as error:
    nnx.pool(jnp.ones((4, 1), jnp.uint8), init, jax.lax.max, (2,), None, "VALID")
  assert error.value.args[0] == (
    "pool cannot work with this init\n"
    f"  got: init={init}\n"
    "  fix: pass a number that uint8 holds, or cast the input"
  )
