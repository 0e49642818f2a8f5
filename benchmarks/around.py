"""What is around a call of `nnx.jit`: where models come from, what a program does between calls.

As `patterns`: a step adds a number to each of `n` small arrays, in Refax, Flax, and by hand.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from benchmarks.dispatch import threaded
from benchmarks.measure import BASE, Steps
from benchmarks.patterns import ONE, base, both, by_hand, increment, loss_of, model_of, zeros
from refax import nnx


def models_in_dict(n: int) -> Steps:
  """A dict of models, which the step finds by closure."""
  models = {"generator": model_of(nnx, n), "critic": model_of(nnx, n)}
  step = nnx.jit(lambda x: models["generator"](x))
  return {BASE: base(n), "Refax nnx.jit": lambda: step(ONE)}


def bound_method(n: int) -> Steps:
  """A method of the model is the argument, taken anew for each call."""
  model, step = model_of(nnx, n), nnx.jit(lambda f, x: f(x))
  return {BASE: base(n), "Refax nnx.jit": lambda: step(model.__call__, ONE)}


def typed_key(n: int) -> Steps:
  key = jax.random.key(0)

  def step(model, x, key):
    return model(x + jax.random.uniform(key))

  @functools.partial(jax.jit, donate_argnums=0)
  def hand(arrays, x, key):
    x = x + jax.random.uniform(key)
    return [a + x for a in arrays], x

  def make(lib):
    model, f = model_of(lib, n), lib.jit(step)
    return lambda: f(model, ONE, key)

  return both(make, threaded(hand, zeros(n), ONE, key))


@dataclasses.dataclass
class Config:
  """Sizes of a model, as most programs keep them: it has no hash."""

  width: int = 8
  layers: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 3])
  options: dict[str, str] = dataclasses.field(default_factory=lambda: {"activation": "relu"})


def config(n: int) -> Steps:
  """The model keeps a dataclass with a list and a dict in it."""
  model, step = model_of(nnx, n), nnx.jit(increment)
  model.config = Config()
  return {BASE: base(n), "Refax nnx.jit": lambda: step(model, ONE)}


def hyperparameter(n: int) -> Steps:
  """SGD with a learning rate that is written before each step; by hand, it is an argument."""

  def make(lib):
    model = model_of(lib, n)
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=1e-3)
    optimizer = lib.Optimizer(model, tx, wrt=lib.Param)

    def step(model, optimizer, x):
      optimizer.update(model, lib.grad(lambda m: m.total(x))(model))

    f = lib.jit(step)
    rates = optimizer.opt_state.hyperparams

    def call():
      rates["learning_rate"][...] = 1e-3
      f(model, optimizer, ONE)

    return call

  @functools.partial(jax.jit, donate_argnums=0)
  def hand(arrays, x, rate):
    grads = jax.grad(lambda arrays: sum((a * x).sum() for a in arrays))(arrays)
    return [a - rate * g for a, g in zip(arrays, grads, strict=True)], None

  return both(make, threaded(lambda arrays: hand(arrays, ONE, 1e-3), zeros(n)))


def ahead(n: int) -> Steps:
  """What was compiled ahead of time; by hand too."""
  model = model_of(nnx, n)
  step = nnx.jit(increment).lower(model, ONE).compile()
  hand = by_hand.lower(zeros(n), ONE).compile()
  return {BASE: threaded(hand, zeros(n), ONE), "Refax nnx.jit": lambda: step(model, ONE)}


def callback(n: int) -> Steps:
  """The step calls Python; by hand, it is waited for too: a callback may fail."""
  called = lambda x: None

  def step(model, x):
    jax.debug.callback(called, x)
    return model(x)

  @functools.partial(jax.jit, donate_argnums=0)
  def hand(arrays, x):
    jax.debug.callback(called, x)
    return [a + x for a in arrays], x

  def make(lib):
    model, f = model_of(lib, n), lib.jit(step)
    return lambda: f(model, ONE)

  return both(make, threaded(lambda a, x: jax.block_until_ready(hand(a, x)), zeros(n), ONE))


def number_written(n: int) -> Steps:
  """A number is written to a Variable before each call."""

  def make(lib):
    model, f, rate = model_of(lib, n), lib.jit(increment), lib.Variable(jnp.zeros(()))

    def call():
      rate[...] = 0.5
      return f(model, ONE)

    return call

  step = base(n)
  return both(make, lambda: (jnp.asarray(0.5), step())[1])


def add(arrays, x):
  return [a + x for a in arrays], x


def written_anew(n: int) -> Steps:
  """`jit(f)(...)` is written in the loop, with the same function each time."""

  def make(lib):
    model = model_of(lib, n)
    return lambda: lib.jit(increment)(model, ONE)

  return both(make, threaded(lambda *args: jax.jit(add, donate_argnums=0)(*args), zeros(n), ONE))


def gradient_anew(n: int) -> Steps:
  """`jit(value_and_grad(f))(...)` is written in the loop; JAX compiles it each time."""

  def make(lib):
    model = model_of(lib, n)
    return lambda: lib.jit(lib.value_and_grad(loss_of))(model, ONE)[0]

  arrays = zeros(n)
  return both(make, lambda: jax.jit(jax.value_and_grad(total))(arrays, ONE)[0])


def total(arrays, x):
  return sum((a * x).sum() for a in arrays)


AROUND: dict[str, Callable[[int], Steps]] = {
  "a dict of models by closure": models_in_dict,
  "a bound method": bound_method,
  "a typed key": typed_key,
  "a config without a hash": config,
  "a learning rate is written": hyperparameter,
  "a number is written": number_written,
  "compiled ahead of time": ahead,
  "jax.debug.callback": callback,
  "jit(f) in each call": written_anew,
  "jit(value_and_grad(f)) in each call": gradient_anew,
}
