"""Checkpointer: everything that training needs to go on, on disk, by orbax-checkpoint.

orbax writes arrays, also sharded ones, in the background; a checkpoint appears when it is
complete. What it does not know is here: Variables and what they share, typed PRNG keys, objects
that are filled in place, checksums, and who may write.
"""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refax.core.filters import Filter
from refax.errors import (
  CheckpointFormatError,
  CheckpointLockedError,
  CheckpointMismatchError,
  InvalidArgumentError,
  MissingCheckpointError,
)
from refax.io.keys import as_data, as_value, implementation
from refax.io.origin import written_by
from refax.io.slots import Slot, Slots, can_fill, fill, slots_of
from refax.typing import describe

FORMAT = 1
LOCK = ".lock"


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

  Args:
    folder: where to keep them; it is made if it does not exist.
    keep: how many of the latest to keep; None for all.
    keep_best: how many of the best to keep besides.
    best: the name of the metric that says which are the best.
    mode: "min" or "max": which values of the metric are good.
    asynchronous: whether `save` returns before everything is on disk.

  Raises:
    InvalidArgumentError: `mode` is neither, or `keep_best` comes without `best`.
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
    if keep_best and best is None:
      want = "the name of a metric that each save is given, such as best='loss'"
      raise InvalidArgumentError.value("Checkpointer", "best", best, want)
    ocp = _orbax()
    self.folder = os.path.abspath(folder)
    self._best = best
    policies: list[Any] = [ocp.checkpoint_managers.LatestN(keep)]
    if keep_best:
      policies.append(
        ocp.checkpoint_managers.BestN(
          get_metric_fn=lambda metrics: metrics[best], reverse=mode == "min", n=keep_best
        )
      )
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
        enable_async_checkpointing=asynchronous,
        # What a kill has left is removed by who may write, in `save`: a reader must not touch it.
        cleanup_tmp_directories=False,
        best_fn=None if best is None else lambda metrics: metrics[best],
        best_mode=mode,
      ),
      item_names=("state", "about"),
    )
    self._lock: Any = None

  @property
  def steps(self) -> list[int]:
    """The steps of all complete checkpoints, in order."""
    if self._lock is None:  # another process may have written more
      self._manager.reload()
    return sorted(self._manager.all_steps())

  def save(
    self,
    step: int,
    objects: Any,
    *,
    metrics: Mapping[str, float] | None = None,
    user: Any = None,
  ) -> None:
    """Write a checkpoint.

    Args:
      step: its number, greater than those of the checkpoints that are there.
      objects: Modules, Optimizers, Rngs, metrics, arrays, in dicts and lists; and things with
        `get_state()` and `set_state(state)`, such as the iterators of grain.
      metrics: numbers, by which the best are found.
      user: anything that JSON can hold.

    Raises:
      InvalidArgumentError: the step is not greater, `user` is nothing for JSON, or the metric of
        `best` is missing. Nothing has been written.
      CheckpointLockedError: another process writes to this folder.
      OSError: an earlier checkpoint could not be written in the background, or this one.
    """
    ocp = _orbax()
    steps = self.steps
    if steps and step <= steps[-1]:
      want = f"a step greater than {steps[-1]}, which is there; or delete its folder"
      raise InvalidArgumentError.value("Checkpointer.save", "step", step, want)
    metrics = {} if metrics is None else {name: float(x) for name, x in metrics.items()}
    if self._best is not None and self._best not in metrics:
      want = f"the metric {self._best!r}, by which the best checkpoints are kept"
      raise InvalidArgumentError.value("Checkpointer.save", "metrics", metrics, want)
    self._acquire()
    parted = _part(objects)
    slots = slots_of("Checkpointer.save", parted.objects, ..., ".")
    live = {slot.name: _array(slot.read()) for slot in slots.selected}
    values = {name: as_data(x) for name, x in live.items()}
    about = {
      "format": FORMAT,
      "written_by": written_by("orbax-checkpoint"),
      "arrays": {name: _facts(x, implementation(live[name])) for name, x in values.items()},
      "aliases": {name: slot.name for name, slot in slots.by_name.items() if name != slot.name},
      "iterators": {name: _state_of(x) for name, x in parted.iterators.items()},
      "metrics": metrics,
      "user": user,
    }
    try:
      json.dumps(about)
    except (TypeError, ValueError) as error:
      want = f"what JSON can hold ({error})"
      raise InvalidArgumentError.value("Checkpointer.save", "user", user, want) from None
    arrays = {name: x for name, x in values.items() if np.size(x)}  # orbax writes no empty ones
    self._manager.save(
      step,
      args=ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), about=ocp.args.JsonSave(about)),
      metrics=metrics or None,
    )

  def restore(self, objects: Any, *, step: int | None = None, only: Filter = ...) -> Restored:
    """Fill live objects from a checkpoint: Variables keep their identity, sharing and sharding.

    Args:
      objects: what `save` was given, or the like: freshly built, or abstract, from
        `nnx.eval_shape`. Arrays come to lie where those of the objects lie.
      step: which checkpoint; by default the latest.
      only: which Variables to fill; the others stay as they are.

    Returns:
      The step, and what was saved with it.

    Raises:
      MissingCheckpointError: there is no such checkpoint.
      CheckpointMismatchError: the objects differ from what was saved; a table says in what. Nothing
        has been changed.
      CheckpointFormatError: the checkpoint is damaged, or of a newer format. Nothing has been
        changed.
    """
    ocp = _orbax()
    step, path = self._found(step)
    with self._damage(path, step):
      about = self._manager.restore(
        step, args=ocp.args.Composite(about=ocp.args.JsonRestore())
      ).about
      if about["format"] > FORMAT:
        raise ValueError(f"format {about['format']}, this Refax reads up to {FORMAT}")
      arrays: dict[str, Any] = about["arrays"]
    parted = _part(objects)
    objects, iterators = parted.objects, parted.iterators
    slots = slots_of("Checkpointer.restore", objects, only, ".")
    rows = _mismatches(objects, slots, about, iterators if only is ... else {})
    if rows:
      raise CheckpointMismatchError.table(path, rows)
    wanted = {
      slot.name: _wanted(slot, arrays[slot.name])
      for slot in slots.selected
      if np.prod(arrays[slot.name]["shape"])
    }
    with self._damage(path, step):
      values = self._read(step, wanted)
      for name, x in values.items():
        if _checksum(x) not in (None, arrays[name]["crc32"]):
          raise ValueError(f"{name} has another checksum than when it was written")
    _fill(objects, slots, values, arrays)
    parted.hand_back()
    for name, iterator in iterators.items():
      if only is ...:
        iterator.set_state(_state_from(about["iterators"][name]))
    return Restored(step, about["user"], about["metrics"], about["written_by"])

  def wait(self) -> None:
    """Wait until everything is on disk.

    Raises:
      OSError: it could not be written.
    """
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Wait, and let other processes write to the folder."""
    try:
      self._manager.close()
    finally:
      if self._lock is not None:
        self._lock.close()
        self._lock = None

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _acquire(self) -> None:
    """Become the one who writes to the folder, and clear away what a killed writer has left."""
    if self._lock is not None or jax.process_index() != 0:
      return
    try:
      import fcntl
    except ImportError:  # not Unix: two writers are not found out
      return
    lock = open(os.path.join(self.folder, LOCK), "a+", encoding="utf-8")  # noqa: SIM115 - kept open
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      lock.seek(0)
      owner = lock.read().strip()
      lock.close()
      raise CheckpointLockedError.writer(self.folder, owner) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()}")
    lock.flush()
    self._lock = lock
    for name in os.listdir(self.folder):
      if _UNFINISHED in name:
        shutil.rmtree(os.path.join(self.folder, name), ignore_errors=True)

  def _found(self, step: int | None) -> tuple[int, str]:
    """The step to restore, and its folder."""
    steps = self.steps
    if not steps or (step is not None and step not in steps):
      raise MissingCheckpointError.step(self.folder, step, steps)
    step = steps[-1] if step is None else step
    return step, os.path.join(self.folder, str(step))

  @contextlib.contextmanager
  def _damage(self, path: str, step: int) -> Iterator[None]:
    """Whatever goes wrong while a checkpoint is read, as one error that says what else there is."""
    try:
      yield
    except Exception as error:
      problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
      others = [s for s in self.steps if s != step]
      raise CheckpointFormatError.step(path, problem, others) from error

  def _read(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
    ocp = _orbax()
    if not wanted:
      return {}
    args = ocp.args.PyTreeRestore(
      dict.fromkeys(wanted, 0), restore_args=wanted, partial_restore=True
    )
    return dict(self._manager.restore(step, args=ocp.args.Composite(state=args)).state)


_UNFINISHED = ".orbax-checkpoint-tmp"


def _orbax() -> Any:
  try:
    import orbax.checkpoint
  except ImportError:
    raise ImportError("nnx.Checkpointer needs orbax-checkpoint: pip install 'refax[io]'") from None
  return orbax.checkpoint


def _is_iterator(x: Any) -> bool:
  methods = ("get_state", "set_state")  # of its class: an Rngs has attributes of any name
  return all(callable(getattr(type(x), name, None)) for name in methods)


class _Parted(NamedTuple):
  """Objects without those of them that have a state of their own making, and these, by path."""

  objects: Any
  iterators: dict[str, Any]
  copies: list[tuple[dict, dict]]
  """Dicts of the user, and those that stand for them."""

  def hand_back(self) -> None:
    """What was filled in a copy of a dict is the user's."""
    for original, copy in self.copies:
      original.update({k: v for k, v in copy.items() if type(v) is not dict})


