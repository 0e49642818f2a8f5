"""The agent: a deep Q-network that plays, remembers, learns and moves its target, in place.

The method is that of Mnih et al., "Human-level control through deep reinforcement learning", 2015,
with the double estimate of van Hasselt, Guez and Silver, 2015, arXiv:1509.06461.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import optax

from examples.cartpole.environment import TIME_LIMIT, CartPole, Transition
from refax import nnx

OBSERVED = 0.5, 0.5, 5.0, 0.5  # makes the numbers of an observation about as large as each other
EXAM = 64  # poles that an exam balances at once


@dataclasses.dataclass(frozen=True)
class Settings:
  """The sizes of a run."""

  steps: int = 20_000  # in which exploration and learning rate fall; each plays and learns once
  environments: int = 16  # played at once by one agent
  capacity: int = 320_000  # transitions that are remembered: those of 20,000 steps
  batch: int = 128  # transitions in one gradient
  hidden: int = 64
  lr: float = 1e-3  # at first; it falls to a tenth along a cosine
  discount: float = 0.98
  follow: float = 0.01  # how much of the way to the network the target goes in a step
  explore: float = 0.3  # the share of the steps in which random actions become rare
  random: float = 0.05  # the share of random actions after that


class QNetwork(nnx.Module):
  """What each action promises, from 0 to 1: observations `[batch, 4]` to values `[batch, 2]`."""

  def __init__(self, hidden: int, *, rngs: nnx.Rngs):
    self.first = nnx.Linear(4, hidden, rngs=rngs)
    self.second = nnx.Linear(hidden, hidden, rngs=rngs)
    self.out = nnx.Linear(hidden, 2, rngs=rngs)

  def __call__(self, observations: jax.Array) -> jax.Array:
    x = nnx.relu(self.first(observations * jnp.array(OBSERVED)))
    return self.out(nnx.relu(self.second(x)))


class Replay(nnx.Module):
  """The last transitions, in a ring: a new one takes the place of the oldest."""

  def __init__(self, capacity: int):
    self.observation = nnx.Variable(jnp.zeros((capacity, 4)))
    self.action = nnx.Variable(jnp.zeros((capacity,), jnp.int32))
    self.following = nnx.Variable(jnp.zeros((capacity, 4)))
    self.fell = nnx.Variable(jnp.zeros((capacity,), bool))
    self.added = nnx.Variable(jnp.int32(0))

  def add(self, seen: Transition) -> None:
    count, capacity = seen.action.shape[0], self.action.shape[0]
    places = (self.added[...] + jnp.arange(count)) % capacity
    self.observation[places] = seen.observation
    self.action[places] = seen.action
    self.following[places] = seen.following
    self.fell[places] = seen.fell
    self.added[...] += count

  def sample(self, count: int, rngs: nnx.Rngs) -> Transition:
    capacity = self.action.shape[0]
    chosen = rngs.randint((count,), 0, jnp.minimum(self.added[...], capacity))
    columns = self.observation, self.action, self.following, self.fell
    return Transition(*(column[chosen] for column in columns), length=jnp.zeros((count,)))


class Agent(nnx.Module):
  """All of a run: poles, network, target, optimizer, memory, random keys and the step's number."""

  def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
    self.settings = nnx.static(settings)
    self.q = QNetwork(settings.hidden, rngs=rngs)
    self.target = nnx.EMA(self.q, decay=1 - settings.follow)  # a slow copy, which `learn` trusts
    lr = optax.cosine_decay_schedule(settings.lr, settings.steps, alpha=0.1)
    self.optimizer = nnx.Optimizer(self.q, optax.adam(lr), wrt=nnx.Param)
    self.replay = Replay(settings.capacity)
    self.poles = new_poles(settings.environments, rngs)
    self.step = nnx.Variable(jnp.int32(0))
    self.best = nnx.clone(self.q)
    self.best_return = nnx.Variable(jnp.float32(0))
    self.rngs = rngs

  def play(self) -> jax.Array:
    """One step in every environment; the length of each episode that ended, else 0."""
    settings, shape = self.settings, (self.settings.environments,)
    done = self.step[...] / (settings.explore * settings.steps)
    at_random = self.rngs.uniform(shape) < jnp.clip(1 - done, settings.random, 1)
    actions = jnp.where(at_random, self.rngs.randint(shape, 0, 2), greedy(self.q, self.poles))
    seen = jax.vmap(CartPole.step)(self.poles, actions)  # each pole changes its own slice
    self.replay.add(seen)
    return seen.length

  def learn(self) -> None:
    """One step of the optimizer on remembered transitions; the target follows."""
    settings = self.settings
    batch = self.replay.sample(settings.batch, self.rngs)
    target = self.target.apply_to(self.q)  # a network whose values are the averages themselves
    promised = chosen(target(batch.following), self.q(batch.following).argmax(-1))
    # A reward of `1 - discount` a step, so that a pole which never falls is worth 1.
    wanted = 1 - settings.discount + settings.discount * jnp.where(batch.fell, 0, promised)

    def loss_fn(q):
      return optax.huber_loss(chosen(q(batch.observation), batch.action), wanted).mean()

    self.optimizer.update(self.q, nnx.grad(loss_fn)(self.q))
    self.target.update(self.q)
    self.step[...] += 1

  def examine(self) -> jax.Array:
    """The mean return without random actions, on new poles; the best network is kept."""
    poles = new_poles(EXAM, self.rngs)

    def step(_, __):
      return None, jax.vmap(CartPole.step)(poles, greedy(self.q, poles)).length

    lengths = jax.lax.scan(step, None, length=TIME_LIMIT)[1]
    first = (lengths > 0).argmax(0)  # when the first episode of each pole ended
    score = jnp.take_along_axis(lengths, first[None], 0).mean()
    better = score >= self.best_return[...]  # of equals the later one, which has learned for longer
    nnx.cond(better, Agent._keep, lambda agent, score: None, self, score)
    return score

  def _keep(self, score: jax.Array) -> None:
    nnx.update(self.best, nnx.state(self.q))
    self.best_return[...] = score


