"""The autoencoder: its bound grows and is one, and its random keys are never used twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.vae import train
from examples.vae.__main__ import parse_options, run
from examples.vae.model import LEVELS, PIXELS, VAE, Normal
from refax import nnx

for package in ("matplotlib", "sklearn", "tqdm"):
  pytest.importorskip(package, reason=f"the example needs {package}: make test installs it")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
  out = tmp_path_factory.mktemp("vae")
  return run(parse_options(["--quick", "--out", str(out)])) | {"out": out}


def test_the_bound_grows_and_a_tighter_one_lies_above_it(ran):
  history = ran["history"]
  assert history[-1].test > history[0].test + 30
  assert history[-1].test < ran["tighter"] < history[-1].test + 60
  for name in ("samples.png", "learning_curve.png"):
    assert (ran["out"] / name).read_bytes().startswith(b"\x89PNG")


def test_the_divergence_in_closed_form_is_that_of_many_draws():
  mean = jnp.array([[0.5, -1.0, 0.0], [2.0, 0.1, -0.3]])
  posterior = Normal(mean, jnp.array([[0.3, 1.0, 2.0], [0.7, 0.2, 1.1]]))
  noise = jax.random.normal(jax.random.key(0), (200_000, *mean.shape))
  codes = posterior.mean + posterior.deviation * noise
  standard = Normal(jnp.zeros(3), jnp.ones(3))
  drawn = (posterior.log_density(codes) - standard.log_density(codes)).mean(0)
  np.testing.assert_allclose(posterior.kl_to_standard(), drawn, rtol=0.02)
  np.testing.assert_allclose(standard.kl_to_standard(), 0.0, atol=1e-6)


def test_the_probabilities_of_all_counts_of_a_pixel_add_up_to_one():
  logits = jnp.full((LEVELS + 1, 1), 0.7)
  each = train.log_likelihood(logits, jnp.arange(LEVELS + 1.0)[:, None])
  np.testing.assert_allclose(jnp.exp(each).sum(), 1.0, rtol=1e-5)


def codes_of_scan(model, counts, turns):
  draw = jax.jit(
    lambda model, counts: jax.lax.scan(
      lambda _, __: (None, model(counts).code), None, None, length=turns
    )[1]
  )
  return np.asarray(draw(model, counts))


def test_every_turn_of_a_scan_draws_codes_of_its_own_and_the_stream_goes_on():
  counts = jnp.zeros((3, PIXELS))
  model, twin = (VAE(2, 8, rngs=nnx.Rngs(5)) for _ in range(2))
  scanned = codes_of_scan(model, counts, 4)
  assert len(np.unique(scanned)) == scanned.size
  np.testing.assert_allclose(scanned, [twin(counts).code for _ in range(4)], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(model(counts).code, twin(counts).code, rtol=1e-4, atol=1e-5)


def test_an_epoch_in_one_scan_is_its_steps_one_by_one(ran):
  import optax

  batches = jnp.asarray(ran["unseen"][:48].reshape(3, 16, PIXELS))
  pairs = []
  for _ in range(2):
    model = VAE(2, 8, rngs=nnx.Rngs(1))
    pairs.append((model, nnx.Optimizer(model, optax.sgd(1e-4), wrt=nnx.Param)))
  whole = train.train_epoch(*pairs[0], batches)
  steps = [train.train_epoch(*pairs[1], batches[i : i + 1]) for i in range(3)]
  np.testing.assert_allclose(whole, np.mean(steps), rtol=1e-5)
  kernels = [model.encoder.first.kernel[...] for model, _ in pairs]
  np.testing.assert_allclose(*kernels, rtol=1e-5, atol=1e-6)
