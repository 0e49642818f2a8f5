"""Calls of Modules: each runs in a named scope of its path in the model, and may be observed.

While JAX traces, the operations of `model.encoder.layers[3]` get the name `encoder/layers/3`: in
jaxprs, in what XLA reports, in profiles. A call that runs eagerly costs one check more.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

import jax

from refax import _jax, config
from refax.core.gather import in_call
from refax.core.node import Node
from refax.core.watch import MISSING
from refax.typing import Path


class Call(NamedTuple):
  """A call of a method of a Module."""

  path: Path
  """Where the Module is, from the outermost Module that is known."""
  module: Any
  method: str


class Observer:
  """What is told of each call of a Module while `observing` it; by default it changes nothing."""

  def __init__(self, key: Hashable = None):
    """Args: `key`: what it does to a trace; by default an observer is like no other.

    What JAX has traced with an observer tells another one with the same key nothing.
    """
    self.key = object() if key is None else key

  def enter(self, call: Call, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A call begins; returns its arguments, or others."""
    return args, kwargs

  def leave(self, call: Call, result: Any) -> Any:
    """A call ends; returns its result, or another."""
    return result

  def sow(self, path: Path, variable_type: type, name: str, value: Any) -> bool:
    """A Module at a path sows a value; whether the observer takes it, and it is not stored."""
    return False

  def perturb(self, path: Path, variable_type: type, name: str, value: Any) -> Any:
    """A Module at a path perturbs a value; returns it with what is added, or MISSING."""
    return MISSING


class _Local(threading.local):
  def __init__(self):
    # The Modules whose calls are running, their paths, and the names of the methods.
    self.open: list[tuple[Any, Path, str]] = []
    self.observers: tuple[Observer, ...] = ()

  def __reduce__(self) -> Any:
    return _the_local, ()  # a class that is pickled by value has methods that name it


def _the_local() -> _Local:
  return _local


_local = _Local()
# Part of the key of every jit cache: what was traced without an observer tells it nothing, and
# what was traced for one Module tells it the wrong path for another.
_seen_by = jax.make_user_context(default_value=None)


def name_calls(cls: type) -> None:
  """Let the public methods that a class of Modules defines, and `__call__`, run in named scopes."""
  for name, method in list(vars(cls).items()):
    if type(method) is not FunctionType or (name.startswith("_") and name != "__call__"):
      continue
    if inspect.iscoroutinefunction(method) or inspect.isgeneratorfunction(method):
      continue  # their bodies run later
    if not hasattr(method, "_is_named"):  # borrowed from another class
      setattr(cls, name, _named(method, name))


def _named(method: FunctionType, name: str) -> Callable:
  @functools.wraps(method)
  def call(self, /, *args, **kwargs):
    if _jax.no_trace_active() and not _local.observers:
      return method(self, *args, **kwargs)
    with in_call():
      return _run(method, name, self, args, kwargs)

  call._is_named = True  # pyright: ignore[reportAttributeAccessIssue]
  return call


def _run(method: FunctionType, name: str, module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
  observers = _local.observers
  if not isinstance(module, Node) or not (observers or config.using_named_scopes()):
    return method(module, *args, **kwargs)
  running = _local.open
  if running and running[-1][0] is module and running[-1][2] == name:  # `super().__call__(x)`
    return method(module, *args, **kwargs)
  steps, path = _place(module, *running[-1][:2]) if running else (p := path_of(module), p)
  depth = len(running)
  try:
    running.append((module, path, name))
    with jax.named_scope("/".join(map(str, steps))) if steps else contextlib.nullcontext():
      if not observers:
        return method(module, *args, **kwargs)
      return _observed(observers, Call(path, module, name), method, args, kwargs)
  finally:
    del running[depth:]  # an interrupt may have come before it was longer


def _observed(
  observers: tuple[Observer, ...],
  call: Call,
  method: FunctionType,
  args: tuple,
  kwargs: dict[str, Any],
) -> Any:
  with _seen_by((tuple(o.key for o in observers), call.path, call.method)):
    for observer in observers:
      args, kwargs = observer.enter(call, args, kwargs)
    result = method(call.module, *args, **kwargs)
    for observer in reversed(observers):
      result = observer.leave(call, result)
    return result


def is_taken(module: Any, variable_type: type, name: str, value: Any) -> bool:
  """Whether an observer takes what a Module sows."""
  if not _local.observers:
    return False
  path = _path_now(module)
  taken = [o.sow(path, variable_type, name, value) for o in _local.observers]  # all are told
  return any(taken)


def perturbed(module: Any, variable_type: type, name: str, value: Any) -> Any:
  """What observers make of a value that a Module perturbs; MISSING if none takes it."""
  if not _local.observers:
    return MISSING
  path, found = _path_now(module), MISSING
  for observer in _local.observers:
    new = observer.perturb(path, variable_type, name, value)
    if new is not MISSING:
      found = value = new
  return found


def places_of(nodes: Iterable[Any]) -> tuple[Path, ...]:
  """Where objects are, if somebody observes their calls.

  It makes a GraphDef another one, so that JAX traces again: what was traced for one object tells
  the wrong path for others.
  """
  return tuple(map(path_of, nodes)) if _local.observers else ()


def _path_now(module: Any) -> Path:
  running = _local.open
  return running[-1][1] if running and running[-1][0] is module else path_of(module)


@contextlib.contextmanager
def observing(observer: Observer, root: Any = None) -> Iterator[None]:
  """While the block runs, an observer is told of each call of a Module in this thread.

  Args:
    observer: what is told.
    root: the Module from which paths count; by default the outermost one that is known.
  """
  outer, running = _local.observers, _local.open
  try:
    _local.observers, _local.open = (*outer, observer), [] if root is None else [(root, (), "")]
    with _seen_by((tuple(o.key for o in _local.observers), (), "")):
      yield
  finally:
    _local.observers, _local.open = outer, running


def _place(module: Any, parent: Any, above: Path) -> tuple[Path, Path]:
  """The steps to a Module from the one whose method calls it, and its whole path."""
  steps = _climb(module, parent)
  if steps is None:
    steps = _direct(module, parent)
  if steps is None:  # it is none of the parent's own: it came by an argument, or by closure
    path = path_of(module) or (type(module).__name__,)
    is_below = len(path) > len(above) and path[: len(above)] == above
    return (path[len(above) :] if is_below else path), path
  return steps, above + steps


def path_of(module: Any) -> Path:
  """The path of a Module from the outermost Module or container that it is known to live in."""
  return _climb(module, None) or ()


def _climb(module: Any, parent: Any) -> Path | None:
  """The steps down to a Module, from a parent or from the top (None); None if it is not below.

  What a transform has rebuilt is where the object is that it was made of.
  """
  steps: list[Any] = []
  seen: set[int] = set()
  node = module
  while node is not parent:
    if id(node) in seen:
      return None
    seen.add(id(node))
    home, key = node._pytree.home
    above = None if home is None else home()
    if above is not None and above._is_module:  # an optimizer that holds the model is no part of it
      steps.append(key)
      node = above
      continue
    start, origin = node._pytree.place, node._pytree.origin
    node = None if origin is None else origin()
    if node is None:
      return None if parent is not None else (*start, *reversed(steps))
  return tuple(reversed(steps))


def _direct(module: Any, parent: Any) -> Path | None:
  """The step to a Module that lives elsewhere too: an attribute, or an item of a container."""
  for key, value, is_data in parent._entries():
    if value is module:
      return (key,)
    if is_data and isinstance(value, Node) and value._is_container:
      for item, x, _ in value._entries():
        if x is module:
          return (key, item)
  return None
