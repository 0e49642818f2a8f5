"""A write that fails, or is interrupted, takes nothing away of what was there."""

import os
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import CheckpointLockedError, CheckpointWriteError, InvalidArgumentError
from refax.io.folder import complete_steps

ocp = pytest.importorskip("orbax.checkpoint", reason="checkpoints are written by orbax-checkpoint")


@pytest.fixture
def fails(monkeypatch):
  """Makes the writing of arrays fail, in the background too, while `fails.on`."""

  class Switch:
    on = False

  switch, handler = Switch(), ocp.PyTreeCheckpointHandler
  finalize = handler.finalize

  def broken(self, *args, **kwargs):
    if switch.on:
      raise ValueError("Unsupported data type")
    return finalize(self, *args, **kwargs)

  monkeypatch.setattr(handler, "finalize", broken)
  return switch


def unfinished(folder):
  return [name for name in os.listdir(folder) if "tmp" in name]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_write_is_an_oserror_and_hides_no_older_checkpoint(fails, asynchronous, tmp_path):
  v, live = nnx.Variable(1), nnx.Variable(0)
  with nnx.Checkpointer(tmp_path, keep=1, asynchronous=asynchronous) as checkpoints:
    checkpoints.save(1, v)
    checkpoints.wait()
    fails.on = True
    with pytest.raises(CheckpointWriteError) as error:
      checkpoints.save(2, v)
      checkpoints.wait()
    assert isinstance(error.value, OSError)
    assert "got: step 2, ValueError: Unsupported data type" in str(error.value)
    assert "the latest that is complete is step 1" in str(error.value)
    assert checkpoints.steps == [1] and unfinished(tmp_path) == []
    assert checkpoints.restore(live).step == 1 == int(live)
    fails.on = False
    checkpoints.save(2, v)
    checkpoints.wait()
    assert checkpoints.steps == [2]


def test_a_failure_is_kept_for_the_next_save_and_restore_goes_on(fails, tmp_path):
  v = nnx.Variable(1)
  with nnx.Checkpointer(tmp_path, keep=1, best="loss") as checkpoints:
    checkpoints.save(1, v, metrics={"loss": 1})
    checkpoints.wait()
    fails.on = True
    checkpoints.save(2, v, metrics={"loss": 0})
    assert checkpoints.restore(nnx.Variable(0)).step == 1
    assert checkpoints.best_step == 1
    fails.on = False
    with pytest.raises(CheckpointWriteError, match="step 2"):
      checkpoints.save(3, v, metrics={"loss": 0})
    checkpoints.save(3, v, metrics={"loss": 0})
  assert complete_steps(tmp_path) == [3]


def test_close_reports_a_failure_and_frees_the_folder(fails, tmp_path):
  checkpoints = nnx.Checkpointer(tmp_path)
  checkpoints.save(1, nnx.Variable(1))
  checkpoints.wait()
  fails.on = True
  checkpoints.save(2, nnx.Variable(1))
  with pytest.raises(CheckpointWriteError, match="step 2"):
    checkpoints.close()
  checkpoints.close()
  fails.on = False
  with nnx.Checkpointer(tmp_path) as again:
    again.save(2, nnx.Variable(1))
  assert complete_steps(tmp_path) == [1, 2]


def test_a_checkpoint_that_is_being_written_is_waited_for_by_restore(tmp_path):
  v, live = nnx.Variable(jnp.ones(1_000_000)), nnx.Variable(jnp.zeros(1_000_000))
  with nnx.Checkpointer(tmp_path) as checkpoints:
    for step in range(3):
      checkpoints.save(step, v)
      assert checkpoints.restore(live).step == step
      assert step in checkpoints.steps


def test_only_what_is_complete_is_a_step(tmp_path):
  for name in ("7", "8.orbax-checkpoint-tmp-1", "text", "-3"):
    (tmp_path / name).mkdir()
  (tmp_path / "9").write_text("a file")
  assert complete_steps(str(tmp_path)) == [7]
  assert complete_steps(str(tmp_path / "missing")) == []


