"""to_hijax and to_lojax: an object with its Variables in the other kind of storage."""

from typing import Any

from refax.core.filters import Filter, to_predicate
from refax.core.flatten import Walk, unflatten
from refax.core.variable import Variable


def to_hijax(tree: Any, /, *, only: Filter = ...) -> Any:
  """A copy of an object whose Variables are `jax.Ref` cells of their own.

  Args:
    tree: a Module, Variable, State, or any pytree of these.
    only: which Variables; the others keep their storage.

  >>> from refax import nnx
  >>> with nnx.use_hijax(False):
  ...   model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  >>> nnx.to_hijax(model).kernel.is_hijax
  True
  """
  return _convert(tree, only, hijax=True)


def to_lojax(tree: Any, /, *, only: Filter = ...) -> Any:
  """A copy of an object whose Variables are plain arrays: the functional form.

  Args:
    tree: a Module, Variable, State, or any pytree of these.
    only: which Variables; the others keep their storage.

  >>> from refax import nnx
  >>> nnx.to_lojax(nnx.Linear(2, 3, rngs=nnx.Rngs(0))).kernel.is_hijax
  False
  """
  return _convert(tree, only, hijax=False)


def _convert(tree: Any, only: Filter, *, hijax: bool) -> Any:
  predicate, walk = to_predicate(only), Walk()
  graphdef = walk.graphdef(walk.entry(tree))
  leaves = [
    leaf.with_storage(hijax) if isinstance(leaf, Variable) and predicate(path, leaf) else leaf
    for path, leaf in zip(graphdef.paths, walk.leaves, strict=True)
  ]
  return unflatten(graphdef, leaves)[0]
