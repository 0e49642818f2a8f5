"""What of a file goes where in a model, and what does not fit: all that is decided before reading.

Functions of `rename` are tried on zeros, so that their result is known by shape and dtype.

A Variable gets one tensor, or, if its name has an index behind it, one tensor for each index of its
leading axes: `blocks.layers.kernel[3]` is what the Variable `kernel` of a Stack holds of layer 3.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from refax.errors import CheckpointFormatError, InvalidArgumentError
from refax.io.keys import as_data
from refax.io.rename import LayoutError, Rename, Target, renamer
from refax.io.slots import Slot, Slots, can_fill
from refax.io.tensor_file import Scratch, memory
from refax.typing import describe

ALIASES = "refax.aliases"
"""In the metadata of a file: names of tensors that are stored under another name."""

KEYS = "refax.keys"
"""In the metadata of a file: the implementations of tensors that are typed PRNG keys."""

Row = tuple[str, str, str, str, str]
"""A mismatch: name in the file, name in the model, what either holds, what to do."""

_MISSING = "rename a tensor to it, leave it out with only=, or pass strict=False"
_UNEXPECTED = "rename it, drop it (rename to None), or pass strict=False"
_INDEXED = re.compile(r"(.+?)((?:\[\d{1,9}\])+)", re.DOTALL)


class Entry(Protocol):
  """What the header of a file says of one tensor."""

  @property
  def dtype(self) -> np.dtype: ...
  @property
  def shape(self) -> tuple[int, ...]: ...
  def zeros(self) -> np.ndarray:
    """A tensor like this one that takes no memory."""
    ...


class Reader(Protocol):
  """Open files of some format, whose headers have been checked."""

  @property
  def path(self) -> str: ...
  @property
  def metadata(self) -> dict[str, str]: ...
  @property
  def entries(self) -> Mapping[str, Entry]: ...
  def read(self, name: str, scratch: Scratch | None = None) -> np.ndarray:
    """One tensor, in memory of its own or in `scratch`."""
    ...

  def refusal(self, problem: str) -> CheckpointFormatError:
    """The error for these files."""
    ...


def on_host(x: Any) -> np.ndarray:
  """An array as the file has it: keys as their data."""
  return np.asarray(as_data(x))


class Checkpoint:
  """An open file with what our metadata says of it.

  Args:
    reader: the file.
    function: the name of the function that loads it, for errors.
  """

  function: str

  def __init__(self, reader: Reader, function: str):
    self.reader = reader
    self.function = function
    metadata = dict(reader.metadata)
    self.aliases = self._names(metadata.pop(ALIASES, "{}"), ALIASES)
    self.keys = self._names(metadata.pop(KEYS, "{}"), KEYS)
    self.metadata = metadata
    known = reader.entries
    if not all(name in known for name in (*self.aliases.values(), *self.keys)):
      raise reader.refusal("metadata that names a tensor that is not there")
    for name in self.keys:
      self.zeros(name)

  def _names(self, text: str, what: str) -> dict[str, str]:
    try:
      names = json.loads(text)
      if not isinstance(names, dict) or not all(isinstance(x, str) for x in names.values()):
        raise ValueError
      "".join((*names, *names.values())).encode()
    except (ValueError, RecursionError):
      raise self.reader.refusal(f"metadata {what!r} that is no JSON object of strings") from None
    return names

  def zeros(self, name: str) -> Any:
    """An array like a tensor of the file, without reading it."""
    return self._as_key(name, self.reader.entries[name].zeros())

  def read(self, name: str, scratch: Scratch | None = None) -> Any:
    """A tensor of the file; no key, if it comes to lie in `scratch`."""
    return self._as_key(name, self.reader.read(name, scratch))

  def _as_key(self, name: str, x: np.ndarray) -> Any:
    impl = self.keys.get(name)
    if impl is None:
      return x
    try:
      if x.dtype != np.uint32:
        raise TypeError(f"{x.dtype} instead of uint32")
      return jax.random.wrap_key_data(jnp.asarray(x), impl=impl)
    except (TypeError, ValueError, OverflowError) as error:
      problem = f"the tensor {name!r} is no data of PRNG keys: {error}"
      raise self.reader.refusal(problem) from None


class Source(NamedTuple):
  """A tensor of the file, and where it goes."""

  name: str
  target: Target
  at: tuple[int, ...] = ()
  """Which part of the Variable it is, by its leading axes; empty if it is all of it."""


class Part(NamedTuple):
  """What one tensor fills: all of a slot, or what it holds at an index of its leading axes."""

  slot: Slot
  at: tuple[int, ...] = ()

  @property
  def name(self) -> str:
    """The name of the slot, with the index behind it."""
    return self.slot.name + "".join(f"[{i}]" for i in self.at)

  @property
  def dtype(self) -> Any:
    """The dtype that is wanted."""
    return self.slot.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape that is wanted."""
    return tuple(self.slot.shape)[len(self.at) :]

  @property
  def is_key(self) -> bool:
    """Whether typed PRNG keys are wanted."""
    return self.slot.is_key


