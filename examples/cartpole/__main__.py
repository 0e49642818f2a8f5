"""Teach agents to balance a pole, side by side in one compiled program, and test them elsewhere.

python -m examples.cartpole [--quick | --agents 5 --seed 1]
"""

import argparse
import sys
from pathlib import Path

from examples import command

GOAL = 475  # the mean return of the solved task
EACH = 500  # steps between two exams
PASSED = 499  # the mean return in an exam after which an agent needs no more training
SCHEDULE = 20_000  # steps in which exploration and learning rate fall


def main(argv: list[str] | None = None) -> int:
  options = parse_options(argv)
  progress = [0]

  command.end_at_ctrl_c(
    lambda: f"Interrupted after {progress[0]} of {options.steps} steps; nothing is saved."
  )
  return run(options, progress)


def run(options: argparse.Namespace, progress: list[int]) -> int:
  """Train, draw, and play in gymnasium; `progress` holds the number of steps that are done."""
  many = f"{options.agents} agents learn at once" if options.agents > 1 else "An agent learns"
  print(f"{many}, in {options.steps} steps at most.", flush=True)
  print("Loading JAX, making the agents, compiling (half a minute at most) ...", flush=True)
  import numpy as np  # JAX takes seconds: before this, `--help` is there and Ctrl-C is heeded

  from examples.cartpole import agent, evaluate, plot
  from refax import nnx

  options.out.mkdir(parents=True, exist_ok=True)  # fails before the training, not after it
  settings = agent.Settings(steps=min(options.steps, SCHEDULE))
  agents = agent.create(settings, options.agents, options.seed)
  playing, exams = fit(agents, options, progress)
  picture = options.out / "reward_curve.png"
  each = settings.environments * min(EACH, options.steps)
  plot.reward_curve(playing, exams, each, GOAL, picture)

  print(f"The best networks play {evaluate.EPISODES} episodes of gymnasium's CartPole-v1:")
  means = []
  for number in range(options.agents):
    found = evaluate.returns(agent.take(agents.best, number), seed=1000 * options.seed)
    means.append(found.mean())
    print(f"  agent {number}: mean return {means[-1]:.1f}, lowest {found.min():.0f}", flush=True)
  variables = len(nnx.to_flat_state(nnx.state(agents)))
  print(f"All of a run was in {variables} Variables. Picture: {picture}")
  print(f"Mean return of all agents: {np.mean(means):.1f}", flush=True)
  if min(means) < GOAL and not options.quick:
    print(f"One is below the goal of {GOAL}: train longer, see --help.", file=sys.stderr)
    return 1
  return 0


def fit(agents, options: argparse.Namespace, progress: list[int]):
  """Train until all agents have passed; returns while playing and in exams, `[parts, agents]`."""
  import numpy as np
  from tqdm import tqdm

  from examples.cartpole.agent import train_all

  playing, exams, each = [], [], min(EACH, options.steps)
  refresh = command.seconds_between_bars()
  with tqdm(total=options.steps, unit="step", mininterval=refresh) as bar:
    while progress[0] < options.steps and not (agents.best_return[...] >= PASSED).all():
      lengths, scores = map(np.asarray, train_all(agents, each))
      ended = (lengths > 0).sum((1, 2))
      playing.append(np.where(ended > 0, lengths.sum((1, 2)) / np.maximum(ended, 1), np.nan))
      exams.append(scores)
      progress[0] += each
      bar.set_postfix_str("exams " + " ".join(f"{score:.0f}" for score in scores), refresh=False)
      bar.update(each)
  return np.stack(playing), np.stack(exams)


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
  parser = command.parser("cartpole", __doc__)
  parser.add_argument("--steps", type=int, default=60_000, help=f"at most; parts of {EACH}")
  parser.add_argument("--agents", type=int, default=3, help="how many learn at once")
  parser.add_argument("--seed", type=int, default=0, help="of everything that is random")
  parser.add_argument("--quick", action="store_true", help="one agent, 3000 steps at most, no goal")
  parser.add_argument("--out", type=Path, default=Path("out/cartpole"), help="for the picture")
  options = parser.parse_args(argv)
  if options.quick:
    options.steps, options.agents = 3000, 1
  if min(options.steps, options.agents) < 1:
    parser.error("--steps and --agents are at least 1")
  return options


if __name__ == "__main__":
  sys.exit(main())
