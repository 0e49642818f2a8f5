"""to_hijax, to_lojax and pure: a copy of an object whose state is kept in another way."""

import functools
from typing import Any

import jax
from jax.sharding import NamedSharding

from refax.core.annotation import mesh_of, spec_of
from refax.core.filters import Filter, to_predicate
from refax.core.flatten import flatten
from refax.core.rebuild import unflatten
from refax.core.variable import Variable, replaced
from refax.core.write import copied, values_at_once


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


def pure(tree: Any, /) -> Any:
  """A copy of an object with an array in the place of each Variable: its value.

  No later step changes these arrays. What is written for pytrees of arrays (`optax.global_norm`,
  `jax.tree.map` with arithmetic, `jax.flatten_util.ravel_pytree`) takes them, where the Refs of
  hijax Variables would be no arrays. A Variable that is reached at two places of a Module is two
  arrays; a State has it once.

  Args:
    tree: a Module, Variable, State, or any pytree of these.

  >>> from refax import nnx; import jax, optax
  >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  >>> optax.global_norm(nnx.pure(nnx.state(model, nnx.Param))).shape
  ()
  >>> float(abs(jax.tree.map(lambda x: x * 0, nnx.pure(model)).kernel).sum())
  0.0
  """
  flat = flatten(tree)
  return unflatten(flat.graphdef, values_at_once(flat.leaves))[0]


as_pure = pure


def as_abstract(tree: Any, /) -> Any:
  """A copy of an object with a `jax.ShapeDtypeStruct` in place of each array of its Variables.

  A Variable with the metadata `out_sharding` gets the sharding that it says, on its `mesh` or on
  that of `jax.set_mesh`; else the type has the sharding of the array.

  Args:
    tree: a Module, Variable, State, or any pytree of these; it may be abstract already.

  >>> from refax import nnx
  >>> nnx.as_abstract(nnx.Linear(2, 3, rngs=nnx.Rngs(0))).kernel[...].shape
  (2, 3)
  """
  flat = flatten(tree)
  leaves = [_abstract(x) if isinstance(x, Variable) else x for x in flat.leaves]
  return unflatten(flat.graphdef, leaves)[0]


def _abstract(v: Variable) -> Variable:
  spec = spec_of(v._def.metadata, v._def.origin)
  mesh = None if spec is None else mesh_of(v._def.metadata)

  def struct(x: Any) -> Any:
    if not isinstance(x, jax.Array | jax.Ref | jax.ShapeDtypeStruct):
      return x
    sharding = x.sharding
    if spec is not None and mesh is not None:
      sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return v._handle(jax.tree.map(struct, v.get_raw_value()), v._def.elsewhere(v.is_hijax))


def _convert(tree: Any, only: Filter, *, hijax: bool) -> Any:
  predicate, flat = to_predicate(only), flatten(tree)
  copies = functools.partial(copied, hijax=hijax)
  leaves = replaced(flat.leaves, copies, lambda i, v: predicate(flat.graphdef.paths[i], v))
  return unflatten(flat.graphdef, leaves)[0]
