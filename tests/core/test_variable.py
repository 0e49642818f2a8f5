"""A Variable is an array that can be written: operators, conversions, writes, copies."""

import copy
import operator
import pickle

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import (
  DifferentiatedWriteError,
  ShapeMismatchError,
  StaticAttributeError,
  TraceContextError,
  TreeMismatchError,
)

STORAGE = pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])


class Custom(nnx.Param):
  """A user's type of Variable."""


class Pair(nnx.Module):
  """One Variable in two places."""

  def __init__(self, value=1.0):
    self.a = nnx.Param(value)
    self.b = self.a


# operators
FLOAT = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
INT = ("lshift", "rshift", "and_", "xor", "or_")
COMPARE = ("eq", "ne", "lt", "le", "gt", "ge")
X = np.array([1.5, 2.0, 3.0], np.float32)
Y = np.array([2.0, 0.5, 4.0], np.float32)
P = np.array([6, 3, 5], np.int32)
Q = np.array([1, 2, 3], np.int32)
OTHERS = {
  "numpy": lambda y: y,
  "jax": jnp.asarray,
  "variable": nnx.Variable,
  "lojax variable": lambda y: nnx.Variable(y, is_hijax=False),
  "numpy scalar": lambda y: y[1],
  "python scalar": lambda y: y[1].item(),
}


STORAGE_AND_OTHERS = pytest.mark.parametrize(
  ("hijax", "kind"), [*((True, kind) for kind in OTHERS), (False, "numpy"), (False, "variable")]
)


def check(got, want):
  assert isinstance(got, jax.Array)
  assert got.dtype == want.dtype
  np.testing.assert_array_equal(got, want)


def plain(x):
  return x[...] if isinstance(x, nnx.Variable) else x


@STORAGE_AND_OTHERS
@pytest.mark.parametrize("name", FLOAT + INT + COMPARE)
def test_a_binary_operator_is_that_of_the_array(name, kind, hijax):
  op = getattr(operator, name)
  x, y = (P, Q) if name in INT else (X, Y)
  v, other = nnx.Variable(x, is_hijax=hijax), OTHERS[kind](y)
  check(op(v, other), op(jnp.asarray(x), plain(other)))


@STORAGE_AND_OTHERS
@pytest.mark.parametrize("name", FLOAT + INT + COMPARE)
def test_a_reflected_operator_is_that_of_the_array(name, kind, hijax):
  op = getattr(operator, name)
  x, y = (P, Q) if name in INT else (X, Y)
  v, other = nnx.Variable(x, is_hijax=hijax), OTHERS[kind](y)
  check(op(other, v), op(plain(other), jnp.asarray(x)))


@pytest.mark.parametrize("name", FLOAT)
def test_a_numpy_array_on_the_left_takes_a_traced_variable(name):
  op = getattr(operator, name)
  got = jax.jit(lambda v: op(Y, v))(nnx.Variable(X))
  np.testing.assert_allclose(got, op(jnp.asarray(Y), jnp.asarray(X)), rtol=1e-6)


@pytest.mark.parametrize("left", [np.eye(3, dtype=np.float32), jnp.eye(3)], ids=["numpy", "jax"])
def test_matmul_takes_a_variable_on_either_side(left):
  v = nnx.Variable(np.arange(9, dtype=np.float32).reshape(3, 3))
  check(left @ v, v[...])
  check(v @ left, v[...])
  check(v @ v, v[...] @ v[...])


def test_divmod_takes_a_variable_on_either_side():
  v, w = nnx.Variable(P), nnx.Variable(Q)
  for got, want in [(divmod(v, w), divmod(P, Q)), (divmod(Q, v), divmod(Q, P))]:
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])
  assert [int(x) for x in divmod(7, nnx.Variable(2))] == [3, 1]


@pytest.mark.parametrize("name", ["neg", "pos", "abs"])
def test_a_unary_operator_is_that_of_the_array(name):
  op = getattr(operator, name)
  check(op(nnx.Variable(-X)), op(jnp.asarray(-X)))


def test_invert_is_that_of_the_array():
  check(~nnx.Variable(np.array([True, False])), jnp.array([False, True]))
  check(~nnx.Variable(P), ~jnp.asarray(P))


