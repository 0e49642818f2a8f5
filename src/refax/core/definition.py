"""What is static about a Variable: its metadata, and where it comes from, for messages."""

import functools
import math
import os
import sys
import weakref
from typing import Any

import numpy as np

from refax.core.gather import GATHERED
from refax.errors import StaticAttributeError
from refax.typing import path_str

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep


def kind(value: Any) -> Any:
  """What equality overlooks in a static value: 1 == 1.0 == True and 0.0 == -0.0, in tuples too."""
  if isinstance(value, tuple):
    return (type(value), *map(kind, value))
  if isinstance(value, frozenset):
    return type(value), frozenset((kind(x), x) for x in value)
  return (type(value), math.copysign(1.0, value)) if type(value) in _SIGNED else type(value)


_SIGNED = frozenset((float, np.float16, np.float32, np.float64))


@functools.lru_cache(maxsize=1024)
def is_library(module: Any) -> bool:
  """Whether a module, by its name, is one that JAX programs stand on: no state of the user's."""
  return isinstance(module, str) and module.partition(".")[0] in _LIBRARIES


_LIBRARIES = frozenset(("builtins", "jax", "jaxlib", "numpy", "refax", "optax"))


def _user_frame() -> Any:
  """The innermost frame that is not of Refax itself."""
  frame = sys._getframe(1)
  inner = (_PACKAGE, "<frozen ")  # `<frozen _collections_abc>`: the methods of our List and Dict
  while frame.f_back is not None and frame.f_code.co_filename.startswith(inner):
    frame = frame.f_back
  return frame


def user_place() -> tuple[str, int]:
  """The file and line of the user's code that runs now."""
  frame = _user_frame()
  return frame.f_code.co_filename, frame.f_lineno


class Origin:
  """Where a Variable was created and where it lives in its model, for messages."""

  __slots__ = ("code", "kind", "line", "name", "owner")

  def __init__(self, kind: str):
    frame = _user_frame()
    self.kind = kind
    self.code = frame.f_code
    self.line = frame.f_lineno
    self.owner: weakref.ref | None = None
    self.name: Any = None

  def moved(self) -> "Origin":
    """The same place of creation, for a Variable that will live in another object."""
    new = object.__new__(Origin)
    new.kind, new.code, new.line, new.owner, new.name = self.kind, self.code, self.line, None, None
    return new

  def path(self) -> str:
    """The path from the root of the model, `Block.linear.kernel`, as far as it is known."""
    parts, owner, name = [], self.owner, self.name
    while owner is not None and (node := owner()) is not None and len(parts) < 32:
      parts.append(name)
      owner, name, root = *node._pytree.home, type(node).__name__
      if owner is None or owner() is None:
        return root + path_str(tuple(reversed(parts)))
    return path_str(tuple(reversed(parts))) or "(a Variable outside any Module)"

  def __str__(self) -> str:
    file = self.code.co_filename.rsplit("/", 1)[-1]
    return f"{self.path()}  ({self.kind}, created at {file}:{self.line})"


class Differentiation:
  """The time while a function is differentiated: what it selects cannot be written until the end.

  The mark ends by itself, for `jax.jit` hands out the definitions of a first trace later on.
  """

  __slots__ = ("_runs",)

  def __init__(self):
    self._runs = False

  def __enter__(self) -> "Differentiation":
    self._runs = True
    return self

  def __exit__(self, *_) -> None:
    self._runs = False

  def __bool__(self) -> bool:
    return self._runs


ELSEWHERE = {
  "hijax": "is_hijax=True or False chooses the storage",
  "ref": "is_hijax=True or False chooses the storage",
  "use_ref": "is_hijax=True or False chooses the storage",
  "use_hijax": "is_hijax=True or False chooses the storage",
  "mutable": "is_hijax=True or False chooses the storage",
  "dtype": "convert the array first: x.astype(dtype)",
}
"""Keywords that do something elsewhere; as metadata, they would do nothing and say nothing."""


class VariableDef:
  """The static half of a Variable: its metadata. Equality ignores what is only for messages.

  `selected` is true while the Variable is being differentiated, so that a write to it is an error
  even in a nested transform. It takes no part in equality either: inside a loss, the parameters
  must still `jax.tree.map` together with those of another model. Nor does `is_gradient`, which says
  that the Variable holds a gradient, and `hijax`, the storage that an abstract Variable will have.
  `attached` does: a detached type keeps gradients for once, and what JAX has traced where it drops
  them is not to be used.
  """

  __slots__ = (
    "_hash",
    "attached",
    "gathered",
    "hijax",
    "is_gradient",
    "items",
    "metadata",
    "origin",
    "selected",
  )

  def __init__(self, metadata: dict[str, Any], origin: Origin):
    for name, value in metadata.items():
      if name in ELSEWHERE:
        raise StaticAttributeError.option(origin.kind, name, value, ELSEWHERE[name])
      try:
        hash(value)
      except TypeError:
        raise StaticAttributeError.metadata(name, value) from None
    self.metadata = metadata
    self.items = tuple((k, kind(v), v) for k, v in sorted(metadata.items()))
    self._hash = hash(self.items)
    self.gathered: Any = metadata.get(GATHERED)
    self.origin = origin
    self.selected: Any = False
    self.attached = False
    self.is_gradient = False
    self.hijax = False

  def _like(self, origin: Origin) -> "VariableDef":
    new = object.__new__(VariableDef)
    new.metadata, new.items, new._hash = self.metadata, self.items, self._hash
    new.origin, new.selected, new.is_gradient = origin, False, self.is_gradient
    new.attached = False
    new.hijax, new.gathered = self.hijax, self.gathered
    return new

  def with_metadata(self, metadata: dict[str, Any]) -> "VariableDef":
    """The same Variable with other metadata."""
    new = VariableDef(metadata, self.origin)
    new.selected, new.is_gradient, new.hijax = self.selected, self.is_gradient, self.hijax
    new.attached = self.attached
    return new

  def as_selected(self, differentiation: Differentiation) -> "VariableDef":
    """The same, for a Variable that is being differentiated."""
    new = self._like(self.origin)
    new.selected = differentiation
    return new

  def as_attached(self) -> "VariableDef":
    """The same, for a Variable through which gradients flow, whatever its type."""
    new = self._like(self.origin)
    new.selected, new.attached = self.selected, True
    return new

  def as_gradient(self) -> "VariableDef":
    """The same, for the gradient of a Variable."""
    new = self._like(self.origin.moved())
    new.is_gradient, new.hijax = True, False
    return new

  def elsewhere(self, hijax: bool | None = None) -> "VariableDef":
    """The same, for a Variable with a cell of its own in another object, and of this storage."""
    new = self._like(self.origin.moved())
    new.hijax = self.hijax if hijax is None else hijax
    return new

  def __hash__(self) -> int:
    return self._hash

  def __eq__(self, other) -> bool:
    if self is other:
      return True
    same = isinstance(other, VariableDef) and self.items == other.items
    return same and self.attached is other.attached

  def __repr__(self) -> str:
    return f"VariableDef({self.metadata})"
