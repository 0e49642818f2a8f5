"""A model under a plan is trained as on one device, lies as the plan says, and stays there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from refax import nnx
from refax.errors import InvalidArgumentError, RefArgumentError, ShardingError

assert jax.device_count() == 8
# The gradient of the bias of keys is zero but for rounding, which a small epsilon would blow up.
TX = optax.adam(1e-2, eps=1e-2)
BATCH = np.random.RandomState(0).randint(0, 64, (8, 9))
FSDP, TENSOR = nnx.plans.fsdp("data", min_size=0), nnx.plans.tensor_parallel("model")
PLANS = {
  "replicated": nnx.plans.replicated,
  "fsdp": FSDP,
  "tensor": TENSOR,
  "both": FSDP & TENSOR,
  "mapping": nnx.Plan({"up.kernel": P(None, "model"), "down.kernel": P("model"), nnx.Cache: P()}),
}


def mesh_of(sort=AxisType.Auto, shape=(2, 4)):
  return jax.make_mesh(shape, ("data", "model"), axis_types=(sort,) * 2)


class Model(nnx.Module):
  def __init__(self, rngs, as_list=False):
    self.embed = nnx.Embed(64, 16, rngs=rngs)
    sizes = {"dropout_rate": 0.1, "gated": True}
    if as_list:
      self.blocks = [nnx.TransformerBlock(16, 4, is_causal=True, rngs=rngs) for _ in range(2)]
    else:
      self.blocks = nnx.TransformerDecoder(2, 16, 4, rngs=rngs, **sizes)
    self.head = nnx.Linear(16, 64, rngs=rngs)

  def __call__(self, x):
    h = self.embed(x)
    for block in self.blocks if isinstance(self.blocks, nnx.List) else (self.blocks,):
      h = block(h)
    return self.head(h)


def make(**options):
  model = Model(nnx.Rngs(0), **options)
  return model, nnx.Optimizer(model, TX, wrt=nnx.Param), nnx.EMA(model, 0.9)


def step(model, optimizer, ema, x):
  def loss_fn(model):
    logits = model(x[:, :-1])
    if EXPLICIT in jax.typeof(logits).sharding.mesh.axis_types:  # optax looks logits up by label
      logits = jax.sharding.reshard(logits, P("data"))
    return optax.softmax_cross_entropy_with_integer_labels(logits, x[:, 1:]).mean()

  loss, grads = nnx.value_and_grad(loss_fn)(model)
  optimizer.update(model, grads)
  ema.update(model)
  return loss


def losses(objects, compile=nnx.jit, mesh=None, count=2):
  run = compile(step)
  if mesh is None:
    return [float(run(*objects, BATCH)) for _ in range(count)]
  x = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
  with jax.set_mesh(mesh):
    return [float(run(*objects, x)) for _ in range(count)]


def values(objects):
  """The arrays of objects, without the keys of random streams."""
  leaves = jax.tree.leaves(nnx.pure(nnx.state(objects)))
  return [x for x in leaves if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]


def layout(objects):
  return {p: v.sharding.spec for p, v in nnx.to_flat_state(nnx.state(objects))}


@pytest.fixture(scope="module")
def alone():
  objects = make()
  return losses(objects), objects


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
CASES = [(plan, "shard", AUTO) for plan in PLANS]
CASES += [(plan, "shard", EXPLICIT) for plan in ("fsdp", "tensor")]
CASES += [("both", "create_sharded", EXPLICIT)]


@pytest.mark.parametrize(("plan", "how", "sort"), CASES)
def test_training_is_that_of_one_device_dropout_included(plan, how, sort, alone):
  mesh, plan = mesh_of(sort), PLANS[plan]
  if how == "shard":
    objects = nnx.shard(make(), mesh, plan)
  else:
    objects = nnx.create_sharded(make, mesh, plan)
  before = layout(objects)
  assert np.allclose(losses(objects, mesh=mesh), alone[0], atol=2e-5)
  assert layout(objects) == before
  for want, got in zip(*map(values, (alone[1], objects)), strict=True):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=2e-4)


def test_plain_jit_and_models_of_a_list_too():
  want = losses(make(as_list=True))
  for compile in (nnx.jit, jax.jit):
    objects = nnx.shard(make(as_list=True), mesh_of(), PLANS["both"])
    assert np.allclose(losses(objects, compile, mesh_of()), want, atol=2e-5)


def test_each_device_holds_its_part_only():
  model, optimizer, ema = nnx.create_sharded(make, mesh_of(), PLANS["both"])
  kernel = model.blocks.blocks.layers.feed_forward.up.kernel
  assert kernel.sharding.spec == P(None, "data", "model")
  moments, average = optimizer.opt_state[0].mu, ema.params
  for tree in (moments, average):
    found = tree["blocks"]["blocks"]["layers"]["feed_forward"]["up"]["kernel"]
    assert found.sharding.spec == kernel.sharding.spec
  parts = [s.data.size for s in kernel[...].addressable_shards]
  assert parts == [kernel.size // 8] * 8
  assert optimizer.step.sharding.is_fully_replicated


def test_it_is_born_sharded_no_device_computes_a_whole_parameter():
  from refax.sharding.place import born

  make_large = lambda: nnx.Linear(1024, 4096, use_bias=False, rngs=nnx.Rngs(0))
  mesh, plan = mesh_of(), nnx.plans.fsdp(("data", "model"), min_size=0)
  with jax.set_mesh(mesh):
    stats = born(make_large, mesh, plan).lower().compile()._executable.memory_analysis()
  whole = 1024 * 4096 * 4
  assert stats.output_size_in_bytes < whole / 8 * 1.1
  assert stats.temp_size_in_bytes < whole / 2  # random bits and what becomes of them, of a part
  model = nnx.create_sharded(make_large, mesh, plan)
  np.testing.assert_array_equal(np.asarray(model.kernel), np.asarray(make_large().kernel))


def test_a_parameter_that_is_gathered_is_not_kept_for_the_backward_pass():
  def net(plan):
    model = nnx.TransformerEncoder(8, 128, 4, rngs=nnx.Rngs(0))
    return nnx.shard(model, mesh_of(shape=(8, 1)), plan)

  def temporaries(model):
    x = jax.device_put(jnp.ones((8, 2, 128)), NamedSharding(mesh_of(shape=(8, 1)), P("data")))
    run = nnx.jit(lambda model, x: nnx.grad(lambda m: m(x).sum())(model))
    return run.lower(model, x).compile()._executable.memory_analysis().temp_size_in_bytes

  nbytes = sum(v.nbytes for _, v in nnx.to_flat_state(nnx.state(net(nnx.plans.replicated))))
  # One layer is gathered, and the gradients of all layers are there before they are divided.
  assert temporaries(net(FSDP)) < temporaries(net(nnx.plans.replicated)) + nbytes / 4


def test_attention_memory_follows_and_decoding_is_that_of_one_device():
  def run(place):
    model = place(nnx.TransformerDecoder(2, 16, 4, rngs=nnx.Rngs(0)))
    model.init_cache((4, 6, 16))
    model = place(nnx.view(model, decode=True))
    decode = nnx.jit(lambda model, x: model(x))
    x = jnp.cos(jnp.arange(4 * 6 * 16.0)).reshape(4, 6, 16)
    return model, [np.asarray(decode(model, x[:, i : i + 1])) for i in range(6)]

  _, want = run(lambda model: model)
  mesh = mesh_of()
  with jax.set_mesh(mesh):
    model, got = run(lambda model: nnx.shard(model, mesh, PLANS["both"]))
  memory = model.blocks.layers.attention.cached_key
  assert memory.sharding.spec == P(None, "data", None, "model", None)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_plan_for_ones_own_layers():
  class Gate(nnx.Module):
    def __init__(self, rngs):
      self.w = nnx.Param(jax.random.normal(rngs(), (8, 4)))

  plan = nnx.plans.tensor_parallel(layers={Gate: {"w": P("model")}})
  assert plan.specs(nnx.Dict(gate=Gate(nnx.Rngs(0))), mesh_of()) == {"gate.w": P("model", None)}


def test_patterns_name_layers_of_lists_stacks_and_optimizers():
  objects = make(as_list=True)
  specs = nnx.Plan({"blocks.0.*.up.kernel": P(None, "model")}).specs(objects, mesh_of())
  wanted = {p for p, s in specs.items() if s != P()}
  assert wanted == {
    "0.blocks.0.feed_forward.up.kernel",
    "1.opt_state.0.mu.blocks.0.feed_forward.up.kernel",
    "1.opt_state.0.nu.blocks.0.feed_forward.up.kernel",
    "2.params.blocks.0.feed_forward.up.kernel",
  }
  same = nnx.Plan({"blocks[0].*.up.kernel": P(None, "model")})
  assert same.specs(objects, mesh_of()) == specs


def test_state_of_another_shape_than_its_parameter_is_whole():
  model = nnx.Linear(256, 256, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.adafactor(1e-3), wrt=nnx.Param)
  specs = nnx.Plan({"kernel": P(None, "model")}).specs((model, optimizer), mesh_of())
  assert specs["0.kernel"] == P(None, "model")
  assert {s for p, s in specs.items() if ".v_row." in p or ".v_col." in p} == {P()}


@pytest.mark.parametrize(
  ("plan", "message"),
  [
    (nnx.Plan({"kernel": P(None, "nodes")}), r"no axis 'nodes'(.|\n)*at: .*kernel"),
    (nnx.Plan({"kernel": P("model", "model")}), "two axes of an array.*'model'"),
    (nnx.Plan({"kernel": P(None, "data", "model")}), "has 2 axes and its sharding names 3"),
    (
      nnx.Plan({"kernel": P("model")}),
      r"size 6 cannot be divided evenly over 4(.|\n)*at: .*kernel",
    ),
    (nnx.Plan({"kernal": P("model")}), r"'kernal' that no Variable matches(.|\n)*bias, kernel"),
    (TENSOR & nnx.plans.tensor_parallel("data"), r"exclude each other(.|\n)*at: "),
  ],
)
def test_what_does_not_fit_is_refused_and_nothing_moves(plan, message):
  model = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
  before = model.kernel.sharding
  with pytest.raises(ShardingError, match=message):
    nnx.shard(model, mesh_of(), plan)
  assert model.kernel.sharding == before


def test_heads_that_the_devices_do_not_divide():
  with pytest.raises(
    ShardingError, match=r"size 3 cannot be divided(.|\n)*at: +MultiHeadAttention"
  ):
    nnx.shard(nnx.MultiHeadAttention(3, 6, rngs=nnx.Rngs(0)), mesh_of(), TENSOR)
  grouped = nnx.MultiHeadAttention(4, 16, num_kv_heads=2, rngs=nnx.Rngs(0))
  specs = TENSOR.specs(grouped, mesh_of())
  assert (specs["query.kernel"], specs["key.kernel"]) == (P(None, "model", None), P())


def test_other_mistakes():
  model = nnx.Linear(2, 4, rngs=nnx.Rngs(0))
  with pytest.raises(ShardingError, match="there is none"):
    nnx.shard(model, plan=FSDP)
  with pytest.raises(InvalidArgumentError, match=r"plan='fsdp'(.|\n)*a plan, such as"):
    nnx.shard(model, mesh_of(), "fsdp")
  with pytest.raises(RefArgumentError, match="move"):
    nnx.jit(lambda model: nnx.shard(model, mesh_of(), FSDP) and None)(model)


def test_another_plan_and_device_put_forget_where_parameters_were_gathered():
  model = nnx.shard(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), mesh_of(), FSDP)
  assert model.kernel.has_metadata("gathered")
  nnx.shard(model, mesh_of(), TENSOR)
  assert not model.kernel.has_metadata("gathered")
  nnx.device_put(nnx.shard(model, mesh_of(), FSDP), jax.devices()[0])
  assert not model.kernel.has_metadata("gathered")


def test_an_ensemble_and_a_scan_over_layers_by_hand():
  build = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs))
  forward = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
  grads = nnx.jit(lambda layers, x: nnx.grad(lambda layers: forward(x, layers).sum())(layers))
  x = jnp.cos(jnp.arange(64.0)).reshape(8, 8)
  layers = build(nnx.Rngs(0).split(4))
  want = grads(layers, x)
  nnx.shard(layers, mesh_of(), nnx.Plan({"kernel": P(None, "data", "model")}) & FSDP)
  np.testing.assert_allclose(grads(layers, x).kernel, want.kernel, atol=1e-4)
  nnx.shard(layers, mesh_of(), FSDP)
  np.testing.assert_allclose(grads(layers, x).kernel, want.kernel, atol=1e-4)


def test_a_table_says_what_is_divided_and_what_each_device_holds():
  model = nnx.shard(nnx.Linear(16, 64, rngs=nnx.Rngs(0)), mesh_of(), TENSOR)
  text = nnx.tabulate(model, jnp.ones((2, 16)), width=200)
  assert "kernel: float32[16,64] P(None, 'model')" in text
  assert f"on each device {(16 * 64 + 64) * 4 / 4 / 1000:.1f} KB" in text
