import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError, ShapeMismatchError

NORMS = [nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm]


def data(shape=(4, 5, 6), seed=0, dtype=jnp.float32):
  return jnp.asarray(2 + 3 * np.random.default_rng(seed).standard_normal(shape), dtype)


def build(norm, size=6, **options):
  if norm is nnx.GroupNorm:
    options = {"num_groups": 3, **options}
  return norm(size, rngs=nnx.Rngs(0), **options)


def by_hand(norm, x, mask=None):
  """What a new layer makes of `x`, `[batch, time, feature]`."""
  x = np.asarray(x, np.float64)
  shape = x.shape
  if norm is nnx.GroupNorm:
    x = x.reshape(*shape[:2], 3, 2)
  mask = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, shape).reshape(x.shape)
  axes = {"BatchNorm": (0, 1), "GroupNorm": (1, 3), "InstanceNorm": 1}.get(norm.__name__, 2)
  mean = 0.0 if norm is nnx.RMSNorm else x.mean(axes, keepdims=True, where=mask)
  y = (x - mean) / np.sqrt(((x - mean) ** 2).mean(axes, keepdims=True, where=mask))
  return y.reshape(shape)


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_a_new_layer_normalizes_and_no_more(norm, fast):
  close(build(norm, use_fast_variance=fast)(data()), by_hand(norm, data()))


@pytest.mark.parametrize("norm", NORMS)
def test_what_the_mask_leaves_out_does_not_count(norm):
  mask = np.random.default_rng(1).random((4, 5, 6)) < 0.7
  mask[0] = mask[:, 0] = mask[..., 0] = mask[..., 2] = mask[..., 4] = True  # NaN where none is left
  y = build(norm)(jnp.where(mask, data(), 1e3), mask=mask)
  close(np.where(mask, y, 0), np.where(mask, by_hand(norm, data(), mask), 0))


@pytest.mark.parametrize("norm", NORMS)
def test_a_mask_broadcasts(norm):
  mask = (np.arange(5) < 3)[:, None]
  got = build(norm)(data(), mask=mask)
  close(got, build(norm)(data(), mask=np.broadcast_to(mask, (4, 5, 6))))


@pytest.mark.parametrize("norm", NORMS)
def test_a_mask_of_numbers_counts_what_is_not_0(norm):
  mask = jnp.asarray(np.random.default_rng(1).integers(0, 3, (4, 5, 6)))
  got, want = (build(norm)(data(), mask=m) for m in (mask, mask > 0))
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("norm", [nnx.LayerNorm, nnx.RMSNorm])
def test_statistics_over_several_axes(norm):
  x = data((2, 3, 4))
  model = norm(12, reduction_axes=[-2, -1], feature_axes=(1, 2), rngs=nnx.Rngs(0))
  scale = model.scale[...] = data((12,))
  mean = 0.0 if norm is nnx.RMSNorm else x.mean((1, 2), keepdims=True)
  root = jnp.sqrt(((x - mean) ** 2).mean((1, 2), keepdims=True))
  close(model(x), (x - mean) / root * scale.reshape(3, 4))


@pytest.mark.parametrize("norm", NORMS)
def test_without_scale_and_bias_there_are_no_parameters(norm):
  no_bias = {} if norm is nnx.RMSNorm else {"use_bias": False}
  model = build(norm, use_scale=False, **no_bias)
  assert model.scale is None
  assert model.bias is None
  assert not jax.tree.leaves(nnx.state(model, nnx.Param))
  close(model(data()), by_hand(norm, data()))


@pytest.mark.parametrize("norm", NORMS)
def test_metadata_reaches_the_parameters(norm):
  bias = {} if norm is nnx.RMSNorm else {"bias_metadata": {"tag": "b"}}
  model = build(norm, scale_metadata={"tag": "s"}, **bias)
  assert model.scale.tag == "s"
  assert norm is nnx.RMSNorm or model.bias.tag == "b"


@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_comes_back_and_is_computed_in_float32(norm):
  x = jnp.full((1, 512, 6), 3.0, jnp.bfloat16).at[:, ::2].set(5.0)
  y = build(norm, dtype=jnp.bfloat16)(x)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), build(norm)(x.astype(jnp.float32)), rtol=1e-2)


