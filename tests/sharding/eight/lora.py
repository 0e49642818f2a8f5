"""A model with LoRA under a plan computes and learns what it does on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from refax import nnx

assert jax.device_count() == 8
TENSOR = nnx.plans.tensor_parallel("model")
PLANS = {"tensor": TENSOR, "both": nnx.plans.fsdp("data", min_size=0) & TENSOR}


class Model(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(64, 64, rngs=rngs)
    self.blocks = nnx.TransformerDecoder(2, 64, 4, rngs=rngs)
    self.head = nnx.LoRALinear(64, 16, lora_rank=2, rngs=rngs)

  def __call__(self, x):
    return self.head(self.blocks(self.embed(x)))


def build(bits=None):
  model = Model(nnx.Rngs(0))
  if bits is not None:
    nnx.quantize(model, bits, only=lambda path, _: "blocks" in path)
  nnx.add_lora(model, 4, rngs=nnx.Rngs(1))
  return model


def step(model, optimizer, x):
  loss_fn = lambda model: (model(x) ** 2).mean()
  loss, grads = nnx.value_and_grad(loss_fn, wrt=nnx.LoRAParam)(model)
  optimizer.update(model, grads)
  return loss


CASES = [
  ("tensor", None, AxisType.Explicit),
  ("both", 8, AxisType.Explicit),
  ("both", 4, AxisType.Auto),
]


@pytest.mark.parametrize("plan, bits, sort", CASES)
def test_it_learns_what_it_learns_on_one_device(plan, bits, sort):
  x, losses = jnp.arange(8 * 5).reshape(8, 5) % 64, []
  for mesh in (None, jax.make_mesh((2, 4), ("data", "model"), axis_types=(sort,) * 2)):
    model = build(bits)
    if mesh is not None:
      model = nnx.shard(model, mesh, PLANS[plan])
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    run = nnx.jit(step)
    if mesh is None:
      losses.append([float(run(model, optimizer, x)) for _ in range(3)])
      continue
    with jax.set_mesh(mesh):
      here = jax.device_put(x, jax.sharding.NamedSharding(mesh, P("data")))
      losses.append([float(run(model, optimizer, here)) for _ in range(3)])
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
  assert losses[0][2] < losses[0][0]


def test_weights_under_a_lora_are_divided_as_without_and_factors_as_they():
  mesh = jax.make_mesh((2, 4), ("data", "model"))
  before, specs = TENSOR.specs(Model(nnx.Rngs(0)), mesh), TENSOR.specs(build(), mesh)
  divided = [path for path, spec in before.items() if "model" in spec]
  assert len(divided) > 8
  for path in divided:
    layer, _, name = path.rpartition(".")
    both = {path, f"{layer}.base_module.{name}"} & set(specs)
    assert both and all(specs[p] == before[path] for p in both), path
  layers = "blocks.blocks.layers."
  for name, a, b in [
    ("attention.query", P(), P(None, None, "model", None)),
    ("attention.out", P(None, "model", None, None), P()),
    ("feed_forward.up", P(), P(None, None, "model")),
    ("feed_forward.down", P(None, "model", None), P()),
  ]:
    for factor, want in (("lora_a", a), ("lora_b", b)):
      spec = specs[f"{layers}{name}.{factor}"]
      assert [*spec] == [*want] or (not any(spec) and not any(want)), (name, factor, spec)
  assert specs["head.lora.lora_b"] == P(None, "model") and not any(specs["head.lora.lora_a"])


class DoRA(nnx.LoRA):
  """A LoRA with Params of its own."""

  def __init__(self, *sizes, rngs, **options):
    super().__init__(*sizes, rngs=rngs, **options)
    self.magnitude = nnx.LoRAParam(jnp.ones(self.out_features))
    self.gate = nnx.LoRAParam(jnp.ones(()))
    self.mix = nnx.LoRAParam(jnp.ones((4, 4)))


def test_what_else_a_kind_of_lora_has_is_whole():
  mesh = jax.make_mesh((2, 4), ("data", "model"))
  base = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
  model = nnx.Sequential(DoRA(64, 4, 64, base_module=base, rngs=nnx.Rngs(1)))
  specs = TENSOR.specs(model, mesh)
  assert specs["layers.0.lora_b"] == P(None, "model")
  assert not any(any(specs[f"layers.0.{name}"]) for name in ("magnitude", "gate", "mix"))


def test_a_lora_around_a_lora_is_divided_as_that_one():
  mesh = jax.make_mesh((2, 4), ("data", "model"))
  model = nnx.FeedForward(64, rngs=nnx.Rngs(0))
  for seed in (1, 2):
    model.down = nnx.LoRA(256, 4, 64, base_module=model.down, rngs=nnx.Rngs(seed))
  specs = TENSOR.specs(model, mesh)
  assert specs["down.lora_a"] == specs["down.base_module.lora_a"] == P("model", None)
  assert specs["down.base_module.base_module.kernel"] == P("model", None)
