"""Ctrl-C at random moments of a training loop: `python storm.py SCENARIO COUNT SEED`.

A thread sends the signal, so that it comes at any bytecode, and prints at the end how often state
was lost: a Variable whose buffer is deleted, or whose value is neither the old nor the new one.
"""

import os
import random
import signal
import sys
import tempfile
import threading
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA logs each use of a deleted buffer

import jax
import jax.numpy as jnp
import numpy as np
import optax

from refax import nnx


class Net(nnx.Module):
  def __init__(self, width):
    self.hidden = nnx.Linear(4, width, rngs=nnx.Rngs(0))
    self.norm = nnx.BatchNorm(width, rngs=nnx.Rngs(0))
    self.out = nnx.Linear(width, 1, rngs=nnx.Rngs(0))
    self.steps = nnx.Variable(jnp.zeros(()))

  def __call__(self, x):
    self.steps += 1
    return self.out(self.norm(self.hidden(x)))


X = np.ones((8, 4), np.float32)


def loss(model, x):
  return (model(x) ** 2).mean()


def train(model, optimizer, x):
  value, grads = nnx.value_and_grad(loss)(model, x)
  optimizer.update(model, grads)
  return value


def train_for_nothing(model, optimizer, x):
  train(model, optimizer, x)


def train_and_call(model, optimizer, x):
  jax.debug.callback(lambda x: None, train(model, optimizer, x))


def train_and_sow(model, optimizer, x):
  train(model, optimizer, x)
  model.kept = nnx.Intermediate(x.sum())
  return model


def train_all(objects, x, *, scale):
  value = train(objects["model"], objects["rest"][0], x * scale)
  return value, nnx.state(objects["model"], nnx.Param)


class Scenario:
  """A step, and the state that it writes."""

  def __init__(self, name, folder):
    with nnx.use_hijax(name != "lojax"):
      self.model = Net(8)
    self.optimizer = nnx.Optimizer(self.model, optax.adam(1e-2), wrt=nnx.Param)
    self.state = [self.model, self.optimizer]
    self.grads = nnx.grad(loss)(self.model, X)
    self.ema = nnx.EMA(self.model, decay=0.9)
    self.state.append(self.ema)
    self.size = 8
    self.before = float(self.model.steps)
    self.name = name
    self.jitted = nnx.jit(train)
    self.nothing = nnx.jit(train_for_nothing)
    self.sown = nnx.jit(train_and_sow)
    self.all = nnx.jit(train_all)
    self.plain = jax.jit(train)
    self.closure = nnx.jit(lambda x: train(self.model, self.optimizer, x))
    box = {"model": self.model, "rest": [self.optimizer]}
    self.boxed = nnx.jit(lambda x: train(box["model"], box["rest"][0], x))
    self.bound = nnx.jit(lambda update, model, x: update(model, nnx.grad(loss)(model, x)))
    self.ahead = nnx.jit(train).lower(self.model, self.optimizer, X).compile()
    self.called = nnx.jit(train_and_call)
    self.checkpointer = nnx.Checkpointer(folder) if name == "save" else None
    self.count = 0

  def step(self):
    self.count += 1
    getattr(self, "_" + self.name)()

  def _steady(self):
    self.jitted(self.model, self.optimizer, X)

  def _nothing(self):
    self.nothing(self.model, self.optimizer, X)

  def _first(self):  # each call is traced and compiled
    self.size = self.size % 64 + 1
    nnx.jit(train)(self.model, self.optimizer, X[:1].repeat(self.size, 0))

  def _places(self):  # compiled once, but taken in Python: arrays that are committed or not
    x = jnp.asarray(X)
    self.jitted(
      self.model, self.optimizer, jax.device_put(x, jax.devices()[0]) if self.count % 2 else x
    )

  def _structure(self):
    self.sown(self.model, self.optimizer, X)
    nnx.pop(self.model, nnx.Intermediate)

  def _lojax(self):
    self.jitted(self.model, self.optimizer, X)

  def _containers(self):
    self.all({"model": self.model, "rest": [self.optimizer]}, X, scale=np.float32(0.5))

  def _modes(self):
    (self.model.eval if self.count % 2 else self.model.train)()
    self.jitted(self.model, self.optimizer, X)

  def _closure(self):
    self.closure(X)

  def _boxed(self):
    self.boxed(X)

  def _bound(self):
    self.bound(self.optimizer.update, self.model, X)

  def _ahead(self):
    self.ahead(self.model, self.optimizer, X)

  def _called(self):
    self.called(self.model, self.optimizer, X)

  def _eager(self):
    self.model(X)

  def _grad(self):
    nnx.grad(loss)(self.model, X)

  def _update(self):
    self.optimizer.update(self.model, self.grads)

  def _ema(self):
    self.ema.update(self.model)

  def _save(self):
    self.checkpointer.save(self.count, self.model)

  def _transaction(self):
    try:
      with nnx.transaction(self.model, self.optimizer):
        self.jitted(self.model, self.optimizer, X)
        if self.count % 2:
          raise ValueError
    except ValueError:
      pass

  def _plain(self):
    self.plain(self.model, self.optimizer, X)


