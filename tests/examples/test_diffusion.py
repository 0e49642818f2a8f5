"""The digits out of noise: it learns, its average is one, and its sampler follows the flow."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.diffusion import sample, train
from examples.diffusion.__main__ import parse_options, run
from examples.diffusion.model import ANY, PIXELS, Velocity
from refax import nnx

for package in ("matplotlib", "sklearn", "tqdm"):
  pytest.importorskip(package, reason=f"the example needs {package}: make test installs it")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
  out = tmp_path_factory.mktemp("diffusion")
  return run(parse_options(["--quick", "--out", str(out)])) | {"out": out}


def test_it_learns_digits_that_a_reader_recognizes_and_that_are_no_copies(ran):
  measured = [now.test for now in ran["history"] if now.test is not None]
  assert measured[-1] < 0.8 * measured[0]
  assert ran["read"] > 0.5  # by chance it would be a tenth
  assert ran["near"] > 0.5 * ran["far"] > 0
  assert (ran["out"] / "samples.png").read_bytes().startswith(b"\x89PNG")


class OneDigit(nnx.Module):
  """The exact velocity where each label has a single digit: straight to it."""

  def __init__(self, digits):
    self.digits = nnx.Variable(digits)
    self.rngs = nnx.Rngs(0)

  def __call__(self, x, time, label):
    left = jnp.maximum(1 - time, 1e-6)[:, None]
    return (self.digits[...][label] - x) / left


def test_the_sampler_ends_at_the_digit_to_which_the_exact_velocity_leads():
  digits = jax.random.normal(jax.random.key(0), (ANY + 1, PIXELS))
  labels = jnp.array([3, 0, 7])
  times = jnp.linspace(0.0, 0.99, 12)  # at 1 the velocity is no longer defined
  path = sample.sample(OneDigit(digits), labels, times, 1.0)
  want = path[0] + times[:, None, None] * (digits[labels] - path[0])  # a straight line
  np.testing.assert_allclose(path, want, atol=1e-4)


def test_guidance_of_one_ignores_and_of_zero_keeps_what_suits_every_digit():
  model = Velocity(16, 1, 0.0, rngs=nnx.Rngs(0))
  for kernel in (model.blocks[0].modulate.kernel, model.last.kernel):
    kernel[...] = jax.random.normal(jax.random.key(1), kernel.shape)
  x, time, labels = jnp.ones((2, PIXELS)), jnp.array(0.3), jnp.array([1, 2])
  alone = lambda label: model(x, jnp.full(2, 0.3), label)
  for guidance, label in ((1.0, labels), (0.0, jnp.array([ANY, ANY]))):
    got = sample.guided(model, x, time, labels, guidance)
    np.testing.assert_allclose(got, alone(label), rtol=1e-4, atol=1e-5)
  assert not np.allclose(alone(labels), alone(jnp.array([ANY, ANY])))


def test_the_average_is_that_of_the_weights_of_all_steps():
  images = np.random.default_rng(0).random((20, 8, 8, 1), np.float32)
  data = train.as_data(images, np.arange(20, dtype=np.int32) % 10)
  model = Velocity(16, 1, 0.1, rngs=nnx.Rngs(0))
  ema = nnx.EMA(model, decay=0.5, only=nnx.Param)
  optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
  want = np.asarray(model.last.kernel[...])
  for _ in range(4):
    train.train_step(model, optimizer, ema, data, batch_size=8)
    want = 0.5 * want + 0.5 * np.asarray(model.last.kernel[...])
  np.testing.assert_allclose(ema.params["last"]["kernel"][...], want, rtol=1e-5, atol=1e-6)


def test_drawing_uses_the_average_and_leaves_the_weights_as_they_are(ran):
  model, ema = ran["model"], ran["ema"]
  weights = lambda: [np.asarray(v[...]) for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param))]
  before = weights()
  first, second = (sample.draw(model, ema, [1, 2], steps=3) for _ in range(2))
  for a, b in zip(before, weights(), strict=True):
    np.testing.assert_array_equal(a, b)
  assert not np.isclose(first[0], second[0]).any()  # the stream went on: new noise
  times, x = jnp.linspace(0.0, 1.0, 4), jnp.asarray(first[0])
  averaged = ema.apply_to(model)
  for start, end in itertools.pairwise(times):  # the same, without a scan
    velocity = sample.guided(averaged, x, start, jnp.array([1, 2]), 1.5)
    ahead = sample.guided(averaged, x + (end - start) * velocity, end, jnp.array([1, 2]), 1.5)
    x = x + (end - start) * (velocity + ahead) / 2
  np.testing.assert_allclose(first[-1], x, rtol=1e-3, atol=1e-3)
