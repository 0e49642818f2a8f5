"""What the commands of the examples share: a clean end by Ctrl-C, options, a progress bar."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

INTERRUPTED = 130  # the exit status that a shell gives to a program ended by Ctrl-C


def end_at_ctrl_c(last_words: Callable[[], str]) -> None:
  """From now on, Ctrl-C prints one message and ends the program, without a traceback.

  It is no `except KeyboardInterrupt`: raised while JAX's extension modules load, that crashes them.
  """

  def leave(*_) -> None:
    print(f"\n{last_words()}", flush=True)
    os._exit(INTERRUPTED)

  signal.signal(signal.SIGINT, leave)


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
  """For `python -m examples.<name>`; the help shows the defaults."""
  return argparse.ArgumentParser(
    prog=f"python -m examples.{name}",
    description=description and description.partition("\n")[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )


def choose_sizes(options: argparse.Namespace, **sizes: tuple[Any, Any]) -> None:
  """Give options that were not given one of two values: the quick one or the full one."""
  for name, (quick, full) in sizes.items():
    if getattr(options, name) is None:
      setattr(options, name, quick if options.quick else full)


def at_least(minimum: int) -> Callable[[str], int]:
  """A type of options."""

  def integer(text: str) -> int:  # argparse names it in its error: "invalid integer value"
    if (number := int(text)) < minimum:
      raise argparse.ArgumentTypeError(f"{number} is less than {minimum}")
    return number

  return integer


def seconds_between_bars() -> float:
  """How often a progress bar is drawn: where it cannot redraw itself, a line every few seconds."""
  return 0.1 if sys.stderr.isatty() else 5
