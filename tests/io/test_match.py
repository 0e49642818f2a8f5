"""What a checkpoint has and what an object has: shared or not, a part or all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx
from refax.errors import CheckpointMismatchError, InvalidArgumentError

pytest.importorskip("orbax.checkpoint", reason="checkpoints are written by orbax-checkpoint")


class Pair(nnx.Module):
  def __init__(self, x, y):
    self.x, self.y = x, y

  @classmethod
  def apart(cls, x, y):
    return cls(nnx.Variable(x), nnx.Variable(y))

  @classmethod
  def shared(cls, x):
    v = nnx.Variable(x)
    return cls(v, v)


def saved(folder, objects):
  with nnx.Checkpointer(folder, asynchronous=False) as checkpoints:
    checkpoints.save(1, objects)


def restored(folder, objects, **options):
  with nnx.Checkpointer(folder) as checkpoints:
    return checkpoints.restore(objects, **options)


def refusal(folder, objects, **options):
  with pytest.raises(CheckpointMismatchError) as error:
    restored(folder, objects, **options)
  return error.value.args[0]


@pytest.mark.parametrize("hijax", [True, False])
def test_two_that_differ_are_not_restored_into_one(hijax, tmp_path):
  with nnx.use_hijax(hijax):
    saved(tmp_path, Pair.apart(1.0, 2.0))
    live = Pair.shared(0.0)
  text = refusal(tmp_path, live)
  assert "one mismatch" in text and "do not share it: what was saved differs from x" in text
  assert float(live.x) == 0.0
  text = refusal(tmp_path, {"p": live}, part=None)
  assert 'pass part="' not in text and "p.x" in text


def test_two_that_are_equal_are_restored_into_one(tmp_path):
  saved(tmp_path, Pair.apart(1.0, 1.0))
  live = Pair.shared(0.0)
  restored(tmp_path, live)
  assert float(live.x) == 1.0 and live.x is live.y


@pytest.mark.parametrize("hijax", [True, False])
def test_one_is_restored_into_two(hijax, tmp_path):
  saved(tmp_path, Pair.shared(3.0))
  with nnx.use_hijax(hijax):
    live = Pair.apart(0.0, 0.0)
  restored(tmp_path, live)
  assert float(live.x) == float(live.y) == 3.0
  live.x[...] = 4.0
  assert float(live.y) == 3.0
  jax.jit(lambda x: x + 1, donate_argnums=0)(live.x.get_value())
  assert float(live.y) == 3.0  # they share no buffer


def test_what_is_shared_may_have_gained_and_lost_names(tmp_path):
  saved(tmp_path, Pair.shared(3.0))
  live = Pair.shared(0.0)
  live.a = live.x
  del live.y
  restored(tmp_path, live)
  assert float(live.a) == 3.0


def training(seed):
  model = nnx.Linear(2, 3, rngs=nnx.Rngs(seed))
  return {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)}


def test_a_model_alone_is_a_part_of_what_was_saved(tmp_path):
  first, second = training(0), training(1)
  first["model"].kernel[...] = 7.0
  saved(tmp_path, first)
  model, moments = second["model"], second["optimizer"].opt_state
  before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(moments)))
  assert restored(tmp_path, model, part="model").step == 1
  assert bool((model.kernel == 7.0).all())
  after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(moments)))
  jax.tree.map(np.testing.assert_array_equal, after, before)
  kernel = nnx.Param(jnp.zeros((2, 3)))
  restored(tmp_path, kernel, part="model.kernel")
  assert bool((kernel == 7.0).all())
  restored(tmp_path, nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0))), part="model")


def test_a_part_is_as_strict_as_the_whole(tmp_path):
  saved(tmp_path, training(0))
  bigger = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  bigger.extra = nnx.Param(jnp.ones(1))
  assert "extra" in refusal(tmp_path, bigger, part="model")
  text = refusal(tmp_path, nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)), part="model")
  assert "one mismatch" in text and "bias" in text


def test_errors_name_the_part(tmp_path):
  saved(tmp_path, training(0))
  text = refusal(tmp_path, training(0)["model"])
  assert 'pass part="model" to restore, if this is what was saved there' in text
  assert "model.*" in text and "2 arrays" in text
  text = refusal(tmp_path, {"model": training(0)["model"]})
  assert "one mismatch" in text and "optimizer.*" in text
  assert "pass it too, or restore one part of what was saved: part=..." in text
  with pytest.raises(InvalidArgumentError, match="such as 'model', 'optimizer'"):
    restored(tmp_path, training(0)["model"], part="modle")


def test_a_part_that_shares_with_another(tmp_path):
  model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  saved(tmp_path, {"a": model, "b": {"c": model}})
  live = nnx.Linear(2, 3, rngs=nnx.Rngs(1))
  restored(tmp_path, live, part="b.c")
  assert bool((live.kernel == model.kernel).all())


@pytest.mark.parametrize(("one", "two"), [("rbg", "unsafe_rbg"), ("threefry2x32", "rbg")])
def test_keys_of_another_implementation_are_refused(one, two, tmp_path):
  saved(tmp_path, {"v": nnx.Variable(0), "key": nnx.Variable(jax.random.key(0, impl=one))})
  live = {"v": nnx.Variable(5), "key": nnx.Variable(jax.random.key(1, impl=two))}
  assert "keys,uint32" in refusal(tmp_path, live)
  assert int(live["v"]) == 5
