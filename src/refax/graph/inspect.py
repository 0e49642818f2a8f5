"""Looking at an object: what is in it, what is shared, and a copy with every leaf mapped."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from refax.core.filters import Filter, to_predicate
from refax.core.flatten import Walk, flatten, region_items, walk_graph, walk_nodes
from refax.core.module import Module
from refax.core.node import Node
from refax.core.rebuild import unflatten
from refax.core.variable import Variable
from refax.graph.split import clone, set_entry
from refax.typing import Key, Path


def iter_graph(node: Any, /) -> Iterator[tuple[Path, Any]]:
  """(path, value) of everything in an object, children before parents, shared things once.

  >>> from refax import nnx
  >>> [p for p, v in nnx.iter_graph(nnx.Dropout(0.5)) if isinstance(v, float)]
  [('rate',)]
  """
  return walk_graph(node)


def iter_modules(module: Any, /) -> Iterator[tuple[Path, Module]]:
  """(path, Module) of every Module in an object and itself, children before parents.

  >>> from refax import nnx
  >>> model = nnx.Sequential(nnx.Linear(1, 2, rngs=nnx.Rngs(0)))
  >>> [(path, type(m).__name__) for path, m in nnx.iter_modules(model)]
  [(('layers', 0), 'Linear'), (('layers',), 'List'), ((), 'Sequential')]
  """
  return ((path, node) for path, node in walk_nodes(module) if isinstance(node, Module))


def iter_children(node: Node, /) -> Iterator[tuple[Key, Any]]:
  """(key, child) of the Pytrees and Variables that are attributes of an object.

  >>> from refax import nnx
  >>> [key for key, _ in nnx.iter_children(nnx.Linear(1, 2, rngs=nnx.Rngs(0)))]
  ['bias', 'kernel']
  """
  return ((key, x) for key, x, _ in node._entries() if isinstance(x, Node | Variable))


def find_duplicates(node: Any, /, *, only: Filter = ...) -> list[list[Path]]:
  """The paths of each Variable or Pytree that is reached in several places.

  Sharing inside one object needs no care: it just works. Two arguments of a plain `jax.jit`
  must not share.

  Args:
    node: any pytree of Modules and Variables.
    only: a filter on (path, value) of what is looked at.

  Returns:
    A list of paths for each thing that is shared.

  >>> from refax import nnx
  >>> class Tied(nnx.Pytree):
  ...   def __init__(self):
  ...     self.a = nnx.Variable(0); self.b = self.a
  >>> nnx.find_duplicates(Tied())
  [[('a',), ('b',)]]
  """
  predicate, walk = to_predicate(only), Walk()
  graphdef = walk.graphdef(walk.entry(node))
  places: dict[tuple, list[Path]] = {}
  for path, entry in graphdef.walk():
    value = walk.value(entry)
    if isinstance(value, Node | Variable) and predicate(path, value):
      places.setdefault(entry, []).append(path)
  return [paths for paths in places.values() if len(paths) > 1]


def map(fn: Callable[[Path, Any], Any], node: Any, /) -> Any:
  """A copy of an object with `fn(path, leaf)` in place of each Variable and array.

  >>> from refax import nnx
  >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  >>> nnx.map(lambda path, v: v.shape, model).kernel
  (2, 3)
  """
  flat = flatten(node)
  leaves = [fn(path, leaf) for path, leaf in zip(flat.graphdef.paths, flat.leaves, strict=True)]
  return unflatten(flat.graphdef, leaves)[0]


def recursive_map(fn: Callable[[Path, Any], Any], node: Any, /) -> Any:
  """A copy of an object on the same Variables, with `fn(path, value)` in place of each value.

  Children come before their parents, and what is shared once. Static attributes are values too.

  Args:
    fn: from a path and a Module, Variable, array or other value there to what takes its place.
    node: a Module, or any pytree of these.

  >>> from refax import nnx
  >>> model = nnx.Sequential(nnx.Dropout(0.5))
  >>> def halved(path, x):
  ...   if isinstance(x, nnx.Dropout):
  ...     x.rate = x.rate / 2
  ...   return x
  >>> nnx.recursive_map(halved, model).layers[0].rate, model.layers[0].rate
  (0.25, 0.5)
  """
  return _mapped(fn, (), clone(node, variables=False), {})


def _mapped(fn: Callable[[Path, Any], Any], path: Path, value: Any, done: dict[int, Any]) -> Any:
  if id(value) in done:
    return done[id(value)][1]
  if isinstance(value, Node):
    done[id(value)] = (value, value)  # for a cycle
    for key, child, is_data in list(value._entries()):
      at = (*path, key)
      new = _mapped(fn, at, child, done) if is_data else fn(at, child)
      if new is not child:
        set_entry(value, key, new)
    new = fn(path, value)
  elif isinstance(value, Variable):
    new = fn(path, value)
  else:
    is_leaf = lambda x: isinstance(x, Node | Variable)
    leaves, treedef = jax.tree.flatten(value, is_leaf=is_leaf)
    if not (len(leaves) == 1 and leaves[0] is value):
      steps = [keys for keys, _ in region_items(value)]
      inner = [_mapped(fn, path + at, x, done) for at, x in zip(steps, leaves, strict=True)]
      value = treedef.unflatten(inner)
    return fn(path, value)
  done[id(value)] = (value, new)
  return new


def set_metadata(node: Any, /, *, only: Filter = Variable, **metadata: Any) -> None:
  """Set metadata of the Variables of an object, in place.

  Args:
    node: a Module, or any pytree of these.
    only: which Variables.
    **metadata: facts and their values.

  >>> from refax import nnx
  >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  >>> nnx.set_metadata(model, frozen=True, only=nnx.PathContains("bias"))
  >>> model.bias.frozen, model.kernel.has_metadata("frozen")
  (True, False)
  """
  predicate, flat = to_predicate(only), flatten(node)
  for path, leaf in zip(flat.graphdef.paths, flat.leaves, strict=True):
    if isinstance(leaf, Variable) and predicate(path, leaf):
      leaf.set_metadata(**metadata)
