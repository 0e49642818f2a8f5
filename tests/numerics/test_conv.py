import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refax import nnx
from tests.numerics.twin import assert_twins, linen, normal, share_weights


def compare(x, features, kernel_size, **options):
  model = nnx.Conv(x.shape[-1], features, kernel_size, rngs=nnx.Rngs(0), **options)
  layer = linen.Conv(features, kernel_size, **options)
  assert_twins(model, layer, share_weights(model, layer, x), x)


@st.composite
def convolutions(draw):
  rank = draw(st.integers(1, 3))
  groups = draw(st.integers(1, 2))
  per_axis = lambda most: st.lists(st.integers(1, most), min_size=rank, max_size=rank).map(tuple)
  pads = st.tuples(st.integers(0, 2), st.integers(0, 2))
  named = ["SAME", "VALID", "CIRCULAR", "REFLECT"] + (["CAUSAL"] if rank == 1 else [])
  padding = draw(
    st.sampled_from(named)
    | st.integers(0, 2)
    | st.lists(pads | st.integers(0, 2), min_size=rank, max_size=rank)
  )
  batch = draw(st.lists(st.integers(1, 2), max_size=2))
  space = draw(st.lists(st.integers(4, 6), min_size=rank, max_size=rank))
  return {
    "shape": (*batch, *space, groups * draw(st.integers(1, 2))),
    "features": groups * draw(st.integers(1, 2)),
    "kernel_size": draw(per_axis(3)),
    "strides": draw(st.integers(1, 2) | per_axis(2)),
    "padding": padding,
    # XLA on CPUs differentiates no convolution that dilates both.
    draw(st.sampled_from(("input_dilation", "kernel_dilation"))): draw(st.integers(1, 2)),
    "feature_group_count": groups,
    "use_bias": draw(st.booleans()),
  }


@settings(max_examples=30, deadline=None)
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


def test_conv_with_both_dilations_equals_linen():
  model = nnx.Conv(2, 3, (2, 2), input_dilation=2, kernel_dilation=(1, 2), rngs=nnx.Rngs(0))
  layer = linen.Conv(3, (2, 2), input_dilation=2, kernel_dilation=(1, 2))
  x = normal(1, (2, 4, 4, 2))
  assert_twins(model, layer, share_weights(model, layer, x), x)


def test_conv_with_int_kernel_size_equals_linen():
  model, layer = nnx.Conv(2, 3, 3, rngs=nnx.Rngs(0)), linen.Conv(3, (3,))
  x = normal(1, (2, 4, 2))
  assert_twins(model, layer, share_weights(model, layer, x), x)
