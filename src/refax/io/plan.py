"""What of a file goes where in a model, and what does not fit: all that is decided before reading.

Functions of `rename` are tried on zeros, so that their result is known by shape and dtype.
"""

import json
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refax.io.keys import as_data
from refax.io.rename import Rename, Target, renamer
from refax.io.slots import Slot, Slots, can_fill
from refax.io.tensor_file import Reader, Scratch
from refax.typing import describe

ALIASES = "refax.aliases"
"""In the metadata of a file: names of tensors that are stored under another name."""

KEYS = "refax.keys"
"""In the metadata of a file: the implementations of tensors that are typed PRNG keys."""

Row = tuple[str, str, str, str, str]
"""A mismatch: name in the file, name in the model, what either holds, what to do."""

_MISSING = "rename a tensor to it, leave it out with only=, or pass strict=False"
_UNEXPECTED = "rename it, drop it (rename to None), or pass strict=False"


def on_host(x: Any) -> np.ndarray:
  """An array as the file has it: keys as their data."""
  return np.asarray(as_data(x))


class Checkpoint:
  """An open file with what our metadata says of it."""

  function = "load_safetensors"

  def __init__(self, reader: Reader):
    self.reader = reader
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


class Plan(NamedTuple):
  """Which tensors go where."""

  sources: dict[str, list[Source]]
  """By the first name of the slot; several are possible where the model shares one Variable."""
  unexpected: list[str]
  aliases: dict[str, str]


def absent(file: Checkpoint, slots: Slots, missing: list[str], unexpected: list[str]) -> list[Row]:
  """A row for each tensor that only one of the file and the model has."""
  rows = [("-", name, "nothing", holds(slots.by_name[name]), _MISSING) for name in missing]
  return rows + [
    (name, "-", describe(file.zeros(name)), "nothing", _UNEXPECTED) for name in unexpected
  ]


def holds(slot: Slot) -> str:
  """The dtype and shape of a slot, as text."""
  return describe(jax.ShapeDtypeStruct(slot.shape, slot.dtype))


def plan_for(file: Checkpoint, slots: Slots, rename: Rename | None) -> Plan:
  """Which tensor of the file goes to which slot, by the names alone."""
  target_of = renamer(rename, file.function)
  plan = Plan({}, [], {})
  for name in file.reader.entries:
    target = target_of(name)
    if target is None:
      continue
    slot = slots.by_name.get(target.name)
    if slot is not None:
      plan.sources.setdefault(slot.name, []).append(Source(name, target))
    elif target.name not in slots.others:
      plan.unexpected.append(name)
  for alias, name in file.aliases.items():  # for what the file shares and the model does not
    target = target_of(alias)
    slot = None if target is None else slots.by_name.get(target.name)
    if target is not None and slot is not None and slot.name not in plan.sources:
      plan.sources[slot.name] = [Source(name, target)]
      plan.aliases[target.name] = name
  return plan


def array_for(slot: Slot, target: Target, x: Any, cast: bool) -> Any:
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
    for source in plan.sources.get(slot.name, ()):
      fix = "" if can_fill(tree, slot) else "make it an nnx.Variable: a tuple cannot be changed"
      if not fix and goes_as_it_is(file, slot, source):
        continue
      zeros = file.zeros(source.name)
      has = describe(zeros)
      try:
        x = array_for(slot, source.target, zeros, cast)
      except Exception as error:
        fix = f"mend the function in rename ({type(error).__name__}: {str(error)[:80]})"
      else:
        has += f", as {describe(x)}" if source.target.transforms else ""
        fix = fix or _advice(slot, x)
      if fix:
        rows.append((source.name, source.target.name, has, holds(slot), fix))
  return rows


def goes_as_it_is(file: Checkpoint, slot: Slot, source: Source) -> bool:
  """Whether a tensor has the shape and dtype of its slot, and there are no keys in either."""
  entry = file.reader.entries[source.name]
  return (
    not source.target.transforms
    and source.name not in file.keys
    and not slot.is_key
    and entry.shape == tuple(slot.shape)
    and entry.dtype == slot.dtype
  )


def _advice(slot: Slot, x: Any) -> str:
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
    slot = slots.by_name[name]
    if len(sources) > 1:
      bits = [
        on_host(array_for(slot, source.target, file.read(source.name), cast)).tobytes()
        for source in sources
      ]
      for source, other in zip(sources[1:], bits[1:], strict=True):
        if other != bits[0]:
          fix = f"drop one (rename to None), or do not share: it differs from {sources[0].name}"
          has = describe(file.zeros(source.name))
          rows.append((source.name, source.target.name, has, holds(slot), fix))
  return rows
