import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refax import nnx
from tests.numerics.twin import assert_twins, linen, normal, share_weights

# Random ones would be compiled for each shape, and are overwritten.
ZEROS = {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}

DTYPES = (None, jnp.float32, jnp.bfloat16)


@settings(max_examples=6, deadline=None)
@given(
  batch=st.lists(st.integers(1, 3), max_size=2),
  sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
  use_bias=st.booleans(),
  input_dtype=st.sampled_from((jnp.float32, jnp.bfloat16)),
  dtype=st.sampled_from(DTYPES),
  param_dtype=st.sampled_from((jnp.float32, jnp.bfloat16)),
)
def test_linear_equals_linen(batch, sizes, use_bias, input_dtype, dtype, param_dtype):
  options = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype}
  model = nnx.Linear(*sizes, **options, **ZEROS)
  layer = linen.Dense(sizes[1], **options)
  x = normal(9, (*batch, sizes[0]), input_dtype)
  assert_twins(model, layer, share_weights(model, layer, x), x)


def test_linear_of_integers_equals_linen():
  model, layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), linen.Dense(2)
  x = jnp.arange(6).reshape(2, 3)
  assert_twins(model, layer, share_weights(model, layer, x), x)


# in_features, out_features, axis, batch_axis, shape of the input
GENERAL = (
  (3, 4, -1, {}, (2, 3)),
  (3, (4, 2), -1, {}, (2, 5, 3)),
  ((3, 2), 4, (-2, -1), {}, (2, 5, 3, 2)),
  ((3, 2), (4, 1), (2, 0), {}, (3, 5, 2)),
  (3, 4, 1, {0: 2}, (2, 3, 5)),
  ((3, 2), (4, 2), (-2, -1), {0: 2, 1: 3}, (2, 3, 4, 3, 2)),
)


@settings(max_examples=6, deadline=None)
@given(
  case=st.sampled_from(GENERAL),
  use_bias=st.booleans(),
  input_dtype=st.sampled_from((jnp.float32, jnp.bfloat16)),
  dtype=st.sampled_from(DTYPES),
  param_dtype=st.sampled_from((jnp.float32, jnp.bfloat16)),
)
def test_linear_general_equals_linen(case, use_bias, input_dtype, dtype, param_dtype):
  sizes, features, axis, batch, shape = case
  options = {"axis": axis, "use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype}
  model = nnx.LinearGeneral(sizes, features, batch_axis=batch, **options, **ZEROS)
  layer = linen.DenseGeneral(features, batch_dims=tuple(batch), **options)
  x = normal(9, shape, input_dtype)
  assert_twins(model, layer, share_weights(model, layer, x), x)


EINSUMS = (
  ("abc,cde->abde", (2, 3, 3), (4, 5)),
  ("abc,cde->aedb", (2, 3, 3), (5, 4)),
  ("bcd,cde->bce", (2, 3, 4), (3, 5)),
  ("...cd,cde->...ce", (2, 2, 3, 4), (3, 5)),
)


@settings(max_examples=6, deadline=None)
@given(
  case=st.sampled_from(EINSUMS),
  use_bias=st.booleans(),
  input_dtype=st.sampled_from((jnp.float32, jnp.bfloat16)),
  dtype=st.sampled_from(DTYPES),
  param_dtype=st.sampled_from((jnp.float32, jnp.bfloat16)),
)
def test_einsum_equals_linen(case, use_bias, input_dtype, dtype, param_dtype):
  spec, shape, bias = case
  options = {"dtype": dtype, "param_dtype": param_dtype}
  model = nnx.Einsum(spec, (3, 4, 5), bias if use_bias else None, **options, **ZEROS)
  layer = linen.Einsum((3, 4, 5), spec, use_bias, **options)
  x = normal(9, shape, input_dtype)
  assert_twins(model, layer, share_weights(model, layer, x), x)


@pytest.mark.parametrize("build", [
  lambda nnx, rngs: nnx.Linear(3, 4, rngs=rngs),
  lambda nnx, rngs: nnx.Conv(4, 6, (3, 2), feature_group_count=2, rngs=rngs),
  lambda nnx, rngs: nnx.Embed(5, 3, rngs=rngs),
  lambda nnx, rngs: nnx.LinearGeneral((2, 3), (4, 5), axis=(0, 1), batch_axis={0: 7}, rngs=rngs),
  lambda nnx, rngs: nnx.Einsum("abc,cde->abde", (3, 4, 5), (4, 5), rngs=rngs),
  lambda nnx, rngs: nnx.ConvTranspose(4, 6, (3, 2), rngs=rngs),
  lambda nnx, rngs: nnx.LoRALinear(4, 6, lora_rank=2, rngs=rngs),
  lambda nnx, rngs: nnx.LoRALinear(4, 6, lora_rank=2, rngs=rngs).lora,
], ids=[
  "Linear", "Conv", "Embed", "LinearGeneral", "Einsum", "ConvTranspose", "LoRALinear", "LoRA",
])  # fmt: skip
def test_initial_weights_are_those_of_flax_nnx(build):
  flax_nnx = pytest.importorskip("flax.nnx", reason="initial weights are compared with Flax NNX")
  own, other = build(nnx, nnx.Rngs(7)), build(flax_nnx, flax_nnx.Rngs(7))
  name = {nnx.Embed: "embedding", nnx.LoRA: "lora_a"}.get(type(own), "kernel")
  # One compiled call rounds once where operation after operation rounds twice.
  np.testing.assert_allclose(getattr(own, name)[...], getattr(other, name)[...], rtol=1e-6)
