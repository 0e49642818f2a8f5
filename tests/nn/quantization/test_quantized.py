"""Quantized layers compute what layers with the dequantized weights do, in every transform."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refax import nnx
from refax.errors import InvalidArgumentError, TraceContextError, UnwantedWriteError
from refax.nn.linear import embed
from refax.nn.quantization import quantized

RNGS = lambda: nnx.Rngs(0, params=1)


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def ids(n, size):
  return jnp.asarray(np.random.default_rng(0).integers(0, size, n))


class Attend(nnx.Module):
  def __init__(self, rngs):
    self.table = nnx.Embed(24, 32, rngs=rngs)

  def __call__(self, x):
    return self.table.attend(x)


class Own(nnx.Module):
  """A layer of the user's: it reads a kernel in its own way."""

  def __init__(self, rngs):
    self.inner = nnx.Linear(32, 16, rngs=rngs)

  def __call__(self, x):
    kernel = self.inner.kernel
    return jnp.tanh(x) @ kernel + (kernel * kernel).sum(0) + kernel.T[:, 0] + kernel[1]


LAYERS = {
  "linear": (lambda: nnx.Linear(32, 16, rngs=RNGS()), normal(4, 32)),
  "odd": (lambda: nnx.Linear(7, 5, rngs=RNGS()), normal(4, 7)),
  "general": (lambda: nnx.LinearGeneral(32, (4, 8), rngs=RNGS()), normal(4, 32)),
  "several axes": (
    lambda: nnx.LinearGeneral((4, 32), 6, axis=(-2, -1), rngs=RNGS()),
    normal(3, 4, 32),
  ),
  "batch axis": (
    lambda: nnx.LinearGeneral(32, 6, batch_axis={0: 4}, rngs=RNGS()),
    normal(4, 3, 32),
  ),
  "einsum": (
    lambda: nnx.Einsum("nta,hab->nthb", (4, 32, 8), (4, 8), rngs=RNGS()),
    normal(2, 3, 32),
  ),
  "embed": (lambda: nnx.Embed(24, 32, rngs=RNGS()), ids((2, 3), 24)),
  "attend": (lambda: Attend(RNGS()), normal(4, 32)),
  "lora linear": (lambda: nnx.LoRALinear(32, 16, lora_rank=2, rngs=RNGS()), normal(4, 32)),
  "attention": (
    lambda: nnx.MultiHeadAttention(2, 32, num_kv_heads=1, rngs=RNGS()),
    normal(2, 5, 32),
  ),
  "stack": (lambda: nnx.Stack(nnx.Linear, 3, 32, 32, rngs=RNGS()), normal(4, 32)),
  "remat": (
    lambda: nnx.Stack(nnx.Linear, 3, 32, 32, remat=True, rngs=RNGS()),
    normal(4, 32),
  ),
  "containers": (
    lambda: nnx.Sequential(*(nnx.Dict(a=[nnx.Linear(32, 32, rngs=RNGS())])["a"][0],) * 2),
    normal(4, 32),
  ),
  "own": (lambda: Own(RNGS()), normal(4, 32)),
}


def dequantized(model):
  """A copy with the weight that each quantized one stands for, as a Param."""
  weight = lambda _, x: nnx.Param(x[...]) if isinstance(x, nnx.QuantizedWeight) else x
  return nnx.recursive_map(weight, model)


def twins(name, bits=8, group_size=None):
  build, x = LAYERS[name]
  model = nnx.quantize(build(), bits, group_size=group_size)
  return model, dequantized(model), x


def assert_close(a, b, atol=2e-5):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), a, b)


def is_float(x):
  return jnp.issubdtype(x.dtype, jnp.floating)


def both(model, x):
  """What a model gives, and the gradient of its input if there is one."""
  if not is_float(x):
    return (model(x),)
  return model(x), jax.grad(lambda x: (model(x) ** 2).sum())(x)


