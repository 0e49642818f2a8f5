"""The example that reads digits: it learns, and an interrupted run ends bitwise as another one."""

import subprocess
import sys
from pathlib import Path

import pytest

from examples.digits import __main__ as program

pytest.importorskip("sklearn", reason="scikit-learn brings the digits")
ROOT = Path(__file__).parents[2]


def train(out, *options):
  command = [sys.executable, "-m", "examples.digits", "--out", str(out), *options]
  return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


CONTENT = """
import sys
from refax import nnx
from examples.digits.model import CNN
from examples.digits.train import Shuffling
import optax, jax, numpy as np
model = CNN(rngs=nnx.Rngs(5))
optimizer = nnx.Optimizer(model, optax.adamw(optax.constant_schedule(0.1)), wrt=nnx.Param)
with nnx.Checkpointer(sys.argv[1]) as checkpoints:
  training = {"model": model, "optimizer": optimizer, "shuffling": Shuffling(3)}
  print(checkpoints.restore(training).user["history"], training["shuffling"].get_state())
  as_data = lambda x: jax.random.key_data(x) if "key" in str(x.dtype) else x
  for path, v in nnx.to_flat_state(nnx.state((model, optimizer))):
    print(path, np.asarray(as_data(v[...])).tobytes().hex()[:4000])
"""


def content(out):
  command = [sys.executable, "-c", CONTENT, str(out / "checkpoints")]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


@pytest.mark.slow
def test_a_resumed_run_ends_bitwise_as_one_that_was_not_interrupted(tmp_path):
  options = ("--epochs", "4", "--seed", "3")
  train(tmp_path / "whole", *options)
  code = f"""
import os, sys
from examples.digits import train
from examples.digits.__main__ import main
fit = train.fit
def interrupted(*args, **kwargs):
  for i, epoch in enumerate(fit(*args, **kwargs)):
    yield epoch
    if i == 1:
      kwargs["checkpoints"].wait()
      os.kill(os.getpid(), 9)
train.fit = interrupted
main(["--out", {str(tmp_path / "part")!r}, *{options!r}])
"""
  killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert killed.returncode == -9, killed.stderr[-3000:]
  resumed = train(tmp_path / "part", *options, "--resume")
  assert "Test accuracy" in resumed.stdout, resumed.stderr[-3000:]
  assert content(tmp_path / "part") == content(tmp_path / "whole")
  other = train(tmp_path / "part", "--epochs", "5", "--resume")
  assert other.returncode != 0 and "had other settings" in other.stderr


@pytest.mark.parametrize("default, status", [(2, 0), (1, 1)])
def test_below_the_goal_a_run_fails_unless_it_is_shorter_than_the_default(
  default, status, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(program, "EPOCHS", default)
  options = ["--epochs", "1", "--lr", "0", "--out", str(tmp_path)]
  assert program.run(program.parse_options(options), []) == status
  shown = capsys.readouterr()
  assert "below the goal of 98%" in (shown.err if status else shown.out)


@pytest.mark.slow
def test_it_learns_to_read_digits(tmp_path):
  done = train(tmp_path)
  assert done.returncode == 0, done.stderr[-3000:]
  accuracy = float(done.stdout.split("Test accuracy: ")[1].split("%")[0])
  assert accuracy >= 98.0
  for name in ("learning_curve.png", "misread.png"):
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
  table = done.stdout.split("Total Parameters")[0]
  assert "CNN Summary" in table and "conv2" in table and "float32[64,8,8,64]" in table
  assert "conv2" in (tmp_path / "model.html").read_text()
