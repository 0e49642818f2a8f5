"""StateSharding: shardings for `nnx.jit` by filter."""

from collections.abc import Mapping
from typing import Any

from refax.transforms.axes import StateAxes


class StateSharding(StateAxes):
  """A sharding for each filter: how the Variables of one argument of `nnx.jit` are laid out.

  >>> from refax.compat import nnx
  >>> nnx.StateSharding({nnx.Param: None, ...: None}).shardings
  (None, None)
  """

  def __init__(self, shardings: Any, /):
    pairs = isinstance(shardings, Mapping | StateAxes)
    super().__init__(shardings if pairs else dict(shardings))

  @property
  def filters(self) -> tuple:
    """The filters."""
    return tuple(filter for filter, _ in self.items)

  @property
  def shardings(self) -> tuple:
    """The sharding of each."""
    return tuple(sharding for _, sharding in self.items)

  def map_prefix(self, path: Any, variable: Any) -> Any:
    """The sharding of a Variable."""
    return self.axis(path, variable)
