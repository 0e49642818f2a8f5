"""Show on this machine that training by several processes is right, also when one of them dies.

python -m examples.multihost [--quick | --processes 2]
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from examples.multihost.launch import Outcome, explain, launch

# Sums over the devices are added in another order than on one device, and each step builds on the
# last one: after 20 steps in float32, which has 1e-7, losses and parameters differ by some 1e-5 of
# the largest. Gradients, and so momentum, jump where a ReLU or max-pooling is just at its edge.
TOLERANCE, MOMENTUM_TOLERANCE = 1e-4, 2e-3
STEPS, SAVE_EVERY, KILLED_AT = 20, 5, 13

# The networks are small: to compile them takes longer than to train them, so compile in a hurry.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


class Demo:
  """Runs, and what was shown by them.

  Args:
    folder: where they write.
    steps: how many steps a run has.
  """

  def __init__(self, folder: Path, steps: int):
    self.folder, self.steps = folder, steps
    self.holds = True

  def run(self, name: str, count: int, task: str, *arguments: str, folder: str = "") -> Outcome:
    """Train by some processes; what they print is in a folder of the name."""
    logs = self.folder / name
    logs.mkdir(parents=True, exist_ok=True)
    command = ["-m", "examples.multihost.train", "--task", task, "--steps", str(self.steps)]
    command += ["--folder", str(self.folder / (folder or name)), "--name", name, *arguments]
    return launch(count, command, logs=logs)

  def well(self, outcome: Outcome, name: str) -> None:
    """Go on only after a run that ended as it should."""
    if outcome.failed is None:
      return
    log = self.folder / name / f"process_{outcome.failed}.log"
    print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
    raise SystemExit(f"{name}: {explain(outcome)}")

  def show(self, what: str, result: str, holds: bool) -> None:
    self.holds &= holds
    print(f"  {'ok  ' if holds else 'NO  '}{what:48}{result}", flush=True)

  def losses(self, name: str, folder: str = "") -> list[float]:
    return json.loads((self.folder / (folder or name) / f"{name}_losses.json").read_text())

  def state(self, name: str, when: str = "final", folder: str = "") -> dict[str, np.ndarray]:
    with np.load(self.folder / (folder or name) / f"{name}_{when}.npz") as file:
      return dict(file)


def compare(demo: Demo, task: str, counts: list[int]) -> None:
  """Several processes against one: the loss of each step, and the state in the end."""
  for count in [1, *counts]:
    name = f"{task}_{count}"
    demo.well(demo.run(name, count, task, "--save-every", str(SAVE_EVERY)), name)
  want, wanted = demo.losses(f"{task}_1"), demo.state(f"{task}_1")
  for count in counts:
    got, state = demo.losses(f"{task}_{count}"), demo.state(f"{task}_{count}")
    loss = max(abs(x - y) / abs(y) for x, y in zip(got, want, strict=True))
    model, momentum = (
      max(relative(state[key], x) for key, x in wanted.items() if key.startswith(part))
      for part in ("0.", "1.")
    )
    result = f"max difference: losses {loss:.0e}, model {model:.0e}, optimizer {momentum:.0e}"
    holds = max(loss, model) < TOLERANCE and momentum < MOMENTUM_TOLERANCE
    demo.show(f"{task}: {count} processes equal one", result, holds)


def relative(got: np.ndarray, want: np.ndarray) -> float:
  """The largest difference, in units of the largest value; a small one if all are small."""
  if not want.size or want.dtype.kind in "ui":
    return 0.0 if np.array_equal(got, want) else np.inf
  return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-2))


def bitwise(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> bool:
  return got.keys() == want.keys() and all(got[k].tobytes() == want[k].tobytes() for k in want)


def restore_elsewhere(demo: Demo, count: int) -> None:
  """What `count` processes have saved, on fewer of them, and on a mesh of another shape."""
  source, more = f"text_{count}", demo.steps + 2
  wanted = demo.state(source)
  for processes, mesh in ((2, "1,2"), (1, "1")):
    name = f"from_{count}_to_{mesh.replace(',', 'x')}"
    shutil.copytree(demo.folder / source / "checkpoints", demo.folder / name / "checkpoints")
    arguments = ("--mesh", mesh, "--steps", str(more), "--save-every", "1000")
    demo.well(demo.run(name, processes, "text", *arguments), name)
    same = bitwise(demo.state(name, "restored"), wanted)
    result = "bitwise" if same else "other values"
    went_on = demo.losses(name)
    fell = len(went_on) == more and np.isfinite(went_on).all()
    demo.show(f"saved by {count}, restored by {processes} on mesh ({mesh})", result, same and fell)


def die(demo: Demo, count: int, killed: int) -> str:
  """One process is killed: the others end. The name of the run, which can go on."""
  name = f"killed_{killed}_of_{count}"
  step = min(KILLED_AT, demo.steps - 2)
  arguments = ("--save-every", str(SAVE_EVERY))
  outcome = demo.run(name, count, "digits", "--kill", f"{killed},{step}", *arguments)
  others = [i for i in range(count) if i != killed]
  alone = sum(i not in outcome.stopped for i in others)
  ended = outcome.codes[killed] == -9 and all(outcome.codes[i] != 0 for i in others)
  result = f"the others ended after {outcome.seconds:.1f} s, {alone} of {len(others)} by themselves"
  demo.show(f"process {killed} of {count} killed at step {step}", result, ended)
  for number in others:
    print(f"        process {number}: {last_error(demo.folder / name / f'process_{number}.log')}")
  return name


def stop_and_go_on(demo: Demo, count: int) -> None:
  """One process is told to stop: all save at the same step and end, and go on bit for bit."""
  name, step = f"told_{count}", min(KILLED_AT, demo.steps - 2)
  arguments = ("--terminate", f"{count - 1},{step}", "--save-every", str(SAVE_EVERY))
  outcome = demo.run(name, count, "digits", *arguments)
  said = (demo.folder / name / "process_0.log").read_text(errors="replace")
  result = next((line for line in said.splitlines() if line.startswith("told")), "nothing saved")
  ended = set(outcome.codes) == {75} and "saved" in result
  demo.show(f"process {count - 1} of {count} gets SIGTERM at step {step}", result, ended)
  go_on(demo, count, name)


def go_on(demo: Demo, count: int, name: str) -> None:
  """Start a run again, and compare it with one that was not interrupted."""
  whole, arguments = f"digits_{count}", ("--save-every", str(SAVE_EVERY))
  resumed = f"{name}_resumed"
  demo.well(demo.run(resumed, count, "digits", *arguments, folder=name), resumed)
  said = (demo.folder / resumed / "process_0.log").read_text(errors="replace")
  at = next((line for line in said.splitlines() if line.startswith("restored")), "from the start")
  same = demo.losses(resumed, name) == demo.losses(whole)
  same &= bitwise(demo.state(resumed, folder=name), demo.state(whole))
  demo.show("started again", f"{at}, {'bitwise as uninterrupted' if same else 'differs'}", same)


def last_error(log: Path) -> str:
  """The line of a log that says why the process ended."""
  lines = log.read_text(errors="replace").splitlines()
  raised = [x for x in lines if re.match(r"[\w.]+Error: ", x)]
  fatal = [x.partition("] ")[2] for x in lines if re.match(r"F\d{4} ", x)]
  line = (raised or fatal or ["ended without a word"])[-1]
  return re.sub(r"\[external/[^\]]*\] ", "", line)[:110]


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m examples.multihost", description=__doc__)
  parser.add_argument("--quick", action="store_true", help="two processes, digits only, few steps")
  parser.add_argument("--processes", type=int, choices=(2, 4), default=4, help="at most this many")
  parser.add_argument("--folder", type=Path, default=Path("out/multihost"))
  options = parser.parse_args(argv)
  folder = options.folder.absolute()
  shutil.rmtree(folder, ignore_errors=True)
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
  start = time.monotonic()
  print("Training by several processes on this machine:", flush=True)
  demo = Demo(folder, 6 if options.quick else STEPS)
  if options.quick:
    compare(demo, "digits", [2])
  else:
    counts = [2, 4][: options.processes // 2]
    compare(demo, "digits", counts)
    compare(demo, "text", counts)
    restore_elsewhere(demo, counts[-1])
    go_on(demo, counts[-1], die(demo, counts[-1], killed=1))
    die(demo, 2, killed=0)  # the one that coordinates the others
    stop_and_go_on(demo, 2)
  print(f"  {'All of it holds' if demo.holds else 'NOT ALL OF IT HOLDS'}", end="")
  print(f", after {time.monotonic() - start:.0f} s. What the processes printed is in {folder}.")
  return 0 if demo.holds else 1


if __name__ == "__main__":
  with contextlib.suppress(KeyboardInterrupt):
    sys.exit(main())
  sys.exit(130)
