"""A layer with weights of several dtypes, for one token and many: `python -m benchmarks.quantized`.

The best of several rounds, in which all dtypes take turns. `read` is what a layer does that knows
nothing of quantization: it reads the weight as an array, and multiplies with that.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import refuse_flags
from refax import nnx

OUT = Path("out/benchmarks")
SIZES = ((576, 1536), (2048, 8192))
TOKENS = (1, 64)


def layers(inputs: int, outputs: int) -> dict[str, nnx.Linear]:
  """The layer with its weight in each form."""
  build = lambda: nnx.Linear(inputs, outputs, use_bias=False, rngs=nnx.Rngs(0))
  half = build()
  nnx.Precision(param=jnp.bfloat16).apply(half)
  return {
    "float32": build(),
    "bfloat16": half,
    "int8": nnx.quantize(build(), 8),
    "int4": nnx.quantize(build(), 4),
  }


def measure(inputs: int, outputs: int, tokens: int, rounds: int) -> dict[str, Any]:
  """Microseconds of a call, and bytes of the weight, for each form."""
  x = jnp.asarray(np.random.RandomState(0).randn(tokens, inputs), jnp.float32)
  found = layers(inputs, outputs)
  # In bfloat16, the input is so too.
  arguments = {k: x.astype(jnp.bfloat16) if k == "bfloat16" else x for k in found}
  calls = {k: (jax.jit(lambda m, x: m(x)), m, arguments[k]) for k, m in found.items()}
  calls["int8, read"] = (jax.jit(lambda m, x: x @ m.kernel[...]), found["int8"], x)
  best = dict.fromkeys(calls, float("inf"))
  for _ in range(rounds + 1):  # the first compiles
    for name, (call, model, x) in calls.items():
      start = time.perf_counter()
      call(model, x).block_until_ready()
      best[name] = min(best[name], time.perf_counter() - start)
  nbytes = {k: sum(a.nbytes for a in jax.tree.leaves(nnx.pure(m))) for k, m in found.items()}
  us = {k: round(t * 1e6) for k, t in best.items()}
  return {"inputs": inputs, "outputs": outputs, "tokens": tokens, "us": us, "bytes": nbytes}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rounds", type=int, default=30)
  rounds = parser.parse_args().rounds
  refuse_flags()
  results = [measure(*size, tokens, rounds) for size in SIZES for tokens in TOKENS]
  names = list(results[0]["us"])
  print("| tokens x weight | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
  for row in results:
    times = " | ".join(f"{row['us'][name] / 1000:.2f} ms" for name in names)
    print(f"| {row['tokens']} x [{row['inputs']}, {row['outputs']}] | {times} |")
  print("bytes:", results[-1]["bytes"])
  OUT.mkdir(parents=True, exist_ok=True)
  (OUT / "quantized.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
  main()
