"""save_safetensors and load_safetensors: the arrays of an object in one file, by name.

The format is that of the `safetensors` package, which torch, NumPy and others read and write; the
file itself is the business of `tensor_file.py`, several files that of `shards.py`; names are that
of `slots.py` and `rename.py`, what fits that of `plan.py`, reading that of `load.py`. What the
format cannot say is in the metadata of the file: which tensors are PRNG keys, and which names stand
for a tensor that has another one.
"""

import json
import operator
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from refax import _jax
from refax.core.filters import Filter
from refax.errors import InvalidArgumentError
from refax.io.keys import as_data, implementation, is_key
from refax.io.load import LoadReport, Progress, load
from refax.io.plan import ALIASES, KEYS, on_host
from refax.io.rename import Rename
from refax.io.shards import reading_all
from refax.io.slots import Slot, slots_of
from refax.io.snapshot import snapshot
from refax.io.tensor_file import NAMES, order, write


def save_safetensors(
  tree: Any,
  path: str | os.PathLike[str],
  *,
  only: Filter = ...,
  metadata: Mapping[str, str] | None = None,
  sep: str = ".",
) -> None:
  """Write the Variables of an object to a safetensors file, which other libraries read too.

  A tensor is named by the path to its Variable. What several paths lead to is stored once, under
  the first; the metadata has the other names. Typed PRNG keys are stored as their data, with the
  name of their implementation in the metadata. The file appears when it is complete: a kill or a
  full disk leaves an old file of this name as it was.

  Args:
    tree: a Module, State, or any pytree of Variables, arrays and numbers.
    path: the file.
    only: which Variables to store.
    metadata: facts to keep with them, text by text; `nnx.load_safetensors(...).metadata` has them.
    sep: what stands between the steps of a path.

  Raises:
    InvalidArgumentError: something is no array, has a dtype that the format has not, or shares its
      name with another; the metadata is not text. Nothing has been written.
    OSError: the folder does not exist, the disk is full; an old file is whole.
    CheckpointWriteError: an OSError, other threads wrote the Variables without a pause.

  >>> from refax import nnx; import os, tempfile
  >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
  >>> nnx.save_safetensors(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), path, metadata={"step": "7"})
  >>> from safetensors import numpy
  >>> {name: x.shape for name, x in sorted(numpy.load_file(path).items())}
  {'bias': (3,), 'kernel': (2, 3)}
  """
  slots = slots_of("save_safetensors", tree, only, sep)
  stored: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
  keys: dict[str, str] = {}
  by_name = {slot.name: slot for slot in slots.selected}
  for name, slot in by_name.items():
    dtype = slot.dtype
    if dtype not in NAMES and is_key(slot) and not isinstance(slot.cell, jax.ShapeDtypeStruct):
      key = slot.read()
      keys[name] = str(implementation(key))
      data = as_data(key)
      stored[name] = _stored_as(name, slot, data.dtype, data.shape)
    else:
      stored[name] = _stored_as(name, slot, dtype, slot.shape)
  aliases = {name: slot.name for name, slot in slots.by_name.items() if name != slot.name}
  texts = _texts(metadata, aliases, keys)
  stored = order(stored)
  try:
    write(path, stored, _one_by_one(by_name, list(stored)), texts)
  except _MovedError:
    live = snapshot("save_safetensors", slots.selected)
    write(path, stored, ((name, on_host(live[name])) for name in stored), texts)


class _MovedError(Exception):
  """Another thread has written a Variable while the file was written."""