def check_alike(model, twin, x):
  want = jax.jit(lambda x: both(twin, x))(x)
  assert [y.dtype for y in both(model, x)] == [y.dtype for y in want]
  assert_close(both(model, x), want, 1e-4)
  assert_close(jax.jit(both)(model, x), want, 1e-4)
  assert_close(nnx.jit(lambda model, x: both(nnx.remat(model), x))(model, x), want, 1e-4)
  assert_close(jax.jit(lambda x: jax.vmap(model)(x[None])[0])(x), want[0])
  if is_float(x):
    loss = lambda model, x: (model(x) ** 2).sum()
    assert_close(nnx.jit(nnx.grad(loss, argnums=1))(model, x), want[1], 1e-4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_equals_that_with_dequantized_weights(name, bits):
  check_alike(*twins(name, bits))


@pytest.mark.parametrize("name", ["linear", "embed", "stack"])
def test_a_lojax_layer_equals_that_with_dequantized_weights(name):
  with nnx.use_hijax(False):
    check_alike(*twins(name, 4))


@pytest.mark.parametrize("bits, group_size", [(8, 1), (4, 1)])
def test_groups_of_one_number_are_exact_to_rounding(bits, group_size):
  build, x = LAYERS["general"]
  assert_close(nnx.quantize(build(), bits, group_size=group_size)(x), build()(x))


@pytest.fixture
def small_blocks(monkeypatch):
  monkeypatch.setattr(quantized, "_BLOCK", 64)
  traced = (quantized.dot_general, embed._products)
  [function.clear_cache() for function in traced]
  yield
  [function.clear_cache() for function in traced]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("bits, group_size", [(8, None), (8, 8), (4, None), (4, 4), (4, 1)])
@pytest.mark.parametrize("name", ["linear", "several axes", "attend"])
def test_a_product_in_blocks_equals_that_with_dequantized_weights(name, bits, group_size):
  model, twin, x = twins(name, bits, group_size)
  assert "scan" in str(jax.make_jaxpr(lambda x: model(x))(x))
  want = jax.jit(lambda x: both(twin, x))(x)
  assert_close(both(model, x), want, 1e-4)
  assert_close(jax.jit(both)(model, x), want, 1e-4)
  tangent = lambda f: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(x)
  assert_close(tangent(model), tangent(twin), 1e-4)
  assert_close(jax.jit(jax.vmap(model))(jnp.stack([x, x]))[1], want[0])
  assert model(x.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.usefixtures("small_blocks")
def test_a_product_in_blocks_in_a_stack_and_on_shards():
  model, twin, x = twins("stack")
  assert_close(jax.jit(both)(model, x), jax.jit(both)(twin, x), 1e-4)
  with nnx.use_hijax(False):
    layer, twin, x = twins("linear")
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec("data")
  run = jax.shard_map(lambda x: both(layer, x), mesh=mesh, in_specs=spec, out_specs=spec)
  assert_close(jax.jit(run)(x), both(twin, x), 1e-4)


def test_a_backward_pass_keeps_integers_and_no_weight_of_floats():
  model = nnx.quantize(nnx.Linear(1024, 2048, use_bias=False, rngs=RNGS()), 8)
  graphdef, state = nnx.split(nnx.to_lojax(model))

  def forward(state, x):
    return jax.vjp(lambda x: nnx.merge(graphdef, state)(x), x)

  kept = jax.tree.leaves(jax.eval_shape(forward, state, normal(4, 1024)))
  assert all(x.size < 1024 * 2048 or x.dtype.itemsize == 1 for x in kept)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_dtype_of_a_layer_stays(dtype, bits):
  layer = nnx.Linear(32, 4, param_dtype=dtype, rngs=RNGS())
  x = normal(2, 32).astype(dtype)
  before = layer(x)
  nnx.quantize(layer, bits)
  assert layer.kernel.dtype == layer.kernel[...].dtype == dtype == layer(x).dtype
  assert layer.kernel.scale.dtype == jnp.float32
  assert_close(layer(x).astype(float), before.astype(float), 0.05 if bits == 8 else 0.6)
  policy = nnx.Precision(compute=jnp.bfloat16)
  policy.apply(layer)
  assert layer(x).dtype == jnp.bfloat16


def steps(weight, axis, group):
  """The scale of each number."""
  scale = np.asarray(weight.scale[...])
  return np.repeat(scale, group, axis) if group else np.broadcast_to(scale, weight.shape)


# Few shapes: each is compiled.
@settings(max_examples=60, deadline=None)
@given(
  values=hnp.arrays(
    np.float32,
    st.sampled_from([(1, 1), (7, 3), (32, 2)]),
    elements=st.floats(np.float32(-3e38), np.float32(3e38), width=32) | st.floats(-1, 1, width=32),
  ),
  bits=st.sampled_from([8, 4]),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
  data=st.data(),
)
def test_each_number_is_within_half_a_step_of_its_group(values, bits, dtype, data):
  values = jnp.asarray(values).astype(dtype)
  values = jnp.where(jnp.isfinite(values), values, 0)
  group = data.draw(st.sampled_from([None, 1, len(values)]))
  layer = nnx.Linear(*values.shape, use_bias=False, rngs=nnx.Rngs(0))
  layer.kernel = nnx.Param(values)
  nnx.quantize(layer, bits, group_size=group)
  got, want = (np.asarray(x, np.float64) for x in (layer.kernel[...], values))
  used = group or (0 if bits == 8 else 32 if len(values) % 32 == 0 else len(values))
  step = steps(layer.kernel, 0, used)
  rounding = float(jnp.finfo(dtype).eps) / 2
  tiny = np.finfo(np.float32).tiny if dtype != jnp.float16 else 0
  assert np.isfinite(got).all()
  assert (abs(got - want) <= step * 0.5001 + abs(want) * rounding * 1.01 + tiny).all()


def test_a_scale_is_the_largest_number_of_its_group_over_the_largest_integer():
  layer = nnx.Linear(64, 3, use_bias=False, rngs=RNGS())
  kernel = np.asarray(layer.kernel[...])
  eight = nnx.quantize(nnx.clone(layer), 8).kernel
  np.testing.assert_allclose(eight.scale[...], abs(kernel).max(0, keepdims=True) / 127, rtol=1e-6)
  assert (abs(eight[...] - kernel) <= eight.scale[...] * 0.50001).all()
  four = nnx.quantize(layer, 4).kernel
  grouped = abs(kernel.reshape(2, 32, 3))
  np.testing.assert_allclose(four.scale[...], grouped.max(1) / 7, rtol=1e-6)
  assert four.values.dtype == jnp.uint8 and four.values.shape == (32, 3)
  assert four.nbytes == 32 * 3 + 2 * 3 * 4 and eight.nbytes == 64 * 3 + 3 * 4


def test_a_group_of_zeros_stays_zero():
  layer = nnx.Linear(64, 3, kernel_init=nnx.initializers.zeros, rngs=RNGS())
  for bits in (8, 4):
    assert not nnx.quantize(nnx.clone(layer), bits)(normal(2, 64)).any()


def test_the_model_itself_is_returned_and_its_state_is_that_of_quantized_weights():
  model = LAYERS["attention"][0]()
  assert nnx.quantize(model) is model
  assert {type(v) for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param))} == {nnx.Param}
  names = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.QuantizedParam))}
  assert names == {"values", "scale"}
  assert {path[-1] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))} == {"bias"}


