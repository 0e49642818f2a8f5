"""A whole training loop in one file: progress bar, evaluation, early stop, checkpoints, resume.

python -m examples.loop [--resume]
"""

import argparse
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
from tqdm import trange

from examples.digits.data import batches, load_digits
from examples.digits.model import CNN
from examples.digits.train import Shuffling
from refax import nnx

EPOCHS, PATIENCE, BATCH = 40, 5, 64


@nnx.jit
def train_step(model, optimizer, metrics, images, labels):
  def loss_fn(model):
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

  (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
  optimizer.update(model, grads)
  metrics.update(loss=loss, logits=logits, labels=labels)


@nnx.jit
def eval_step(model, metrics, images, labels):
  logits = model(images)
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
  metrics.update(loss=loss, logits=logits, labels=labels)


def new_metrics():
  return nnx.metrics.MultiMetric(loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy())


def run(folder: Path, *, epochs: int = EPOCHS, patience: int = PATIENCE) -> float:
  """Train until the test loss has not fallen for some epochs; the best accuracy."""
  digits = load_digits()
  model = CNN(rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
  training = {"model": model, "optimizer": optimizer, "shuffling": Shuffling(0)}
  metrics = {"train": new_metrics(), "test": new_metrics()}
  best, waited, start = float("inf"), 0, 0

  with nnx.Checkpointer(folder, keep=1, keep_best=1, best="loss") as checkpoints:
    if checkpoints.steps:
      restored = checkpoints.restore(training)
      start, best, waited = restored.step, restored.user["best"], restored.user["waited"]
    with trange(start, epochs, initial=start, total=epochs, unit="epoch") as progress:
      for epoch in progress:
        model.train()
        rng = training["shuffling"].rng
        for batch in batches(digits.train_images, digits.train_labels, BATCH, rng):
          train_step(model, optimizer, metrics["train"], *batch)
        model.eval()
        eval_step(model, metrics["test"], digits.test_images, digits.test_labels)

        now = {name: jax.tree.map(float, metric.compute()) for name, metric in metrics.items()}
        for metric in metrics.values():
          metric.reset()
        loss = now["test"]["loss"]
        waited = 0 if loss < best else waited + 1
        best = min(best, loss)
        progress.set_postfix(loss=f"{loss:.3f}", accuracy=f"{now['test']['accuracy']:.1%}")
        user = {"best": best, "waited": waited}
        checkpoints.save(epoch + 1, training, metrics=now["test"], user=user)
        if waited >= patience:
          break
    checkpoints.wait()
    found = [checkpoints.restore(training, step=step).metrics for step in checkpoints.steps]
    return float(np.max([metric["accuracy"] for metric in found]))


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--resume", action="store_true", help="go on after the last epoch")
  options = parser.parse_args()
  out = Path("out/loop")
  if not options.resume:
    shutil.rmtree(out, ignore_errors=True)
  print(f"test accuracy {run(out):.1%}")
