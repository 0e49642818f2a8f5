"""What code that was written for Flax NNX relies on, with the numbers that Flax gives."""

import subprocess
import sys
import textwrap
import threading

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import config
from refax.compat import extension, nnx


class Block(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(2, 2, rngs=rngs)
    self.norm = nnx.BatchNorm(2, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.dropout(self.norm(self.linear(x)))


X = jnp.arange(6.0).reshape(3, 2)


def test_it_starts_in_lojax_mode_in_every_thread_and_refs_can_be_turned_on():
  found = []
  thread = threading.Thread(target=lambda: found.append(nnx.using_hijax()))
  thread.start()
  thread.join()
  assert found == [False] and not nnx.Param(1.0).is_hijax
  with nnx.use_hijax(True):
    assert nnx.Param(1.0).is_hijax


def test_models_are_pytrees_of_arrays():
  model = Block(nnx.Rngs(0))
  grads = jax.grad(lambda m: (m.linear(X) ** 2).sum(), allow_int=True)(model)
  assert isinstance(grads, Block) and grads.linear.kernel.shape == (2, 2)
  doubled = jax.tree.map(lambda x: x * 2 if x.dtype == jnp.float32 else x, model)
  np.testing.assert_allclose(doubled.linear.kernel[...], 2 * model.linear.kernel[...])

  @jax.jit
  def make(key):
    return nnx.Linear(2, 3, rngs=nnx.Rngs(key))

  assert make(jax.random.key(0)).kernel.shape == (2, 3)


def train(library, steps=4):
  """A training loop from one source, for both libraries."""

  class Net(library.Module):
    def __init__(self, rngs):
      self.first = library.Linear(2, 4, rngs=rngs)
      self.norm = library.BatchNorm(4, rngs=rngs)
      self.dropout = library.Dropout(0.2, rngs=rngs)
      self.out = library.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
      return self.out(self.dropout(library.relu(self.norm(self.first(x)))))

  model = Net(library.Rngs(params=0, dropout=1))
  optimizer = library.Optimizer(model, optax.sgd(0.1), wrt=library.Param)

  @library.jit
  def step(model, optimizer, x, y):
    loss, grads = library.value_and_grad(lambda m: ((m(x) - y) ** 2).mean())(model)
    optimizer.update(model, grads)
    return loss

  losses = [float(step(model, optimizer, X, X[:, :1])) for _ in range(steps)]
  model.eval()
  state = library.to_pure_dict(library.state(model, library.Any(library.Param, library.BatchStat)))
  return losses, state, model(X)


def test_one_source_gives_the_numbers_of_flax():
  (ours, our_state, our_y), (theirs, their_state, their_y) = train(nnx), train(flax.nnx)
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)
  np.testing.assert_allclose(our_y, their_y, rtol=1e-4, atol=1e-6)
  assert jax.tree.structure(our_state) == jax.tree.structure(their_state)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), our_state, their_state
  )


def test_split_and_state_and_merge_share_the_variables():
  model = Block(nnx.Rngs(0))
  graphdef, state = nnx.split(model)
  assert state["linear"]["kernel"] is model.linear.kernel
  assert nnx.state(model, nnx.Param)["linear"]["kernel"] is model.linear.kernel
  twin = nnx.merge(graphdef, state)
  twin.linear.kernel[...] = jnp.zeros((2, 2))
  assert not model.linear.kernel[...].any()
  copied = nnx.merge(graphdef, state, copy=True)
  copied.linear.kernel[...] = jnp.ones((2, 2))
  assert not model.linear.kernel[...].any()


def test_variables_take_what_flax_takes():
  v = nnx.Variable(jnp.zeros(2))
  v.value = jnp.ones((3, 3))
  assert v.value.shape == (3, 3)
  v[...] = 2
  assert v.dtype == jnp.float32 and v[0, 0] == 2.0
  v.set_metadata({"tag": "a"})
  v.set_metadata("other", 1)
  assert (v.tag, v.get_metadata("other"), v.get_metadata("nope", 7)) == ("a", 1, 7)
  with pytest.raises(KeyError):
    v.get_metadata("nope")
  v.del_metadata("tag")
  assert not v.has_metadata("tag")
  assert nnx.Variable(1.0, hijax=True).is_hijax and not nnx.Variable(1.0, ref=False).is_hijax
  assert nnx.Variable(1.0, eager_sharding=False).get_metadata("hijax") is False
  other = nnx.Variable(3.0)
  other.copy_from(nnx.Variable(4.0))
  assert other.value == 4.0 and other.type is nnx.Variable


