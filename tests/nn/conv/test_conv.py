import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError, ShapeMismatchError


def conv(kernel_size=(3, 3), *, channels=(2, 4), **options):
  return nnx.Conv(*channels, kernel_size, rngs=nnx.Rngs(0), **options)


def test_an_identity_kernel_gives_the_input_back():
  delta = nnx.initializers.delta_orthogonal()
  x = jnp.arange(60.0).reshape(1, 5, 6, 2)
  y = conv(channels=(2, 2), kernel_init=delta)(x)
  np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3), (0,), (2, 0, 3)])
def test_batch_axes_are_kept_and_do_not_mix(batch):
  model, x = conv(), jax.random.normal(jax.random.key(1), (*batch, 5, 5, 2))
  y = model(x)
  assert y.shape == (*batch, 5, 5, 4)
  each = [model(one) for one in x.reshape(-1, 5, 5, 2)]
  if each:
    np.testing.assert_allclose(y.reshape(-1, 5, 5, 4), jnp.stack(each), rtol=1e-4, atol=1e-5)


def test_causal_padding_sees_only_the_past():
  model, x = conv(3, padding="CAUSAL", kernel_dilation=2), jnp.ones((8, 2))
  y = model(x)
  assert y.shape == (8, 4)
  np.testing.assert_array_equal(model(x.at[5:].set(7.0))[:5], y[:5])
  assert (model(x.at[5:].set(7.0))[5:] != y[5:]).all()


def test_circular_padding_commutes_with_a_rotation():
  model, x = conv(3, padding="CIRCULAR"), jax.random.normal(jax.random.key(1), (8, 2))
  np.testing.assert_allclose(model(jnp.roll(x, 3, 0)), jnp.roll(model(x), 3, 0), atol=1e-5)


def test_reflect_padding_of_a_constant_is_constant():
  y = conv(padding="reflect")(jnp.ones((5, 5, 2)))
  np.testing.assert_allclose(y, jnp.broadcast_to(y[2, 2], y.shape), rtol=1e-5, atol=1e-6)


def test_groups_do_not_see_each_other():
  model = conv(feature_group_count=2)
  assert model.kernel.shape == model.kernel_shape == (3, 3, 1, 4)
  x = jnp.ones((5, 5, 2))
  y = model(x.at[..., 1].set(9.0))
  np.testing.assert_array_equal(y[..., :2], model(x)[..., :2])
  assert (y[..., 2:] != model(x)[..., 2:]).all()


def test_a_mask_is_an_array_of_the_layer_and_multiplies_the_kernel():
  mask = np.zeros((3, 3, 2, 4), np.int32)
  model = conv(mask=mask)
  assert isinstance(model.mask, jax.Array)
  assert len(jax.tree.leaves(nnx.split(model)[1])) == 3
  assert not model(jnp.ones((5, 5, 2))).any()
  model.mask = None
  assert model(jnp.ones((5, 5, 2))).any()


def test_a_mask_does_not_change_the_dtype():
  model = conv(mask=np.ones((3, 3, 2, 4), np.float32), param_dtype=jnp.bfloat16)
  assert model(jnp.ones((5, 5, 2), jnp.bfloat16)).dtype == jnp.bfloat16


def test_lists_of_arguments_leave_the_layer_hashable():
  model = conv([3, 3], strides=[2, 1], padding=[[1, 1], 0], kernel_dilation=[1, 1])
  assert (model.kernel_size, model.strides, model.padding) == ((3, 3), (2, 1), ((1, 1), (0, 0)))
  assert hash(nnx.graphdef(model)) == hash(nnx.graphdef(model))
  assert jax.jit(lambda model, x: model(x))(model, jnp.ones((5, 5, 2))).shape == (3, 3, 4)


def test_conv_general_dilated_can_be_replaced():
  seen = {}

  def convolve(*args, **kwargs):
    seen.update(kwargs)
    return jax.lax.conv_general_dilated(*args, **kwargs)

  conv(conv_general_dilated=convolve, precision="highest")(jnp.ones((5, 5, 2)))
  assert seen["precision"] == "highest"
  assert not {"preferred_element_type", "out_sharding"} & set(seen)
  wide = conv(conv_general_dilated=convolve, preferred_element_type=jnp.float32)
  wide(jnp.ones((5, 5, 2)))
  assert seen["preferred_element_type"] is jnp.float32


