"""The chart of the documentation's first page: four rows of the table in docs/benchmarks.md.

python -m benchmarks.home
"""

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
PAGE, CHART = DOCS / "benchmarks.md", DOCS / "speed.png"
ROWS = {
  "train step, depth 32": "A training step of 32 layers",
  "transformer, 4 blocks": "A training step of a transformer",
  "evaluation, depth 32": "Evaluation of 32 layers",
  "dispatch, 100 Variables": "A call that computes almost nothing",
}
WAYS = {
  "Refax nnx.jit": ("Refax", "#2563eb"),
  "Flax nnx.jit": ("Flax NNX", "#9ca3af"),
  "Equinox filter_jit": ("Equinox", "#9ca3af"),
}


def multiples(page: str) -> dict[str, dict[str, float]]:
  """{row: {way: median}} of the rows and ways above, as the page says them."""
  table = re.search(r"^## calls\n\n(.*?)\n\n", page, flags=re.DOTALL | re.MULTILINE)
  head, _, *lines = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()
  ]
  rows = {cells[0]: dict(zip(head, cells, strict=True)) for cells in lines}
  return {
    row: {way: float(rows[row][way].split()[0]) for way in WAYS if rows[row][way]} for row in ROWS
  }


def draw(numbers: dict[str, dict[str, float]], path: Path) -> None:
  """A group of bars for each row, each bar with its name and number; for the width of a phone."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(figsize=(4.6, 5.2), layout="constrained")
  place = 0.0
  for row, ways in numbers.items():
    axes.text(0.62, place, ROWS[row], fontsize=11, fontweight="bold", va="center")
    axes.vlines(1, place + 0.5, place + len(ways) + 0.5, color="black", linestyle="--", zorder=3)
    for way, multiple in ways.items():
      place += 1
      name, color = WAYS[way]
      axes.barh(place, multiple - 0.6, 0.8, left=0.6, color=color)
      label = f"  {name} {multiple:.3g}×"
      axes.text(multiple, place, label, fontsize=11, va="center", ha="left")
    place += 1.4
  note = "Dashed: the same in JAX by hand = 1.\nThe scale is logarithmic."
  axes.text(0.62, place, note, fontsize=10, va="center")
  axes.set(xscale="log", xlim=(0.6, 400), ylim=(place + 0.8, -0.8), yticks=[], xticks=[])
  axes.minorticks_off()
  axes.spines[:].set_visible(False)
  figure.savefig(path, dpi=180)


if __name__ == "__main__":
  draw(multiples(PAGE.read_text()), CHART)
  print(f"Drawn: {CHART}")
