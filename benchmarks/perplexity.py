"""What quantization costs SmolLM2-135M: `python -m benchmarks.perplexity`.

Each row is the model with its weights in one form, and its perplexity on docstrings of Python's
standard library, of modules that the fine-tuning example holds out.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from examples.chat import finetune
from examples.chat.model import load, weights
from examples.chat.text import Tokenizer
from refax import nnx

OUT = Path("out/benchmarks")
FORMS: dict[str, Callable[[Any], Any]] = {
  "float32": lambda model: model,
  "bfloat16": lambda model: nnx.Precision(param=jnp.bfloat16).apply(model),
  "8 bits": lambda model: nnx.quantize(model, 8),
  "8 bits, groups of 32": lambda model: nnx.quantize(model, 8, group_size=32),
  "4 bits, groups of 32": lambda model: nnx.quantize(model, 4),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rows", type=int, default=32, help=f"of {finetune.LENGTH} tokens each")
  options = parser.parse_args()
  texts = finetune.split(finetune.docstrings(), seed=0)[1]
  rows = finetune.pack(texts, Tokenizer(weights()), seed=0, rows=options.rows)
  found = {}
  for name, change in FORMS.items():
    model = load()
    change(model)
    loss = finetune.evaluate(model, rows)
    size = sum(x.nbytes for x in jax.tree.leaves(nnx.pure(nnx.state(model)))) / 1e6
    found[name] = {"loss": loss, "perplexity": math.exp(loss), "MB": size}
    print(f"{name:24} {size:6.0f} MB  loss {loss:.3f}  perplexity {math.exp(loss):.1f}", flush=True)
  OUT.mkdir(parents=True, exist_ok=True)
  (OUT / "perplexity.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
  main()
