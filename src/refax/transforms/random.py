"""nnx.split_rngs and nnx.fork_rngs: random streams for a mapped function, and back."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from refax import _jax
from refax.core.filters import Filter, to_predicate
from refax.core.flatten import walk_nodes
from refax.rngs import RngStream
from refax.transforms.effect import transaction


class _Replaced(contextlib.AbstractContextManager):
  """Streams whose keys are replaced, until the block or the decorated function ends."""

  def __init__(self, tree: Any, replace: Callable[[RngStream], Any], only: Filter):
    self._undo = []
    predicate = to_predicate(only)
    nodes = [(path, node) for path, node in walk_nodes(tree) if isinstance(node, RngStream)]
    streams = [stream for path, stream in nodes if predicate(path, stream)]
    with transaction(streams):  # all of them, or none
      keys = [replace(stream) for stream in streams]
    for stream, key in zip(streams, keys, strict=True):
      self._undo += [(v, v.get_raw_value()) for v in (stream.key, stream.count)]
      for variable, value in ((stream.key, key), (stream.count, _zeros(key))):
        hijax = variable.is_hijax
        variable.set_raw_value(_jax.new_cell(value) if hijax else value)

  def __exit__(self, *_) -> None:
    for variable, cell in self._undo:
      variable.set_raw_value(cell)


def _zeros(key: jax.Array) -> jax.Array:
  return jnp.zeros(key.shape, jnp.uint32)


def split_rngs(
  tree: Any = ..., /, *, splits: int | tuple[int, ...], only: Filter = ..., squeeze: bool = False
) -> Any:
  """Give each random stream an axis of keys to map over, in place.

  Args:
    tree: a Module, Rngs, or any pytree of these; without it, a decorator is returned that splits
      the streams of the arguments for the time of a call.
    splits: the size of the axis, or a shape.
    only: which streams: a tag, or a filter on (path, RngStream).
    squeeze: for `splits=1`, whether to leave the axis out.

  Returns:
    A context manager that brings the streams back, each one key further; or a decorator.

  >>> from refax import nnx
  >>> rngs = nnx.Rngs(0)
  >>> with nnx.split_rngs(rngs, splits=4):
  ...   model = nnx.vmap(lambda rngs: nnx.Linear(2, 3, rngs=rngs))(rngs)
  >>> model.kernel.shape, rngs.default.key.shape
  ((4, 2, 3), ())
  """

  def replace(stream: RngStream) -> jax.Array:
    keys = jax.random.split(stream(), splits)
    return keys.reshape(keys.shape[1:]) if squeeze and splits == 1 else keys

  return _for_arguments(replace, only) if tree is ... else _Replaced(tree, replace, only)


def fork_rngs(tree: Any = ..., /, *, only: Filter = ...) -> Any:
  """Let random streams continue from new keys for a while, in place.

  Args:
    tree: a Module, Rngs, or any pytree of these; without it, a decorator is returned that forks
      the streams of the arguments for the time of a call.
    only: which streams: a tag, or a filter on (path, RngStream).

  Returns:
    A context manager that brings the streams back, each one key further; or a decorator.

  >>> from refax import nnx
  >>> rngs = nnx.Rngs(0)
  >>> with nnx.fork_rngs(rngs):
  ...   _ = rngs(), rngs()
  >>> int(rngs.default.count)
  1
  """
  replace = lambda stream: stream()
  return _for_arguments(replace, only) if tree is ... else _Replaced(tree, replace, only)


def _for_arguments(replace: Callable, only: Filter) -> Callable[[Callable], Callable]:
  def decorate(f: Callable) -> Callable:
    @functools.wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
      with _Replaced((args, kwargs), replace, only):
        return f(*args, **kwargs)

    return wrapper

  return decorate