def _part(objects: Any) -> _Parted:
  if _is_iterator(objects):
    return _Parted({}, {"": objects}, [])
  iterators: dict[str, Any] = {}
  copies: list[tuple[dict, dict]] = []

  def visit(tree: Any, path: str) -> Any:
    if type(tree) is not dict:
      return tree
    parts = {k: (v, f"{path}.{k}".lstrip(".")) for k, v in tree.items()}
    iterators.update((p, v) for v, p in parts.values() if _is_iterator(v))
    copy = {k: visit(v, p) for k, (v, p) in parts.items() if not _is_iterator(v)}
    copies.append((tree, copy))
    return copy

  return _Parted(visit(objects, ""), iterators, copies)


def _state_of(iterator: Any) -> Any:
  """The state of an iterator as JSON; bytes as text."""
  state = iterator.get_state()
  return {"bytes": state.hex()} if isinstance(state, bytes) else {"json": state}


def _state_from(kept: dict[str, Any]) -> Any:
  return bytes.fromhex(kept["bytes"]) if "bytes" in kept else kept["json"]


def _array(x: Any) -> Any:
  """A number as an array."""
  return np.asarray(x) if isinstance(x, int | float | complex) else x


def _facts(value: Any, impl: str | None) -> dict[str, Any]:
  facts = {"shape": list(np.shape(value)), "dtype": str(value.dtype), "keys": impl}
  return facts | {"crc32": _checksum(value)}


