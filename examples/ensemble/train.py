"""The ensemble: `vmap` makes the members, trains them in one step, and asks all of them."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from examples.ensemble.data import Points
from examples.ensemble.model import Member, Prediction
from refax import nnx


def member_keys(count: int, *, seed: int) -> jax.Array:
  return jax.random.split(jax.random.key(seed), count)


def create(keys: jax.Array, *, hidden: int, lr: float) -> Member:
  """Members whose Variables have one more axis, in front: a member for each key."""
  return nnx.vmap(lambda key: Member(hidden, lr, rngs=nnx.Rngs(key)))(keys)


def trainer(batch_size: int, members: int | None):
  """A compiled step `(member, x, y) -> loss`; of one member, or of so many at once."""
  step = lambda member, x, y: member.train_step(x, y, batch_size)
  return nnx.jit(step if members is None else jax.vmap(step, in_axes=(0, None, None)))


def fit(
  member: Member, points: Points, *, steps: int, batch_size: int, members: int | None
) -> Iterator[np.ndarray]:
  """Train one member or an ensemble in place; yields the loss after each step."""
  step = trainer(batch_size, members)
  x, y = map(jnp.asarray, points)
  for _ in range(steps):
    yield np.asarray(step(member, x, y))


@jax.jit
def ask(ensemble: Member, x: jax.Array) -> Prediction:
  """What each member says of the same x: means `[members, points, 1]`, deviations `[members]`."""
  return jax.vmap(lambda member, x: member.model(x), in_axes=(0, None))(ensemble, x)


def combine(said: Prediction) -> tuple[np.ndarray, np.ndarray, float]:
  """The mean of all and how much the members disagree, `[points]`, and the noise they expect."""
  mean, deviation = np.asarray(said.mean)[..., 0], np.asarray(said.deviation)
  return mean.mean(0), mean.std(0), float(np.sqrt((deviation**2).mean()))
