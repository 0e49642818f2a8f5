"""What each function that loads a file of tensors does: compare, then read into the model.

Loading has two halves. The first compares what the header says with the model, functions of
`rename` included, which are tried on zeros. The second reads one Variable after the other into the
model: beside it, there is at most one on the host and one on the device.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

from refax.core.filters import Filter
from refax.errors import CheckpointFormatError, CheckpointMismatchError, message
from refax.io.plan import (
  Checkpoint,
  Part,
  Plan,
  Reader,
  absent,
  contradictions,
  goes_as_it_is,
  mismatches,
  missing_parts,
  plan_for,
  read_slot,
)
from refax.io.rename import Rename
from refax.io.slots import Slot, Slots, copy_in, fill, on_one_device, slots_of
from refax.io.tensor_file import Scratch

Progress: TypeAlias = Callable[[list[Any]], Iterable[Any]]
"""What goes through a list and shows how far it is, such as `tqdm.tqdm`."""


class LoadReport(NamedTuple):
  """What `nnx.load_safetensors`, `nnx.load_gguf` or `nnx.load_flax_checkpoint` did.

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


def load(
  function: str,
  tree: Any,
  reader: Reader,
  *,
  rename: Rename | None,
  only: Filter,
  strict: bool,
  cast: bool,
  sep: str,
  progress: Progress | None,
) -> LoadReport:
  """Load an open file; the arguments are those of `nnx.load_safetensors`."""
  slots = slots_of(function, tree, only, sep)
  file = Checkpoint(reader, function)
  plan = plan_for(file, slots, rename)
  missing = missing_parts(slots, plan)
  rows = mismatches(tree, file, slots, plan, cast)
  if strict:
    rows += absent(file, missing, plan.unexpected)
  rows = rows or contradictions(file, slots, plan, cast)
  if rows:
    raise CheckpointMismatchError.table(os.fspath(reader.path), rows)
  _load(tree, file, slots, plan, cast, progress)
  return report(slots, plan, missing, file.metadata)


def report(slots: Slots, plan: Plan, missing: list[Part], metadata: dict[str, str]) -> LoadReport:
  """What has been loaded."""
  loaded, aliases = plan.loaded(slots), dict(plan.aliases)
  for name, slot in slots.by_name.items():
    for source in plan.sources.get(slot.name, ()) if name != slot.name else ():
      part = Part(slot, source.at).name
      aliases[name + part.removeprefix(slot.name)] = loaded[part]
  names = tuple(part.name for part in missing)
  return LoadReport(loaded, names, tuple(plan.unexpected), aliases, metadata)


def _load(
  tree: Any, file: Checkpoint, slots: Slots, plan: Plan, cast: bool, progress: Progress | None
) -> None:
  """Read what is planned, one Variable after the other."""
  found = slots._replace(selected=[s for s in slots.selected if s.name in plan.sources])
  done, scratch = 0, Scratch()
  leaves = found.by_leaf()
  for parts in leaves if progress is None else progress(leaves):
    try:
      _load_leaf(tree, file, parts, plan, cast, scratch)
    except Exception as error:
      if not done:
        raise
      problem = f"{type(error).__name__}: {message(error)}"
      raise CheckpointFormatError.midway(file.reader.path, problem, done) from error
    done += len(parts)


def _load_leaf(
  tree: Any, file: Checkpoint, parts: list[Slot], plan: Plan, cast: bool, scratch: Scratch
) -> None:
  """A function of its own, so that what was read is freed before the next is."""
  slot, source = parts[0], plan.sources[parts[0].name][0]
  if not source.at and goes_as_it_is(file, slot, source) and on_one_device(slot):
    copy_in(slot, file.read(source.name, scratch))
  else:  # a function of `rename` may keep what it is given
    fill(tree, parts, [read_slot(file, slot, plan.sources[slot.name], cast) for slot in parts])
