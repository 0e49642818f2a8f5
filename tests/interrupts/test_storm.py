"""Ctrl-C at any moment of a training loop leaves every Variable with a value, none deleted."""

import pathlib
import subprocess
import sys

import pytest

STORM = pathlib.Path(__file__).with_name("storm.py")
COMPILED = ["steady", "nothing", "closure", "structure", "places"]
ARGUMENTS = ["lojax", "containers", "modes", "boxed", "bound", "ahead", "called"]
EAGER = ["eager", "grad", "update", "ema", "transaction"]


def storm(scenarios, count):
  """How often state was lost; the process is one of its own, so that no other test is hit."""
  done = subprocess.run(
    [sys.executable, STORM, ",".join(scenarios), str(count), "0"],
    capture_output=True,
    text=True,
    timeout=1200,
  )
  assert done.stdout.count(f"0 of {count} lost") == len(scenarios), done.stdout + done.stderr
  assert done.returncode == 0


def test_an_interrupt_loses_no_state_of_compiled_steps():
  storm(COMPILED, 40)


def test_an_interrupt_loses_no_state_of_eager_steps():
  storm(EAGER, 20)


def test_an_interrupt_loses_no_state_of_other_calls_of_compiled_steps():
  storm(ARGUMENTS, 20)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("scenarios", "count"),
  [(COMPILED, 250), (ARGUMENTS, 100), (EAGER, 60), (["first"], 30), (["save"], 30)],
  ids=lambda x: ",".join(x) if isinstance(x, list) else str(x),
)
def test_hundreds_of_interrupts_lose_no_state(scenarios, count):
  storm(scenarios, count)
