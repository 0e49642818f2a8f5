"""Models go to a file and come back, beside the packages that write the files by themselves.

By hand, arrays are saved and loaded by `safetensors.flax`, or by orbax with its manager of
checkpoints. Peaks of memory need a process a way, as in `process.py`, and include the model that is
filled: by hand, the arrays that are replaced.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import BASE, Steps
from benchmarks.process import PARAMETERS, _peak

LARGE = (PARAMETERS // 4 // 1024**2, 1024)
SMALL = (400, 8)
"""How many square matrices of float32, and how wide they are."""


def _matrices(size: tuple[int, int], value: float) -> dict[str, Any]:
  import jax.numpy as jnp

  n, width = size
  return {f"layers.{i}.kernel": jnp.full((width, width), value) for i in range(n)}


def _model(size: tuple[int, int], value: float) -> Any:
  import jax.numpy as jnp

  from refax import nnx

  n, width = size

  class Layer(nnx.Module):
    def __init__(self):
      self.kernel = nnx.Param(jnp.full((width, width), value))

  class Model(nnx.Module):
    def __init__(self):
      self.layers = [Layer() for _ in range(n)]

  return Model()


def _folder() -> Path:
  folder = tempfile.TemporaryDirectory(prefix="refax-benchmark-")
  _folders.append(folder)  # it goes with the process
  return Path(folder.name)


_folders: list[tempfile.TemporaryDirectory] = []


def _save_safetensors(size: tuple[int, int]) -> Callable[[], Any]:
  from refax import nnx

  model, path = _model(size, 0.5), _folder() / "model.safetensors"
  return lambda: nnx.save_safetensors(model, path)


def _save_safetensors_by_hand(size: tuple[int, int]) -> Callable[[], Any]:
  from safetensors.flax import save_file

  arrays, path = _matrices(size, 0.5), _folder() / "model.safetensors"
  return lambda: save_file(arrays, path)


def _load_safetensors(size: tuple[int, int]) -> Callable[[], Any]:
  from refax import nnx

  path = _written(size)
  model = _model(size, 0.0)
  return lambda: nnx.load_safetensors(model, path) and None


def _load_safetensors_by_hand(size: tuple[int, int]) -> Callable[[], Any]:
  from safetensors.flax import load_file

  path = _written(size)
  box: list[Any] = [_matrices(size, 0.0)]

  def call():
    box[0] = load_file(path)
    return box[0]

  return call


def _written(size: tuple[int, int]) -> Path:
  import numpy as np
  from safetensors.numpy import save_file

  path = _folder() / "model.safetensors"
  save_file({name: np.asarray(x) for name, x in _matrices(size, 0.5).items()}, path)
  return path


def _restore(size: tuple[int, int]) -> Callable[[], Any]:
  from refax import nnx

  checkpoints = nnx.Checkpointer(_folder())
  checkpoints.save(1, _model(size, 0.5))
  checkpoints.wait()
  model = _model(size, 0.0)
  return lambda: checkpoints.restore(model) and None


def _restore_by_hand(size: tuple[int, int]) -> Callable[[], Any]:
  import jax
  import orbax.checkpoint as ocp

  checkpoints = ocp.CheckpointManager(_folder())
  checkpoints.save(1, args=ocp.args.PyTreeSave(_matrices(size, 0.5)))
  checkpoints.wait_until_finished()
  box: list[Any] = [_matrices(size, 0.0)]
  place = lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype)

  def call():
    args = ocp.args.PyTreeRestore(box[0], restore_args=jax.tree.map(place, box[0]))
    box[0] = checkpoints.restore(1, args=args)
    return box[0]

  return call


def _optimizer(lib: str) -> Callable[[], Any]:
  import importlib

  import jax.numpy as jnp
  import optax

  nnx: Any = importlib.import_module(lib)

  n, width = LARGE

  class Model(nnx.Module):
    def __init__(self):
      self.kernels = nnx.List([nnx.Param(jnp.full((width, width), 0.5)) for _ in range(n)])

  model, tx = Model(), optax.adam(1e-3)
  box: list[Any] = [None]

  def call():
    box[0] = None
    box[0] = nnx.Optimizer(model, tx, wrt=nnx.Param)

  return call


def _optimizer_by_hand() -> Callable[[], Any]:
  import optax

  params, tx = _matrices(LARGE, 0.5), optax.adam(1e-3)
  box: list[Any] = [None]

  def call():
    box[0] = None
    box[0] = tx.init(params)

  return call


_CASES = {
  "save": (_save_safetensors_by_hand, _save_safetensors),
  "load": (_load_safetensors_by_hand, _load_safetensors),
  "restore": (_restore_by_hand, _restore),
}


def seconds(what: str, size: tuple[int, int]) -> Steps:
  """How long it takes to "save" or "load" a safetensors file, or to "restore" a checkpoint."""
  by_hand, refax = _CASES[what]
  return {BASE: by_hand(size), "Refax": refax(size)}


def memory(what: str) -> Steps:
  """Bytes of the process at its peak, for the large model; each way in a process of its own."""
  by_hand, refax = _CASES[what]
  return {
    BASE: lambda: _peak(partial(by_hand, LARGE)),
    "Refax": lambda: _peak(partial(refax, LARGE)),
  }


def optimizer_memory() -> Steps:
  """Bytes of the process at its peak while optimizers with the state of Adam are made."""
  return {
    BASE: lambda: _peak(_optimizer_by_hand),
    "Refax": lambda: _peak(partial(_optimizer, "refax.nnx")),
    "Flax": lambda: _peak(partial(_optimizer, "flax.nnx")),
  }
