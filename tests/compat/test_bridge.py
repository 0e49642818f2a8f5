"""The bridge to Linen: what each side has of the other, and that the numbers are the same."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from refax.compat import nnx
from refax.compat.nnx import bridge

linen = pytest.importorskip("flax.linen")

X = jnp.arange(8.0).reshape(2, 4)
KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


@pytest.fixture(params=[False, True], ids=["lojax", "hijax"])
def hijax(request):
  with nnx.use_hijax(request.param):
    yield request.param


class Net(linen.Module):
  """Two levels, two collections, dropout."""

  rate: float = 0.0

  @linen.compact
  def __call__(self, x, train=False):
    x = linen.Dense(3, name="dense")(x)
    x = linen.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x)
    return linen.Dropout(self.rate, deterministic=not train)(x)

  @linen.compact
  def scaled(self, x):
    return x * self.param("scale", linen.initializers.ones, ())


class Scale(nnx.Module):
  """A Param, statistics, and a dropout, in NNX."""

  def __init__(self, size, *, factor=2.0, rngs):
    self.w = nnx.Param(rngs.params.normal((size,)))
    self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.factor = factor

  def __call__(self, x):
    self.calls[...] += 1
    return self.factor * self.w * x

  def dropped(self, x):
    return self.dropout(x)


# A Linen module in an NNX model.


def test_variables_are_attributes_typed_by_their_collection(hijax):
  model = bridge.ToNNX(Net(), rngs=nnx.Rngs(0)).lazy_init(X)
  assert {k: type(v) for k, v in model.norm.items()} == {
    "bias": nnx.Param,
    "scale": nnx.Param,
    "mean": nnx.BatchStat,
    "var": nnx.BatchStat,
  }
  assert model.dense["kernel"].is_hijax == hijax
  assert set(nnx.state(model, nnx.Param)) == {"dense", "norm"}


def test_a_call_computes_what_linen_computes():
  model = bridge.ToNNX(Net(), rngs=nnx.Rngs(0)).lazy_init(X)
  variables = bridge.variables.nnx_attrs_to_linen_vars(model._variables())
  assert set(variables) == {"params", "batch_stats"}
  np.testing.assert_array_equal(model(X), Net().apply(variables, X))


def test_the_key_of_init_is_that_of_the_stream_params():
  model = bridge.ToNNX(linen.Dense(3), rngs=jax.random.key(7)).lazy_init(X)
  key = nnx.Rngs(params=jax.random.key(7)).params()
  np.testing.assert_array_equal(
    model.kernel, linen.Dense(3).init({"params": key}, X)["params"]["kernel"]
  )


def test_what_a_call_writes_is_in_the_same_variables(hijax):
  model = bridge.ToNNX(Net(), rngs=nnx.Rngs(0)).lazy_init(X)
  mean = model.norm["mean"]
  model(X, train=True, mutable=["batch_stats"])
  assert model.norm["mean"] is mean
  assert float(jnp.abs(mean[...]).sum()) > 0


def test_without_mutable_linen_refuses_the_write():
  model = bridge.ToNNX(Net(), rngs=nnx.Rngs(0)).lazy_init(X)
  with pytest.raises(Exception, match="immutable"):
    model(X, train=True)


def test_a_collection_that_comes_later_is_added():
  class Counted(linen.Module):
    @linen.compact
    def __call__(self, x):
      self.sow("intermediates", "seen", x.sum())
      return x

  model = bridge.ToNNX(Counted()).lazy_init(X)
  model(X, mutable=["intermediates"])
  assert isinstance(model.seen, nnx.Intermediate)
  assert float(model.seen.get_value()[0]) == 28


def test_methods_are_found_by_name_and_by_attribute():
  model = bridge.ToNNX(Net(), rngs=nnx.Rngs(0))
  assert bridge.lazy_init(model.scaled, X) is not model
  assert list(nnx.state(model, nnx.Param)) == ["scale"]
  np.testing.assert_array_equal(model.scaled(X), X)
  np.testing.assert_array_equal(model(X, method="scaled"), X)


def test_a_name_that_is_missing_says_to_initialize():
  model = bridge.ToNNX(linen.Dense(3), rngs=nnx.Rngs(0))
  with pytest.raises(AttributeError, match=r"neither ToNNX nor Dense has 'kernel'(.|\n)*lazy_init"):
    _ = model.kernel
  with pytest.warns(DeprecationWarning, match="to_nnx__module"):
    assert isinstance(model.module, linen.Dense)


def test_lazy_init_reaches_all_linen_modules_below():
  class Outer(nnx.Module):
    def __init__(self, rngs):
      self.first = bridge.ToNNX(linen.Dense(3), rngs)
      self.rest = [bridge.ToNNX(linen.Dense(2), rngs)]

    def __call__(self, x):
      return self.rest[0](self.first(x))

  model = bridge.lazy_init(Outer(nnx.Rngs(0)), X)
  assert model.rest[0].kernel.shape == (3, 2)
  assert "to_nnx__initializing" not in vars(model.first)
  np.testing.assert_array_equal(model(X), model(X))
  with pytest.raises(ValueError, match=r"Module or a method(.|\n)*fix: lazy_init\(model, x\)"):
    bridge.lazy_init(len, X)


def test_dropout_draws_from_the_streams_and_from_rngs_of_the_call():
  model = bridge.ToNNX(Net(0.5), rngs=nnx.Rngs(0, dropout=1)).lazy_init(X)
  run = lambda **kw: model(X, train=True, mutable=["batch_stats"], **kw)
  assert not np.array_equal(run(), run())
  np.testing.assert_array_equal(run(rngs=nnx.Rngs(dropout=3)), run(rngs=nnx.Rngs(dropout=3)))


def test_a_model_with_linen_inside_learns_as_linen_does(hijax):
  model = bridge.ToNNX(Net(), rngs=nnx.Rngs(0)).lazy_init(X)
  variables = bridge.variables.nnx_attrs_to_linen_vars(model._variables())
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    loss = lambda model: (model(X, train=True, mutable=["batch_stats"]) ** 2).sum()
    optimizer.update(model, nnx.grad(loss)(model))

  for _ in range(2):
    step(model, optimizer)

  params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
  for _ in range(2):

    def loss(params, stats=stats):
      y, new = Net().apply({"params": params} | stats, X, train=True, mutable=["batch_stats"])
      return (y**2).sum(), new

    grads, stats = jax.grad(loss, has_aux=True)(params)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
  got = bridge.variables.nnx_attrs_to_linen_vars(model._variables())
  want = {"params": params} | stats
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_lazy_init_under_vmap_makes_stacked_variables(hijax):
  @nnx.split_rngs(splits=5)
  @nnx.vmap(in_axes=(0, None))
  def each(model, x):
    return model(x)

  class Ensemble(nnx.Module):
    def __init__(self, rngs):
      self.inner = bridge.ToNNX(linen.Dense(3), rngs)

    def __call__(self, x):
      return each(self.inner, x)

  model = bridge.lazy_init(Ensemble(nnx.Rngs(0)), X)
  assert model.inner.kernel.shape == (5, 4, 3)
  assert model(X).shape == (5, 2, 3)


# Boxes.


def test_boxes_become_metadata_and_come_back():
  init = linen.initializers.lecun_normal()
  dense = linen.Dense(
    6,
    kernel_init=linen.with_partitioning(init, ("in", "out")),
    bias_init=linen.with_logical_partitioning(linen.initializers.zeros, ("embed",)),
  )
  variables = dense.init(jax.random.key(0), X)
  attrs = bridge.variables.linen_vars_to_nnx_attrs(variables)
  assert attrs["kernel"].out_sharding == ("in", "out")
  assert attrs["bias"].out_sharding == ("embed",)
  back = bridge.variables.nnx_attrs_to_linen_vars(attrs)
  assert isinstance(back["params"]["kernel"], linen.Partitioned)
  assert isinstance(back["params"]["bias"], linen.LogicallyPartitioned)
  assert jax.tree.structure(back) == jax.tree.structure(variables)


def test_two_collections_with_one_path_are_an_error_that_names_both():
  with pytest.raises(ValueError, match=r"path a/b(.|\n)*'params'(.|\n)*'cache'(.|\n)*fix: name"):
    bridge.variables.linen_vars_to_nnx_attrs(
      {"params": {"a": {"b": 1.0}}, "cache": {"a": {"b": 2}}}
    )


def test_what_is_no_variable_has_no_collection():
  with pytest.raises(ValueError, match=r"a/b belongs to no collection(.|\n)*got: int(.|\n)*fix:"):
    bridge.variables.nnx_attrs_to_linen_vars({"a": {"b": 1}})


def test_other_metadata_is_kept_in_a_box_that_jit_takes():
  init = nnx.with_partitioning(nnx.initializers.ones, ("in", "out"))
  model = bridge.to_linen(nnx.Linear, 4, 6, kernel_init=init)
  variables = jax.jit(model.init)(jax.random.key(0), X)
  box = variables["params"]["kernel"]
  assert isinstance(box, bridge.NNXMeta)
  assert linen.get_partition_spec(variables)["params"]["kernel"] == PartitionSpec("in", "out")
  assert box.to_nnx_variable().out_sharding == ("in", "out")
  np.testing.assert_array_equal(model.apply(variables, X), X @ jnp.ones((4, 6)))
  plain = bridge.to_linen(nnx.Linear, 4, 6, kernel_init=init, metadata_fn=None)
  assert isinstance(plain.init(jax.random.key(0), X)["params"]["kernel"], jax.Array)


def test_a_box_has_one_name_more_where_linen_maps_over_it():
  init = nnx.with_partitioning(nnx.initializers.ones, ("in", "out"))
  stacked = linen.vmap(
    bridge.ToLinen,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    metadata_params={linen.PARTITION_NAME: "layers"},
  )(nnx.Linear, args=(4, 6), kwargs=linen.FrozenDict(kernel_init=init))
  box = stacked.init(jax.random.key(0), X)["params"]["kernel"]
  assert box.value.shape == (2, 4, 6)
  assert box.metadata["out_sharding"] == ("layers", "in", "out")


# An NNX Module in a Linen model.


def test_variables_are_in_the_collections_of_their_types():
  model = bridge.to_linen(Scale, 4)
  variables = model.init(KEYS, X)
  assert set(variables) == {"params", "batch_stats"}
  assert int(variables["batch_stats"]["calls"]) == 0  # as they are before the call
  np.testing.assert_array_equal(model.apply(variables, X), 2 * variables["params"]["w"] * X)


def test_what_the_module_writes_goes_to_mutable_collections(hijax):
  model = bridge.to_linen(Scale, 4)
  variables = model.init(KEYS, X)
  _, updates = model.apply(variables, X, mutable=["batch_stats"])
  assert list(updates) == ["batch_stats"]
  _, updates = model.apply(variables | updates, X, mutable=["batch_stats"])
  assert int(updates["batch_stats"]["calls"]) == 2


def test_linen_differentiates_through_the_module(hijax):
  model = bridge.to_linen(Scale, 4, factor=3.0)
  variables = model.init(KEYS, X)

  @jax.jit
  def loss(params):
    y, _ = model.apply(variables | {"params": params}, X, mutable=["batch_stats"])
    return y.sum()

  np.testing.assert_array_equal(jax.grad(loss)(variables["params"])["w"], 3 * X.sum(0))


def test_streams_are_those_of_linen():
  model = bridge.to_linen(Scale, 4)
  variables = model.init(KEYS, X)
  run = lambda seed: model.apply(
    variables, jnp.ones(64), nnx_method="dropped", rngs={"dropout": jax.random.key(seed)}
  )
  assert not np.array_equal(run(1), run(2))
  np.testing.assert_array_equal(run(1), run(1))


def test_methods_and_keywords_are_attributes_as_in_linen():
  class Outer(linen.Module):
    def setup(self):
      self.embed = bridge.to_linen(nnx.Embed, 5, features=4)

    def __call__(self, x):
      return self.embed(x)

    def attend(self, x):
      return self.embed.attend(x), self.embed.features

  variables = Outer().init(jax.random.key(0), jnp.arange(5))
  scores, features = Outer().apply(variables, X, method="attend")
  assert features == 4
  np.testing.assert_allclose(scores, X @ variables["params"]["embed"]["embedding"].T, rtol=1e-5)


def test_a_module_without_streams_and_one_that_sows():
  class Counter(nnx.Module):
    def __init__(self):
      self.count = nnx.BatchStat(jnp.array(0))

    def __call__(self):
      self.count[...] += 1
      self.sow(nnx.Intermediate, "seen", self.count[...])

  model = bridge.ToLinen(Counter, skip_rng=True)
  variables = {"batch_stats": model.init({})["batch_stats"]}
  _, updates = model.apply(variables, mutable=["batch_stats", "intermediates"])
  assert int(updates["batch_stats"]["count"]) == 1
  assert int(updates["intermediates"]["seen"][0]) == 1


def test_a_class_for_a_class_takes_its_keywords():
  Dense = bridge.wrappers.to_linen_class(nnx.Linear, use_bias=False)

  class Outer(linen.Module):
    @linen.compact
    def __call__(self, x):
      return Dense(in_features=4, out_features=3, name="dense")(x)

  variables = Outer().init(jax.random.key(0), X)
  assert list(variables["params"]["dense"]) == ["kernel"]
  assert isinstance(Dense(in_features=4, out_features=3), linen.Module)


def test_variables_that_the_module_has_not_are_named():
  model = bridge.to_linen(nnx.Linear, 4, 3)
  variables = model.init(jax.random.key(0), X)
  variables["params"]["kernell"] = jnp.zeros(())
  with pytest.warns(UserWarning, match="Linear has not: kernell"):
    model.apply(variables, X)


@pytest.mark.filterwarnings("ignore:the variables have paths")
def test_linen_in_nnx_in_linen():
  class Middle(nnx.Module):
    def __init__(self, rngs):
      self.dense = bridge.ToNNX(linen.Dense(3), rngs)
      self.out = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
      return self.out(self.dense(x))

  model = bridge.to_linen(Middle)
  y, variables = model.init_with_output(jax.random.key(0), X)
  assert variables["params"]["dense"]["kernel"].shape == (4, 3)
  np.testing.assert_allclose(model.apply(variables, X), y, rtol=1e-6)


def test_nnx_in_linen_in_nnx(hijax):
  class Middle(linen.Module):
    @linen.compact
    def __call__(self, x):
      return bridge.to_linen(Scale, 4, name="scale")(x)

  model = bridge.ToNNX(Middle(), rngs=nnx.Rngs(0, dropout=1)).lazy_init(X)
  np.testing.assert_array_equal(model(X), 2 * model.scale["w"] * X)
  model(X, mutable=["batch_stats"])
  assert int(model.scale["calls"]) == 1


# Modules as pairs of functions, and bridge.Module.


def test_a_class_as_two_functions():
  dense = bridge.functional(nnx.Linear)(4, 3)
  with pytest.raises(ValueError, match=r"before init(.|\n)*fix:"):
    dense.apply({})
  state = dense.init(rngs=nnx.Rngs(0))
  y, _ = dense.apply(state)(X)
  np.testing.assert_array_equal(y, X @ state["kernel"] + state["bias"])


class Dense(bridge.Module):
  """A compact layer."""

  size: int

  @bridge.compact
  def __call__(self, x):
    w = self.param("w", nnx.initializers.lecun_normal(), (x.shape[-1], self.size))
    calls = self.variable("calls", "n", lambda: jnp.zeros((), jnp.int32))
    calls[...] += 1
    return x @ w


class Mlp(bridge.Module):
  """Names by themselves, NNX and Linen inside."""

  @bridge.compact
  def __call__(self, x):
    x = Dense(3)(Dense(3)(x))
    x = bridge.nnx_in_bridge_mdl(lambda rngs: nnx.Linear(3, 2, rngs=rngs))(x)
    return bridge.linen_in_bridge_mdl(linen.Dense(2), name="last")(x)


def test_a_compact_method_names_what_it_makes(hijax):
  y, variables = Mlp().init_with_output(0, X)
  assert sorted(variables["params"]) == ["Dense_0", "Dense_1", "Linear_0", "last"]
  np.testing.assert_array_equal(Mlp().apply(variables, X), y)
  _, after = Mlp().apply(variables, X, mutable=True)
  assert int(after["calls"]["Dense_0"]["n"]) == 2
  grads = jax.jit(jax.grad(lambda p: Mlp().apply(variables | {"params": p}, X).sum()))(
    variables["params"]
  )
  assert jax.tree.structure(grads) == jax.tree.structure(variables["params"])


def test_setup_makes_attributes_and_shares_them():
  class Shared(bridge.Module):
    def setup(self):
      self.b = Dense(4)
      self.set_attr_priority("b", bridge.AttrPriority.HIGH)
      self.a = self.b

    def __call__(self, x):
      return self.a(self.b(x))

  model = Shared()
  variables = model.init(0, X)
  assert list(variables["params"]) == ["b"]
  assert int(variables["calls"]["b"]["n"]) == 2
  assert model.scope is None
  w = variables["params"]["b"]["w"]
  np.testing.assert_allclose(model.apply(variables, X), X @ w @ w, rtol=1e-5)


def test_outside_of_a_call_there_are_no_variables():
  with pytest.raises(ValueError, match=r"this Dense is not part of a call(.|\n)*fix:"):
    Dense(3)(X)
  with pytest.raises(ValueError, match="under init or apply"):
    bridge.nnx_in_bridge_mdl(lambda rngs: nnx.Linear(1, 1, rngs=rngs))


def test_without_flax_an_error_says_what_to_install(monkeypatch):
  monkeypatch.delitem(sys.modules, "refax.compat.linen", raising=False)
  monkeypatch.setitem(sys.modules, "flax", None)
  with pytest.raises(ImportError, match=r"works with Linen(.|\n)*fix: pip install flax"):
    _ = bridge.ToLinen
