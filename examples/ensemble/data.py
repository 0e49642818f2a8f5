"""A curve with noise, measured on both sides of a gap."""

from typing import NamedTuple

import numpy as np

LEFT, GAP, RIGHT = -3.0, (-0.5, 1.5), 3.0  # there is no point in the gap
NOISE = 0.15  # the standard deviation of what is added to the curve


class Points(NamedTuple):
  """Points of a curve: x and y are float32 `[n, 1]`."""

  x: np.ndarray
  y: np.ndarray


def curve(x: np.ndarray) -> np.ndarray:
  return np.sin(2 * x) + 0.4 * x


def make(count: int, *, seed: int) -> Points:
  """`count` points, spread over the two sides by their widths."""
  rng = np.random.default_rng(seed)
  width = GAP[0] - LEFT + RIGHT - GAP[1]
  x = LEFT + width * rng.random((count, 1))
  x = np.where(x < GAP[0], x, x + GAP[1] - GAP[0])
  y = curve(x) + NOISE * rng.standard_normal((count, 1))
  return Points(x.astype(np.float32), y.astype(np.float32))


def is_in_gap(x: np.ndarray, margin: float = 0.0) -> np.ndarray:
  """Where there are no points; a positive margin leaves out that much at both ends."""
  return (x > GAP[0] + margin) & (x < GAP[1] - margin)
