"""Train a small transformer on the pages of Python's `help()`, and let it write like them."""

import argparse
import sys
from pathlib import Path
from typing import Any

from examples import command


def main(argv: list[str] | None = None) -> int:
  options = parse_options(argv)
  saved: list[Path] = []

  where = lambda: f"the weights are in {saved[-1]}" if saved else "nothing was saved"
  command.end_at_ctrl_c(lambda: f"Interrupted: {where()}.")
  run(options, saved)
  return 0


def run(options: argparse.Namespace, saved: list[Path]) -> dict[str, Any]:
  """Train or load a model, and print what it writes; returns what the test looks at.

  The file of the weights joins `saved` when it is there.
  """
  print("Loading JAX ...", flush=True)  # that takes seconds; `--help` does not wait for it
  from examples.chars import text
  from examples.chars.model import CharModel
  from examples.chars.sample import Writer
  from refax import nnx

  options.out.mkdir(parents=True, exist_ok=True)  # fails before the training, not after it
  weights = options.out / "model.safetensors"
  corpus = text.load(seed=options.seed)
  model = CharModel(options.features, options.blocks, rngs=nnx.Rngs(options.seed))
  history = []
  if options.write:
    nnx.load_safetensors(model, weights)
  else:
    history = fit(model, corpus, options)
    nnx.save_safetensors(model, weights)
  saved.append(weights)

  writer = Writer(model, temperature=options.temperature, seed=options.seed)
  pieces = [options.prompt]
  print(f"\n{options.prompt}", end="", flush=True)
  for piece in writer.write(options.prompt, options.count):
    pieces.append(piece)
    print(piece, end="", flush=True)
  print(f"\n\n{options.count} characters, {writer.speed:.0f} a second.", flush=True)
  return {"model": model, "corpus": corpus, "history": history, "text": "".join(pieces)}


def fit(model: Any, corpus: Any, options: argparse.Namespace) -> list:
  """Train under a progress bar, and draw how that went."""
  from tqdm import tqdm

  from examples.chars import plot, train

  print(
    f"Training on {len(corpus.train):,} characters, {len(corpus.held_out):,} are held out. "
    "The first step compiles.",
    flush=True,
  )
  settings = {"batch_size": options.batch_size, "lr": options.lr, "seed": options.seed}
  steps = train.fit(model, corpus, steps=options.steps, **settings)
  refresh = command.seconds_between_bars()
  history, held_out = [], float("nan")
  with tqdm(steps, total=options.steps, unit="step", mininterval=refresh) as bar:
    for now in bar:
      history.append(now)
      held_out = held_out if now.held_out is None else now.held_out
      bar.set_postfix_str(f"bits: training {now.train:.2f}, held out {held_out:.2f}", refresh=False)
  picture = options.out / "learning_curve.png"
  plot.learning_curve(history, train.bits_of_counts(corpus), picture)
  print(f"Held-out text takes {held_out:.2f} bits for each character. Picture: {picture}")
  return history


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
  parser = command.parser("chars", __doc__)
  parser.add_argument("--quick", action="store_true", help="a smaller model, trained for seconds")
  parser.add_argument("--write", action="store_true", help="no training: the weights are in --out")
  parser.add_argument("--prompt", default="The ", help="how the text begins")
  parser.add_argument("--count", type=int, default=600, help="how many characters to write")
  parser.add_argument("--temperature", type=float, default=0.7, help="lower is more sober")
  parser.add_argument("--steps", type=int, help="how many batches (1500; quick: 60)")
  parser.add_argument("--features", type=int, help="size of the model (96; quick: 64)")
  parser.add_argument("--blocks", type=int, help="depth of the model (3; quick: 2)")
  parser.add_argument("--batch-size", type=int, default=8, help="rows of text in one step")
  parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate")
  parser.add_argument("--seed", type=int, default=0, help="of the weights and of what is drawn")
  parser.add_argument("--out", type=Path, default=Path("out/chars"), help="folder for the files")
  options = parser.parse_args(argv)
  if not options.prompt:
    parser.error("--prompt needs at least one character")
  command.choose_sizes(options, steps=(60, 1500), features=(64, 96), blocks=(2, 3))
  return options


if __name__ == "__main__":
  sys.exit(main())