class Plan(NamedTuple):
  """Which tensors go where."""

  sources: dict[str, list[Source]]
  """By the first name of the slot; several are possible where the model shares one Variable, or
  where each fills a part of it."""
  unexpected: list[str]
  aliases: dict[str, str]

  def loaded(self, slots: Slots) -> dict[str, str]:
    """The name in the file of what goes to each name in the model."""
    found: dict[str, str] = {}
    for name, sources in self.sources.items():
      for source in sources:
        found.setdefault(Part(slots.by_name[name], source.at).name, source.name)
    return found


def missing_parts(slots: Slots, plan: Plan) -> list[Part]:
  """What of the model the file has nothing for."""
  found = []
  for slot in slots.selected:
    sources = plan.sources.get(slot.name, ())
    indices = {source.at for source in sources} or {()}
    sizes = slot.shape[: max(map(len, indices))]
    wanted = map(tuple, itertools.product(*map(range, sizes)))
    found += [Part(slot, index) for index in wanted if not sources or index not in indices]
  return found


def absent(file: Checkpoint, missing: list[Part], unexpected: list[str]) -> list[Row]:
  """A row for each tensor that only one of the file and the model has."""
  rows = [("-", part.name, "nothing", holds(part), _MISSING) for part in missing]
  return rows + [
    (name, "-", describe(file.zeros(name)), "nothing", _UNEXPECTED) for name in unexpected
  ]


def holds(part: Slot | Part) -> str:
  """The dtype and shape of a slot, as text."""
  return describe(jax.ShapeDtypeStruct(part.shape, part.dtype))


def plan_for(file: Checkpoint, slots: Slots, rename: Rename | None) -> Plan:
  """Which tensor of the file goes to which slot, by the names alone."""
  targets_of = renamer(rename, file.function)
  plan = Plan({}, [], {})
  for name in file.reader.entries:
    for target in targets_of(name):
      part = _part_named(slots, target.name)
      if part is not None:
        plan.sources.setdefault(part.slot.name, []).append(Source(name, target, part.at))
      elif not _is_other(slots, target.name) and name not in plan.unexpected[-1:]:
        plan.unexpected.append(name)
  filled = set(plan.sources)
  parts: set[str] = set()
  for alias, name in file.aliases.items():  # for what the file shares and the model does not
    for target in targets_of(alias):
      part = _part_named(slots, target.name)
      if part is not None and part.slot.name not in filled and part.name not in parts:
        parts.add(part.name)
        plan.sources.setdefault(part.slot.name, []).append(Source(name, target, part.at))
        plan.aliases[target.name] = name
  return plan


def _part_named(slots: Slots, name: str) -> Part | None:
  """What this name stands for: all of a slot, or a part that it has."""
  if name in slots.by_name:
    return Part(slots.by_name[name])
  match = _INDEXED.fullmatch(name)
  slot = None if match is None else slots.by_name.get(match[1])
  if match is None or slot is None:
    return None
  index = tuple(map(int, re.findall(r"\d+", match[2])))
  fits = len(index) <= len(slot.shape) and all(
    i < n for i, n in zip(index, slot.shape, strict=False)
  )
  return Part(slot, index) if fits else None


def _is_other(slots: Slots, name: str) -> bool:
  """Whether a name stands for something that the filter does not select."""
  match = _INDEXED.fullmatch(name)
  return name in slots.others or (match is not None and match[1] in slots.others)


def array_for(slot: Slot | Part, target: Target, x: Any, cast: bool) -> Any:
  """What becomes of a tensor on its way into the model."""
  x = target.apply(x)
  floats = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
  if cast and floats and jnp.issubdtype(slot.dtype, jnp.floating) and x.dtype != slot.dtype:
    with np.errstate(all="ignore"):  # what is too large becomes infinite, as in JAX
      return x.astype(slot.dtype)
  return x


def mismatches(tree: Any, file: Checkpoint, slots: Slots, plan: Plan, cast: bool) -> list[Row]:
  """A row for each tensor that does not fit its place, by what the header says."""
  rows = []
  for slot in slots.selected:
    sources = plan.sources.get(slot.name, ())
    problem = _problem(tree, slot, sources)
    for source in sources:
      part = Part(slot, source.at)
      if not problem and goes_as_it_is(file, part, source):
        continue
      zeros = file.zeros(source.name)
      has = describe(zeros)
      try:
        x = array_for(part, source.target, zeros, cast)
      except LayoutError as error:
        fix = str(error)
      except Exception as error:
        fix = f"mend the function in rename ({type(error).__name__}: {str(error)[:80]})"
      else:
        has += f", as {describe(x)}" if source.target.transforms else ""
        fix = problem or _advice(part, x)
      if fix:
        rows.append((source.name, source.target.name, has, holds(part), fix))
  return rows


