"""Checkpointer: everything that training needs to go on, on disk, by orbax-checkpoint.

orbax writes arrays, also sharded ones, in the background; a checkpoint appears when it is
complete. What it does not know is here and beside: Variables and what they share (`match.py`),
their values at one moment (`snapshot.py`), typed PRNG keys, objects that are filled in place,
iterators (`parts.py`), checksums, which are the best (`best.py`), failures (`writer.py`).
"""

import contextlib
import json
import math
import operator
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refax import _jax
from refax.core.filters import Filter
from refax.core.owned import Owned
from refax.core.processes import check_same
from refax.core.variable import Variable
from refax.errors import (
  CheckpointFormatError,
  CheckpointMismatchError,
  InvalidArgumentError,
  MissingCheckpointError,
  in_brief,
)
from refax.io.best import Preserve, Ranking
from refax.io.folder import complete_steps
from refax.io.keys import as_data, as_value, implementation
from refax.io.match import Saved, matched
from refax.io.notes import decoded, encoded
from refax.io.origin import written_by
from refax.io.parts import part as parted_of
from refax.io.parts import state_from, states_of
from refax.io.slots import (
  Slot,
  Slots,
  can_fill,
  fill,
  hand_over,
  is_ref_slot,
  on_one_device,
  slots_of,
)
from refax.io.snapshot import of_this_process, snapshot
from refax.io.stored import UNKNOWN_TO_ORBAX, checksums, from_bytes
from refax.io.undo import undo_on_error
from refax.io.writer import Writer, orbax

FORMAT = 1


class Restored(NamedTuple):
  """What `Checkpointer.restore` found beside the state.

  Attributes:
    step: the step of the checkpoint.
    user: what `save` was given as `user`.
    metrics: what it was given as `metrics`.
    written_by: the versions of what wrote it, and when.
  """

  step: int
  user: Any
  metrics: dict[str, float]
  written_by: str


