"""A thread that trains, for tests of what others see meanwhile."""

import threading
from collections.abc import Callable
from typing import Any


class Training:
  """`step(state)` in another thread, again and again, as long as the block runs."""

  def __init__(self, step: Callable[[Any], Any], state: Any):
    self.step, self.state, self.stop, self.error, self.steps = step, state, False, None, 0
    step(state)
    self.thread = threading.Thread(target=self.run)

  def run(self):
    try:
      while not self.stop:
        self.step(self.state)
        self.steps += 1
    except Exception as error:
      self.error = error

  def __enter__(self):
    self.thread.start()

  def __exit__(self, *_):
    self.stop = True
    self.thread.join()
    assert self.error is None and self.steps
