"""Nested mappings as flat ones, and back: the module `nnx.traversals`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

empty_node = type("EmptyNode", (), {"__repr__": lambda self: "empty_node"})()
"""What a mapping without keys is in a flat mapping."""


def flatten_mapping(
  xs: Mapping[Any, Any],
  /,
  *,
  keep_empty_nodes: bool = False,
  is_leaf: Callable[[tuple, Any], bool] | None = None,
  sep: str | None = None,
) -> dict[Any, Any]:
  """A nested mapping as one from paths to leaves.

  Args:
    xs: the mapping.
    keep_empty_nodes: whether a mapping without keys is a leaf, `empty_node`.
    is_leaf: `(path, value)` to whether a value is not looked into.
    sep: what joins the keys of a path, if it is to be a string.

  >>> flatten_mapping({"a": 1, "b": {"c": 2}})
  {('a',): 1, ('b', 'c'): 2}
  """
  pairs = flatten_to_sequence(xs, is_leaf=is_leaf, keep_empty_nodes=keep_empty_nodes)
  return {path if sep is None else sep.join(map(str, path)): value for path, value in pairs}


def flatten_to_sequence(
  xs: Mapping[Any, Any],
  /,
  *,
  is_leaf: Callable[[tuple, Any], bool] | None = None,
  keep_empty_nodes: bool = False,
) -> list[tuple[tuple, Any]]:
  """The (path, leaf) pairs of a nested mapping.

  >>> flatten_to_sequence({"b": {"c": 2}})
  [(('b', 'c'), 2)]
  """
  if not isinstance(xs, Mapping):
    raise TypeError(f"expected a mapping, got {type(xs).__name__}")

  def walk(path: tuple, value: Any) -> Iterable[tuple[tuple, Any]]:
    if not isinstance(value, Mapping) or (is_leaf is not None and is_leaf(path, value)):
      yield path, value
      return
    if not value and keep_empty_nodes and path:
      yield path, empty_node
    for key, child in value.items():
      yield from walk((*path, key), child)

  return list(walk((), xs))


def unflatten_mapping(xs: Any, /, *, sep: str | None = None) -> dict[Any, Any]:
  """The nested mapping of one from paths to leaves.

  Args:
    xs: a flat mapping, or (path, leaf) pairs.
    sep: what joins the keys of a path, if these are strings.

  >>> unflatten_mapping({("a",): 1, ("b", "c"): 2})
  {'a': 1, 'b': {'c': 2}}
  """
  root: dict[Any, Any] = {}
  for path, value in xs.items() if isinstance(xs, Mapping) else xs:
    *above, last = path if sep is None else path.split(sep)
    node = root
    for key in above:
      node = node.setdefault(key, {})
    node[last] = {} if value is empty_node else value
  return root
