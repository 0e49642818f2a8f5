"""with_rngs, backup_keys and restore_rngs: random streams, copied or brought back by hand."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from refax import rngs as refax_rngs
from refax.compat.autodiff import is_tree_mode
from refax.core.filters import Filter, to_predicate
from refax.core.flatten import walk_nodes
from refax.graph.inspect import recursive_map
from refax.rngs import RngStream
from refax.transforms import random

_MISSING: Any = object()


def with_rngs(
  node: Any = _MISSING,
  /,
  *,
  split: Any = None,
  fork: Any = None,
  broadcast: Any = None,
  only: Filter = True,
  graph: Any = None,
  graph_updates: Any = None,
) -> Any:
  """A copy of an object with other random streams; without one, a decorator for arguments.

  Args:
    node: a Module, Rngs, or any pytree of these.
    split: a shape of keys, for all streams or by filter; the first that matches counts.
    fork: which of the other streams continue from a key of their own.
    broadcast: as `split`, with one key everywhere.
    only: which streams.
    graph: taken for Flax's sake.
    graph_updates: taken for Flax's sake.

  >>> from refax.compat import nnx
  >>> new = nnx.with_rngs(nnx.Rngs(params=0, dropout=1), split={"params": 4}, fork=...)
  >>> new.params.key.shape, new.dropout.key.shape
  ((4,), ())
  """
  if node is _MISSING:
    options: Any = {"split": split, "fork": fork, "broadcast": broadcast, "only": only}
    return functools.partial(_for_arguments, options)
  forks = fork if isinstance(fork, list | tuple) else [] if fork is None else [fork]
  rules = [
    ("split", [(f, to_predicate(f), k) for f, k in _by_filter(split)]),
    ("broadcast", [(f, to_predicate(f), k) for f, k in _by_filter(broadcast)]),
    ("fork", [(f, to_predicate(f), None) for f in forks]),
  ]
  wanted = to_predicate(only)

  def replaced(path: Any, x: Any) -> Any:
    if not isinstance(x, RngStream) or not wanted(path, x):
      return x
    matching = [
      (name, next(((f, k) for f, matches, k in cases if matches(path, x)), None))
      for name, cases in rules
    ]
    found = [(name, *case) for name, case in matching if case is not None]
    if sum(f is not ... and f is not True for _, f, _ in found) > 1:
      raise ValueError(f"several rules match the stream at {path}: {[n for n, *_ in found]}")
    if not found:
      return x
    name, _, k = found[0]
    return x.fork() if name == "fork" else getattr(x, name)(k)

  return recursive_map(replaced, node)


class Backups(list):
  """What `split_rngs` and `fork_rngs` return: a context that brings the streams back.

  It is also a list of (stream, key), for `restore_rngs`.
  """

  def __init__(self, replaced: Any, backups: list[tuple]):
    super().__init__((stream, key, count + 1) for stream, key, count in backups)
    self._replaced = replaced

  def __enter__(self) -> "Backups":
    return self

  def __exit__(self, *error: Any) -> None:
    self._replaced.__exit__(*error)


def split_rngs(
  node: Any = _MISSING,
  /,
  *,
  splits: Any,
  only: Filter = ...,
  squeeze: bool = False,
  graph: Any = None,
  graph_updates: Any = None,
) -> Any:
  """`nnx.split_rngs`; in tree mode, a copy of the object with split streams.

  >>> from refax.compat import nnx
  >>> rngs = nnx.Rngs(0)
  >>> backups = nnx.split_rngs(rngs, splits=3); rngs.default.key.shape
  (3,)
  >>> nnx.restore_rngs(backups); rngs.default.key.shape
  ()
  >>> nnx.split_rngs(rngs, splits=3, graph=False).default.key.shape
  (3,)
  """
  if node is _MISSING:
    return random.split_rngs(splits=splits, only=only, squeeze=squeeze)
  if is_tree_mode(graph, graph_updates):
    return with_rngs(node, split=splits, only=only)
  backups = backup_keys(node)
  return Backups(random.split_rngs(node, splits=splits, only=only, squeeze=squeeze), backups)


def fork_rngs(
  node: Any = _MISSING,
  /,
  *,
  split: Any = None,
  only: Filter = ...,
  graph: Any = None,
  graph_updates: Any = None,
) -> Any:
  """`nnx.fork_rngs`; in tree mode, a copy of the object with forked streams.

  >>> from refax.compat import nnx
  >>> rngs = nnx.Rngs(0)
  >>> with nnx.fork_rngs(rngs):
  ...   _ = rngs(), rngs()
  >>> int(rngs.default.count[...])
  1
  """
  if node is _MISSING:
    return (
      random.fork_rngs(only=only) if split is None else random.split_rngs(splits=split, only=only)
    )
  if split is not None:
    return split_rngs(node, splits=split, only=only, graph=graph, graph_updates=graph_updates)
  if is_tree_mode(graph, graph_updates):
    return with_rngs(node, fork=..., only=only)
  backups = backup_keys(node)
  return Backups(random.fork_rngs(node, only=only), backups)


def _for_arguments(options: Any, f: Callable[..., Any]) -> Callable[..., Any]:
  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    args, kwargs = with_rngs((args, kwargs), **options)
    return f(*args, **kwargs)

  return wrapper


def _by_filter(rule: Any) -> list[tuple[Any, Any]]:
  if rule is None:
    return []
  return list(rule.items()) if isinstance(rule, Mapping) else [(..., rule)]


def backup_keys(node: Any, /, *, graph: Any = None) -> list[tuple]:
  """The streams of an object with their keys and counts, for `restore_rngs`.

  >>> from refax.compat import nnx
  >>> len(backup_keys(nnx.Rngs(params=0, dropout=1)))
  2
  """
  streams = [x for _, x in walk_nodes(node) if isinstance(x, RngStream)]
  return [(s, s.key.get_value(), s.count.get_value()) for s in streams]


def restore_rngs(backups: Iterable[tuple], /) -> None:
  """Give streams the keys, and the counts, that they had.

  >>> from refax.compat import nnx
  >>> rngs = nnx.Rngs(0); backups = backup_keys(rngs)
  >>> _ = rngs(); nnx.restore_rngs(backups); int(rngs.default.count[...])
  0
  """
  if isinstance(backups, Backups):
    backups.__exit__()
    return
  for stream, key, *count in backups:
    stream.key.set_value(key)
    if count:
      stream.count.set_value(count[0])


def reseed(node: Any, /, *, policy: Any = "scalars_only", graph: Any = None, **keys: Any) -> None:
  """Give the streams of an object new keys; see `nnx.reseed`.

  Args:
    node: a Module, Rngs, or any pytree of these.
    policy: for streams with an axis of keys: `scalars_only` (an error), `match_shape`, or
      `(path, key, shape) -> key`.
    graph: taken for Flax's sake.
    **keys: the new key or seed of each stream, by tag.

  >>> from refax.compat import nnx
  >>> rngs = nnx.Rngs(0); _ = rngs(); nnx.reseed(rngs, default=1); int(rngs.default.count[...])
  0
  """
  if policy not in ("scalars_only", "match_shape") and not callable(policy):
    raise ValueError(f"policy is 'scalars_only', 'match_shape' or a function, got {policy!r}")
  source = refax_rngs.Rngs(**keys)
  changes = []
  for path, stream in walk_nodes(node):
    if isinstance(stream, RngStream) and stream.tag in keys:
      new, shape = source[stream.tag](), stream.key.shape
      if callable(policy):
        new = policy(path, new, shape)
      elif shape and policy == "scalars_only":
        raise ValueError(
          f"the stream at {path} has keys of shape {shape}\n"
          '  fix: policy="match_shape" if they all differ, or a function'
        )
      elif shape:
        new = jax.random.split(new, shape)
      changes.append((stream, new))
  for stream, new in changes:
    stream.key.set_value(new)
    stream.count.set_value(jnp.zeros(new.shape, jnp.uint32))
