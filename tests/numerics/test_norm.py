import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refax import nnx
from tests.numerics.twin import assert_close, assert_twins, linen, normal, share_weights

FLOATS = st.sampled_from((jnp.float32, jnp.bfloat16))
COMMON = {
  "dtype": st.sampled_from((None, jnp.float32, jnp.bfloat16)),
  "param_dtype": FLOATS,
  "use_bias": st.booleans(),
  "use_scale": st.booleans(),
  "use_fast_variance": st.booleans(),
  "epsilon": st.sampled_from((1e-5, 1e-3)),
}


def offset(seed, shape, dtype=jnp.float32):
  return 1 + 2 * normal(seed, shape, dtype)


@settings(max_examples=6, deadline=None)
@given(
  shape=st.sampled_from(((4, 3), (2, 3, 4), (2, 3, 2, 3))),
  axis=st.integers(-2, 1),
  momentum=st.sampled_from((0.0, 0.9, 0.99)),
  input_dtype=FLOATS,
  options=st.fixed_dictionaries(COMMON),
)
def test_batch_norm_equals_linen(shape, axis, momentum, input_dtype, options):
  options = options | {"axis": axis, "momentum": momentum}
  model = nnx.BatchNorm(shape[axis], **options, rngs=nnx.Rngs(0))
  layer = linen.BatchNorm(**options)
  x = offset(1, shape, input_dtype)
  variables = share_weights(model, layer, x, use_running_average=False)
  variables = assert_twins(model, layer, variables, x, kwargs={"use_running_average": False})
  model.eval()
  assert_twins(model, layer, variables, x, kwargs={"use_running_average": True})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_batch_norm_over_several_steps_equals_linen(dtype):
  model, layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0)), linen.BatchNorm()
  variables = layer.init(jax.random.key(0), jnp.ones((2, 3)), use_running_average=False)
  for step in range(5):
    x = step + offset(step, (8, 3), dtype)
    variables = assert_twins(model, layer, variables, x, kwargs={"use_running_average": False})
  model.eval()
  assert_twins(model, layer, variables, x, kwargs={"use_running_average": True})


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("mask_shape", [(6, 1), (6, 3)])
def test_masked_batch_norm_equals_linen(fast, mask_shape):
  model = nnx.BatchNorm(3, use_fast_variance=fast, rngs=nnx.Rngs(0))
  layer = linen.BatchNorm(use_fast_variance=fast)
  x, mask = offset(1, (6, 3)), normal(2, mask_shape) > 0
  mask = mask.at[0].set(True)  # the statistics of nothing are NaN
  variables = share_weights(model, layer, x, use_running_average=False)
  kwargs = {"use_running_average": False, "mask": mask}
  ours = lambda model, x: model(x, mask=mask)
  assert_twins(model, layer, variables, x, ours=ours, kwargs=kwargs)


def test_batch_norm_over_a_mapped_axis_equals_linen():
  with nnx.use_hijax(False):  # JAX writes no Ref that vmap does not map
    model = nnx.BatchNorm(3, axis_name="shards", rngs=nnx.Rngs(0))
  layer = linen.BatchNorm(axis_name="shards", use_running_average=False)
  x = offset(1, (4, 5, 3))
  variables = share_weights(model, linen.BatchNorm(use_running_average=False), x)

  def ours(model, x):
    return model(x), (model.mean[...], model.var[...])

  theirs = lambda x: layer.apply(variables, x, mutable=["batch_stats"])
  got, state = jax.vmap(ours, (None, 0), axis_name="shards")(model, x)
  want, new = jax.vmap(theirs, axis_name="shards")(x)
  assert_close(got, want)
  for own, name in zip(state, ("mean", "var"), strict=True):
    assert_close(own, new["batch_stats"][name])


