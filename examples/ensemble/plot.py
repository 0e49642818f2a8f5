"""The picture: what the members say, and below it how far to trust them."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # without pyplot, which would look for a screen

from examples.ensemble.data import GAP, Points, curve
from examples.ensemble.model import Prediction
from examples.ensemble.train import combine

BLUE, RED, GREY = "#2563a8", "#c0392b", "#666666"


def uncertainty(points: Points, x: np.ndarray, said: Prediction, path: Path) -> None:
  """Points, members, mean and two standard deviations above; the parts of the deviation below."""
  mean, disagreement, noise = combine(said)
  total = np.sqrt(disagreement**2 + noise**2)
  members = np.asarray(said.mean)[..., 0]
  figure = Figure(figsize=(7, 6), layout="constrained")
  above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))

  above.fill_between(
    x, mean - 2 * total, mean + 2 * total, color=BLUE, alpha=0.15, label="±2 deviations"
  )
  for number, line in enumerate(members):
    label = "each member" if number == 0 else None
    above.plot(x, line, color=BLUE, alpha=0.35, linewidth=0.7, label=label)
  above.plot(x, mean, color=BLUE, linewidth=2, label="mean of the members")
  above.plot(x, curve(x), color=GREY, linestyle="--", linewidth=1, label="the curve")
  above.plot(points.x, points.y, ".", color="black", markersize=4, label="points")
  low, high = float(points.y.min()), float(points.y.max())
  above.set_ylim(low - 0.8, high + 1.8)
  above.set_title(f"{len(members)} networks, trained in one vmapped step", loc="left")

  below.plot(x, disagreement, color=RED, label="how much the members disagree")
  below.axhline(noise, color=GREY, label="the noise that they expect")
  below.set(xlabel="x", ylabel="deviation", ylim=(0, 1.4 * disagreement.max()))
  for axes in (above, below):
    axes.axvspan(*GAP, color="black", alpha=0.04)
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, dpi=110)
