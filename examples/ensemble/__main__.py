"""Train many networks at once on points with a gap, and draw where they disagree."""

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
  """Train the ensemble, draw and print; returns what the test looks at."""
  print("Loading JAX ...", flush=True)  # that takes seconds; `--help` does not wait for it
  import numpy as np

  from examples.ensemble import data, plot, train

  options.out.mkdir(parents=True, exist_ok=True)  # fails before the training, not after it
  points = data.make(options.points, seed=options.seed)
  keys = train.member_keys(options.members, seed=options.seed)
  print(f"Making {options.members} networks under one vmap ...", flush=True)
  ensemble = train.create(keys, hidden=options.hidden, lr=options.lr)
  losses, together = fit(ensemble, points, options)

  x = np.linspace(data.LEFT - 0.5, data.RIGHT + 0.5, 281, dtype=np.float32)
  said = train.ask(ensemble, x[:, None])
  picture = options.out / "uncertainty.png"
  plot.uncertainty(points, x, said, picture)
  _, disagreement, noise = train.combine(said)
  gap, known = data.is_in_gap(x), (x > data.LEFT) & (x < data.RIGHT) & ~data.is_in_gap(x, -0.1)
  print(f"The members disagree by {disagreement[gap].mean():.3f} in the gap on average,")
  print(f"and by {disagreement[known].mean():.3f} where there are points.")
  print(f"They expect a noise of {noise:.3f}; the points have {data.NOISE}.")

  alone = train.create(keys[:1], hidden=options.hidden, lr=options.lr)
  _, one = fit(alone, points, argparse.Namespace(**vars(options) | {"members": 1}))
  print(f"A step takes {together * 1e3:.2f} ms for {options.members} members, {one * 1e3:.2f} ms")
  print(f"for one. Picture: {picture}", flush=True)
  return {"losses": losses, "x": x, "disagreement": disagreement, "noise": noise, "known": known}


def fit(ensemble: Any, points: Any, options: argparse.Namespace) -> tuple[Any, float]:
  """Train under a progress bar; the losses `[steps, members]`, and the seconds that a step took."""
  import numpy as np
  from tqdm import tqdm

  from examples.ensemble import train

  settings = {"batch_size": options.batch_size, "members": options.members}
  steps = train.fit(ensemble, points, steps=options.steps, **settings)
  refresh = command.seconds_between_bars()
  losses, times = [], []
  name = "1 member" if options.members == 1 else f"{options.members} members"
  with tqdm(steps, name, total=options.steps, unit="step", mininterval=refresh) as bar:
    for loss in bar:
      losses.append(loss)
      times.append(time.perf_counter())
      bar.set_postfix_str(f"loss {loss.mean():.2f}", refresh=False)
  return np.stack(losses), float(np.median(np.diff(times)))


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
  parser = command.parser("ensemble", __doc__)
  parser.add_argument("--quick", action="store_true", help="fewer and smaller networks")
  parser.add_argument("--members", type=int, help="how many networks (16; quick: 6)")
  parser.add_argument("--steps", type=int, help="how many batches for each (2000; quick: 600)")
  parser.add_argument("--hidden", type=int, help="size of the hidden layers (64; quick: 32)")
  parser.add_argument("--points", type=int, default=160, help="how many points to learn from")
  parser.add_argument("--batch-size", type=int, default=32, help="points in one step")
  parser.add_argument("--lr", type=float, default=3e-3, help="learning rate")
  parser.add_argument("--seed", type=int, default=0, help="of the points and of the networks")
  parser.add_argument("--out", type=Path, default=Path("out/ensemble"), help="for the picture")
  options = parser.parse_args(argv)
  command.choose_sizes(options, members=(6, 16), steps=(600, 2000), hidden=(32, 64))
  return options


if __name__ == "__main__":
  sys.exit(main())
