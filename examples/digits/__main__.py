"""Train a small convolutional network to read handwritten digits, and draw how well it does."""

import argparse
import shutil
import sys
from pathlib import Path

from examples import command

GOAL = 0.98  # the test accuracy below which a run of at least EPOCHS counts as failed
EPOCHS = 25  # by default; a shorter run is a trial, and need not reach the goal


def main(argv: list[str] | None = None) -> int:
  options = parse_options(argv)
  history = []

  def last_words() -> str:
    reached = f", at a test accuracy of {history[-1].accuracy:.1%}" if history else ""
    return (
      f"Interrupted after {len(history)} of {options.epochs} epochs{reached}.\n"
      "No pictures: they are drawn at the end. --resume (make train RESUME=1) goes on."
    )

  command.end_at_ctrl_c(last_words)
  return run(options, history)


def run(options: argparse.Namespace, history: list) -> int:
  """Train, draw and print; `history` grows by one entry with each epoch."""
  # Importing JAX takes seconds: here, `--help` is there at once and Ctrl-C is heeded.
  from examples.digits import data, plot, train
  from examples.digits.model import CNN
  from refax import nnx

  options.out.mkdir(parents=True, exist_ok=True)  # fails before the training, not after it
  digits = data.load_digits()
  print(
    f"Training on {len(digits.train_labels)} digits, testing on {len(digits.test_labels)}.",
    flush=True,
  )

  model = CNN(rngs=nnx.Rngs(options.seed))
  print(nnx.tabulate(model, digits.train_images[: options.batch_size]), flush=True)
  page = options.out / "model.html"
  nnx.display(model, save=page)
  folder = options.out / "checkpoints"
  if not options.resume:
    shutil.rmtree(folder, ignore_errors=True)
  with nnx.Checkpointer(folder, keep=2) as checkpoints:
    epochs = train.fit(
      model,
      digits,
      epochs=options.epochs,
      batch_size=options.batch_size,
      lr=options.lr,
      seed=options.seed,
      checkpoints=checkpoints,
    )
    for epoch in epochs:
      history.append(epoch)

  learning_curve, misread = options.out / "learning_curve.png", options.out / "misread.png"
  plot.learning_curve(history, GOAL, learning_curve)
  plot.misread(digits, train.predict(model, digits.test_images), misread)
  print(f"Pictures: {learning_curve}, {misread}; the model before training: {page}")

  accuracy = history[-1].accuracy
  print(f"Test accuracy: {accuracy:.1%}", flush=True)
  if accuracy >= GOAL:
    return 0
  if options.epochs < EPOCHS:
    print(f"That is below the goal of {GOAL:.0%}, for which the default is {EPOCHS} epochs.")
    return 0
  print(f"That is below the goal of {GOAL:.0%}: train longer, see --help.", file=sys.stderr)
  return 1


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
  parser = command.parser("digits", __doc__)
  parser.add_argument(
    "--epochs", type=command.at_least(1), default=EPOCHS, help="passes over the training digits"
  )
  parser.add_argument(
    "--batch-size", type=command.at_least(1), default=64, help="digits in one step"
  )
  parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
  parser.add_argument(
    "--seed",
    type=command.at_least(0),
    default=0,
    help="of the weights, the dropout and the shuffling",
  )
  parser.add_argument(
    "--resume", action="store_true", help="go on after the last epoch that was saved"
  )
  parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
  return parser.parse_args(argv)


if __name__ == "__main__":
  sys.exit(main())