@settings(max_examples=6, deadline=None)
@given(
  shape=st.sampled_from(((4, 3), (2, 3, 4), (2, 3, 2, 3))),
  axes=st.sampled_from((-1, -2, 0, (-1,), (-2, -1), (0, 1), (0, -1))),
  feature_axes=st.sampled_from((-1, -2, 0, (-2, -1))),
  input_dtype=FLOATS,
  options=st.fixed_dictionaries(COMMON),
)
def test_layer_norm_equals_linen(shape, axes, feature_axes, input_dtype, options):
  options = options | {"reduction_axes": axes, "feature_axes": feature_axes}
  where = (feature_axes,) if isinstance(feature_axes, int) else feature_axes
  size = math.prod(shape[axis] for axis in where)
  model = nnx.LayerNorm(size, **options, rngs=nnx.Rngs(0))
  layer = linen.LayerNorm(**options)
  x = offset(1, shape, input_dtype)
  assert_twins(model, layer, share_weights(model, layer, x), x)


@settings(max_examples=5, deadline=None)
@given(
  shape=st.sampled_from(((4, 3), (2, 3, 4), (2, 3, 2, 3))),
  axes=st.sampled_from((-1, -2, 0, (-2, -1), (0, -1))),
  feature_axes=st.sampled_from((-1, -2, 0, (-2, -1))),
  input_dtype=FLOATS,
  options=st.fixed_dictionaries({k: v for k, v in COMMON.items() if k != "use_bias"}),
)
def test_rms_norm_equals_linen(shape, axes, feature_axes, input_dtype, options):
  options = options | {"reduction_axes": axes, "feature_axes": feature_axes}
  where = (feature_axes,) if isinstance(feature_axes, int) else feature_axes
  size = math.prod(shape[axis] for axis in where)
  model = nnx.RMSNorm(size, **options, rngs=nnx.Rngs(0))
  layer = linen.RMSNorm(**options)
  x = offset(1, shape, input_dtype)
  assert_twins(model, layer, share_weights(model, layer, x), x)


@settings(max_examples=5, deadline=None)
@given(
  shape=st.sampled_from(((2, 6), (2, 3, 6), (2, 2, 3, 6))),
  groups=st.sampled_from((1, 2, 3, 6)),
  by_size=st.booleans(),
  axes=st.sampled_from((None, (1, -1))),
  input_dtype=FLOATS,
  options=st.fixed_dictionaries(COMMON),
)
def test_group_norm_equals_linen(shape, groups, by_size, axes, input_dtype, options):
  count = {"num_groups": None, "group_size": groups} if by_size else {"num_groups": groups}
  options = options | count | {"reduction_axes": axes}
  model = nnx.GroupNorm(6, **options, rngs=nnx.Rngs(0))
  layer = linen.GroupNorm(**options)
  x = offset(1, shape, input_dtype)
  assert_twins(model, layer, share_weights(model, layer, x), x)


@settings(max_examples=5, deadline=None)
@given(
  shape=st.sampled_from(((2, 5, 3), (2, 3, 4, 2))),
  feature_axes=st.sampled_from((-1, 1, (1, -1))),
  input_dtype=FLOATS,
  options=st.fixed_dictionaries(COMMON),
)
def test_instance_norm_equals_linen(shape, feature_axes, input_dtype, options):
  options = options | {"feature_axes": feature_axes}
  where = (feature_axes,) if isinstance(feature_axes, int) else feature_axes
  model = nnx.InstanceNorm(math.prod(shape[axis] for axis in where), **options, rngs=nnx.Rngs(0))
  layer = linen.InstanceNorm(**options)
  x = offset(1, shape, input_dtype)
  assert_twins(model, layer, share_weights(model, layer, x), x)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"])
def test_masked_norms_equal_linen(name, dtype, fast):
  groups = {"num_groups": 2} if name == "GroupNorm" else {}
  model = getattr(nnx, name)(4, **groups, use_fast_variance=fast, rngs=nnx.Rngs(0))
  layer = getattr(linen, name)(**groups, use_fast_variance=fast)
  x = offset(1, (2, 5, 4), dtype)
  mask = (normal(2, (2, 5, 4)) > -0.5).at[:, :2].set(True)
  variables = share_weights(model, layer, x)
  ours = lambda model, x: model(x, mask=mask)
  assert_twins(model, layer, variables, x, ours=ours, kwargs={"mask": mask})