def lost(objects):
  """The paths of Variables whose value is gone or not finite."""
  found = []
  for path, value in nnx.iter_graph(objects):
    if isinstance(value, nnx.Variable):
      try:
        array = value[...]
        if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(np.asarray(array)).all():
          found.append(path)
      except Exception:
        found.append(path)
  return found


def is_between(scenario):
  """Whether a step has been made in part: the model has counted it and the optimizer has not."""
  whole = {"steady", "nothing", "first", "places", "closure", "structure"}
  whole |= {"lojax", "containers", "modes", "boxed", "bound", "ahead", "called"}
  steps, updates = float(scenario.model.steps), int(scenario.optimizer.step)
  return scenario.name in whole and steps - scenario.before != updates


def mended():
  """Whether JAX was left without a trace, and is no more.

  `Primitive.bind` sets its current trace to None, and then begins the `try` that gives it back: an
  interrupt in between breaks every operation that follows, with or without Refax. What JAX's own
  tests use to begin afresh is used here too, and nowhere else: it is private.
  """
  try:
    jax.lax.neg(1.0)  # an operation by itself: compiled functions go past `bind`
  except AttributeError as error:
    if "NoneType" not in str(error):
      raise
    jax._src.core.reset_trace_state()
    return True
  return False


def is_of_interrupt(error):
  """Whether an error is an interrupt that JAX has wrapped, or what one has left of JAX."""
  causes = []
  while error is not None:
    causes.append(error)
    error = error.__cause__ or error.__context__
  wrapped = any(isinstance(e, KeyboardInterrupt) or "KeyboardInterrupt" in str(e) for e in causes)
  return mended() or wrapped


def steps_until(scenario, end):
  """A call of its own: in a loop inside `try`, an interrupt between two lines may pass `except`."""
  while time.perf_counter() < end:
    scenario.step()


def run(name, count, seed):
  rng = random.Random(seed)
  # Each interrupt waits for a step to begin, then comes at a random moment of it.
  begun, fired, ended = threading.Event(), threading.Event(), threading.Event()
  main = threading.main_thread().ident
  losses = interrupts = 0
  # A save that was interrupted may still be written by a thread of orbax when the folder goes.
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
    scenario = Scenario(name, folder)
    for _ in range(3):
      scenario.step()
    start = time.perf_counter()
    for _ in range(5):
      scenario.step()
    length = (time.perf_counter() - start) / 5

    def interrupt():
      while True:
        begun.wait()
        begun.clear()
        if ended.is_set():
          return
        until = time.perf_counter() + rng.random() * length * 1.5
        while time.perf_counter() < until:
          pass
        signal.pthread_kill(main, signal.SIGINT)
        fired.set()

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    for _ in range(count):
      try:
        while True:  # an interrupt in a weak reference's callback is dropped by Python: then again
          fired.clear()
          begun.set()
          steps_until(scenario, time.perf_counter() + 1 + 5 * length)
      except KeyboardInterrupt:
        interrupts += 1
      except Exception as error:  # where JAX compares objects in C++, it wraps what is raised there
        if not is_of_interrupt(error):
          raise
        interrupts += 1
        try:
          fired.wait(10)  # it may be that of an earlier one, and this one is still to come
          time.sleep(0.001)
        except KeyboardInterrupt:
          pass
      mended()
      if gone := lost(scenario.state) or is_between(scenario):
        losses += 1
        print(name, "lost", gone, file=sys.stderr)
        scenario = Scenario(name, folder)
        scenario.step()
    ended.set()
    begun.set()
  print(f"{name}: {losses} of {interrupts} lost")
  return losses


if __name__ == "__main__":
  sys.setswitchinterval(1e-5)
  code = 0
  for scenario_name in sys.argv[1].split(","):
    code += run(scenario_name, int(sys.argv[2]), int(sys.argv[3]))
  sys.stdout.flush()
  os._exit(min(code, 100))
