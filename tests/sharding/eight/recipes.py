"""Ways to divide training over devices, each equal to one device step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from refax import nnx
from refax.errors import InvalidArgumentError, ShapeMismatchError, ShardingError

assert jax.device_count() == 8
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
X = np.cos(np.arange(8 * 16 * 16.0, dtype=np.float32)).reshape(8, 16, 16)


def mesh_of(shape, names, sort=AUTO):
  return jax.make_mesh(shape, names, axis_types=(sort,) * len(names))


def put(x, mesh, *spec):
  return jax.device_put(x, NamedSharding(mesh, P(*spec)))


# Sequences


@pytest.mark.parametrize(
  ("masked", "causal", "sort"),
  [(False, False, AUTO), (True, False, AUTO), (False, True, AUTO), (True, True, EXPLICIT)],
)
def test_ring_attention_is_attention(masked, causal, sort):
  mesh = mesh_of((2, 4), ("data", "seq"), sort)
  build = lambda **options: nnx.MultiHeadAttention(
    4, 16, num_kv_heads=2, rngs=nnx.Rngs(0), **options
  )
  mask = jnp.arange(16) < jnp.arange(9, 17)[:, None, None, None] if masked else None

  def loss(layer, x, mask):
    return (layer(x, mask=mask, is_causal=causal) ** 2).sum()

  want, grads = nnx.jit(nnx.value_and_grad(loss))(build(), X, mask)
  layer = nnx.shard(build(attention_fn=nnx.ring_attention("seq")), mesh, nnx.plans.replicated)
  with jax.set_mesh(mesh):
    x = put(X, mesh, "data", "seq")
    mask = mask if mask is None else put(mask, mesh, "data")
    got, ours = nnx.jit(nnx.value_and_grad(loss))(layer, x, mask)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for a, b in zip(*map(jax.tree.leaves, (nnx.pure(ours), nnx.pure(grads))), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-4)


def test_ring_attention_sends_parts_of_keys_and_never_gathers():
  mesh = mesh_of((8,), ("seq",))
  layer = nnx.MultiHeadAttention(4, 16, attention_fn=nnx.ring_attention("seq"), rngs=nnx.Rngs(0))
  nnx.shard(layer, mesh, nnx.plans.replicated)
  with jax.set_mesh(mesh):
    found = nnx.collectives(lambda layer, x: layer(x), layer, put(X, mesh, None, "seq"))
  assert set(found.kinds()) == {"collective-permute"}
  # Keys and values, 4 bytes a number, an eighth of the length, in each of eight steps.
  assert found.sent == 2 * 4 * X.size / 8 * 8


def test_the_usual_attention_gathers_the_sequence():
  mesh = mesh_of((8,), ("seq",))
  layer = nnx.shard(nnx.MultiHeadAttention(4, 16, rngs=nnx.Rngs(0)), mesh, nnx.plans.replicated)
  want = nnx.MultiHeadAttention(4, 16, rngs=nnx.Rngs(0))(X)
  with jax.set_mesh(mesh):
    x = put(X, mesh, None, "seq")
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(layer, x), want, atol=1e-5)


def test_what_ring_attention_cannot_do_is_refused():
  mesh, q = mesh_of((8,), ("seq",)), jnp.ones((2, 16, 4, 8))
  attend = nnx.ring_attention("seq", mesh=mesh)
  with pytest.raises(InvalidArgumentError, match="dropout_rate"):
    attend(q, q, q, dropout_rate=0.1)
  with pytest.raises(InvalidArgumentError, match="bias"):
    attend(q, q, q, jnp.ones((16, 16)))
  with pytest.raises(ShardingError, match="size 12 cannot be divided evenly over 8"):
    attend(q[:, :12], q[:, :12], q[:, :12])
  with pytest.raises(ShapeMismatchError, match="16 queries and 8 keys"):
    attend(q, q[:, :8], q[:, :8])
  with pytest.raises(ShardingError, match="no axis 'rows'"):
    nnx.ring_attention("rows", mesh=mesh)(q, q, q)
  with pytest.raises(ShardingError, match="there is none"):
    nnx.ring_attention()(q, q, q)


# Layers


class Block(nnx.Module):
  """It draws, and it counts its calls."""

  def __init__(self, rngs):
    self.linear = nnx.Linear(16, 16, rngs=rngs)
    self.drop = nnx.Dropout(0.2, rngs=rngs)
    self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

  def __call__(self, x):
    self.calls[...] += 1
    return x + self.drop(jnp.tanh(self.linear(x)))


def by_parts(stack, x, count):
  return jnp.concatenate([stack(part) for part in jnp.split(x, count)])


@pytest.mark.parametrize(("sort", "remat"), [(AUTO, False), (EXPLICIT, True)])
def test_a_pipeline_is_the_stack_on_one_microbatch_after_the_other(sort, remat):
  def trained(call, stack, x, place=None):
    optimizer = nnx.Optimizer(stack, optax.adam(1e-2, eps=1e-2), wrt=nnx.Param)
    if place is not None:
      place((stack, optimizer))
    losses = []

    @nnx.jit
    def step(stack, optimizer, x):
      loss, grads = nnx.value_and_grad(lambda stack: (call(stack, x) ** 2).mean())(stack)
      optimizer.update(stack, grads)
      return loss

    for _ in range(2):
      losses.append(float(step(stack, optimizer, x)))
    return losses, stack

  build = lambda: nnx.Stack(Block, 8, rngs=nnx.Rngs(0), remat=remat)
  want, alone = trained(lambda stack, x: by_parts(stack, x, 4), build(), X)
  mesh = mesh_of((4,), ("stage",), sort)
  place = lambda objects: nnx.shard(objects, mesh, nnx.plans.pipeline("stage"))
  with jax.set_mesh(mesh):
    call = lambda stack, x: nnx.pipeline(stack, x, microbatches=4)
    got, piped = trained(call, build(), put(X, mesh), place)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert piped.layers.linear.kernel.sharding.spec == P("stage", None, None)
  np.testing.assert_array_equal(piped.layers.calls[...], alone.layers.calls[...])
  np.testing.assert_allclose(piped.layers.linear.kernel, alone.layers.linear.kernel, atol=1e-5)


def test_a_pipeline_beside_data_parallel():
  mesh = mesh_of((2, 4), ("data", "stage"))
  stack = nnx.Stack(Block, 4, rngs=nnx.Rngs(0))
  want = by_parts(nnx.clone(stack), X, 2)
  nnx.shard(stack, mesh, nnx.plans.pipeline("stage"))
  with jax.set_mesh(mesh):
    run = nnx.jit(lambda stack, x: nnx.pipeline(stack, x, microbatches=2))
    got = run(stack, put(X, mesh, "data"))
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_pipeline_hands_on_to_neighbours_only():
  mesh = mesh_of((8,), ("stage",))
  build = lambda rngs: nnx.Linear(16, 16, rngs=rngs)
  stack = nnx.shard(nnx.Stack(build, 8, rngs=nnx.Rngs(0)), mesh, nnx.plans.pipeline("stage"))
  with jax.set_mesh(mesh):
    call = lambda stack, x: nnx.pipeline(stack, x, microbatches=4)
    found = nnx.collectives(call, stack, put(X, mesh))
  assert found.kinds()["collective-permute"] == 4 + 8 - 1
  assert {x.kind for x in found} <= {"collective-permute", "all-reduce", "all-gather"}


def test_mistakes_in_a_pipeline():
  mesh, stack = mesh_of((4,), ("stage",)), nnx.Stack(Block, 6, rngs=nnx.Rngs(0))
  with pytest.raises(ShardingError, match="size 6 cannot be divided evenly over 4"):
    nnx.pipeline(stack, X, microbatches=4, mesh=mesh)
  with pytest.raises(InvalidArgumentError, match=r"microbatches=3(.|\n)*divides the batch of 8"):
    nnx.pipeline(nnx.Stack(Block, 4, rngs=nnx.Rngs(0)), X, microbatches=3, mesh=mesh)
  with pytest.raises(InvalidArgumentError, match=r"nnx\.Stack"):
    nnx.pipeline(Block(nnx.Rngs(0)), X, microbatches=2, mesh=mesh)
  with pytest.raises(ShardingError, match="there is none"):
    nnx.pipeline(stack, X, microbatches=2)


# Statistics, and gradients in parts


@pytest.mark.parametrize("shared", [True, False])
def test_batch_norm_over_all_devices_or_on_each(shared):
  """By the axes of the mesh, statistics are those of the batch; in shard_map, as one says."""
  mesh = mesh_of((8,), ("data",))
  x = X.reshape(64, 2, 16)[:, 0]
  axis = "data" if shared else None
  norm = nnx.BatchNorm(16, axis_name=axis, rngs=nnx.Rngs(0))
  specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}
  run = nnx.shard_map(lambda norm, x: norm(x), mesh=mesh, check_vma=False, **specs)
  with jax.set_mesh(mesh):
    got = np.asarray(nnx.jit(run)(norm, put(x, mesh, "data")))
  parts = [x] if shared else np.split(x, 8)
  alone = lambda part: nnx.BatchNorm(16, use_fast_variance=False, rngs=nnx.Rngs(0))(part)
  np.testing.assert_allclose(got, np.concatenate([alone(part) for part in parts]), atol=1e-4)


@pytest.mark.parametrize("plan", ["fsdp", "tensor"])
def test_accumulated_gradients_under_a_plan(plan):
  plan = {
    "fsdp": nnx.plans.fsdp("data", min_size=0),
    "tensor": nnx.plans.tensor_parallel("model"),
  }[plan]
  mesh = mesh_of((2, 4), ("data", "model"))
  build = lambda: nnx.TransformerEncoder(2, 16, 4, rngs=nnx.Rngs(0))
  loss = lambda model, x: (model(x) ** 2).mean()
  accumulate = nnx.jit(nnx.accumulate_grads(loss, steps=2))
  want = accumulate(build(), X)
  model = nnx.shard(build(), mesh, plan)
  with jax.set_mesh(mesh):
    got = accumulate(model, put(X, mesh, "data"))
  for a, b in zip(*map(jax.tree.leaves, (nnx.pure(got), nnx.pure(want))), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5)


# What is sent


def test_collectives_are_those_that_the_plans_imply():
  """One layer of 16x64 and 64x16 numbers, a batch of 64, by hand."""
  mesh = mesh_of((8,), ("x",))
  build = lambda: nnx.FeedForward(16, 64, use_bias=False, rngs=nnx.Rngs(0))
  x = X.reshape(-1, 16)[:64]
  kernels = 2 * 16 * 64 * 4

  def found(plan, *spec):
    model = nnx.shard(build(), mesh, plan)
    grads = nnx.jit(lambda model, x: nnx.grad(lambda model: (model(x) ** 2).sum())(model))
    with jax.set_mesh(mesh):
      return nnx.collectives(grads, model, put(x, mesh, *spec))

  data = found(nnx.plans.replicated, "x")
  assert {(c.kind, c.axes) for c in data} == {("all-reduce", ("x",))}
  assert data.sent == 2 * 7 / 8 * kernels
  sharded = found(nnx.plans.fsdp("x", min_size=0), "x")
  assert set(sharded.kinds()) <= {"all-reduce", "reduce-scatter", "all-gather"}
  gathered = [c for c in sharded if c.kind == "all-gather"]
  assert sum(c.nbytes for c in gathered) == kernels
  tensor = found(nnx.plans.tensor_parallel("x"))
  assert {(c.kind, c.axes) for c in tensor} == {("all-reduce", ("x",))}
  assert tensor.sent == 2 * 7 / 8 * x.nbytes  # forward only: nothing needs the gradient of x
