"""The picture of a run: how long the poles stay up while the agents learn."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # without pyplot, which would look for a screen

from examples.cartpole.environment import TIME_LIMIT

COLOURS = "#2563a8", "#c0392b", "#2e8b57", "#8e6bb0", "#b8860b", "#666666"


def reward_curve(playing: np.ndarray, exams: np.ndarray, each: int, goal: float, path: Path):
  """Two panels of mean returns, `[parts, agents]`: with random actions above, without below.

  Args:
    playing: of the episodes that ended in a part of the run; NaN where none did.
    exams: at the end of the part.
    each: the steps of one agent in its environments in a part.
    goal: the return to reach.
    path: the file to write.
  """
  figure = Figure(figsize=(7, 5.5), layout="constrained")
  above, below = figure.subplots(2, 1, sharex=True, sharey=True)
  steps = each * np.arange(1, len(exams) + 1) / 1000
  for axes, values in ((above, playing), (below, exams)):
    for agent, column in enumerate(values.T):
      axes.plot(steps, column, color=COLOURS[agent % len(COLOURS)], linewidth=1.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
  below.axhline(goal, color="#666666", linestyle="--", linewidth=1, label=f"goal: {goal:g}")
  below.legend(loc="lower right", frameon=False)
  above.set_title("Mean return while learning, with random actions: one line an agent", loc="left")
  below.set_title("Mean return in exams on new poles, without random actions", loc="left")
  below.set(
    xlabel="thousands of steps in the environments of one agent", ylim=(0, 1.05 * TIME_LIMIT)
  )
  figure.savefig(path, dpi=96)
