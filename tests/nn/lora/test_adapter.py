"""nnx.add_lora and nnx.merge_lora: which layers, what they compute, and the way back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError


def normal(shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def mlp():
  rngs = nnx.Rngs(0)
  return nnx.Sequential(nnx.Linear(3, 8, rngs=rngs), nnx.tanh, nnx.Linear(8, 4, rngs=rngs))


def decoder(**options):
  options = {"num_kv_heads": 1, "rope": nnx.RoPE(), "gated": True} | options
  return nnx.TransformerDecoder(2, 8, num_heads=2, rngs=nnx.Rngs(0), **options)


def add(model, rank=2, **options):
  return nnx.add_lora(model, rank, rngs=nnx.Rngs(1), **options)


def fill(model, seed=2):
  """Give the LoRAs of a model numbers that matter."""
  for i, (_, x) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))):
    x[...] = (0.3 * normal(x.shape, seed + i)).astype(x.dtype)
  return model


def loras(model):
  return {".".join(map(str, p)) for p, x in nnx.iter_modules(model) if isinstance(x, nnx.LoRA)}


def params(model):
  return {p: np.asarray(x[...]) for p, x in nnx.to_flat_state(nnx.state(model, nnx.Param))}


CASES = {
  "mlp": (mlp, (5, 3)),
  "stack": (decoder, (2, 5, 8)),
  "list": (functools.partial(decoder, scan_layers=False), (2, 5, 8)),
  "bfloat16": (functools.partial(decoder, param_dtype=jnp.bfloat16), (2, 5, 8)),
}


@pytest.fixture(params=CASES)
def case(request):
  build, shape = CASES[request.param]
  x = normal(shape).astype(jnp.bfloat16 if request.param == "bfloat16" else jnp.float32)
  return build, x, 0.05 if request.param == "bfloat16" else 1e-5


def test_at_first_a_model_computes_what_it_computed(case):
  build, x, _ = case
  want, model = build()(x), build()
  assert add(model, alpha=4) is model
  np.testing.assert_array_equal(model(x), want)
  assert model(x).dtype == want.dtype


def test_merged_weights_compute_what_layer_and_lora_compute_together(case):
  build, x, atol = case
  model = fill(add(build(), alpha=4))
  want, before = model(x), build()(x)
  assert nnx.merge_lora(model) is model
  assert abs(want - before).max() > 0.1
  np.testing.assert_allclose(*map(np.float32, (model(x), want)), rtol=atol, atol=atol)
  assert model(x).dtype == want.dtype
  assert nnx.graphdef(model) == nnx.graphdef(build())


def test_a_merge_is_the_product_to_the_last_bit():
  model = add(nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0))), alpha=3)
  kernel = np.float64(model.layers[0].base_module.kernel[...])
  a, b = (np.float64(x[...]) for x in (model.layers[0].lora_a, model.layers[0].lora_b))
  a, b = (normal(a.shape), normal(b.shape, 1))
  model.layers[0].lora_a[...], model.layers[0].lora_b[...] = a, b
  want = kernel + 1.5 * np.float64(a) @ np.float64(b)
  nnx.merge_lora(model)
  np.testing.assert_allclose(model.layers[0].kernel[...], want, rtol=3e-7, atol=3e-7)


def test_a_filter_says_which_layers():
  names = lambda model: {name.rpartition(".")[2] for name in loras(model)}
  assert names(add(decoder())) == {"query", "key", "value", "out", "up", "gate", "down"}
  assert names(add(decoder(), only=nnx.PathContains("attention"))) == {
    "query", "key", "value", "out"
  }  # fmt: skip
  assert names(add(decoder(), only=nnx.Linear)) == {"up", "gate", "down"}
  assert names(add(decoder(), only=lambda path, layer: path[-1] == "query")) == {"query"}


def test_shapes_follow_those_of_the_projections():
  attention = add(decoder()).blocks.layers.attention
  shapes = lambda lora: (lora.lora_a.shape, lora.lora_b.shape)
  assert shapes(attention.query) == ((2, 8, 2), (2, 2, 2, 4))
  assert shapes(attention.value) == ((2, 8, 2), (2, 2, 1, 4))
  assert shapes(attention.out) == ((2, 2, 4, 2), (2, 2, 8))
  a = attention.query.lora_a[...]
  assert abs(a[0] - a[1]).max() > 0.1  # each layer of a Stack has numbers of its own


def test_only_the_loras_train():
  model = add(decoder(scan_layers=False), only=nnx.PathContains("attention"))
  optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
  x, before = normal((2, 5, 8)), params(model)

  @nnx.jit
  def step(model, optimizer, x):
    loss, grads = nnx.value_and_grad(lambda m: ((m(x) - 1) ** 2).mean(), wrt=nnx.LoRAParam)(model)
    optimizer.update(model, grads)
    return loss

  losses = [step(model, optimizer, x) for _ in range(20)]
  assert losses[-1] < losses[0]
  changed = {p[-1] for p, x in params(model).items() if (x != before[p]).any()}
  assert changed == {"lora_a", "lora_b"}


def test_a_model_with_loras_decodes():
  model, x = fill(add(decoder())), normal((1, 5, 8))
  model.init_cache(x.shape)
  steps = [model(x[:, i : i + 1], decode=True) for i in range(5)]
  np.testing.assert_allclose(jnp.concatenate(steps, 1), model(x), rtol=1e-4, atol=1e-5)


def test_a_second_call_adds_to_what_has_none():
  model = add(mlp(), only=lambda path, layer: path[-1] == 0)
  first = model.layers[0]
  add(model, 1)
  assert model.layers[0] is first
  assert loras(model) == {"layers.0", "layers.2"}
  with pytest.raises(InvalidArgumentError, match="LinearGeneral without a LoRA"):
    add(model)


def test_a_shared_layer_has_one_lora():
  layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
  model = fill(add(nnx.Sequential(layer, layer)))
  assert model.layers[0] is model.layers[1]
  assert model.layers[0].base_module is layer
  want = model(normal((5, 3)))
  nnx.merge_lora(model)
  assert model.layers[0] is model.layers[1] is layer
  np.testing.assert_allclose(model(normal((5, 3))), want, rtol=1e-5, atol=1e-5)


def test_a_layer_by_itself_and_in_a_plain_pytree_is_in_what_is_returned():
  layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
  lora = add(layer)
  assert isinstance(lora, nnx.LoRA) and lora.base_module is layer
  assert nnx.merge_lora(lora) is layer
  tree = add({"a": [nnx.Linear(3, 4, rngs=nnx.Rngs(0)), 1]})
  assert isinstance(tree["a"][0], nnx.LoRA) and tree["a"][1] == 1


def test_lora_linear_becomes_linear():
  model = nnx.Sequential(nnx.LoRALinear(3, 4, lora_rank=2, use_bias=False, rngs=nnx.Rngs(0)))
  want, like = fill(model)(normal((5, 3))), nnx.Linear(3, 4, use_bias=False, rngs=nnx.Rngs(0))
  nnx.merge_lora(model)
  assert type(model.layers[0]) is nnx.Linear
  assert nnx.graphdef(model.layers[0]) == nnx.graphdef(like)
  np.testing.assert_allclose(model(normal((5, 3))), want, rtol=1e-5, atol=1e-5)


def test_loras_one_beside_the_other_are_merged_together():
  inner = nnx.LoRA(3, 2, 8, base_module=nnx.Linear(3, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
  model = fill(nnx.Sequential(nnx.LoRA(3, 1, 8, base_module=inner, rngs=nnx.Rngs(2))))
  want = model(normal((5, 3)))
  nnx.merge_lora(model)
  assert type(model.layers[0]) is nnx.Linear
  np.testing.assert_allclose(model(normal((5, 3))), want, rtol=1e-5, atol=1e-5)


def test_merging_some():
  model = fill(add(mlp()))
  want = model(normal((5, 3)))
  nnx.merge_lora(model, only=lambda path, lora: path[-1] == 0)
  assert loras(model) == {"layers.2"}
  np.testing.assert_allclose(model(normal((5, 3))), want, rtol=1e-5, atol=1e-5)


def test_loras_beside_quantized_weights_train_and_are_not_merged():
  model, x = fill(add(nnx.quantize(decoder(), 8))), normal((2, 5, 8))
  grads = nnx.grad(lambda m: m(x).sum(), wrt=nnx.LoRAParam)(model)
  assert all(abs(g[...]).max() > 0 for _, g in nnx.to_flat_state(grads))
  with pytest.raises(InvalidArgumentError) as error:
    nnx.merge_lora(model)
  lines = error.value.args[0].split("\n")
  assert lines[0] == "nnx.merge_lora: quantized weights cannot be added to"
  assert lines[-1].startswith("  fix: pass the model before nnx.quantize")
  assert loras(model)


def test_an_adapter_is_a_file_of_its_own(tmp_path):
  model = fill(add(decoder()))
  nnx.save_safetensors(model, tmp_path / "a.safetensors", only=nnx.LoRAParam)
  other = add(decoder())
  report = nnx.load_safetensors(other, tmp_path / "a.safetensors", only=nnx.LoRAParam)
  assert not report.missing and not report.unexpected
  np.testing.assert_array_equal(other(normal((2, 5, 8))), model(normal((2, 5, 8))))


def test_inside_transforms():
  x = normal((2, 5, 8))
  want = fill(add(decoder()))(x)

  @jax.jit
  def merged(model, x):
    return nnx.merge_lora(nnx.clone(model))(x)

  np.testing.assert_allclose(merged(fill(add(decoder())), x), want, rtol=1e-4, atol=1e-5)
  shapes = nnx.eval_shape(lambda: add(decoder()))
  assert shapes.blocks.layers.attention.query.lora_a.shape == (2, 8, 2)


def wrong_axis():
  options = {"axis": 0, "rngs": nnx.Rngs(0)}
  return nnx.Sequential(nnx.LinearGeneral(3, 4, **options))


def normalized():
  return nnx.Sequential(nnx.WeightNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(("build", "options", "problem", "fix"), [
  (mlp, {"only": nnx.Embed}, "nnx.add_lora cannot work with this only",
   "a filter that matches one of layers.0 (Linear), layers.2 (Linear)"),
  (lambda: nnx.Sequential(nnx.tanh), {}, "nnx.add_lora cannot work with this model",
   "a model that has a nnx.Linear or nnx.LinearGeneral without a LoRA"),
  (mlp, {"rank": 0}, "nnx.add_lora cannot work with this rank", "an int of at least 1"),
  (mlp, {"alpha": -1}, "LoRA cannot work with this alpha", "a positive number"),
  (wrong_axis, {}, "nnx.add_lora: a LoRA maps the last axes of its input",
   "only=... to leave it out, or build it with axis=(-1,) and no batch_axis"),
  (normalized, {}, "nnx.add_lora: the weights of a layer are computed by WeightNorm",
   "only=... to leave it out, or put a nnx.LoRA beside the WeightNorm"),
])  # fmt: skip
def test_what_no_lora_can_be_added_to_is_refused(build, options, problem, fix):
  model = build()
  before = nnx.graphdef(model)
  with pytest.raises(InvalidArgumentError) as error:
    add(model, **options)
  lines = error.value.args[0].split("\n")
  assert lines[0] == problem
  assert lines[-1].startswith(f"  fix: pass {fix}")
  assert nnx.graphdef(model) == before


def test_what_cannot_be_merged_is_refused():
  with pytest.raises(InvalidArgumentError) as error:
    nnx.merge_lora(mlp())
  assert "a model that has a nnx.LoRA beside a layer" in str(error.value)
  model = fill(add(mlp()))
  with pytest.raises(InvalidArgumentError, match=r"a filter that matches one of layers.0 \(LoRA\)"):
    nnx.merge_lora(model, only=nnx.LoRALinear)
  twins = nnx.List(nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(2))
  twins[1].kernel = twins[0].kernel
  add(twins, only=lambda path, layer: path[-1] == 0)
  with pytest.raises(InvalidArgumentError, match="its kernel of several"):
    nnx.merge_lora(twins)
