"""A quantized model under a plan computes what it computes on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from refax import nnx

assert jax.device_count() == 8
PLANS = {
  "fsdp": nnx.plans.fsdp("data", min_size=0),
  "tensor": nnx.plans.tensor_parallel("model"),
  "both": nnx.plans.fsdp("data", min_size=0) & nnx.plans.tensor_parallel("model"),
}


class Model(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(64, 64, rngs=rngs)
    self.blocks = nnx.TransformerDecoder(2, 64, 4, rngs=rngs)

  def __call__(self, x):
    return self.embed.attend(self.blocks(self.embed(x)))


def build(bits):
  return nnx.quantize(Model(nnx.Rngs(0)), bits)


CASES = [
  ("fsdp", 8, AxisType.Auto),
  ("tensor", 4, AxisType.Explicit),
  ("both", 8, AxisType.Explicit),
  ("both", 4, AxisType.Auto),
]


@pytest.mark.parametrize("plan, bits, sort", CASES)
def test_a_quantized_model_gives_what_it_gives_on_one_device(plan, bits, sort):
  x = jnp.arange(8 * 5).reshape(8, 5) % 64
  want = nnx.jit(lambda model, x: model(x))(build(bits), x)
  mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(sort,) * 2)
  model = nnx.shard(build(bits), mesh, PLANS[plan])
  with jax.set_mesh(mesh):
    x = jax.device_put(x, jax.sharding.NamedSharding(mesh, P("data")))
    got = nnx.jit(lambda model, x: model(x))(model, x)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_integers_and_scales_are_divided_as_the_weight_would_be():
  mesh = jax.make_mesh((2, 4), ("data", "model"))
  before = PLANS["tensor"].specs(Model(nnx.Rngs(0)), mesh)
  for bits in (8, 4):
    specs = PLANS["tensor"].specs(build(bits), mesh)
    for path, spec in before.items():
      if path.endswith(("kernel", "embedding")):
        assert specs[f"{path}.values"] == spec
    assert specs["blocks.blocks.layers.feed_forward.up.kernel.scale"] == P(None, None, "model")
    assert specs["embed.embedding.scale"] == P("model", None)
  model = nnx.shard(build(4), mesh, PLANS["both"])
  assert model.blocks.blocks.layers.feed_forward.down.kernel.values.sharding.spec == P(
    None, "model", "data"
  )
