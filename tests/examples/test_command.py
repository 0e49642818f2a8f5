"""What the commands of the examples share."""

import argparse
import subprocess
import sys

import pytest

from examples import command


def test_ctrl_c_prints_the_last_words_and_no_traceback():
  program = """
import os, signal
from examples import command
done = [2]
command.end_at_ctrl_c(lambda: f"Interrupted after {done[0]} steps.")
done[0] = 3
os.kill(os.getpid(), signal.SIGINT)
print("not reached")
"""
  ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert (ended.returncode, ended.stdout, ended.stderr) == (
    command.INTERRUPTED,
    "\nInterrupted after 3 steps.\n",
    "",
  )


def test_sizes_that_were_not_given_are_the_quick_or_the_full_ones():
  given = argparse.Namespace(quick=True, steps=None, width=7)
  command.choose_sizes(given, steps=(10, 1000), width=(1, 2))
  assert (given.steps, given.width) == (10, 7)
  given = argparse.Namespace(quick=False, steps=None)
  command.choose_sizes(given, steps=(10, 1000))
  assert given.steps == 1000


def test_a_number_that_is_too_small_is_refused_by_name(capsys):
  parser = command.parser("name", "One line.\nMore.")
  parser.add_argument("--steps", type=command.at_least(1), default=4, help="how many")
  assert parser.parse_args(["--steps", "1"]).steps == 1
  assert "One line." in parser.format_help() and "More." not in parser.format_help()
  with pytest.raises(SystemExit):
    parser.parse_args(["--steps", "0"])
  assert "argument --steps: 0 is less than 1" in capsys.readouterr().err
