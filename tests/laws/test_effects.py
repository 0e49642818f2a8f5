"""What `nnx.effects` says is not read changes nothing, and what it says is not written stays."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from refax import nnx
from tests.laws.programs import SIZE, Net, initial_state, programs, run_functional, run_stateful

X = jnp.linspace(-1.0, 1.5, SIZE)
KEY = jax.random.key(7)


def check_effects(program):
  state = initial_state(KEY)
  net = Net(state)
  reads, writes = nnx.effects(lambda net, x: run_stateful(program, net, x))(net, X)
  assert all(np.array_equal(a, state[name]) for name, a in net.values().items())  # it was not run
  run = jax.jit(lambda s, x: run_functional(program, s, x))
  want, out = run(state, X)
  for name, value in state.items():
    if f"0.{name}" not in writes:
      np.testing.assert_array_equal(want[name], value, err_msg=f"{name} is written")
    if f"0.{name}" in reads:
      continue
    got, changed = run(state | {name: value + jnp.ones_like(value)}, X)
    np.testing.assert_array_equal(changed, out, err_msg=f"{name} is read for the result")
    for other in state.keys() - {name}:
      np.testing.assert_array_equal(got[other], want[other], err_msg=f"{name} is read: {other}")


def law(examples, depth, transforms):
  @settings(
    max_examples=examples,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
  )
  @given(program=programs(depth, transforms=transforms))
  def check(program):
    with contextlib.suppress(NotImplementedError):  # a plain branch with state, under grad or vmap
      check_effects(program)

  check()


@pytest.mark.parametrize("transforms", ["plain", "nnx", "mixed"])
def test_what_is_not_read_changes_nothing(transforms):
  law(12, 2, transforms)


@pytest.mark.slow
@pytest.mark.parametrize("transforms", ["plain", "nnx", "mixed"])
def test_what_is_not_read_changes_nothing_in_many_programs(transforms):
  law(30, 3, transforms)
