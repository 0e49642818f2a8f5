import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError, ShapeMismatchError


def conv(kernel_size=(3, 3), *, channels=(2, 4), **options):
  return nnx.ConvTranspose(*channels, kernel_size, rngs=nnx.Rngs(0), **options)


def normal(shape, seed=1):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(("padding", "size"), [
  ("SAME", 12), ("same", 12), ("VALID", 13), ("CIRCULAR", 12), (1, 11), ((1,), 11), ([[1, 2]], 12),
])  # fmt: skip
def test_the_size_of_the_output(padding, size):
  assert conv(3, strides=2, padding=padding)(jnp.ones((5, 6, 2))).shape == (5, size, 4)


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR"])
@pytest.mark.parametrize("strides", [1, (2, 1)])
@pytest.mark.parametrize("kernel_size", [(3, 3), (2, 4)])
def test_with_the_kernel_transposed_it_is_the_gradient_of_conv(padding, strides, kernel_size):
  if padding == "CIRCULAR":  # Flax aligns strides and even kernels in another way than Conv
    strides, kernel_size = 1, (3, 5)
  options = {"padding": padding, "strides": strides, "use_bias": False}
  model = conv(kernel_size, channels=(4, 2), transpose_kernel=True, **options)
  forward = nnx.Conv(2, 4, kernel_size, **options, rngs=nnx.Rngs(1))
  forward.kernel[...] = model.kernel[...]
  # Where a stride leaves a rest the gradient has zeros at the end.
  large = jnp.zeros((1, 9, 9, 2) if padding == "VALID" and strides != 1 else (1, 8, 8, 2))
  y, back = jax.vjp(forward, large)
  x = normal(y.shape)
  np.testing.assert_allclose(model(x)[:, :8, :8], back(x)[0][:, :8, :8], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 9])
def test_circular_padding_commutes_with_a_rotation(kernel_size, strides):
  model, x = conv(kernel_size, padding="CIRCULAR", strides=strides), normal((4, 2))
  assert model(x).shape == (4 * strides, 4)
  want = jnp.roll(model(x), 3 * strides, 0)
  np.testing.assert_allclose(model(jnp.roll(x, 3, 0)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)])
def test_batch_axes_are_kept_and_do_not_mix(batch):
  model, x = conv(strides=2), normal((*batch, 5, 5, 2))
  y = model(x)
  assert y.shape == (*batch, 10, 10, 4)
  each = [model(one) for one in x.reshape(-1, 5, 5, 2)]
  if each:
    np.testing.assert_allclose(y.reshape(-1, 10, 10, 4), jnp.stack(each), rtol=1e-4, atol=1e-5)


def test_a_mask_is_an_array_of_the_layer_and_multiplies_the_kernel():
  model = conv(mask=np.zeros((3, 3, 2, 4), np.int32))
  assert isinstance(model.mask, jax.Array)
  assert not model(jnp.ones((5, 5, 2))).any()
  model.mask = None
  assert model(jnp.ones((5, 5, 2))).any()
  half = conv(mask=np.ones((3, 3, 2, 4), np.float32), param_dtype=jnp.bfloat16)
  assert half(jnp.ones((5, 5, 2), jnp.bfloat16)).dtype == jnp.bfloat16


def test_shapes_of_kernel_and_bias_and_their_metadata():
  meta = {"kernel_metadata": {"tag": "k"}, "bias_metadata": {"tag": "b"}}
  model = conv(**meta)
  assert model.kernel.shape == model.kernel_shape == (3, 3, 2, 4)
  assert (model.kernel.tag, model.bias.tag) == ("k", "b")
  assert conv(transpose_kernel=True).kernel.shape == (3, 3, 4, 2)
  assert conv(use_bias=False).bias is None
  assert conv(preferred_element_type=jnp.float32, dtype=jnp.bfloat16, use_bias=False)(
    jnp.ones((5, 5, 2))
  ).dtype == jnp.float32  # fmt: skip


def test_wrong_channels_name_layer_place_axis_and_fix():
  with pytest.raises(ShapeMismatchError) as error:
    nnx.Sequential(conv())(jnp.ones((1, 2, 5, 5)))
  lines = error.value.args[0].split("\n")
  assert lines[0] == "ConvTranspose was built for 2 features"
  assert lines[1].startswith("  at:  Sequential.layers[0].kernel  (Param, created at test_conv_tr")
  assert lines[2] == "  got: an input of shape (1, 2, 5, 5), with 5 on axis 3"
  assert lines[3] == "  fix: pass an input with 2 features on axis 3, or build ConvTranspose with 5"


def test_too_few_axes_are_refused():
  with pytest.raises(ShapeMismatchError) as error:
    conv()(jnp.ones((5, 2)))
  lines = error.value.args[0].split("\n")
  assert lines[0] == "ConvTranspose works on 2 spatial axes and one of channels"
  assert lines[3] == "  fix: pass an input of shape (..., size, size, channels)"


def test_a_mask_of_another_shape_is_refused():
  with pytest.raises(ShapeMismatchError) as error:
    conv(mask=np.ones((3, 3, 4, 2)))
  lines = error.value.args[0].split("\n")
  assert lines[0] == "the mask of ConvTranspose has to have the kernel's shape"
  assert lines[2:] == ["  got: a mask of shape (3, 3, 4, 2)",
                       "  fix: pass a mask of shape (3, 3, 2, 4)"]  # fmt: skip


@pytest.mark.parametrize(("options", "got", "fix"), [
  ({"padding": "CAUSAL"}, "padding='CAUSAL'", "SAME, VALID, CIRCULAR, an int, or 2 ints or (low"),
  ({"padding": (1, 2, 3)}, "padding=(1, 2, 3)", "SAME, VALID"),
  ({"strides": (1, 2, 3)}, "strides=(1, 2, 3)", "an int, or 2 ints"),
  ({"kernel_dilation": 0}, "kernel_dilation=0", "an int of at least 1"),
  ({"channels": (0, 1)}, "in_features=0", "an int of at least 1"),
  ({"channels": (1, 2.5)}, "out_features=2.5", "an int of at least 1"),
])  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(options, got, fix):
  with pytest.raises(InvalidArgumentError) as error:
    conv(**options)
  lines = error.value.args[0].split("\n")
  assert lines[0].startswith("ConvTranspose cannot work with this ")
  assert lines[1] == f"  got: {got}"
  assert lines[2].startswith(f"  fix: pass {fix}")


@pytest.mark.parametrize("hijax", [True, False])
def test_a_layer_under_transforms(hijax):
  with nnx.use_hijax(hijax):
    model = conv([3, 3], strides=[2, 1], padding="CIRCULAR", kernel_dilation=[1, 1])
  apply, x = lambda model, x: model(x), normal((3, 5, 6, 2))
  want = model(x)
  for transform in (jax.jit, nnx.jit, nnx.remat, lambda f: jax.vmap(f, (None, 0))):
    np.testing.assert_allclose(transform(apply)(model, x), want, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(nnx.merge(*nnx.split(model))(x), want, rtol=1e-5, atol=1e-6)
  assert hash(nnx.graphdef(model)) == hash(nnx.graphdef(model))


def test_stacked_layers_are_mapped():
  layers = nnx.vmap(lambda rngs: nnx.ConvTranspose(2, 4, 3, rngs=rngs))(nnx.Rngs(0).split(3))
  got = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, jnp.ones((6, 2)))
  assert got.shape == (3, 6, 4)
  assert not np.allclose(got[0], got[1])
