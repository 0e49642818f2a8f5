"""Checkpoints that Flax NNX has written, by real Flax and real orbax, with tiny models."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx
from refax.errors import (
  CheckpointFormatError,
  CheckpointMismatchError,
  InvalidArgumentError,
  MissingCheckpointError,
)
from refax.io.flax_checkpoint import _name

flax_nnx = pytest.importorskip("flax.nnx", reason="Flax writes the checkpoints")
ocp = pytest.importorskip("orbax.checkpoint")
v1 = pytest.importorskip("orbax.checkpoint.experimental.v1")


def net(lib, seed=0, out=4, param_dtype=jnp.float32):
  """A model of either library with whatever has a name of its own on disk."""
  options = {"param_dtype": param_dtype, "rngs": lib.Rngs(seed)}

  class Net(lib.Module):
    def __init__(self):
      linear = lambda: lib.Linear(3, 3, **options)
      self.layers = lib.List([linear(), lib.BatchNorm(3, rngs=lib.Rngs(seed)), linear()])
      self.attention = lib.MultiHeadAttention(2, 4, decode=False, **options)
      self.wrapped = lib.WeightNorm(linear(), rngs=lib.Rngs(seed))
      self.spectral = lib.SpectralNorm(linear(), rngs=lib.Rngs(seed))
      self.heads = lib.Dict({"a": linear(), "b": lib.Linear(3, out, **options)})
      self.tied = self.heads["a"]
      self.value = lib.Param(jnp.full(2, float(seed)))  # as the level of a Variable is called
      self.dropout = lib.Dropout(0.5, rngs=lib.Rngs(seed))
      self.rngs = lib.Rngs(seed, noise=seed + 1)

  return Net()


@functools.cache
def moved(seed=7):
  """A model of Flax whose every array has a value of its own. Tests draw from its streams."""
  model = net(flax_nnx, seed)
  for i, (_, x) in enumerate(flax_nnx.to_flat_state(flax_nnx.state(model))):
    if isinstance(x, flax_nnx.Variable) and jnp.issubdtype(x.dtype, jnp.inexact):
      x.set_value(x[...] + i)
  model.rngs.noise(), model.dropout.rngs()
  return model


def bits(x):
  x = x.get_value() if hasattr(x, "get_value") else x
  return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def values(state):
  return {tuple(map(str, path)): bits(x) for path, x in state}


def assert_loaded(own, other, *filters):
  got = values(nnx.to_flat_state(nnx.state(own, *filters)))
  filters = [getattr(flax_nnx, x.__name__) for x in filters]
  want = values(flax_nnx.to_flat_state(flax_nnx.state(other, *filters)))
  scales = [path for path in want.keys() - got.keys() if "scales" in path]
  assert got.keys() <= want.keys() and not want.keys() - got.keys() - set(scales)
  for path, x in got.items():
    np.testing.assert_array_equal(x, want[path], err_msg=str(path))


def save(path, tree, saver=None):
  with saver or ocp.StandardCheckpointer() as saver:
    saver.save(path, tree)
    getattr(saver, "wait_until_finished", lambda: None)()


WAYS = {
  "state": lambda path, model: save(path, flax_nnx.state(model)),
  "split": lambda path, model: save(path, flax_nnx.split(model)[1]),
  "pure dict": lambda path, model: save(path, flax_nnx.to_pure_dict(flax_nnx.state(model))),
  "pure dict with key data": lambda path, model: save(path, jax.tree.map(
    bits, flax_nnx.to_pure_dict(flax_nnx.state(model)))),
  "PyTreeCheckpointer": lambda path, model: save(
    path, flax_nnx.state(model), ocp.PyTreeCheckpointer()),
  "PyTreeCheckpointHandler": lambda path, model: ocp.Checkpointer(
    ocp.PyTreeCheckpointHandler(use_ocdbt=False)).save(path, flax_nnx.state(model)),
  "orbax v1": lambda path, model: v1.save(path, flax_nnx.state(model)),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_what_flax_saves_is_loaded(way, tmp_path):
  model = moved()
  WAYS[way](tmp_path / "saved", model)
  own = net(nnx)
  report = nnx.load_flax_checkpoint(own, tmp_path / "saved")
  assert_loaded(own, model)
  assert report.loaded["layers.0.kernel"] == "layers.0.kernel"
  assert report.aliases["tied.kernel"] == "heads.a.kernel"
  assert report.missing == report.unexpected == ()
  assert own.rngs.noise() == model.rngs.noise() and own.dropout.rngs() == model.dropout.rngs()


def test_levels_of_variables_and_keys_that_were_tuples_are_spelled_as_here():
  known = {"head.value", "value.kernel", "layers.0.scales.kernel", "state.a", "x"}
  name = lambda *steps: _name(steps, known.__contains__)
  assert name("head", "value") == name("head", "value", "raw_value") == "head.value"
  assert name("value", "kernel") == name("value", "kernel", "value") == "value.kernel"
  assert name("layers", "0", "scales", "('kernel',)", "value") == "layers.0.scales.kernel"
  assert name("state", "value", "a") == "state.a"  # a Variable that holds a dict
  assert name("y", "value") == "y" and name("(", ")") == "(.)" and name("(1)") == "(1)"


def test_the_objects_stay_and_so_do_their_kind_of_storage(tmp_path):
  model = moved()
  save(tmp_path / "saved", flax_nnx.state(model))
  for hijax in (True, False):
    with nnx.use_hijax(hijax):
      own = net(nnx)
    kernel = own.layers[0].kernel
    nnx.load_flax_checkpoint(own, tmp_path / "saved")
    assert own.layers[0].kernel is kernel and kernel.is_hijax == hijax
    assert_loaded(own, model)
  abstract = nnx.eval_shape(lambda: net(nnx))
  nnx.load_flax_checkpoint(abstract, tmp_path / "saved")
  assert_loaded(abstract, model)


def manager(path, saves, **options):
  with ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(**options)) as manager:
    for step, args in saves.items():
      manager.save(step, args=args)


def test_the_folders_of_a_manager(tmp_path):
  models = {step: moved(step) for step in (3, 20)}
  plain, named = (tmp_path / name for name in ("plain", "named"))
  of = lambda model: ocp.args.StandardSave(flax_nnx.state(model))
  manager(plain, {step: of(model) for step, model in models.items()})
  composite = lambda m: ocp.args.Composite(state=of(m), notes=ocp.args.JsonSave({"epoch": 1}))
  manager(named, {step: composite(model) for step, model in models.items()},
          step_prefix="ckpt", step_format_fixed_length=8)  # fmt: skip
  (plain / "99.orbax-checkpoint-tmp-1" / "default").mkdir(parents=True)  # a writer was killed
  for path in (plain, named):
    for step, want in ((None, 20), (3, 3)):
      own = net(nnx)
      nnx.load_flax_checkpoint(own, path, step=step)
      assert_loaded(own, models[want])
  for path in (plain / "3", plain / "3" / "default", named / "ckpt_00000003"):
    nnx.load_flax_checkpoint(own := net(nnx), path)
    assert_loaded(own, models[3])
  nnx.load_flax_checkpoint(own := net(nnx), named, part="state")
  assert_loaded(own, models[20])


def training(lib, seed):
  model = lib.Linear(3, 2, rngs=lib.Rngs(seed))
  tx = optax.chain(optax.clip(1.0), optax.adam(0.1))
  optimizer = lib.Optimizer(model, tx, wrt=lib.Param)
  return {"model": model, "optimizer": optimizer}


def train(lib, model, optimizer):
  x = jnp.arange(6.0).reshape(2, 3)
  loss = lambda model: (model(x) ** 2).sum()
  for _ in range(2):
    optimizer.update(model, lib.grad(loss)(model))


@pytest.mark.parametrize("items", [True, False])
def test_an_optimizer_goes_on_where_that_of_flax_stopped(items, tmp_path):
  theirs, own = training(flax_nnx, 0), training(nnx, 1)
  train(flax_nnx, **theirs)
  states = {name: flax_nnx.state(x) for name, x in theirs.items()}
  if items:
    args = {name: ocp.args.StandardSave(x) for name, x in states.items()}
    manager(tmp_path, {1: ocp.args.Composite(**args)})
  else:
    save(tmp_path / "1", states)
  nnx.load_flax_checkpoint(own, tmp_path / "1")
  nnx.load_flax_checkpoint(alone := training(nnx, 1)["model"], tmp_path / "1", part="model")
  np.testing.assert_array_equal(alone.kernel, theirs["model"].kernel[...])
  train(flax_nnx, **theirs)
  train(nnx, **own)
  assert int(own["optimizer"].step[...]) == 4
  np.testing.assert_allclose(own["model"].kernel, theirs["model"].kernel[...], rtol=1e-5)


def test_options(tmp_path):
  model = moved()
  save(tmp_path / "saved", flax_nnx.state(model))
  own = net(nnx)
  nnx.load_flax_checkpoint(own, tmp_path / "saved", only=nnx.BatchStat)
  assert_loaded(own, model, nnx.BatchStat)
  assert (own.layers[0].kernel[...] == net(nnx).layers[0].kernel[...]).all()
  half = net(nnx, param_dtype=jnp.bfloat16)
  nnx.load_flax_checkpoint(half, tmp_path / "saved", cast=True)
  want = model.layers[0].kernel[...].astype(jnp.bfloat16)
  np.testing.assert_array_equal(half.layers[0].kernel, want)
  linear = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
  rules = {r"heads\.b\.(.*)": r"\1"}
  report = nnx.load_flax_checkpoint(linear, tmp_path / "saved", rename=rules, strict=False)
  np.testing.assert_array_equal(linear.kernel, model.heads["b"].kernel[...])
  assert report.loaded["kernel"] == "heads.b.kernel" and "value" in report.unexpected
  report = nnx.load_flax_checkpoint(linear, tmp_path / "saved", part="heads.b")
  assert repr(report) == "LoadReport(2 loaded)"


# what does not fit
def unchanged(model, path, error, **options):
  before = values(nnx.to_flat_state(nnx.state(model)))
  with pytest.raises(error) as caught:
    nnx.load_flax_checkpoint(model, path, **options)
  after = values(nnx.to_flat_state(nnx.state(model)))
  assert all((after[key] == before[key]).all() for key in before)
  return caught.value.args[0]


def test_what_differs_is_one_table_and_nothing_is_changed(tmp_path):
  save(tmp_path / "saved", flax_nnx.state(moved()))
  model = net(nnx, out=5, param_dtype=jnp.bfloat16)
  model.more, model.layers = nnx.Param(jnp.zeros(2)), model.layers[:2]
  text = unchanged(model, tmp_path / "saved", CheckpointMismatchError)
  row = lambda *words: next(line for line in text.split("\n") if all(w in line for w in words))
  assert "build the model with this size" in row("heads.b.bias", "float32[4]", "bfloat16[5]")
  assert "pass cast=True" in row("layers.0.kernel", "float32[3,3]", "bfloat16[3,3]")
  assert "leave it out with only=" in row("more", "nothing", "float32[2]")
  assert "strict=False" in row("layers.2.kernel", "float32[3,3]", "nothing")


def test_what_is_not_there_is_named(tmp_path):
  text = unchanged(net(nnx), tmp_path / "none", MissingCheckpointError)
  assert text.split("\n")[1:3] == [
    f"  at:  {tmp_path / 'none'}",
    "  got: no folder, or an empty one",
  ]
  (tmp_path / "weights").mkdir()
  assert "a folder with weights" in unchanged(net(nnx), tmp_path, MissingCheckpointError)
  saved = ocp.args.StandardSave(flax_nnx.state(moved()))
  manager(tmp_path / "run", {4: ocp.args.Composite(model=saved)})
  text = unchanged(net(nnx), tmp_path / "run", MissingCheckpointError, step=5)
  assert "step 5 asked for, and the steps 4 there" in text
  text = unchanged(net(nnx), tmp_path / "run", InvalidArgumentError, part="params")
  assert "part='params'" in text and "such as 'attention', 'dropout'" in text
  text = unchanged(net(nnx), tmp_path / "run", InvalidArgumentError, rename=3)
  assert text.startswith("load_flax_checkpoint cannot work with this rename")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of orbax
@pytest.mark.parametrize("file", ["_METADATA", "manifest.ocdbt", "array_metadatas/process_0"])
def test_a_damaged_checkpoint_changes_nothing(file, tmp_path):
  linear = lambda lib: lib.Linear(2, 3, rngs=lib.Rngs(0))
  save(tmp_path / "saved", flax_nnx.state(linear(flax_nnx)))
  (tmp_path / "saved" / file).write_bytes(b"{")
  text = unchanged(linear(nnx), tmp_path / "saved", CheckpointFormatError)
  assert text.startswith("this checkpoint of orbax cannot be read; nothing has been changed")


def test_keys_of_another_implementation_are_refused(tmp_path):
  keys = lambda lib, impl: lib.Rngs(jax.random.key(0, impl=impl))
  save(tmp_path / "saved", flax_nnx.state(keys(flax_nnx, "rbg")))
  text = unchanged(keys(nnx, "threefry2x32"), tmp_path / "saved", CheckpointMismatchError)
  assert "default.key" in text and "key<rbg>" in text and "key<fry>" in text
  nnx.load_flax_checkpoint(own := keys(nnx, "rbg"), tmp_path / "saved")
  assert own.default.key[...] == keys(flax_nnx, "rbg").default.key[...]


LOAD = """
import sys; sys.modules["flax"] = None  # Flax is not installed
from refax import nnx
print(nnx.load_flax_checkpoint(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), sys.argv[1]))
"""


def test_flax_need_not_be_installed(tmp_path):
  save(tmp_path / "saved", flax_nnx.state(flax_nnx.Linear(2, 3, rngs=flax_nnx.Rngs(0))))
  run = [sys.executable, "-c", LOAD, str(tmp_path / "saved")]
  assert subprocess.run(run, capture_output=True, text=True).stdout == "LoadReport(2 loaded)\n"
