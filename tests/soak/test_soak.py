"""A short soak; `make soak` runs a long one."""

import pathlib
import subprocess
import sys

import pytest

SOAK = pathlib.Path(__file__).with_name("soak.py")


@pytest.mark.slow
def test_twenty_seconds_of_random_calls_end_as_their_twin():
  """In a process of its own, so that the interrupts hit no other test."""
  done = subprocess.run(
    [sys.executable, SOAK, "20", "0"], capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert "equal to the twin" in done.stdout
