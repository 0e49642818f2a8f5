"""What a reviewer found who had not written any of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from refax import nnx
from refax.errors import (
  ExplicitAxesError,
  InvalidArgumentError,
  ShapeMismatchError,
  ShardingError,
)

assert jax.device_count() == 8
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
FSDP, TENSOR = nnx.plans.fsdp("data", min_size=0), nnx.plans.tensor_parallel("model")


def mesh_of(sorts=(AUTO, AUTO), shape=(2, 4), names=("data", "model")):
  return jax.make_mesh(shape, names, axis_types=sorts)


def annotated(rngs, names=("data", "model")):
  return nnx.Linear(16, 16, kernel_metadata={"out_sharding": names}, rngs=rngs)


# Names of axes


def test_names_are_filled_up_and_kept_through_vmap_and_scan():
  model = nnx.Dict(p=nnx.Param(jnp.zeros((4, 8, 8)), out_sharding=("data",)))
  names = ("data", None, None)
  assert model.p.out_sharding == names
  assert nnx.vmap(nnx.grad(lambda m: m.p[...].sum()))(model).p.out_sharding == names
  assert nnx.vmap(lambda s: s)(nnx.state(model)).p.out_sharding == names
  named = {nnx.PARTITION_NAME: "data"}
  nnx.vmap(lambda m: m.p[...].sum(), transform_metadata=named)(model)
  assert model.p.out_sharding == names


def test_layers_go_into_a_stack_and_come_out_of_it_with_their_names():
  stack = nnx.Stack.of([annotated(nnx.Rngs(i)) for i in range(4)])
  assert stack.layers.kernel.out_sharding == (None, "data", "model")
  assert nnx.shard(stack, mesh_of()).layers.kernel.sharding.spec == P(None, "data", "model")
  layer = nnx.Stack(annotated, 4, rngs=nnx.Rngs(0))[0]
  assert layer.kernel.out_sharding == ("data", "model")
  assert nnx.shard(layer, mesh_of()).kernel.sharding.spec == P("data", "model")


@pytest.mark.parametrize("axes", [(0,), ("data", 1), (("data", 2), None)])
def test_what_names_no_axis_is_refused(axes):
  with pytest.raises(ShardingError, match="names axes, by a string"):
    nnx.Param(jnp.ones((8, 8)), out_sharding=axes)


def test_a_single_name_rules_in_a_mapping_and_in_a_tuple():
  with jax.set_mesh(mesh_of()), nnx.logical_axis_rules({"a": "data", "b": "model"}):
    assert nnx.Param(jnp.ones((8, 8)), out_sharding="a").sharding.spec[0] == "data"
    v = nnx.Param(jnp.ones((8, 8)), out_sharding=(("a", "b"), None))
    assert v.sharding.spec[0] == ("data", "model")
    own = nnx.Param(jnp.ones((8, 8)), out_sharding=("c", None), sharding_rules={"c": "data"})
    assert own.sharding.spec[0] == "data"
  plan = nnx.plans.annotated({"emb": "data"})
  specs = plan.specs(nnx.Dict(x=nnx.Param(jnp.ones(8), out_sharding=("emb",))), mesh_of())
  assert specs["x"] == P("data")


def test_annotated_initializers_of_layers_that_reshape():
  init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model", None))
  layer = nnx.MultiHeadAttention(4, 16, kernel_init=init, rngs=nnx.Rngs(0))
  assert layer.query.kernel.out_sharding == (None, "model", None)
  assert layer.query.kernel.shape == (16, 4, 4)


# Plans


def test_moments_of_a_part_do_not_lie_as_another_parameter():
  linear = lambda: nnx.Linear(16, 16, rngs=nnx.Rngs(0))
  model = nnx.Dict(a=linear(), head=linear())
  optimizer = nnx.Optimizer(model.head, optax.adam(1e-3), wrt=nnx.Param)
  plan = nnx.Plan({"a.kernel": P("data"), "head.kernel": P(None, "model")})
  specs = plan.specs((model, optimizer), mesh_of())
  assert specs["0.head.kernel"] == P(None, "model")
  assert specs["1.opt_state.0.mu.kernel"] == P()


@pytest.mark.parametrize(
  "plan",
  [
    nnx.plans.fsdp("nodes"),
    nnx.plans.pipeline("nodes"),
    nnx.plans.tensor_parallel("nodes"),
    nnx.Plan({nnx.LoRAParam: P("nodes")}),
    FSDP & nnx.plans.pipeline("nodes"),
  ],
)
def test_an_axis_that_the_mesh_lacks_is_refused_also_where_nothing_is_divided(plan):
  with pytest.raises(ShardingError, match=r"no axis 'nodes'(.|\n)*at: +the plan nnx"):
    nnx.shard(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), mesh_of(), plan)


def test_fsdp_over_two_axes():
  plan = nnx.plans.fsdp(("data", "model"), min_size=0)
  specs = plan.specs(nnx.Linear(8, 12, rngs=nnx.Rngs(0)), mesh_of())
  assert specs == {"bias": P(), "kernel": P(("data", "model"), None)}


def test_specs_that_are_too_long_and_variables_that_hold_pytrees():
  model = nnx.Dict(linear=nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
  wrong = nnx.plans.tensor_parallel(layers={nnx.Linear: {"bias": P(None, "model")}})
  with pytest.raises(ShardingError, match=r"has 1 axes and its sharding names 2(.|\n)*bias"):
    nnx.shard(model, mesh_of(), wrong)
  tree = nnx.Dict(x=nnx.Param({"a": jnp.ones((8, 8))}, out_sharding=("data",)))
  assert nnx.shard(tree, mesh_of()).x[...]["a"].sharding.is_fully_replicated


def test_what_stands_beside_the_layers_of_a_stack_is_not_stacked():
  class Deep(nnx.Stack):
    def __init__(self, rngs):
      super().__init__(nnx.Linear, 4, 16, 16, rngs=rngs)
      self.last = nnx.Linear(16, 32, rngs=rngs)

  specs = (TENSOR & nnx.plans.pipeline("data")).specs(Deep(nnx.Rngs(0)), mesh_of())
  assert specs["last.kernel"] == P(None, "model")
  assert specs["layers.kernel"] == P("data", None, "model")


def test_an_ensemble_is_divided_by_heads_and_words():
  build = nnx.vmap(lambda rngs: nnx.MultiHeadAttention(4, 16, rngs=rngs))
  specs = TENSOR.specs(build(nnx.Rngs(0).split(4)), mesh_of())
  assert specs["query.kernel"] == P(None, None, "model", None)
  assert specs["out.kernel"] == P(None, "model", None, None)


@pytest.mark.parametrize("mesh", ["data", FSDP, mesh_of().abstract_mesh])
def test_a_mesh_that_is_none(mesh):
  with pytest.raises(InvalidArgumentError, match="a mesh of devices"):
    nnx.shard(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), mesh, FSDP)


def test_a_spec_that_is_none():
  with pytest.raises(InvalidArgumentError, match="the spec for 'kernel'"):
    nnx.Plan({"kernel": "data"})


@pytest.mark.parametrize("sorts", [(EXPLICIT, AUTO), (AUTO, EXPLICIT)])
def test_meshes_with_axes_of_both_sorts(sorts):
  model, x = nnx.Linear(16, 16, rngs=nnx.Rngs(0)), np.cos(np.arange(128.0)).reshape(8, 16)
  x = x.astype(np.float32)
  want = model(x)
  mesh = mesh_of(sorts)
  nnx.shard(model, mesh, FSDP & TENSOR)
  with jax.set_mesh(mesh):
    got = nnx.jit(lambda m, x: m(x))(model, jax.device_put(x, NamedSharding(mesh, P("data"))))
  np.testing.assert_allclose(np.asarray(got), want, atol=1e-5)


# Ring attention and pipelines


def test_ring_attention_with_explicit_axes_and_masks_and_with_wrong_heads():
  mesh, q = mesh_of((EXPLICIT,), (8,), ("seq",)), jnp.cos(jnp.arange(64.0)).reshape(1, 8, 2, 4)
  mask = jnp.tri(8, dtype=bool)
  want = nnx.dot_product_attention(q, q, q, mask=mask)
  with jax.set_mesh(mesh):
    np.testing.assert_allclose(nnx.ring_attention()(q, q, q, mask=mask), want, atol=1e-5)
  with pytest.raises(ShapeMismatchError, match="heads"):
    nnx.ring_attention(mesh=mesh)(jnp.ones((1, 8, 3, 4)), q, q)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  ("shape", "plan"),
  [((4, 2), nnx.plans.pipeline()), ((1, 8), nnx.plans.pipeline() & FSDP)],
  ids=["four stages", "one stage"],
)
def test_a_pipeline_outside_of_jit_in_any_dtype_and_its_gradients(shape, plan, dtype):
  mesh = mesh_of(shape=shape, names=("stage", "data"))
  stack = nnx.Stack(nnx.Linear, 4, 16, 16, param_dtype=dtype, rngs=nnx.Rngs(0))
  x = jnp.cos(jnp.arange(128.0)).reshape(8, 16).astype(dtype)
  loss = lambda stack, x: (stack(x).astype(jnp.float32) ** 2).sum()
  want, grads = nnx.value_and_grad(loss, argnums=(0, 1))(stack, x)
  nnx.shard(stack, mesh, plan)
  with jax.set_mesh(mesh):
    piped = lambda stack, x: loss(lambda x: nnx.pipeline(stack, x, microbatches=2), x)
    np.testing.assert_allclose(piped(stack, x), want, rtol=2e-2)
    for run in (lambda f: f, nnx.jit):
      got, ours = run(nnx.value_and_grad(piped, argnums=(0, 1)))(stack, x)
      np.testing.assert_allclose(got, want, rtol=2e-2)
      close = {"rtol": 3e-2, "atol": 0.1} if dtype == jnp.bfloat16 else {"atol": 1e-4}
      for a, b in zip(*map(jax.tree.leaves, (nnx.pure(ours), nnx.pure(grads))), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), **close)


@pytest.mark.parametrize(("x", "parts"), [(jnp.float32(1), 1), (jnp.ones((8, 16)), 2.0)])
def test_what_is_no_batch(x, parts):
  mesh = mesh_of(shape=(4, 2), names=("stage", "data"))
  stack = nnx.Stack(nnx.Linear, 4, 16, 16, rngs=nnx.Rngs(0))
  with pytest.raises(InvalidArgumentError, match="microbatches"):
    nnx.pipeline(stack, x, microbatches=parts, mesh=mesh)


# What the review had not tried


@pytest.mark.parametrize("sort", [AUTO, EXPLICIT])
def test_a_step_that_is_checked_for_nan(sort):
  mesh = mesh_of((sort, sort))
  model = nnx.shard(nnx.FeedForward(16, 64, rngs=nnx.Rngs(0)), mesh, FSDP & TENSOR)
  step = nnx.debug.check(lambda model, x: model(x).sum())
  with jax.set_mesh(mesh):
    x = jax.device_put(np.ones((8, 16), np.float32), NamedSharding(mesh, P("data")))
    assert np.isfinite(step(model, x))
    assert nnx.find_nonfinite(lambda x: x.sum())(x) is None
    nan = np.full(model.up.kernel.shape, np.nan, np.float32)
    model.up.kernel[...] = jax.device_put(nan, model.up.kernel.sharding)
    with pytest.raises(nnx.NonFiniteError, match="not finite"):
      step(model, x)
    if sort is AUTO:
      assert "up.kernel" in nnx.find_nonfinite(lambda m, x: m(x).sum())(model, x).module
    else:
      with pytest.raises(ExplicitAxesError, match=r"explicit(.|\n)*fix: .*AxisType.Auto"):
        nnx.find_nonfinite(lambda m, x: m(x).sum())(model, x)


@pytest.mark.parametrize("sort", [AUTO, EXPLICIT])
def test_a_lojax_model_returned_from_plain_jit(sort):
  loss = lambda model, x: (model(x) ** 2).mean()

  @jax.jit
  def step(model, x):
    return jax.tree.map(lambda p, g: p - 0.1 * g, model, jax.grad(loss)(model, x))

  x, mesh = np.cos(np.arange(128, dtype=np.float32)).reshape(8, 16), mesh_of((sort, sort))
  build = lambda: nnx.FeedForward(16, 64, rngs=nnx.Rngs(0))
  want = step(nnx.to_lojax(build()), x)
  model = nnx.to_lojax(nnx.shard(build(), mesh, FSDP & TENSOR))
  with jax.set_mesh(mesh):
    got = step(model, jax.device_put(x, NamedSharding(mesh, P("data"))))
  assert got.up.kernel.sharding.spec == P("data", "model")
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-6)
