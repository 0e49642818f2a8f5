"""The example of a pole: its dynamics are gymnasium's, it learns, and a run is all Variables."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx

gymnasium = pytest.importorskip("gymnasium", reason="the example is compared with its CartPole")

from examples.cartpole import __main__ as program  # noqa: E402
from examples.cartpole import agent, evaluate  # noqa: E402
from examples.cartpole.environment import TIME_LIMIT, CartPole, push  # noqa: E402

ROOT = Path(__file__).parents[2]
SMALL = agent.Settings(
  steps=120, environments=4, capacity=100, batch=8, hidden=8, explore=0.5
)  # the ring goes around


@pytest.fixture
def own_handler():
  """The program takes over Ctrl-C: pytest has it back afterwards."""
  before = signal.getsignal(signal.SIGINT)
  yield
  signal.signal(signal.SIGINT, before)


def values(module):
  as_data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return {path: np.asarray(as_data(v[...])) for path, v in nnx.to_flat_state(nnx.state(module))}


def assert_equal(got, want, rtol=0.0, atol=0.0):
  got, want = values(got), values(want)
  assert got.keys() == want.keys()
  for path, value in want.items():
    np.testing.assert_allclose(got[path], value, rtol=rtol, atol=atol, err_msg=str(path))


@pytest.mark.parametrize("policy", ["random", "upright"])
def test_each_step_is_that_of_gymnasium_up_to_float32(policy):
  """Its pole begins each step in our state: an error would grow with every step of the same run."""
  theirs = gymnasium.make("CartPole-v1")
  pole, rng = CartPole(rngs=nnx.Rngs(0)), np.random.default_rng(0)
  theirs.reset(seed=0)
  step, ended = jax.jit(CartPole.step), []
  for time_in_run in range(900 if policy == "upright" else 200):
    state = np.asarray(pole.state[...], np.float64)
    action = int(state[2] + 0.5 * state[3] > 0) if policy == "upright" else int(rng.integers(2))
    theirs.unwrapped.state = state
    observation, reward, fell, too_long, _ = theirs.step(action)
    seen = step(pole, action)
    np.testing.assert_allclose(seen.following, observation, rtol=2e-6, atol=2e-6)
    assert (bool(seen.fell), reward) == (fell, 1.0), time_in_run
    assert bool(seen.length) == (fell or too_long), time_in_run
    if seen.length:
      ended.append((int(seen.length), too_long))
      theirs.reset()
      assert np.abs(pole.state[...]).max() <= 0.05 and int(pole.time) == 0
  assert len(ended) > 3 if policy == "random" else (TIME_LIMIT, True) in ended, ended


def test_poles_side_by_side_are_poles_alone():
  poles = agent.new_poles(3, nnx.Rngs(0))
  alone = [agent.take(poles, i) for i in range(3)]
  for actions in np.random.default_rng(0).integers(0, 2, (40, 3)):
    seen = jax.vmap(CartPole.step)(poles, actions)
    for i, pole in enumerate(alone):
      jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6),
        jax.tree.map(lambda x, i=i: x[i], seen),
        pole.step(actions[i]),
      )


def test_the_memory_holds_what_was_played_and_the_newest_of_it():
  one = agent.take(agent.create(SMALL, 1, seed=3), 0)
  jax.jit(lambda one: agent.train(one, 60))(one)
  memory = one.replay
  assert int(memory.added) == 60 * SMALL.environments > SMALL.capacity
  following = jax.vmap(push)(memory.observation[...], memory.action[...])
  np.testing.assert_allclose(memory.following[...], following, rtol=1e-5, atol=1e-6)
  newest = (int(memory.added) - 1) % SMALL.capacity
  went_on = ~np.asarray(memory.fell)[newest]
  assert not went_on or np.allclose(memory.following[newest], one.poles.state[-1], atol=1e-6)


def test_agents_that_learn_at_once_learn_as_each_of_them_alone():
  agents = agent.create(SMALL, 3, seed=1)
  alone = [agent.take(agents, i) for i in range(3)]
  lengths, scores = agent.train_all(agents, 60)
  train = jax.jit(lambda one: agent.train(one, 60))
  for i, one in enumerate(alone):
    got_lengths, got_score = train(one)
    np.testing.assert_array_equal(got_lengths, lengths[i])
    np.testing.assert_allclose(got_score, scores[i], rtol=1e-6)
    assert_equal(one, agent.take(agents, i), rtol=1e-4, atol=1e-5)
  assert len({float(score) for score in scores}) > 1  # they are not the same agent


def test_a_run_that_was_saved_amid_its_episodes_goes_on_bit_for_bit(tmp_path):
  whole = agent.create(SMALL, 2, seed=2)
  agent.train_all(whole, 30)
  assert (np.asarray(whole.poles.time) > 0).any()  # amid them
  with nnx.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(30, whole)
    checkpoints.wait()
    want = agent.train_all(whole, 30)
    resumed = agent.create(SMALL, 2, seed=99)
    checkpoints.restore(resumed)
  got = agent.train_all(resumed, 30)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert_equal(resumed, whole)


def test_an_exam_keeps_the_best_network():
  one = agent.take(agent.create(SMALL, 1, seed=0), 0)
  one.best_return[...] = 1000.0
  before = values(one.best)
  one.q.out.bias[...] += 1.0
  score = jax.jit(agent.Agent.examine)(one)
  assert values(one.best).keys() == before.keys() and float(one.best_return) == 1000.0
  assert all((values(one.best)[path] == value).all() for path, value in before.items())
  one.best_return[...] = 0.0
  again = jax.jit(agent.Agent.examine)(one)
  assert float(one.best_return) == float(again) > 0 and float(score) > 0
  assert_equal(one.best, one.q)


def test_the_small_size_learns_and_draws(tmp_path, capsys, own_handler):
  assert program.main(["--quick", "--out", str(tmp_path), "--seed", "1"]) == 0
  said = capsys.readouterr().out
  mean = float(said.split("Mean return of all agents: ")[1])
  assert mean > 80  # random actions reach 22
  assert (tmp_path / "reward_curve.png").read_bytes().startswith(b"\x89PNG")


def test_random_networks_play_worse_in_gymnasium():
  q = agent.QNetwork(8, rngs=nnx.Rngs(0))
  assert evaluate.returns(q, episodes=5).mean() < 80


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_all_agents_reach_the_goal(seed, tmp_path, own_handler):
  assert program.main(["--out", str(tmp_path), "--seed", str(seed)]) == 0


def test_an_interrupt_ends_it_with_one_line(tmp_path):
  command = [sys.executable, "-u", "-m", "examples.cartpole", "--out", str(tmp_path)]
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  assert b"agents learn at once" in process.stdout.readline()
  time.sleep(0.5)
  os.kill(process.pid, signal.SIGINT)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 130 and b"Interrupted after 0 of" in out
  assert b"Traceback" not in err
