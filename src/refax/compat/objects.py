"""Pytrees as Flax NNX has them besides: Object, types that are data, checks."""

from collections.abc import Iterator
from typing import Any, TypeVar

import jax

from refax.core import pytree as refax_pytree
from refax.core.flatten import walk_nodes
from refax.core.module import Module
from refax.core.node import Node
from refax.core.pytree import Pytree, is_data
from refax.errors import StaticAttributeError
from refax.typing import path_str

A = TypeVar("A")
M = TypeVar("M", bound=Module)


class Object(Pytree, pytree=False):
  """The older name of Pytree.

  >>> from refax.compat import nnx
  >>> issubclass(nnx.Object, nnx.Pytree)
  True
  """


def register_data_type(type_: Any, /) -> Any:
  """Let attributes of a type be data; also as a decorator.

  >>> import dataclasses, jax
  >>> @register_data_type
  ... @jax.tree_util.register_dataclass
  ... @dataclasses.dataclass
  ... class Point:
  ...   x: float
  >>> is_data(Point(1.0))
  True
  """
  refax_pytree.DATA_TYPES.add(type_)
  return type_


def has_data(value: Any, /) -> list[Any]:
  """The parts of a pytree that are data.

  >>> import jax.numpy as jnp
  >>> len(has_data({"a": 1, "b": jnp.zeros(2)}))
  1
  """
  return [x for x in jax.tree.leaves(value, is_leaf=is_data) if is_data(x)]


def check_pytree(pytree: Any) -> None:
  """Raise StaticAttributeError where an attribute that is static holds data.

  >>> from refax.compat import nnx
  >>> check_pytree(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
  """
  for path, node in walk_nodes(pytree):
    for key, value, dynamic in node._entries():
      if not dynamic and has_data(value):
        at = f"{type(pytree).__name__}{path_str((*path, key))}"
        raise StaticAttributeError.unhashable(at, value, "an array or a Variable")


def iter_module_children(module: Any, /, *, graph: Any = None) -> Iterator[tuple[Any, Module]]:
  """(key, child) of the Modules that are attributes of one.

  >>> from refax.compat import nnx
  >>> class Net(nnx.Module):
  ...   def __init__(self): self.drop = nnx.Dropout(0.5)
  >>> [key for key, _ in nnx.iter_module_children(Net())]
  ['drop']
  """
  return ((key, x) for key, x, _ in module._entries() if isinstance(x, Module))


def is_graph_node(x: Any) -> bool:
  """Whether a value is a Module or another Pytree of Refax."""
  return isinstance(x, Node)


def first_from(*args: Any, error_msg: str) -> Any:
  """The first that is not None; raises ValueError without any."""
  for arg in args:
    if arg is not None:
      return arg
  raise ValueError(error_msg)
