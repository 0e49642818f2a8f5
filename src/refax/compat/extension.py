"""What Variables, Modules and axes of Refax have besides, in a process that uses `refax.compat`.

Code that was written for Flax NNX calls methods on the objects themselves, so the classes get them.
"""

from collections.abc import Iterable
from typing import Any

from refax import config
from refax.compat import capture, objects, variables
from refax.compat.flags import without_flags
from refax.core import definition
from refax.core.graphdef import GraphDef
from refax.core.module import Module
from refax.core.variable import Variable
from refax.graph.inspect import iter_modules
from refax.graph.state import FlatState, State, from_flat_state, partition
from refax.transforms.axes import StateAxes

_OF_AXES = {
  "filters": property(lambda self: tuple(filter for filter, _ in self.items)),
  "axes": property(lambda self: tuple(axis for _, axis in self.items)),
  "map_prefix": lambda self, path, variable: self.axis(path, variable),
}

_OF_STATES = {
  "from_flat_path": classmethod(lambda cls, flat: from_flat_state(flat)),
  "raw_mapping": property(lambda self: dict(self.items())),
}


def _flat_parts(flat: FlatState, filters: tuple, *, exhaustive: bool) -> Any:
  parts = partition(flat, filters, exhaustive=exhaustive)
  found = tuple(map(FlatState, parts))
  return found[0] if len(found) == 1 else found


def _merged_flat(*flats: Iterable[tuple]) -> FlatState:
  return FlatState(sorted(pair for flat in flats for pair in flat))


_OF_FLAT_STATES = {
  "filter": lambda self, *filters: _flat_parts(self, filters, exhaustive=False),
  "split": lambda self, *filters: _flat_parts(self, filters, exhaustive=True),
  "merge": staticmethod(_merged_flat),
  "from_sorted_keys_values": classmethod(
    lambda _, keys, values: FlatState(zip(keys, values, strict=True))
  ),
  "to_nested_state": lambda self: from_flat_state(self),
}

_OF_MODULES = {
  "iter_children": lambda self: objects.iter_module_children(self),
  "iter_modules": lambda self: iter_modules(self),
}

_ATTRIBUTES: dict[type, dict[str, Any]] = {
  Variable: variables.ADDED | {"accept": staticmethod(variables.accept), "is_lenient": True},
  State: _OF_STATES,
  FlatState: _OF_FLAT_STATES,
  GraphDef: {"num_leaves": property(lambda self: self.leaf_count)},
  Module: capture.ADDED
  | _OF_MODULES
  | {name: without_flags(getattr(Module, name)) for name in ("set_attributes", "train", "eval")},
  StateAxes: _OF_AXES,
}

# Metadata that Refax itself refuses, for it would do nothing there.
_METADATA = variables.STORAGE

_before: list[tuple[type, str, Any]] = []
_refused: dict[str, Any] = {}


def extend() -> None:
  """Give the classes what Flax's have, and let new Variables be lojax, in this process."""
  if _before:
    return
  config.set_default(False)
  for cls, attributes in _ATTRIBUTES.items():
    for name, value in attributes.items():
      _before.append((cls, name, vars(cls).get(name, _before)))
      setattr(cls, name, value)
  _refused.update(
    {name: definition.ELSEWHERE.pop(name) for name in _METADATA if name in definition.ELSEWHERE}
  )


def retract() -> None:
  """Undo `extend`, for tests that go on without it."""
  for cls, name, old in reversed(_before):
    delattr(cls, name) if old is _before else setattr(cls, name, old)
  _before.clear()
  definition.ELSEWHERE.update(_refused)
  _refused.clear()
  config.set_default(True)
