"""The two pictures of a run: how the training went, and which digits the model finds hardest."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # without pyplot, which would look for a screen
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from examples.digits.data import Digits
from examples.digits.train import Epoch

BLUE, RED, GREY = "#2563a8", "#c0392b", "#666666"
COLUMNS = 8
ROWS = 2, 6  # at least and at most


def learning_curve(history: Sequence[Epoch], goal: float, path: Path) -> None:
  """Training loss above, test accuracy below, one point an epoch."""
  figure = Figure(figsize=(7, 6), layout="constrained")
  above, below = figure.subplots(2, 1, sharex=True)
  epochs = np.arange(1, len(history) + 1)

  loss = [epoch.loss for epoch in history]
  above.plot(epochs, loss, "o-", color=BLUE, markersize=4)
  above.set(yscale="log", title=f"Training loss, mean over the epoch: {loss[-1]:.3f} at the end")
  above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  above.yaxis.set_major_formatter("{x:g}")
  above.yaxis.set_minor_locator(NullLocator())

  accuracy = [100 * epoch.accuracy for epoch in history]
  below.plot(epochs, accuracy, "o-", color=BLUE, markersize=4)
  below.axhline(100 * goal, color=GREY, linestyle="--", linewidth=1, label=f"goal: {goal:.0%}")
  below.legend(loc="lower right", frameon=False)
  below.set(title=f"Test accuracy: {accuracy[-1]:.1f}% at the end", xlabel="epoch")
  below.yaxis.set_major_locator(MaxNLocator(integer=True))
  below.yaxis.set_major_formatter("{x:g}%")
  below.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))

  for axes in (above, below):
    axes.title.set(ha="left", x=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
  figure.savefig(path, dpi=150)


def misread(digits: Digits, probabilities: ArrayLike, path: Path) -> None:
  """The misread test digits in red, then those whose right reading was least certain."""
  labels = digits.test_labels
  probabilities = np.asarray(probabilities)
  readings = probabilities.argmax(-1)
  wrong = int(np.sum(readings != labels))
  hardest_first = np.lexsort((probabilities[np.arange(len(labels)), labels], readings == labels))

  rows = int(np.clip(-(-wrong // COLUMNS), *ROWS))
  figure = Figure(figsize=(1.35 * COLUMNS, 1.85 * rows + 0.5), layout="constrained")
  figure.suptitle(title(wrong, len(labels), rows * COLUMNS), x=0.01, ha="left")
  panels = figure.subplots(rows, COLUMNS).flat
  for axes, i in zip(panels, hardest_first, strict=False):
    right = readings[i] == labels[i]
    axes.imshow(digits.test_images[i, :, :, 0], cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("#cccccc" if right else RED)
    axes.set_title(
      f"is {labels[i]}, read {readings[i]}", color="black" if right else RED, fontsize=11
    )
    axes.set_xlabel(f"{probabilities[i].max():.0%} sure", color=GREY, fontsize=9)
  figure.savefig(path, dpi=150)


def title(wrong: int, total: int, shown: int) -> str:
  if wrong == 0:
    return f"None of {total} test digits misread; these are the {shown} with the least certainty"
  if wrong < shown:
    return f"{wrong} of {total} test digits misread (red); the others had the least certainty"
  return f"{wrong} of {total} test digits misread; the {shown} worst"
