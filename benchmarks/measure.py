"""How a case is measured: rounds in one process in which all ways take turns, or a process a way.

A way is one way of writing a case; `BASE` is the one that all others are divided by.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

BASE = "JAX by hand"

Steps = dict[str, Callable[[], Any]]
"""For every way of writing a case, a function that does it once."""


class Case(NamedTuple):
  """A thing to measure."""

  make: Callable[[], Steps]
  table: str
  rounds: int = 15
  unit: str = "s"
  alone: bool = False
  """Whether every call needs a process of its own; the call then returns its number itself."""


def measure(name: str, case: Case, rounds: int | None) -> dict[str, list[float]]:
  """The numbers of each way, one a round."""
  rounds = rounds or case.rounds
  if not case.alone:
    return _subprocess(name, "--rounds", str(rounds))
  ways: dict[str, list[float]] = {way: [] for way in _subprocess(name, "--ways")}
  for _ in range(rounds):
    for way in ways:
      ways[way].append(_subprocess(name, "--way", way))
  return ways


def _subprocess(name: str, *options: str) -> Any:
  command = [sys.executable, "-m", "benchmarks", "--case", name, *options]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def refuse_flags() -> None:
  """End where XLA does not optimize, as in the tests: the numbers would be those of nobody."""
  if "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", ""):
    raise SystemExit("XLA_FLAGS switches optimizations off: unset it, and measure again")


def pin() -> None:
  """Stay on one core, where the system can do that."""
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def rounds_of(steps: Steps, rounds: int) -> dict[str, list[float]]:
  """Seconds a call, for each way in each round."""
  calls = {way: _calls_in(step, 0.05) for way, step in steps.items()}
  times: dict[str, list[float]] = {way: [] for way in steps}
  for _ in range(rounds):
    for way, step in steps.items():
      times[way].append(_seconds_a_call(step, calls[way]))
  return times


def _calls_in(step: Callable[[], Any], seconds: float) -> int:
  """How many calls fill a round; the first two compile, a step in turns for both."""
  _seconds_a_call(step, 2)
  once = _seconds_a_call(step, 2)
  if once > seconds:
    return 1
  return max(1, round(seconds / _seconds_a_call(step, 5)))


def _seconds_a_call(step: Callable[[], Any], calls: int) -> float:
  import jax

  out = None
  start = time.perf_counter()
  for _ in range(calls):
    out = step()
  jax.block_until_ready(out)
  return (time.perf_counter() - start) / calls


def ratios(numbers: dict[str, list[float]], way: str) -> tuple[float, float, float]:
  """(lower quartile, median, upper quartile) of a way over `BASE`, round by round."""
  pairs = [a / b for a, b in zip(numbers[way], numbers[BASE], strict=True)]
  if len(pairs) < 2:
    return pairs[0], pairs[0], pairs[0]
  low, median, high = statistics.quantiles(pairs, n=4)
  return low, median, high