@STORAGE_AND_OTHERS
@pytest.mark.parametrize("name", ["i" + n.strip("_") for n in FLOAT + INT])
def test_an_operator_in_place_writes_the_variable(name, kind, hijax):
  in_place = getattr(operator, name)
  plain_op = getattr(operator, {"iand": "and_", "ior": "or_"}.get(name, name[1:]))
  x, y = (P, Q) if name[1:] in (n.strip("_") for n in INT) else (X, Y)
  v, other = nnx.Variable(x, is_hijax=hijax), OTHERS[kind](y)
  cell = v.get_raw_value()
  got = in_place(v, other)
  assert got is v
  assert not hijax or v.get_raw_value() is cell
  check(v[...], plain_op(jnp.asarray(x), plain(other)))


def test_matmul_in_place_writes_the_variable():
  v = alias = nnx.Variable(jnp.ones((2, 2)))
  v @= jnp.full((2, 2), 3.0)
  assert v is alias
  check(v[...], jnp.full((2, 2), 6.0))


def test_an_operator_in_place_that_changes_the_dtype_is_refused():
  v = nnx.Variable(P)
  with pytest.raises(ShapeMismatchError, match=r"float32\[3\], the Variable holds int32\[3\]"):
    v /= 2
  check(v[...], jnp.asarray(P))


# NumPy and JAX functions
def test_numpy_and_jax_functions_take_a_variable():
  v = nnx.Variable(X)
  np.testing.assert_array_equal(np.sin(v), np.sin(X))
  np.testing.assert_array_equal(np.add(Y, v), Y + X)
  np.testing.assert_array_equal(np.asarray(v), X)
  np.testing.assert_array_equal(np.asarray(v, dtype=np.float64), X.astype(np.float64))
  np.testing.assert_array_equal(np.sum(v), X.sum())
  np.testing.assert_array_equal(jnp.sin(v), jnp.sin(X))
  np.testing.assert_array_equal(jnp.where(v > 1.7, v, 0), [0, 2, 3])
  np.testing.assert_array_equal(jnp.asarray(v), X)
  np.testing.assert_array_equal(jax.lax.add(v.__jax_array__(), Y), X + Y)
  np.testing.assert_array_equal(jnp.stack([v, v]), np.stack([X, X]))


def test_an_operator_in_place_on_a_numpy_array_does_as_with_a_jax_array():
  y, z = Y.copy(), Y.copy()
  y += nnx.Variable(X)
  z += jnp.asarray(X)
  assert type(y) is type(z)
  np.testing.assert_array_equal(y, X + Y)


def test_methods_and_properties_of_the_array_are_the_variables():
  v = nnx.Variable(X.reshape(3, 1))
  assert v.T.shape == (1, 3)
  assert float(v.sum()) == float(X.sum())
  assert v.astype(jnp.int32).dtype == jnp.int32
  assert v.reshape(-1).shape == (3,)
  assert v.tolist() == [[1.5], [2.0], [3.0]] and v.tobytes() == X.tobytes()
  assert v.devices() == v[...].devices() and v.block_until_ready().shape == (3, 1)
  assert (v.shape, v.dtype, v.ndim, v.size, v.nbytes) == ((3, 1), jnp.float32, 2, 3, 12)
  assert v.sharding == v[...].sharding


def test_an_unknown_attribute_is_an_error_that_names_it():
  with pytest.raises(AttributeError, match=r"^Param has no attribute or metadata 'nope'$"):
    nnx.Param(1.0).nope


@pytest.mark.parametrize("hijax", [True, False])
def test_value_reads_and_writes_like_an_index(hijax):
  v = nnx.Param(jnp.zeros(2), is_hijax=hijax)
  v.value = jnp.ones(2)
  v.value += 1
  assert v.value.tolist() == v[...].tolist() == [2.0, 2.0]
  with pytest.raises(ShapeMismatchError):
    v.value = jnp.ones(3)
  kept = v.value
  v.value = jnp.zeros(2)
  assert kept.tolist() == [2.0, 2.0]


def test_an_attribute_of_a_variable_is_no_metadata():
  v = nnx.Param(1.0)
  with pytest.raises(
    AttributeError, match=r"^cannot set 'tag' of a Param; for metadata: v.set_metadata\(tag=...\)$"
  ):
    v.tag = "x"


# conversions
def test_a_write_of_no_key_to_a_variable_of_keys_names_no_cast():
  v = nnx.Variable(jax.random.key(0))
  with pytest.raises(ShapeMismatchError, match=r"fix: assign a new nnx\.Variable\n  see: "):
    v[...] = jnp.zeros(())


