"""Loggers: numbers of a training run, written step by step to files."""

import dataclasses
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np

from refax import _jax
from refax.core.variable import Variable, is_variable
from refax.errors import InvalidArgumentError, MissingPackageError


class Logger:
  """What takes the numbers of a training run; the base of loggers of your own.

  A logger is a context, and closes at its end.

  >>> from refax import nnx
  >>> class Printer(nnx.Logger):
  ...   def log(self, step, scalars): print(step, scalars)
  >>> with Printer() as logger:
  ...   logger.log(0, {"loss": 0.5})
  0 {'loss': 0.5}
  """

  def log(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Write the numbers of a step."""
    raise NotImplementedError(f"{type(self).__name__} has no method log")

  def close(self) -> None:
    """Write what is not written yet, and end."""

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


class JsonLogger(Logger):
  """A file with one JSON object a line: `{"step": 3, "time": 1700000000.0, "loss": 0.5}`.

  Each line is flushed, so that another program can read along. An existing file is continued; a
  line that a killed run has left unfinished is removed. NaN and infinities, which JSON does not
  have, are the strings `"NaN"`, `"Infinity"` and `"-Infinity"`; `read` gives the floats back.

  Args:
    path: the file; its folder is made if it is missing.
    first_step: lines of this step and later ones are removed: those of a run that is continued from
      an earlier checkpoint.

  Raises:
    InvalidArgumentError: `first_step` is not an int, or the file was not written by a JsonLogger.
    OSError: the file cannot be written; the path is a folder.

  >>> from refax import nnx; import jax.numpy as jnp, os, tempfile
  >>> path = os.path.join(tempfile.mkdtemp(), "log.jsonl")
  >>> with nnx.JsonLogger(path) as logger:
  ...   logger.log(0, {"loss": jnp.float32(0.5), "norms": {"a": jnp.nan}})
  >>> [(line["step"], line["loss"], line["norms/a"]) for line in nnx.JsonLogger.read(path)]
  [(0, 0.5, nan)]
  """

  def __init__(self, path: str | os.PathLike[str], *, first_step: int | None = None):
    self.path = os.fspath(path)
    if first_step is not None:
      first_step = _step("JsonLogger", "first_step", first_step)
    os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
    _repair(self.path, first_step)
    self._lock = threading.Lock()
    self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - until `close`

  def log(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Write a line.

    Args:
      step: the step, an int or an integer array.
      scalars: numbers by name: Python's, NumPy's, JAX's, Variables; dicts in it give names such as
        `"norms/encoder"`. An array of several elements is written as a list.

    Raises:
      InvalidArgumentError: a value is no number, a name is `step` or `time` or occurs twice, or the
        logger is closed; nothing has been written.
    """
    line: dict[str, Any] = {"step": _step("JsonLogger", "step", step), "time": time.time()}
    for name, value in _flat("JsonLogger", scalars):
      if name in line:
        want = "names that differ from each other, and from step and time"
        raise InvalidArgumentError.value("JsonLogger", "scalars", {name: value}, want)
      line[name] = _as_json(value.tolist())
    text = json.dumps(line, allow_nan=False) + "\n"
    with self._lock:
      if self._file.closed:
        raise InvalidArgumentError.value("JsonLogger", "log", "a closed logger", "one that is open")
      self._file.write(text)
      self._file.flush()

  def close(self) -> None:
    """End; the file is complete. Nothing happens the second time."""
    with self._lock:
      self._file.close()

  @staticmethod
  def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a file as dicts, with floats for what JSON does not have.

    A last line that is not complete is left out.

    Args:
      path: the file.

    Raises:
      OSError: the file cannot be read.
      json.JSONDecodeError: another line than the last is no JSON.
    """
    with open(path, "rb") as file:
      lines = file.read().split(b"\n")
    return [
      {k: _from_json(x) for k, x in json.loads(line).items()} for line in lines[:-1] if line.strip()
    ]


class TensorBoardLogger(Logger):
  """A folder that TensorBoard shows, written by tensorboardX: `pip install 'refax[tensorboard]'`.

  Args:
    folder: where the files are written; made if it is missing. Several runs in one folder are
      continuations of each other.
    first_step: what earlier runs wrote for this step and later ones is hidden.

  Raises:
    InvalidArgumentError: `first_step` is not an int.
    MissingPackageError: tensorboardX is not installed.

  >>> from refax import nnx; import jax.numpy as jnp, os, tempfile
  >>> folder = tempfile.mkdtemp()
  >>> with nnx.TensorBoardLogger(folder) as logger:
  ...   logger.log(0, {"loss": jnp.float32(0.5), "gradients": {"all": 2.0}})
  >>> len(os.listdir(folder))
  1
  """

  def __init__(self, folder: str | os.PathLike[str], *, first_step: int | None = None):
    first_step = (
      None if first_step is None else _step("TensorBoardLogger", "first_step", first_step)
    )
    try:
      import tensorboardX
    except ImportError:
      what = "nnx.TensorBoardLogger"
      raise MissingPackageError.extra(what, "tensorboardX", "tensorboard") from None
    self.folder = os.fspath(folder)
    self._writer: Any = tensorboardX.SummaryWriter(self.folder, purge_step=first_step)
    self._lock = threading.Lock()
    self._is_open = True

  def log(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Write the numbers of a step.

    Args:
      step: the step, an int or an integer array.
      scalars: numbers by name, as `nnx.JsonLogger.log` takes them. An array of several elements is
        written as a histogram of those that are finite.

    Raises:
      InvalidArgumentError: a value is no number, a name occurs twice, or the logger is closed;
        nothing has been written.
    """
    number, seen = _step("TensorBoardLogger", "step", step), dict[str, Any]()
    for name, value in _flat("TensorBoardLogger", scalars):
      if name in seen:
        want = "names that differ from each other"
        raise InvalidArgumentError.value("TensorBoardLogger", "scalars", {name: value}, want)
      seen[name] = value
    with self._lock:
      if not self._is_open:
        want = "one that is open"
        raise InvalidArgumentError.value("TensorBoardLogger", "log", "a closed logger", want)
      for name, value in seen.items():
        if value.ndim == 0:
          self._writer.add_scalar(name, float(value), number)
          continue
        finite = value.astype(np.float64).ravel()
        finite = finite[np.isfinite(finite)]
        if finite.size:
          self._writer.add_histogram(name, finite, number)

  def close(self) -> None:
    """Write what is not written yet, and end. Nothing happens the second time."""
    with self._lock:
      if self._is_open:
        self._is_open = False
        self._writer.close()


def _step(logger: str, name: str, step: Any) -> int:
  value = np.asarray(step.get_value() if isinstance(step, Variable) else step)
  if value.ndim or value.dtype.kind not in "iu":
    raise InvalidArgumentError.value(logger, name, step, "an int")
  return int(value)


def _flat(logger: str, scalars: Any) -> Iterator[tuple[str, np.ndarray]]:
  """(name, number or array) of all that is in nested dicts, fetched from the device at once."""
  if not isinstance(scalars, Mapping):
    raise InvalidArgumentError.value(logger, "scalars", scalars, "a dict of numbers by name")
  found = list(_walk(logger, "", scalars))
  for name, x in found:
    if _jax.is_tracer(x):
      want = "values that are known: call log outside of the compiled function"
      raise InvalidArgumentError.value(logger, "scalars", {name: x}, want)
  fetched = jax.device_get([value for _, value in found])
  for (name, given), value in zip(found, fetched, strict=True):
    try:
      array = np.asarray(value)
      array = array.astype(np.float32) if array.dtype.kind == "V" else array  # bfloat16, float8
    except (TypeError, ValueError):
      array = np.asarray(None)
    if array.dtype.kind not in "biuf":
      want = "real numbers, or dicts of them"
      raise InvalidArgumentError.value(logger, "scalars", {name: given}, want)
    yield name, array.reshape(()) if array.size == 1 else array


def _walk(logger: str, name: str, value: Any) -> Iterator[tuple[str, Any]]:
  if dataclasses.is_dataclass(value) and not isinstance(value, type) and not is_variable(value):
    value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
  if not isinstance(value, Mapping):
    yield name, value.get_value() if isinstance(value, Variable) else value
    return
  for key, inner in value.items():
    yield from _walk(logger, f"{name}/{key}" if name else str(key), inner)


def _as_json(x: Any) -> Any:
  if isinstance(x, list):
    return [_as_json(y) for y in x]
  if isinstance(x, float) and not math.isfinite(x):
    return "NaN" if math.isnan(x) else ("Infinity" if x > 0 else "-Infinity")
  return x


def _from_json(x: Any) -> Any:
  if isinstance(x, list):
    return [_from_json(y) for y in x]
  return float(x) if x in ("NaN", "Infinity", "-Infinity") else x


_BEGINNING = b'{"step": '


def _repair(path: str, first_step: int | None) -> None:
  """Remove a last line that is not complete, and the steps that are to be written again."""
  if not os.path.exists(path):
    return
  with open(path, "rb+") as file:
    content = file.read()
    if content[: len(_BEGINNING)] != _BEGINNING[: len(content)]:
      want = "the path of a new file, or of one that a JsonLogger has written"
      raise InvalidArgumentError.value("JsonLogger", "path", path, want)
    end = content.rfind(b"\n") + 1
    if end < len(content):
      file.truncate(end)
  if first_step is None:
    return
  lines = content[:end].splitlines(keepends=True)
  kept = [line for line in lines if not line.strip() or json.loads(line)["step"] < first_step]
  if len(kept) == len(lines):
    return
  beside = f"{path}.{os.getpid()}.tmp"
  with open(beside, "wb") as file:
    file.writelines(kept)
    file.flush()
    os.fsync(file.fileno())
  os.replace(beside, path)