def test_hooks_run():
  v = nnx.Param(
    1.0,
    on_get_value=lambda v, x: x * 10,
    on_set_value=lambda v, x: x + 1,
    on_create_value=lambda v, x: x + 0.5,
  )
  assert v.get_value() == 15.0
  v.set_value(jnp.array(2.0))
  assert v.get_value() == 30.0
  assert isinstance(v, nnx.Param)
  copied = nnx.merge(*nnx.split(nnx.Dict(a=v)))
  assert copied.a.get_value() == 30.0


def test_a_subclass_may_change_its_value_when_it_is_made_read_and_written():
  class Positive(nnx.Variable):
    def create_value(self, value):
      return jnp.log(value)

    def get_value(self, **kwargs):
      return jnp.exp(super().get_value(**kwargs))

    def set_value(self, value, **kwargs):
      super().set_value(jnp.log(value), **kwargs)

  v = Positive(jnp.array(2.0))
  np.testing.assert_allclose(v.get_value(), 2.0, rtol=1e-6)
  v.set_value(jnp.array(3.0))
  np.testing.assert_allclose(v.get_raw_value(), np.log(3.0), rtol=1e-6)


def test_train_state_and_graphdef_apply():
  class State(nnx.TrainState[Block]):
    stats: nnx.State

  graphdef, params, stats = nnx.split(Block(nnx.Rngs(0)), nnx.Param, ...)
  state = State.create(graphdef, params=params, tx=optax.sgd(0.1), stats=stats)
  y, (_, new) = state.apply("params", "stats")(X)
  assert y.shape == (3, 2) and int(new["dropout"]["rngs"]["count"]) == 1

  @jax.jit
  def step(state):
    def loss(params):
      return (state.apply(params, state.stats).linear(X)[0] ** 2).sum()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))

  new = step(state)
  assert int(new.step) == 1 and new.params["linear"]["kernel"].shape == (2, 2)


@pytest.mark.parametrize("graph", [True, False])
def test_gradients_have_the_form_of_the_mode(graph):
  model = Block(nnx.Rngs(0))
  loss = lambda m: (m.linear(X) ** 2).sum()
  grads = nnx.grad(loss, graph=graph)(model)
  assert isinstance(grads, nnx.State if graph else Block)
  want = jax.grad(lambda k: ((X @ k + model.linear.bias[...]) ** 2).sum())(model.linear.kernel[...])
  np.testing.assert_allclose(grads.linear.kernel[...], want, rtol=1e-5)
  with nnx.set_graph_mode(graph):
    value, grads = nnx.value_and_grad(loss)(model)
    assert isinstance(grads, nnx.State if graph else Block) and value.shape == ()


def test_a_state_is_differentiated_as_a_whole():
  graphdef, stats, rest = nnx.split(
    nnx.Dict(a=nnx.BatchStat(3.0), b=nnx.Param(2.0)), nnx.BatchStat, ...
  )
  f = lambda stats, rest: nnx.merge(graphdef, stats, rest).a[...] ** 2
  assert float(nnx.grad(f)(stats, rest)["a"]) == 6.0


def test_custom_vjp_is_called_as_in_flax():
  @nnx.custom_vjp(nondiff_argnums=(1,))
  def f(m, n):
    return m.a[...] * n

  def bwd(n, res, g):
    (m_g,), out_g = g
    m_g["a"][...] = 100 * out_g * n
    return (m_g,)

  f.defvjp(lambda m, n: (f(m, n), None), bwd)
  grads = nnx.grad(lambda m: f(m, 3.0))(nnx.Dict(a=nnx.Param(2.0)))
  assert float(grads["a"]) == 300.0


def test_vjp_and_jvp_have_the_form_of_their_arguments():
  m = nnx.Dict(a=nnx.Param(3.0), n=nnx.Variable(2))
  y, pull = nnx.vjp(lambda m, x: m.a[...] * x, m, jnp.array(4.0))
  m_grad, x_grad = pull(1.0)
  assert float(m_grad.a) == 4.0 and float(x_grad) == 3.0 and y == 12.0
  tangent = jax.tree.map(jnp.ones_like, m)
  assert float(nnx.jvp(lambda m: m.a[...] ** 2, (m,), (tangent,))[1]) == 6.0


