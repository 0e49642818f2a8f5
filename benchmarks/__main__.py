"""Refax beside JAX by hand, Flax NNX and Equinox: calls, tracing, eager work, files, memory.

Every case runs in a process of its own, pinned to one core. In it, all ways of writing the case
take turns, round after round, so that a machine that slows down slows them all. Printed are
multiples of JAX with its state threaded by hand and donated: the median over the rounds, and the
quartiles.
"""

import argparse
import json
import os
import platform
from pathlib import Path

from benchmarks.measure import measure, pin, refuse_flags, rounds_of
from benchmarks.report import chart, lost, tables

OUT = Path("out/benchmarks")


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
  parser.add_argument("cases", nargs="*", help="parts of names of cases; by default all")
  parser.add_argument(
    "--against", type=Path, help="a numbers.json of before: names the rows that lost over 15 %%"
  )
  parser.add_argument("--rounds", type=int, help="how often all ways take turns")
  parser.add_argument("--case", help=argparse.SUPPRESS)
  parser.add_argument("--ways", action="store_true", help=argparse.SUPPRESS)
  parser.add_argument("--way", help=argparse.SUPPRESS)
  options = parser.parse_args()
  refuse_flags()
  if options.case:
    print(json.dumps(run(options)))
    return
  from benchmarks.cases import CASES

  named = lambda n: f"{CASES[n].table}: {n}"
  wanted = [n for n in CASES if not options.cases or any(p in named(n) for p in options.cases)]
  results = {}
  for name in wanted:
    print(f"{name} ...", flush=True)
    results[name] = measure(name, CASES[name], options.rounds)
  OUT.mkdir(parents=True, exist_ok=True)
  (OUT / "numbers.json").write_text(json.dumps({"machine": machine(), "cases": results}, indent=1))
  text = tables(results, CASES) + f"\n\n{machine()}\n"
  (OUT / "table.md").write_text(text)
  calls = {name: r for name, r in results.items() if CASES[name].table == "calls"}
  chart(calls or results, machine(), OUT / "chart.png")
  print(f"\n{text}\nAll numbers, the tables and a chart: {OUT}/")
  if options.against:
    _compare(json.loads(options.against.read_text())["cases"], results)


def _compare(old: dict, new: dict) -> None:
  """Name the rows that have become slower; it is an error if there are any."""
  rows = lost(old, new)
  if rows:
    raise SystemExit("\n".join(["These rows lost more than 15 %:", *rows]))
  print("No row lost more than 15 %.")


def run(options: argparse.Namespace) -> object:
  """In a process of its own: the numbers of a case, the names of its ways, or one way's number."""
  pin()
  from benchmarks.cases import CASES

  case = CASES[options.case]
  steps = case.make()
  if options.ways:
    return list(steps)
  return steps[options.way]() if options.way else rounds_of(steps, options.rounds)


def machine() -> str:
  import importlib.metadata

  def version(name: str) -> str:
    try:
      return f", {name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
      return ""

  versions = "".join(map(version, ("jax", "flax", "equinox", "optax")))
  return f"Python {platform.python_version()}{versions}, {platform.machine()}, {_cpu()}"


def _cpu() -> str:
  info = Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "CPU")
  return f"{model}, {os.cpu_count()} cores"


if __name__ == "__main__":
  main()
