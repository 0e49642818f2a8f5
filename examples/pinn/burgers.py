"""Burgers' equation, `u_t + u u_x = viscosity u_xx`, solved twice without any network.

The wave `u = -sin(pi x)` at the time 0, between -1 and 1, steepens until it is nearly a jump. Its
solution is known: Cole, "On a quasi-linear parabolic equation occurring in aerodynamics", 1951, and
Hopf, 1950, turn the equation into that of heat.
"""

from typing import NamedTuple

import numpy as np

VISCOSITY = 0.02  # what the network has to find
NODES = 100  # of the quadrature


class Measurements(NamedTuple):
  """Values at scattered places and times, each `[count]`."""

  x: np.ndarray
  t: np.ndarray
  u: np.ndarray


def solution(x: np.ndarray, t: np.ndarray, viscosity: float = VISCOSITY) -> np.ndarray:
  """The solution in closed form: two integrals, by Gauss-Hermite quadrature."""
  nodes, weights = np.polynomial.hermite.hermgauss(NODES)
  x, t = np.broadcast_arrays(np.asarray(x, float), np.asarray(t, float))
  y = x[..., None] - np.sqrt(4 * viscosity * t[..., None]) * nodes
  heat = weights * np.exp(-(1 + np.cos(np.pi * y)) / (2 * np.pi * viscosity))
  return -(heat * np.sin(np.pi * y)).sum(-1) / heat.sum(-1)


def finite_differences(time: float, viscosity: float = VISCOSITY, cells: int = 800) -> np.ndarray:
  """The solution at a time, at `cells` points from -1 on: steps of Heun's method, a second way."""
  width = 2 / cells
  u = -np.sin(np.pi * (-1 + width * np.arange(cells)))
  count = int(np.ceil(time / (0.2 * width**2 / viscosity)))

  def rate(u):
    left, right = np.roll(u, 1), np.roll(u, -1)
    return (left**2 - right**2) / (4 * width) + viscosity * (left - 2 * u + right) / width**2

  for _ in range(count):
    first = rate(u)
    second = rate(u + time / count * first)
    u = u + time / count * (first + second) / 2
  return u


def measure(count: int, noise: float, seed: int) -> Measurements:
  """What instruments at random places and times would read: the solution, and noise."""
  rng = np.random.default_rng(seed)
  x, t = rng.uniform(-1, 1, count), rng.uniform(0, 1, count)
  u = solution(x, t) + noise * rng.normal(size=count)
  return Measurements(*(values.astype(np.float32) for values in (x, t, u)))
