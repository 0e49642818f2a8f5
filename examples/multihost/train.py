"""The program that each process runs: `python -m examples.multihost.train --task text`.

All processes do the same, in the same order. Only the first one prints and writes results; what it
needs for that is gathered by all of them.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from examples.multihost.data import assembled, batches
from examples.multihost.launch import join
from examples.multihost.tasks import TASKS, Task
from refax import nnx

TRY_AGAIN = 75  # the exit status for it, of sysexits.h


def main(argv: list[str] | None = None) -> None:
  options = parse_options(argv)
  join()
  mesh = make_mesh(options.mesh)
  by_rows = NamedSharding(mesh, PartitionSpec("data"))
  task = TASKS[options.task]
  model, optimizer = build(task, mesh, options.seed)
  data = batches(task.source(), options.batch_size, by_rows, options.seed)
  training = {"model": model, "optimizer": optimizer, "data": data}
  train_step = make_step(task)
  losses = []

  with nnx.Checkpointer(options.folder / "checkpoints", keep=2) as checkpoints:
    if checkpoints.steps:
      restored = checkpoints.restore(training)
      losses = restored.user["losses"]
      say(f"restored step {restored.step}")
      write_state(options.folder / f"{options.name}_restored.npz", model, optimizer)
    for step in range(len(losses), options.steps):
      if options.kill == [jax.process_index(), step]:
        os.kill(os.getpid(), signal.SIGKILL)
      if options.terminate == [jax.process_index(), step]:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2)  # JAX looks for it once a second, and these steps are short
      batch = assembled(next(data), options.batch_size, by_rows)
      losses.append(float(train_step(model, optimizer, batch)))
      stop = told_to_stop(step)
      if stop or (step + 1) % options.save_every == 0:
        checkpoints.save(step + 1, training, user={"losses": losses})
      if stop:
        say(f"told to stop, saved step {step + 1}")
        sys.exit(TRY_AGAIN)  # not 0: the job is not done, and is to be started again
    say(f"step {len(losses)}: loss {losses[-1]:.4f}")
  write_state(options.folder / f"{options.name}_final.npz", model, optimizer)
  if jax.process_index() == 0:
    (options.folder / f"{options.name}_losses.json").write_text(json.dumps(losses))


def told_to_stop(step: int) -> bool:
  """Whether a process got SIGTERM, as before a node is taken away: all learn it at one step."""
  return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def make_mesh(shape: list[int] | None) -> jax.sharding.Mesh:
  """All devices of all processes, along `data`, or along `data` and `model`."""
  shape = shape or [jax.device_count()]
  axes = ("data", "model")[: len(shape)]
  return jax.make_mesh(tuple(shape), axes, axis_types=(AxisType.Auto,) * len(axes))


def build(task: Task, mesh: jax.sharding.Mesh, seed: int) -> tuple[nnx.Module, nnx.Optimizer]:
  """One model of all processes, of which each makes the parts that lie on its devices."""
  make = lambda: task.model(nnx.Rngs(seed))
  model = nnx.create_sharded(make, mesh, task.plan(mesh.axis_names))
  return model, nnx.Optimizer(model, task.optimizer, wrt=nnx.Param)  # it lies as the model does


def make_step(task: Task):
  @nnx.jit
  def train_step(model, optimizer, batch):
    loss, grads = nnx.value_and_grad(lambda model: task.loss(model, batch))(model)
    optimizer.update(model, grads)
    return loss  # the mean over the batches of all processes

  return train_step


def write_state(path: Path, *objects) -> None:
  """The whole state as NumPy's file, by the first process; to compare runs with."""
  arrays = {}
  for name, variable in nnx.to_flat_state(nnx.state(objects)):
    x = variable[...]
    x = jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    arrays[".".join(map(str, name))] = multihost_utils.process_allgather(x, tiled=True)
  if jax.process_index() == 0:
    np.savez(path, **arrays)


def say(text: str) -> None:
  if jax.process_index() == 0:
    print(text, flush=True)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--task", choices=sorted(TASKS), default="digits")
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("--batch-size", type=int, default=64, help="rows, in all processes together")
  parser.add_argument("--mesh", type=numbers, help="devices along data and model, such as 2,2")
  parser.add_argument("--save-every", type=int, default=5, help="steps between checkpoints")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--folder", type=Path, default=Path("out/multihost"))
  parser.add_argument("--name", default="run", help="begins the names of the files of results")
  parser.add_argument("--kill", type=numbers, help="PROCESS,STEP: end like a machine that fails")
  parser.add_argument("--terminate", type=numbers, help="PROCESS,STEP: get SIGTERM there")
  options = parser.parse_args(argv)
  options.folder = options.folder.absolute()
  options.folder.mkdir(parents=True, exist_ok=True)
  return options


def numbers(text: str) -> list[int]:
  return [int(x) for x in text.split(",")]


if __name__ == "__main__":
  main()