@STORAGE
def test_a_scalar_variable_converts_to_python_numbers(hijax):
  v = nnx.Variable(3, is_hijax=hijax)
  assert (int(v), float(v), complex(v), operator.index(v), bool(v)) == (3, 3.0, 3 + 0j, 3, True)
  assert [10, 11, 12, 13][v] == 13
  assert not nnx.Variable(0, is_hijax=hijax)
  assert round(nnx.Variable(2.567, is_hijax=hijax), 1) == pytest.approx(2.6)
  assert f"{nnx.Variable(2.567, is_hijax=hijax):.2f}" == "2.57"


@pytest.mark.parametrize("convert", [int, float, complex, operator.index, bool])
def test_a_vector_does_not_convert_to_a_python_number(convert):
  with pytest.raises((TypeError, ValueError)):
    convert(nnx.Variable(X))


def test_a_float_is_no_index():
  with pytest.raises(TypeError):
    [1, 2][nnx.Variable(1.0)]


def test_len_iteration_and_membership_are_the_arrays():
  v = nnx.Variable(X)
  assert len(v) == 3
  assert [float(x) for x in v] == X.tolist()
  assert 2.0 in v and 7.0 not in v
  assert nnx.Variable(2.0) in v
  with pytest.raises(TypeError):
    len(nnx.Variable(1.0))
  with pytest.raises(TypeError):
    iter(nnx.Variable(1.0))


def test_a_variable_has_no_hash_for_its_equality_is_elementwise():
  with pytest.raises(TypeError, match="unhashable type: 'Variable'"):
    hash(nnx.Variable(1.0))


# indexing
INDICES = {
  "int": 1,
  "negative": -1,
  "slice": slice(0, 2),
  "tuple": (1, slice(None)),
  "ellipsis": (..., 0),
  "newaxis": (None, 1),
  "mask": np.array([True, False, True]),
  "array": np.array([2, 0]),
  "jax array": jnp.array([2, 0]),
}


@STORAGE
@pytest.mark.parametrize("name", INDICES)
def test_reading_and_writing_at_an_index_are_numpys(name, hijax):
  index, x = INDICES[name], np.arange(6, dtype=np.float32).reshape(3, 2)
  v = nnx.Variable(x, is_hijax=hijax)
  np.testing.assert_array_equal(v[index], x[index])
  v[index] = 9
  x[index] = 9
  np.testing.assert_array_equal(v[...], x)
  v[index] += v[index]
  x[index] += x[index]
  np.testing.assert_array_equal(v[...], x)


def test_a_variable_may_be_the_index_and_the_value():
  v, i = nnx.Variable(X), nnx.Variable(1)
  assert float(v[i]) == 2.0
  v[i] = nnx.Variable(7.0)
  assert v[...].tolist() == [1.5, 7.0, 3.0]


def test_indexed_writes_are_seen_after_a_plain_jit():
  v = nnx.Variable(jnp.zeros((2, 3)))

  @jax.jit
  def write(v, i, x):
    v[i, 1:] = x
    v[0, 0] += 1

  write(v, 1, 5.0)
  assert v[...].tolist() == [[1, 0, 0], [0, 5, 5]]


def test_at_returns_a_new_array_and_leaves_the_variable():
  v = nnx.Variable(X)
  check(v.at[0].set(9.0), jnp.asarray(X).at[0].set(9.0))
  check(v.at[1:].add(1.0), jnp.asarray(X).at[1:].add(1.0))
  check(v[...], jnp.asarray(X))


# writes
ACCEPTED = {
  "int to float": (np.zeros(2, np.float32), 3, [3.0, 3.0]),
  "bool to float": (np.zeros(2, np.float32), True, [1.0, 1.0]),
  "bool to int": (np.zeros(2, np.int32), True, [1, 1]),
  "float to complex": (np.zeros(2, np.complex64), 1.5, [1.5, 1.5]),
  "float to bfloat16": (jnp.zeros(2, jnp.bfloat16), 1.5, [1.5, 1.5]),
  "int to uint8": (np.zeros(2, np.uint8), 255, [255, 255]),
  "large int to uint32": (np.zeros(2, np.uint32), 2**32 - 1, [2**32 - 1] * 2),
  "row to matrix": (np.zeros((2, 2), np.float32), np.array([1, 2], np.float32), [[1, 2], [1, 2]]),
  "leading ones": (np.zeros(2, np.float32), np.array([[[3, 4]]], np.float32), [3, 4]),
  "list of ints": (np.zeros(2, np.float32), [1, 2], [1.0, 2.0]),
  "nested lists": (np.zeros((2, 2), np.float32), [[1, 2.5], (3, 4)], [[1, 2.5], [3, 4]]),
  "tuple": (np.zeros(2, np.int32), (1, 2), [1, 2]),
  "list of arrays": (np.zeros(2, np.float32), [jnp.float32(1), jnp.float32(2)], [1.0, 2.0]),
  "weak array": (np.zeros(2, np.float16), jnp.asarray(2.0), [2.0, 2.0]),
}


