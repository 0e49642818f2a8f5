"""Picture: an array as treescope draws it, a heat map of its edges under a line of statistics.

Values are converted to numpy one array at a time, and a drawing holds at most `cells` of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refax.inspect.numbers import Numbers
from refax.typing import describe


def as_numpy(array: Any) -> np.ndarray | None:
  """The elements in a dtype that numpy knows; None for what is not drawn: keys, complex numbers."""
  if isinstance(array, jax.Array) and (array.is_deleted() or not array.is_fully_addressable):
    return None
  if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
    return None
  if array.dtype == np.bool_:
    return np.asarray(array)
  if jnp.issubdtype(array.dtype, jnp.integer):
    x = np.asarray(array)
    return x if x.dtype.kind in "iu" else x.astype(np.int32)  # int4
  if jnp.issubdtype(array.dtype, jnp.floating):
    x = np.asarray(array)
    return x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)  # bfloat16, float8
  return None


class Picture:
  """An array that draws itself.

  Args:
    array: of numpy or JAX.
    cells: how many elements the drawing may hold.
  """

  def __init__(self, array: Any, cells: int):
    self.array = array
    self.cells = cells
    self.numpy = as_numpy(array)

  def __treescope_ndarray_adapter__(self) -> Any:
    return _adapter()

  def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
    import treescope

    if self.numpy is None or self.numpy.size < 2:
      return _line(self.text(), path)
    draw = treescope.ArrayAutovisualizer(maximum_size=self.cells, edge_items=2)
    found: Any = draw(self, path)
    self.numpy = None  # one array at a time
    return _line(self.text(), path) if found is None else found.rendering

  def text(self) -> str:
    """What stands for an array that is not drawn: its type, and the value of a single number."""
    if isinstance(self.array, jax.Array) and self.array.is_deleted():
      return f"{describe(self.array)}, deleted"
    if self.numpy is None or self.numpy.size != 1:
      return describe(self.array)
    return f"{describe(self.array)} {self.numpy.reshape(-1)[0]}"

  def summary(self) -> str:
    """The line above the drawing, without the type."""
    assert self.numpy is not None
    if self.numpy.dtype == np.bool_:
      return f"{int(self.numpy.sum()):,} of {self.numpy.size:,} true"
    return str(Numbers.of(self.numpy))


def _line(text: str, path: str | None) -> Any:
  from treescope import rendering_parts as parts

  return parts.build_one_line_tree_node(parts.abbreviation_color(parts.text(text)), path=path)


def edges(x: np.ndarray, kept: tuple[int | None, ...]) -> tuple[np.ndarray, np.ndarray]:
  """The first and last elements of each axis with one between them, and a mask that is False there.

  >>> edges(np.arange(9), (2,))[0].tolist()
  [0, 1, 0, 7, 8]
  """
  index, valid = [], np.ones((), np.bool_)
  for size, n in zip(x.shape, kept, strict=True):
    positions = range(size) if n is None else [*range(n), 0, *range(size - n, size)]
    is_kept = np.ones(len(positions), np.bool_)
    if n is not None:
      is_kept[n] = False
    index.append(np.asarray(positions, np.intp))
    valid = valid[..., None] & is_kept
  return x[np.ix_(*index)], valid


def _adapter() -> Any:
  """How treescope reads a Picture. The class is made here: its base is treescope's."""
  from treescope import ndarray_adapters as adapters
  from treescope import rendering_parts as parts

  class Adapter(adapters.NDArrayAdapter):
    def get_axis_info_for_array_data(self, array: Picture) -> Any:
      return tuple(adapters.PositionalAxisInfo(*x) for x in enumerate(array.array.shape))

    def get_array_data_with_truncation(self, array: Picture, mask: Any, edge_items_per_axis: Any):
      assert array.numpy is not None
      values, valid = edges(array.numpy, edge_items_per_axis)
      return values, valid if mask is None else valid & mask

    def get_array_summary(self, array: Picture, fast: bool) -> Any:
      name = parts.text(describe(array.array))
      if fast:
        return name
      line = parts.text(f"  {array.summary()}")
      return parts.siblings(name, parts.abbreviatable(line, parts.empty_part()))

    def get_numpy_dtype(self, array: Picture) -> Any:
      return None if array.numpy is None else array.numpy.dtype

    def get_sharding_info_for_array_data(self, array: Picture) -> Any:
      sharding = getattr(array.array, "sharding", None)
      if sharding is None or len(sharding.device_set) < 2:
        return None
      shape = array.array.shape
      slices = sharding.devices_indices_map(shape).items()
      return adapters.ShardingInfo(
        shard_shape=sharding.shard_shape(shape),
        device_index_to_shard_slices={device.id: index for device, index in slices},
        device_type=next(iter(sharding.device_set)).platform.upper(),
        fully_replicated=sharding.is_fully_replicated,
      )

  return Adapter()
