"""The picture of a run: the loss of each step, and that on the text that is held out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # without pyplot, which would look for a screen
from matplotlib.ticker import LogLocator, NullLocator

from examples.chars.train import Progress

BLUE, RED, GREY = "#2563a8", "#c0392b", "#666666"


def learning_curve(history: Sequence[Progress], untrained: float, path: Path) -> None:
  """Bits for each character, by step; the dashed line is what counting characters alone gives."""
  figure = Figure(figsize=(7, 4), layout="constrained")
  axes = figure.subplots()
  axes.plot(
    [p.step for p in history], [p.train for p in history], color=BLUE, alpha=0.5, label="training"
  )
  measured = [(p.step, p.held_out) for p in history if p.held_out is not None]
  steps, held_out = np.array(measured).T
  axes.plot(steps, held_out, "o-", color=RED, markersize=4, label="held out")
  axes.axhline(
    untrained, color=GREY, linestyle="--", linewidth=1, label="how often each character comes"
  )
  axes.set(yscale="log", xlabel="step", ylabel="bits for each character")
  axes.set_title(f"Held-out text: {held_out[-1]:.2f} bits for each character", loc="left")
  axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
  axes.yaxis.set_major_formatter("{x:g}")
  axes.yaxis.set_minor_locator(NullLocator())
  axes.legend(frameon=False)
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(alpha=0.25)
  figure.savefig(path, dpi=110)