@STORAGE
@pytest.mark.parametrize("name", ACCEPTED)
def test_a_write_that_numpy_would_take_keeps_shape_and_dtype(name, hijax):
  old, value, want = ACCEPTED[name]
  v = nnx.Variable(old, is_hijax=hijax)
  v[...] = value
  assert (v.shape, v.dtype) == (old.shape, old.dtype)
  assert v[...].tolist() == want
  assert not v[...].weak_type


REFUSED = {
  "shape": (np.zeros((2, 3), np.float32), jnp.ones(2), "float32[2]", "float32[2,3]"),
  "rank": (np.zeros((), np.float32), jnp.ones(2), "float32[2]", "float32[]"),
  "larger": (np.zeros(1, np.float32), jnp.ones(2), "float32[2]", "float32[1]"),
  "empty": (np.zeros(2, np.float32), jnp.ones(0), "float32[0]", "float32[2]"),
}


@STORAGE
@pytest.mark.parametrize("name", REFUSED)
def test_a_write_of_another_shape_is_refused_and_leaves_the_cell(name, hijax):
  old, value, got, want = REFUSED[name]
  v = nnx.Param(old, is_hijax=hijax)
  with pytest.raises(ShapeMismatchError) as error:
    v[...] = value
  line = v._def.origin.line
  assert error.value.args[0] == (
    "a Variable keeps its shape and dtype\n"
    f"  at:  (a Variable outside any Module)  (Param, created at test_variable.py:{line})\n"
    f"  got: {got}, the Variable holds {want}\n"
    f"  fix: write an array of shape {old.shape}, or assign a new nnx.Param"
  )
  np.testing.assert_array_equal(v[...], old)


@STORAGE
@pytest.mark.parametrize(
  ("dtype", "value", "got", "fix"),
  [
    # a plain cast would cut off, wrap around, or drop a part, in silence
    ("int32", 1.5, "float32[]", "jnp.round(x).astype('int32')"),
    ("bool", 1, "int32[]", "x != 0"),
    ("float32", 1j, "complex64[]", "x.real.astype('float32')"),
    ("int32", 1.5j, "complex64[]", "jnp.round(x.real).astype('int32')"),
    ("int8", np.full(2, 300, np.int32), "int32[2]", "jnp.clip(x, -128, 127).astype('int8')"),
    ("uint8", np.full(2, -1, np.int8), "int8[2]", "jnp.clip(x, 0, 255).astype('uint8')"),
    ("bfloat16", np.float32(1), "float32[]", "x.astype('bfloat16')"),
    ("int32", np.ones(2, np.int8), "int8[2]", "x.astype('int32')"),
    ("float32", jnp.ones(2, jnp.bfloat16), "bfloat16[2]", "x.astype('float32')"),
    ("float32", np.ones(2, np.int32), "int32[2]", "x.astype('float32')"),
  ],
)
def test_a_write_of_another_dtype_is_refused_and_leaves_the_cell(dtype, value, got, fix, hijax):
  v = nnx.Param(jnp.zeros(2, dtype), is_hijax=hijax)
  with pytest.raises(ShapeMismatchError) as error:
    v[...] = value
  line = v._def.origin.line
  assert error.value.args[0] == (
    "a Variable keeps its shape and dtype\n"
    f"  at:  (a Variable outside any Module)  (Param, created at test_variable.py:{line})\n"
    f"  got: {got}, the Variable holds {dtype}[2]\n"
    f"  fix: write {fix}, or assign a new nnx.Param"
  )
  assert v[...].tolist() == jnp.zeros(2, dtype).tolist()
  v[...] = eval(fix, {"jnp": jnp, "x": jnp.asarray(value)})  # what it says can be written


@STORAGE
@pytest.mark.parametrize("value", [256, -1, 2**70])
def test_an_int_that_the_dtype_cannot_hold_is_refused_and_leaves_the_cell(value, hijax):
  v = nnx.Variable(np.array([1, 2], np.uint8), is_hijax=hijax)
  for index in (..., 0):
    with pytest.raises(ShapeMismatchError, match=rf"got: int \({value}\).*uint8\[2\](.|\n)*255"):
      v[index] = value
  assert v[...].tolist() == [1, 2]