@pytest.mark.parametrize("step", [True, 1.5, "1", None, -1, np.bool_(True), jnp.ones(2, int)])
def test_a_step_is_an_int(step, tmp_path):
  with nnx.Checkpointer(tmp_path) as checkpoints:
    with pytest.raises(InvalidArgumentError, match="an int of at least 0"):
      checkpoints.save(step, nnx.Variable(1))
    checkpoints.save(np.int64(1), nnx.Variable(1))
    if step is not None:
      with pytest.raises(InvalidArgumentError, match="an int of at least 0"):
        checkpoints.restore(nnx.Variable(1), step=step)


def test_a_folder_that_was_removed(tmp_path):
  folder = tmp_path / "run"
  with nnx.Checkpointer(folder) as checkpoints:
    checkpoints.save(1, nnx.Variable(1))
    checkpoints.wait()
    os.rename(folder, tmp_path / "elsewhere")
    assert checkpoints.steps == []
  with nnx.Checkpointer(tmp_path / "elsewhere") as checkpoints:
    assert checkpoints.restore(nnx.Variable(0)).step == 1


def test_two_threads_and_two_writers_of_one_process(tmp_path):
  errors = []
  with nnx.Checkpointer(tmp_path, keep=None) as first:

    def write(checkpoints, steps):
      for step in steps:
        try:
          checkpoints.save(step, nnx.Variable(step))
        except (InvalidArgumentError, CheckpointLockedError) as error:
          errors.append(error)

    second = nnx.Checkpointer(tmp_path, keep=None)
    first.save(0, nnx.Variable(0))
    threads = [
      threading.Thread(target=write, args=(first, range(1, 8))),
      threading.Thread(target=write, args=(first, range(4, 12))),
      threading.Thread(target=write, args=(second, range(1, 4))),
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    second.close()
    first.wait()
    steps = first.steps
    assert 0 in steps and 11 in steps
    for step in steps:
      live = nnx.Variable(-1)
      assert first.restore(live, step=step).step == step == int(live)
  assert sum(isinstance(error, CheckpointLockedError) for error in errors) == 3


INTERRUPTED = """
import faulthandler, os, random, signal, sys, time
faulthandler.dump_traceback_later(280, exit=True)  # a run that hangs says where
import jax, jax.numpy as jnp
from refax import nnx
folder, seed, asynchronous = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "async"
random.seed(seed)
v, live = nnx.Variable(jnp.zeros(1000)), nnx.Variable(jnp.zeros(1000))
checkpoints = nnx.Checkpointer(folder, keep=2, asynchronous=asynchronous)
checkpoints.save(0, {"v": v})
checkpoints.restore({"v": live})
armed = False
def interrupt(*_):
  if armed:
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
def interrupted(f, *args):
  global armed
  try:
    try:
      armed = True
      signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 4e-2))  # one signal
      f(*args)
    finally:
      armed = False
  except KeyboardInterrupt:
    armed = False
    return 1
  return 0
interrupts = 0
for step in range(1, 60):
  v[...] = float(step)
  for f, args in ((checkpoints.save, (step, {"v": v})), (checkpoints.restore, ({"v": live},))):
    interrupts += interrupted(f, *args)
    values = set(live[...].tolist())
    assert len(values) == 1, values
    steps = checkpoints.steps
    assert steps, "all gone"
v[...] = 100.0
checkpoints.save(100, {"v": v})
checkpoints.close()
with nnx.Checkpointer(folder) as again:
  for step in again.steps:
    assert again.restore({"v": live}, step=step).step == step
    assert set(live[...].tolist()) == {float(step)}, step
print("interrupts", interrupts, again.steps)
"""


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_ctrl_c_at_any_moment_loses_no_checkpoint_and_leaves_objects_whole(mode, tmp_path):
  command = [sys.executable, "-c", INTERRUPTED, tmp_path, "0", mode]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  assert int(done.stdout.split()[1]) > 10 and "100]" in done.stdout
