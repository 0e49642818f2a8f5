import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refax import nnx
from tests.numerics.twin import assert_twins, linen, normal, share_weights

# Random ones would be compiled for each shape, and are overwritten.
ZEROS = {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}


def compare(x, features, kernel_size, **options):
  model = nnx.ConvTranspose(x.shape[-1], features, kernel_size, **options, **ZEROS)
  layer = linen.ConvTranspose(features, kernel_size, **options)
  assert_twins(model, layer, share_weights(model, layer, x), x)


@st.composite
def convolutions(draw):
  rank = draw(st.integers(1, 3))
  per_axis = lambda entry: st.lists(entry, min_size=rank, max_size=rank).map(tuple)
  small = st.integers(1, 2)
  numbers = st.integers(0, 2) | per_axis(st.integers(0, 2) | st.tuples(small, st.integers(0, 2)))
  return {
    "shape": (*draw(st.sampled_from(((), (2,), (2, 1)))), *(4, 5, 3)[:rank], 2),
    "features": draw(small),
    "kernel_size": draw(per_axis(st.integers(1, 4))),
    "strides": draw(per_axis(st.integers(1, 3))),
    "padding": draw(st.sampled_from(("SAME", "VALID", "CIRCULAR")) | numbers),
    "kernel_dilation": draw(per_axis(small)),
    "transpose_kernel": draw(st.booleans()),
    "use_bias": draw(st.booleans()),
  }


@settings(max_examples=6, deadline=None)
@given(convolutions())
def test_conv_transpose_equals_linen(case):
  compare(normal(1, case.pop("shape")), case.pop("features"), case.pop("kernel_size"), **case)


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("strides", [(1,), (2,), (3,)])
@pytest.mark.parametrize("kernel_size", [(1,), (2,), (4,), (7,)])
def test_circular_conv_transpose_equals_linen(kernel_size, strides, transpose_kernel):
  options = {"strides": strides, "transpose_kernel": transpose_kernel, "padding": "CIRCULAR"}
  compare(normal(1, (4, 2)), 3, kernel_size, **options)


@pytest.mark.parametrize("input_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_conv_transpose_dtypes_equal_linen(input_dtype, dtype, param_dtype):
  compare(normal(1, (2, 5, 2), input_dtype), 3, (3,), dtype=dtype, param_dtype=param_dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_masked_conv_transpose_equals_linen(dtype):
  mask = normal(3, (3, 3, 2, 4)) > 0
  compare(normal(1, (2, 5, 5, 2)), 4, (3, 3), mask=mask, dtype=dtype)