@STORAGE
@pytest.mark.parametrize("value", ["abc", ["a", "b"], [[1, 2], [3]], object()])
def test_a_write_of_what_is_no_array_is_refused_and_leaves_the_cell(value, hijax):
  v = nnx.Param(X, is_hijax=hijax)
  with pytest.raises(ShapeMismatchError) as error:
    v[...] = value
  assert str(error.value).startswith("a Variable that holds an array can hold nothing else\n")
  assert f"got: {type(value).__name__} (" in str(error.value)
  assert "the Variable holds float32[3]\n  fix: write an array or a number" in str(error.value)
  np.testing.assert_array_equal(v[...], X)


@STORAGE
@pytest.mark.parametrize("value", [None, {"a": 1.0}], ids=["None", "dict"])
def test_a_write_of_another_structure_to_an_array_is_refused(value, hijax):
  v = nnx.Param(X, is_hijax=hijax)
  with pytest.raises((ShapeMismatchError, TreeMismatchError)):
    v[...] = value
  np.testing.assert_array_equal(v[...], X)


@STORAGE
def test_an_indexed_write_that_does_not_fit_is_refused_and_leaves_the_cell(hijax):
  v = nnx.Param(np.zeros((2, 3), np.float32), is_hijax=hijax)
  with pytest.raises(ShapeMismatchError) as error:
    v[0] = jnp.ones(2)
  line = v._def.origin.line
  assert error.value.args[0] == (
    "the value does not fit the indexed part of the Variable\n"
    f"  at:  (a Variable outside any Module)  (Param, created at test_variable.py:{line})\n"
    "  got: float32[2] for [0] of float32[2,3]\n"
    "  fix: write an array that broadcasts to the shape of the indexed part"
  )
  assert not v[...].any()


def test_a_refused_write_inside_jit_leaves_the_cell_and_no_tracer():
  v = nnx.Param(X)
  with pytest.raises(ShapeMismatchError, match=r"float32\[2\], the Variable holds float32\[3\]"):
    jax.jit(lambda v, x: v.set_value(x))(v, jnp.ones(2))
  check(v[...], jnp.asarray(X))


def test_a_list_of_traced_numbers_is_written_under_jit():
  v = nnx.Variable(jnp.zeros(2))

  @jax.jit
  def write(v, x):
    v[...] = [x, 2 * x]

  write(v, 1.5)
  assert v[...].tolist() == [1.5, 3.0]


def test_the_message_names_the_path_in_the_model():
  class Block(nnx.Module):
    def __init__(self):
      self.layers = [nnx.Linear(2, 3, rngs=nnx.Rngs(0)), {"head": nnx.Param(jnp.ones(2))}]

  block = Block()
  with pytest.raises(ShapeMismatchError, match=r"  at:  Block\.layers\[0\]\.kernel  \(Param, "):
    block.layers[0].kernel[...] = jnp.ones((5, 5))
  with pytest.raises(ShapeMismatchError, match=r"  at:  Block\.layers\[1\]\.head  \(Param, "):
    block.layers[1]["head"][...] = jnp.ones((5, 5))


def test_what_the_user_writes_is_copied():
  x = np.ones(3, np.float32)
  v = nnx.Variable(x)
  x[0] = 7
  assert v[...].tolist() == [1, 1, 1]
  y = np.full(3, 2, np.float32)
  v[...] = y
  y[0] = 7
  assert v[...].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
  "write", [lambda v, x: v.set_value(x), lambda v, x: None], ids=["written", "given"]
)
def test_arrays_read_or_written_stay_valid_after_a_donating_step(write):
  given = jnp.full(3, 5.0)
  v = nnx.Variable(given)
  write(v, given)
  read = v[...]
  step = nnx.jit(lambda v: v.set_value(v * 2))
  for _ in range(3):
    step(v)
  assert read.tolist() == given.tolist() == [5.0] * 3
  assert v[...].tolist() == [40.0] * 3


def test_a_variable_of_a_variable_has_a_cell_of_its_own():
  a = nnx.Variable(X)
  b = nnx.Param(a)
  b[...] = 0
  check(a[...], jnp.asarray(X))


def test_a_ref_as_the_value_is_refused():
  with pytest.raises(StaticAttributeError) as error:
    nnx.Variable(jax.new_ref(jnp.ones(2)))
  assert error.value.args[0] == (
    "a Variable makes its own Ref\n"
    "  got: a jax.Ref as the value\n"
    "  fix: pass the array: nnx.Variable(ref[...])"
  )