def _checksum(x: Any) -> int | None:
  """Of the bytes of an array; None where this process does not have them all."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return None
  return zlib.crc32(np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8).data)


def _wanted(slot: Slot, facts: dict[str, Any]) -> Any:
  """What orbax is to make of an array: NumPy's where the slot holds that, else JAX's, in place."""
  ocp = _orbax()
  if isinstance(slot.cell, np.ndarray | np.generic | int | float | complex):
    return ocp.RestoreArgs(restore_type=np.ndarray)
  # The bits of keys are moved to where the keys lie when these are written.
  sharding = None if slot.is_key else getattr(slot.cell, "sharding", None)
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return ocp.ArrayRestoreArgs(sharding=sharding, dtype=facts["dtype"], strict=True)


def _mismatches(
  objects: Any, slots: Slots, about: dict[str, Any], iterators: dict[str, Any]
) -> list[tuple[str, str, str, str, str]]:
  """A row for everything in which objects and checkpoint differ."""
  arrays: dict[str, Any] = about["arrays"]
  rows, known = [], {*slots.by_name, *slots.others}
  for slot in slots.selected:
    saved = arrays.get(slot.name)
    if saved is None:
      fix = "restore with only=..., to leave it"
      rows.append(("", slot.name, "nothing", describe(slot.cell), fix))
      continue
    want = _stored_type(slot)
    if (tuple(saved["shape"]), saved["dtype"], saved["keys"] is not None) != want:
      has = f"{'keys, ' if saved['keys'] else ''}{saved['dtype']}{saved['shape']}".replace(" ", "")
      fix = "build the model as it was"
      rows.append((slot.name, slot.name, has, describe(slot.cell), fix))
    elif not can_fill(objects, slot):
      fix = "pass it inside a dict, a list or a Module"
      rows.append((slot.name, slot.name, "an array", "a value that cannot be changed", fix))
  for name in arrays:
    if name not in known:
      rows.append((name, "", "an array", "nothing", "build the model as it was"))
  for name in about["iterators"].keys() ^ iterators.keys():
    if iterators or name not in about["iterators"]:
      has, want = ("an iterator", "nothing") if name in about["iterators"] else ("nothing", "one")
      rows.append((name, name, has, want, "pass what was saved"))
  return rows


def _stored_type(slot: Slot) -> tuple[tuple[int, ...], str, bool]:
  """(shape, dtype, whether they are keys) of what is stored for a slot."""
  if not slot.is_key:
    return tuple(slot.shape), str(slot.dtype), False
  data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(slot.shape, slot.dtype))
  return data.shape, str(data.dtype), True


def _fill(objects: Any, slots: Slots, values: dict[str, Any], arrays: dict[str, Any]) -> None:
  """Write what was read; all of it fits."""
  for mine in slots.by_leaf():
    new = []
    for slot in mine:
      facts = arrays[slot.name]
      x = values.get(slot.name)
      x = jnp.zeros(facts["shape"], facts["dtype"]) if x is None else x  # an empty one
      new.append(as_value(x, facts["keys"]))
    fill(objects, mine, new)
