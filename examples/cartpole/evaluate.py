"""The trained networks in gymnasium's own environment, which has no part in the training."""

import gymnasium
import jax
import numpy as np

from examples.cartpole.agent import QNetwork

EPISODES = 20


@jax.jit
def act(q: QNetwork, observations: jax.Array) -> jax.Array:
  return q(observations).argmax(-1)


def returns(q: QNetwork, *, episodes: int = EPISODES, seed: int = 0) -> np.ndarray:
  """The return of each episode of CartPole-v1, played without random actions."""
  environments = [gymnasium.make("CartPole-v1") for _ in range(episodes)]
  seen = np.stack([e.reset(seed=seed + i)[0] for i, e in enumerate(environments)])
  total, going = np.zeros(episodes), np.ones(episodes, bool)
  while going.any():
    actions = np.asarray(act(q, seen))
    for i in np.flatnonzero(going):
      seen[i], reward, fell, too_long, _ = environments[i].step(int(actions[i]))
      total[i] += reward
      going[i] = not (fell or too_long)
  return total