# through a Module
@STORAGE
def test_assigning_an_array_to_the_attribute_writes_the_variable(hijax):
  m = Pair(jnp.ones(2))
  if not hijax:
    m = nnx.to_lojax(m)
  v = m.a
  m.a = jnp.full(2, 3.0)
  assert m.a is v and m.b is v
  m.a = m.a + 1
  m.a += 1
  m.a = 9
  assert m.a is v
  assert m.b[...].tolist() == [9.0, 9.0]
  with pytest.raises(ShapeMismatchError, match=r"at:  Pair\.a "):
    m.a = jnp.ones(3)
  assert m.a[...].tolist() == [9.0, 9.0]


def test_assigning_a_variable_replaces_the_variable():
  m = Pair(jnp.ones(2))
  m.a = nnx.Param(jnp.zeros(5))
  assert m.a.shape == (5,) and m.b.shape == (2,)


# values that are no single array
@STORAGE
def test_a_variable_holds_a_pytree(hijax):
  v = nnx.Variable({"a": jnp.zeros(2), "b": [jnp.ones(()), 3]}, is_hijax=hijax)
  assert v.is_hijax is hijax
  v["a"] += 1
  v["b"] = [2.0, 4]
  assert jax.tree.map(np.ndarray.tolist, jax.tree.map(np.asarray, v[...])) == {
    "a": [1.0, 1.0],
    "b": [2.0, 4],
  }
  assert sorted(v.keys()) == ["a", "b"]

  @jax.jit
  def step(v):
    v["a"] *= 3
    return v["a"]

  assert step(v).tolist() == [3.0, 3.0]
  assert v["a"].tolist() == ([3.0, 3.0] if hijax else [1.0, 1.0])


def test_a_hijax_pytree_keeps_its_structure():
  v = nnx.Variable({"a": jnp.zeros(2)})
  with pytest.raises(TreeMismatchError) as error:
    v["b"] = 1.0
  assert str(error.value).startswith("a hijax Variable keeps the structure of its value\n  at: ")
  assert "fix: write a value of the same structure, or assign a new Variable" in str(error.value)
  assert list(v[...]) == ["a"]
  with pytest.raises(TreeMismatchError):
    del v["a"]
  with pytest.raises(ShapeMismatchError):
    v["a"] = jnp.ones(3)
  assert v["a"].tolist() == [0, 0]


def test_a_write_of_a_pytree_that_fails_half_way_writes_nothing():
  v = nnx.Variable({"a": jnp.zeros(2), "b": jnp.zeros(2)})
  with pytest.raises(ShapeMismatchError):
    v.set_value({"a": jnp.ones(2), "b": jnp.ones(3)})
  assert v["a"].tolist() == [0, 0]


def test_a_lojax_pytree_may_change_its_structure():
  v = nnx.Variable({"a": jnp.zeros(2)}, is_hijax=False)
  v["b"] = jnp.ones(1)
  del v["a"]
  assert list(v[...]) == ["b"]


@STORAGE
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_a_variable_holds_typed_keys(impl, hijax):
  keys = jax.random.split(jax.random.key(3, impl=impl), 2)
  v = nnx.Variable(keys, is_hijax=hijax)
  assert (v.shape, v.dtype, v.size) == ((2,), keys.dtype, 2)
  np.testing.assert_array_equal(jax.random.key_data(v[...]), jax.random.key_data(keys))
  v[0] = keys[1]
  np.testing.assert_array_equal(jax.random.key_data(v[0]), jax.random.key_data(keys[1]))
  got = jax.jit(lambda v: jax.random.normal(v[1], (3,)))(v)
  np.testing.assert_array_equal(got, jax.random.normal(keys[1], (3,)))
  with pytest.raises(ShapeMismatchError, match=r"got: int32\[\], the Variable holds key<"):
    v[...] = 1
  other = "rbg" if impl == "threefry2x32" else "threefry2x32"
  with pytest.raises(ShapeMismatchError, match=r"got: key<.*\[\], the Variable holds key<"):
    v[...] = jax.random.key(0, impl=other)
  for twin in (copy.deepcopy(v), pickle.loads(pickle.dumps(v))):
    assert twin.dtype == v.dtype and twin.is_hijax is hijax
    np.testing.assert_array_equal(jax.random.key_data(twin[...]), jax.random.key_data(v[...]))


DTYPES = ("bool", "int8", "uint32", "float16", "bfloat16", "float32", "complex64", "float8_e4m3fn")


