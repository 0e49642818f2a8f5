"""A soak: random calls on one model from four threads, with interrupts: `soak.py SECONDS SEED`.

Each call that writes has a twin on plain arrays, that runs when it has succeeded; after each, both
hold the same. The main thread is interrupted at random moments: the call has then happened as a
whole or not at all. One lock keeps writers apart, for nothing promises that two at a time are
right; what only reads, and `Checkpointer.save`, run whenever they want. At the end memory is flat,
and nothing that is alive holds a tracer or a deleted buffer. It prints a summary, and fails by its
exit code.
"""

import gc
import os
import pathlib
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, deque

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA logs each use of a deleted buffer

import jax
import jax.numpy as jnp
import numpy as np
import optax

from refax import nnx, testing
from refax.errors import RefaxError

sys.path.append(str(pathlib.Path(__file__).parents[1] / "interrupts"))
from storm import mended

BATCHES = [np.linspace(-1, 1, 4 * n, dtype=np.float32).reshape(n, 4) for n in (4, 8)]
# An interrupt of a plain jax.jit may lose what it was given: JAX, not ours to mend. One that comes
# between the error that ends a transaction and its handling leaves what the block has written.
MAY_LOSE = ("jax.jit", "transaction")
WARM = 300  # seconds from which on a run is long enough to judge its memory
ORBAX = 0.06  # MiB that orbax keeps of each save and restore, also without Refax: 48 lists
HISTORY = 400  # versions of the state that a save may be compared with


