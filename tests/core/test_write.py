"""Writes of several Variables: all or none, each value copied once, each cell's buffer its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import _jax, nnx
from refax.core import storage
from refax.core.write import commit, write

pytestmark = pytest.mark.skipif(_jax._private() is None, reason="looks at buffers of Refs")


def buffer(v):
  return _jax.peek_cell(v.get_raw_value())


def place(x):
  return x.unsafe_buffer_pointer()


def test_a_copy_that_fails_leaves_all_variables_as_they_were(monkeypatch):
  a, b = nnx.Variable(jnp.zeros(2)), nnx.Variable(jnp.zeros(2))
  copies = iter([storage.settled])

  def settled(ref, value, *, copy):
    return next(copies)(ref, value, copy=copy)  # the second one runs out

  monkeypatch.setattr(storage, "settled", settled)
  with pytest.raises((StopIteration, RuntimeError)):
    write((a, jnp.ones(2)), (b, jnp.ones(2)))
  assert a[...].tolist() == b[...].tolist() == [0, 0]


@pytest.mark.parametrize("hijax", [True, False])
def test_one_array_for_two_variables_is_two_buffers(hijax):
  a, b = (nnx.Variable(jnp.zeros(64), is_hijax=hijax) for _ in range(2))
  x = jnp.ones(64)
  write((a, x), (b, x))
  assert a[...].tolist() == b[...].tolist() == [1.0] * 64
  if hijax:
    assert len({place(buffer(a)), place(buffer(b)), place(x)}) == 3
    jax.jit(lambda a: a.set_value(a * 2))(a)
    assert float(x[0]) == float(b[0]) == 1.0


def test_fresh_values_are_taken_as_they_are_and_committed():
  a = nnx.Variable(jnp.zeros(64))
  x = jax.jit(lambda x: x + 1)(jnp.zeros(64))
  write((a, x), fresh=True)
  assert place(buffer(a)) == place(x) and buffer(a).committed
  jax.jit(lambda a: a.set_value(a * 2))(a)
  assert float(a[0]) == 2.0


def test_a_value_is_converted_and_broadcast_as_in_any_write():
  a, b = nnx.Variable(jnp.zeros(3)), nnx.Variable(jnp.zeros(2, jnp.bfloat16))
  write((a, 1), (b, np.ones(2, "f").tolist()), fresh=True)
  assert a[...].tolist() == [1, 1, 1] and b[...].tolist() == [1, 1] and b.dtype == jnp.bfloat16


def test_values_are_those_from_before_all_writes():
  a, b = nnx.Variable(jnp.zeros(2)), nnx.Variable(jnp.ones(2))
  prepared = [(a, a.prepare(buffer(b))), (b, b.prepare(buffer(a)))]
  commit(prepared)
  assert a[...].tolist() == [1, 1] and b[...].tolist() == [0, 0]
