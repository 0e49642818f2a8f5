"""The tests in `eight/` run in processes of their own, in which the CPU is eight devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("eight/*.py"))
SLOW = {"annotations", "findings", "plans", "recipes"}  # a minute each: nothing comes from a cache
FLAGS = (
  "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
  " --xla_llvm_disable_expensive_passes=true"  # most of the time is spent in compiling
)


@pytest.mark.parametrize(
  "file",
  [
    pytest.param(file, id=file.stem, marks=pytest.mark.slow if file.stem in SLOW else ())
    for file in FILES
  ],
)
def test_on_eight_devices(file):
  flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
  env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  # In a program from JAX's file cache, the devices of a CPU may meet for their collectives in
  # different orders, and then wait for each other until XLA ends the process.
  env.pop("JAX_COMPILATION_CACHE_DIR", None)
  command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", str(file)]
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
  assert " passed" in done.stdout


def test_there_are_files():
  assert len(FILES) >= 3
