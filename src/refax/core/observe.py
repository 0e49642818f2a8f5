"""What happens to Variables for a while: which are used (`observe`), and to take it back (`undo`).

A jaxpr knows the Refs that a function reached by closure, not the Variables they belong to.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from refax import _jax

_local = threading.local()


@contextlib.contextmanager
def observe() -> Iterator[dict[int, Any]]:
  """The hijax Variables that are read or written meanwhile, by the identity of their Refs."""
  outer, seen = getattr(_local, "seen", None), {}
  _local.seen = seen
  try:
    yield seen
  finally:
    _local.seen = outer
    if outer is not None:
      outer.update(seen)


def note(variable: Any, ref: Any) -> None:
  """A Variable is read or written now."""
  seen = getattr(_local, "seen", None)
  if seen is not None:
    seen[id(ref)] = variable


@contextlib.contextmanager
def undo_on_error() -> Iterator[None]:
  """If the block raises, concrete Refs that it wrote through Variables hold what they held."""
  outer, log = getattr(_local, "log", None), {}
  _local.log = log
  try:
    yield
  except BaseException:
    for ref, value in log.values():
      _jax.write_cell(ref, value)
    raise
  finally:
    _local.log = outer
    if outer is not None:
      outer.update((key, entry) for key, entry in log.items() if key not in outer)


def before_write(ref: Any) -> None:
  """A Ref is about to be written."""
  log = getattr(_local, "log", None)
  if log is not None and id(ref) not in log and not _jax.is_tracer(ref):
    log[id(ref)] = (ref, ref[...])
