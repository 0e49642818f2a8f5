"""A save sees one whole step, whatever other threads do meanwhile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import _jax, nnx
from refax.errors import CheckpointWriteError, InvalidArgumentError
from tests.training_thread import Training

pytest.importorskip("orbax.checkpoint", reason="checkpoints are written by orbax-checkpoint")


class Counters(nnx.Module):
  """All of them are equal between two steps."""

  def __init__(self, n):
    self.parts = nnx.List([nnx.Variable(jnp.zeros(100)) for _ in range(n)])
    self.key = nnx.Variable(jax.random.split(jax.random.key(0), 1))

  def values(self):
    return {float(x) for part in self.parts for x in np.unique(part[...])}


@nnx.jit
def step(counters):
  for part in counters.parts:
    part += 1
  counters.key[...] = counters.key[...][::-1]


CONCURRENT = pytest.mark.skipif(
  not _jax.no_trace_active(), reason="public JAX has no way to look at Refs of another thread"
)


@CONCURRENT
@pytest.mark.parametrize("n", [1, 10, 100])
def test_a_save_while_another_thread_trains_holds_one_step(n, tmp_path):
  counters, live = Counters(n), Counters(n)
  with nnx.Checkpointer(tmp_path, keep=None) as checkpoints:
    with Training(step, counters):
      for i in range(8):
        checkpoints.save(i, counters)
    for i in range(8):
      checkpoints.restore(live, step=i)
      assert len(live.values()) == 1


@CONCURRENT
def test_a_snapshot_of_many_moments():
  counters = Counters(20)
  refs = [part.get_raw_value() for part in counters.parts]
  with Training(step, counters):
    for _ in range(300):
      assert len({float(x[0]) for x in _jax.snapshot(refs)}) == 1
  assert _jax.snapshot([]) == []


@CONCURRENT
def test_a_safetensors_file_holds_one_step_too(tmp_path):
  counters, live = Counters(30), Counters(30)
  with Training(step, counters):
    for i in range(5):
      nnx.save_safetensors(counters, tmp_path / f"{i}.safetensors")
  for i in range(5):
    nnx.load_safetensors(live, tmp_path / f"{i}.safetensors")
    assert len(live.values()) == 1


@CONCURRENT
def test_who_never_pauses_is_an_error_and_nothing_is_written(tmp_path, monkeypatch):
  def deleted(xs):
    jax.block_until_ready(xs)
    raise RuntimeError("Array has been deleted")

  v = nnx.Variable(jnp.ones(2))
  monkeypatch.setattr(_jax, "_copy_all", deleted)
  with nnx.Checkpointer(tmp_path) as checkpoints:
    with pytest.raises(RuntimeError, match="deleted"):  # it was not: the error is passed on
      checkpoints.save(1, v)
    monkeypatch.setattr(jax.Array, "is_deleted", lambda x: True, raising=False)
    monkeypatch.setattr(type(jnp.ones(())), "is_deleted", lambda x: True)
    with pytest.raises(CheckpointWriteError, match="no moment was found at which all Variables"):
      checkpoints.save(1, v)
    monkeypatch.undo()
    assert checkpoints.steps == []
    checkpoints.save(1, v)


def test_arrays_of_the_user_may_change_or_be_donated_afterwards(tmp_path):
  n = 300_000
  objects = {
    "numpy": np.ones(n),
    "jax": jnp.ones(n),
    "v": nnx.Variable(jnp.ones(n), is_hijax=False),
  }
  donate = jax.jit(lambda x: x + 1, donate_argnums=0)
  with nnx.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, objects)
    objects["numpy"] += 1
    donate(donate(objects["jax"]))
    donate(donate(objects["v"].get_raw_value()))
    live = {"numpy": np.zeros(n), "jax": jnp.zeros(n), "v": nnx.Variable(jnp.zeros(n))}
    checkpoints.restore(live)
  assert all(bool((x[...] == 1).all()) for x in live.values())


def test_values_that_are_not_there_are_refused(tmp_path):
  with nnx.Checkpointer(tmp_path) as checkpoints:
    with pytest.raises(InvalidArgumentError, match="a model with values"):
      checkpoints.save(1, nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    for jit in (jax.jit, nnx.jit):
      with pytest.raises(InvalidArgumentError, match="inside a transform there are none"):
        jit(lambda v: checkpoints.save(1, v))(nnx.Variable(1))
    assert checkpoints.steps == []
