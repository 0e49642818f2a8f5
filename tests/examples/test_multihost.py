"""The example of many processes: what it shows holds, and its launcher leaves nobody waiting."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.multihost.launch import explain, launch

pytest.importorskip("grain", reason="grain reads the data; it has no wheel for some interpreters")
pytest.importorskip("sklearn", reason="scikit-learn brings the digits")
ROOT = Path(__file__).parents[2]


def show(folder, *options):
  command = [sys.executable, "-m", "examples.multihost", "--folder", str(folder), *options]
  return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1200)


@pytest.mark.skipif(os.environ.get("SHOWN_BY_MAKE") == "multihost", reason="make multihost runs")
def test_two_processes_train_as_one_does(tmp_path):
  done = show(tmp_path / "out", "--quick")
  assert done.returncode == 0, done.stdout + done.stderr
  assert "digits: 2 processes equal one" in done.stdout and "All of it holds" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("SHOWN_BY_MAKE") == "multihost", reason="make multihost runs")
def test_all_that_the_example_shows_holds(tmp_path):
  done = show(tmp_path / "out", "--processes", "2")  # `make multihost` shows it with four, too
  assert done.returncode == 0, done.stdout + done.stderr
  for line in (
    "text: 2 processes equal one",
    "saved by 2, restored by 2 on mesh (1,2)",
    "saved by 2, restored by 1 on mesh (1)",
    "process 1 of 2 killed at step 13",
    "process 0 of 2 killed at step 13",
    "process 1 of 2 gets SIGTERM at step 13",
    "bitwise as uninterrupted",
  ):
    assert line in done.stdout


# the launcher
PROGRAM = """
import os, sys, time
if os.environ["PROCESS_ID"] == "1":
  sys.exit(3)
time.sleep(float(sys.argv[1]))
"""


def test_when_one_process_fails_the_others_are_stopped_in_bounded_time():
  start = time.monotonic()
  outcome = launch(3, ["-c", PROGRAM, "60"], grace=0.5)
  assert time.monotonic() - start < 30
  assert outcome.codes == [-9, 3, -9] and outcome.failed == 1 and outcome.stopped == [0, 2]
  assert "process 1 of 3 ended with exit status 3; stopped: [0, 2]" in explain(outcome)


def test_those_who_end_by_themselves_are_not_stopped():
  outcome = launch(2, ["-c", PROGRAM, "0.3"], grace=20)
  assert outcome.codes == [0, 3] and outcome.failed == 1 and not outcome.stopped
  assert "the others ended by themselves" in explain(outcome)


def test_a_run_that_hangs_ends_at_its_limit():
  hang = ["-c", "import time; time.sleep(60)"]
  outcome = launch(2, hang, limit=0.5)
  assert outcome.codes == [-9, -9] and outcome.stopped == [0, 1]


def test_each_process_is_told_who_it_is(tmp_path):
  names = "JAX_COORDINATOR_ADDRESS", "PROCESS_COUNT", "PROCESS_ID", "JAX_NUM_CPU_DEVICES"
  code = f"import os; print(*(os.environ.get(n) for n in {names}))"
  outcome = launch(2, ["-c", code], devices=2, logs=tmp_path)
  said = [(tmp_path / f"process_{i}.log").read_text().split() for i in range(2)]
  assert outcome.failed is None and explain(outcome) == "all 2 processes ended well"
  assert said[0][0] == said[1][0] and said[0][0].startswith("127.0.0.1:")
  assert [x[1:] for x in said] == [["2", "0", "2"], ["2", "1", "2"]]
  assert "PROCESS_ID" not in os.environ
