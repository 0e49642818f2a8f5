"""The training loop: one step is a plain `jax.jit` that updates model and optimizer in place."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import optax
from tqdm import tqdm

from examples import command
from examples.digits.data import Digits, batches
from examples.digits.model import CNN
from refax import nnx


class Epoch(NamedTuple):
  """One pass over the training digits."""

  loss: float  # mean over the steps
  accuracy: float  # on the test digits, at the end


@jax.jit
def train_step(model, optimizer, images, labels):
  """Weights, BatchNorm's statistics, Dropout's keys and the optimizer's moments change in place."""

  def loss_fn(model):
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  loss, grads = nnx.value_and_grad(loss_fn)(model)
  optimizer.update(model, grads)
  return loss


@jax.jit
def predict(model, images):
  """The probability of each of the ten digits: `[batch, 10]`."""
  return jax.nn.softmax(model(images))


class Shuffling:
  """The random generator of the batches; its state is saved, so that a resumed run goes on."""

  def __init__(self, seed: int):
    self.rng = np.random.default_rng(seed)

  def get_state(self) -> dict:
    return self.rng.bit_generator.state

  def set_state(self, state: dict) -> None:
    self.rng.bit_generator.state = state


def fit(
  model: CNN,
  digits: Digits,
  *,
  epochs: int,
  batch_size: int,
  lr: float,
  seed: int,
  checkpoints: nnx.Checkpointer,
) -> Iterator[Epoch]:
  """Train `model`, and say after each epoch how it went. The model is left in `eval` mode.

  Each epoch is saved. Where checkpoints are there, training goes on after the last one, bit for bit
  as if it had not been interrupted; the epochs before it are told again.
  """
  steps = len(digits.train_labels) // batch_size
  if not steps:
    raise SystemExit(
      f"--batch-size {batch_size} is more than the {len(digits.train_labels)} training digits"
    )
  schedule = optax.cosine_decay_schedule(lr, epochs * steps)
  optimizer = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)
  shuffling = Shuffling(seed)
  training = {"model": model, "optimizer": optimizer, "shuffling": shuffling}
  settings = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
  history = resume(checkpoints, training, settings)
  yield from history

  refresh = command.seconds_between_bars()
  done = len(history) * steps
  with tqdm(total=epochs * steps, initial=done, unit="step", mininterval=refresh) as bar:
    reading = f"{history[-1].accuracy:.1%}" if history else "?"
    for epoch in range(len(history), epochs):
      losses = []
      model.train()
      for images, labels in batches(
        digits.train_images, digits.train_labels, batch_size, shuffling.rng
      ):
        losses.append(float(train_step(model, optimizer, images, labels)))
        bar.set_postfix_str(f"loss {losses[-1]:.3f}, test accuracy {reading}", refresh=False)
        bar.update()

      model.eval()
      accuracy = accuracy_of(model, digits)
      reading = f"{accuracy:.1%}"
      history.append(Epoch(float(np.mean(losses)), accuracy))
      notes = {"settings": settings, "history": [tuple(epoch) for epoch in history]}
      checkpoints.save(epoch + 1, training, user=notes)
      yield history[-1]


def resume(checkpoints: nnx.Checkpointer, training: dict, settings: dict) -> list[Epoch]:
  """Restore the last checkpoint, if there is one; the epochs so far."""
  if not checkpoints.steps:
    return []
  restored = checkpoints.restore(training)
  if restored.user["settings"] != settings:
    raise SystemExit(
      f"the run in {checkpoints.folder} had other settings: {restored.user['settings']}\n"
      "  resume with these, or start afresh without --resume"
    )
  training["model"].eval()
  return [Epoch(*epoch) for epoch in restored.user["history"]]


def accuracy_of(model: CNN, digits: Digits) -> float:
  """The share of the test digits that the model reads right."""
  return float(np.mean(predict(model, digits.test_images).argmax(-1) == digits.test_labels))
