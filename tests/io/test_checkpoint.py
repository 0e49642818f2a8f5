import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import _jax, nnx
from refax.errors import (
  CheckpointFormatError,
  CheckpointLockedError,
  CheckpointMismatchError,
  InvalidArgumentError,
  MissingCheckpointError,
)

pytest.importorskip("orbax.checkpoint", reason="checkpoints are written by orbax-checkpoint")


class Net(nnx.Module):
  def __init__(self, seed, size=3):
    rngs = nnx.Rngs(seed)
    self.linear = nnx.Linear(2, size, rngs=rngs)
    self.norm = nnx.BatchNorm(size, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.half = nnx.Variable(jnp.full(3, 1.5 + seed, jnp.bfloat16))
    self.flags = nnx.Variable(jnp.array([seed == 0, True]))
    self.many = nnx.Variable({"a": jnp.full(2, float(seed)), "b": {"c": jnp.arange(3) + seed}})
    self.empty = nnx.Variable(jnp.zeros((0, 4)))
    self.array = jnp.full(2, float(seed))
    self.tied = self.linear.kernel

  def __call__(self, x):
    return self.dropout(self.norm(self.linear(x)))


def make(seed):
  net = Net(seed)
  optimizer = nnx.Optimizer(net, optax.adam(1e-2 * (seed + 1)), wrt=nnx.Param)
  for _ in range(seed + 1):
    optimizer.update(net, nnx.grad(lambda net: net(jnp.ones((4, 2))).sum())(net))
  rngs = nnx.Rngs(seed, noise=jax.random.key(seed, impl="rbg"))
  return {"net": net, "optimizer": optimizer, "rngs": rngs, "count": np.array(seed), "n": seed}


def raw(tree):
  def value(x):
    x = x[...] if isinstance(x, nnx.Variable) else x
    is_key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else x

  values = jax.tree.map(value, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
  return [np.asarray(x) for x in jax.tree.leaves(values)]


def assert_same(a, b):
  for x, y in zip(raw(a), raw(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_everything_comes_back_into_live_objects(asynchronous, tmp_path):
  saved, live = make(0), make(1)
  kernel, net = live["net"].linear.kernel, live["net"]
  with nnx.Checkpointer(tmp_path, asynchronous=asynchronous) as checkpoints:
    checkpoints.save(5, saved, metrics={"loss": 0.5}, user={"epoch": [1, 2]})
    checkpoints.wait()
    restored = checkpoints.restore(live)
  assert_same(live, saved)
  assert restored.step == 5 and restored.user == {"epoch": [1, 2]}
  assert restored.metrics == {"loss": 0.5} and "refax 0.1.0" in restored.written_by
  assert live["net"] is net and net.tied is net.linear.kernel is kernel
  assert live["n"] == 0 and isinstance(live["n"], int)
  x = jnp.ones((4, 2))
  np.testing.assert_array_equal(net(x), saved["net"](x))  # the same keys come next


def test_the_state_is_that_of_the_call_though_training_goes_on(tmp_path):
  net = Net(0)
  step = nnx.jit(lambda net: net.many.set_value(jax.tree.map(lambda x: x + 1, net.many[...])))
  step(net)
  want = raw(net)
  with nnx.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, net)
    for _ in range(20):
      step(net)
    checkpoints.wait()
    checkpoints.restore(net)
  for a, b in zip(raw(net), want, strict=True):
    np.testing.assert_array_equal(a, b)


def test_into_an_abstract_model_and_into_lojax(tmp_path):
  saved = Net(0)
  with nnx.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, {"net": saved})
    checkpoints.wait()
    abstract = {"net": nnx.eval_shape(lambda: Net(1))}
    checkpoints.restore(abstract)
    functional = {"net": nnx.to_lojax(Net(1))}
    checkpoints.restore(functional)
  assert_same(abstract, {"net": saved})
  assert_same(functional, {"net": saved})
  assert not functional["net"].linear.kernel.is_hijax


def test_a_part_by_a_filter(tmp_path):
  saved, live, untouched = make(0), make(1), make(1)
  with nnx.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, saved)
    checkpoints.wait()
    checkpoints.restore(live, only=nnx.Param)
  np.testing.assert_array_equal(live["net"].linear.kernel[...], saved["net"].linear.kernel[...])
  assert_same(live["optimizer"], untouched["optimizer"])
  assert_same(live["net"].norm.mean, untouched["net"].norm.mean)


def test_which_are_kept(tmp_path):
  net = nnx.Variable(0.0)
  with nnx.Checkpointer(
    tmp_path, keep=2, keep_best=1, best="loss", asynchronous=False
  ) as checkpoints:
    for step, loss in enumerate([5.0, 1.0, 4.0, 3.0, 2.0]):
      net[...] = loss
      checkpoints.save(step, {"v": net}, metrics={"loss": loss})
    checkpoints.wait()
    assert checkpoints.steps == [1, 3, 4]
    assert checkpoints.restore({"v": net}, step=1).metrics == {"loss": 1.0}
    assert float(net) == 1.0


def test_the_state_of_iterators(tmp_path):
  class Batches:
    def __init__(self, state):
      self.state = state

    def get_state(self):
      return self.state

    def set_state(self, state):
      self.state = state

  saved = {
    "data": {"train": Batches(b"\x00\xff"), "test": Batches({"at": 3})},
    "v": nnx.Variable(1),
  }
  live = {"data": {"train": Batches(b""), "test": Batches(None)}, "v": nnx.Variable(0)}
  with nnx.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, saved)
    checkpoints.wait()
    checkpoints.restore(live)
  assert live["data"]["train"].state == b"\x00\xff" and live["data"]["test"].state == {"at": 3}