@STORAGE
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_variable_of_any_dtype_is_written_under_jit_and_grad(dtype, hijax):
  v = nnx.Variable(jnp.zeros(3, dtype), is_hijax=hijax)

  @nnx.jit
  def step(w, v):
    def loss(w, v):
      v[...] = jnp.ones(3, dtype)
      return w * 2.0

    return nnx.grad(loss)(w, v)

  assert float(step(nnx.Param(1.0), v)) == 2.0
  assert v.dtype == dtype
  np.testing.assert_array_equal(v[...].astype(jnp.complex64), np.ones(3))
  assert v.nbytes == 3 * jnp.dtype(dtype).itemsize
  twin = pickle.loads(pickle.dumps(v))
  assert twin.dtype == dtype and twin.is_hijax is hijax


def test_a_python_number_makes_a_strong_dtype():
  assert not nnx.Variable(1.0)[...].weak_type
  assert not nnx.Variable(1.0, is_hijax=False)[...].weak_type
  assert nnx.Variable(1).dtype == jnp.int32


# metadata and types
def test_metadata_is_read_as_attributes_and_set_by_method():
  v = nnx.Param(1.0, tag="a", axes=("x", None))
  assert (v.tag, v.axes) == ("a", ("x", None))
  assert v.get_metadata() == {"tag": "a", "axes": ("x", None)}
  assert v.get_metadata("tag") == "a" and v.get_metadata("nope", 7) == 7
  v.set_metadata(tag="b", more=1)
  assert v.tag == "b" and v.has_metadata("more") and not v.has_metadata("less")
  v.get_metadata()["tag"] = "changed"
  assert v.tag == "b"


def test_metadata_is_part_of_the_structure():
  structure = jax.tree.structure
  assert structure(nnx.Param(1.0, tag="a")) == structure(nnx.Param(2.0, tag="a"))
  assert structure(nnx.Param(1.0, tag="a")) != structure(nnx.Param(1.0, tag="b"))
  assert structure(nnx.Param(1.0, n=1)) != structure(nnx.Param(1.0, n=1.0))
  assert structure(nnx.Param(1.0, n=(1,))) != structure(nnx.Param(1.0, n=(True,)))
  assert structure(nnx.Param(1.0)) != structure(nnx.Variable(1.0))


def test_metadata_that_cannot_be_hashed_is_refused():
  with pytest.raises(StaticAttributeError) as error:
    nnx.Param(1.0, axes=[1, 2])
  assert error.value.args[0] == (
    "metadata of a Variable must be hashable, for it is part of what jax.jit compiles for\n"
    "  at:  axes\n"
    "  got: list ([1, 2])\n"
    "  fix: make it hashable: a tuple instead of a list, a str instead of an object"
  )
  v = nnx.Param(1.0, a=1)
  with pytest.raises(StaticAttributeError):
    v.set_metadata(a={})
  assert v.a == 1


def test_a_users_type_of_variable_is_kept_everywhere():
  class Model(nnx.Module):
    def __init__(self):
      self.w = Custom(X, tag="mine")

  m = Model()
  twins = [nnx.clone(m), copy.deepcopy(m), jax.tree.map(lambda x: x, m), nnx.merge(*nnx.split(m))]
  twins += [nnx.jit(lambda m: nnx.clone(m))(m), nnx.to_hijax(nnx.to_lojax(m))]
  for twin in twins:
    assert type(twin.w) is Custom and twin.w.tag == "mine"
    check(twin.w[...], jnp.asarray(X))
  assert list(nnx.state(m, Custom)) == ["w"]
  assert list(nnx.grad(lambda m: m.w.sum())(m)) == ["w"]


def test_a_users_type_may_be_detached():
  class Memory(nnx.Variable):
    detached = True

  memory = Memory(0.0)

  def loss(w):
    memory[...] = w * 3
    return w * memory

  assert float(nnx.grad(loss)(nnx.Param(2.0))) == 6.0
  assert float(memory) == 6.0


# copies
@STORAGE
def test_a_shallow_copy_shares_the_cell(hijax):
  v = nnx.Param(X, tag="a", is_hijax=hijax)
  twin = copy.copy(v)
  assert twin.get_raw_value() is v.get_raw_value() and twin.tag == "a"
  twin[...] = 0
  assert bool((v == 0).all()) is hijax


