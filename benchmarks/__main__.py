"""Time a call that does next to nothing, and a train step, in Refax and beside it.

Every case runs in a process of its own, pinned to one core. In it, all ways of writing the case
take turns, round after round, so that a machine that slows down slows them all. Printed are
multiples of JAX with its state threaded by hand and donated: the median over the rounds, and the
quartiles.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BASE = "JAX by hand, donated"


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
  parser.add_argument("--case", help="run one case in this process, and print its times as JSON")
  parser.add_argument("--rounds", type=int, default=15)
  parser.add_argument("--out", type=Path, default=Path("out/benchmarks.json"))
  options = parser.parse_args()
  if options.case:
    print(json.dumps(run_case(options.case, options.rounds)))
    return
  results = {name: in_a_process(name, options.rounds) for name in case_names()}
  report(results)
  options.out.parent.mkdir(parents=True, exist_ok=True)
  options.out.write_text(json.dumps({"machine": machine(), "seconds": results}, indent=1))
  print(f"\n{machine()}\nTimes of all rounds: {options.out}")


def case_names() -> list[str]:
  from benchmarks.cases import CASES

  return list(CASES)


def in_a_process(name: str, rounds: int) -> dict[str, list[float]]:
  command = [sys.executable, "-m", "benchmarks", "--case", name, "--rounds", str(rounds)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def run_case(name: str, rounds: int) -> dict[str, list[float]]:
  """Seconds a call, for each way of writing the case, in each round."""
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  from benchmarks.cases import CASES

  steps = CASES[name]()
  calls = {way: calls_in(step, 0.05) for way, step in steps.items()}
  times: dict[str, list[float]] = {way: [] for way in steps}
  for _ in range(rounds):
    for way, step in steps.items():
      times[way].append(seconds_a_call(step, calls[way]))
  return times


def calls_in(step: Callable[[], Any], seconds: float) -> int:
  """How many calls fill a round; the first ones compile."""
  for _ in range(3):
    seconds_a_call(step, 1)
  return max(1, round(seconds / seconds_a_call(step, 5)))


def seconds_a_call(step: Callable[[], Any], calls: int) -> float:
  import jax

  start = time.perf_counter()
  for _ in range(calls):
    out = step()
  jax.block_until_ready(out)
  return (time.perf_counter() - start) / calls


def report(results: dict[str, dict[str, list[float]]]) -> None:
  ways = list(dict.fromkeys(way for times in results.values() for way in times))
  print("| " + " | ".join(["", *results]) + " |")
  print("|---" * (len(results) + 1) + "|")
  for way in ways:
    print("| " + " | ".join([way, *(cell(times, way) for times in results.values())]) + " |")


def cell(times: dict[str, list[float]], way: str) -> str:
  if way not in times:
    return ""
  if way == BASE:
    return f"{statistics.median(times[way]) * 1e6:.0f} µs"
  ratios = [a / b for a, b in zip(times[way], times[BASE], strict=True)]
  low, median, high = statistics.quantiles(ratios, n=4)
  return f"{median:.2f} ({low:.2f}–{high:.2f})"


def machine() -> str:
  import jax

  versions = f"Python {platform.python_version()}, jax {jax.__version__}"
  return f"{versions}, {platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
  main()
