"""Each process reads its own rows of each batch, by grain; together they are one global array.

What a batch holds does not depend on the number of processes: the order, and what is random about
each example, is drawn for the whole batch, which costs a few integers; then each process reads the
examples that lie on its devices. So a run can go on with more or fewer processes.
"""

from collections.abc import Callable
from typing import NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding


class Source(NamedTuple):
  """Examples to draw from.

  Attributes:
    size: how many there are.
    read: from the indices of some, and three random integers for each, to arrays.
  """

  size: int
  read: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]


def batches(source: Source, size: int, sharding: NamedSharding, seed: int) -> grain.DatasetIterator:
  """Endless batches: of each one, the rows that this process has under the sharding.

  The iterator has `get_state` and `set_state`, so that a checkpoint can hold it.
  """
  rows = own_rows(size, sharding)
  return iter(
    grain.MapDataset.range(source.size)
    .seed(seed)
    .shuffle()
    .repeat()
    .random_map(lambda index, rng: {"index": index, "draw": rng.integers(0, 2**20, 3)})
    .batch(size)
    .map(lambda batch: source.read(batch["index"][rows], batch["draw"][rows]))
    .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
  )


def own_rows(size: int, sharding: NamedSharding) -> slice:
  """Which rows of a batch of this size lie on devices of this process."""
  slices = [index[0] for index in sharding.addressable_devices_indices_map((size,)).values()]
  starts, stops, _ = zip(*(s.indices(size) for s in slices), strict=True)
  return slice(min(starts), max(stops))


def assembled(
  local: dict[str, np.ndarray], size: int, sharding: NamedSharding
) -> dict[str, jax.Array]:
  """The batch as global arrays, of which each process gives its rows."""
  return {
    name: jax.make_array_from_process_local_data(sharding, x, (size, *x.shape[1:]))
    for name, x in local.items()
  }
