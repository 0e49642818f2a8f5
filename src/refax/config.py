"""Settings: which storage new Variables get (hijax or lojax), and whether calls are named."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

import jax

F = TypeVar("F", bound=Callable)


def _is_on(name: str) -> bool:
  return os.environ.get(name, "1").lower() not in ("0", "false", "off", "no")


# Thread-local, and part of the key of every jit cache: a function that was traced with one setting
# is traced again under the other, so that it never returns Variables of the wrong storage.
_hijax = jax.make_user_context(default_value=_is_on("REFAX_USE_HIJAX"))

_LOCAL = "local"
"""The setting while a function is differentiated; see `local_variables`."""


_eager_sharding = jax.make_user_context(default_value=True)

_named_scopes = jax.make_user_context(default_value=_is_on("REFAX_NAMED_SCOPES"))


class _Switch(contextlib.AbstractContextManager):
  """A setting that is True or False: for this thread, a block, or a function."""

  _context: Any

  def __init__(self, value: bool):
    self._value = bool(value)
    self._open: list = []
    self._push()
    self._entered = False

  def _push(self) -> None:
    context = self._context(self._value)
    context.__enter__()
    self._open.append(context)

  def __enter__(self) -> Self:
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
      with type(self)(value):
        return fn(*args, **kwargs)

    return wrapper  # pyright: ignore[reportReturnType]


class use_hijax(_Switch):
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

  _context = _hijax


class use_named_scopes(_Switch):
  """Set whether calls of Modules are named: for this thread, a block, or a function.

  While JAX traces, the operations of `model.encoder.layers[3]` run in `jax.named_scope` of
  `encoder/layers/3`; jaxprs, HLO and profiles show it. It costs nothing in a compiled function.
  The default is True; `REFAX_NAMED_SCOPES=0` in the environment makes it False.

  Args:
    value: whether calls are named.

  >>> from refax import nnx; import jax, jax.numpy as jnp
  >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
  >>> "layers/0" in jax.jit(model).lower(jnp.ones((1, 2))).as_text(debug_info=True)
  True
  >>> with nnx.use_named_scopes(False):
  ...   "layers/0" in jax.jit(model).lower(jnp.ones((1, 2))).as_text(debug_info=True)
  False
  """

  _context = _named_scopes


class use_eager_sharding(_Switch):
  """Set whether a Variable with `out_sharding` is laid out on the mesh when it is made.

  The default is True: in `jax.set_mesh(mesh)` a new Variable lies where its metadata says. With
  False, it lies where JAX put the value, and the metadata is kept for `nnx.shard` and
  `nnx.get_partition_spec`.

  Args:
    value: whether new Variables are laid out.

  >>> from refax import nnx
  >>> with nnx.use_eager_sharding(False):
  ...   nnx.using_eager_sharding()
  False
  """

  _context = _eager_sharding


def using_eager_sharding() -> bool:
  """Whether new Variables with `out_sharding` are laid out on the mesh, in this thread.

  >>> using_eager_sharding()
  True
  """
  return _eager_sharding.value


def using_named_scopes() -> bool:
  """Whether calls of Modules are named now, in this thread.

  >>> using_named_scopes()
  True
  """
  return _named_scopes.value


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
