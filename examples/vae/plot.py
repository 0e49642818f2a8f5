"""The pictures: digits with their reconstructions, and digits that nobody wrote."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure  # without pyplot, which would look for a screen

from examples.vae.model import LEVELS, VAE
from examples.vae.train import Epoch
from refax import nnx

BLUE, RED = "#2563a8", "#c0392b"
COLUMNS, SIDE = 16, 14


@nnx.jit
def reconstruct(model: VAE, counts: jax.Array) -> jax.Array:
  return model.decode(model.encode(counts).mean)


@nnx.jit
def plane(model: VAE) -> jax.Array:
  """Mean images of the latent plane, row by row: each code stands for as much probability."""
  steps = jax.scipy.special.ndtri(jnp.linspace(0.02, 0.98, SIDE))
  down, right = jnp.meshgrid(-steps, steps, indexing="ij")
  return model.decode(jnp.stack([right.ravel(), down.ravel()], axis=-1))


@nnx.jit
def drawn(model: VAE) -> jax.Array:
  return model.draw(SIDE**2)


def mosaic(images: np.ndarray, columns: int) -> np.ndarray:
  """Images `[n, 64]` beside and below each other, with a pixel between them."""
  rows = len(images) // columns
  padded = np.pad(np.reshape(images, (-1, 8, 8)), ((0, 0), (1, 1), (1, 1)))
  return padded.reshape(rows, columns, 10, 10).swapaxes(1, 2).reshape(rows * 10, columns * 10)


def samples(model: VAE, test: np.ndarray, path: Path) -> None:
  """Above, test digits and below each its reconstruction; then the plane, or draws."""
  shown = test[:COLUMNS]
  pairs = np.concatenate([shown / LEVELS, np.asarray(reconstruct(model, shown))])
  new = plane(model) if model.latent == 2 else drawn(model)
  figure = Figure(figsize=(6, 7.6), layout="constrained")
  above, below = figure.subplots(2, 1, height_ratios=(2, COLUMNS))
  for axes, image in ((above, mosaic(pairs, COLUMNS)), (below, mosaic(np.asarray(new), SIDE))):
    axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
  above.set_title("Digits that it has not seen, and what it makes of their codes", fontsize=10)
  what = "The plane of codes" if model.latent == 2 else f"Codes of {model.latent} numbers, drawn"
  below.set_title(what, fontsize=10)
  figure.savefig(path, dpi=110)


def learning_curve(history: Sequence[Epoch], path: Path) -> None:
  """The bound on the training and on the test digits, by epoch."""
  figure = Figure(figsize=(7, 4), layout="constrained")
  axes = figure.subplots()
  epochs = np.arange(1, len(history) + 1)
  axes.plot(epochs, [e.train for e in history], color=BLUE, label="training")
  axes.plot(epochs, [e.test for e in history], color=RED, label="test")
  best, highest = (max(getattr(e, name) for e in history) for name in ("test", "train"))
  axes.set(ylim=(best - 60, max(best, highest) + 5), xlabel="epoch", ylabel="nats for each digit")
  axes.set_title(
    f"Lower bound on the log-likelihood: {history[-1].test:.1f} at the end", loc="left"
  )
  axes.legend(frameon=False, loc="lower right")
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(alpha=0.25)
  figure.savefig(path, dpi=110)
