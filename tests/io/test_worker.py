"""What is saved in the background is on disk though nobody waits, and is not interrupted."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import CheckpointWriteError
from refax.io.worker import Worker

pytest.importorskip("orbax.checkpoint", reason="checkpoints are written by orbax-checkpoint")

FORGETFUL = """
import sys, jax.numpy as jnp
from refax import nnx
def start(folder):
  nnx.Checkpointer(folder).save(1, nnx.Variable(jnp.ones(int(sys.argv[2]))))
start(sys.argv[1])
if sys.argv[3] == "raise":
  raise KeyError("training failed")
"""


@pytest.mark.parametrize(("size", "end"), [(10, "return"), (3_000_000, "return"), (10, "raise")])
def test_a_program_does_not_end_before_its_last_checkpoint_is_on_disk(size, end, tmp_path):
  command = [sys.executable, "-c", FORGETFUL, tmp_path, str(size), end]
  done = subprocess.run(command, capture_output=True, text=True)
  assert ("KeyError" in done.stderr) == (end == "raise") == (done.returncode == 1), done.stderr
  live = nnx.Variable(jnp.zeros(size))
  with nnx.Checkpointer(tmp_path) as checkpoints:
    assert checkpoints.restore(live).step == 1
  assert bool((live == 1).all())


def test_wide_numbers_are_read_as_such_in_the_thread(tmp_path):
  with jax.enable_x64(True), nnx.Checkpointer(tmp_path) as checkpoints:
    v, live = nnx.Variable(np.array([1.0 + 1e-12])), nnx.Variable(np.zeros(1))
    checkpoints.save(1, v)
    checkpoints.restore(live)
    assert live.dtype == jnp.float64 and float(live[0]) == 1.0 + 1e-12


def test_after_close_one_may_read_but_not_write(tmp_path):
  with nnx.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, nnx.Variable(3))
  with pytest.raises(CheckpointWriteError, match="the Checkpointer is closed"):
    checkpoints.save(2, nnx.Variable(4))
  live = nnx.Variable(0)
  assert checkpoints.steps == [1] and checkpoints.restore(live).step == 1 == int(live) - 2
  checkpoints.wait()
  checkpoints.close()


def test_errors_arrive_and_the_worker_goes_on():
  worker = Worker()
  with pytest.raises(ZeroDivisionError):
    worker.run(lambda: 1 / 0)
  assert worker.run(lambda: 3) == 3
  worker.close()


STORM = """
import faulthandler, random, signal
faulthandler.dump_traceback_later(60, exit=True)  # a run that hangs says where
from refax.io.worker import Worker

armed, running, interrupts, worker = False, [], 0, Worker()
random.seed(0)

def interrupt(*_):
  if armed:
    raise KeyboardInterrupt

def job(n):
  running.append(n)
  return sum(range(n)) + 0 * running.pop()

signal.signal(signal.SIGALRM, interrupt)
for i in range(20_000):
  try:
    try:
      armed = True
      signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-6, 6e-5))
      assert worker.run(job, i % 50) == sum(range(i % 50))
    finally:
      armed = False
  except KeyboardInterrupt:
    armed = False
    interrupts += 1
    assert not running, "raised before the end of what was interrupted"
worker.close()
print(interrupts)
"""


def test_interrupts_at_any_moment_leave_a_worker_that_works():
  done = subprocess.run([sys.executable, "-c", STORM], capture_output=True, text=True, timeout=90)
  assert done.returncode == 0, done.stderr[-3000:]
  assert int(done.stdout) > 1000


def test_a_worker_that_nobody_closed_ends_with_its_last_name():
  worker = Worker()
  thread = worker._thread
  del worker
  thread.join(10)
  assert not thread.is_alive()
