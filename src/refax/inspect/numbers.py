"""Numbers: what the elements of an array are like, exact and a part at a time."""

import math
from typing import NamedTuple

import numpy as np

CHUNK = 1 << 20  # so many elements are converted to float64 at a time


class Numbers(NamedTuple):
  """Of the finite elements of an array; `nan` and `inf` are the numbers of the others."""

  mean: float
  std: float
  min: float
  max: float
  zeros: int
  nan: int
  inf: int

  @classmethod
  def of(cls, x: np.ndarray) -> "Numbers":
    """Exact, in float64, whatever the dtype.

    >>> Numbers.of(np.array([0.0, 2.0, np.nan])).mean
    1.0
    """
    flat, count, mean, squares = x.reshape(-1), 0, 0.0, 0.0
    low, high, zeros, nan, inf = math.inf, -math.inf, 0, 0, 0
    for start in range(0, flat.size, CHUNK):
      part = flat[start : start + CHUNK].astype(np.float64)
      finite = np.isfinite(part)
      if not finite.all():
        nan += int(np.isnan(part).sum())
        inf += int(np.isinf(part).sum())
        part = part[finite]
      if not part.size:
        continue
      # Chan, Golub, LeVeque: variances of parts, put together without cancellation.
      n, m = part.size, float(part.mean())
      squares += float(np.square(part - m).sum()) + (m - mean) ** 2 * count * n / (count + n)
      mean += (m - mean) * n / (count + n)
      count += n
      low, high = min(low, float(part.min())), max(high, float(part.max()))
      zeros += n - int(np.count_nonzero(part))
    std = math.sqrt(squares / count) if count else math.nan
    return cls(mean if count else math.nan, std, low, high, zeros, nan, inf)

  def __str__(self) -> str:
    parts = []
    if self.low_to_high:
      parts = [f"mean {self.mean:.3g}", f"std {self.std:.3g}"]
      parts += [f"min {self.min:.3g}", f"max {self.max:.3g}"]
    counts = {"zeros": self.zeros, "NaN": self.nan, "infinite": self.inf}
    return ", ".join([*parts, *(f"{n:,} {name}" for name, n in counts.items() if n)])

  @property
  def low_to_high(self) -> bool:
    """Whether there is a finite element."""
    return self.min <= self.max
