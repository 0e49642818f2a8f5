"""NNXMeta: a Variable as Linen keeps it, with type and metadata. Its import imports Flax."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import struct
from flax.core import FrozenDict, meta

from refax.core.annotation import PARTITION_NAME, named, spec_of
from refax.core.definition import Origin, VariableDef
from refax.core.variable import Variable
from refax.transforms.axis_names import add_axis, remove_axis


class NNXMeta(struct.PyTreeNode, meta.AxisMetadata):
  """The box in which Linen keeps the type and the metadata of a Variable.

  >>> from refax.compat import nnx
  >>> box = nnx.bridge.NNXMeta(nnx.Param, 1.0, {"out_sharding": ("embed",)})
  >>> box.get_partition_spec(), box.to_nnx_variable().out_sharding
  (P('embed',), ('embed',))
  """

  var_type: type[Variable] = struct.field(pytree_node=False)
  value: Any = struct.field(pytree_node=True)
  metadata: Mapping[str, Any] = struct.field(pytree_node=False)

  @classmethod
  def of(cls, kind: type[Variable], value: Any, metadata: Mapping[str, Any]) -> "NNXMeta":
    """A box whose metadata is hashable, so that it passes through `jax.jit`."""
    return cls(kind, value, FrozenDict(metadata))

  def unbox(self) -> Any:
    return self.value

  def replace_boxed(self, val: Any) -> "NNXMeta":
    return self.replace(value=val)

  def add_axis(self, index: int, params: dict[Any, Any]) -> "NNXMeta":
    return self._with_axis(add_axis, index, params)

  def remove_axis(self, index: int, params: dict[Any, Any]) -> "NNXMeta":
    return self._with_axis(remove_axis, index, params)

  def _with_axis(self, change: Any, index: int, params: dict[Any, Any]) -> "NNXMeta":
    if PARTITION_NAME not in params or not self.metadata.get("out_sharding"):
      return self
    # Not by a Variable of this value: it may have the axis already that the names lack.
    definition = VariableDef(named(self.metadata), Origin(self.var_type.__name__))
    variable = self.var_type._handle(self.value, definition)
    change(variable, index, params)
    return self.of(self.var_type, self.value, variable._def.metadata)

  def get_partition_spec(self) -> jax.sharding.PartitionSpec:
    """The PartitionSpec that the metadata says."""
    return spec_of(self.metadata) or jax.sharding.PartitionSpec()

  def to_nnx_variable(self) -> Variable:
    """The Variable that is in the box."""
    return self.var_type(self.value, **self.metadata)
