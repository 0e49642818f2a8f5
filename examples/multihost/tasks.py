"""What is learned: to read digits, and to continue text letter by letter."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax

from examples.multihost.data import Source
from refax import nnx

LENGTH = 32  # letters in an example of text


class Task(NamedTuple):
  """A network, its data, and how its parameters are divided over the devices.

  Attributes:
    model: makes the network.
    source: its examples.
    loss: from the network and a batch to the mean loss.
    plan: from the names of the mesh's axes to a plan of `nnx.plans`.
    optimizer: of optax.
  """

  model: Callable[[nnx.Rngs], nnx.Module]
  source: Callable[[], Source]
  loss: Callable[[nnx.Module, dict[str, jax.Array]], jax.Array]
  plan: Callable[[tuple[str, ...]], nnx.Plan]
  optimizer: optax.GradientTransformation


class CharNet(nnx.Module):
  """A small transformer: ASCII letters `[batch, length]` to logits `[batch, length, 128]`."""

  def __init__(self, rngs: nnx.Rngs):
    self.embed = nnx.Embed(128, 64, rngs=rngs)
    self.blocks = nnx.TransformerDecoder(2, 64, num_heads=4, rope=nnx.RoPE(), rngs=rngs)
    self.head = nnx.Linear(64, 128, rngs=rngs)

  def __call__(self, letters: jax.Array) -> jax.Array:
    return self.head(self.blocks(self.embed(letters)))


def digits_source() -> Source:
  """The training digits of examples/digits, each moved by up to a pixel."""
  from examples.digits.data import load_digits

  digits = load_digits()
  padded = np.pad(digits.train_images, ((0, 0), (1, 1), (1, 1), (0, 0)))

  def read(index, draw):
    down, right = draw[:, :1, None] % 3, draw[:, 1:2, None] % 3
    rows, columns = down + np.arange(8)[:, None], right + np.arange(8)
    images = padded[index[:, None, None], rows, columns]
    return {"inputs": images, "labels": digits.train_labels[index]}

  return Source(len(padded), read)


def text_source() -> Source:
  """The language reference that comes with Python's `help`, from a random letter on."""
  from pydoc_data.topics import topics

  text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
  letters = np.frombuffer(text, np.uint8).astype(np.int32)

  def read(index, draw):
    start = index * LENGTH + draw[:, 0] % LENGTH
    window = letters[start[:, None] + np.arange(LENGTH + 1)]
    return {"inputs": window[:, :-1], "labels": window[:, 1:]}

  return Source(len(letters) // LENGTH - 2, read)


def cross_entropy(model: nnx.Module, batch: dict[str, jax.Array]) -> jax.Array:
  logits = model(batch["inputs"])
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def digits_model(rngs: nnx.Rngs) -> nnx.Module:
  from examples.digits.model import CNN

  return CNN(rngs=rngs)


def divided(axes: tuple[str, ...]) -> nnx.Plan:
  """Large parameters are divided over `model`, if there is such an axis, else over `data`."""
  if "model" in axes:
    return nnx.plans.tensor_parallel("model")
  return nnx.plans.fsdp("data", min_size=1024)


TASKS = {
  # The network has BatchNorm and Dropout: its state and its random numbers are global, too.
  "digits": Task(
    digits_model,
    digits_source,
    cross_entropy,
    lambda _: nnx.plans.replicated,
    optax.sgd(0.05, momentum=0.9),
  ),
  "text": Task(CharNet, text_source, cross_entropy, divided, optax.adamw(1e-3, eps=1e-5)),
}
