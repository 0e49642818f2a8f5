"""load_flax_checkpoint: what Flax NNX users have saved by orbax, into a live model.

orbax writes a tree of names to arrays. The tree of a Flax State differs from the paths of a model
here in spelling only: the keys of a list are strings, a Variable is a level `value` of its own, a
key that is a tuple is its text. This file reads such a tree and spells its names as ours, on which
`plan.py` works as on those of a safetensors file.
"""

import ast
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from refax.core.filters import Filter
from refax.errors import (
  CheckpointFormatError,
  CheckpointMismatchError,
  InvalidArgumentError,
  MissingCheckpointError,
  in_brief,
)
from refax.io.keys import implementation
from refax.io.load import LoadReport, report
from refax.io.parts import Parted
from refax.io.plan import (
  Checkpoint,
  absent,
  contradictions,
  mismatches,
  missing_parts,
  plan_for,
  read_slot,
)
from refax.io.rename import Rename, renamer
from refax.io.slots import Slot, Slots, fill, slots_of
from refax.io.undo import undo_on_error
from refax.io.writer import orbax

FUNCTION = "load_flax_checkpoint"
_TREE = "_METADATA"  # the file by which orbax knows a tree
_ITEMS = "_CHECKPOINT_METADATA"  # and what was saved at once
_STEP = re.compile(r"(?:.*_)?(\d+)")
_LEVELS = ("value", "raw_value")  # of a Variable; its name depends on the version of Flax


def load_flax_checkpoint(
  tree: Any,
  path: str | os.PathLike[str],
  *,
  step: int | None = None,
  part: str | None = None,
  rename: Rename | None = None,
  only: Filter = ...,
  strict: bool = True,
  cast: bool = False,
) -> LoadReport:
  """Read a checkpoint that was written from Flax NNX by orbax: Variables are written, in place.

  What was saved is a State (`nnx.state(model)`, `nnx.split(model)[1]`), its pure dict, or dicts of
  these, by `StandardCheckpointer`, `PyTreeCheckpointer` or a `CheckpointManager`; States of an
  `nnx.Optimizer` and random streams included. Everything is read and checked before the first
  write: a checkpoint that does not fit leaves the model as it was. Flax need not be installed.

  Args:
    tree: a Module, Optimizer or State, or dicts of them by the names under which they were saved.
    path: the folder of a checkpoint, of a step, or of a CheckpointManager.
    step: which checkpoint of a CheckpointManager; by default the latest.
    part: the name of one item, or part, of what was saved, for which `tree` stands.
    rename: from names in the checkpoint to names in the model, as in `nnx.load_safetensors`. The
      names are paths with dots: `layers.0.kernel`.
    only: which Variables to load; what the checkpoint has for others is passed over.
    strict: whether missing and unexpected names are errors.
    cast: whether floats become the floats of the Variable.

  Returns:
    A report with `loaded`, `missing`, `unexpected` and `aliases`.

  Raises:
    CheckpointMismatchError: names, shapes or dtypes differ; a table says which.
    MissingCheckpointError: there is no checkpoint, or none of this step.
    CheckpointFormatError: it cannot be read.
    InvalidArgumentError: there is no such part, or `rename` makes no sense.
    ImportError: orbax-checkpoint is not installed.

  >>> from refax import nnx; import orbax.checkpoint as ocp, os, tempfile
  >>> model, other = (nnx.Linear(2, 3, rngs=nnx.Rngs(seed)) for seed in (0, 1))
  >>> path = os.path.join(tempfile.mkdtemp(), "checkpoint")
  >>> with ocp.StandardCheckpointer() as saver:
  ...   saver.save(path, nnx.state(model))             # in Flax: the same line
  >>> nnx.load_flax_checkpoint(other, path)
  LoadReport(2 loaded)
  >>> bool((other.kernel == model.kernel).all())
  True
  """
  path = os.path.abspath(path)
  slots = slots_of(FUNCTION, tree, only, ".")
  file = _Saved(path, _parts(path, step), part)
  file.spell(slots, rename)
  plan = plan_for(file, slots, rename)
  for name, sources in plan.sources.items():
    for source in sources:
      file.take_for_keys(source.name, slots.by_name[name])
  missing = missing_parts(slots, plan)
  rows = mismatches(tree, file, slots, plan, cast)
  if strict:
    rows += absent(file, missing, plan.unexpected)
  if not rows:
    file.fetch([source.name for sources in plan.sources.values() for source in sources])
    rows = contradictions(file, slots, plan, cast)
  if rows:
    raise CheckpointMismatchError.table(path, rows)
  found = slots._replace(selected=[s for s in slots.selected if s.name in plan.sources])
  new = {s.name: read_slot(file, s, plan.sources[s.name], cast) for s in found.selected}
  with undo_on_error(tree, found.selected, Parted(tree, {}, [])):
    for mine in found.by_leaf():
      fill(tree, mine, [new.pop(slot.name) for slot in mine])
  return report(slots, plan, missing, {})


