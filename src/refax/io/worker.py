"""A thread for what must not be interrupted, and a call before the program ends."""

import atexit
import functools
import operator
import queue
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from typing import Any


class Worker:
  """Runs functions one after the other in one thread.

  Ctrl-C reaches the main thread only: what runs here comes to its end, and then it is raised. (A
  second Ctrl-C is raised at once.)

  It is no pool of `concurrent.futures`: the locks of a pool are in Python, and Ctrl-C between two
  bytecodes leaves them locked, for whoever comes next. A `SimpleQueue` is in C.

  >>> worker = Worker()
  >>> worker.run(max, 1, 2)
  2
  >>> worker.close()
  """

  def __init__(self):
    self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # A daemon: Ctrl-C while it starts may leave it locked, and Python would wait for it at the end.
    self._thread = threading.Thread(
      target=_work, args=(self._jobs,), name="refax-checkpoint", daemon=True
    )
    self._thread.start()
    self.is_closed = False
    weakref.finalize(self, self._jobs.put, None)  # a worker that nobody has closed

  def run(self, f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function, and wait for what it returns or raises."""
    outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    put = functools.partial(self._jobs.put, (f, args, kwargs, outcome))
    done: list[Any] = []
    try:
      # In one call of C, in which a signal's handler only runs while `get` waits: `done` then says
      # how far it came.
      done.extend(map(operator.call, (put, outcome.get)))
    except BaseException:
      if len(done) == 1:  # given away, and not back
        outcome.get()
      raise
    value, error = done.pop()
    if error is None:
      return value
    try:
      raise error
    finally:
      del error  # else its traceback and this frame hold each other

  def close(self) -> None:
    """End the thread, when it has done what it was given."""
    self.is_closed = True
    self._jobs.put(None)
    self._thread.join()


def _work(jobs: "queue.SimpleQueue[Any]") -> None:
  while (job := jobs.get()) is not None:
    _do(*job)
    del job  # what it holds is not to wait for the next one


def _do(f: Callable[..., Any], args: tuple, kwargs: dict[str, Any], outcome: Any) -> None:
  try:
    value, failure = f(*args, **kwargs), None
  except BaseException as error:
    value, failure = None, error
  try:
    outcome.put((value, failure))
  finally:
    del failure  # else its traceback and this frame hold each other


_pending: set[Callable[[], Any]] = set()


def finish_before_exit(wait: Callable[[], Any]) -> None:
  """Call `wait` before the program ends, unless it is forgotten before.

  It is held, and with it what it waits for.
  """
  _register()
  _pending.add(wait)


def forget(wait: Callable[[], Any]) -> None:
  """The end of the program need not wait for this any more."""
  _pending.discard(wait)


@functools.cache
def _register() -> None:
  """Once, and late: what was registered first is called last.

  Python ends its pools of threads in such a call, and orbax cannot finish without them; `atexit`
  comes after that. There is no public way to be called before, for Python's own pools neither.
  """
  getattr(threading, "_register_atexit", atexit.register)(_finish_all)


def _finish_all() -> None:
  while _pending:
    try:
      _pending.pop()()
    except Exception:  # nobody is left to catch it; the others are finished all the same
      traceback.print_exc(file=sys.stderr)