def message(error, run):
  with pytest.raises(error) as info:
    run()
  return info.value.args[0]


def test_a_mismatch_is_a_table_and_nothing_changes(tmp_path):
  class Other(Net):
    def __init__(self, seed):
      super().__init__(seed, size=4)
      self.extra = nnx.Param(jnp.ones(()))
      del self.flags

  live = {"net": Other(1)}
  before = raw(live)
  with nnx.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, {"net": Net(0)})
    checkpoints.wait()
    text = message(CheckpointMismatchError, lambda: checkpoints.restore(live))
  lines = text.splitlines()
  assert lines[0] == "the file does not fit the model; nothing has been loaded"
  rows = [line.split() for line in lines if "net." in line]
  assert ["net.extra", "nothing", "float32[]"] in [row[:3] for row in rows]
  assert any(r[:4] == ["net.linear.kernel"] * 2 + ["float32[2,3]", "float32[2,4]"] for r in rows)
  assert any(r[:4] == ["net.flags", "an", "array", "nothing"] for r in rows)
  for a, b in zip(raw(live), before, strict=True):
    np.testing.assert_array_equal(a, b)


def test_misuse_is_refused(tmp_path):
  v = nnx.Variable(0)
  with nnx.Checkpointer(tmp_path / "a", best="loss") as checkpoints:
    assert "got: any asked for, and no checkpoint there" in message(
      MissingCheckpointError, lambda: checkpoints.restore({"v": v})
    )
    assert "metrics={}" in message(InvalidArgumentError, lambda: checkpoints.save(1, {"v": v}))
    unsuited = lambda: checkpoints.save(1, {"v": v}, metrics={"loss": 1}, user={1, 2})
    assert "user={1, 2}\n  fix: pass numbers, strings, bytes, bools and None, in dicts" in message(
      InvalidArgumentError, unsuited
    )
    assert checkpoints.steps == []
    checkpoints.save(1, {"v": v}, metrics={"loss": 1})
    checkpoints.wait()
    again = lambda: checkpoints.save(1, {"v": v}, metrics={"loss": 1})
    assert "a step greater than 1" in message(InvalidArgumentError, again)
    assert "got: step 7 asked for, and the steps 1 there" in message(
      MissingCheckpointError, lambda: checkpoints.restore({"v": v}, step=7)
    )
  assert 'pass "min" or "max"' in message(
    InvalidArgumentError, lambda: nnx.Checkpointer(tmp_path, mode="most")
  )
  assert "best=None" in message(
    InvalidArgumentError, lambda: nnx.Checkpointer(tmp_path, keep_best=1)
  )


def files_of(folder):
  return sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.stat().st_size)


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_file_is_never_restored_as_something_else(damage, tmp_path):
  saved = {"v": nnx.Variable(jnp.arange(5000.0)), "w": nnx.Variable(jnp.ones(3))}
  with nnx.Checkpointer(tmp_path / "c", asynchronous=False) as checkpoints:
    checkpoints.save(1, saved)
    checkpoints.save(2, saved)
  refused = 0
  for file in files_of(tmp_path / "c" / "2"):
    whole = file.read_bytes()
    if damage == "missing":
      file.unlink()
    elif damage == "cut":
      file.write_bytes(whole[: len(whole) // 2])
    else:
      at = len(whole) // 2
      file.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
    live = {"v": nnx.Variable(jnp.zeros(5000)), "w": nnx.Variable(jnp.zeros(3))}
    with nnx.Checkpointer(tmp_path / "c") as checkpoints:
      try:
        checkpoints.restore(live, step=2)
      except (CheckpointFormatError, MissingCheckpointError) as error:
        refused += 1
        assert isinstance(error, MissingCheckpointError) or "the latest besides is step 1" in str(
          error
        )
        assert float(jnp.abs(live["v"]).sum() + jnp.abs(live["w"]).sum()) == 0
        checkpoints.restore(live, step=1)
      assert_same(live, saved)  # right, or refused and the older one is right
    file.write_bytes(whole)
  assert refused >= 2


def test_a_newer_format_is_refused(tmp_path):
  v = {"v": nnx.Variable(1)}
  with nnx.Checkpointer(tmp_path, asynchronous=False) as checkpoints:
    checkpoints.save(1, v)
    about = tmp_path / "1" / "about" / "metadata"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"format": 2}))
    text = message(CheckpointFormatError, lambda: checkpoints.restore(v))
  assert "format 2, this Refax reads up to 1" in text and "no other" in text


