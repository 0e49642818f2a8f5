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
  lines = error.value.args[0].split("\n")
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


def general(*args, **options):
  return nnx.LinearGeneral(*args, rngs=nnx.Rngs(0), **options)


def test_linear_general_of_one_axis_is_linear():
  x = jax.random.normal(jax.random.key(0), (4, 2))
  np.testing.assert_allclose(general(2, 3)(x), linear()(x), rtol=1e-6)


@pytest.mark.parametrize(("axis", "shape", "spec"), [
  (-1, (2, 5, 6), "abc,cxy->abxy"), (1, (2, 6, 5), "acb,cxy->abxy"), (0, (6, 5), "cb,cxy->bxy"),
])  # fmt: skip
def test_linear_general_maps_one_axis_to_two(axis, shape, spec):
  model = general(6, (3, 4), axis=axis, bias_init=nnx.initializers.ones)
  x = jax.random.normal(jax.random.key(0), shape)
  assert (model.kernel.shape, model.bias.shape) == ((6, 3, 4), (3, 4))
  np.testing.assert_allclose(model(x), jnp.einsum(spec, x, model.kernel[...]) + 1, rtol=1e-4)


@pytest.mark.parametrize("axis", [(0, 2), (2, 0), (-1, -3), (-3, 2)])
def test_linear_general_takes_axes_in_the_order_of_the_input(axis):
  model = general((2, 3), 4, axis=axis)
  x = jax.random.normal(jax.random.key(0), (2, 5, 3))
  want = jnp.einsum("abc,acx->bx", x, model.kernel[...])
  np.testing.assert_allclose(model(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_axis", [{0: 2, 1: 3}, {1: 3, 0: 2}])
def test_linear_general_has_weights_for_each_index_of_the_batch_axes(batch_axis):
  model = general(4, 5, batch_axis=batch_axis, bias_init=nnx.initializers.normal())
  x = jax.random.normal(jax.random.key(0), (2, 3, 7, 4))
  kernel, bias = model.kernel[...], model.bias[...]
  assert (kernel.shape, bias.shape) == ((2, 3, 4, 5), (2, 3, 5))
  for i in range(2):
    for j in range(3):
      want = x[i, j] @ kernel[i, j] + bias[i, j]
      np.testing.assert_allclose(model(x)[i, j], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch_axis", "fan_in"), [({}, 600), ({0: 5}, 3000)])
def test_linear_general_is_initialised_for_all_inputs_of_an_output(batch_axis, fan_in):
  kernel = general((20, 30), (10, 50), axis=(-2, -1), batch_axis=batch_axis).kernel[...]
  np.testing.assert_allclose(kernel.std(), fan_in**-0.5, rtol=0.01)
  shapes = []

  def init(key, shape, dtype):
    shapes.append(shape)
    return jnp.zeros(shape, dtype)

  general((2, 3), (4, 5), axis=(1, 2), batch_axis={0: 7}, kernel_init=init, bias_init=init)
  assert shapes == [(42, 20), (140,)]


def test_linear_general_without_a_bias_has_one_parameter():
  model = general(2, (3, 4), use_bias=False)
  assert model.bias is None
  assert len(jax.tree.leaves(nnx.state(model))) == 1
  assert model(jnp.ones((5, 2))).shape == (5, 3, 4)


def test_linear_general_passes_options_on():
  seen = {}

  def dot_general(*args, **kwargs):
    seen.update(kwargs)
    return jax.lax.dot_general(*args, **kwargs)

  general(2, 3, dot_general=dot_general, precision="highest")(jnp.ones(2))
  assert seen == {"precision": "highest"}
  seen.clear()
  options = {"dot_general_cls": lambda: dot_general, "preferred_element_type": jnp.float32}
  general(2, 3, **options)(jnp.ones(2))
  assert seen == {"precision": None, "preferred_element_type": jnp.float32}
  model = general(2, 3, kernel_metadata={"tag": "k"}, bias_metadata={"tag": "b"})
  assert (model.kernel.tag, model.bias.tag) == ("k", "b")


@pytest.mark.parametrize(("options", "shape", "lines"), [
  ({}, (5, 3, 2), [
    "LinearGeneral maps axes of sizes (2, 3)",
    "got: an input of shape (5, 3, 2), with (3, 2) on axes (1, 2)",
    "fix: pass an input with (2, 3) on these axes, or build LinearGeneral with (3, 2)"]),
  ({"batch_axis": {0: 7}}, (5, 2, 3), [
    "LinearGeneral has batch axes of sizes (7,)",
    "got: an input of shape (5, 2, 3), with (5,) on axes (0,)",
    "fix: pass an input with (7,) on these axes, or build LinearGeneral with (5,)"]),
  ({"batch_axis": {0: 2}}, (2, 3), [
    "LinearGeneral cannot map a batch axis",
    "got: an input of shape (2, 3), with batch axes (0,) and axis=(-2, -1)",
    "fix: pass an input with more axes, or build LinearGeneral with another axis="]),
])  # fmt: skip
def test_linear_general_of_other_sizes_is_refused(options, shape, lines):
  with pytest.raises(ShapeMismatchError) as error:
    general((2, 3), 4, axis=(-2, -1), **options)(jnp.ones(shape))
  text = [line.strip() for line in error.value.args[0].split("\n")]
  assert text[1].startswith("at:  LinearGeneral.kernel  (Param, created at test_linear.py")
  assert [text[0], *text[2:]] == lines


def test_linear_general_of_an_input_without_the_axis_is_refused():
  with pytest.raises(ShapeMismatchError, match=r"LinearGeneral works on axis -2\n  got: .* \(3,\)"):
    general((2, 3), 4, axis=(-2, -1))(jnp.ones(3))


@pytest.mark.parametrize(("args", "options", "got", "fix"), [
  (((2, 0), 3), {"axis": (0, 1)}, "in_features=0", "an int of at least 1"),
  ((2, (3, 1.5)), {}, "out_features=1.5", "an int of at least 1"),
  (((2, 3), 4), {}, "axis=-1", "2 axes, one for each of in_features=(2, 3)"),
  ((2, 3), {"batch_axis": {1: 4}}, "batch_axis={1: 4}", "leading axes and their sizes: {0: 7}"),
  ((2, 3), {"batch_axis": {-3: 4}}, "batch_axis={-3: 4}", "leading axes and their sizes"),
  ((2, 3), {"batch_axis": {0: 0}}, "batch_axis[0]=0", "an int of at least 1"),
])  # fmt: skip
def test_linear_general_that_makes_no_sense_is_refused(args, options, got, fix):
  with pytest.raises(InvalidArgumentError) as error:
    general(*args, **options)
  lines = error.value.args[0].split("\n")
  assert lines[1] == f"  got: {got}"
  assert lines[2].startswith(f"  fix: pass {fix}")


@pytest.mark.parametrize("hijax", [True, False])
def test_linear_general_under_transforms(hijax):
  with nnx.use_hijax(hijax):
    model = general((2, 3), (4, 5), axis=(-2, -1), batch_axis={0: 7})
  x = jax.random.normal(jax.random.key(0), (7, 6, 2, 3))
  apply, want = lambda model, x: model(x), model(x)
  for transform in (jax.jit, nnx.jit, nnx.remat):
    np.testing.assert_allclose(transform(apply)(model, x), want, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(nnx.merge(*nnx.split(model))(x), want, rtol=1e-6)
  layers = nnx.vmap(lambda rngs: nnx.LinearGeneral(2, (3, 4), rngs=rngs))(nnx.Rngs(0).split(3))
  got = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, jnp.ones((5, 2)))
  assert got.shape == (3, 5, 3, 4)
  assert not np.allclose(got[0], got[1])
  assert nnx.graphdef(general(2, 3, batch_axis={0: 7})) == nnx.graphdef(
    general(2, 3, batch_axis={0: 7})
  )


@pytest.mark.parametrize("make", [nnx.Linear, nnx.LinearGeneral])
@pytest.mark.parametrize("given", ["nothing", "promote_dtype", "dot_general"])
def test_a_later_step_takes_nothing_that_a_layer_has_given_away(make, given):
  kept = []

  def promote_dtype(xs, **_):
    kept.extend(xs)
    return xs

  def dot_general(x, kernel, *args, **kwargs):
    kept.append(kernel)
    return jax.lax.dot_general(x, kernel, *args, **kwargs)

  functions = {"promote_dtype": promote_dtype, "dot_general": dot_general}
  options = {given: functions[given]} if given in functions else {}
  model, x = make(2, 3, rngs=nnx.Rngs(0), **options), jnp.ones((4, 2))
  y = model(x)
  own = [v.get_raw_value()._refs._buf.unsafe_buffer_pointer() for v in (model.kernel, model.bias)]
  assert all(array.unsafe_buffer_pointer() not in own for array in (*kept, y))
  before = [np.array(array) for array in (*kept, y)]

  @nnx.jit
  def step(model):
    model.kernel[...] += 1
    model.bias[...] += 1

  step(model)
  for array, want in zip((*kept, y), before, strict=True):
    np.testing.assert_array_equal(array, want)
  assert not np.allclose(model(x), before[-1])


@pytest.mark.parametrize("make", [nnx.Linear, nnx.LinearGeneral])
def test_an_array_may_take_the_place_of_a_parameter(make):
  model = make(2, 3, use_bias=False, rngs=nnx.Rngs(0))
  del model.kernel
  model.kernel = nnx.data(jnp.ones((2, 3)))
  np.testing.assert_array_equal(model(jnp.ones((1, 2))), [[2, 2, 2]])
