"""Which storage new Variables get: `jax.Ref` cells (hijax) or plain arrays (lojax)."""

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def _default() -> bool:
  return os.environ.get("REFAX_USE_HIJAX", "1").lower() not in ("0", "false", "off", "no")


class _Setting(threading.local):
  def __init__(self):
    self.hijax = _default()


_setting = _Setting()


class use_hijax(contextlib.AbstractContextManager):  # noqa: N801  a setting that reads as a verb
  """Set whether new Variables are hijax: for this thread, a block, or a function.

  The default is True; `REFAX_USE_HIJAX=0` in the environment makes it False.

  Args:
    value: True for `jax.Ref` cells, False for plain arrays.

  >>> from refax import nnx
  >>> with nnx.use_hijax(False):
  ...   nnx.using_hijax()
  False
  >>> @nnx.use_hijax(False)
  ... def build():
  ...   return nnx.using_hijax()
  >>> build(), nnx.using_hijax()
  (False, True)
  """

  def __init__(self, value: bool):
    self._value = bool(value)
    self._previous = [_setting.hijax]
    self._called = True
    _setting.hijax = self._value

  def __enter__(self) -> "use_hijax":
    if not self._called:
      self._previous.append(_setting.hijax)
    self._called = False  # a second `with` on the same object has its own previous value
    _setting.hijax = self._value
    return self

  def __exit__(self, *_) -> None:
    _setting.hijax = self._previous.pop() if len(self._previous) > 1 else self._previous[0]

  def __call__(self, fn: F) -> F:
    _setting.hijax = self._previous[0]
    value = self._value

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
      with use_hijax(value):
        return fn(*args, **kwargs)

    return wrapper  # pyright: ignore[reportReturnType]


def using_hijax() -> bool:
  """Whether new Variables are hijax now, in this thread.

  >>> from refax import nnx
  >>> nnx.using_hijax()
  True
  """
  return _setting.hijax
