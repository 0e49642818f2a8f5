"""What a process holds that decodes with SmolLM2-135M: `python -m benchmarks.chat_memory`.

Each row is a process of its own: a library is loaded, then the weights (float32), then a prompt is
read and four tokens are written, with a memory of 512 positions. What `malloc` keeps of freed
arrays goes back to the system before each look; the peak is that of the whole run.
"""

import ctypes
import gc
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PROMPT = list(range(1, 40))
ROWS = {"Refax": "refax", "JAX by hand": "by_hand", "transformers on torch": "torch"}


def refax() -> Iterator[str]:
  from examples.chat.model import load
  from refax import nnx

  yield "library"
  model = load()
  yield "weights"
  for _ in nnx.stream(model, PROMPT, 4, max_length=512):
    pass
  yield "reply"


def by_hand() -> Iterator[str]:
  from benchmarks.chat import by_hand
  from examples.chat.model import load

  yield "library"
  run = by_hand(load())  # it copies the weights; the model goes
  yield "weights"
  run(PROMPT, 4)
  yield "reply"


def torch(path: str) -> Iterator[str]:
  import transformers

  from benchmarks import chat_torch

  _ = transformers.AutoModelForCausalLM  # imports torch
  yield "library"
  run = chat_torch.run(Path(path))
  yield "weights"
  run(PROMPT, 4)
  yield "reply"


def measure(name: str, *args: str) -> dict[str, float]:
  """MiB after each part of a row, in this process."""
  found = {}
  for part in globals()[name](*args):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    found[part] = _status("VmRSS")
  return found | {"peak": _status("VmHWM")}


def _status(key: str) -> float:
  lines = Path("/proc/self/status").read_text().splitlines()
  return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def main() -> None:
  if len(sys.argv) > 1:
    print(json.dumps(measure(*sys.argv[1:])))
    return
  from examples.chat.model import (
    weights,
  )  # not above: it imports JAX, and the row of torch has none

  print(f"{'MiB':24}{'library':>10}{'weights':>10}{'reply':>10}{'peak':>10}")
  for title, name in ROWS.items():
    if name == "torch" and importlib.util.find_spec("transformers") is None:
      continue
    args = [str(weights())] if name == "torch" else []
    command = [sys.executable, "-m", "benchmarks.chat_memory", name, *args]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(f"{title:24}" + "".join(f"{x:10.0f}" for x in json.loads(out).values()), flush=True)


if __name__ == "__main__":
  main()
