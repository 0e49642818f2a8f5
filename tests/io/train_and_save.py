"""A run of training that saves each step, and goes on where it was; the tests kill it.

python train_and_save.py FOLDER LOSSES STEPS async|sync
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from refax import nnx


class Batches:
  """An iterator with a state, as those of data loaders have."""

  def __init__(self):
    self.position = 0

  def __next__(self):
    self.position += 1
    return jnp.asarray(np.random.default_rng(self.position).standard_normal((8, 4)), jnp.float32)

  def get_state(self):
    return {"position": self.position}

  def set_state(self, state):
    self.position = state["position"]


class Net(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(4, 64, rngs=rngs)
    self.norm = nnx.BatchNorm(64, rngs=rngs)
    self.dropout = nnx.Dropout(0.2, rngs=rngs)
    self.last = nnx.Linear(64, 4, rngs=rngs)
    self.big = nnx.Cache(jnp.zeros(200_000))  # so that writing takes a while

  def __call__(self, x):
    self.big += 1
    return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


@nnx.jit
def train_step(net, optimizer, x):
  loss, grads = nnx.value_and_grad(lambda net: ((net(x) - x) ** 2).mean())(net)
  optimizer.update(net, grads)
  return loss


def make():
  net = Net(nnx.Rngs(0))
  return {
    "net": net,
    "optimizer": nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param),
    "rngs": nnx.Rngs(7),
    "batches": Batches(),
  }


def main(folder, losses, steps, mode):
  training, step = make(), 0
  with nnx.Checkpointer(folder, keep=2, asynchronous=mode == "async") as checkpoints:
    if checkpoints.steps:
      step = checkpoints.restore(training).step
    print("ready", flush=True)
    while step < int(steps):
      step += 1
      noise = 1e-3 * training["rngs"].normal(())
      loss = train_step(training["net"], training["optimizer"], next(training["batches"]) + noise)
      with open(losses, "a") as file:
        file.write(f"{step} {float(loss).hex()}\n")
      checkpoints.save(step, training, metrics={"loss": loss})
  print("done", float(jnp.sum(training["net"].big[...])), flush=True)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main(*sys.argv[1:])