def _one_by_one(slots: dict[str, Slot], names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
  """The tensors, one in memory at a time, all of one moment.

  Raises:
    _MovedError: they are not. Only then is it worth the memory to copy them all at once.
  """
  refs = [slot.cell for slot in slots.values() if _jax.is_ref(slot.cell)]
  refs = refs if _jax.no_trace_active() else []
  before = list(map(_jax.peek_cell, refs))
  moved = lambda: not all(map(operator.is_, before, map(_jax.peek_cell, refs)))
  buffers = {id(ref): buffer for ref, buffer in zip(refs, before, strict=True)}
  on_cpu: dict[Any, bool] = {}
  for name in names:
    slot = slots[name]
    try:
      x = _view(buffers.get(id(slot.cell)), on_cpu)
      x = on_host(slot.read()) if x is None else x
    except Exception as error:
      if moved():
        raise _MovedError from error
      raise
    yield name, x
  if moved():
    raise _MovedError


def _view(buffer: jax.Array | None, on_cpu: dict[Any, bool]) -> np.ndarray | None:
  """The buffer of a Ref as an array of the host, uncopied; None where that cannot be.

  On a CPU it is a view: as long as that lives, JAX donates no memory of it. Elsewhere, JAX would
  keep the copy on the host with the buffer. `on_cpu` is what is known of shardings.
  """
  if buffer is None:
    return None
  sharding = buffer.sharding
  if sharding not in on_cpu:
    devices = sharding.device_set
    on_cpu[sharding] = len(devices) == 1 and all(device.platform == "cpu" for device in devices)
  if not on_cpu[sharding] or not isinstance(buffer.dtype, np.dtype):
    return None  # of typed keys, a file has the bits
  try:
    return np.asarray(buffer)
  except RuntimeError:  # another thread donates it
    return None


def _stored_as(
  name: str, slot: Slot, dtype: Any, shape: tuple[int, ...]
) -> tuple[np.dtype, tuple[int, ...]]:
  """The dtype and shape in the file."""
  if isinstance(slot.cell, jax.ShapeDtypeStruct):
    want = "a model with values; this one is abstract"
    raise InvalidArgumentError.value("save_safetensors", name, slot.cell, want)
  if dtype not in NAMES:
    want = f"one of {', '.join(map(str, NAMES))}; only=... leaves a Variable out"
    raise InvalidArgumentError.value("save_safetensors", f"dtype of {name}", dtype, want)
  if name == "__metadata__":
    want = "a model without this name, the format keeps it for itself"
    raise InvalidArgumentError.value("save_safetensors", "name", name, want)
  return np.dtype(dtype), tuple(shape)


def _texts(metadata: Any, aliases: dict[str, str], keys: dict[str, str]) -> dict[str, str]:
  metadata = {} if metadata is None else metadata
  text = isinstance(metadata, Mapping) and all(isinstance(x, str) for x in metadata)
  if not text or not all(isinstance(x, str) for x in metadata.values()):
    raise InvalidArgumentError.value("save_safetensors", "metadata", metadata, "a dict of str")
  if any(name in (ALIASES, KEYS) for name in metadata):
    want = f"other names than {ALIASES!r} and {KEYS!r}, which Refax writes itself"
    raise InvalidArgumentError.value("save_safetensors", "metadata", dict(metadata), want)
  own = {ALIASES: aliases, KEYS: keys}
  return dict(metadata) | {name: json.dumps(value) for name, value in own.items() if value}


def load_safetensors(
  tree: Any,
  path: str | os.PathLike[str],
  *,
  rename: Rename | None = None,
  only: Filter = ...,
  strict: bool = True,
  cast: bool = False,
  sep: str = ".",
  progress: Progress | None = None,
) -> LoadReport:
  r"""Read safetensors, in one file or several, into a live model: Variables are written, in place.

  Each Variable keeps its identity, sharing, kind of storage and sharding. Everything is checked
  before the first write: a file that is damaged, or that does not fit, leaves the model as it was.
  (What cannot be checked before is a disk that fails while it is read, or a function in `rename`
  that is right for zeros only; `with nnx.transaction(model):` undoes that too, for twice the
  memory.) Beside the model, there is at most one Variable on the host and one on the device. An
  abstract model (`nnx.eval_shape`), which takes no memory before, gets Variables of the storage
  that it would have had.

  A name in the model may have an index behind it: `blocks.layers.kernel[3]` is what the Variable of
  a `nnx.Stack` holds of layer 3. So a file with one tensor for each layer fills a Stack.

  Args:
    tree: a Module, State, or any pytree of Variables, arrays and numbers.
    path: the file; or a folder with `model.safetensors`, or with several files and
      `model.safetensors.index.json`, which says what is in which; or such an index.
    rename: from names in the file to names in the model. A dict of regular expressions, each for a
      whole name, to replacements; they are applied in order, one to the result of the other. Or a
      function of a name. Either gives a name, or `(name, function of the array)`, or a list of
      these for what goes to several places, or None for what is not wanted. A function is called
      twice, first with zeros. `nnx.torch_layout` makes the `rename` for models of torch.
    only: which Variables to load; what the file has for others is passed over.
    strict: whether missing and unexpected names are errors.
    cast: whether floats become the floats of the Variable: float32 to bfloat16, for example.
    sep: what stands between the steps of a path.
    progress: what goes through the list of what is read and shows how far it is: `tqdm.tqdm`.

  Returns:
    A report with `loaded`, `missing`, `unexpected`, `aliases` and `metadata`.

  Raises:
    CheckpointMismatchError: names, shapes or dtypes differ; a table says which.
    CheckpointFormatError: a file is damaged, or the index contradicts the files.
    InvalidArgumentError: `rename` makes no sense, or two Variables have one name.

  torch's linear layers hold `weight` as [out, in]; an attention projection here maps to [heads,
  head_dim]:

  >>> from refax import nnx; import numpy as np, os, tempfile
  >>> from safetensors.numpy import save_file
  >>> path = os.path.join(tempfile.mkdtemp(), "torch.safetensors")
  >>> save_file({
  ...   "model.q_proj.weight": np.ones((8, 6), "f"), "model.q_proj.bias": np.ones(8, "f"),
  ...   "model.out.weight": np.ones((5, 6), "f"), "model.out.bias": np.ones(5, "f")}, path)
  >>> class Net(nnx.Module):
  ...   def __init__(self, rngs):
  ...     self.query = nnx.LinearGeneral(6, (2, 4), rngs=rngs)
  ...     self.out = nnx.Linear(6, 5, rngs=rngs)
  >>> model = Net(nnx.Rngs(0))
  >>> nnx.load_safetensors(model, path, rename={
  ...   r"model\.(.*)": r"\1",
  ...   r"q_proj\.weight": ("query.kernel", lambda w: w.T.reshape(6, 2, 4)),
  ...   r"q_proj\.bias": ("query.bias", lambda b: b.reshape(2, 4)),
  ...   r"(.*)\.weight": (r"\1.kernel", np.transpose)})
  LoadReport(4 loaded)
  """
  with reading_all(path) as reader:
    return load(
      "load_safetensors",
      tree,
      reader,
      rename=rename,
      only=only,
      strict=strict,
      cast=cast,
      sep=sep,
      progress=progress,
    )