def new_poles(count: int, rngs: nnx.Rngs) -> CartPole:
  """Poles side by side: a CartPole whose Variables have one more axis."""
  return nnx.vmap(lambda rngs: CartPole(rngs=rngs))(rngs.split(count))


def greedy(q: QNetwork, poles: CartPole) -> jax.Array:
  """The best action for each pole."""
  return q(poles.state[...]).argmax(-1)


def chosen(values: jax.Array, actions: jax.Array) -> jax.Array:
  """The value of each row's action."""
  return jnp.take_along_axis(values, actions[:, None], axis=-1)[:, 0]


def train(agent: Agent, count: int) -> tuple[jax.Array, jax.Array]:
  """Play and learn some times, then take an exam.

  Returns:
    The lengths of the episodes that ended, `[count, environments]`, and the exam's mean return.
  """

  def step(_, __):
    lengths = agent.play()
    agent.learn()
    return None, lengths

  return jax.lax.scan(step, None, length=count)[1], agent.examine()


@partial(jax.jit, static_argnums=1)
def train_all(agents: Agent, count: int) -> tuple[jax.Array, jax.Array]:
  """`train` for agents that lie side by side, each on its own slice of every Variable."""
  return jax.vmap(lambda agent: train(agent, count))(agents)


def create(settings: Settings, count: int, seed: int) -> Agent:
  """Agents side by side: one Agent whose Variables have one more axis."""
  make = nnx.vmap(lambda rngs: Agent(settings, rngs=rngs))
  return nnx.jit(make)(nnx.Rngs(seed).split(count))  # compiled at once, not operation by operation


def take(agents: nnx.Module, number: int) -> nnx.Module:
  """One of the objects that lie side by side, as an object of its own."""
  return nnx.to_hijax(jax.tree.map(lambda x: x[number], nnx.to_lojax(agents)))
