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
  return (1 + 2 * normal(seed, shape)).astype(dtype)


@settings(max_examples=30, deadline=None)
@given(
  shape=st.lists(st.integers(2, 4), min_size=2, max_size=4),
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
@pytest.mark.parametrize("mask_shape", [(6, 1), (6, 3), (3,)])
def test_masked_batch_norm_equals_linen(fast, mask_shape):
  model = nnx.BatchNorm(3, use_fast_variance=fast, rngs=nnx.Rngs(0))
  layer = linen.BatchNorm(use_fast_variance=fast)
  x, mask = offset(1, (6, 3)), (normal(2, mask_shape) > -0.5).at[0].set(True)
  mask = mask | (jnp.arange(mask_shape[-1]) >= 0) if mask_shape == (3,) else mask
  variables = share_weights(model, layer, x, use_running_average=False)
  kwargs = {"use_running_average": False, "mask": mask}
  ours = lambda model, x: model(x, mask=mask)
  assert_twins(model, layer, variables, x, ours=ours, kwargs=kwargs)


@pytest.mark.parametrize("groups", [None, [[0, 1], [2, 3]]])
def test_batch_norm_over_a_mapped_axis_equals_linen(groups):
  options = {"axis_name": "shards", "axis_index_groups": groups}
  model, layer = nnx.BatchNorm(3, **options, rngs=nnx.Rngs(0)), linen.BatchNorm(**options)
  x = offset(1, (4, 5, 3))
  variables = share_weights(model, layer, x[0], use_running_average=False)
  apply = lambda x: layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
  if groups is not None:
    pytest.skip("jax.vmap has no axis_index_groups; the shard_map test covers them")
  want, new = jax.vmap(apply, axis_name="shards")(x)
  got = jax.vmap(model, axis_name="shards")(x)  # one model by closure: what it writes is shared
  assert_close(got, want)
  for name in ("mean", "var"):
    assert_close(getattr(model, name)[...], new["batch_stats"][name][0])


@settings(max_examples=30, deadline=None)
@given(
  shape=st.lists(st.integers(2, 4), min_size=2, max_size=4),
  axes=st.sampled_from((-1, -2, 0, (-1,), (-2, -1), (0, 1), (0, -1))),
  feature_axes=st.sampled_from((-1, -2, 0, (-2, -1))),
  input_dtype=FLOATS,
  options=st.fixed_dictionaries(COMMON),
)
def test_layer_norm_equals_linen(shape, axes, feature_axes, input_dtype, options):
  options = options | {"reduction_axes": axes, "feature_axes": feature_axes}
  where = (feature_axes,) if isinstance(feature_axes, int) else feature_axes
  size = jnp.zeros(shape)[..., None].size if False else 1
  for axis in where:
    size *= shape[axis]
  model = nnx.LayerNorm(size, **options, rngs=nnx.Rngs(0))
  layer = linen.LayerNorm(**options)
  x = offset(1, shape, input_dtype)
  assert_twins(model, layer, share_weights(model, layer, x), x)


def test_masked_layer_norm_equals_linen():
  model, layer = nnx.LayerNorm(5, rngs=nnx.Rngs(0)), linen.LayerNorm()
  x, mask = offset(1, (4, 5)), (normal(2, (4, 5)) > -0.5).at[:, 0].set(True)
  variables = share_weights(model, layer, x)
  ours = lambda model, x: model(x, mask=mask)
  assert_twins(model, layer, variables, x, ours=ours, kwargs={"mask": mask})
