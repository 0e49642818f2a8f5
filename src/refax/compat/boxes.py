"""Collections of Linen and Variables: `{"params": {"kernel": x}}` and `{"kernel": Param(x)}`.

Linen sorts its variables by collection and keeps what is known of one in a box around it; Flax NNX
has a type of Variable for each collection, and metadata.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from refax.compat import variables
from refax.compat.variables import (
  HOOKS,
  Hooked,
  variable_name_from_type,
  variable_type_from_name,
)
from refax.core.variable import Variable

_BOX = "linen_meta_type"


def flat(tree: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
  """(path, leaf) of nested mappings, empty ones left out."""
  if not isinstance(tree, Mapping):
    yield path, tree
    return
  for key, value in tree.items():
    yield from flat(value, (*path, key))


def nested(items: Mapping[tuple, Any]) -> dict[Any, Any]:
  """Nested dicts of {path: leaf}."""
  found: dict[Any, Any] = {}
  for path, leaf in items.items():
    at = found
    for key in path[:-1]:
      at = at.setdefault(key, {})
    at[path[-1]] = leaf
  return found


def is_box(x: Any) -> bool:
  """Whether a value is boxed as Linen does it; there is no box before Flax has been imported."""
  meta = sys.modules.get("flax.core.meta")
  return meta is not None and isinstance(x, meta.AxisMetadata)


def unboxed(x: Any) -> Any:
  """The value in a box, or the value."""
  return x.unbox() if is_box(x) else x


def kind_of(variable: Variable) -> type[Variable]:
  """The type of a Variable as its author knows it, without the mixin for hooks."""
  cls = type(variable)
  return cls.__bases__[1] if cls.__bases__[0] is Hooked else cls


def sort_variable_types(types: Iterable[type[Variable]]) -> list[type[Variable]]:
  """Types of Variables, those that are derived from others first.

  >>> from refax.compat import nnx
  >>> [x.__name__ for x in sort_variable_types([nnx.Variable, nnx.LoRAParam, nnx.Param])]
  ['LoRAParam', 'Param', 'Variable']
  """
  return sorted(types, key=lambda t: -sum(issubclass(x, Variable) for x in t.__mro__))


def collection_of(variable: Variable, *, allow_register: bool = False) -> str:
  """The name of the collection that a Variable belongs to."""
  return variable_name_from_type(kind_of(variable), allow_register=allow_register)


def is_vanilla_variable(variable: Variable) -> bool:
  """Whether nothing is known of a Variable that Linen would need a box for.

  >>> from refax.compat import nnx
  >>> is_vanilla_variable(nnx.Param(1.0)), is_vanilla_variable(nnx.Param(1.0, tag="a"))
  (True, False)
  """
  return all(k in HOOKS and not v for k, v in variable._def.metadata.items())


def to_linen_var(variable: Variable) -> Any:
  """What Linen keeps for a Variable: its value, in a box if there is metadata.

  >>> from refax.compat import nnx
  >>> to_linen_var(nnx.Param(1.0)).item()
  1.0
  """
  value, metadata = variable.get_value(), dict(variable._def.metadata)
  box = metadata.pop(_BOX, None)
  if box is not None:
    if hasattr(box, "from_nnx_metadata"):
      return box.from_nnx_metadata({"value": value} | metadata)
    return box(value, **metadata)
  if is_vanilla_variable(variable):
    return value
  from refax.compat.meta_box import NNXMeta

  return NNXMeta.of(kind_of(variable), value, metadata)


def to_nnx_var(collection: str, x: Any) -> Variable:
  """The Variable for a value of a collection, or for a box of Linen's.

  >>> to_nnx_var("batch_stats", 1.0)
  BatchStat(...)
  """
  if hasattr(x, "to_nnx_variable"):
    return x.to_nnx_variable()
  cls = variable_type_from_name(collection, allow_register=True)
  if not is_box(x):
    return cls(x)
  metadata = dict(vars(x))
  for old, new in (("names", "out_sharding"), ("rules", "sharding_rules")):
    if old in metadata:
      metadata[new] = metadata.pop(old)
  return cls(metadata.pop("value"), **{_BOX: type(x)}, **metadata)


def linen_vars_to_nnx_attrs(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Variables at the paths where Linen has its values, without the collections.

  Args:
    variables: `{collection: nested values}`, as `init` of Linen returns it.

  Raises:
    ValueError: two collections have a value at the same path.

  >>> linen_vars_to_nnx_attrs({"params": {"dense": {"bias": 0.0}}, "batch_stats": {"mean": 1.0}})
  {'dense': {'bias': Param(...)}, 'mean': BatchStat(...)}
  """
  found: dict[tuple, Variable] = {}
  for collection, values in variables.items():
    for path, value in flat(values):
      if path in found:
        raise ValueError(
          f"two variables of the Linen module have the path {'/'.join(map(str, path))}: one of the "
          f"collection {collection_of(found[path])!r}, one of {collection!r}\n"
          "  fix: name one of them differently, for an object has one attribute of a name"
        )
      found[path] = to_nnx_var(collection, value)
  return nested(found)


def nnx_attrs_to_linen_vars(nnx_attrs: Mapping[str, Any]) -> dict[str, Any]:
  """Collections of Linen's for nested dicts of Variables: the inverse of `linen_vars_to_nnx_attrs`.

  Raises:
    ValueError: a leaf is no Variable, or its type has no name.

  >>> from refax.compat import nnx
  >>> nnx_attrs_to_linen_vars({"dense": {"bias": nnx.Param(0.0)}})
  {'params': {'dense': {'bias': Array(0., dtype=float32...)}}}
  """
  found = {}
  for path, variable in flat(nnx_attrs):
    if not isinstance(variable, Variable):
      raise ValueError(
        f"{'/'.join(map(str, path))} belongs to no collection of Linen\n"
        f"  got: {type(variable).__name__}\n"
        "  fix: make it a Variable: its type names the collection"
      )
    found[collection_of(variable), *path] = to_linen_var(variable)
  return nested(found)


def with_partitioning(fn: Callable[..., Any], names: Any, mesh: Any = None) -> Callable[..., Any]:
  """`nnx.with_partitioning` whose values are boxed in `linen.Partitioned` for Linen."""
  from flax.core import meta

  return variables.with_partitioning(fn, names, mesh, **{_BOX: meta.Partitioned})
