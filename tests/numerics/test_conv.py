import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refax import nnx
from tests.numerics.twin import assert_twins, linen, normal, share_weights

# Random ones would be compiled for each shape, and are overwritten.
ZEROS = {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}


def compare(x, features, kernel_size, **options):
  model = nnx.Conv(x.shape[-1], features, kernel_size, **options, **ZEROS)
  layer = linen.Conv(features, kernel_size, **options)
  assert_twins(model, layer, share_weights(model, layer, x), x)


@st.composite
def convolutions(draw):
  rank, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
  per_axis = lambda entry: st.lists(entry, min_size=rank, max_size=rank).map(tuple)
  small = st.integers(1, 2)
  numbers = st.integers(0, 2) | per_axis(st.integers(0, 2) | st.tuples(small, st.integers(0, 2)))
  named = ["SAME", "VALID", "CIRCULAR", "REFLECT"] + (["CAUSAL"] if rank == 1 else [])
  input_dilation = draw(st.just(1) | small | per_axis(small))
  return {
    "shape": (*draw(st.sampled_from(((), (2,), (2, 1)))), *(4, 5, 3)[:rank], 2 * groups),
    "features": groups * draw(small),
    "kernel_size": draw(per_axis(st.integers(1, 3))),
    "strides": draw(small | per_axis(small)),
    # Linen has no named paddings with an input_dilation.
    "padding": draw(st.sampled_from(named) if input_dilation == 1 else numbers),
    "input_dilation": input_dilation,
    "kernel_dilation": draw(small | per_axis(small)),
    "feature_group_count": groups,
    "use_bias": draw(st.booleans()),
  }


@settings(max_examples=8, deadline=None)
@given(convolutions())
def test_conv_equals_linen(case):
  compare(normal(1, case.pop("shape")), case.pop("features"), case.pop("kernel_size"), **case)


@pytest.mark.parametrize("input_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_conv_dtypes_equal_linen(input_dtype, dtype, param_dtype):
  x = normal(1, (2, 5, 5, 2), input_dtype)
  compare(x, 3, (3, 3), dtype=dtype, param_dtype=param_dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_masked_conv_equals_linen(dtype):
  mask = normal(3, (3, 3, 2, 4)) > 0
  compare(normal(1, (2, 5, 5, 2)), 4, (3, 3), mask=mask, dtype=dtype)


@pytest.mark.parametrize("padding", [0, 1, (1, 2), ((1, 0), 2)])
def test_conv_with_numbers_as_padding_equals_linen(padding):
  compare(normal(1, (2, 4, 5, 2)), 3, (3, 2), padding=padding)


def test_conv_with_int_kernel_size_equals_linen():
  model, layer = nnx.Conv(2, 3, 3, **ZEROS), linen.Conv(3, (3,))
  x = normal(1, (2, 4, 2))
  assert_twins(model, layer, share_weights(model, layer, x), x)
