"""Changes of structure that a plain JAX transform loses, or does not see: a warning, once a place.

Two things cannot be made right, for JAX does not ask: what a function adds to an object that plain
`jax.jit` has rebuilt is gone when the function ends, and a function that plain `jax.jit` has
compiled goes on with the structure of the objects that it reached by closure.
"""

import warnings
from collections.abc import Iterable
from typing import Any

from refax import _jax
from refax.core import flatten as flatten_module
from refax.core import node as node_module
from refax.core import observe
from refax.core.definition import user_place
from refax.core.flatten import walk_nodes
from refax.core.node import Node, NodeState
from refax.errors import StructureWarning
from refax.typing import path_str

_told: set[tuple[str, int, str]] = set()
"""The places that have been warned about."""


def _warn(text: str, place: tuple[str, int]) -> None:
  key = (*place, text.split(":")[0])
  if key not in _told:
    _told.add(key)
    warnings.warn_explicit(text, StructureWarning, *place)


class Lost:
  """What was added to an object that JAX has rebuilt; it warns when the object goes with it."""

  __slots__ = ("kind", "places")

  def __init__(self, kind: str):
    self.kind = kind
    self.places: dict[Any, tuple[str, int]] = {}

  def __del__(self):
    for key, place in self.places.items():
      at = self.kind + ("[...]" if key is ... else path_str((key,)))
      _warn(StructureWarning.lost(at), place)


class Read:
  """A compiled function has read an object by closure, at a place in the user's code."""

  __slots__ = ("place",)

  def __init__(self, place: tuple[str, int]):
    self.place = place


def changed(node: Node, added: Iterable[Any], removed: Iterable[Any]) -> None:
  """The structure of a node changes now: data was added under some keys, others were removed."""
  state: NodeState = node._pytree
  if state.in_trace:
    lost = state.lost = state.lost or Lost(type(node).__name__)
    lost.places |= dict.fromkeys(added, user_place())
    for key in removed:
      lost.places.pop(key, None)
  read = state.read
  if read is not None and _jax.no_trace_active():
    for _, other in walk_nodes(_top(node)):
      other._pytree.read = None
    file, line = read.place
    text = StructureWarning.unseen(type(node).__name__, f"{file.rsplit('/', 1)[-1]}:{line}")
    _warn(text, user_place())


def handed_out(nodes: Iterable[Node]) -> None:
  """JAX takes these objects out of a trace: nothing of them is lost."""
  for node in nodes:
    if node._pytree.lost is not None:
      node._pytree.lost.places.clear()


def read_by_closure(variable: Any) -> None:
  """A trace that is none of Refax's own reads a Variable from outside it."""
  top = root_of(variable)
  if isinstance(top, Node) and top._pytree.read is None:
    mark = Read(user_place())
    for _, node in walk_nodes(top):
      node._pytree.read = mark


def root_of(variable: Any) -> Any:
  """The outermost object that a Variable is known to live in, or the Variable itself."""
  owner = variable._def.origin.owner
  node = None if owner is None else owner()
  return variable if node is None else _top(node)


def _top(node: Node) -> Node:
  seen: set[int] = set()
  while id(node) not in seen:
    seen.add(id(node))
    home = node._pytree.home[0]
    above = None if home is None else home()
    node = node if above is None else above
  return node


node_module.on_change = changed
flatten_module.on_handed_out = handed_out
observe.on_closure_read = read_by_closure
