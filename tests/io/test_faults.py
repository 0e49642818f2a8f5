"""Nothing is lost: processes are killed, disks are full, steps fail."""

import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx

pytest.importorskip("orbax.checkpoint", reason="checkpoints are written by orbax-checkpoint")
SCRIPT = Path(__file__).with_name("train_and_save.py")
STEPS = 50


def start(folder, losses, mode, limit=()):
  command = [*limit, sys.executable, str(SCRIPT), str(folder), str(losses), str(STEPS), mode]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def losses_by_step(path):
  """Every loss that was written for a step; a kill may have cut the last line."""
  found = {}
  for line in path.read_text().splitlines():
    step, _, loss = line.partition(" ")
    if loss.startswith(("0x", "-0x")) and "p" in loss:
      found.setdefault(int(step), set()).add(loss)
  return found


def state_at(folder, step):
  """The bytes of everything in a checkpoint."""
  sys.path.insert(0, str(SCRIPT.parent))
  try:
    from train_and_save import make
  finally:
    sys.path.pop(0)
  training = make()
  with nnx.Checkpointer(folder) as checkpoints:
    checkpoints.restore(training, step=step)
  arrays = [jnp.asarray(v[...]) for _, v in _variables(training)]
  as_data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return [np.asarray(as_data(x)).tobytes() for x in arrays], training["batches"].position


def _variables(training):
  for name in ("net", "optimizer", "rngs"):
    yield from nnx.to_flat_state(nnx.state(training[name]))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["async", "sync"])
def test_killed_at_random_moments_it_ends_bitwise_as_if_it_had_not_been(mode, tmp_path):
  whole = start(tmp_path / "whole", tmp_path / "whole.txt", mode)
  out, err = whole.communicate(timeout=300)
  assert whole.returncode == 0, err[-3000:]

  rng, kills = random.Random(mode), 0
  for _ in range(60):
    run = start(tmp_path / "killed", tmp_path / "killed.txt", mode)
    assert run.stdout.readline() == "ready\n", run.stderr.read()[-3000:]
    if kills < 12:
      time.sleep(rng.uniform(0.3, 1.2))
      run.kill()
    last = run.communicate(timeout=300)[0]
    if run.returncode == 0:
      break
    kills += 1
  assert kills >= 4 and last == out.split("ready\n")[1]
  want, got = losses_by_step(tmp_path / "whole.txt"), losses_by_step(tmp_path / "killed.txt")
  assert list(want) == list(range(1, STEPS + 1))
  assert got == want  # also those of steps that ran twice
  assert state_at(tmp_path / "killed", STEPS) == state_at(tmp_path / "whole", STEPS)


SMALL_FILES = ("sh", "-c", 'ulimit -f 6; exec "$@"', "sh")
"""The kernel refuses this process files of more than 3 KiB, as a full disk does."""


@pytest.mark.slow
def test_a_disk_that_takes_no_more_is_an_error_and_leaves_what_was_there(tmp_path):
  folder, losses = tmp_path / "c", tmp_path / "losses.txt"
  first = start(folder, losses, "sync")
  assert first.stdout.readline() == "ready\n"
  while len(losses_by_step(losses) if losses.exists() else {}) < 3:
    time.sleep(0.05)
  first.kill()
  first.communicate()
  steps = _steps(folder)
  assert steps
  full = start(folder, losses, "sync", SMALL_FILES)
  out, err = full.communicate(timeout=300)
  assert full.returncode != 0 and "ready" in out and "Error" in err
  assert _steps(folder)[-1] == steps[-1]
  last = start(folder, losses, "sync")
  assert last.communicate(timeout=300)[0].splitlines()[-1].startswith("done")
  assert all(len(seen) == 1 for seen in losses_by_step(losses).values())


def _steps(folder):
  with nnx.Checkpointer(folder) as checkpoints:
    return checkpoints.steps


def test_a_step_that_fails_halfway_is_undone_and_training_goes_on():
  def make():
    net = nnx.Sequential(nnx.Linear(2, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    return net, nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)

  @nnx.jit
  def step(net, optimizer, x):
    loss, grads = nnx.value_and_grad(lambda net: (net(x) ** 2).mean())(net)
    optimizer.update(net, grads)
    return loss

  x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2)), jnp.float32)
  (net, optimizer), (twin, twin_optimizer) = make(), make()
  failed = 0
  for i in range(2000):
    try:
      with nnx.transaction((net, optimizer)):
        step(net, optimizer, x)
        if i == 1000:
          raise KeyError("the logger's disk is full")
    except KeyError:
      failed += 1
    if i != 1000:
      step(twin, twin_optimizer, x)
  assert failed == 1 and int(optimizer.step) == 1999
  for (path, a), (_, b) in zip(
    nnx.to_flat_state(nnx.state((net, optimizer))),
    nnx.to_flat_state(nnx.state((twin, twin_optimizer))),
    strict=True,
  ):
    np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))


def test_models_are_pickled_and_copied_in_the_middle_of_training():
  import copy
  import pickle

  net = nnx.Sequential(nnx.Linear(2, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
  optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)
  x = jnp.ones((4, 2))

  def step(net, optimizer):
    loss, grads = nnx.value_and_grad(lambda net: (net(x) ** 2).mean())(net)
    optimizer.update(net, grads)
    return float(loss)

  step(net, optimizer)
  copies = [pickle.loads(pickle.dumps({"net": net}))["net"], copy.deepcopy(net), nnx.clone(net)]
  optimizers = [copy.deepcopy(optimizer) for _ in copies]
  want = [step(net, optimizer) for _ in range(3)]
  for net, optimizer in zip(copies, optimizers, strict=True):
    assert [step(net, optimizer) for _ in range(3)] == want
