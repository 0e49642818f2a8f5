"""Cells: which gradients may be stored, and what recomputation and donation do to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.core import storage
from refax.errors import DifferentiatedWriteError, ShapeMismatchError, SharedWriteError

PLAIN = (nnx.Variable, nnx.Cache, nnx.Intermediate, nnx.Perturbation, nnx.Param)
DETACHED = (nnx.BatchStat, nnx.RngState, nnx.RngCount, nnx.RngKey, nnx.metrics.MetricState)


def nest(name, f):
  """A function under a plain transform, inside a gradient."""
  return {
    "none": f,
    "jit": jax.jit(f),
    "checkpoint": jax.checkpoint(f),
    "checkpoint jit": jax.checkpoint(jax.jit(f)),
    "scan": lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0],
    "fori": lambda x: jax.lax.fori_loop(0, 2, lambda i, c: f(c), x),
    "scan checkpoint": lambda x: jax.lax.scan(
      lambda c, _: (jax.checkpoint(f)(c), None), x, None, length=2
    )[0],
  }[name]


NESTS = pytest.mark.parametrize(
  "name", ["none", "jit", "checkpoint", "checkpoint jit", "scan", "fori", "scan checkpoint"]
)


@NESTS
@pytest.mark.parametrize("kind", PLAIN)
def test_a_differentiated_write_to_a_plain_type_is_refused_under_any_nest(kind, name):
  v = kind(0.0)

  def f(x):
    v[...] = x * 2
    return jnp.sin(x)

  with pytest.raises(DifferentiatedWriteError, match="its gradient would be lost"):
    jax.grad(nest(name, f))(1.0)
  assert float(v) == 0.0


@NESTS
@pytest.mark.parametrize("kind", [nnx.Variable, nnx.Param])
def test_an_undifferentiated_write_to_a_plain_type_passes(kind, name):
  v, w = kind(1.0), kind(1.0)

  def f(x):
    v[...] = v * 2
    w[...] = jax.lax.stop_gradient(x)
    return jnp.sin(x) * v

  # v is 2 in the first run of f, 4 in the second
  runs = 2 if name in ("scan", "fori", "scan checkpoint") else 1
  want = lambda x: 2 * jnp.sin(x) if runs == 1 else 4 * jnp.sin(2 * jnp.sin(x))
  got = jax.grad(nest(name, f))(1.0)
  np.testing.assert_allclose(got, jax.grad(want)(1.0), rtol=1e-5)
  assert float(v) == 2.0**runs


@NESTS
def test_a_detached_type_takes_a_differentiated_write_once(name):
  v, count = nnx.BatchStat(0.0), nnx.Variable(0)

  def f(x):
    v[...] = v + x
    count[...] += 1
    return jnp.sin(x) * v

  runs = 2 if name in ("scan", "fori", "scan checkpoint") else 1

  def want(x):
    total = 0.0
    for _ in range(runs):
      total = jax.lax.stop_gradient(total + x)
      x = jnp.sin(x) * total
    return x

  got = jax.grad(nest(name, f))(1.0)
  np.testing.assert_allclose(got, jax.grad(want)(1.0), rtol=1e-5)
  assert int(count) == runs


def test_which_types_are_detached():
  assert all(kind.detached for kind in DETACHED) and not any(kind.detached for kind in PLAIN)


def test_a_detached_type_stores_no_tangent_in_lojax_storage_either():
  def f(x):
    v = nnx.BatchStat(0.0, is_hijax=False)
    v[...] = x * 3
    w = nnx.Variable(0.0, is_hijax=False)
    w[...] = x * 5
    new = nnx.BatchStat(x * 7, is_hijax=False)
    return v + w + new

  assert float(jax.grad(f)(1.0)) == 5.0


def test_forward_mode_is_refused_too():
  v = nnx.Variable(0.0)

  def f(x):
    v[...] = x
    return x

  with pytest.raises(DifferentiatedWriteError):
    jax.jvp(f, (1.0,), (1.0,))
  assert float(v) == 0.0


def test_a_variable_made_of_a_differentiated_value_is_no_ref_or_refused():
  with pytest.raises(DifferentiatedWriteError):
    jax.grad(lambda x: nnx.Variable(x * 2, is_hijax=True)[...])(1.0)
  assert float(jax.grad(lambda x: nnx.Variable(x * 2)[...])(1.0)) == 2.0
  assert float(jax.grad(lambda x: nnx.Variable(x * 2, is_hijax=False)[...])(1.0)) == 2.0


@pytest.mark.parametrize("dtype", ["int32", "bool", "key"])
def test_values_without_gradients_need_no_guard(dtype):
  old = jax.random.key(0) if dtype == "key" else jnp.zeros((), dtype)
  v = nnx.Variable(old)

  def f(x):
    v[...] = jax.random.key(1) if dtype == "key" else (x > 0).astype(dtype)
    return x * 2

  assert float(jax.grad(jax.jit(f))(1.0)) == 2.0
  got = jax.random.key_data(v[...]).tolist() if dtype == "key" else int(v)
  assert got == ([0, 1] if dtype == "key" else 1)


def test_dropout_masks_agree_between_forward_and_recomputation():
  rngs, x = nnx.Rngs(0), jnp.ones(8)
  mask = lambda: jax.random.bernoulli(rngs(), 0.5, (8,)).astype(jnp.float32)
  f = lambda x: (jnp.sin(x) * mask()).sum()
  value, grads = jax.value_and_grad(jax.checkpoint(f))(x)
  want = jax.random.bernoulli(jax.random.fold_in(jax.random.key(0), 0), 0.5, (8,))
  np.testing.assert_allclose(grads, np.cos(1.0) * want, rtol=1e-5)
  np.testing.assert_allclose(value, np.sin(1.0) * want.sum(), rtol=1e-5)
  assert int(rngs.default.count) == 1


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_write_under_vmap_to_a_variable_that_is_not_mapped_is_refused(jit):
  v = nnx.Variable(0.0)

  @jit
  def f(xs):
    return jax.vmap(lambda x: v.set_value(x))(xs)

  with pytest.raises(SharedWriteError) as error:
    f(jnp.arange(3.0))
  assert error.value.args[0] == (
    "jax.vmap cannot write one Variable for all elements of the batch\n"
    "  at:  (a Variable outside any Module)  (Variable, created at test_storage.py:"
    f"{v._def.origin.line})\n"
    "  got: a write to a Variable that came by closure or with in_axes=None\n"
    "  fix: pass the model as a mapped argument, with an axis on this Variable "
    "(for Rngs: rngs.split(n)); or drop the write, as for jax.hessian, by nnx.no_update(f)"
  )
  assert float(v) == 0.0


def test_a_value_that_is_the_same_for_all_is_read_under_vmap_and_not_written():
  v = nnx.Variable(2.0)
  assert jax.vmap(lambda x: x * v)(jnp.arange(3.0)).tolist() == [0.0, 2.0, 4.0]
  with pytest.raises(SharedWriteError):
    jax.vmap(lambda x: (v.set_value(v + 2.0), x)[1])(jnp.arange(3.0))
  assert float(v) == 2.0


def test_as_array_drops_weak_types_and_copies():
  x = np.ones(2, np.float32)
  y = storage.as_array(x)
  x[0] = 5
  assert y.tolist() == [1.0, 1.0]
  assert not storage.as_array(3.0).weak_type and not storage.as_array(jnp.asarray(3.0)).weak_type
  assert storage.is_array(x) and not storage.is_array(3.0) and storage.is_array_like(3.0)
  assert not storage.is_array(jax.new_ref(jnp.ones(1))) and not storage.is_array_like("x")


@pytest.mark.parametrize("cell", [(), (3,), (2, 3), (0, 3), (2, 1, 3)])
@pytest.mark.parametrize("given", [(), (1,), (3,), (1, 1), (2, 1), (2, 3), (1, 2, 3), (0,), (0, 3)])
def test_a_write_broadcasts_as_in_numpy(cell, given):
  array, x = np.zeros(cell), np.ones(given)
  variable = nnx.Variable(jnp.zeros(cell))
  try:
    array[...] = x
  except ValueError:
    with pytest.raises(ShapeMismatchError):
      variable[...] = jnp.asarray(x)
    assert (variable[...] == 0).all()
  else:
    variable[...] = jnp.asarray(x)
    assert (variable[...] == array).all()


def test_an_error_of_jax_is_no_mismatch_of_shapes(monkeypatch):
  """Ctrl-C inside of an operation may come out of JAX as a ValueError."""

  def interrupted(*_):
    raise ValueError("from a KeyboardInterrupt")

  variable = nnx.Variable(jnp.zeros(3))
  with monkeypatch.context() as m:
    m.setattr(jnp, "broadcast_to", interrupted)
    with pytest.raises(ValueError, match="KeyboardInterrupt") as caught:
      variable[...] = jnp.ones(())
  assert not isinstance(caught.value, ShapeMismatchError)
  assert (variable[...] == 0).all()


HOST_VALUES = [
  *(True, 0, -1, 300, 2**31, 2**40, -(2**70), 0.0, -0.0, 1e-3, 1e40, float("nan"), 1j),
  *(np.float32(1.1), np.float64(1.1), np.int64(2**40), np.int8(-3), np.bool_(True)),
  *(np.ones(3), np.arange(3), np.ones((1, 1, 3), np.float32), np.ones((3, 1)), np.ones(2)),
  *(np.arange(6.0)[::2], np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array(["a"] * 3)),
  *([1, 2, 3], [1.0, 2, 3], [[1, 2, 3], [4, 5, 6]], [2**40, 1, 2], [1, [2]], [], "a", None),
]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (200, 200)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool", "complex64"])
def test_numbers_and_arrays_of_numpy_are_written_as_in_a_trace(dtype, shape):
  def written(value, jit):
    v = nnx.Variable(jnp.zeros(shape, dtype))
    try:
      jit(lambda v: v.set_value(value))(v)
    except Exception as error:
      return type(error).__name__, str(error)
    return str(v.dtype), v.shape, np.asarray(v[...]).tobytes()

  for value in HOST_VALUES:
    assert written(value, lambda f: f) == written(value, jax.jit), value


def test_an_array_of_numpy_that_is_written_may_change_afterwards():
  given = np.ones(3, np.float32)
  v = nnx.Variable(jnp.zeros(3))
  v[...] = given
  given[:] = 7
  assert v[...].tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_a_float_cell_takes_large_integers_and_refuses_what_no_float_holds(dtype):
  v = nnx.Variable(jnp.zeros(3, dtype))
  v[...] = 2**40
  assert np.asarray(v[...], complex).tolist() == [2**40] * 3
  with pytest.raises(ShapeMismatchError, match="cannot hold this number"):
    v[...] = 10**400
  assert np.asarray(v[...], complex).tolist() == [2**40] * 3
