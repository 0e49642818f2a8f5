"""Train a variational autoencoder on handwritten digits, and draw digits that nobody wrote."""

import argparse
import sys
from pathlib import Path
from typing import Any

from examples import command


def main(argv: list[str] | None = None) -> int:
  options = parse_options(argv)

  command.end_at_ctrl_c(lambda: "Interrupted: there are no pictures, they are drawn at the end.")
  run(options)
  return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
  """Train, draw and print; returns what the test looks at."""
  print("Loading JAX ...", flush=True)  # that takes seconds; `--help` does not wait for it
  import jax.numpy as jnp
  import numpy as np

  from examples.digits.data import load_digits
  from examples.vae import plot, train
  from examples.vae.model import LEVELS, PIXELS, VAE
  from refax import nnx

  options.out.mkdir(parents=True, exist_ok=True)  # fails before the training, not after it
  digits = load_digits()
  as_counts = lambda images: (images * LEVELS).reshape(-1, PIXELS)
  known, unseen = as_counts(digits.train_images), as_counts(digits.test_images)
  print(
    f"Training on {len(known)} digits, testing on {len(unseen)}. The first epoch compiles.",
    flush=True,
  )
  model = VAE(options.latent, options.hidden, rngs=nnx.Rngs(options.seed))
  history = fit(model, known, unseen, options)

  curve, pictures = options.out / "learning_curve.png", options.out / "samples.png"
  plot.learning_curve(history, curve)
  plot.samples(model, unseen, pictures)
  kl = float(np.mean(model.encode(jnp.asarray(unseen)).kl_to_standard()))
  tighter = float(train.weighted_bound(model, unseen, draws=options.draws).mean())
  print(f"Test digits: {history[-1].test:.1f} nats by the ELBO, of which {kl:.1f} for the code;")
  print(f"{tighter:.1f} by the bound of {options.draws} draws. Pictures: {pictures}, {curve}")
  return {"model": model, "unseen": unseen, "history": history, "tighter": tighter}


def fit(model: Any, known: Any, unseen: Any, options: argparse.Namespace) -> list:
  """Train under a progress bar; the epochs."""
  from tqdm import tqdm

  from examples.vae import train

  settings = {"batch_size": options.batch_size, "lr": options.lr}
  epochs = train.fit(model, known, unseen, epochs=options.epochs, **settings)
  refresh = command.seconds_between_bars()
  history = []
  with tqdm(epochs, total=options.epochs, unit="epoch", mininterval=refresh) as bar:
    for epoch in bar:
      history.append(epoch)
      bar.set_postfix_str(f"nats: training {epoch.train:.1f}, test {epoch.test:.1f}", refresh=False)
  return history


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
  parser = command.parser("vae", __doc__)
  parser.add_argument("--quick", action="store_true", help="a smaller model, trained for seconds")
  parser.add_argument("--latent", type=int, default=2, help="how many numbers a code has")
  parser.add_argument("--epochs", type=int, help="passes over the digits (120; quick: 15)")
  parser.add_argument("--hidden", type=int, help="size of the hidden layers (256; quick: 64)")
  parser.add_argument("--batch-size", type=int, default=64, help="digits in one step")
  parser.add_argument("--lr", type=float, default=2e-3, help="learning rate at the start")
  parser.add_argument("--draws", type=int, default=100, help="of codes, for the tighter bound")
  parser.add_argument("--seed", type=int, default=0, help="of weights, order and codes")
  parser.add_argument("--out", type=Path, default=Path("out/vae"), help="folder for the pictures")
  options = parser.parse_args(argv)
  command.choose_sizes(options, epochs=(15, 120), hidden=(64, 256))
  return options


if __name__ == "__main__":
  sys.exit(main())
