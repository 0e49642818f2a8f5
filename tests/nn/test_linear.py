import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError, RefaxError, ShapeMismatchError


def linear(**options):
  return nnx.Linear(2, 3, rngs=nnx.Rngs(0), **options)


def test_linear_is_the_affine_map():
  model, x = linear(bias_init=nnx.initializers.ones), np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
  np.testing.assert_allclose(model(x), x @ np.asarray(model.kernel) + 1, rtol=1e-6)


def test_without_a_bias_bias_is_none_and_there_is_one_parameter():
  model = linear(use_bias=False)
  assert model.bias is None
  assert len(jax.tree.leaves(nnx.state(model))) == 1
  np.testing.assert_allclose(model(jnp.ones(2)), model.kernel[...].sum(0), rtol=1e-6)


def test_a_variable_is_an_input():
  model, x = linear(), jnp.ones((4, 2))
  np.testing.assert_array_equal(model(nnx.Variable(x)), model(x))


def test_precision_and_dot_general_are_passed_on():
  seen = {}

  def dot_general(*args, **kwargs):
    seen.update(kwargs)
    return jax.lax.dot_general(*args, **kwargs)

  linear(dot_general=dot_general, precision="highest")(jnp.ones(2))
  assert seen == {"precision": "highest"}
  y = linear(dot_general=dot_general, preferred_element_type=jnp.float32, dtype=jnp.bfloat16)
  assert y(jnp.ones(2)).dtype == jnp.float32
  assert seen["preferred_element_type"] is jnp.float32


def test_metadata_reaches_the_parameters():
  model = linear(kernel_metadata={"tag": "k"}, bias_metadata={"tag": "b"})
  assert (model.kernel.tag, model.bias.tag) == ("k", "b")


def test_promote_dtype_can_be_replaced():
  promote = lambda args, *, dtype: tuple(x.astype(jnp.float16) for x in args)
  assert linear(promote_dtype=promote)(jnp.ones(2)).dtype == jnp.float16


@pytest.mark.parametrize("shape", [(4, 5), (3,), ()])
def test_wrong_input_size_names_layer_place_shape_and_fix(shape):
  model = nnx.Sequential(linear())
  with pytest.raises(ShapeMismatchError) as error:
    model(jnp.ones(shape))
  lines = str(error.value).split("\n")
  assert lines[0] == "Linear maps vectors of size 2"
  assert lines[1].startswith("  at:  Sequential.layers[0].kernel  (Param, created at test_linear")
  assert lines[2] == f"  got: an input of shape {shape}"
  assert lines[3] == "  fix: make the last axis 2, or build Linear with the input's size"


@pytest.mark.parametrize(("sizes", "name"), [
  ((0, 3), "in_features=0"), ((2.0, 3), "in_features=2.0"), ((2, -1), "out_features=-1"),
  ((True, 3), "in_features=True"), ((2, None), "out_features=None"),
])  # fmt: skip
def test_a_size_that_is_none_is_refused(sizes, name):
  with pytest.raises(InvalidArgumentError, match=rf"got: {name}\n  fix: pass an int of at least 1"):
    nnx.Linear(*sizes, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("rngs", [0, None, nnx.RngStream(0, tag="params")])
def test_what_is_not_rngs_is_refused(rngs):
  with pytest.raises(InvalidArgumentError, match=r"got: rngs=(.|\n)*fix: pass rngs=nnx.Rngs\(0\)"):
    nnx.Linear(2, 3, rngs=rngs)


def test_an_integer_dtype_is_refused():
  with pytest.raises(RefaxError, match=r"dtype=.*int32(.|\n)*fix: pass a floating-point dtype"):
    linear(dtype=jnp.int32)(jnp.ones(2))


@pytest.mark.parametrize("hijax", [True, False])
def test_a_layer_is_a_pytree_for_jit_and_checkpoint(hijax):
  with nnx.use_hijax(hijax):
    model, x = linear(), jnp.ones((4, 2))
  want = model(x)
  apply = lambda model, x: model(x)
  np.testing.assert_allclose(jax.jit(apply)(model, x), want, rtol=1e-6)
  np.testing.assert_allclose(jax.checkpoint(apply)(model, x), want, rtol=1e-6)


def test_stacked_layers_are_mapped_and_scanned():
  rngs = nnx.Rngs(0).split(3)
  layers = jax.vmap(lambda rngs: nnx.Linear(2, 2, rngs=rngs))(rngs)
  assert layers.kernel.shape == (3, 2, 2)
  x = jnp.ones((5, 2))
  got = jax.vmap(lambda layer, x: layer(x), (0, None))(layers, x)
  np.testing.assert_allclose(got, jnp.einsum("bi,nio->nbo", x, layers.kernel[...]), rtol=1e-5)
  got, _ = jax.lax.scan(lambda x, layer: (layer(x), None), x, layers)
  for kernel in layers.kernel[...]:
    x = x @ kernel
  np.testing.assert_allclose(got, x, rtol=1e-5)


def test_layers_built_alike_have_equal_graphdefs():
  assert nnx.graphdef(linear()) == nnx.graphdef(linear())
  assert nnx.graphdef(linear()) != nnx.graphdef(linear(dtype=jnp.bfloat16))