@STORAGE
@pytest.mark.parametrize(
  "duplicate",
  [
    copy.deepcopy,
    lambda v: pickle.loads(pickle.dumps(v)),
    lambda v: cloudpickle.loads(cloudpickle.dumps(v)),
    nnx.Variable.copy,
    nnx.clone,
  ],
  ids=["deepcopy", "pickle", "cloudpickle", "copy", "clone"],
)
def test_a_deep_copy_has_a_cell_of_its_own(duplicate, hijax):
  v = nnx.Param(X, tag="a", is_hijax=hijax)
  twin = duplicate(v)
  assert type(twin) is nnx.Param and twin.tag == "a" and twin.is_hijax is hijax
  twin[...] = 0
  check(v[...], jnp.asarray(X))
  jax.jit(lambda v: v.set_value(v + 1))(twin)
  assert twin[...].tolist() == ([1.0] * 3 if hijax else [0.0] * 3)


@pytest.mark.parametrize(
  "duplicate",
  [
    copy.deepcopy,
    lambda v: pickle.loads(pickle.dumps(v)),
    lambda v: cloudpickle.loads(cloudpickle.dumps(v)),
    nnx.clone,
  ],
  ids=["deepcopy", "pickle", "cloudpickle", "clone"],
)
def test_a_deep_copy_keeps_what_is_shared(duplicate):
  m = Pair(X)
  m.c = {"inner": [m.a, m.b]}
  twin = duplicate(m)
  assert twin.a is twin.b
  twin.a[...] = 7
  for v in (twin.b, *twin.c["inner"]):
    assert v[...].tolist() == [7.0] * 3
  check(m.a[...], jnp.asarray(X))
  assert jax.tree.structure(twin) == jax.tree.structure(m)


def test_copy_takes_a_value_and_metadata():
  v = nnx.Param(X, tag="a")
  twin = v.copy(jnp.ones(5), tag="b", more=1)
  assert (twin.shape, twin.tag, twin.more, v.tag) == ((5,), "b", 1, "a")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, nnx.clone], ids=["deepcopy", "clone"])
def test_a_deep_copy_of_two_handles_on_one_cell_shares_one_cell(duplicate):
  m = Pair(X)
  m.c = [copy.copy(m.a)]
  twin = duplicate(m)
  twin.a[...] = 7
  assert twin.c[0][...].tolist() == [7.0] * 3
  check(m.c[0][...], jnp.asarray(X))


# writes where a gradient or a trace would be lost
def test_a_write_of_a_differentiated_value_is_refused_and_says_what_to_do():
  memory = nnx.Variable(0.0)

  def loss(w):
    memory[...] = w * 3
    return w * 1.0

  with pytest.raises(DifferentiatedWriteError) as error:
    nnx.grad(loss)(nnx.Param(2.0))
  line = memory._def.origin.line
  assert error.value.args[0] == (
    "a value that is being differentiated was written to a Variable, its gradient would be lost\n"
    f"  at:  (a Variable outside any Module)  (Variable, created at test_variable.py:{line})\n"
    "  got: a value that depends on what jax.grad differentiates\n"
    "  fix: to keep the gradient, return the value from the function, hand it out by "
    "self.sow(...), name the Variable in nnx.grad(..., through=...), or make it in the function "
    "with is_hijax=False; to drop the gradient on purpose, write jax.lax.stop_gradient(x)"
  )
  assert float(memory) == 0.0


def test_a_lojax_variable_by_closure_is_not_written_inside_a_transform():
  v = nnx.Variable(0.0, is_hijax=False)

  @jax.jit
  def step(x):
    v[...] = x

  with pytest.raises(TraceContextError) as error:
    step(1.0)
  line = v._def.origin.line
  assert error.value.args[0] == (
    "a lojax Variable from outside a transform cannot be written inside it\n"
    f"  at:  (a Variable outside any Module)  (Variable, created at test_variable.py:{line})\n"
    "  got: a write from another trace than the one where the Variable was made\n"
    "  fix: pass it as an argument and return it, or use a hijax Variable (nnx.to_hijax)"
  )
  assert float(v) == 0.0


@pytest.mark.parametrize(
  "option",
  [
    "hijax",
    "mutable",
    "ref",
    "use_ref",
    "dtype",
  ],
)
def test_keywords_that_mean_something_elsewhere_are_refused(option):
  with pytest.raises(
    StaticAttributeError, match=rf"no option {option}(.|\n)*got: {option}=(.|\n)*fix: "
  ):
    nnx.Param(jnp.ones(2), **{option: None})
  v = nnx.Param(jnp.ones(2))
  with pytest.raises(StaticAttributeError, match=option):
    v.set_metadata(**{option: True})
  assert v.get_metadata() == {}
