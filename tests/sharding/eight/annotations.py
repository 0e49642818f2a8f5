"""out_sharding in the metadata of Variables: where they are laid out, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from refax import nnx
from refax.errors import ShardingError

assert jax.device_count() == 8
SORTS = pytest.mark.parametrize(
  "sort", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)
RULES = [("embed", None), ("mlp", "model"), ("batch", ("data", "model"))]


def mesh_of(sort=AxisType.Auto):
  return jax.make_mesh((2, 4), ("data", "model"), axis_types=(sort,) * 2)


def linear(names, **options):
  return nnx.Linear(8, 16, kernel_metadata={"out_sharding": names}, rngs=nnx.Rngs(0), **options)


@SORTS
@pytest.mark.parametrize("hijax", [True, False])
@pytest.mark.parametrize("keyword", ["out_sharding", "sharding", "sharding_names"])
def test_a_variable_is_laid_out_where_it_is_made(keyword, hijax, sort):
  x = jnp.arange(32.0).reshape(4, 8)
  with jax.set_mesh(mesh_of(sort)):
    v = nnx.Param(x, is_hijax=hijax, **{keyword: (None, "model")})
    assert v.sharding.spec == P(None, "model")
    np.testing.assert_array_equal(np.asarray(v[...]), np.asarray(x))
  assert v.out_sharding == v.sharding_names == (None, "model")


@SORTS
def test_under_jit_and_without_a_mesh_of_the_context(sort):
  mesh = mesh_of(sort)
  with jax.set_mesh(mesh):
    made = nnx.jit(lambda: linear((None, "model")))()
  assert made.kernel.sharding.spec == P(None, "model")
  v = nnx.Param(jnp.ones((4, 8)), out_sharding=("data", None), mesh=mesh)
  assert v.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2)
  w = nnx.Param(jnp.ones((4, 8)), out_sharding=NamedSharding(mesh, P("model")))
  assert w.sharding.is_equivalent_to(NamedSharding(mesh, P("model")), 2)
  plain = nnx.Param(jnp.ones((4, 8)), out_sharding=("data", None))
  assert len(plain.sharding.device_set) == 1


def test_rules_are_for_a_block_or_a_function_and_part_of_what_is_compiled():
  mesh = mesh_of()
  build = nnx.jit(lambda: linear(("embed", "mlp")))
  with jax.set_mesh(mesh):
    with nnx.logical_axis_rules(RULES):
      assert build().kernel.sharding.spec == P(None, "model")
    with nnx.logical_axis_rules([("embed", "data"), ("mlp", None)]):
      assert build().kernel.sharding.spec[0] == "data"
      assert nnx.get_logical_axis_rules() == (("embed", "data"), ("mlp", None))
    decorated = nnx.logical_axis_rules(RULES)(lambda: linear(("embed", "mlp")))
    assert decorated().kernel.sharding.spec == P(None, "model")
    own = nnx.Param(jnp.ones((8, 8)), out_sharding=("batch", "embed"), sharding_rules=tuple(RULES))
    assert own.sharding.spec[0] == ("data", "model")
  assert nnx.get_logical_axis_rules() == ()


def test_eager_sharding_can_be_switched_off():
  with jax.set_mesh(mesh_of()):
    with nnx.use_eager_sharding(False):
      assert not nnx.using_eager_sharding()
      v = nnx.Param(jnp.ones((4, 8)), out_sharding=(None, "model"))
    w = nnx.Param(jnp.ones((4, 8)), out_sharding=(None, "model"), eager_sharding=False)
  assert v.sharding.is_fully_replicated and w.sharding.is_fully_replicated
  assert not w.has_metadata("eager_sharding")


@pytest.mark.parametrize(
  ("names", "options", "message"),
  [
    (("nodes", None), {}, r"no axis 'nodes'(.|\n)*at: .*Param, created at annotations"),
    (("model", "model"), {}, "two axes of an array .*'model'"),
    (("data", None, "model"), {}, "an array has 2 axes and its sharding names 3"),
    ((None, ("data", "model")), {}, r"size 4 cannot be divided evenly over 8(.|\n)*axis 1"),
    (("a", None), {"sharding_rules": (("a", "nodes"),)}, "no axis 'nodes'"),
  ],
)
def test_what_does_not_fit_is_refused_with_the_variable(names, options, message):
  with jax.set_mesh(mesh_of()), pytest.raises(ShardingError, match=message):
    nnx.Param(jnp.ones((6, 4)), out_sharding=names, **options)


def test_rules_that_contradict_each_other():
  with (
    pytest.raises(ShardingError, match="'a' different axes"),
    nnx.logical_axis_rules([("a", "data"), ("a", "model")]),
  ):
    pass
  v = nnx.Param(jnp.ones(8), out_sharding=("a",), sharding_rules=(("a", "data"),))
  with nnx.logical_axis_rules([("a", "model")]):
    with pytest.raises(ShardingError, match=r"different axes(.|\n)*at: .*Param"):
      nnx.get_partition_spec(v)
    with jax.set_mesh(mesh_of()), pytest.raises(ShardingError, match="different axes"):
      nnx.Param(jnp.ones(8), out_sharding=("a",), sharding_rules=(("a", "data"),))


@SORTS
def test_what_vmap_makes_names_the_axis_that_it_adds(sort):
  with jax.set_mesh(mesh_of(sort)):
    build = lambda rngs: linear((None, "model"))
    for option in (None, {nnx.PARTITION_NAME: None}):
      layers = nnx.vmap(build, transform_metadata=option)(nnx.Rngs(0).split(4))
      assert layers.kernel.out_sharding == (None, None, "model")
      assert layers.kernel.sharding.spec == P(None, None, "model")
  named = nnx.vmap(build, transform_metadata={nnx.PARTITION_NAME: "layers"})
  layers = named(nnx.Rngs(0).split(4))
  assert layers.kernel.out_sharding == ("layers", None, "model")
  seen = []

  def forward(x, layer):
    seen.append(layer.kernel.out_sharding)
    return layer.kernel[...][0] + x

  over = {"in_axes": (nnx.Carry, 0), "out_axes": nnx.Carry}
  nnx.scan(forward, transform_metadata={nnx.PARTITION_NAME: "layers"}, **over)(
    jnp.zeros(16), layers
  )
  assert set(seen) == {(None, "model")}
  assert layers.kernel.out_sharding == ("layers", None, "model")


def test_a_stack_of_annotated_layers_and_gradients_of_it():
  with jax.set_mesh(mesh_of()):
    metadata = {"out_sharding": (None, "model")}
    layer = lambda rngs: nnx.Linear(8, 8, kernel_metadata=metadata, rngs=rngs)
    stack = nnx.Stack(layer, 3, rngs=nnx.Rngs(0))
    assert stack.layers.kernel.sharding.spec == P(None, None, "model")
    grads = nnx.grad(lambda s: s(jnp.ones((2, 8))).sum())(stack)
  assert grads.layers.kernel.out_sharding == (None, None, "model")
  specs = nnx.plans.annotated().specs(stack, mesh_of())
  assert specs["layers.kernel"] == P(None, None, "model")


def test_specs_shardings_and_abstract_models():
  mesh = mesh_of()
  model = linear((None, "model"))
  specs = nnx.get_partition_spec(nnx.state(model))
  assert (specs.kernel[...], specs.bias[...]) == (P(None, "model"), P())
  shardings = nnx.get_named_sharding(nnx.state(model), mesh)
  assert shardings.kernel[...] == NamedSharding(mesh, P(None, "model"))
  graphdef, state = nnx.get_abstract_model(lambda: linear((None, "model")), mesh)
  assert state.kernel[...].sharding == NamedSharding(mesh, P(None, "model"))
  assert nnx.merge(graphdef, state).kernel.shape == (8, 16)
  with nnx.logical_axis_rules(RULES), jax.set_mesh(mesh):
    abstract = nnx.as_abstract(nnx.eval_shape(lambda: linear(("embed", "mlp"))))
  assert abstract.kernel[...].sharding.spec == P(None, "model")
  with pytest.raises(ShardingError, match=r"no axis 'nodes'(.|\n)*kernel"):
    wrong = linear((None, "nodes"))
    nnx.get_named_sharding(nnx.state(wrong), mesh)


@SORTS
def test_shard_without_a_plan_goes_by_the_annotations(sort):
  mesh, model = mesh_of(sort), linear((None, "model"))
  optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
  nnx.shard((model, optimizer), mesh)
  assert model.kernel.sharding.spec == P(None, "model")
  assert optimizer.opt_state[0].mu["kernel"].sharding.spec == P(None, "model")
  assert model.bias.sharding.spec == P()
  with jax.set_mesh(mesh):
    born = nnx.create_sharded(lambda: linear((None, "model")))
  assert born.kernel.sharding.spec == P(None, "model")


def test_inside_shard_map_axes_are_not_jaxs_to_lay_out():
  @jax.shard_map(mesh=mesh_of(), in_specs=P("data"), out_specs=P("data"), check_vma=False)
  def f(x):
    return nnx.Param(x, out_sharding=("data", None), is_hijax=False)[...] * 2

  with jax.set_mesh(mesh_of()):
    assert f(jnp.ones((4, 2))).sum() == 16


def test_initializers_that_annotate():
  init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
  noted = nnx.with_metadata(nnx.initializers.zeros_init(), tag="shift")
  model = nnx.Linear(8, 16, kernel_init=init, bias_init=noted, rngs=nnx.Rngs(0))
  assert model.kernel.out_sharding == (None, "model")
  assert not model.kernel.has_metadata("mesh")
  assert model.bias.tag == "shift"
  np.testing.assert_array_equal(model.kernel[...], nnx.Linear(8, 16, rngs=nnx.Rngs(0)).kernel[...])


@SORTS
@pytest.mark.parametrize("hijax", [True, False])
@pytest.mark.parametrize("name", ["opt_sharding", "optimizer_sharding"])
def test_the_state_of_an_optimizer_has_the_names_of_its_parameter_or_others(name, hijax, sort):
  with jax.set_mesh(mesh_of(sort)), nnx.use_hijax(hijax):
    model = linear((None, "model"))
    other = linear((None, "model"))
    other.kernel.set_metadata(**{name: ("data", "model")})
    model = nnx.Dict(a=model, b=other, c=nnx.Linear(8, 16, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    mu = optimizer.opt_state[0].mu
    assert mu["a"]["kernel"].out_sharding == (None, "model")
    assert mu["a"]["kernel"].sharding.spec == P(None, "model")
    assert mu["b"]["kernel"].out_sharding == ("data", "model")
    assert mu["b"]["kernel"].sharding.spec == P("data", "model")
    assert not mu["c"]["kernel"].has_metadata("out_sharding")
    grads = nnx.grad(lambda m: sum(x(jnp.ones((2, 8))).sum() for x in (m.a, m.b, m.c)))(model)
    nnx.jit(lambda m, o, g: o.update(m, g) and None)(model, optimizer, grads)
    assert mu["b"]["kernel"].sharding.spec == P("data", "model")
  specs = nnx.plans.annotated().specs((model, optimizer), mesh_of())
  assert specs["1.opt_state.0.mu.b.kernel"] == P("data", "model")
