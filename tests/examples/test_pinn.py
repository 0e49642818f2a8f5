"""The example of Burgers' equation: two references agree, and the equation is what is learned."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.pinn import __main__ as program
from examples.pinn import burgers
from examples.pinn.model import Wave, derivatives, residual
from examples.pinn.train import Training, train
from refax import nnx

ROOT = Path(__file__).parents[2]


@pytest.fixture
def own_handler():
  """The program takes over Ctrl-C: pytest has it back afterwards."""
  before = signal.getsignal(signal.SIGINT)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("time_of_wave", [0.1, 0.3, 0.6])
def test_the_closed_form_is_what_finite_differences_find(time_of_wave):
  cells = 400
  x = -1 + 2 / cells * np.arange(cells)
  found = burgers.finite_differences(time_of_wave, cells=cells)
  np.testing.assert_allclose(found, burgers.solution(x, time_of_wave), atol=1e-3)


def test_the_closed_form_starts_as_a_sine():
  x = np.linspace(-1, 1, 50)
  np.testing.assert_allclose(burgers.solution(x, 0.0), -np.sin(np.pi * x), atol=1e-12)


class Front(nnx.Module):
  """A front that travels at half its height: an exact solution of Burgers' equation."""

  def __init__(self, viscosity):
    self.viscosity = nnx.Param(jnp.float32(viscosity))

  def __call__(self, x, t):
    return 0.5 - 0.5 * jnp.tanh((x - 0.5 * t) / (4 * self.viscosity))


def test_an_exact_solution_has_no_residual_and_another_viscosity_has():
  x, t = jnp.linspace(-1, 1, 40), jnp.linspace(0, 1, 40)
  front = Front(0.1)
  np.testing.assert_allclose(residual(front, x, t), 0, atol=1e-5)
  wrong = lambda front: type("Wrong", (), {"viscosity": 0.2, "__call__": lambda _, *a: front(*a)})()
  assert np.abs(residual(wrong(front), x, t)).max() > 0.1


def test_derivatives_by_the_input_are_those_of_the_functional_form_differentiated_backward():
  model = Wave(width=8, rngs=nnx.Rngs(0))
  x, t = jnp.linspace(-1, 1, 7), jnp.linspace(0, 1, 7)
  pure = nnx.to_lojax(model)
  u = lambda x, t: pure(x[None], t[None])[0]
  wanted = u, jax.grad(u), jax.grad(jax.grad(u)), jax.grad(u, argnums=1)
  for got, want in zip(derivatives(model, x, t), wanted, strict=True):
    np.testing.assert_allclose(got, jax.vmap(want)(x, t), rtol=1e-4, atol=1e-5)


def test_the_gradient_through_these_derivatives_is_the_one_of_central_differences():
  model = Wave(width=8, rngs=nnx.Rngs(0))
  x, t = jnp.linspace(-1, 1, 16), jnp.linspace(0, 1, 16)
  loss = jax.jit(lambda model: (residual(model, x, t) ** 2).mean())
  grads = nnx.grad(lambda model: (residual(model, x, t) ** 2).mean())(model)
  for variable, gradient in (
    (model.layers[1].kernel, grads["layers"][1]["kernel"][...]),
    (model.log_viscosity, grads["log_viscosity"][...]),
  ):
    direction = jnp.sign(gradient)
    value, small = variable[...], 1e-2
    variable[...] = value + small * direction
    above = loss(model)
    variable[...] = value - small * direction
    below = loss(model)
    variable[...] = value
    want = float(above - below) / (2 * small)
    assert float(jnp.sum(gradient * direction)) == pytest.approx(want, rel=2e-2, abs=1e-4)


def test_points_stay_where_the_equation_does_not_hold_and_all_is_one_compiled_call():
  measured = burgers.measure(50, 0.05, 0)
  training = Training(100, points=64, rngs=nnx.Rngs(0))
  x, t = training.x[...], training.t[...]
  far = residual(training.model, x, t) ** 2
  viscosities, _ = train(training, measured, 1)
  stayed = np.asarray(training.x == x)
  np.testing.assert_array_equal(stayed, np.asarray(far > far.mean()))
  assert 0 < stayed.sum() < 64 and viscosities.shape == (1,)


def test_many_steps_in_one_call_are_steps_one_by_one():
  measured = burgers.measure(50, 0.05, 0)
  at_once = Training(100, points=32, rngs=nnx.Rngs(0))
  singly = nnx.clone(at_once)
  want, _ = train(at_once, measured, 6)
  got = [train(singly, measured, 1)[0][0] for _ in range(6)]
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(singly.x[...], at_once.x[...], rtol=1e-5)
  assert int(singly.rngs.default.count) == int(at_once.rngs.default.count) > 0


def test_the_small_size_finds_the_wave_better_than_measurements_alone(
  tmp_path, capsys, own_handler
):
  assert program.main(["--quick", "--out", str(tmp_path)]) == 0
  said = capsys.readouterr().out
  viscosity = float(re.search(r"found ([\d.]+)", said)[1])
  with_equation, without = map(float, re.findall(r"([\d.]+)%", said))
  assert abs(viscosity - burgers.VISCOSITY) < 0.02 < abs(0.2 - burgers.VISCOSITY)
  assert with_equation < without
  assert (tmp_path / "wave.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupt_ends_it_with_one_line(tmp_path):
  command = [sys.executable, "-u", "-m", "examples.pinn", "--out", str(tmp_path)]
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  assert b"A network sees" in process.stdout.readline()
  time.sleep(0.5)
  os.kill(process.pid, signal.SIGINT)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 130 and b"Interrupted after 0 of" in out
  assert b"Traceback" not in err
