"""A thread for what must not be interrupted, and a call before the program ends."""

import atexit
import concurrent.futures
import functools
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any


class Worker:
  """Runs functions one after the other in one thread.

  Ctrl-C reaches the main thread only: what runs here comes to its end, and then it is raised. (A
  second Ctrl-C is raised at once.)

  >>> worker = Worker()
  >>> worker.run(max, 1, 2)
  2
  >>> worker.close()
  """

  def __init__(self):
    self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="refax-checkpoint")
    self.is_closed = False

  def run(self, f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function, and wait for what it returns or raises."""
    future = self._pool.submit(f, *args, **kwargs)
    try:
      return future.result()
    except BaseException:
      concurrent.futures.wait([future])
      raise

  def close(self) -> None:
    """End the thread."""
    self.is_closed = True
    self._pool.shutdown()


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
