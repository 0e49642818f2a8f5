"""observe: which Variables are read and written while a function is traced.

A jaxpr knows the Refs that a function reached by closure, not the Variables they belong to.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

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
