"""Learn to turn noise into handwritten digits, and draw some of each."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from examples import command


def main(argv: list[str] | None = None) -> int:
  options = parse_options(argv)

  command.end_at_ctrl_c(lambda: "Interrupted: there is no picture, it is drawn at the end.")
  run(options)
  return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
  """Train, draw and print; returns what the test looks at."""
  print("Loading JAX ...", flush=True)  # that takes seconds; `--help` does not wait for it
  import numpy as np

  from examples.diffusion import plot, sample, train
  from examples.diffusion.judge import Judge
  from examples.diffusion.model import Velocity
  from examples.digits.data import load_digits
  from refax import nnx

  options.out.mkdir(parents=True, exist_ok=True)  # fails before the training, not after it
  digits = load_digits()
  known = train.as_data(digits.train_images, digits.train_labels)
  unseen = train.as_data(digits.test_images, digits.test_labels)
  sizes = options.hidden, options.blocks, options.dropout
  model = Velocity(*sizes, rngs=nnx.Rngs(options.seed))
  ema = nnx.EMA(model, decay=options.decay, only=nnx.Param)
  history = fit(model, ema, known, unseen, options)

  labels = plot.labels()
  start = time.perf_counter()
  path = sample.draw(model, ema, labels, steps=options.turns, guidance=options.guidance)
  seconds = time.perf_counter() - start
  picture = options.out / "samples.png"
  plot.samples(path, picture)
  print(f"{len(labels)} digits drawn in {seconds:.1f} s, compilation included: {picture}")

  judge = Judge(*map(np.asarray, known))
  many = np.tile(np.arange(10), 50)
  drawn = sample.draw(model, ema, many, steps=options.turns, guidance=options.guidance)[-1]
  read, real = judge.agreement(drawn, many), judge.agreement(*map(np.asarray, unseen))
  print(f"A support vector machine reads {read:.1%} of {len(many)} as what they should be,")
  print(f"and {real:.1%} of digits that people wrote. To the nearest digit trained on, these")
  near, far = judge.nearest(drawn), judge.nearest(np.asarray(unseen.images))
  print(f"have a distance of {far:.2f}, those that were drawn {near:.2f} (a copy: 0).", flush=True)
  return {"model": model, "ema": ema, "history": history, "read": read, "near": near, "far": far}


def fit(model: Any, ema: Any, known: Any, unseen: Any, options: argparse.Namespace) -> list:
  """Train under a progress bar; how it went."""
  from tqdm import tqdm

  from examples.diffusion import train

  print(
    f"Training on {len(known.labels)} digits, testing on {len(unseen.labels)}. "
    "The first step compiles.",
    flush=True,
  )
  settings = {"batch_size": options.batch_size, "lr": options.lr}
  steps = train.fit(model, ema, known, unseen, steps=options.steps, **settings)
  refresh = command.seconds_between_bars()
  history, test = [], "?"
  with tqdm(steps, total=options.steps, unit="step", mininterval=refresh) as bar:
    for now in bar:
      history.append(now)
      test = test if now.test is None else f"{now.test:.3f}"
      bar.set_postfix_str(f"error: training {now.train:.3f}, test {test}", refresh=False)
  return history


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
  parser = command.parser("diffusion", __doc__)
  parser.add_argument("--quick", action="store_true", help="a smaller model, trained for seconds")
  parser.add_argument("--steps", type=int, help="how many batches (4000; quick: 800)")
  parser.add_argument("--hidden", type=int, help="width of the network (256; quick: 96)")
  parser.add_argument("--blocks", type=int, help="depth of the network (4; quick: 2)")
  parser.add_argument("--decay", type=float, help="of the average (0.999; quick: 0.98)")
  parser.add_argument("--dropout", type=float, default=0.1, help="against copies of digits")
  parser.add_argument("--turns", type=int, default=30, help="from the noise to a digit")
  parser.add_argument("--guidance", type=float, default=1.5, help="more: clearer, less diverse")
  parser.add_argument("--batch-size", type=int, default=128, help="digits in one step")
  parser.add_argument("--lr", type=float, help="peak learning rate (0.001; quick: 0.004)")
  parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise")
  parser.add_argument("--out", type=Path, default=Path("out/diffusion"), help="for the picture")
  options = parser.parse_args(argv)
  defaults = {
    "steps": (800, 4000),
    "hidden": (96, 256),
    "blocks": (2, 4),
    "decay": (0.98, 0.999),
    "lr": (4e-3, 1e-3),
  }
  for name, (small, full) in defaults.items():
    if getattr(options, name) is None:
      setattr(options, name, small if options.quick else full)
  return options


if __name__ == "__main__":
  sys.exit(main())