def test_only_says_which_layers():
  model = nnx.Sequential(nnx.Embed(8, 32, rngs=RNGS()), nnx.Linear(32, 4, rngs=RNGS()))
  nnx.quantize(model, 4, only=nnx.Not(nnx.Embed))
  assert isinstance(model.layers[0].embedding, nnx.Param)
  assert model.layers[1].kernel.form.bits == 4
  nnx.quantize(model, 8, only=lambda path, layer: path == ("layers", 0))
  assert model.layers[0].embedding.form.bits == 8


def test_shared_weights_stay_shared_in_any_layer():
  a, b = nnx.Linear(32, 32, rngs=RNGS()), nnx.Linear(32, 32, rngs=nnx.Rngs(3))
  b.kernel = a.kernel
  model = nnx.quantize(nnx.Dict(a=a, b=[b], c=a), 4, only=nnx.PathContains("a"))
  assert model.a.kernel is model.b[0].kernel and model.c is model.a
  assert nnx.find_duplicates(model, only=nnx.QuantizedWeight) == [
    [("a", "kernel"), ("b", 0, "kernel")]
  ]
  copy_ = nnx.clone(model)
  assert copy_.a.kernel is copy_.b[0].kernel


def test_tied_embeddings_look_up_and_attend_with_one_table():
  layer = nnx.quantize(nnx.Embed(24, 32, rngs=RNGS()), 8)
  table = layer.embedding[...]
  assert_close(layer(jnp.arange(24)), table)
  assert_close(layer.attend(normal(2, 32)), normal(2, 32) @ table.T)
  assert jnp.isnan(layer(jnp.array([24, 500]))).all()
  assert_close(layer(jnp.array([-1])), table[-1:])