def _problem(tree: Any, slot: Slot, sources: Any) -> str:
  """What is wrong with a slot whatever the tensors are."""
  if not sources:
    return ""
  if not can_fill(tree, slot):
    return "make it an nnx.Variable: a tuple cannot be changed"
  lengths = {len(source.at) for source in sources}
  if len(lengths) > 1:
    return "rename to the whole, or each tensor to a part: not both"
  if lengths == {0}:
    return ""
  if slot.is_key:
    return "rename to the whole: keys have no parts"
  count = math.prod(slot.shape[: max(lengths)])
  if isinstance(slot.cell, jax.ShapeDtypeStruct) and len({s.at for s in sources}) < count:
    return "name a tensor for each part: an abstract Variable has no values for the others"
  return ""


def goes_as_it_is(file: Checkpoint, part: Slot | Part, source: Source) -> bool:
  """Whether a tensor has the shape and dtype of its place, and there are no keys in either."""
  entry = file.reader.entries[source.name]
  return (
    not source.target.transforms
    and source.name not in file.keys
    and not part.is_key
    and entry.shape == tuple(part.shape)
    and entry.dtype == part.dtype
  )


def _advice(slot: Slot | Part, x: Any) -> str:
  """What to do about an array that does not fit; nothing if it does."""
  if not hasattr(x, "shape") or not hasattr(x, "dtype"):
    return "let the function in rename return an array"
  if slot.is_key and x.dtype == np.uint32:
    return "rename to (name, jax.random.wrap_key_data)"
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) and not slot.is_key:
    return "rename to (name, jax.random.key_data)"
  if tuple(x.shape) != tuple(slot.shape):
    if len(x.shape) == 2 and tuple(x.shape[::-1]) == tuple(slot.shape):
      return "rename to (name, np.transpose)"
    if x.size == math.prod(slot.shape):
      return f"rename to (name, lambda x: x.reshape({tuple(slot.shape)})), perhaps transposed"
    return "build the model with this size"
  if x.dtype == slot.dtype:
    return ""
  if slot.is_key:
    return "build the model with keys of this implementation"
  if jnp.issubdtype(x.dtype, jnp.floating) and jnp.issubdtype(slot.dtype, jnp.floating):
    return "pass cast=True"
  return f"rename to (name, lambda x: x.astype('{slot.dtype}'))"


def contradictions(file: Checkpoint, slots: Slots, plan: Plan, cast: bool) -> list[Row]:
  """A row for each tensor that differs from another one for the same Variable.

  torch stores tied weights under each of their names.
  """
  rows = []
  for name, sources in plan.sources.items():
    for alike in _by_index(sources):
      part = Part(slots.by_name[name], alike[0].at)
      bits = [
        on_host(array_for(part, source.target, file.read(source.name), cast)).tobytes()
        for source in (alike if len(alike) > 1 else ())
      ]
      for source, other in zip(alike[1:], bits[1:], strict=True):
        if other != bits[0]:
          fix = f"drop one (rename to None), or do not share: it differs from {alike[0].name}"
          has = describe(file.zeros(source.name))
          rows.append((source.name, source.target.name, has, holds(part), fix))
  return rows


def _by_index(sources: list[Source]) -> list[list[Source]]:
  found: dict[tuple[int, ...], list[Source]] = {}
  for source in sources:
    found.setdefault(source.at, []).append(source)
  return list(found.values())


def read_part(file: Checkpoint, part: Part, source: Source, cast: bool) -> Any:
  """A tensor of the file as the model wants it.

  Raises:
    InvalidArgumentError: a function of `rename` was right for zeros only.
  """
  x = array_for(part, source.target, file.read(source.name), cast)
  if tuple(x.shape) != part.shape or x.dtype != part.dtype:
    want = f"a function that gives {holds(part)} for each {describe(file.zeros(source.name))}"
    raise InvalidArgumentError.value(file.function, f"function for {source.name}", x, want)
  return x


def read_slot(file: Checkpoint, slot: Slot, sources: list[Source], cast: bool) -> Any:
  """What the file has for a slot; parts come together on the host, one after the other."""
  if not sources[0].at:
    return read_part(file, Part(slot), sources[0], cast)
  dtype, shape = np.dtype(slot.dtype), tuple(slot.shape)
  whole = memory(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
  by_index = _by_index(sources)
  if len(by_index) < math.prod(shape[: len(sources[0].at)]):
    whole[...] = on_host(slot.read())  # not strict: the others stay as they are
  for source, *_ in by_index:
    whole[source.at] = on_host(read_part(file, Part(slot, source.at), source, cast))
  return whole
