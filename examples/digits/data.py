"""Handwritten digits: 1797 grey images of 8x8 pixels, which scikit-learn brings along."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from sklearn import datasets, model_selection


class Digits(NamedTuple):
  """Images are float32 `[n, 8, 8, 1]` (NHWC) between 0 and 1; labels are integers 0 to 9."""

  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray


def load_digits() -> Digits:
  """A fifth of each digit is for testing: always the same, so that runs can be compared."""
  pixels, labels = datasets.load_digits(return_X_y=True)
  images = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)
  train_images, test_images, train_labels, test_labels = model_selection.train_test_split(
    images, labels.astype(np.int32), test_size=0.2, stratify=labels, random_state=0
  )
  return Digits(train_images, train_labels, test_images, test_labels)


def batches(
  images: np.ndarray, labels: np.ndarray, batch_size: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """One epoch in random order. The rest that fills no batch is left out."""
  order = rng.permutation(len(images))
  for start in range(0, len(order) - batch_size + 1, batch_size):
    chosen = order[start : start + batch_size]
    yield shift(images[chosen], rng), labels[chosen]


def shift(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Move each image by at most a pixel either way: the network learns shapes, not positions."""
  count, height, width, _ = images.shape
  padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
  down, right = rng.integers(0, 3, size=(2, count, 1, 1))
  rows = down + np.arange(height)[:, None]
  columns = right + np.arange(width)
  return padded[np.arange(count)[:, None, None], rows, columns]