@pytest.mark.parametrize("bits", [4, 8])
def test_an_empty_batch_has_an_empty_result(bits):
  model = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
  table = nnx.Sequential(nnx.Embed(64, 32, rngs=nnx.Rngs(0)))
  nnx.quantize(model, bits)
  nnx.quantize(table, bits)
  assert model(jnp.ones((0, 64))).shape == (0, 32)
  assert table.layers[0].attend(jnp.ones((2, 0, 32))).shape == (2, 0, 64)


def test_a_vmapped_ensemble_and_the_layers_of_a_stack():
  build = lambda rngs: nnx.Linear(32, 8, rngs=rngs)
  ensemble = nnx.vmap(build)(nnx.Rngs(0).fork(split=3))
  nnx.quantize(ensemble, 4)
  twin, x = dequantized(ensemble), normal(2, 32)
  call = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
  assert_close(call(ensemble, x), call(twin, x))
  stack = nnx.quantize(nnx.Stack(nnx.Linear, 3, 32, 32, rngs=RNGS()), 4)
  want = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(dequantized(stack.layers), x)
  assert_close(nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(stack.layers, x), want)
  assert_close(stack[1](x), want[1])
  assert_close(nnx.Stack.of(list(stack))(x), stack(x))
  stack[0] = stack[2]
  assert_close(stack[0](x), want[2])


@pytest.mark.parametrize("bits", [8, 4])
def test_lora_beside_a_quantized_base_trains_and_the_base_stays(bits):
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.first = nnx.LoRALinear(32, 32, lora_rank=2, rngs=rngs)
      base = nnx.quantize(nnx.Linear(32, 1, rngs=rngs), bits)
      self.last = nnx.LoRA(32, 2, 1, base_module=base, rngs=rngs)

    def __call__(self, x):
      return self.last(nnx.tanh(self.first(x)))

  model = Net(RNGS())
  nnx.quantize(model, bits, only=nnx.LoRALinear)
  optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
  x, y = normal(16, 32), normal(16, 1, seed=1)
  before = jax.tree.map(np.array, nnx.pure(nnx.state(model, nnx.Not(nnx.LoRAParam))))

  @nnx.jit
  def step(model, optimizer):
    loss_fn = lambda model: ((model(x) - y) ** 2).mean()
    loss, grads = nnx.value_and_grad(loss_fn, wrt=nnx.LoRAParam)(model)
    optimizer.update(model, grads)
    return loss, grads

  losses = [float(step(model, optimizer)[0]) for _ in range(60)]
  _, grads = step(model, optimizer)
  assert losses[-1] < losses[0] / 2
  assert all(abs(g).max() > 0 for g in jax.tree.leaves(nnx.pure(grads)))
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.tree.map(np.array, nnx.pure(nnx.state(model, nnx.Not(nnx.LoRAParam)))),
    before,
  )


def test_grad_of_params_leaves_quantized_weights_alone():
  model, _, x = twins("linear")
  grads = nnx.grad(lambda model: model(x).sum())(model)
  assert [path for path, _ in nnx.to_flat_state(grads)] == [("bias",)]
  nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param).update(model, grads)


