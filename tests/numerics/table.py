"""The table of the docs: every layer, what it was compared with, and the largest difference seen.

make test ARGS=tests/numerics && .venv/bin/python -m tests.numerics.table > docs/numerics.md
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

HEAD = """\
# Numerics

Every layer is compared with an oracle: same weights and input, then outputs, gradients of
parameters and input, and state after the call, over several shapes and options that Hypothesis
chooses (`tests/numerics/`). The table has the largest difference that a run of all these tests has
seen on CPU, with jax 0.10.2 and with jax 0.12, relative to the largest element of the array where
that is above 1. `python -m tests.numerics.table` writes it.

Built of the same seeds, layers start with the parameters of Flax NNX, bit for bit, in eager and in
compiled code: initializers are compiled with a barrier after each operation, so that XLA rounds as
it does when JAX runs the operations one by one. Random streams give the same keys, and Dropout the
same masks.

Below `1e-6` it is rounding: a sum in another order. bfloat16 has 8 bits of mantissa; one unit in
its last place is `8e-3`.

| layer | compared with | float32 | bfloat16 |
|---|---|---|---|
"""


def table(files: list[Path]) -> str:
  """The page, from the files that `conftest.py` writes."""
  found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
  for file in files:
    for layer, oracle, dtype, difference in json.loads(file.read_text()):
      row = found[layer, oracle]
      row[dtype] = max(row.get(dtype, 0.0), difference)
  shown = lambda row, dtype: "" if dtype not in row else f"{row[dtype]:.0e}" if row[dtype] else "0"
  rows = [
    f"| `nnx.{layer}` | {oracle} | {shown(row, 'float32')} | {shown(row, 'bfloat16')} |\n"
    for (layer, oracle), row in sorted(found.items(), key=lambda item: str(item[0]).lower())
  ]
  return HEAD + "".join(rows)


if __name__ == "__main__":
  sys.stdout.write(
    table([Path(p) for p in sys.argv[1:]] or sorted(Path("out/numerics").glob("*.json")))
  )
