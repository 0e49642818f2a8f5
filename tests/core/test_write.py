"""Writes and copies of several Variables: all or none, each copied once, to its own buffer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import _jax, nnx
from refax.core.observe import observe
from refax.core.write import copied, write
from refax.errors import AliasError

pytestmark = pytest.mark.skipif(_jax._private() is None, reason="looks at buffers of Refs")


def buffer(v):
  return _jax.peek_cell(v.get_raw_value())


def place(x):
  return x.unsafe_buffer_pointer()


def test_a_copy_that_fails_leaves_all_variables_as_they_were(monkeypatch):
  a, b = nnx.Variable(jnp.zeros(2)), nnx.Variable(jnp.zeros(2))
  copies = iter([_jax.copied_for_cell])
  monkeypatch.setattr(_jax, "copied_for_cell", lambda x: next(copies)(x))  # the second one runs out
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
  write((a, b), (b, a))
  assert a[...].tolist() == [1, 1] and b[...].tolist() == [0, 0]


def test_many_writes_are_copied_together_from_the_second_time_on_each_in_a_buffer_of_its_own():
  """Of one array in several places, of typed keys, and of Variables, whose buffers stay theirs."""
  x, source = jnp.arange(64.0), nnx.Variable(jnp.ones(64))
  on_device = jax.device_put(x, jax.devices()[0])
  key = jax.device_put(jax.random.key(7), jax.devices()[0])
  targets = [nnx.Variable(jnp.zeros(64)) for _ in range(9)]
  stream = nnx.Variable(jax.random.key(0))
  jitted = jax.jit(lambda vs: [v.set_value(v * 2) for v in vs])
  for again in range(4):
    given = [on_device] * 6 + [source] * 2 + [x if again > 2 else on_device]
    write(*zip(targets, given, strict=True), (stream, key))
    buffers = [*map(buffer, targets), buffer(source), on_device]
    assert len(set(map(place, buffers))) == len(buffers)
    assert all(b.committed for b in map(buffer, targets))
    assert [float(v[2]) for v in targets] == [2.0] * 6 + [1.0] * 2 + [2.0]
    np.testing.assert_array_equal(jax.random.key_data(stream[...]), jax.random.key_data(key))
    jitted(targets)  # it may take the buffers
    assert [float(v[2]) for v in targets] == [4.0] * 6 + [2.0] * 2 + [4.0]
    assert float(x[2]) == float(on_device[2]) == 2.0 and float(source[2]) == 1.0
    assert jax.random.normal(key).shape == jax.random.normal(stream[...]).shape == ()


def test_writes_are_noted_and_undone_where_somebody_wants_to_know():
  vs = [nnx.Variable(jnp.zeros(3)) for _ in range(9)]
  with pytest.raises(ZeroDivisionError), nnx.transaction(vs):
    write(*((v, jnp.ones(3)) for v in vs))
    raise ZeroDivisionError
  assert all(v[...].tolist() == [0, 0, 0] for v in vs)
  with pytest.raises(Exception, match="differentiated"):
    nnx.grad(lambda v: (write((vs[0], jnp.ones(3))), v.sum())[1])(vs[0])


def test_of_two_writes_to_one_variable_the_last_one_holds():
  v = nnx.Variable(jnp.zeros(3))
  for first, last in ((jnp.ones(3), 5), (5, jnp.ones(3)), ([1, 1, 1], jnp.full(3, 2.0))):
    write((v, first), (v, last))
    assert v[...].tolist() == [float(np.ravel(last)[0])] * 3


def variables():
  """More than eight, of all sorts: from the second time on, cells are copied by one call."""
  hijax = [nnx.Param(jnp.full((i % 3 + 1,), i, jnp.float32)) for i in range(9)]
  keys = [nnx.Variable(jax.random.key(1)), nnx.Variable(jax.random.key(2, impl="rbg"))]
  odd = [nnx.Cache(jnp.zeros((0, 2), jnp.bfloat16)), nnx.Variable({"a": 1.0, "b": (True,)})]
  lojax = [nnx.BatchStat(jnp.ones(2), is_hijax=False), nnx.Variable(3, is_hijax=False, name="n")]
  return [*hijax, *keys, *odd, *lojax]


def plain(v):
  as_data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return jax.tree.map(lambda x: as_data(x).tolist(), v[...])


@pytest.mark.parametrize("hijax", [None, True, False])
@pytest.mark.parametrize("where", ["eager", "jit"])
def test_copies_are_the_same_with_cells_of_their_own(hijax, where):
  given = variables()
  before = list(map(plain, given))

  def check():
    found = copied(given, hijax)
    for old, new in zip(given, found, strict=True):
      assert type(new) is type(old) and new.get_metadata() == old.get_metadata()
      assert new.is_hijax is (old.is_hijax if hijax is None else hijax)
      assert jax.tree.map(jnp.shape, new[...]) == jax.tree.map(jnp.shape, old[...])
      assert new is not old and new._def.origin is not old._def.origin
    found[0][...] = found[0][...] * 0 - 1
    return 0

  for _ in range(3):
    check() if where == "eager" else jax.jit(check)()
    assert list(map(plain, given)) == before
  if where == "eager":
    assert list(map(plain, copied(given, hijax))) == before


def test_a_copy_of_what_is_differentiated_is_refused_as_a_read_is():
  v = nnx.Param(1.0)

  def loss(w):
    return copied([v])[0][...] * w[...]

  with pytest.raises(AliasError):
    nnx.grad(loss)(v)


def test_who_observes_sees_what_is_copied():
  v = nnx.Param(1.0)
  with observe() as seen:
    copied([v])
  assert [f() for f in seen.values()] == [v]
