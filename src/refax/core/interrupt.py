"""Signals, held back while state is exchanged.

CPython runs a signal's handler between any two bytecodes of the main thread. What has to happen as
a whole (a call that gives up its inputs, and the writing of its results) runs either inside one
call of C, or in `uninterrupted`.
"""

import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

try:  # what is under `signal`: its functions make an enum of each result, 1 us a time
  import _signal as raw  # pyright: ignore[reportMissingImports]
except ImportError:
  raw = signal

T = TypeVar("T")

_MAIN = threading.main_thread()


def uninterrupted(f: Callable[[], T]) -> T:
  """Call `f`; signals that arrive meanwhile are handled when it has ended.

  Only the main thread handles signals, and only handlers written in Python (Ctrl-C among them) can
  raise: in any other thread this is a plain call. `f` should be short.

  Returns:
    What `f` returns.

  Raises:
    BaseException: what `f` raises, or what the handler of a signal raises afterwards.

  >>> uninterrupted(lambda: 1 + 1)
  2
  """
  if threading.current_thread() is not _MAIN:
    return f()
  came: list[tuple[int, Any]] = []
  held: dict[int, Any] = {}
  try:
    for number in _handled():
      held[number] = raw.getsignal(number)
      raw.signal(number, lambda *signal_and_frame: came.append(signal_and_frame))
    return f()
  finally:
    raised: BaseException | None = None
    # A handler that is back may raise between any two of these lines, and inside `signal`.
    for _ in range(1000):
      try:
        for number in reversed(held):
          raw.signal(number, held[number])
        break
      except BaseException as error:
        raised = error
    try:
      _hand_over(came, held)
    finally:
      if raised is not None:
        raise raised


def _hand_over(came: list[tuple[int, Any]], held: dict[int, Any]) -> None:
  """Call the handlers of the signals that came: each of them, whatever others raise."""
  while came:
    number, frame = came.pop(0)
    try:
      held[number](number, frame)
    finally:
      _hand_over(came, held)


def surely(f: Callable[[], None]) -> None:
  """Call `f` in `uninterrupted`, and once more if a signal came before that: it may run twice.

  For what undoes: an exception is on its way already, and Ctrl-C must not come in its place.
  """
  try:
    uninterrupted(f)
  except BaseException:
    uninterrupted(f)
    raise


# Those that programs handle by raising. `signal.valid_signals` would take 80 us to look through.
_NAMES = ("SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGBREAK")
_NUMBERS = tuple(int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name))


def _handled() -> list[int]:
  """The signals with a handler in Python, Ctrl-C first."""
  return [n for n in _NUMBERS if callable(raw.getsignal(n))]
