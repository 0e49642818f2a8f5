"""Objects and iterators in containers of every sort, there and back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx
from refax.errors import CheckpointMismatchError, InvalidArgumentError

pytest.importorskip("orbax.checkpoint", reason="checkpoints are written by orbax-checkpoint")


class Batches:
  def __init__(self, state=None):
    self.state = state

  def get_state(self):
    return self.state

  def set_state(self, state):
    self.state = state


class Point(NamedTuple):
  x: object
  y: object


def there_and_back(folder, objects, live, **options):
  with nnx.Checkpointer(folder) as checkpoints:
    checkpoints.save(1, objects)
    checkpoints.restore(live, **options)
  return live


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert type(x) is type(y)
    np.testing.assert_array_equal(x, y)


def containers(n):
  tx = optax.adam(1e-3)
  grads = {"w": jnp.full(3, float(n)), "b": jnp.full((), float(n))}
  params = jax.tree.map(jnp.zeros_like, grads)
  return {
    "opt_state": tx.update(grads, tx.init(params))[1],
    "tuples": (jnp.full(2, n), (np.full(2, n), n), [jnp.full(1, n)]),
    "point": Point(jnp.full(2, n), {"deep": (np.int8(n),)}),
    3: {4: jnp.full(1, n)},
    "lists": [[jnp.full(1, n)], [[n * 1.5]]],
    "nothing": None,
    "empty": {"list": [], "tuple": (), "dict": {}},
  }


def test_arrays_in_containers_of_every_sort(tmp_path):
  objects = containers(1)
  mixed = {key: objects.pop(key) for key in (3,)}
  live = containers(0)
  del live[3]
  assert_same(there_and_back(tmp_path / "a", objects, live), objects)
  assert_same(there_and_back(tmp_path / "b", mixed, {3: {4: jnp.zeros(1, int)}}), mixed)


def test_containers_in_modules(tmp_path):
  def make(n):
    return nnx.Dict({
      "list": nnx.List([nnx.List([nnx.Param(float(n))]), nnx.List([jnp.full(2, n)])]),
      "tuple": nnx.data((jnp.full(2, n), {"a": jnp.full(1, n)})),
      "tree": nnx.Variable({"a": (jnp.full(2, n), [jnp.full(1, n)])}),
    })  # fmt: skip

  live = there_and_back(tmp_path, make(1), make(0))
  assert float(live["list"][0][0]) == 1.0 and live["list"][1][0].tolist() == [1, 1]
  assert live["tuple"][0].tolist() == [1, 1] and live["tree"][...]["a"][0].tolist() == [1, 1]


@pytest.mark.parametrize("objects", [(jnp.ones(2), jnp.ones(2)), jnp.ones(2), np.ones(2), 3])
def test_what_restore_cannot_put_back_is_not_saved(objects, tmp_path):
  with nnx.Checkpointer(tmp_path) as checkpoints:
    with pytest.raises(InvalidArgumentError, match="it inside a dict, a list or a Module"):
      checkpoints.save(1, objects)
    assert checkpoints.steps == []


def test_modules_in_a_tuple_alone_are_restored(tmp_path):
  a, b = nnx.Variable(0), nnx.Variable(0)
  there_and_back(tmp_path, (nnx.Variable(1), nnx.Variable(2)), (a, b))
  assert (int(a), int(b)) == (1, 2)


def test_an_iterator_alone(tmp_path):
  live = there_and_back(tmp_path, Batches({"at": 3}), Batches())
  assert live.state == {"at": 3}
  live = there_and_back(tmp_path / "b", {"data": Batches(b"\xff")}, {"data": Batches()})
  assert live["data"].state == b"\xff"
  live = Batches()
  with nnx.Checkpointer(tmp_path / "b") as checkpoints:
    checkpoints.restore(live, part="data")
  assert live.state == b"\xff"


def test_nothing_but_arrays_without_elements(tmp_path):
  make = lambda n: {"a": nnx.Variable(jnp.zeros((0, n))), "b": np.zeros((n, 0), np.float64)}
  live = there_and_back(tmp_path, make(2), make(2))
  assert live["b"].dtype == np.float64
  with pytest.raises(CheckpointMismatchError, match=r"float32\[0,2\]"):
    there_and_back(tmp_path / "b", make(2), make(3))


def test_nothing_at_all(tmp_path):
  assert there_and_back(tmp_path, {}, {}) == {}


@pytest.mark.parametrize("leaf", [lambda: nnx.Variable(1), lambda: Batches(1)])
@pytest.mark.parametrize("make", [
  lambda leaf: {"a.b": leaf(), "a": {"b": leaf()}}, lambda leaf: {1: leaf(), "1": leaf()}
])  # fmt: skip
def test_two_with_one_name_are_refused(make, leaf, tmp_path):
  with nnx.Checkpointer(tmp_path) as checkpoints:
    with pytest.raises(InvalidArgumentError, match=r"keys without dots|other keys|all ints, or"):
      checkpoints.save(1, make(leaf))
    assert checkpoints.steps == []


def test_an_iterator_that_refuses_its_state_leaves_all_as_it_was(tmp_path):
  class Picky(Batches):
    def set_state(self, state):
      if state != "mine":
        raise KeyError("not mine")
      super().set_state(state)

  live = {
    "a": Batches("mine"), "b": Picky("mine"), "v": nnx.Variable(5), "w": jnp.zeros(2),
    "l": nnx.Variable(6, is_hijax=False), "t": {"t": (jnp.zeros(1),)},
  }  # fmt: skip
  objects = {
    "a": Batches("other"), "b": Picky("other"), "v": nnx.Variable(1), "w": jnp.ones(2),
    "l": nnx.Variable(1), "t": {"t": (jnp.ones(1),)},
  }  # fmt: skip
  with pytest.raises(KeyError):
    there_and_back(tmp_path, objects, live)
  assert (live["a"].state, live["b"].state, int(live["v"]), int(live["l"])) == (
    "mine",
    "mine",
    5,
    6,
  )
  assert not live["w"].any() and not live["t"]["t"][0].any()
