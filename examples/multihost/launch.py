"""Start the processes of one program, and stop all of them when one fails.

`join` is what a program calls first, on any machine. `launch` stands in here for what SLURM or
Kubernetes does: it gives each process the address of the first one, its number, and how many there
are, and watches them.

python -m examples.multihost.launch -n 2 -- -m examples.multihost.train --task text
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "PROCESS_COUNT", "PROCESS_ID"
HEARTBEAT = 10  # seconds without a sign of life after which a process counts as dead
GRACE = 2 * HEARTBEAT  # what the others have to notice by themselves, before they are stopped


def join() -> None:
  """Connect this process with the others; call it before anything else uses JAX's devices.

  The three variables come from `launch`, or from the script of a job (see README.md). Without
  them, a job of SLURM, Open MPI or Kubernetes is recognised by JAX itself.
  """
  import jax

  # How processes without accelerators exchange arrays. GPUs use NCCL and TPUs their network.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  if ADDRESS in os.environ:
    where = (os.environ[ADDRESS], int(os.environ[COUNT]), int(os.environ[NUMBER]))
    jax.distributed.initialize(
      *where,
      initialization_timeout=60,  # the others may still be installing or pulling an image: longer
      heartbeat_timeout_seconds=HEARTBEAT,
      shutdown_timeout_seconds=60,
    )
  elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 or "JOB_COMPLETION_INDEX" in os.environ:
    jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)


class Outcome(NamedTuple):
  """How the processes ended.

  Attributes:
    codes: the exit status of each; negative for a signal.
    failed: the process that failed first; None if none did.
    seconds: the time from there until the last of the others had ended, by itself or stopped.
    stopped: those that had to be stopped.
  """

  codes: list[int]
  failed: int | None
  seconds: float
  stopped: list[int]


def launch(
  count: int,
  arguments: Sequence[str],
  *,
  devices: int = 1,
  logs: Path | None = None,
  limit: float = 600,
  grace: float = GRACE,
) -> Outcome:
  """Run `python *arguments` in several processes, with some devices of the CPU each.

  A process that fails can leave the others waiting for its part of a sum. They notice: the
  connection breaks, or no heartbeat comes. Who has not ended `grace` seconds later is stopped.

  Args:
    count: how many processes.
    arguments: of Python: `["-m", "examples.multihost.train"]`.
    devices: how many devices each process has.
    logs: a folder for what they print; by default it is printed.
    limit: seconds after which all are stopped.
    grace: seconds that the others have after one has failed.
  """
  address = f"127.0.0.1:{_free_port()}"
  processes = []
  for number in range(count):
    env = os.environ | {COUNT: str(count), NUMBER: str(number)}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    env |= {ADDRESS: address} if count > 1 else {}
    out = None if logs is None else (logs / f"process_{number}.log").open("wb")
    command = [sys.executable, *arguments]
    processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))
    if out is not None:
      out.close()  # the process has its own
  try:
    return _watch(processes, limit, grace)
  finally:
    for process in processes:
      if process.poll() is None:
        process.kill()
      process.wait()


def _watch(processes: list[subprocess.Popen], limit: float, grace: float) -> Outcome:
  """Wait for the end of all; when one has failed, or time is up, stop the others."""
  failed, start, since, stopped = None, time.monotonic(), 0.0, []
  while any(running := [process.poll() is None for process in processes]):
    now = time.monotonic()
    if failed is None:
      failed = next((i for i, process in enumerate(processes) if process.poll()), None)
      since = now
    late = now - start > limit or (failed is not None and now - since > grace)
    if late and not stopped:
      stopped = [i for i, runs in enumerate(running) if runs]
      for i in stopped:
        processes[i].kill()  # SIGTERM would wait for a shutdown in which all take part
    time.sleep(0.05)
  codes = [process.returncode for process in processes]
  if failed is None:
    failed = next((i for i, code in enumerate(codes) if code), None)
  return Outcome(codes, failed, time.monotonic() - since if failed is not None else 0.0, stopped)


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def explain(outcome: Outcome) -> str:
  """One line that says which process failed, and what became of the others."""
  if outcome.failed is None:
    return f"all {len(outcome.codes)} processes ended well"
  code = outcome.codes[outcome.failed]
  how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
  rest = f"stopped: {outcome.stopped}" if outcome.stopped else "the others ended by themselves"
  return (
    f"process {outcome.failed} of {len(outcome.codes)} ended {how}; {rest}, "
    f"{outcome.seconds:.1f} s later. Start all of them again: they go on at the last checkpoint."
  )


def main() -> int:
  parser = argparse.ArgumentParser(prog="python -m examples.multihost.launch", description=__doc__)
  parser.add_argument("-n", type=int, default=2, help="how many processes")
  parser.add_argument("--devices", type=int, default=1, help="how many devices each of them has")
  parser.add_argument("arguments", nargs=argparse.REMAINDER, help="-- arguments of Python")
  options = parser.parse_args()
  arguments = [x for x in options.arguments if x != "--"]
  ended = launch(options.n, arguments, devices=options.devices, limit=float("inf"))
  print(explain(ended))
  return 0 if ended.failed is None else 1


if __name__ == "__main__":
  sys.exit(main())