def test_wrong_channels_name_layer_place_axis_and_fix():
  model = nnx.Sequential(conv())
  with pytest.raises(ShapeMismatchError) as error:
    model(jnp.ones((1, 2, 5, 5)))
  lines = error.value.args[0].split("\n")
  assert lines[0] == "Conv was built for 2 features"
  assert lines[1].startswith("  at:  Sequential.layers[0].kernel  (Param, created at test_conv.py:")
  assert lines[2] == "  got: an input of shape (1, 2, 5, 5), with 5 on axis 3"
  assert lines[3] == "  fix: pass an input with 2 features on axis 3, or build Conv with 5"


def test_too_few_axes_are_refused():
  with pytest.raises(ShapeMismatchError) as error:
    conv()(jnp.ones((5, 2)))
  assert str(error.value).startswith(
    "Conv works on 2 spatial axes and one of channels\n  at:  Conv."
  )
  assert error.value.args[0].endswith(
    "got: an input of shape (5, 2)\n  fix: pass an input of shape (..., size, size, channels)"
  )


@pytest.mark.parametrize(("options", "got", "fix"), [
  ({"padding": "FULL"}, "padding='FULL'", "SAME, VALID, CIRCULAR, CAUSAL, REFLECT, an int, or 2"),
  ({"padding": (1, 2, 3)}, "padding=(1, 2, 3)", "2 ints or (low, high) pairs"),
  ({"padding": ((1, 2, 3), 1)}, "padding=((1, 2, 3), 1)", "(low, high) pairs"),
  ({"padding": 0.5}, "padding=0.5", "an int"),
  ({"padding": "CAUSAL"}, "padding='CAUSAL'", "CAUSAL with one spatial axis"),
  ({"padding": "SAME", "input_dilation": 2}, "padding='SAME'", "if there is an input_dilation"),
  ({"strides": (1, 2, 3)}, "strides=(1, 2, 3)", "an int, or 2 ints"),
  ({"strides": 0}, "strides=0", "an int of at least 1"),
  ({"kernel_dilation": (1, 0)}, "kernel_dilation=0", "an int of at least 1"),
  ({"input_dilation": 1.5}, "input_dilation=1.5", "an int of at least 1"),
  ({"kernel_size": (3, -3)}, "kernel_size=-3", "an int of at least 1"),
  ({"feature_group_count": 3}, "feature_group_count=3", "in_features=2 and out_features=4"),
])  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(options, got, fix):
  with pytest.raises(InvalidArgumentError) as error:
    conv(**options)
  assert str(error.value).startswith("Conv cannot work with this ")
  assert f"got: {got}\n" in str(error.value)
  assert fix in str(error.value)


def test_a_mask_of_another_shape_is_refused():
  with pytest.raises(ShapeMismatchError, match=r"mask of Conv(.|\n)*\(3, 3\)(.|\n)*\(3, 3, 2, 4\)"):
    conv(mask=jnp.ones((3, 3)))
  model = conv()
  model.mask = jnp.ones((3, 3))
  with pytest.raises(ShapeMismatchError, match="mask of Conv has to have the kernel's shape"):
    model(jnp.ones((5, 5, 2)))


@pytest.mark.parametrize("hijax", [True, False])
def test_a_layer_is_a_pytree_for_jit_vmap_and_checkpoint(hijax):
  with nnx.use_hijax(hijax):
    model, x = conv(mask=jnp.ones((3, 3, 2, 4))), jnp.ones((2, 5, 5, 2))
  want, apply = model(x), lambda model, x: model(x)
  for transform in (jax.jit, jax.checkpoint, lambda f: jax.vmap(f, (None, 0))):
    np.testing.assert_allclose(transform(apply)(model, x), want, rtol=1e-4, atol=1e-5)


def test_stacked_layers_are_mapped():
  layers = jax.vmap(lambda rngs: nnx.Conv(2, 4, 3, rngs=rngs))(nnx.Rngs(0).split(3))
  x = jnp.ones((3, 6, 2))
  got = jax.vmap(lambda layer, x: layer(x))(layers, x)
  assert got.shape == (3, 6, 4)
  assert not np.allclose(got[0], got[1])
