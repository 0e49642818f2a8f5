"""orbax's own functions on States and Modules: what they hold is saved, whatever the storage."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx
from refax.errors import RefArgumentError

ocp = pytest.importorskip("orbax.checkpoint")
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


class Net(nnx.Module):
  """Layers in a list, statistics, a random stream."""

  def __init__(self, rngs):
    self.layers = [nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)]
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.dropout(self.layers[1](self.layers[0](x)))


def bits(x):
  return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def assert_equal(got, want):
  got, want = (nnx.to_pure_dict(nnx.state(x)) for x in (got, want))
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), got, want)


def build(hijax, seed=0):
  with nnx.use_hijax(hijax):
    return Net(nnx.Rngs(seed))


@pytest.mark.parametrize("hijax", [True, False])
@pytest.mark.parametrize("saver", ["StandardCheckpointer", "PyTreeCheckpointer"])
def test_a_state_is_saved_and_restored(saver, hijax, tmp_path):
  model, other = build(hijax), build(hijax, seed=1)
  with getattr(ocp, saver)() as saver:
    saver.save(tmp_path / "state", nnx.state(model))
    wait(saver)
    restored, plain = (saver.restore(tmp_path / "state", *to) for to in ([nnx.state(other)], []))
  assert isinstance(restored, nnx.State)
  nnx.update(other, restored)
  assert_equal(other, model)
  assert other.layers[0].kernel.is_hijax == hijax
  assert list(plain["layers"]["0"]["kernel"]) == ["value"]  # as Flax NNX writes it


def wait(saver):
  getattr(saver, "wait_until_finished", lambda: None)()


@pytest.mark.parametrize("hijax", [True, False])
def test_a_module_is_saved_and_restored(hijax, tmp_path):
  model = build(hijax)
  with ocp.StandardCheckpointer() as saver:
    saver.save(tmp_path / "model", model)
    saver.wait_until_finished()
    restored = saver.restore(tmp_path / "model", build(hijax, seed=1))
  assert isinstance(restored, Net)
  assert_equal(restored, model)


@pytest.mark.parametrize("hijax", [True, False])
def test_an_abstract_state_is_restored_into(hijax, tmp_path):
  model = build(hijax)
  with ocp.StandardCheckpointer() as saver:
    saver.save(tmp_path / "state", nnx.split(model)[1])
    saver.wait_until_finished()
    with nnx.use_hijax(hijax):
      graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(1))))
    twin = nnx.merge(graphdef, saver.restore(tmp_path / "state", abstract))
  assert_equal(twin, model)
  np.testing.assert_array_equal(twin(jnp.ones((4, 2))), model(jnp.ones((4, 2))))


def test_training_goes_on_while_a_manager_saves(tmp_path):
  def start():
    model = nnx.Linear(512, 512, rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    optimizer.update(model, nnx.grad(lambda model: model(jnp.ones(512)).sum())(model))

  model, optimizer = start()
  with ocp.CheckpointManager(tmp_path) as manager:
    for i in range(3):
      state = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
      weights = ocp.args.PyTreeSave(nnx.state(model))
      training = ocp.args.StandardSave(state)
      manager.save(i, args=ocp.args.Composite(training=training, weights=weights))
      step(model, optimizer)  # donates what is being saved
    manager.wait_until_finished()
    (twin, twin_optimizer), want = start(), start()
    for i in range(3):
      state = {"model": nnx.state(twin), "optimizer": nnx.state(twin_optimizer)}
      into, weights = ocp.args.StandardRestore(state), ocp.args.PyTreeRestore()
      restored = manager.restore(i, args=ocp.args.Composite(training=into, weights=weights))
      nnx.update(twin, restored.training["model"])
      nnx.update(twin_optimizer, restored.training["optimizer"])
      assert_equal((twin, twin_optimizer), want)
      np.testing.assert_array_equal(restored.weights["kernel"]["value"], want[0].kernel[...])
      step(*want)


def test_a_single_hijax_variable_is_refused_with_what_to_write(tmp_path):
  for name, saver in (("s", ocp.StandardCheckpointer()), ("p", ocp.PyTreeCheckpointer())):
    with pytest.raises(RefArgumentError) as error:
      saver.save(tmp_path / name, {"step": nnx.Variable(1)})
    lines = error.value.args[0].split("\n")
    assert lines[0] == "orbax saves arrays, and a hijax Variable is a jax.Ref"
    assert lines[1].startswith("  at:  (a Variable outside any Module)")
    assert lines[2:] == [
      "  got: a Variable outside of a State or Module",
      "  fix: save a State, nnx.state(model), or arrays: nnx.pure(tree)",
    ]
  saver.save(tmp_path / "x", nnx.pure({"step": nnx.Variable(1)}))
  assert saver.restore(tmp_path / "x") == {"step": 1}


def test_key_paths_are_of_jaxs_own_types():
  keys = jax.tree_util
  (path, _), *_ = keys.tree_leaves_with_path(nnx.state(build(False)))
  assert [type(key) for key in path[:-1]] == [keys.DictKey] * 3
  assert isinstance(path[-1], keys.GetAttrKey) and path[-1].name == "value"
  (path, _), *_ = keys.tree_leaves_with_path(build(False).layers)
  assert isinstance(path[0], keys.GetAttrKey) and path[0].name == "0.bias"
  assert keys.keystr(path) == "[0].bias"
  assert keys.keystr(path, simple=True, separator="/") == "0.bias/value"
