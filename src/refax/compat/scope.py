"""Which `bridge.Module` runs, and what it has of its call; the innermost is the parent."""

import collections
import dataclasses
import enum
import inspect
import threading
from collections.abc import Callable
from typing import Any

from refax.core.module import Module
from refax.core.pytree import Pytree
from refax.rngs import Rngs


class AttrPriority(enum.IntEnum):
  """Which of several names of an object is that of its variables: the lowest."""

  HIGH = 0
  INIT_PARENT = 20
  DEFAULT = 50
  LOW = 100


class Scope(Pytree):
  """What a Module that runs has of the call: random streams, and which collections it may write."""

  def __init__(self, rngs: Rngs, mutable: Any):
    self.rngs = rngs
    self.mutable = mutable

  def copy(self) -> "Scope":
    """The same of another Module."""
    return Scope(self.rngs, self.mutable)


@dataclasses.dataclass
class ModuleStackEntry:
  """A Module whose method runs now."""

  module: Any
  in_compact: bool
  type_counter: collections.Counter = dataclasses.field(default_factory=collections.Counter)


class ModuleContext(threading.local):
  """The Modules whose methods run now, in one thread; the innermost is the last."""

  def __init__(self):
    self.module_stack: list[ModuleStackEntry | None] = [None]

  def run(self, module: Any, f: Callable[[], Any], *, in_compact: bool = False) -> Any:
    """Call a function as part of a Module."""
    self.module_stack.append(ModuleStackEntry(module, in_compact))
    try:
      return f()
    finally:
      self.module_stack.pop()


MODULE_CONTEXT = ModuleContext()


def current_context() -> ModuleStackEntry | None:
  """The innermost entry of the stack of Modules."""
  return MODULE_CONTEXT.module_stack[-1]


def current_module() -> Any:
  """The `bridge.Module` whose method runs now, or None."""
  entry = current_context()
  return None if entry is None else entry.module


def next_name(entry: ModuleStackEntry, cls: type) -> str:
  """The name of the next Module of a class in a compact method: `Dense_0`, `Dense_1`."""
  entry.type_counter[cls] += 1
  return f"{cls.__name__}_{entry.type_counter[cls] - 1}"


class ModuleMeta(type(Module)):
  """A Module that is made while a method of another runs becomes an attribute of that one."""

  def __call__(cls, *args: Any, **kwargs: Any) -> Any:
    entry = current_context()
    if entry is None:
      return super().__call__(*args, **kwargs)
    parent = kwargs.pop("parent", entry.module)
    if entry.in_compact and parent not in (None, entry.module):
      raise ValueError(f"parent is None or left out in a compact method\n  got: {parent!r}")
    name = kwargs.get("name")
    if "name" in kwargs:
      if not isinstance(name, str):
        raise ValueError(f"the name of a Module is a string\n  got: {name!r}")
      if not any("name" in inspect.get_annotations(base) for base in cls.__mro__):
        del kwargs["name"]
    elif entry.in_compact and parent is not None:
      name = next_name(entry, cls)
    module = super().__call__(*args, **kwargs)
    if parent is not None and name is not None:
      parent.set_attr_priority(name, AttrPriority.INIT_PARENT)
      setattr(parent, name, module)
    return module