class Checkpointer:
  """Checkpoints of training in a folder, one for each step that is saved.

  A checkpoint appears when it is complete: one that a kill has interrupted is not there. Writing
  goes on in the background while training continues; the state is that of the call.

  With several processes (`jax.distributed`), all of them use it in the same way, on a folder that
  all of them see. Each writes its parts of what lies over their devices; other arrays have to be
  the same in each. Iterators may each have a state of their own.

  Args:
    folder: where to keep them; it is made if it does not exist.
    keep: how many of the latest to keep; None for all.
    keep_best: how many of the best to keep besides. One whose metric is missing or NaN is not
      among them.
    best: the name of the metric that says which are the best; see `best_step`.
    mode: "min" or "max": which values of the metric are good.
    asynchronous: whether `save` returns before everything is on disk.

  Raises:
    InvalidArgumentError: `mode` is neither, `keep` or `keep_best` is no number of checkpoints, or
      `keep_best` comes without `best`.
    ImportError: orbax-checkpoint is not installed.

  >>> from refax import nnx; import optax, tempfile
  >>> def make(seed):
  ...   model = nnx.Linear(2, 3, rngs=nnx.Rngs(seed))
  ...   return {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)}
  >>> training, again = make(0), make(1)
  >>> with nnx.Checkpointer(tempfile.mkdtemp()) as checkpoints:
  ...   checkpoints.save(10, training, user={"epoch": 1})
  ...   checkpoints.wait()
  ...   restored = checkpoints.restore(again)
  >>> restored.step, restored.user, bool((again["model"].kernel == training["model"].kernel).all())
  (10, {'epoch': 1}, True)
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    *,
    keep: int | None = 3,
    keep_best: int = 0,
    best: str | None = None,
    mode: str = "min",
    asynchronous: bool = True,
  ):
    if mode not in ("min", "max"):
      raise InvalidArgumentError.value("Checkpointer", "mode", mode, '"min" or "max"')
    keep = None if keep is None else _count("Checkpointer", "keep", keep)
    keep_best = _count("Checkpointer", "keep_best", keep_best)
    if keep_best and best is None:
      raise InvalidArgumentError.value("Checkpointer", "best", best, _METRIC)
    self.folder = os.path.abspath(folder)
    self._ranking = None if best is None else Ranking(self.folder, best, mode)
    preserve = Preserve(keep, keep_best, self._ranking)
    self._writer = Writer(self.folder, preserve, asynchronous)
    self._turn = threading.RLock()  # orbax does not know of threads

  @property
  def steps(self) -> list[int]:
    """The steps of all complete checkpoints, in order."""
    return complete_steps(self.folder)

  @property
  def best_step(self) -> int:
    """The step of the best complete checkpoint, by the metric `best`; of equal ones the latest.

    Raises:
      MissingCheckpointError: no checkpoint has this metric, or it is NaN in all.
      InvalidArgumentError: the Checkpointer was not told which metric.
    """
    if self._ranking is None:
      raise InvalidArgumentError.value("Checkpointer.best_step", "best", None, _METRIC)
    with self._turn:
      self._writer.settle()
    steps = self.steps
    best = self._ranking.best(steps, list(map(self._ranking.value, steps)), 1)
    if not best:
      raise MissingCheckpointError.best(self.folder, self._ranking.metric, steps)
    return best[0]

  def save(
    self,
    step: int,
    objects: Any,
    *,
    metrics: Mapping[str, float] | None = None,
    user: Any = None,
  ) -> None:
    """Write a checkpoint. Other threads may train meanwhile: it holds the state between two steps.

    Args:
      step: its number, greater than those of the checkpoints that are there.
      objects: Modules, Optimizers, Rngs, metrics, arrays, in dicts and lists; and things with
        `get_state()` and `set_state(state)`, such as the iterators of grain.
      metrics: numbers, by which the best are found. NaN is worse than any other.
      user: numbers, strings, bytes, bools and None, in dicts, lists and tuples; it comes back as
        it is.

    Raises:
      InvalidArgumentError: the step is not greater, `objects` or `user` hold what cannot be saved
        or restored, or the metric of `best` is missing. Nothing has been written.
      ProcessMismatchError: a value that all processes have is another one in some of them.
      CheckpointLockedError: another process writes to this folder.
      CheckpointWriteError: an OSError. An earlier checkpoint could not be written in the
        background, or this one. Those that were complete are still there.
    """
    function = "Checkpointer.save"
    step = _count(function, "step", step)
    metrics = self._metrics(metrics)
    notes = encoded(function, "user", user)
    with self._turn:
      self._writer.acquire()
      self._writer.wait()
      steps = self.steps
      if steps and step <= steps[-1]:
        want = f"a step greater than {steps[-1]}, which is there; or delete its folder"
        raise InvalidArgumentError.value(function, "step", step, want)
      self._writer.write(step, *_content(objects, metrics, notes))

  def restore(
    self, objects: Any, *, step: int | None = None, only: Filter = ..., part: str | None = None
  ) -> Restored:
    """Fill live objects from a checkpoint: Variables keep their identity, sharing and sharding.

    Args:
      objects: what `save` was given, or the like: freshly built, or abstract, from
        `nnx.eval_shape`. Arrays come to lie where those of the objects lie.
      step: which checkpoint; by default the latest. See `steps` and `best_step`.
      only: which Variables to fill; the others stay as they are.
      part: the path of one part of what was saved, for which `objects` stands: with
        `save(step, {"model": model, "optimizer": optimizer})`, `restore(model, part="model")`
        restores the model alone.

    Returns:
      The step, and what was saved with it.

    Raises:
      MissingCheckpointError: there is no such checkpoint.
      CheckpointMismatchError: the objects differ from what was saved; a table says in what. Nothing
        has been changed.
      CheckpointFormatError: the checkpoint is damaged, or of a newer format. Nothing has been
        changed.
      InvalidArgumentError: there is no such part, or the objects hold what cannot be restored.
    """
    function = "Checkpointer.restore"
    with self._turn:
      self._writer.settle()
      step, path = self._found(step)
      about, saved = self._about(step, path, part)
      parted = parted_of(function, objects)
      slots = slots_of(function, parted.objects, only, ".")
      iterators = parted.iterators if only is ... else None
      match = matched(parted.objects, slots, saved, iterators)
      if match.rows:
        raise CheckpointMismatchError.table(path, match.rows)
      wanted = {
        match.sources[slot.name]: _wanted(slot, saved.arrays[match.sources[slot.name]])
        for slot in slots.selected
        if math.prod(saved.arrays[match.sources[slot.name]]["shape"])
      }
      states = {name: state_from(name, saved.iterators[name]) for name in iterators or ()}
      with self._damage(path, step):
        values = self._read(step, wanted, saved)
      with undo_on_error(parted.objects, slots.selected, parted):
        _fill(parted.objects, slots, match.sources, values, saved)
        parted.hand_back()
        for name, iterator in (iterators or {}).items():
          iterator.set_state(states[name])
    return Restored(step, decoded(about["user"]), about["metrics"], about["written_by"])

  def wait(self) -> None:
    """Wait until everything is on disk.

    Raises:
      CheckpointWriteError: an OSError, it could not be written.
    """
    with self._turn:
      self._writer.wait()

  def close(self) -> None:
    """Wait, and let other processes write to the folder.

    Raises:
      CheckpointWriteError: an OSError, something could not be written.
    """
    with self._turn:
      self._writer.close()

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _metrics(self, metrics: Any) -> dict[str, float]:
    """Metrics as they are kept, the one that ranks among them."""
    function, metrics = "Checkpointer.save", {} if metrics is None else metrics
    try:
      kept = {name: float(x) for name, x in metrics.items()}
      if not all(isinstance(name, str) for name in kept):
        raise TypeError
    except (AttributeError, TypeError, ValueError):
      want = "a dict of numbers by their names"
      raise InvalidArgumentError.value(function, "metrics", metrics, want) from None
    if self._ranking is not None and self._ranking.metric not in kept:
      want = f"the metric {self._ranking.metric!r}, by which the best checkpoints are kept"
      raise InvalidArgumentError.value(function, "metrics", metrics, want)
    return kept

  def _found(self, step: int | None) -> tuple[int, str]:
    """The step to restore, and its folder."""
    step = None if step is None else _count("Checkpointer.restore", "step", step)
    steps = self.steps
    if not steps or (step is not None and step not in steps):
      raise MissingCheckpointError.step(self.folder, step, steps)
    step = steps[-1] if step is None else step
    return step, os.path.join(self.folder, str(step))

  def _about(self, step: int, path: str, part: str | None) -> tuple[dict[str, Any], Saved]:
    """The JSON of a checkpoint, and what it says of the part that is wanted."""
    with self._damage(path, step):
      about = self._writer.read(step, about=orbax().args.JsonRestore()).about
      if about["format"] > FORMAT:
        raise ValueError(f"format {about['format']}, this Refax reads up to {FORMAT}")
      whole = Saved.of(about, None)
    saved = whole if part is None else Saved.of(about, part)
    if part is not None and not saved.names and not saved.iterators:
      parts = sorted({name.split(".")[0] for name in (*whole.names, *whole.iterators)})
      want = f"the path of a part of what was saved, such as {', '.join(map(repr, parts[:8]))}"
      raise InvalidArgumentError.value("Checkpointer.restore", "part", part, want)
    return about, saved

  @contextlib.contextmanager
  def _damage(self, path: str, step: int) -> Iterator[None]:
    """Whatever goes wrong while a checkpoint is read, as one error that says what else there is."""
    try:
      yield
    except Exception as error:
      others = [s for s in self.steps if s != step]
      raise CheckpointFormatError.step(path, in_brief(error), others) from error

  def _read(self, step: int, wanted: dict[str, Any], saved: Saved) -> dict[str, Any]:
    """The arrays by their names in the checkpoint, with the right checksums."""
    if not wanted:
      return {}
    tree = dict.fromkeys(wanted, 0)
    args = orbax().args.PyTreeRestore(tree, restore_args=wanted, partial_restore=True)
    values = dict(self._writer.read(step, state=args).state)
    for name in values:
      facts = saved.arrays[name]
      if "stored" in facts:
        values[name] = from_bytes(values[name], facts["dtype"])
    for name, found in checksums(values).items():
      want = saved.arrays[name]["crc32"]  # None: no process that saved it had all of it
      if None not in (found, want) and found != want:
        raise ValueError(f"{name} has another checksum than when it was written")
    return values


_METRIC = "the name of a metric that each save is given, such as best='loss'"


def _count(function: str, name: str, value: Any) -> int:
  """An int of at least 0."""
  try:
    number = -1 if isinstance(value, bool | np.bool_) else operator.index(value)
  except TypeError:
    number = -1
  if number < 0:
    raise InvalidArgumentError.value(function, name, value, "an int of at least 0")
  return number


def _content(
  objects: Any, metrics: dict[str, float], notes: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
  """What a checkpoint of these objects holds: arrays by name, and JSON about them."""
  function = "Checkpointer.save"
  parted = parted_of(function, objects)
  slots = slots_of(function, parted.objects, ..., ".")
  _check_fillable(function, parted.objects, slots)
  live = snapshot(function, slots.selected)
  values = {name: of_this_process(as_data(x)) for name, x in live.items()}
  sums = checksums(values)
  check_same(function, sums)
  about = {
    "format": FORMAT,
    "written_by": written_by("orbax-checkpoint"),
    "arrays": {
      name: _facts(x, implementation(live[name]), sums[name]) for name, x in values.items()
    },
    "aliases": {name: slot.name for name, slot in slots.by_name.items() if name != slot.name},
    "iterators": states_of(function, parted.iterators),
    "metrics": metrics,
    "user": notes,
  }
  _check_json(about)
  return values, about


def _check_fillable(function: str, objects: Any, slots: Slots) -> None:
  """Raise InvalidArgumentError for an array that `restore` would have no place for."""
  for slot in slots.selected:
    if not isinstance(slot.holder, Variable) and not can_fill(objects, slot):
      want = "it inside a dict, a list or a Module, where restore can put it back"
      raise InvalidArgumentError.value(function, slot.name or "objects", slot.cell, want)


def _check_json(about: dict[str, Any]) -> None:
  try:
    json.dumps(about)
  except (TypeError, ValueError, RecursionError) as error:
    want = f"what JSON can hold ({error})"
    raise InvalidArgumentError.value("Checkpointer.save", "user", about["user"], want) from None


def _facts(value: Any, impl: str | None, checksum: int | None) -> dict[str, Any]:
  facts = {"shape": list(np.shape(value)), "dtype": str(value.dtype), "keys": impl}
  stored = {"stored": "uint8"} if facts["dtype"] in UNKNOWN_TO_ORBAX else {}
  return facts | stored | {"crc32": checksum}


def _wanted(slot: Slot, facts: dict[str, Any]) -> Any:
  """What orbax is to make of an array: NumPy's where the slot holds that, else JAX's, in place."""
  ocp = orbax()
  if _is_numpy(slot) or on_one_device(slot):  # JAX's arrays cost orbax another copy
    return ocp.RestoreArgs(restore_type=np.ndarray)
  # The bits of keys are moved to where the keys lie when these are written.
  sharding = None if slot.is_key else getattr(slot.cell, "sharding", None)
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  dtype = facts.get("stored", facts["dtype"])
  return ocp.ArrayRestoreArgs(sharding=sharding, dtype=dtype, strict=True)


def _is_numpy(slot: Slot) -> bool:
  return isinstance(slot.cell, np.ndarray | np.generic | int | float | complex)


def _fill(
  objects: Any, slots: Slots, sources: dict[str, str], values: dict[str, Any], saved: Saved
) -> None:
  """Write what was read; all of it fits. Each array is let go of when it has been written."""
  uses = Counter(sources[slot.name] for slot in slots.selected)
  places = {name: i for i, name in enumerate(values)}
  arrays = [values.pop(name) for name in places]
  owned = Owned(arrays)
  for mine in slots.by_leaf():
    new = []
    for slot in mine:
      source = sources[slot.name]
      facts, i = saved.arrays[source], places.get(source)
      uses[source] -= 1
      if i is None:  # an empty one
        x = (np if _is_numpy(slot) else jnp).zeros(facts["shape"], jnp.dtype(facts["dtype"]))
      elif uses[source]:  # what was shared and is not any more
        x = _jax.copied(arrays[i]) if isinstance(arrays[i], jax.Array) else arrays[i].copy()
      elif is_ref_slot(slot) and (isinstance(arrays[i], np.ndarray) or owned(i)):
        x, arrays[i] = arrays[i], None
        hand_over(slot, x)
        continue
      else:
        x, arrays[i] = arrays[i], None
      new.append(as_value(x, facts["keys"]))
      x = None
    if new:
      fill(objects, mine, new)
