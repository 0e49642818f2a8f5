"""Every layer under every mesh gives what it gives on one device, in value, gradient and state.

The mesh has automatic axes, explicit ones, or is that of `jax.shard_map`. Processes of their own
with eight devices run it, see `mesh_worker.py`: `python -m tests.nn.mesh_worker Conv` runs a layer.
`mesh_cases.py` is the table of layers.
"""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from refax import nnx
from refax.nn import explicit
from tests.nn import mesh_cases
from tests.nn.mesh_cases import CASES

PROGRAMS = ("BatchNorm in shards", "decoding in shards")
FLAGS = (
  "--xla_force_host_platform_device_count=8",
  "--xla_backend_optimization_level=0",  # it is compiling that takes the time
  "--xla_llvm_disable_expensive_passes=true",
)


NAMES = [*CASES, *PROGRAMS]
CHUNKS = [NAMES[i::4] for i in range(4)]  # each is a process, so that two of them run at a time


@pytest.mark.slow
@pytest.mark.parametrize("names", CHUNKS, ids=range(len(CHUNKS)))
def test_layers_compute_the_same_in_every_mesh(names: list[str]) -> None:
  env = os.environ | {
    "XLA_FLAGS": " ".join(FLAGS),
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join(sys.path),
  }
  env.pop("JAX_COMPILATION_CACHE_DIR", None)  # see tests/sharding/test_eight_devices.py
  command = [sys.executable, "-m", "tests.nn.mesh_worker", *names]
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
  assert done.returncode == 0, done.stderr
  failed = json.loads(done.stdout)
  lines = [f"{name}, {at}:\n{e}" for name, found in failed.items() for at, e in found.items()]
  assert not lines, "\n".join(lines)


def test_all_layers_are_in_the_table() -> None:
  is_layer = lambda x: getattr(x, "__module__", "").startswith("refax.nn.")
  exported = {name for name, x in vars(nnx).items() if is_layer(x) and callable(x)}
  source = inspect.getsource(mesh_cases)
  said = {name for name in exported if f"nnx.{name}" in source or f'"{name}"' in source}
  others = {
    *("Precision", "RNNCellBase", "LoRAParam"),  # these compute nothing
    *("hard_swish", "swish"),  # other names
    # These change layers; tests/sharding/eight/quantized.py has what becomes of them.
    *("QuantizedParam", "QuantizedWeight", "add_lora", "merge_lora", "quantize"),
  }
  assert exported - said == others


def test_without_a_mesh_nothing_is_added() -> None:
  asked: list[Any] = []
  never: Callable[[], Any] = lambda: asked.append(None)
  assert explicit.call(lambda x: x, "as it is", out=never) == "as it is"
  assert explicit.fitted(lambda x: x, "as it is", out=never) == "as it is"
  assert explicit.put("as it is", never) == "as it is"
  assert not asked and explicit.axes() == ()