def test_streams_are_split_forked_copied_and_brought_back():
  rngs = nnx.Rngs(params=0, dropout=1)
  backups = nnx.split_rngs(rngs, splits=3, only="params")
  assert rngs.params.key.shape == (3,) and rngs.dropout.key.shape == ()
  nnx.restore_rngs(backups)
  assert rngs.params.key.shape == () and int(rngs.params.count) == 1
  new = nnx.with_rngs(rngs, split={"params": 2}, fork=["dropout"])
  assert new.params.key.shape == (2,) and rngs.params.key.shape == ()
  nnx.reseed(rngs, dropout=5)
  theirs = flax.nnx.Rngs(params=0, dropout=1)
  flax.nnx.reseed(theirs, dropout=5)
  assert rngs.dropout() == theirs.dropout()
  with pytest.raises(ValueError, match="keys of shape"):
    nnx.reseed(new, params=1)


def test_capture_keeps_what_is_named_also_by_the_name_of_a_method():
  class Net(nnx.Module):
    def features(self, x):
      self.sow(nnx.Intermediate, "features", x)
      return self.perturb("dx", x)

    @nnx.jit
    def __call__(self, x):
      return (3 * self.features(x)).sum()

  net, x = Net(), jnp.ones(2)
  _, kept, perturbations = nnx.capture(net, nnx.Intermediate, nnx.Perturbation)(x)
  np.testing.assert_allclose(kept["features"][0], x)
  loss = lambda net, p: nnx.capture(net, nnx.Intermediate, init=p)(x)
  grads, kept = nnx.grad(loss, argnums=1, has_aux=True)(net, perturbations)
  np.testing.assert_allclose(grads["dx"], 3.0)
  assert vars(net) == {} and list(kept) == ["features"]
  _, outputs = nnx.capture(net, nnx.Intermediate, method_outputs=nnx.Intermediate)(x)
  assert sorted(outputs) == ["__call__", "features"] and len(outputs["features"][...]) >= 1


def test_metadata_names_axes_under_vmap_and_scan():
  names = {nnx.PARTITION_NAME: "layers"}
  init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("in", "out"))

  @nnx.split_rngs(splits=3)
  @nnx.vmap(transform_metadata=names)
  def create(rngs):
    return nnx.Linear(2, 2, kernel_init=init, rngs=rngs)

  model = create(nnx.Rngs(0))
  assert model.kernel.out_sharding == ("layers", "in", "out")
  inside = []

  @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, transform_metadata=names)
  def forward(x, layer):
    inside.append(layer.kernel.out_sharding)
    return layer(x)

  assert forward(X, model).shape == X.shape
  assert inside[0] == ("in", "out") and model.kernel.out_sharding == ("layers", "in", "out")
  spec = nnx.get_partition_spec(nnx.state(model))
  assert spec["kernel"].get_value() == jax.sharding.PartitionSpec("layers", "in", "out")


def test_variables_are_laid_out_on_the_mesh_that_is_set():
  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  with jax.set_mesh(mesh), nnx.logical_axis_rules([("embed", "data")]):
    v = nnx.Param(jnp.zeros((2, 2)), out_sharding=("embed", None))
    assert v.sharding.spec == jax.sharding.PartitionSpec("data", None)
    with nnx.use_eager_sharding(False):
      plain = nnx.Param(jnp.zeros((2, 2)), out_sharding=("embed", None))
    assert plain.sharding != v.sharding


def test_contexts_bring_back_what_an_inner_function_did():
  class Pair(nnx.Module):
    def __init__(self):
      self.a = nnx.Param(1.0)
      self.b = self.a

  pair = Pair()
  with nnx.update_context("test"):
    with nnx.split_context("test") as ctx:
      first, second = ctx.split(pair), ctx.split(pair)
    assert len(first[1]) == 1 and len(second[1]) == 0

    @jax.jit
    def inner(first, second):
      with nnx.merge_context("test", inner=True) as ctx:
        one, two = ctx.merge(*first), ctx.merge(*second)
      assert one is two and one.a is one.b
      one.a[...] = 5.0
      one.new = nnx.Param(2.0)
      with nnx.split_context("test") as ctx:
        return ctx.split(one), ctx.split(two)

    first, second = inner(first, second)
    with nnx.merge_context("test", inner=False) as ctx:
      assert ctx.merge(*first) is pair
  assert float(pair.a) == 5.0 and pair.a is pair.b and float(pair.new) == 2.0