# where it is
def _parts(path: str, step: int | None) -> dict[str, str]:
  """The folders of the trees in a checkpoint, by the names of its items; "" if it has no items.

  Raises:
    MissingCheckpointError: there is none.
  """
  steps = {int(found[1]): name for name in _folders(path) if (found := _STEP.fullmatch(name))}
  steps = {number: name for number, name in steps.items() if _items(os.path.join(path, name))}
  if items := _items(path) if step is None else {}:
    return items
  if not steps and step is None:
    raise MissingCheckpointError.orbax(path, sorted(os.listdir(path)) if _is_folder(path) else [])
  if not steps or (step is not None and step not in steps):
    raise MissingCheckpointError.step(path, step, sorted(steps))
  return _items(os.path.join(path, steps[max(steps) if step is None else step]))


def _items(path: str) -> dict[str, str]:
  if os.path.exists(os.path.join(path, _TREE)):
    return {"": path}
  inside = {name: os.path.join(path, name) for name in _folders(path)}
  trees = {name: x for name, x in inside.items() if os.path.exists(os.path.join(x, _TREE))}
  if os.path.exists(os.path.join(path, _ITEMS)) or not all(map(_STEP.fullmatch, trees)):
    return trees
  return {}  # they are steps


def _folders(path: str) -> list[str]:
  """The folders in a folder, without what a writer that was killed has left."""
  names = os.listdir(path) if _is_folder(path) else []
  return sorted(name for name in names if ".orbax-checkpoint-tmp" not in name)


def _is_folder(path: str) -> bool:
  return os.path.isdir(path)


# what is in it
class _Entry(NamedTuple):
  """One array of a tree, and where it is there."""

  dtype: np.dtype
  shape: tuple[int, ...]
  item: str
  leaf: int

  def zeros(self) -> np.ndarray:
    return np.broadcast_to(np.zeros((), self.dtype), self.shape)


class _Folder(NamedTuple):
  """The trees of a checkpoint, as `plan.py` wants a file."""

  path: str
  entries: dict[str, _Entry]

  def refusal(self, problem: str) -> CheckpointFormatError:
    return CheckpointFormatError.orbax(self.path, problem)


