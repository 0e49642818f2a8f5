"""The picture: ten of each digit, and one of each on its way from the noise."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # without pyplot, which would look for a screen

from examples.diffusion.model import CLASSES

COLUMNS, STAGES = 12, 8


def labels() -> np.ndarray:
  """The digits of the picture: a row of each."""
  return np.repeat(np.arange(CLASSES), COLUMNS)


def mosaic(images: np.ndarray, columns: int) -> np.ndarray:
  """Images `[n, 64]` beside and below each other, with a pixel between them."""
  rows = len(images) // columns
  padded = np.pad(np.reshape(images, (-1, 8, 8)), ((0, 0), (1, 1), (1, 1)), constant_values=-1)
  return padded.reshape(rows, columns, 10, 10).swapaxes(1, 2).reshape(rows * 10, columns * 10)


def samples(path: np.ndarray, file: Path) -> None:
  """`path`: `[steps + 1, digits, 64]`, of the digits in `labels()`."""
  stages = np.linspace(0, len(path) - 1, STAGES).round().astype(int)
  on_the_way = path[stages][:, ::COLUMNS].swapaxes(0, 1).reshape(-1, path.shape[-1])
  figure = Figure(figsize=(8, 4.3), layout="constrained")
  left, right = figure.subplots(1, 2, width_ratios=(COLUMNS, STAGES))
  left.imshow(mosaic(path[-1], COLUMNS), cmap="gray_r", vmin=-1, vmax=1)
  left.set_title("Digits that nobody wrote", fontsize=10)
  right.imshow(mosaic(on_the_way, STAGES), cmap="gray_r", vmin=-1, vmax=1)
  right.set_title("From the noise to the first of them", fontsize=10)
  for axes in (left, right):
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
  figure.savefig(file, dpi=110)