def test_to_tree_and_from_tree_under_a_transform_of_jax():
  model = nnx.Dict(a=nnx.Param(jnp.arange(3.0)))
  tree = nnx.to_tree((model, X[:, 0]))
  y = jax.vmap(lambda tree: (lambda m, x: m["a"][...] * x)(*nnx.from_tree(tree)))(tree)
  np.testing.assert_allclose(y, jnp.arange(3.0) * X[:, 0])


def test_partial_forms_of_jit_run_and_lower():
  model = nnx.Dict(a=nnx.Param(2.0))

  def step(m, x):
    m.a[...] += x
    return m.a[...]

  cached = nnx.cached_partial(nnx.jit(step), model)
  assert [float(cached(1.0)) for _ in range(2)] == [3.0, 4.0]
  partial = nnx.jit_partial(step, model)
  assert float(partial(1.0)) == 5.0 and partial.lower(1.0).compile() is not None
  assert nnx.pmap(lambda x: x + 1)(jnp.zeros(2)).tolist() == [1.0, 1.0]


def test_tabulate_shows_layers_and_totals():
  table = nnx.tabulate(Block(nnx.Rngs(0)), X)
  assert "linear" in table and "float32[3,2]" in table and "Total" in table


def test_registered_types_are_data_and_names_of_collections_go_both_ways():
  assert nnx.variable_type_from_name("batch_stats") is nnx.BatchStat
  assert nnx.variable_name_from_type(nnx.Cache) == "cache"
  new = nnx.variable_type_from_name("test_collection", allow_register=True)
  assert nnx.variable_name_from_type(new) == "test_collection"
  with pytest.raises(ValueError, match="no type of Variable has the name"):
    nnx.variable_type_from_name("test_unknown")


def test_pure_dicts_go_back_with_keys_that_are_digits():
  model = nnx.List([nnx.Linear(1, 1, rngs=nnx.Rngs(0))])
  pure = nnx.to_pure_dict(nnx.state(model))
  as_text = {str(k): v for k, v in pure.items()}
  assert nnx.restore_int_paths(as_text) == pure
  state = nnx.state(model)
  nnx.replace_by_pure_dict(state, as_text)
  nnx.update(model, state)


def test_the_extension_is_taken_back():
  extension.retract()
  assert config.using_hijax() and nnx.Variable.accept is None
  assert not hasattr(nnx.Variable(1.0), "copy_from")
  with pytest.raises(TypeError, match="hijax"):
    nnx.Variable(1.0, hijax=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["main", "install"])
def test_a_program_that_imports_flax_nnx_runs_unchanged(tmp_path, how):
  program = textwrap.dedent("""
    import sys
    from flax import nnx
    import flax.nnx.nn.linear
    from flax.nnx import Linear
    from flax import linen, serialization
    import flax
    assert Linear.__module__ == "refax.nn.linear.linear" and flax.nnx is nnx
    assert linen.Dense.__module__.startswith("flax.linen")
    print(nnx.Linear(1, 2, rngs=nnx.Rngs(0)).kernel.shape, sys.argv[1:])
  """)
  script = tmp_path / "program.py"
  if how == "main":
    script.write_text(program)
    command = [sys.executable, "-m", "refax.compat", str(script), "--flag"]
  else:
    script.write_text("import refax.compat\nrefax.compat.install_as_flax()\n" + program)
    command = [sys.executable, str(script), "--flag"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert done.stdout == "(1, 2) ['--flag']\n", done.stderr


def test_gradients_flow_through_statistics_and_metrics_as_in_flax():
  def gradients(lib):
    class Model(lib.Module):
      def __init__(self):
        self.w, self.s = lib.Param(jnp.array(2.0)), lib.BatchStat(jnp.array(1.0))

      def __call__(self, x):
        self.s[...] = 0.5 * self.s[...] + 0.5 * self.w[...] * x
        return self.s[...] * x

    def by_metric(model):
      average = lib.metrics.Average("loss")
      average.update(loss=model(3.0))
      return average.compute()

    return [lib.grad(f)(Model())["w"][...] for f in (lambda m: m(3.0), by_metric)]

  assert gradients(nnx) == gradients(flax.nnx) == [4.5, 4.5]