@pytest.mark.parametrize("bits", [8, 4])
def test_files_and_checkpoints_keep_it(bits, tmp_path):
  build = lambda rngs: nnx.TransformerDecoder(2, 32, 2, rngs=rngs)
  model, x = nnx.quantize(build(RNGS()), bits), normal(2, 3, 32)
  nnx.save_safetensors(model, tmp_path / "a.safetensors")
  twin = nnx.quantize(build(nnx.Rngs(5)), bits)
  nnx.load_safetensors(twin, tmp_path / "a.safetensors")
  np.testing.assert_array_equal(twin(x), model(x))
  abstract = nnx.eval_shape(lambda: nnx.quantize(build(nnx.Rngs(5)), bits))
  nnx.load_safetensors(abstract, tmp_path / "a.safetensors")
  np.testing.assert_array_equal(abstract(x), model(x))
  with nnx.Checkpointer(tmp_path / "b") as checkpointer:
    checkpointer.save(1, model)
    checkpointer.wait()
    twin = nnx.quantize(build(nnx.Rngs(5)), bits)
    checkpointer.restore(twin)
  np.testing.assert_array_equal(twin(x), model(x))


def test_copies_and_halves_of_it():
  model, _, x = twins("general", 4)
  want = model(x)
  graphdef, state = nnx.split(model)
  others = [nnx.clone(model), nnx.merge(graphdef, state), copy.deepcopy(model)]
  others += [pickle.loads(pickle.dumps(model)), nnx.to_lojax(model), nnx.pure(model)]
  for other in others:
    np.testing.assert_array_equal(other(x), want)
  leaves, treedef = jax.tree.flatten(nnx.to_lojax(model))
  np.testing.assert_array_equal(treedef.unflatten(leaves)(x), want)
  scaled = nnx.clone(model)
  scaled.kernel.scale[...] *= 2
  assert_close(scaled.kernel[...], 2 * model.kernel[...])


def test_abstract_models_and_models_that_are_made_in_a_transform():
  build = lambda: nnx.Linear(64, 8, rngs=RNGS())
  want = nnx.quantize(build(), 4)
  for abstract in (nnx.quantize(nnx.eval_shape(build), 4), nnx.eval_shape(lambda: want)):
    shapes = [(v.shape, v.dtype) for _, v in nnx.to_flat_state(nnx.state(abstract))]
    assert shapes == [(v.shape, v.dtype) for _, v in nnx.to_flat_state(nnx.state(want))]
    assert abstract.kernel.shape == (64, 8)
  made = nnx.jit(lambda: nnx.quantize(build(), 4))()
  np.testing.assert_allclose(made.kernel[...], want.kernel[...], rtol=1e-6)
  assert made.kernel.values.is_hijax


def test_metadata_of_a_weight_is_that_of_its_parts():
  metadata = {"out_sharding": (None, "model"), "note": "x"}
  layer = nnx.Linear(64, 8, kernel_metadata=metadata, rngs=RNGS())
  nnx.quantize(layer, 8)
  assert layer.kernel.values.get_metadata() == metadata == layer.kernel.scale.get_metadata()
  rows = nnx.Linear(64, 8, kernel_metadata={"out_sharding": ("model", None)}, rngs=RNGS())
  nnx.quantize(rows, 8)
  assert rows.kernel.scale.sharding_names == (None, None)


def test_what_is_printed():
  model = nnx.quantize(nnx.Linear(64, 8, rngs=RNGS()), 4)
  assert "kernel=QuantizedWeight(float32[64,8] of 4 bits, groups of 32)" in repr(model)
  table = nnx.tabulate(model, normal(1, 64))
  assert "kernel/values: uint8[32,8]" in table and "kernel/scale: float32[2,8]" in table


def test_a_write_is_refused():
  model, _, x = twins("linear")
  message = r"not trained(.|\n)*Linear.kernel.values(.|\n)*8 bits(.|\n)*nnx.LoRA"
  for write in (
    lambda: model.kernel.set_value(x),
    lambda: model.kernel.__setitem__(..., x),
    lambda: model.kernel.__setitem__((0, 0), 1.0),
    lambda: model.kernel.__imul__(2),
  ):
    with pytest.raises(UnwantedWriteError, match=message):
      write()
  model.kernel = nnx.Param(model.kernel[...])
  model.kernel[...] *= 2


