"""A judge of digits that has nothing to do with the model: a support vector machine."""

import numpy as np
from sklearn.svm import SVC


class Judge:
  """Reads digits `[n, 64]`, after it has seen those to train on."""

  def __init__(self, images: np.ndarray, labels: np.ndarray):
    self.images = images
    self.reader = SVC().fit(images, labels)

  def agreement(self, images: np.ndarray, labels: np.ndarray) -> float:
    """The part of the digits that it reads as labelled."""
    return float(np.mean(self.reader.predict(images) == labels))

  def nearest(self, images: np.ndarray) -> float:
    """How far the nearest digit to train on is, as a median; 0 if the images are copies of it."""
    squares = ((images[:, None] - self.images[None]) ** 2).sum(-1)
    return float(np.median(np.sqrt(squares.min(1))))