class Net(nnx.Module):
  """State of every kind: parameters, statistics, a random stream, a counter."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.hidden = nnx.Linear(4, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.drop = nnx.Dropout(0.1, rngs=rngs)
    self.out = nnx.Linear(8, 1, rngs=rngs)
    self.steps = nnx.Variable(jnp.zeros((), jnp.int32))

  def __call__(self, x):
    self.steps += 1
    return self.out(self.drop(self.norm(self.hidden(x))))


def loss_of(model, x):
  return ((model(x) - x.sum(-1, keepdims=True)) ** 2).mean()


def train(pair, x):
  loss, grads = nnx.value_and_grad(loss_of)(pair["model"], x)
  pair["optimizer"].update(pair["model"], grads)
  return loss


def new_pair():
  model = Net()
  return {"model": model, "optimizer": nnx.Optimizer(model, optax.sgd(1e-2), wrt=nnx.Param)}


jitted = nnx.jit(train)
reading = jax.jit(lambda model, x: model.hidden(x))
reading_too = nnx.jit(lambda model, x: model.hidden(x))


@jax.jit
def twin_train(pair, x):
  loss = train(pair, x)
  return pair, loss


# Operations: what is done to the objects, what to their twin, and whether it is all or nothing.
class Operation:
  """A call by name: `run(pair)` on objects, `twin(pair)` on arrays; `whole`: all or nothing.

  One that is rolled back is whole, and yet another thread may see what is not the end of it.
  """

  AT_ONCE = ("nnx.jit", "write", "train", "eval", "jax.jit", "invalid")

  def __init__(self, name, run, twin, whole=True):
    self.name, self.run, self.twin, self.whole = name, run, twin, whole


def on_both(name, f, whole):
  """An operation whose twin is the same code, run on a copy with arrays for Refs."""

  def twin(pair):
    pair = nnx.to_lojax(pair)
    f(pair)
    return pair

  return Operation(name, f, twin, whole)


def train_compiled(rng):
  x = rng.choice(BATCHES)
  return Operation("nnx.jit", lambda pair: jitted(pair, x), lambda pair: twin_train(pair, x)[0])


def train_eagerly(rng):
  return on_both("eager step", lambda pair: train(pair, BATCHES[0]), whole=False)


def write(rng):
  value = np.float32(rng.uniform(-0.1, 0.1))

  def f(pair):
    pair["model"].out.bias[...] = value

  return on_both("write", f, whole=True)


def update(rng):
  state = {"out": {"bias": jnp.full(1, rng.uniform(-0.1, 0.1)), "kernel": jnp.full((8, 1), 0.1)}}
  return on_both("nnx.update", lambda pair: nnx.update(pair["model"], state), whole=True)


def change_mode(rng):
  mode = rng.choice(["train", "eval"])
  return on_both(mode, lambda pair: getattr(pair["model"], mode)(), whole=True)


def roll_back(rng):
  def f(pair):
    try:
      with nnx.transaction(pair):
        jitted(pair, BATCHES[0])
        pair["model"].out.bias[...] = 7.0
        raise ZeroDivisionError
    except ZeroDivisionError:
      pass

  return Operation("transaction", f, lambda pair: pair)


def read_by_plain_jit(rng):  # JAX donates Refs also to a call that reads them: no other may run
  def f(pair):
    assert reading(pair["model"], BATCHES[0]).shape == (4, 8)

  return Operation("jax.jit", f, lambda pair: pair)


def wrong_shape(pair):
  jitted(pair, np.ones((2, 3), np.float32))


def wrong_shape_in_jax(pair):
  reading(pair["model"], np.ones((2, 3), np.float32))


def wrong_dtype(pair):
  pair["model"].steps[...] = 1.5


def wrong_state(pair):
  nnx.update(pair["model"], {"out": {"bias": jnp.zeros(3)}})


def wrong_order(pair):
  grads = nnx.grad(loss_of)(nnx.clone(pair["model"]), BATCHES[0])
  pair["optimizer"].update(grads, pair["model"])


def invalid(rng):
  wrong = rng.choice([wrong_shape, wrong_shape_in_jax, wrong_dtype, wrong_state, wrong_order])

  def f(pair):
    try:
      wrong(pair)
    except RefaxError:
      return
    raise AssertionError(f"{wrong.__name__} was accepted")

  return Operation("invalid", f, lambda pair: pair)


OPERATIONS = {
  train_compiled: 10,
  train_eagerly: 1,
  write: 3,
  update: 2,
  change_mode: 1,
  roll_back: 2,
  read_by_plain_jit: 3,
  invalid: 2,
}


# what reads
def read_eagerly(model):
  assert np.isfinite(np.asarray(model.hidden.kernel[...])).all()


def read_by_jit(model):
  assert np.isfinite(np.asarray(reading_too(model, BATCHES[0]))).all()


def read_under_grad(model):
  grads = nnx.grad(lambda m: (m(BATCHES[0]) ** 2).mean())(model.hidden)
  assert np.isfinite(np.asarray(grads["kernel"][...])).all()


def read_state(model):
  state = nnx.to_lojax(nnx.state(model, nnx.Param))
  assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state))


READS = {
  "eager read": read_eagerly,
  "nnx.jit read": read_by_jit,
  "nnx.grad": read_under_grad,
  "nnx.state": read_state,
}


# state
def values(pair):
  """All state, as arrays of NumPy by path."""
  found = {}
  for path, x in jax.tree_util.tree_flatten_with_path(nnx.to_lojax(pair))[0]:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    found[jax.tree_util.keystr(path)] = np.asarray(x)
  return found


def differences(a, b):
  """The paths at which two states differ."""
  close = lambda x, y: x.shape == y.shape and np.allclose(x, y, rtol=1e-4, atol=1e-5)
  assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
  return [path for path, x in a.items() if not close(x, b[path])]


def memory():
  """The resident memory of this process, in MiB."""
  gc.collect()
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Soak:
  """The model, its twin, and the threads."""

  def __init__(self, seconds, seed, folder):
    self.pair = new_pair()
    self.twin = nnx.to_lojax(self.pair)
    self.lock = threading.RLock()
    self.version, self.history = 0, deque([(0, values(self.pair))], HISTORY)
    self.in_parts = -1  # the last version before which another thread may see others
    self.counts, self.failures = Counter(), []
    self.end, self.seed = time.monotonic() + seconds, seed
    self.checkpoints = nnx.Checkpointer(folder, keep=3)
    self.saved = {}  # what each checkpoint holds
    self.open = False  # whether an interrupt may come now

  def going_on(self):
    return time.monotonic() < self.end and not self.failures

  def perform(self, operation, may_interrupt=False):
    """One operation on the objects, then its twin on arrays; both hold the same afterwards."""
    with self.lock:
      if operation.name not in operation.AT_ONCE:
        self.in_parts = self.version + 1
      interrupted = self.interrupted(operation, may_interrupt)
      if interrupted and operation.name in ("train", "eval"):
        operation.run(self.pair)  # it sets several attributes, one after the other
      after = operation.twin(self.twin)
      got, was, new = values(self.pair), values(self.twin), values(after)
      if interrupted and differences(got, new):
        mixed = all(p not in differences(got, was) for p in differences(got, new))
        if not operation.whole and mixed:
          after = nnx.to_lojax(self.pair)
        elif not differences(got, was):
          after = self.twin
      if wrong := differences(values(self.pair), values(after)):
        state = "interrupted" if interrupted else "done"
        raise AssertionError(f"{operation.name}, {state}: {wrong} differ from the twin")
      self.twin = after
      self.version += 1
      self.history.append((self.version, values(self.pair)))
    self.counts[operation.name] += 1

  def interrupted(self, operation, may_interrupt):
    """Run an operation; whether an interrupt has ended it."""
    try:
      if may_interrupt:
        self.open = True
        self.begun.set()
      operation.run(self.pair)
      if may_interrupt:
        self.open = False
    except BaseException:
      if self.open or not may_interrupt:  # no interrupt has come
        self.open = False
        raise
      self.counts["interrupts"] += 1
      self.counts["times that JAX was left broken"] += mended()
      return True
    return False

  def handle(self, *_):
    if self.open:
      self.open = False
      raise KeyboardInterrupt

  # what the threads do
  def operation(self, rng):
    makers = list(OPERATIONS)
    return rng.choices(makers, [OPERATIONS[m] for m in makers])[0](rng)

  def write_interrupted(self):
    rng = random.Random(self.seed)
    while self.going_on():
      if rng.random() < 0.02 and self.saved:
        self.perform(self.restoring(rng), may_interrupt=True)
      else:
        operation = self.operation(rng)
        may = operation.name not in MAY_LOSE and rng.random() < 0.5
        self.perform(operation, may_interrupt=may)

  def write_always(self):
    rng = random.Random(self.seed + 1)
    while self.going_on():
      self.perform(self.operation(rng))
      time.sleep(rng.random() * 0.005)

  def read(self):
    """Read at any time. A compiled step of another thread may just have donated what is read."""
    rng = random.Random(self.seed + 2)
    while self.going_on():
      kind = rng.choice(list(READS))
      try:
        READS[kind](self.pair["model"])
        self.counts[kind] += 1
      except (ValueError, RuntimeError) as error:
        if "deleted" not in str(error):
          raise
        self.counts["reads of what was donated"] += 1
      time.sleep(rng.random() * 0.01)

  def save(self):
    """Save at any time; what a checkpoint holds is the state between two operations."""
    step, fresh = 0, new_pair()
    while self.going_on():
      step, first = step + 1, self.version
      self.checkpoints.save(step, self.pair, user=step)
      with self.lock:
        last, parts, history = self.version, self.in_parts, list(self.history)
      self.checkpoints.wait()
      self.checkpoints.restore(fresh, step=step)
      got = values(fresh)
      if parts <= first and history[0][0] <= first:
        between = [state for version, state in history if first <= version <= last]
        assert any(not differences(got, state) for state in between), "a save of no one state"
        self.counts["saves compared"] += 1
      self.saved = {s: v for s, v in self.saved.items() if s > step - 2} | {step: got}
      self.counts["save"] += 1
      time.sleep(0.05)

  def restoring(self, rng):
    step = max(self.saved)
    found = self.saved[step]

    def twin(pair):
      leaves, tree = jax.tree_util.tree_flatten_with_path(nnx.to_lojax(pair))
      new = [_like(x, found[jax.tree_util.keystr(path)]) for path, x in leaves]
      return jax.tree.unflatten(tree, new)

    return Operation("restore", lambda pair: self.checkpoints.restore(pair, step=step), twin)

  def interrupt(self):
    rng, main = random.Random(self.seed + 3), threading.main_thread().ident or 0
    while self.going_on():
      self.begun.wait(0.1)
      self.begun.clear()
      until = time.perf_counter() + rng.random() * rng.choice([1e-3, 5e-3, 5e-2])
      while time.perf_counter() < until:
        pass
      if self.open:
        signal.pthread_kill(main, signal.SIGINT)

  def guarded(self, work):
    try:
      work()
    except BaseException:
      self.failures.append(f"{work.__name__}: {traceback.format_exc()}")

  def run(self):
    """Run all threads; the memory after each tenth of the time, and at the end."""
    self.begun, start = threading.Event(), time.monotonic()
    signal.signal(signal.SIGINT, self.handle)
    works = [self.write_always, self.read, self.save, self.interrupt]
    threads = [threading.Thread(target=self.guarded, args=(work,)) for work in works]
    weights = []

    def weigh():
      for i in range(1, 10):
        while self.going_on() and time.monotonic() < start + (self.end - start) * i / 10:
          time.sleep(0.1)
        weights.append(memory())

    threads.append(threading.Thread(target=self.guarded, args=(weigh,)))
    for thread in threads:
      thread.start()
    self.guarded(self.write_interrupted)
    for thread in threads:
      thread.join()
    self.checkpoints.close()
    return [*weights, memory()]


def _like(x, found):
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(jnp.asarray(found), impl=jax.random.key_impl(x))
  return jnp.asarray(found)


def main(seconds, seed):
  start = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    soak = Soak(seconds, seed, folder)
    try:
      with testing.assert_no_leaks(traces=False):
        weights = soak.run()
        if wrong := differences(values(soak.pair), values(soak.twin)):
          soak.failures.append(f"at the end {wrong} differ from the twin")
    except Exception:
      weights = [0.0]
      soak.failures.append(traceback.format_exc())
  warm = weights[len(weights) // 3]
  if seconds >= WARM and weights[-1] > warm * 1.05 + 10 + ORBAX * soak.counts["save"]:
    soak.failures.append("memory grew")
  counts = ", ".join(f"{name} {n}" for name, n in sorted(soak.counts.items()))
  result = f"{len(soak.failures)} failures" if soak.failures else "equal to the twin"
  for failure in soak.failures:
    print(failure, file=sys.stderr)
  print(f"soak, jax {jax.__version__}, {time.monotonic() - start:.0f} s: {result}")
  print(f"  MiB after each tenth: {', '.join(f'{w:.0f}' for w in weights)}")
  print(f"  {counts}")
  return len(soak.failures)


if __name__ == "__main__":
  sys.setswitchinterval(1e-4)
  sys.unraisablehook = lambda unraisable: None  # an interrupt in a callback of the collector
  code = main(float(sys.argv[1]), int(sys.argv[2]))
  sys.stdout.flush()
  os._exit(min(code, 100))