class _Saved(Checkpoint):
  """What orbax has written: arrays by our names.

  Args:
    path: the checkpoint, for errors.
    folders: the folders of its trees, by item.
    part: the part that is wanted.
  """

  function = FUNCTION

  def __init__(self, path: str, folders: dict[str, str], part: str | None):
    self.reader: Any = _Folder(path, {})
    self.aliases, self.keys, self.metadata = {}, {}, {}
    self._folders = folders
    self._trees = {item: self._tree(folder) for item, folder in folders.items()}
    self._arrays: dict[str, np.ndarray] = {}
    found = {steps: entry for item in folders for steps, entry in self._entries(item)}
    self._steps = found if len(folders) > 1 else {s[1:]: entry for s, entry in found.items()}
    self._impls = {item: _implementations(folder) for item, folder in folders.items()}
    if part is not None:
      inside = _inside(self._steps, part) or _inside(found, part)
      if not inside:
        tops = sorted({steps[0] for steps in self._steps})
        want = f"the name of a part of what was saved, such as {', '.join(map(repr, tops[:8]))}"
        raise InvalidArgumentError.value(FUNCTION, "part", part, want)
      self._steps = inside

  def _tree(self, folder: str) -> Any:
    """What orbax says of a tree: dicts and lists, with what is known of each leaf."""
    try:
      return orbax().PyTreeCheckpointHandler().metadata(Path(folder)).tree
    except Exception as error:
      raise self.reader.refusal(in_brief(error)) from error

  def _entries(self, item: str) -> Iterator[tuple[tuple[str, ...], _Entry]]:
    """The steps to each array of a tree, the name of the item before them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(self._trees[item])
    for i, (keys, leaf) in enumerate(leaves):
      if getattr(leaf, "shape", None) is None or getattr(leaf, "dtype", None) is None:
        continue  # texts, and what stands for None
      steps = [str(getattr(key, "key", getattr(key, "idx", key))) for key in keys]
      entry = _Entry(np.dtype(leaf.dtype), tuple(leaf.shape), item, i)
      yield (item, *steps), entry

  def spell(self, slots: Slots, rename: Rename | None) -> None:
    """Name each array as the model does, as far as its name says what it is."""
    targets_of = renamer(rename, FUNCTION)

    def is_known(name: str) -> bool:
      names = [target.name for target in targets_of(name)]
      return any(name in slots.by_name or name in slots.others for name in names)

    for steps, entry in self._steps.items():
      name = _name(steps, is_known)
      if name in self.reader.entries:
        raise self.reader.refusal(f"two arrays for {name}: a Variable and something inside it")
      self.reader.entries[name] = entry
      impl = self._impls[entry.item].get(self._stored_name(entry))
      if impl is not None:
        self.keys[name] = impl
        self.zeros(name)

  def _stored_name(self, entry: _Entry) -> str:
    leaves, _ = jax.tree_util.tree_flatten(self._trees[entry.item])
    return leaves[entry.leaf].name

  def take_for_keys(self, name: str, slot: Slot) -> None:
    """Bits that go to typed keys are those of such keys: Flax users save `jax.random.key_data`."""
    entry = self.reader.entries[name]
    concrete = not isinstance(slot.cell, jax.ShapeDtypeStruct)
    bits = entry.dtype == np.uint32 and entry.shape[:-1] == tuple(slot.shape)
    if slot.is_key and name not in self.keys and bits and entry.shape and concrete:
      self.keys[name] = str(implementation(slot.read()))

  def fetch(self, names: list[str]) -> None:
    """Read these arrays, at once: orbax reads several at a time."""
    for item, folder in self._folders.items():
      entries = [(name, self.reader.entries[name]) for name in names]
      mine = {entry.leaf: name for name, entry in entries if entry.item == item}
      if mine:
        self._arrays |= self._read(item, folder, mine)

  def _read(self, item: str, folder: str, names: dict[int, str]) -> dict[str, np.ndarray]:
    ocp = orbax()
    leaves, treedef = jax.tree_util.tree_flatten(self._trees[item])
    wanted = [0 if i in names else ocp.PLACEHOLDER for i in range(len(leaves))]
    args = [ocp.RestoreArgs(restore_type=np.ndarray) for _ in leaves]
    args = ocp.args.PyTreeRestore(treedef.unflatten(wanted), treedef.unflatten(args))
    try:
      restored = ocp.PyTreeCheckpointHandler().restore(Path(folder), args=args)
      found = jax.tree_util.tree_leaves(restored)
      return {name: np.asarray(found[i]) for i, name in names.items()}
    except Exception as error:
      raise self.reader.refusal(in_brief(error)) from error

  def read(self, name: str, scratch: Any = None) -> Any:
    return self._as_key(name, self._arrays[name])


def _inside(entries: dict[tuple[str, ...], _Entry], part: str) -> dict[tuple[str, ...], _Entry]:
  """The entries below a path with dots, by the rest of their paths."""
  prefix = tuple(part.split("."))
  n = len(prefix)
  return {steps[n:]: entry for steps, entry in entries.items() if steps[:n] == prefix}


def _name(steps: tuple[str, ...], is_known: Callable[[str], bool]) -> str:
  """The name of what is at these steps of a tree on disk, in a model."""
  plain = ".".join(part for step in steps for part in _split_step(step))
  if is_known(plain):
    return plain
  for i in reversed(range(len(steps))):
    if steps[i] in _LEVELS and is_known(name := _name(steps[:i] + steps[i + 1 :], is_known)):
      return name
  if steps and steps[-1] in _LEVELS:
    return ".".join(part for step in steps[:-1] for part in _split_step(step))
  return plain


def _split_step(step: str) -> tuple[str, ...]:
  """A key that was a tuple, such as the path of a weight in WeightNorm, as its steps."""
  if not (step.startswith("(") and step.endswith(")")):
    return (step,)
  try:
    value = ast.literal_eval(step)
  except (ValueError, SyntaxError):
    return (step,)
  return tuple(map(str, value)) if isinstance(value, tuple) else (step,)


def _implementations(folder: str) -> dict[str, str]:
  """The implementations of those arrays that are typed keys, by the names that orbax gave them."""
  found = {}
  below = os.path.join(folder, "array_metadatas")
  for name in os.listdir(below) if _is_folder(below) else []:
    try:
      with open(os.path.join(below, name), encoding="utf-8") as file:
        entries = json.load(file)["array_metadatas"]
      for entry in entries:
        about = entry["array_metadata"]
        impl = (about.get("ext_metadata") or {}).get("random_key_impl")
        if impl is not None:
          found[about["param_name"]] = str(impl)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
      problem = f"{name}, which should say what the arrays are: {in_brief(error)}"
      raise CheckpointFormatError.orbax(folder, problem) from error
  return found
