"""The folder of checkpoints: which are complete, who may write, what a killed writer has left."""

import contextlib
import os
import shutil
from typing import IO, Any

import jax

from refax.errors import CheckpointLockedError

LOCK = ".lock"
_UNFINISHED = ".orbax-checkpoint-tmp"


def complete_steps(folder: str) -> list[int]:
  """The steps of the checkpoints that are complete, in order; one gets its name when it is."""
  try:
    names = os.listdir(folder)
  except FileNotFoundError:
    return []
  steps = [int(name) for name in names if name.isascii() and name.isdigit()]
  return sorted(n for n in steps if os.path.isdir(os.path.join(folder, str(n))))


def lock(folder: str) -> IO[str] | None:
  """Become the one who writes to a folder, until the file that is returned is closed.

  Raises:
    CheckpointLockedError: another one is, in this process or another.
  """
  try:
    import fcntl
  except ImportError:  # not Unix: two writers are not found out
    return None
  if jax.process_index() != 0:
    return None
  os.makedirs(folder, exist_ok=True)
  file = open(os.path.join(folder, LOCK), "a+", encoding="utf-8")  # noqa: SIM115 - kept open
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    file.seek(0)
    owner = file.read().strip()
    file.close()
    raise CheckpointLockedError.writer(folder, owner) from None
  with contextlib.suppress(OSError):  # a full disk: the lock holds without its note
    file.truncate(0)
    file.write(f"process {os.getpid()}")
    file.flush()
  return file


def remove_unfinished(folder: str) -> None:
  """Remove what a writer that was killed, or that failed, has left. Only who writes may do so."""
  for name in os.listdir(folder):
    if _UNFINISHED in name:
      shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def unlock(file: Any) -> None:
  """Let others write."""
  if file is not None:
    with contextlib.suppress(OSError):  # its note could not be written
      file.close()
