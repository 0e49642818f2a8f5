"""Find a wave and the viscosity of its medium from noisy measurements and an equation.

python -m examples.pinn [--quick | --measurements 100 --noise 0.1]
"""

import argparse
import sys
from pathlib import Path

from examples import command

EACH = 250  # steps of one compiled call


def main(argv: list[str] | None = None) -> int:
  options = parse_options(argv)
  progress = [0]

  done = lambda: f"{progress[0]} of {2 * options.steps} steps"
  command.end_at_ctrl_c(lambda: f"Interrupted after {done()}; no picture is drawn.")
  return run(options, progress)


def run(options: argparse.Namespace, progress: list[int]) -> int:
  """Train with the equation and without, compare and draw."""
  data = f"{options.measurements} measurements of a wave, with noise of {options.noise}"
  print(f"A network sees {data}.\nLoading JAX, compiling ...", flush=True)
  import numpy as np  # JAX takes seconds: before this, `--help` is there and Ctrl-C is heeded

  from examples.pinn import burgers, model, plot

  options.out.mkdir(parents=True, exist_ok=True)  # fails before the training, not after it
  measured = burgers.measure(options.measurements, options.noise, options.seed)
  found, viscosities = fit(measured, options, progress, options.equation)
  without, _ = fit(measured, options, progress, 0.0)

  want = burgers.solution(*plot.grid())
  picture, true = options.out / "wave.png", burgers.VISCOSITY
  plot.draw(want, found, without, measured, viscosities, true, picture)
  error = lambda got: np.linalg.norm(got - want) / np.linalg.norm(want)
  print(f"Viscosity: found {viscosities[-1]:.4f}, first guess {model.FIRST_GUESS}, true {true}")
  print(f"Error of the wave: {error(found):.1%}; of a network without the equation: ", end="")
  print(f"{error(without):.1%}\nPicture: {picture}", flush=True)
  return 0


def fit(measured, options: argparse.Namespace, progress: list[int], equation: float):
  """Train one network; its values on the grid, and its viscosity after each step."""
  import jax
  import numpy as np
  from tqdm import tqdm

  from examples.pinn import plot
  from examples.pinn.train import Training, train
  from refax import nnx

  rngs = nnx.Rngs(options.seed)
  training = Training(options.steps, points=options.points, equation=equation, rngs=rngs)
  viscosities, name = [], "with the equation" if equation else "without it"
  refresh = command.seconds_between_bars()
  with tqdm(total=options.steps, unit="step", desc=name, mininterval=refresh) as bar:
    for _ in range(options.steps // EACH):
      viscosity, far = map(np.asarray, train(training, measured, EACH))
      viscosities.append(viscosity)
      progress[0] += EACH
      if equation:
        bar.set_postfix_str(f"viscosity {viscosity[-1]:.4f}, residual {far[-1]:.1e}", refresh=False)
      bar.update(EACH)
  x, t = plot.grid()
  values = jax.jit(lambda model: model(x.astype(np.float32), t.astype(np.float32)))(training.model)
  return np.asarray(values), np.concatenate(viscosities)


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
  parser = command.parser("pinn", __doc__)
  parser.add_argument("--steps", type=int, default=5000, help=f"of each network; parts of {EACH}")
  parser.add_argument("--measurements", type=int, default=200, help="how many there are")
  parser.add_argument("--noise", type=float, default=0.05, help="its standard deviation")
  parser.add_argument("--points", type=int, default=1024, help="where the equation is checked")
  parser.add_argument("--equation", type=float, default=0.02, help="its weight in the loss")
  parser.add_argument("--seed", type=int, default=0, help="of measurements, network and points")
  parser.add_argument("--quick", action="store_true", help="2500 steps, 256 points, 100 data")
  parser.add_argument("--out", type=Path, default=Path("out/pinn"), help="for the picture")
  options = parser.parse_args(argv)
  if options.quick:
    options.steps, options.points, options.measurements = 2500, 256, 100
  if options.steps < EACH or min(options.measurements, options.points) < 1:
    parser.error(f"--steps is at least {EACH}, --measurements and --points are at least 1")
  return options


if __name__ == "__main__":
  sys.exit(main())
