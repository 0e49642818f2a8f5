import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError, ShapeMismatchError


def data(shape):
  return jnp.asarray(2 + 3 * np.random.default_rng(0).standard_normal(shape), jnp.float32)


def group_norm(*args, **options):
  return nnx.GroupNorm(*args, **options, rngs=nnx.Rngs(0))


def test_groups_are_counted_or_measured():
  counted, measured = group_norm(12, 4), group_norm(12, None, 3)
  assert (counted.num_groups, counted.group_size) == (4, 3)
  assert (measured.num_groups, measured.group_size) == (4, 3)
  assert group_norm(64).num_groups == 32
  x = data((2, 5, 12))
  np.testing.assert_array_equal(counted(x), measured(x))


def test_one_group_is_a_layer_norm_and_groups_of_one_an_instance_norm():
  x = data((2, 5, 6))
  layer = nnx.LayerNorm(6, reduction_axes=(1, 2), rngs=nnx.Rngs(0))
  np.testing.assert_allclose(group_norm(6, 1)(x), layer(x), rtol=1e-5, atol=1e-5)
  instance = nnx.InstanceNorm(6, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(group_norm(6, 6)(x), instance(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("axes", "reduced"), [(-1, 3), ((1, -1), (1, 3)), ([0, 2], (0, 3))])
def test_statistics_are_taken_over_the_given_axes(axes, reduced):
  x = data((2, 5, 6))
  parts = x.reshape(2, 5, 3, 2)
  mean, root = (f(parts, reduced, keepdims=True) for f in (jnp.mean, jnp.std))
  want = ((parts - mean) / root).reshape(x.shape)
  np.testing.assert_allclose(group_norm(6, 3, reduction_axes=axes)(x), want, rtol=1e-4, atol=1e-4)


def test_instance_norm_with_features_on_other_axes():
  x = data((2, 3, 5, 4))
  model = nnx.InstanceNorm(12, feature_axes=(1, -1), rngs=nnx.Rngs(0))
  scale = model.scale[...] = data((12,))
  want = (x - x.mean(2, keepdims=True)) / x.std(2, keepdims=True) * scale.reshape(3, 1, 4)
  np.testing.assert_allclose(model(x), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("args", "got", "fix"), [
  ((12, 4, 3), "(num_groups, group_size)=(4, 3)", "one of the two"),
  ((12, None, None), "(num_groups, group_size)=(None, None)", "one of the two"),
  ((12, 5), "num_groups=5", "a divisor of num_features=12"),
  ((12, None, 5), "group_size=5", "a divisor of num_features=12"),
  ((12, 0), "num_groups=0", "an int of at least 1"),
  ((12, None, 0.5), "group_size=0.5", "an int of at least 1"),
])  # fmt: skip
def test_groups_that_make_no_sense_are_refused(args, got, fix):
  with pytest.raises(InvalidArgumentError) as error:
    group_norm(*args)
  lines = error.value.args[0].split("\n")
  assert lines[0].startswith("GroupNorm cannot work with this ")
  assert lines[1] == f"  got: {got}"
  assert lines[2].startswith(f"  fix: pass {fix}")


def test_statistics_without_features_are_refused():
  with pytest.raises(ShapeMismatchError) as error:
    group_norm(6, 3, reduction_axes=1)(data((2, 5, 6)))
  assert error.value.args[0] == (
    "GroupNorm takes statistics over features: the last axis\n"
    "  got: reduction_axes=(1,) for an input of shape (2, 5, 6)\n"
    "  fix: build GroupNorm with reduction_axes=(1, -1)"
  )


@pytest.mark.parametrize("norm", [nnx.GroupNorm, nnx.InstanceNorm])
def test_an_input_without_a_batch_axis_is_refused(norm):
  with pytest.raises(ShapeMismatchError) as error:
    norm(32, rngs=nnx.Rngs(0))(jnp.ones(32))
  assert error.value.args[0] == (
    f"{norm.__name__} takes axis 0 as the batch\n  got: an input of shape (32,)\n"
    "  fix: add a batch axis in front: x[None]"
  )


def test_features_on_the_batch_axis_are_refused():
  with pytest.raises(InvalidArgumentError) as error:
    nnx.InstanceNorm(3, feature_axes=(0, 1), rngs=nnx.Rngs(0))
  assert error.value.args[0] == (
    "InstanceNorm cannot work with this feature_axes\n  got: feature_axes=(0, 1)\n"
    "  fix: pass axes other than 0, which is the batch"
  )
  with pytest.raises(ShapeMismatchError, match=r"axis 0 as the batch\n  got: .*\(3, 4\), with"):
    nnx.InstanceNorm(3, feature_axes=-2, rngs=nnx.Rngs(0))(jnp.ones((3, 4)))
