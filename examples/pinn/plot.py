"""The picture of a run: the solution, the networks, and how the viscosity was found."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # without pyplot, which would look for a screen

from examples.pinn.burgers import Measurements

BLUE, RED, GREY = "#2563a8", "#c0392b", "#666666"
TIMES = 0.25, 0.5, 1.0
YTICKS = 0.02, 0.05, 0.1, 0.2


def grid() -> tuple[np.ndarray, np.ndarray]:
  """Places and times, `[101, 201]` each, at which solutions are compared and drawn."""
  return np.meshgrid(np.linspace(-1, 1, 201), np.linspace(0, 1, 101))


def draw(
  want: np.ndarray,
  found: np.ndarray,
  without: np.ndarray,
  measured: Measurements,
  viscosities: np.ndarray,
  true: float,
  path: Path,
) -> None:
  """Above the whole wave and the viscosity, below the wave at some times."""
  figure = Figure(figsize=(10, 6), layout="constrained")
  above, below = figure.subplots(2, 3)
  x, t = grid()
  look = {"cmap": "RdBu_r", "levels": np.linspace(-1.2, 1.2, 25)}
  for axes, values, name in ((above[0], want, "The solution"), (above[1], found, "The network")):
    axes.contourf(t, x, values, extend="both", **look)
    axes.set(xlabel="time", ylabel="place")
    axes.set_title(name, loc="left")
  above[0].scatter(
    measured.t, measured.x, s=5, color="black", label=f"{len(measured.x)} measurements"
  )
  above[0].legend(loc="upper right", fontsize=8, framealpha=1)
  above[2].plot(np.arange(1, len(viscosities) + 1) / 1000, viscosities, color=BLUE)
  above[2].axhline(true, color=GREY, linestyle="--", linewidth=1, label=f"true: {true}")
  above[2].set(
    yscale="log", xlabel="thousands of steps", yticks=YTICKS, yticklabels=map(str, YTICKS)
  )
  above[2].minorticks_off()
  above[2].set_title(f"Its viscosity: {viscosities[-1]:.4f}", loc="left")
  above[2].legend(frameon=False)
  for axes, time in zip(below, TIMES, strict=True):
    row = round(time * 100)
    axes.plot(x[0], want[row], color=GREY, linewidth=4, alpha=0.5, label="solution")
    axes.plot(x[0], found[row], color=BLUE, label="network")
    axes.plot(x[0], without[row], color=RED, linestyle=":", label="without the equation")
    axes.set(xlabel="place", ylim=(-1.3, 1.3))
    axes.set_title(f"At the time {time:g}", loc="left")
  below[0].legend(frameon=False, fontsize=8, loc="lower left")
  for axes in (above[2], *below):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
  figure.savefig(path, dpi=80)
