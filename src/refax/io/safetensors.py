"""save_safetensors and load_safetensors: the arrays of an object in one file, by name.

The format is that of the `safetensors` package, which torch, NumPy and others read and write; the
file itself is the business of `tensor_file.py`, the names that of `slots.py` and `rename.py`, what
fits that of `plan.py`. What the format cannot say is in the metadata of the file: which tensors are
PRNG keys, and which names stand for a tensor that has another one.

Loading has two halves. The first compares what the header says with the model, functions of
`rename` included, which are tried on zeros. The second reads one tensor after the other into the
model: beside it, there is at most one on the host and one on the device.
"""

import json
import operator
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from refax import _jax
from refax.core.filters import Filter
from refax.errors import CheckpointFormatError, CheckpointMismatchError, InvalidArgumentError
from refax.io.keys import as_data, implementation, is_key
from refax.io.plan import (
  ALIASES,
  KEYS,
  Checkpoint,
  Plan,
  Source,
  absent,
  array_for,
  contradictions,
  goes_as_it_is,
  holds,
  mismatches,
  on_host,
  plan_for,
)
from refax.io.rename import Rename
from refax.io.slots import Slot, Slots, copy_in, fill, on_one_device, slots_of
from refax.io.snapshot import snapshot
from refax.io.tensor_file import NAMES, Scratch, order, reading, write
from refax.typing import describe


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


class LoadReport(NamedTuple):
  """What `nnx.load_safetensors` or `nnx.load_flax_checkpoint` did.

  Attributes:
    loaded: the name in the file of what went to each name in the model.
    missing: names in the model that the file has nothing for.
    unexpected: names in the file that the model has no place for.
    aliases: further names of what was loaded, or stored, once: name in the model to name in the
      file.
    metadata: what the file says about itself.
  """

  loaded: dict[str, str]
  missing: tuple[str, ...]
  unexpected: tuple[str, ...]
  aliases: dict[str, str]
  metadata: dict[str, str]

  def __repr__(self) -> str:
    lines = [f"{len(self.loaded)} loaded"]
    for what in ("missing", "unexpected", "aliases"):
      names = list(getattr(self, what))
      if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        lines.append(f"{len(names)} {what}: {', '.join(names[:5])}{more}")
    return f"LoadReport({'; '.join(lines)})"


def load_safetensors(
  tree: Any,
  path: str | os.PathLike[str],
  *,
  rename: Rename | None = None,
  only: Filter = ...,
  strict: bool = True,
  cast: bool = False,
  sep: str = ".",
) -> LoadReport:
  r"""Read a safetensors file into a live model: its Variables are written, in place.

  Each Variable keeps its identity, sharing, kind of storage and sharding. Everything is checked
  before the first write: a file that is damaged, or that does not fit, leaves the model as it was.
  (What cannot be checked before is a disk that fails while it is read, or a function in `rename`
  that is right for zeros only; `with nnx.transaction(model):` undoes that too, for twice the
  memory.) Beside the model, there is at most one tensor on the host and one on the device. An
  abstract model of `nnx.eval_shape` gets lojax Variables.

  Args:
    tree: a Module, State, or any pytree of Variables, arrays and numbers.
    path: the file.
    rename: from names in the file to names in the model. A dict of regular expressions, each for a
      whole name, to replacements; they are applied in order, one to the result of the other. Or a
      function of a name. Either gives a name, or `(name, function of the array)`, or None for what
      is not wanted. A function is called twice, first with zeros.
    only: which Variables to load; what the file has for others is passed over.
    strict: whether missing and unexpected names are errors.
    cast: whether floats become the floats of the Variable: float32 to bfloat16, for example.
    sep: what stands between the steps of a path.

  Returns:
    A report with `loaded`, `missing`, `unexpected`, `aliases` and `metadata`.

  Raises:
    CheckpointMismatchError: names, shapes or dtypes differ; a table says which.
    CheckpointFormatError: the file is damaged.
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
  slots = slots_of("load_safetensors", tree, only, sep)
  with reading(path) as reader:
    file = Checkpoint(reader)
    plan = plan_for(file, slots, rename)
    missing = [slot.name for slot in slots.selected if slot.name not in plan.sources]
    rows = mismatches(tree, file, slots, plan, cast)
    if strict:
      rows += absent(file, slots, missing, plan.unexpected)
    rows = rows or contradictions(file, slots, plan, cast)
    if rows:
      raise CheckpointMismatchError.table(os.fspath(path), rows)
    _load(tree, file, slots, plan, cast)
  loaded = {name: sources[0].name for name, sources in plan.sources.items()}
  shared = {n: s for n, s in slots.by_name.items() if n != s.name and s.name in loaded}
  aliases = plan.aliases | {name: loaded[slot.name] for name, slot in shared.items()}
  return LoadReport(loaded, tuple(missing), tuple(plan.unexpected), aliases, file.metadata)


def _load(tree: Any, file: Checkpoint, slots: Slots, plan: Plan, cast: bool) -> None:
  """Read what is planned, one Variable after the other."""
  found = slots._replace(selected=[s for s in slots.selected if s.name in plan.sources])
  done, scratch = 0, Scratch()
  for parts in found.by_leaf():
    try:
      _load_leaf(tree, file, parts, plan, cast, scratch)
    except Exception as error:
      if not done:
        raise
      problem = f"{type(error).__name__}: {error}"
      raise CheckpointFormatError.midway(file.reader.path, problem, done) from error
    done += len(parts)


def _load_leaf(
  tree: Any, file: Checkpoint, parts: list[Slot], plan: Plan, cast: bool, scratch: Scratch
) -> None:
  """A function of its own, so that what was read is freed before the next is."""
  slot, source = parts[0], plan.sources[parts[0].name][0]
  if goes_as_it_is(file, slot, source) and on_one_device(slot):
    copy_in(slot, file.read(source.name, scratch))
  else:  # a function of `rename` may keep what it is given
    fill(tree, parts, [_read(file, slot, plan.sources[slot.name][0], cast) for slot in parts])


def _read(file: Checkpoint, slot: Slot, source: Source, cast: bool) -> Any:
  x = array_for(slot, source.target, file.read(source.name), cast)
  if tuple(x.shape) != tuple(slot.shape) or x.dtype != slot.dtype:
    want = f"a function that gives {holds(slot)} for each {describe(file.zeros(source.name))}"
    raise InvalidArgumentError.value("load_safetensors", f"function for {source.name}", x, want)
  return x
