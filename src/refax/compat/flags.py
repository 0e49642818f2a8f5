"""The switches of Flax NNX that have nothing to switch in Refax: they are taken, and do nothing."""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

FLAGS = ("graph", "graph_updates")
"""Graph mode or tree mode: Refax sees shared references and changes of structure at no cost."""


def without_flags(fn: Callable[..., Any], *names: str) -> Callable[..., Any]:
  """A function that takes more keywords than `fn`, and drops them.

  Args:
    fn: the function.
    *names: keywords beside `graph` and `graph_updates`.

  >>> without_flags(len)([1, 2], graph=False)
  2
  """

  @functools.wraps(fn)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    for name in (*FLAGS, *names):
      kwargs.pop(name, None)
    return fn(*args, **kwargs)

  with contextlib.suppress(ValueError, TypeError):
    wrapper.__signature__ = inspect.signature(fn)  # pyright: ignore[reportAttributeAccessIssue]
  return wrapper


class _Switch(contextlib.AbstractContextManager):
  """A setting of one thread: set by the call; for a block, by `with`; as a decorator, for calls."""

  default = True
  _local: threading.local

  def __init_subclass__(cls):
    cls._local = threading.local()

  def __init__(self, value: bool):
    self._value, self._old = bool(value), type(self).current_value()
    self._set(self._value)

  def _set(self, value: bool) -> None:
    self._local.value = value

  def __enter__(self) -> "_Switch":
    return self

  def __exit__(self, *_: Any) -> None:
    self._set(self._old)

  def __call__(self, fn: Callable[..., Any]) -> Callable[..., Any]:
    self._set(self._old)

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
      with type(self)(self._value):
        return fn(*args, **kwargs)

    return wrapper

  @classmethod
  def current_value(cls) -> bool:
    """The setting of now."""
    return getattr(cls._local, "value", cls.default)


class set_graph_mode(_Switch):
  """Taken for Flax's sake: Refax has one mode, in which objects may share.

  >>> with set_graph_mode(False):
  ...   set_graph_mode.current_value()
  False
  """


class set_graph_updates(_Switch):
  """Taken for Flax's sake: Refax always hands changes of structure out.

  >>> set_graph_updates.current_value()
  True
  """