@pytest.mark.parametrize("hijax", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_a_layer_under_transforms(norm, hijax):
  with nnx.use_hijax(hijax):
    model = build(norm)
  apply, want = lambda model, x: model(x), by_hand(norm, data())
  for transform in (jax.jit, nnx.jit, nnx.remat, jax.checkpoint):
    close(transform(apply)(model, data()), want)
  close(nnx.merge(*nnx.split(model))(data()), want)
  gradient = nnx.grad(lambda model: (model(data()) ** 2).sum())(model)
  close(gradient["scale"][...], 2 * (want**2).sum((0, 1)))


@pytest.mark.parametrize("norm", NORMS)
def test_stacked_layers_are_mapped(norm):
  models = nnx.vmap(lambda rngs: build(norm))(nnx.Rngs(0).split(3))
  xs = data((3, 4, 5, 6))
  got = nnx.vmap(lambda model, x: model(x))(models, xs)
  close(got, np.stack([by_hand(norm, x) for x in xs]))


@pytest.mark.parametrize("norm", [nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm])
def test_statistics_over_a_mapped_axis(norm):
  """The parts of an axis, mapped one by one, give what the whole gives."""
  spatial = norm in (nnx.GroupNorm, nnx.InstanceNorm)
  x, axis, size = (data((4, 6, 6)), 1, 6) if spatial else (data(), 2, 3)
  parts = jnp.stack(jnp.split(x, 2, axis))
  model = build(norm, size, axis_name="parts")
  got = jax.vmap(lambda x: model(x), axis_name="parts")(parts)
  close(jnp.concatenate(list(got), axis), by_hand(norm, x))


@pytest.mark.parametrize("norm", NORMS)
def test_layers_built_alike_have_equal_graphdefs(norm):
  groups = [[0, 1], [2, 3]]
  one, other = (build(norm, axis_index_groups=groups) for _ in range(2))
  assert nnx.graphdef(one) == nnx.graphdef(other)
  assert hash(nnx.graphdef(one)) == hash(nnx.graphdef(other))
  assert nnx.graphdef(one) != nnx.graphdef(build(norm))


@pytest.mark.parametrize("norm", NORMS)
def test_wrong_features_name_layer_place_axis_and_fix(norm):
  at = "BatchNorm.mean  (BatchStat" if norm is nnx.BatchNorm else f"{norm.__name__}.scale  (Param"
  with pytest.raises(ShapeMismatchError) as error:
    build(norm)(jnp.ones((2, 3, 5)))
  lines = error.value.args[0].split("\n")
  assert lines[0] == f"{norm.__name__} was built for 6 features"
  assert lines[1].startswith(f"  at:  {at}, created at test_layer_norm.py:")
  assert lines[2] == "  got: an input of shape (2, 3, 5), with 5 on axis 2"
  assert lines[3] == (
    f"  fix: pass an input with 6 features on axis 2, or build {norm.__name__} with 5"
  )


@pytest.mark.parametrize(("norm", "options", "axis"), [
  (nnx.BatchNorm, {"axis": 3}, 3),
  (nnx.LayerNorm, {"reduction_axes": (-4, -1)}, -4),
  (nnx.RMSNorm, {"reduction_axes": (-4, -1)}, -4),
  (nnx.GroupNorm, {"reduction_axes": (3, -1)}, 3),
  (nnx.InstanceNorm, {"feature_axes": -4}, -4),
])  # fmt: skip
def test_an_axis_that_the_input_lacks_is_refused(norm, options, axis):
  name = norm.__name__
  with pytest.raises(ShapeMismatchError) as error:
    build(norm, **options)(data())
  assert error.value.args[0] == (
    f"{name} works on axis {axis}\n  got: an input of shape (4, 5, 6)\n"
    f"  fix: pass an input that has this axis, or build {name} for another one"
  )


@pytest.mark.parametrize("shape", [(4,), (2, 4, 5, 6), (2, 1)])
@pytest.mark.parametrize("norm", NORMS)
def test_a_mask_that_does_not_broadcast_is_refused(norm, shape):
  model = build(norm)
  before = jax.tree.map(jnp.array, nnx.state(nnx.to_lojax(model)))
  with pytest.raises(ShapeMismatchError) as error:
    model(data(), mask=jnp.ones(shape, bool))
  assert error.value.args[0] == (
    f"the mask of {norm.__name__} has to broadcast to the input\n"
    f"  got: a mask of shape {shape} for an input of shape (4, 5, 6)\n"
    "  fix: give it axes of size 1 where it is to be repeated: mask[:, None]"
  )
  after = nnx.state(nnx.to_lojax(model))
  jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("norm", NORMS)
def test_no_features_and_no_rngs_are_refused(norm):
  name = norm.__name__
  with pytest.raises(InvalidArgumentError, match=rf"{name} cannot .*\n  got: num_features=0"):
    build(norm, 0)
  with pytest.raises(InvalidArgumentError, match=rf"{name} cannot .*\n  got: rngs=0"):
    norm(64, rngs=0)
