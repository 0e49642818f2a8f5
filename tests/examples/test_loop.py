"""The loop of `examples/loop.py` goes on where it was, and stops when it no longer learns."""

import pytest

from refax import nnx

pytest.importorskip("sklearn", reason="scikit-learn brings the digits")

from examples.loop import run


def steps(folder):
  with nnx.Checkpointer(folder) as checkpoints:
    return checkpoints.steps


@pytest.mark.slow
def test_it_goes_on_where_it_was_and_stops_early(tmp_path):
  first = run(tmp_path, epochs=2)
  assert steps(tmp_path)[-1] == 2
  assert run(tmp_path, epochs=3) >= first > 0.5
  assert steps(tmp_path)[-1] == 3
  assert run(tmp_path, epochs=60, patience=1) > 0.95
  assert 3 < steps(tmp_path)[-1] < 60