def broken(path, value):
  model = nnx.Dict(a=nnx.Linear(6, 4, rngs=RNGS()), b=nnx.Linear(6, 4, rngs=RNGS()))
  model.b.kernel = value(model.b.kernel[...])
  return model


REFUSED = {
  "NaN": (
    lambda w: nnx.Param(w.at[1, 2].set(jnp.nan)),
    {},
    r"b\.kernel(.|\n)*1 numbers that are NaN",
  ),
  "inf": (lambda w: nnx.Param(w.at[1, 2].set(jnp.inf)), {}, r"b\.kernel(.|\n)*infinite, of 24"),
  "integers": (
    lambda w: nnx.Param(w.astype(int)),
    {},
    r"floats(.|\n)*b\.kernel(.|\n)*int32\[6,4\]",
  ),
  "complex": (lambda w: nnx.Param(w.astype(complex)), {}, r"floats(.|\n)*b\.kernel(.|\n)*complex"),
  "group": (nnx.Param, {"group_size": 4}, r"a\.kernel(.|\n)*group_size=4 (.|\n)*divisor of 6"),
  "zero group": (nnx.Param, {"group_size": 0}, "group_size=0"),
  "bool group": (nnx.Param, {"group_size": True}, "group_size=True"),
  "bits": (nnx.Param, {"bits": 3}, "bits=3(.|\n)*8 or 4"),
  "no bits": (nnx.Param, {"bits": None}, "bits=None"),
  "float bits": (nnx.Param, {"bits": "8"}, "bits='8'"),
  "only": (nnx.Param, {"only": nnx.PathContains("c")}, r"only=(.|\n)*a \(Linear\), b \(Linear\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_quantized_is_named_and_nothing_changes(case):
  value, options, message = REFUSED[case]
  model = broken(case, value)
  with pytest.raises(InvalidArgumentError, match=message):
    nnx.quantize(model, **options)
  assert isinstance(model.a.kernel, nnx.Param) and isinstance(model.b.kernel, nnx.Param)


def test_twice_is_refused():
  model = nnx.Sequential(nnx.Linear(4, 4, rngs=RNGS()), nnx.Linear(4, 4, rngs=RNGS()))
  nnx.quantize(model, only=lambda path, _: 1 in path)
  with pytest.raises(InvalidArgumentError, match=r"already(.|\n)*layers\.1\.kernel(.|\n)*8 bits"):
    nnx.quantize(model)
  assert isinstance(model.layers[0].kernel, nnx.Param)


def test_a_model_without_such_layers_is_refused():
  with pytest.raises(InvalidArgumentError, match=r"nnx\.Linear, nnx\.LinearGeneral"):
    nnx.quantize(nnx.LayerNorm(3, rngs=RNGS()))


def test_a_layer_in_a_weight_norm_is_refused():
  model = nnx.Dict(a=nnx.WeightNorm(nnx.Linear(4, 4, rngs=RNGS()), rngs=RNGS()))
  with pytest.raises(InvalidArgumentError, match=r"a\.layer_instance\.kernel(.|\n)*WeightNorm"):
    nnx.quantize(model)


def test_a_weight_that_a_tuple_shares_is_refused():
  layer = nnx.Linear(4, 4, rngs=RNGS())
  model = nnx.Dict(a=layer, b=nnx.data((layer.kernel,)))
  with pytest.raises(InvalidArgumentError, match=r"b\.0(.|\n)*tuple"):
    nnx.quantize(model)
  assert isinstance(layer.kernel, nnx.Param)


def test_a_model_from_outside_a_transform_is_refused():
  model = nnx.Linear(4, 4, rngs=RNGS())
  with pytest.raises(TraceContextError):
    jax.jit(lambda: nnx.quantize(model).kernel[...])()
  assert isinstance(model.kernel, nnx.Param)
  nnx.jit(nnx.quantize)(model)
  assert isinstance(model.kernel, nnx.QuantizedWeight)