def test_two_processes_do_not_write_to_one_folder(tmp_path):
  code = (
    "import sys\nfrom refax import nnx\n"
    "c = nnx.Checkpointer(sys.argv[1], asynchronous=False)\n"
    "try:\n  c.save(9, {'v': nnx.Variable(1)})\n"
    "except OSError as e:\n  print(type(e).__name__, str(e).replace(chr(10), ' '))\n"
    "v = nnx.Variable(0); c.restore({'v': v}); print(int(v))"
  )
  with nnx.Checkpointer(tmp_path, asynchronous=False) as checkpoints:
    checkpoints.save(1, {"v": nnx.Variable(3)})
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    what = "CheckpointLockedError one process at a time writes checkpoints to a folder"
    assert f"{what}   at:  {tmp_path}" in done.stdout
    assert f"process {os.getpid()}" in done.stdout
    assert done.stdout.splitlines()[-1] == "3"  # reading is free to all
    assert checkpoints.steps == [1]
    with nnx.Checkpointer(tmp_path) as second, pytest.raises(CheckpointLockedError):
      second.save(2, {"v": nnx.Variable(4)})
  with nnx.Checkpointer(tmp_path, asynchronous=False) as checkpoints:
    checkpoints.save(2, {"v": nnx.Variable(4)})  # free again


EIGHT = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from refax import nnx
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(8), "x")
spread = NamedSharding(mesh, P("x"))
start = jnp.zeros(16) if sys.argv[2] == "read" else jnp.arange(16.0)
v = nnx.Variable(jax.device_put(start, spread))
with nnx.Checkpointer(sys.argv[1]) as checkpoints:
  if sys.argv[2] == "write":
    checkpoints.save(1, {"v": v})
  else:
    checkpoints.restore({"v": v})
    assert v[...].sharding == spread
    print(v[...].tolist())
"""


def test_what_was_saved_on_eight_devices_is_restored_on_one_and_back(tmp_path):
  def run(what):
    command = [sys.executable, "-c", EIGHT, tmp_path, what]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

  run("write")
  v = nnx.Variable(jnp.zeros(16))
  with nnx.Checkpointer(tmp_path) as checkpoints:
    checkpoints.restore({"v": v})
    assert v[...].tolist() == list(range(16)) and len(v[...].devices()) == 1
    v *= 2
    checkpoints.save(2, {"v": v})
  assert run("read").strip() == str([2.0 * i for i in range(16)])


# memory
@pytest.mark.skipif(_jax._private() is None, reason="counts copies of buffers of Refs")
def test_what_was_read_is_not_copied_and_is_nobody_elses(tmp_path, monkeypatch):
  make = lambda x: {"a": nnx.Param(jnp.full(2**17, x)), "b": nnx.Param(jnp.full(2**17, -x))}
  objects = make(0.0)
  with nnx.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, make(3.0))
    checkpoints.wait()
    copies = []
    for name in ("copied", "copied_for_cell", "_copy", "copied_from_host"):
      monkeypatch.setattr(_jax, name, lambda *args: copies.append(args))
    checkpoints.restore(objects)
    monkeypatch.undo()
  assert not copies
  step = nnx.jit(lambda o: o["a"].set_value(o["a"] + 1))
  for _ in range(3):
    step(objects)
  assert float(objects["a"].mean()) == 6.0 and float(objects["b"].mean()) == -3.0


def test_a_variable_that_was_shared_may_be_several_now(tmp_path):
  one = nnx.Param(jnp.arange(4.0))
  apart = {"a": nnx.Param(jnp.zeros(4)), "b": nnx.Param(jnp.zeros(4)), "c": nnx.Param(jnp.zeros(4))}
  with nnx.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, {"a": one, "b": one, "c": one})
    checkpoints.restore(apart)
  nnx.jit(lambda o: o["a"].set_value(o["a"] + 1))(apart)
  assert apart["a"][...].tolist() == [1, 2, 3, 4]
  assert apart["b"][...].tolist() == apart["c"][...].tolist() == [0, 1, 2, 3]
