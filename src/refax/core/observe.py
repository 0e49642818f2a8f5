"""What happens to Variables for a while: which are used (`observe`), and to take it back (`undo`).

A jaxpr knows the Refs that a function reached by closure, not the Variables they belong to.
"""

import contextlib
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

from refax import _jax
from refax.core.interrupt import surely
from refax.errors import AliasError


class Compiled(NamedTuple):
  """A trace that is compiled as it is: nothing will ever differentiate what it records."""

  state: Any
  refs: dict[int, Any]


class _Local(threading.local):
  compiled: "Compiled | None" = None
  seen: dict[int, Callable[[], Any]] | None = None
  log: dict[int, Any] | None = None
  differentiated: "dict[int, Any]"

  def __init__(self):
    self.differentiated = {}


_local = _Local()


@contextlib.contextmanager
def observe() -> Iterator[dict[int, Callable[[], Any]]]:
  """The hijax Variables that are read or written meanwhile, by the identity of their Refs.

  Each is a function that returns the Variable. One that was made in a trace must not outlive it:
  of that, it is a weak reference.
  """
  outer, seen = _local.seen, {}
  _local.seen = seen
  try:
    yield seen
  finally:
    _local.seen = outer
    if outer is not None:
      outer.update(seen)


@contextlib.contextmanager
def compiled_as_is(refs: Iterable[Any]) -> Iterator[None]:
  """The trace of now will be compiled as it is; these Refs came into it from outside.

  What says that a value has no tangent, or has to have none, is an operation for each read and
  write, a third of what tracing a small model takes. Here it can be left out.
  """
  outer = _local.compiled
  _local.compiled = Compiled(_jax.trace_state(), {id(ref): ref for ref in refs})
  try:
    yield
  finally:
    _local.compiled = outer


def has_no_tangents() -> bool:
  """Whether what is recorded now is never differentiated."""
  trace = _local.compiled
  return trace is not None and trace.state == _jax.trace_state()


def is_read_without_tangent(ref: Any) -> bool:
  """Whether a read of a Ref gives a value that JAX knows to have no tangent.

  A Ref that was made under `jax.jvp` or comes into a nested trace gives zeros that JAX does not
  know to be zero.
  """
  trace = _local.compiled
  if trace is None:
    return False
  return trace.state == _jax.trace_state() or (id(ref) in trace.refs and not _jax.is_staging())


on_closure_read: Callable[[Any], None] = lambda variable: None
"""Called when a trace that is none of Refax's own uses a Variable by closure; see `structure`."""


@contextlib.contextmanager
def differentiated(variables: Iterable[Any]) -> Iterator[None]:
  """For these Variables, arrays are differentiated meanwhile: a read of their cells is an error.

  Args:
    variables: the caller's Variables; the function that is differentiated sees others.
  """
  outer = _local.differentiated
  keys = {id(x): x for v in variables for x in (v, *jax.tree.leaves(v.get_raw_value()))}
  found = outer | {k: x for k, x in keys.items() if not _jax.is_tracer(x)}
  is_in_trace = any(key in _in_traces for key in found)
  number = _number(frozenset(found)) if is_in_trace else 0
  try:  # Ctrl-C comes between a line that calls something and the next: nothing is set before
    _local.differentiated = found
    with _differentiation(number) if number else contextlib.nullcontext():
      yield
  finally:
    _local.differentiated = outer


_in_traces: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""What traces have read by closure, by its `id`: JAX may keep these traces."""


in_plain_traces: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""Those that traces which are none of Refax's own have read: their cells stay where they are."""


_differentiation = jax.make_user_context(default_value=0)
"""What is differentiated, by number. It is part of the key of all that JAX keeps of a trace: code
that was traced before, and is not run again, may read a cell that must not be read now."""


@functools.lru_cache(maxsize=1024)
def _number(ids: frozenset[int]) -> int:
  """A number for what is differentiated; the `id` of what is gone may come again, and means it no
  harm: a trace that reads a cell keeps it.
  """
  return next(_numbers)


_numbers = itertools.count(1)


def note(variable: Any, cell: Any) -> None:
  """A Variable is read or written now.

  Raises:
    AliasError: another Variable stands for it, whose value is being differentiated.
  """
  found, seen = _local.differentiated, _local.seen
  if found and (id(cell) in found if _jax.is_ref(cell) else id(variable) in found):
    raise AliasError.differentiated(variable._def.origin)
  is_by_closure = not _jax.is_tracer(cell) and _jax.is_staging()
  if is_by_closure:
    owner = cell if _jax.is_ref(cell) else variable
    _in_traces[id(owner)] = owner
    if seen is None:
      in_plain_traces[id(owner)] = owner
  if seen is not None:
    seen[id(cell)] = weakref.ref(variable) if _jax.is_tracer(cell) else lambda: variable
  elif is_by_closure:
    on_closure_read(variable)


def is_quiet() -> bool:
  """Whether nobody wants to know of eager reads and writes."""
  return not _local.differentiated and _local.seen is None and _local.log is None


@contextlib.contextmanager
def undo_on_error(refs: Iterable[Any]) -> Iterator[None]:
  """If the block raises, Refs hold what they held: these, and others written through Variables.

  A compiled function inside may write these without that any Variable sees it.
  """
  outer, log = _local.log, {}
  if _jax.no_trace_active():
    log |= {id(ref): (ref, _jax.read_cell(ref)) for ref in refs}
  _local.log = log
  try:
    yield
  except BaseException:
    surely(lambda: _put_back(log.values()))
    raise
  finally:
    _local.log = outer
    if outer is not None:
      outer.update((key, entry) for key, entry in log.items() if key not in outer)


def _put_back(entries: Iterable[tuple[Any, Any]]) -> None:
  for ref, value in entries:
    _jax.write_cell(ref, value)


def before_write(ref: Any) -> None:
  """A Ref is about to be written, now or when what is being traced will run."""
  log = _local.log
  if log is not None and id(ref) not in log and not _jax.is_tracer(ref):
    log[id(ref)] = (ref, _jax.copied(_jax.peek_cell(ref)))
