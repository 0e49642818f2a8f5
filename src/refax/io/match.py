"""Which array of a checkpoint goes to which slot of an object, and what does not fit."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refax.io.slots import Slot, Slots, can_fill
from refax.io.snapshot import native
from refax.typing import describe

Row = tuple[str, str, str, str, str]
"""A mismatch: name in the file, name in the model, what either holds, what to do."""


class Saved(NamedTuple):
  """What a checkpoint has, or the part of it that is wanted.

  Attributes:
    arrays: what is known of each array, by its name in the checkpoint.
    names: the array for each name in the part: what was shared has several.
    iterators: their states, by the names in the part.
    part: the path of the part in what was saved; None for all.
  """

  arrays: dict[str, Any]
  names: dict[str, str]
  iterators: dict[str, Any]
  part: str | None

  @classmethod
  def of(cls, about: dict[str, Any], part: str | None) -> "Saved":
    """From the JSON of a checkpoint."""
    arrays, iterators = about["arrays"], about["iterators"]
    names = {name: name for name in arrays} | about["aliases"]
    if part is not None:
      inside = lambda name: name == part or name.startswith(f"{part}.")
      names = {k[len(part) + 1 :]: v for k, v in names.items() if inside(k)}
      iterators = {k[len(part) + 1 :]: v for k, v in iterators.items() if inside(k)}
    return cls(arrays, names, iterators, part)


class Match(NamedTuple):
  """The array for each slot, by the slot's name, and a row for all that does not fit."""

  sources: dict[str, str]
  rows: list[Row]


def matched(objects: Any, slots: Slots, saved: Saved, iterators: dict[str, Any] | None) -> Match:
  """Compare objects with what was saved.

  Args:
    objects: what is to be filled.
    slots: its slots.
    saved: what the checkpoint has.
    iterators: those of the user, by name; None where they are not wanted.
  """
  match = Match({}, [])
  names: dict[str, list[str]] = {slot.name: [] for slot in slots.selected}
  for name, slot in slots.by_name.items():
    names[slot.name].append(name)
  for slot in slots.selected:
    found = [name for name in names[slot.name] if name in saved.names]
    if not found:
      match.rows.append(("", slot.name, "nothing", describe(slot.cell), _missing(slot, saved)))
      continue
    match.sources[slot.name] = saved.names[found[0]]
    row = _misfit(objects, slot, found[0], saved)
    match.rows.extend([row] if row else _contradictions(slot, found, saved))
  match.rows.extend(_unexpected(slots, saved))
  if iterators is not None:
    match.rows.extend(_iterators(saved.iterators, iterators))
  return match


def _missing(slot: Slot, saved: Saved) -> str:
  parts = {name.removesuffix(f".{slot.name}") for name in saved.names} - saved.names.keys()
  if parts:
    prefix = "" if saved.part is None else f"{saved.part}."
    return f'pass part="{prefix}{sorted(parts)[0]}" to restore, if this is what was saved there'
  return "restore with only=..., to leave it"


def _misfit(objects: Any, slot: Slot, name: str, saved: Saved) -> Row | None:
  """A row for an array that does not go into its slot."""
  facts = saved.arrays[saved.names[name]]
  if not _same_type(slot, facts):
    has = f"{'keys, ' if facts['keys'] else ''}{facts['dtype']}{facts['shape']}".replace(" ", "")
    return name, slot.name, has, describe(slot.cell), "build the model as it was"
  if not can_fill(objects, slot):
    fix = "pass it inside a dict, a list or a Module"
    return name, slot.name, "an array", "a value that cannot be changed", fix
  return None


def _same_type(slot: Slot, facts: dict[str, Any]) -> bool:
  """Whether an array has the shape and dtype of a slot; for keys, those of their bits."""
  shape, dtype = tuple(facts["shape"]), facts["dtype"]
  if slot.is_key != (facts["keys"] is not None):
    return False
  if not slot.is_key:
    return (shape, dtype) == (tuple(slot.shape), str(native(slot)))
  try:
    wrap = lambda bits: jax.random.wrap_key_data(bits, impl=facts["keys"])
    keys = jax.eval_shape(wrap, jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))
  except (TypeError, ValueError):  # an implementation that this JAX does not know
    return False
  return (keys.shape, keys.dtype) == (slot.shape, slot.dtype)


def _contradictions(slot: Slot, found: list[str], saved: Saved) -> list[Row]:
  """Rows for arrays that differ and would go into one Variable, which the object shares."""
  first, rows = saved.arrays[saved.names[found[0]]], []
  for name in found[1:]:
    facts = saved.arrays[saved.names[name]]
    if facts is not first and (facts != first or facts["crc32"] is None):
      fix = f"do not share it: what was saved differs from {found[0]}"
      rows.append((name, slot.name, "another array", describe(slot.cell), fix))
  return rows


def _unexpected(slots: Slots, saved: Saved) -> list[Row]:
  """Rows for arrays without a place: one for a whole part of which the objects have nothing."""
  known = {*slots.by_name, *slots.others}
  used = {saved.names[name] for name in known if name in saved.names}
  tops = {name.split(".")[0] for name in known}
  rows, absent = [], dict[str, int]()
  for name, target in saved.names.items():
    top = name.split(".")[0]
    if name in known or target in used:
      continue
    if top in tops or top == name:
      rows.append((name, "", "an array", "nothing", "build the model as it was"))
    else:
      absent[top] = absent.get(top, 0) + 1
  fix = "pass it too, or restore one part of what was saved: part=..."
  for top, n in absent.items():
    rows.append((f"{top}.*", "", f"{n} arrays", "nothing", fix))
  return rows


def _iterators(saved: dict[str, Any], mine: dict[str, Any]) -> list[Row]:
  rows = []
  for name in sorted(saved.keys() ^ mine.keys()):
    if mine or name not in saved:
      has, want = ("an iterator", "nothing") if name in saved else ("nothing", "one")
      rows.append((name, name, has, want, "pass what was saved"))
  return rows
