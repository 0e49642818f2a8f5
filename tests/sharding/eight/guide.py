"""The calls of Flax's guide to many devices, in its order, with only the import changed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from refax.compat import extension, nnx

assert jax.device_count() == 8
MESH = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
EXPLICIT = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
SIZE = 32


@pytest.fixture(autouse=True)
def as_flax():
  extension.extend()
  yield
  extension.retract()


class Layer(nnx.Module):
  """Two products; `names` are those of the axes that the kernels are divided over."""

  def __init__(self, size, names, rngs):
    init = nnx.initializers.lecun_normal()
    first = nnx.with_partitioning(init, names)
    self.first = nnx.Linear(size, size, kernel_init=first, use_bias=False, rngs=rngs)
    self.second = nnx.Param(init(rngs.params(), (size, size)), sharding=names[::-1])

  def __call__(self, x):
    y = jax.nn.relu(self.first(x))
    y = jax.lax.with_sharding_constraint(y, P("data", None))
    return jnp.dot(y, self.second[...])


class Layers(nnx.Module):
  def __init__(self, size, count, names, rngs):
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
    def create(rngs):
      return Layer(size, names, rngs)

    self.layers = create(rngs.fork(split=count))

  def __call__(self, x):
    return jax.lax.scan(lambda x, layer: (layer(x), None), x, self.layers)[0]


def test_switches_and_a_single_variable():
  nnx.use_eager_sharding(True)
  assert nnx.using_eager_sharding()
  with nnx.use_eager_sharding(False):
    assert not nnx.using_eager_sharding()
  nnx.Param(jnp.ones((4, 4)), sharding_names=(None, "model"), eager_sharding=True, mesh=MESH)
  with jax.set_mesh(MESH):
    w = nnx.Param(nnx.Rngs(0).lecun_normal()((4, 8)), sharding_names=(None, "model"))
    jax.debug.visualize_array_sharding(w)
  assert w.sharding.spec == P(None, "model")


def test_a_model_made_and_run_under_jit():
  @jax.jit
  def create(key):
    init = nnx.with_partitioning(nnx.nn.linear.default_kernel_init, (None, "model"))
    return nnx.Linear(4, 8, use_bias=False, rngs=nnx.Rngs(key), kernel_init=init)

  with jax.set_mesh(MESH):
    linear = create(nnx.Rngs(0)())
    assert linear.kernel.sharding.spec == P(None, "model")
    x = jax.device_put(jnp.ones((16, 4)), P("data", None))
    y = jax.jit(lambda m, x: m(x))(linear, x)
  assert y.sharding.spec == P("data", "model")


def test_training_saving_and_restoring(tmp_path):
  @jax.jit
  def step(model, optimizer, x, y):
    loss, grads = jax.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
    optimizer.update(model, grads)
    return model, loss

  rngs, names = nnx.Rngs(0), (None, "model")
  with jax.set_mesh(MESH):
    x, y = (jax.device_put(rngs.normal((8, SIZE)), P("data", None)) for _ in range(2))
    model = Layers(SIZE, 2, names, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    losses = []
    for _ in range(5):
      model, loss = step(model, optimizer, x, y)
      losses.append(float(loss))
  assert losses == sorted(losses, reverse=True)
  path = ocp.test_utils.erase_and_create_empty(tmp_path / "checkpoints")
  checkpointer = ocp.StandardCheckpointer()
  checkpointer.save(path / "first", nnx.state(model))
  checkpointer.wait_until_finished()
  graphdef, abstract = nnx.get_abstract_model(
    lambda: Layers(SIZE, 2, names, rngs=nnx.Rngs(0)), MESH
  )
  restored = nnx.merge(graphdef, checkpointer.restore(path / "first", target=abstract))
  assert restored.layers.first.kernel.sharding.spec == P(None, None, "model")
  np.testing.assert_array_equal(restored.layers.second[...], model.layers.second[...])


def test_logical_names():
  rules = (("batch", "data"), ("hidden", "model"), ("embed", None))
  with jax.set_mesh(MESH), nnx.logical_axis_rules(rules):
    model = Layers(SIZE, 2, ("embed", "hidden"), rngs=nnx.Rngs(0))
    x = jax.device_put(jnp.ones((8, SIZE)), P("data", None))
    out = model(x)
  same = lambda x, spec: x.sharding.is_equivalent_to(NamedSharding(MESH, spec), x.ndim)
  assert same(model.layers.first.kernel, P(None, None, "model"))
  assert same(model.layers.second, P(None, "model", None))
  assert same(out, P("data", None))


def test_explicit_axes():
  class Explicit(nnx.Module):
    def __init__(self, size, rngs):
      init = nnx.initializers.lecun_normal()
      first = partial(init, out_sharding=P(None, "model"))
      self.first = nnx.Linear(size, size, kernel_init=first, use_bias=False, rngs=rngs)
      self.second = nnx.Param(init(rngs.params(), (size, size), out_sharding=P("model", None)))
      self.bias = nnx.Param(jnp.zeros((size,), out_sharding=P(None)))

    def __call__(self, x):
      y = jax.nn.relu(self.first(x))
      return jnp.dot(y, self.second[...], out_sharding=P("data", None)) + self.bias

  class Stacked(nnx.Module):
    def __init__(self, size, count, rngs):
      create = partial(jax.vmap, spmd_axis_name=None)(lambda rngs: Explicit(size, rngs))
      self.layers = create(rngs.fork(split=count))

    def __call__(self, x):
      return jax.lax.scan(lambda x, layer: (layer(x), None), x, self.layers)[0]

  with jax.set_mesh(EXPLICIT):
    model = Stacked(SIZE, 2, rngs=nnx.Rngs(0))
    x = jax.device_put(nnx.Rngs(0).normal((8, SIZE)), NamedSharding(EXPLICIT, P("data", None)))
    y = model(x)
    abstract = jax.eval_shape(lambda: Stacked(SIZE, 2, rngs=nnx.Rngs(0)))
  assert model.layers.first.kernel.sharding.spec == P(None, None, "model")
  assert x.sharding.is_equivalent_to(y.sharding, ndim=2)
  assert abstract.layers.second.sharding.spec == P(None, "model", None)
