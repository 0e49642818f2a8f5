import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refax import nnx
from refax.errors import InvalidArgumentError
from refax.io.notes import decoded, encoded

KEYS = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.binary(max_size=5)
TAGS = st.sampled_from(["$dict", "$tuple", "$bytes"])
NOTES = st.recursive(
  KEYS | st.floats(allow_nan=False) | TAGS,
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(KEYS | TAGS | st.tuples(KEYS), inner, max_size=3)
  ),
  max_leaves=10,
)


def same(a, b):
  if type(a) is not type(b):
    return False
  if isinstance(a, dict):
    return len(a) == len(b) and all(map(same, a.items(), b.items()))
  return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


@given(NOTES)
def test_notes_come_back_as_they_were(note):
  import json

  assert same(decoded(json.loads(json.dumps(encoded("save", "user", note)))), note)


def test_notes_and_states_of_iterators_go_through_a_checkpoint(tmp_path):
  pytest.importorskip("orbax.checkpoint", reason="checkpoints are written by orbax-checkpoint")

  class Batches:
    def __init__(self, state=None):
      self.state = state

    def get_state(self):
      return self.state

    def set_state(self, state):
      self.state = state

  note = {1: (2, b"3"), "a": {None: [True, (), 1.5]}, "$tuple": [1], "nan": math.inf}
  live = {"v": nnx.Variable(0), "data": Batches()}
  with nnx.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, {"v": nnx.Variable(1), "data": Batches({0: (1, 2)})}, user=note)
    restored = checkpoints.restore(live)
  assert same(restored.user, note) and live["data"].state == {0: (1, 2)}


def test_numbers_of_numpy_become_pythons():
  got = encoded("save", "user", [np.int8(3), np.float32(0.5), np.bool_(True), np.float64(2)])
  assert same(got, [3, 0.5, True, 2.0])


def test_other_things_are_refused_by_their_path():
  loop = []
  loop.append(loop)
  for note, what in [
    ({"a": [{1}]}, "user.a[0]={1}"),
    (np.ones(2), "user=array([1., 1.])"),
    (loop, "user[0]=[[...]]"),
    ({"a": object}, "user.a=<class 'object'>"),
  ]:
    with pytest.raises(InvalidArgumentError) as error:
      encoded("Checkpointer.save", "user", note)
    assert f"got: {what}" in str(error.value)
