import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError, ShapeMismatchError


def normal(shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def lora(*sizes, **options):
  return nnx.LoRA(*(sizes or (3, 2, 4)), rngs=nnx.Rngs(0), **options)


def lora_linear(**options):
  return nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0), **options)


def values(model, *filters):
  return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(nnx.to_lojax(model), *filters)))


class Net(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.LoRALinear(3, 8, lora_rank=2, rngs=rngs)
    self.norm = nnx.LayerNorm(8, rngs=rngs)
    self.last = nnx.LoRA(8, 2, 1, base_module=nnx.Linear(8, 1, rngs=rngs), rngs=rngs)

  def __call__(self, x):
    return self.last(nnx.tanh(self.norm(self.first(x))))


def test_at_first_a_lora_changes_nothing():
  assert not lora()(normal((5, 3))).any()
  assert not lora().lora_b[...].any()
  assert lora().lora_a[...].any()
  base = nnx.Linear(3, 4, rngs=nnx.Rngs(1))
  np.testing.assert_array_equal(lora(base_module=base)(normal((5, 3))), base(normal((5, 3))))
  model = lora_linear()
  want = normal((5, 3)) @ model.kernel[...] + model.bias[...]
  np.testing.assert_allclose(model(normal((5, 3))), want, rtol=1e-5)


def test_the_product_is_added_to_the_base():
  ones, x = nnx.initializers.ones, normal((5, 3))
  model = lora(b_initializer=ones, base_module=lambda x, scale: scale * jnp.ones((5, 4)))
  want = (x @ model.lora_a[...]).sum(-1, keepdims=True) + 3
  np.testing.assert_allclose(model(x, scale=3), want.repeat(4, -1), rtol=1e-4, atol=1e-5)
  linear = lora_linear(a_initializer=ones, b_initializer=ones, use_bias=False)
  want = x @ linear.kernel[...] + 2 * x.sum(-1, keepdims=True)
  np.testing.assert_allclose(linear(x), want, rtol=1e-4, atol=1e-5)
  assert linear.bias is None


def test_alpha_scales_the_product():
  options = {"b_initializer": nnx.initializers.ones}
  want = lora(**options)(normal((5, 3)))
  scaled = lora(alpha=6, **options)
  np.testing.assert_allclose(scaled(normal((5, 3))), 3 * want, rtol=1e-5)
  assert (scaled.scale, lora().scale) == (3, 1)


@pytest.mark.parametrize(("inputs", "outputs"), [(6, (2, 4)), ((2, 3), 5), ((2, 3), (4, 2))])
def test_several_axes_are_mapped_as_by_a_linear_general(inputs, outputs):
  axes = (-1,) if isinstance(inputs, int) else (-2, -1)
  base = nnx.LinearGeneral(inputs, outputs, axis=axes, rngs=nnx.Rngs(1))
  model = lora(inputs, 2, outputs, base_module=base, b_initializer=nnx.initializers.normal())
  x = normal((7, 5, *((inputs,) if isinstance(inputs, int) else inputs)))
  a, b = np.asarray(model.lora_a[...]), np.asarray(model.lora_b[...])
  want = base(x) + np.tensordot(np.tensordot(x, a, len(axes)), b, 1)
  np.testing.assert_allclose(model(x), want, rtol=1e-4, atol=1e-5)
  assert (model.in_features, model.out_features) == (inputs, outputs)


def test_sizes_of_several_axes_that_do_not_fit_are_named():
  with pytest.raises(ShapeMismatchError) as error:
    lora((2, 3), 2, 4)(jnp.ones((5, 3, 2)))
  lines = error.value.args[0].split("\n")
  assert lines[0] == "LoRA maps axes of sizes (2, 3)"
  assert lines[1].startswith("  at:  LoRA.lora_a  (LoRAParam")
  assert lines[2] == "  got: an input of shape (5, 3, 2)"
  assert lines[3] == "  fix: make the last axes (2, 3), or build LoRA with the input's sizes"


def test_attention_with_a_lora_as_projection_names_a_wrong_size():
  layer = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
  layer.query = lora((8,), 2, (2, 4), base_module=layer.query)
  assert layer(normal((1, 3, 8))).shape == (1, 3, 8)
  with pytest.raises(ShapeMismatchError, match=r"maps inputs_q of shape \(..., length, 8\)"):
    layer(normal((1, 3, 7)))


def test_types_and_metadata_of_the_parameters():
  meta = {"a_metadata": {"tag": "a"}, "b_metadata": {"tag": "b"}}
  for model in (lora(**meta), lora_linear(**meta).lora):
    assert type(model.lora_a) is type(model.lora_b) is nnx.LoRAParam
    assert (model.lora_a.tag, model.lora_b.tag) == ("a", "b")
    assert (model.lora_a.shape, model.lora_b.shape) == ((3, 2), (2, 4))
  assert issubclass(nnx.LoRAParam, nnx.Param)
  assert type(lora(lora_param_type=nnx.Param).lora_a) is nnx.Param
  half = lora_linear(lora_param_dtype=jnp.bfloat16, lora_dtype=jnp.bfloat16)
  assert (half.lora.lora_a.dtype, half.kernel.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("hijax", [True, False])
def test_training_the_lora_params_leaves_the_others_bitwise_as_they_were(hijax):
  with nnx.use_hijax(hijax):
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
  x, y = normal((16, 3)), normal((16, 1), 1)
  rest = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
  frozen, trained = values(model, rest), values(model, nnx.LoRAParam)
  assert len(jax.tree.leaves(frozen)) == 6
  assert len(jax.tree.leaves(trained)) == 4

  @nnx.jit
  def step(model, optimizer, x, y):
    loss = lambda model: ((model(x) - y) ** 2).mean()
    value, grads = nnx.value_and_grad(loss, wrt=nnx.LoRAParam)(model)
    optimizer.update(model, grads)
    return value, grads

  losses = []
  for _ in range(100):
    loss, grads = step(model, optimizer, x, y)
    losses.append(loss)
  assert len(jax.tree.leaves(grads)) == 4
  assert losses[-1] < 0.8 * losses[0]
  jax.tree.map(np.testing.assert_array_equal, values(model, rest), frozen)
  moved = jax.tree.map(lambda a, b: (a != b).any(), values(model, nnx.LoRAParam), trained)
  assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("build", [lora, lora_linear], ids=["LoRA", "LoRALinear"])
def test_a_layer_under_transforms(build):
  model, x = build(b_initializer=nnx.initializers.ones), normal((5, 3))
  apply, want = lambda model, x: model(x), model(x)
  for transform in (jax.jit, nnx.jit, nnx.remat, lambda f: jax.vmap(f, (None, 0))):
    np.testing.assert_allclose(transform(apply)(model, x), want, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(nnx.merge(*nnx.split(model))(x), want, rtol=1e-6)
  assert nnx.graphdef(build()) == nnx.graphdef(build())


def test_stacked_layers_are_mapped():
  build = lambda rngs: nnx.LoRALinear(3, 4, lora_rank=2, rngs=rngs)
  layers = nnx.vmap(build)(nnx.Rngs(0).split(3))
  assert layers.lora.lora_a.shape == (3, 3, 2)
  got = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, normal((5, 3)))
  want = jnp.einsum("bi,nio->nbo", normal((5, 3)), layers.kernel[...])
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("build", "name", "at"), [
  (lora, "LoRA", "LoRA.lora_a  (LoRAParam"),
  (lora_linear, "LoRALinear", "LoRALinear.kernel  (Param"),
], ids=["LoRA", "LoRALinear"])  # fmt: skip
def test_wrong_input_size_names_layer_place_shape_and_fix(build, name, at):
  with pytest.raises(ShapeMismatchError) as error:
    build()(jnp.ones((4, 5)))
  lines = error.value.args[0].split("\n")
  assert lines[0] == f"{name} maps vectors of size 3"
  assert lines[1].startswith(f"  at:  {at}, created at test_lora.py:")
  assert lines[2] == "  got: an input of shape (4, 5)"
  assert lines[3] == f"  fix: make the last axis 3, or build {name} with the input's size"


@pytest.mark.parametrize(("sizes", "options", "got", "fix"), [
  ((3, 0, 4), {}, "lora_rank=0", "an int of at least 1"),
  ((0, 2, 4), {}, "in_features=0", "an int of at least 1"),
  ((3, 2, 1.5), {}, "out_features=1.5", "an int of at least 1"),
  ((3, 2, ()), {}, "out_features=()", "an int, or at least one"),
  ((3, 2, 4), {"alpha": 0}, "alpha=0", "a positive number"),
  ((3, 2, 4), {"base_module": 3}, "base_module=3", "a Module or function, or None"),
  ((3, 2, 4), {"lora_param_type": int}, "lora_param_type=<class 'int'>", "a type of Variables"),
])  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(sizes, options, got, fix):
  with pytest.raises(InvalidArgumentError) as error:
    lora(*sizes, **options)
  lines = error.value.args[0].split("\n")
  assert lines[0].startswith("LoRA cannot work with this ")
  assert lines[1] == f"  got: {got}"
  assert lines[2].startswith(f"  fix: pass {fix}")


def test_what_is_not_rngs_is_refused():
  with pytest.raises(InvalidArgumentError, match=r"LoRA cannot .*\n  got: rngs=0\n  fix: pass"):
    nnx.LoRA(3, 2, 4, rngs=0)
