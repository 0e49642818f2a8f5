import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx

NAMES = [n for n in dir(jax.nn.initializers) if not n.startswith("_") and n != "Initializer"]
ARGUMENTS = {"constant": (0.5,), "variance_scaling": (2.0, "fan_avg", "uniform")}
KEY = jax.random.key(3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, None])
def test_the_initializers_are_those_of_jax(name, dtype):
  ours, theirs = getattr(nnx.initializers, name), getattr(jax.nn.initializers, name)
  if "orthogonal" in name and dtype is jnp.bfloat16:
    pytest.skip("JAX decomposes no bfloat16")
  if name not in ("ones", "zeros"):
    ours, theirs = (make(*ARGUMENTS.get(name, ())) for make in (ours, theirs))
  shape = (3, 5, 6) if name == "delta_orthogonal" else (17, 3)  # XLA rounds in its own way here
  got, want = ours(KEY, shape, dtype), theirs(KEY, shape, dtype)
  assert got.dtype == want.dtype and got.weak_type == want.weak_type
  # Compiled together with other operations, XLA may round otherwise.
  close = partial(np.testing.assert_allclose, desired=want, rtol=jnp.finfo(want.dtype).eps * 4)
  close(got)
  close(jax.jit(lambda key: 1 * ours(key, shape, dtype))(KEY))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("ones", "zeros")])
def test_a_dtype_given_to_the_factory_is_that_of_its_arrays(name):
  ours, theirs = getattr(nnx.initializers, name), getattr(jax.nn.initializers, name)
  given = ARGUMENTS.get(name, ())
  dtype = jnp.float32 if "orthogonal" in name else jnp.bfloat16
  shape = (3, 5, 6) if name == "delta_orthogonal" else (17, 3)
  got, want = (make(*given, dtype=dtype)(KEY, shape) for make in (ours, theirs))
  assert got.dtype == want.dtype == dtype
  np.testing.assert_array_equal(got, want)


def test_equal_initializers_are_one_and_compile_a_shape_once(caplog):
  assert nnx.initializers.normal(0.1) is nnx.initializers.normal(0.1)
  assert nnx.initializers.normal(0.1) is not nnx.initializers.normal(0.2)
  table = jnp.arange(3.0)  # an array cannot be looked up
  np.testing.assert_array_equal(nnx.initializers.constant(table)(KEY, (2, 3)), [table, table])
  init = nnx.initializers.uniform(0.123)
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    init(KEY, (7, 9)), init(KEY, [7, 9]), nnx.initializers.uniform(0.123)(KEY, (7, 9))
  assert sum("Finished XLA compilation" in m for m in caplog.messages) == 1


def test_an_int_is_a_shape_of_one_axis():
  assert nnx.initializers.zeros(KEY, 3).shape == (3,)
  np.testing.assert_array_equal(
    nnx.initializers.normal()(KEY, 3), jax.nn.initializers.normal()(KEY, (3,))
  )


def test_a_bad_argument_gets_the_error_of_jax():
  with pytest.raises(TypeError, match="scael"):
    nnx.initializers.normal(scael=1)  # pyright: ignore
  with pytest.raises(ValueError, match="fan"):
    nnx.initializers.variance_scaling(1.0, "fan", "normal")(KEY, (2, 2))  # pyright: ignore


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
