"""orbax, undisturbed: one writer at a time, in a thread of its own, and what if a write fails."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from refax.core.processes import gathered
from refax.errors import CheckpointLockedError, CheckpointWriteError, InvalidArgumentError
from refax.io.best import Preserve, Ranking
from refax.io.folder import complete_steps, lock, remove_unfinished, unlock
from refax.io.stored import UNKNOWN_TO_ORBAX, as_bytes
from refax.io.worker import Worker, finish_before_exit, forget


def orbax() -> Any:
  """The package that writes, which is imported where it is needed."""
  try:
    import orbax.checkpoint
  except ImportError:
    raise ImportError("nnx.Checkpointer needs orbax-checkpoint: pip install 'refax[io]'") from None
  return orbax.checkpoint


class Writer:
  """An orbax manager of a folder, as far as it writes.

  orbax knows neither Ctrl-C nor a second thread: it writes in a thread of its own, undisturbed. A
  failure in the background is kept until somebody asks.

  Args:
    folder: the folder of the checkpoints.
    preserve: which checkpoints stay.
    asynchronous: whether `write` returns before everything is on disk.
  """

  def __init__(self, folder: str, preserve: Preserve, asynchronous: bool):
    ocp = orbax()
    self.folder = folder
    self.manager = ocp.CheckpointManager(
      folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=preserve,
        enable_async_checkpointing=asynchronous,
        # What a kill has left is removed by who may write: a reader must not touch it.
        cleanup_tmp_directories=False,
        **_tracking(preserve.ranking),
      ),
      item_names=("state", "about"),
    )
    self._worker = Worker()
    self._lock: Any = None
    self._may_write = False
    self._writing: int | None = None
    self._failure: CheckpointWriteError | None = None

  def acquire(self) -> None:
    """Become the one who writes to the folder, and clear away what a killed writer has left.

    Raises:
      CheckpointLockedError: another one is.
      CheckpointWriteError: this one is closed.
    """
    if self._worker.is_closed:
      raise CheckpointWriteError.closed(self.folder)
    if self._may_write:
      return
    self._lock = self._locked()
    self._may_write = True
    if self._lock is not None:
      remove_unfinished(self.folder)
    self._worker.run(self.manager.reload)  # another process may have written

  def _locked(self) -> Any:
    """The lock, which the first process holds for all: without it, none of them may go on."""
    lock_file = refusal = None
    try:
      lock_file = lock(self.folder)
    except CheckpointLockedError as error:
      refusal = error
    if any(gathered(np.array([refusal is not None]))):
      raise refusal or CheckpointLockedError.writer(self.folder, "another program")
    return lock_file

  def write(self, step: int, values: Mapping[str, Any], about: dict[str, Any]) -> None:
    """Hand everything to orbax, which writes no empty arrays, and no item without an array."""
    args = orbax().args
    arrays = {
      name: as_bytes(x) if str(x.dtype) in UNKNOWN_TO_ORBAX else x
      for name, x in values.items()
      if np.size(x)
    }
    items = {"state": args.PyTreeSave(arrays)} if arrays else {}
    composite = args.Composite(about=args.JsonSave(about), **items)
    self._writing = step
    finish_before_exit(self.wait)
    try:
      metrics = about["metrics"] or None
      saved = self._worker.run(self.manager.save, step, args=composite, metrics=metrics)
    except Exception as error:
      raise self._failed(error) from error
    if not saved:  # a signal handler has saved meanwhile
      want = "a step greater than that of the last checkpoint"
      raise InvalidArgumentError.value("Checkpointer.save", "step", step, want)

  def read(self, step: int, **items: Any) -> Any:
    """The items of a checkpoint. orbax takes Ctrl-C for damage, so it is read in the thread too."""

    def restore() -> Any:
      with jax.enable_x64(x64):  # a setting of each thread
        return self.manager.restore(step, args=orbax().args.Composite(**items))

    x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
    return restore() if self._worker.is_closed else self._worker.run(restore)

  def settle(self) -> None:
    """Wait; a failure is kept for who asks for it, in `wait`."""
    if not self._worker.is_closed:
      try:
        self._worker.run(self.manager.wait_until_finished)
      except Exception as error:
        self._failure = self._failed(error)
        self._failure.__cause__ = error
    forget(self.wait)

  def wait(self) -> None:
    """Wait until everything is on disk.

    Raises:
      CheckpointWriteError: it could not be written.
    """
    self.settle()
    failure, self._failure = self._failure, None
    if failure is not None:
      raise failure

  def close(self) -> None:
    """Wait, and let others write to the folder.

    Raises:
      CheckpointWriteError: something could not be written.
    """
    try:
      self.settle()
      if not self._worker.is_closed:
        self._worker.run(self.manager.close)
    except Exception as error:
      raise self._failed(error) from error
    finally:
      self._worker.close()
      unlock(self._lock)
      self._lock, self._may_write = None, False
    self.wait()

  def _failed(self, error: Exception) -> CheckpointWriteError:
    """The error for a write that failed. orbax has already counted out the older checkpoints."""
    if self._lock is not None:
      remove_unfinished(self.folder)
    if not self._worker.is_closed:
      self._worker.run(self.manager.reload)
    steps = complete_steps(self.folder)
    return CheckpointWriteError.step(self.folder, self._writing, error, steps)


def _tracking(ranking: Ranking | None) -> dict[str, Any]:
  """Orbax writes the metrics where other programs look for them, if it is told how to rank."""
  if ranking is None:
    return {}
  return {
    "best_fn": lambda metrics: metrics.get(ranking.metric, math.nan),
    "best_mode": ranking.mode,
  }
