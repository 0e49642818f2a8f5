"""Which storage new Variables get: `jax.Ref` cells (hijax) or plain arrays (lojax)."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax

F = TypeVar("F", bound=Callable)


def _default() -> bool:
  return os.environ.get("REFAX_USE_HIJAX", "1").lower() not in ("0", "false", "off", "no")


# Thread-local, and part of the key of every jit cache: a function that was traced with one setting
# is traced again under the other, so that it never returns Variables of the wrong storage.
_hijax = jax.make_user_context(default_value=_default())

_LOCAL = "local"
"""The setting while a function is differentiated; see `local_variables`."""


class use_hijax(contextlib.AbstractContextManager):
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
    self._open: list = []
    self._push()
    self._entered = False

  def _push(self) -> None:
    context = _hijax(self._value)
    context.__enter__()
    self._open.append(context)

  def __enter__(self) -> "use_hijax":
    if self._entered:  # a second `with` on the same object
      self._push()
    self._entered = True
    return self

  def __exit__(self, *_) -> None:
    self._open.pop().__exit__(None, None, None)

  def __call__(self, fn: F) -> F:
    if self._open:  # a decorator sets nothing until the call
      self._open.pop().__exit__(None, None, None)
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
  return _hijax.value is not False


def set_default(value: bool) -> None:
  """Set whether new Variables are hijax where nobody has said it, in all threads.

  >>> set_default(True)
  """
  _hijax.set_global(bool(value))


@contextlib.contextmanager
def local_variables() -> Iterator[bool]:
  """A function is differentiated: a Ref would drop the gradient of what it holds, so Variables that
  are made meanwhile and could carry one are lojax.

  Yields:
    Whether they are to be hijax afterwards.

  >>> with local_variables() as is_hijax_afterwards:
  ...   using_hijax(), are_variables_local(), is_hijax_afterwards
  (True, True, True)
  """
  outer = _hijax.value
  if outer is False:
    yield False
    return
  with _hijax(_LOCAL):
    yield outer is True


def are_variables_local() -> bool:
  """Whether a function is differentiated now, outside of which Variables are hijax.

  >>> are_variables_local()
  False
  """
  return _hijax.value is _LOCAL
