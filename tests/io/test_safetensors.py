"""save_safetensors and load_safetensors: what is stored, what fits, what a failure leaves."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from refax import _jax, nnx
from refax.errors import (
  CheckpointFormatError,
  CheckpointMismatchError,
  InvalidArgumentError,
  TraceContextError,
)
from refax.io import safetensors as safetensors_module
from refax.io.tensor_file import DTYPES


class Node(nnx.Module):
  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


class Net(nnx.Module):
  """Layers in a list, a statistic, random streams."""

  def __init__(self, seed=0, dtype=jnp.float32):
    rngs = nnx.Rngs(seed, dropout=seed + 1)
    self.layers = [nnx.Linear(3, 3, rngs=rngs, param_dtype=dtype) for _ in range(2)]
    self.norm = nnx.BatchNorm(3, rngs=rngs)
    self.rngs = rngs


def values(tree):
  """(path, bytes) of everything in an object."""

  def raw(x):
    x = x.get_value() if isinstance(x, nnx.Variable) else x
    keys = lambda y: jax.random.key_data(y) if jnp.issubdtype(y.dtype, jax.dtypes.prng_key) else y
    leaves = [np.asarray(keys(jnp.asarray(y))) for y in jax.tree.leaves(x)]
    return [(str(y.dtype), y.shape, y.tobytes()) for y in leaves]

  return {path: raw(x) for path, x in nnx.to_flat_state(nnx.state(tree))}


@pytest.fixture
def path(tmp_path):
  return tmp_path / "model.safetensors"


def header(path):
  with open(path, "rb") as file:
    return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def write_raw(path, header, data=b"", length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(text) if length is None else length
  path.write_bytes(length.to_bytes(8, "little") + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# round trips


@pytest.mark.parametrize("hijax", [True, False])
def test_a_model_comes_back_in_place_with_its_variables(path, hijax):
  with nnx.use_hijax(hijax):
    saved, model = Net(0), Net(7)
  kernel, before = model.layers[1].kernel, model.layers[1].kernel.get_raw_value()
  nnx.save_safetensors(saved, path)
  report = nnx.load_safetensors(model, path)
  assert values(model) == values(saved)
  assert model.layers[1].kernel is kernel and kernel.is_hijax is hijax
  assert (kernel.get_raw_value() is before) is hijax
  assert report.loaded["layers.1.kernel"] == "layers.1.kernel"
  assert report.missing == report.unexpected == () and report.aliases == {}
  assert bool((saved.rngs.dropout() == model.rngs.dropout()).all())


def test_the_state_of_an_optimizer_comes_back(path):
  model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  optimizer, other = (nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param) for _ in range(2))
  optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.to_pure_dict(nnx.state(model))))
  nnx.save_safetensors(optimizer, path)
  assert "opt_state.0.mu.kernel" in header(path)
  nnx.load_safetensors(other, path)
  assert values(other) == values(optimizer) and int(other.step) == 1


def test_a_state_a_dict_and_plain_arrays_and_numbers_come_back_as_what_they_were(path):
  tree = {
    "state": nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
    "list": [jnp.arange(3), np.arange(4.0), np.float32(1.5)],
    "numbers": nnx.State({"i": 3, "f": 0.1, "b": True}),
    "node": Node(table=nnx.data({"a": 1.25}), x=jnp.ones(2), n=nnx.data(7), nothing=None),
  }
  node = Node(table=nnx.data({"a": 0.0}), x=jnp.zeros(2), n=nnx.data(0), nothing=None)
  other = {
    "state": nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(1))),
    "list": [jnp.zeros(3, jnp.int32), np.zeros(4), np.float32(0)],
    "numbers": nnx.State({"i": 0, "f": 0.0, "b": False}),
    "node": node,
  }
  nnx.save_safetensors(tree, path)
  nnx.load_safetensors(other, path)
  assert [type(x) for x in other["list"]] == [type(x) for x in tree["list"]]
  assert [x.tolist() for x in other["list"]] == [[0, 1, 2], [0, 1, 2, 3], 1.5]
  assert nnx.to_pure_dict(other["numbers"]) == {"b": True, "f": 0.1, "i": 3}
  assert type(other["numbers"]["b"]) is bool
  assert other["node"] is node and node.table == {"a": 1.25} and node.x.tolist() == [1, 1]
  assert jax.tree.leaves(node.n) == [7] and len(jax.tree.leaves(node)) == 3  # 7 is still data
  assert values(other["state"]) == values(tree["state"])


@pytest.mark.parametrize("hijax", [True, False])
def test_a_pytree_in_a_variable_has_a_tensor_for_each_leaf(path, hijax):
  make = lambda x: nnx.Variable({"a": (x, 2 * x), "b": jnp.int32(1)}, is_hijax=hijax)
  nnx.save_safetensors(Node(v=make(jnp.arange(3.0))), path)
  assert sorted(header(path)) == ["v.a.0", "v.a.1", "v.b"]
  model = Node(v=make(jnp.zeros(3)))
  nnx.load_safetensors(model, path)
  assert model.v[...]["a"][1].tolist() == [0, 2, 4] and model.v.is_hijax is hijax
  # a file that has a part of it
  oracle.save_file({"v.a.1": np.full(3, 9, "f")}, path)
  report = nnx.load_safetensors(model, path, strict=False)
  assert report.missing == ("v.a.0", "v.b")
  assert [x.tolist() for x in model.v[...]["a"]] == [[0, 1, 2], [9, 9, 9]]


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_typed_keys_keep_their_implementation(path, impl):
  keys = lambda seed: Node(k=nnx.Variable(jax.random.split(jax.random.key(seed, impl=impl), 3)))
  saved, model = keys(1), keys(2)
  nnx.save_safetensors(saved, path)
  nnx.load_safetensors(model, path)
  assert jax.random.key_data(model.k[...]).tolist() == jax.random.key_data(saved.k[...]).tolist()
  assert str(jax.random.key_impl(model.k[...])) == impl
  other = "rbg" if impl == "threefry2x32" else "threefry2x32"
  wrong = Node(k=nnx.Variable(jax.random.split(jax.random.key(0, impl=other), 3)))
  with pytest.raises(CheckpointMismatchError, match=r"k  +k  +key<\w+>\[3\]  +key<\w+>\[3\]"):
    nnx.load_safetensors(wrong, path)
  plain = Node(k=nnx.Variable(jax.random.key_data(saved.k[...]) * 0))
  with pytest.raises(CheckpointMismatchError, match=r"rename to \(name, jax.random.key_data\)"):
    nnx.load_safetensors(plain, path)
  nnx.load_safetensors(plain, path, rename=lambda name: (name, jax.random.key_data))
  nnx.save_safetensors(plain, path)
  if impl == "threefry2x32":
    with pytest.raises(CheckpointMismatchError, match=r"jax\.random\.wrap_key_data"):
      nnx.load_safetensors(model, path)
    nnx.load_safetensors(model, path, rename={"k": ("k", jax.random.wrap_key_data)})


DTYPES_IN_JAX = [d for d in DTYPES.values() if d.itemsize < 8 or d == np.complex64]
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
arrays = st.builds(
  lambda dtype, shape, seed: jnp.asarray(
    np.random.default_rng(seed).integers(0, 2, shape).astype(dtype)
  ),
  st.sampled_from(DTYPES_IN_JAX),
  shapes,
  st.integers(0, 9),
)
variables = st.builds(
  lambda kind, value, hijax: kind(value, is_hijax=hijax),
  st.sampled_from([nnx.Param, nnx.BatchStat]),
  arrays | st.dictionaries(st.sampled_from("ab"), arrays, min_size=1),
  st.booleans(),
)
keys = st.text("xyz/é0 ", min_size=1, max_size=4)
trees = st.recursive(
  variables,
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
  max_leaves=6,
)


@settings(max_examples=30, deadline=None)
@given(tree=trees, share=st.booleans())
def test_any_tree_of_variables_comes_back(tmp_path_factory, tree, share):
  path = tmp_path_factory.getbasetemp() / "law.safetensors"
  model = Node(a=tree, b=tree) if share and isinstance(tree, nnx.Variable) else Node(a=tree)
  other = nnx.clone(model)
  for _, v in nnx.to_flat_state(nnx.variables(other)):
    v[...] = jax.tree.map(jnp.zeros_like, v[...])
  nnx.save_safetensors(model, path)
  with open(path, "rb") as file:
    assert file.read(8) and header(path) is not None
  nnx.load_safetensors(other, path)
  assert values(other) == values(model)
  first = path.read_bytes()
  nnx.save_safetensors(other, path)
  assert path.read_bytes() == first


# the package reads what we write, and the other way round


@pytest.mark.parametrize("name", DTYPES)
def test_the_package_and_we_read_each_other(path, tmp_path, name):
  dtype = DTYPES[name]
  x = np.arange(-3, 9).reshape(3, 4) if dtype.kind not in "ub" else np.arange(12).reshape(3, 4) % 2
  saved = {"x": x.astype(dtype), "scalar": np.ones((), dtype), "empty": np.zeros((0, 2), dtype)}
  nnx.save_safetensors(saved, path, metadata={"größe": "7"})
  oracle.save_file(saved, tmp_path / "theirs", metadata={"größe": "7"})
  if not name.startswith("F8"):  # which its NumPy side does not read
    for key, got in oracle.load_file(path).items():
      assert got.dtype == dtype and got.tobytes() == saved[key].tobytes()
      assert got.shape == saved[key].shape
  for file in (path, tmp_path / "theirs"):
    into = {key: np.zeros_like(value) for key, value in saved.items()}
    assert nnx.load_safetensors(into, file).metadata == {"größe": "7"}
    for key, got in into.items():
      assert got.dtype == dtype and got.tobytes() == saved[key].tobytes()


def test_a_bool_of_any_byte_is_a_bool(path):
  write_raw(path, {"x": entry("BOOL", (3,), (0, 3))}, b"\0\1\2")
  nnx.load_safetensors(model := Node(x=nnx.Variable(jnp.zeros(3, bool))), path)
  assert np.asarray(model.x[...]).tobytes() == b"\0\1\1"


def test_tensors_are_aligned_whatever_their_order(path):
  nnx.save_safetensors({"a": np.ones(3, np.int8), "b": np.ones(3, "f"), "c": np.ones(1, "d")}, path)
  begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
  assert begin % 8 == 0
  for name, size in (("a", 1), ("b", 4), ("c", 8)):
    assert header(path)[name]["data_offsets"][0] % size == 0


# sharing


def tied(tied=True):
  a = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  b = a if tied else nnx.Linear(2, 2, rngs=nnx.Rngs(1))
  net = Node(a=a, b=b, k=a.kernel if tied else nnx.Param(jnp.zeros((2, 2))))
  net.me = net if tied else None  # a cycle has no end of names, and needs none
  return net


def test_what_is_shared_is_stored_once_and_its_other_names_are_recorded(path):
  model = tied()
  nnx.save_safetensors(model, path)
  assert sorted(header(path)) == ["__metadata__", "a.bias", "a.kernel"]
  aliases = {"b.bias": "a.bias", "b.kernel": "a.kernel", "k": "a.kernel"}
  assert json.loads(header(path)["__metadata__"]["refax.aliases"]) == aliases
  into = tied()
  into.a.kernel[...] = 0.0
  assert nnx.load_safetensors(into, path).aliases == aliases
  assert into.b is into.a and into.k is into.a.kernel and values(into) == values(model)


def test_a_shared_file_fills_a_model_that_does_not_share(path):
  nnx.save_safetensors(model := tied(), path)
  into = tied(False)
  report = nnx.load_safetensors(into, path)
  assert report.loaded["k"] == "a.kernel" and report.aliases["b.bias"] == "a.bias"
  for got in (into.a.kernel, into.b.kernel, into.k):
    assert bool((got == model.k).all())
  assert into.k is not into.a.kernel


def test_a_file_that_holds_tied_weights_twice_fills_a_model_that_shares(path):
  oracle.save_file({"a.bias": (x := np.ones(2, "f")), "b.bias": x, "k": np.ones((2, 2), "f")}, path)
  model = tied()
  report = nnx.load_safetensors(model, path)
  assert report.loaded == {"a.bias": "a.bias", "a.kernel": "k"} and model.a.bias[0] == 1
  before = values(model)
  oracle.save_file({"a.bias": x, "b.bias": 2 * x, "k": np.ones((2, 2), "f")}, path)
  with pytest.raises(CheckpointMismatchError, match=r"b.bias(.|\n)*it differs from a.bias"):
    nnx.load_safetensors(model, path)
  assert values(model) == before


def test_modules_that_share_at_each_of_many_levels_are_named_in_no_time(path):
  node = Node(v=nnx.Param(1.0))
  for _ in range(40):  # 2 ** 40 paths
    node = Node(a=node, b=node)
  nnx.save_safetensors(node, path)
  nnx.load_safetensors(node, path)


# names


def test_rules_are_applied_in_order_to_whole_names_with_their_functions(path):
  linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  w = np.arange(6, dtype="f").reshape(3, 2)
  oracle.save_file({"m.lin.weight": w, "m.lin.bias": np.ones(3, "f"), "m.steps": np.ones(1)}, path)
  rules = {
    r"m\.(.*)": (r"\1", lambda x: x + 1),
    r"lin|weight": "never, for it is no whole name",
    r"(.*)\.weight": (r"\1.kernel", lambda x: 2 * x.T),
    r"(?P<rest>lin.*)": r"net.\g<rest>",
    r"steps": None,
  }
  model = Node(net=Node(lin=linear))
  report = nnx.load_safetensors(model, path, rename=rules)
  assert linear.kernel[...].tolist() == (2 * (w.T + 1)).tolist()
  assert linear.bias[...].tolist() == [2, 2, 2]
  assert report.loaded["net.lin.kernel"] == "m.lin.weight" and report.unexpected == ()


def test_a_function_renames_drops_and_changes(path):
  oracle.save_file({"A": np.ones((2, 3), "f"), "junk": np.ones(1)}, path)

  def rename(name):
    return None if name == "junk" else (name.lower(), lambda x: x.reshape(6))

  model = Node(a=nnx.Param(jnp.zeros(6)))
  assert repr(nnx.load_safetensors(model, path, rename=rename)) == "LoadReport(1 loaded)"
  assert model.a[...].tolist() == [1] * 6


@pytest.mark.parametrize(
  ("rename", "text"),
  [
    ({"(": "a"}, r"regular expression \(missing \)"),
    ({"a": r"\2"}, r"a replacement for 'a' \(invalid group reference"),
    ({"b": 3}, "name, \\(name, function of the array\\) or None"),
    ({"b": ("a", 3)}, "name, \\(name, function of the array\\) or None"),
    (lambda name: 3, "for 'a' a name, "),
    ([("a", "b")], "a dict of regular expressions, or a function of a name"),
  ],
)
def test_a_rule_that_makes_no_sense_is_refused(path, rename, text):
  model = Node(a=nnx.Param(jnp.zeros(2)))
  oracle.save_file({"a": np.ones(2, "f")}, path)
  with pytest.raises(InvalidArgumentError, match=f"load_safetensors cannot.*rename(.|\n)*{text}"):
    nnx.load_safetensors(model, path, rename=rename)
  assert model.a[...].tolist() == [0, 0]


@pytest.mark.parametrize("function", [nnx.save_safetensors, nnx.load_safetensors])
def test_two_arrays_of_one_name_are_refused_and_another_separator_helps(path, function):
  tree = {"a.b": nnx.Param(1.0), "a": {"b": nnx.Param(2.0)}}
  nnx.save_safetensors({"a.b": nnx.Param(0.0)}, path)
  with pytest.raises(InvalidArgumentError, match=r"sep='.'(.|\n)*the name 'a.b' stands for two"):
    function(tree, path)
  with pytest.raises(InvalidArgumentError, match="sep=''"):
    function(tree, path, sep="")
  nnx.save_safetensors(tree, path, sep="/")
  assert sorted(header(path)) == ["a.b", "a/b"]
  tree["a.b"][...] = 5.0
  nnx.load_safetensors(tree, path, sep="/")
  assert float(tree["a.b"]) == 1.0


# filters, strictness, mismatches


def test_only_what_the_filter_selects_is_saved_and_loaded(path):
  saved, model = Net(0), Net(1)
  nnx.save_safetensors(saved, path, only=nnx.Param)
  assert "norm.mean" not in header(path) and "norm.scale" in header(path)
  with pytest.raises(CheckpointMismatchError, match=r"-  +norm.mean  +nothing  +float32\[3\]"):
    nnx.load_safetensors(model, path)
  stat = model.norm.mean[...]
  nnx.load_safetensors(model, path, only=nnx.Param)
  assert values(nnx.state(model, nnx.Param)) == values(nnx.state(saved, nnx.Param))
  nnx.save_safetensors(saved, path)
  saved.norm.mean[...] = 9.0
  nnx.save_safetensors(saved, path)
  report = nnx.load_safetensors(model, path, only=nnx.Param)
  assert report.unexpected == () and bool((model.norm.mean == stat).all())


def mismatched(path):
  oracle.save_file(
    {
      "a.kernel": np.zeros((3, 2), "f"),
      "a.bias": np.zeros(3, np.float16),
      "n": np.zeros((), np.int64),
      "q": np.zeros((6, 4), "f"),
      "extra": np.zeros(7, "f"),
    },
    path,
  )
  model = Node(
    a=nnx.Linear(2, 3, rngs=nnx.Rngs(0)),
    n=nnx.Variable(0),
    q=nnx.Param(jnp.zeros((4, 2, 3))),
    z=nnx.Param(jnp.zeros(1)),
  )
  return model


TABLE = """\
the file does not fit the model; nothing has been loaded
  at:  PATH
  got: 6 mismatches
    in the file  in the model  the file has  the model has   what to do
    a.bias       a.bias        float16[3]    float32[3]      pass cast=True
    a.kernel     a.kernel      float32[3,2]  float32[2,3]    rename to (name, np.transpose)
    n            n             int64[]       int32[]         rename to (name, lambda x: x.astype('int32'))
    q            q             float32[6,4]  float32[4,2,3]  rename to (name, lambda x: x.reshape((4, 2, 3))), perhaps transposed
    -            z             nothing       float32[1]      rename a tensor to it, leave it out with only=, or pass strict=False
    extra        -             float32[7]    nothing         rename it, drop it (rename to None), or pass strict=False
  fix: the last column says it for each tensor"""  # noqa: E501


def test_one_error_lists_all_that_does_not_fit_and_nothing_is_written(path):
  model = mismatched(path)
  before = values(model)
  with pytest.raises(CheckpointMismatchError) as error:
    nnx.load_safetensors(model, path)
  assert isinstance(error.value, ValueError) and values(model) == before
  text = error.value.args[0].replace(str(path), "PATH")
  assert text == TABLE


def test_without_strict_names_may_be_missing_but_shapes_must_fit(path):
  model = mismatched(path)
  before = values(model)
  with pytest.raises(CheckpointMismatchError, match="got: 4 mismatches"):
    nnx.load_safetensors(model, path, strict=False)
  assert values(model) == before
  rules = {
    "a.kernel": ("a.kernel", np.transpose),
    "n": ("n", lambda x: x.astype(np.int32)),
    "q": ("q", lambda x: x.T.reshape(4, 2, 3)),
  }
  report = nnx.load_safetensors(model, path, rename=rules, strict=False, cast=True)
  assert repr(report) == "LoadReport(4 loaded; 1 missing: z; 1 unexpected: extra)"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_floats_become_other_floats_only_when_asked(path, dtype):
  x = np.linspace(-3, 3, 7, dtype=np.float64)
  oracle.save_file({"v": x}, path)
  model = Node(v=nnx.Param(jnp.zeros(7, dtype)))
  with pytest.raises(CheckpointMismatchError, match="pass cast=True"):
    nnx.load_safetensors(model, path)
  nnx.load_safetensors(model, path, cast=True)
  assert model.v.dtype == dtype and bool((model.v == x.astype(dtype)).all())
  oracle.save_file({"v": np.ones(7, np.int32)}, path)
  with pytest.raises(CheckpointMismatchError, match="astype"):  # no silent change of kind
    nnx.load_safetensors(model, path, cast=True)


def test_a_function_that_fails_or_returns_no_array_is_a_row_of_the_table(path):
  oracle.save_file({"a": np.ones(2, "f"), "b": np.ones(2, "f")}, path)
  model = Node(a=nnx.Param(jnp.zeros(2)), b=nnx.Param(jnp.zeros(2)))
  rules = {"a": ("a", lambda x: x.reshape(3)), "b": ("b", lambda x: "text")}
  with pytest.raises(CheckpointMismatchError) as error:
    nnx.load_safetensors(model, path, rename=rules)
  assert "mend the function in rename (ValueError: cannot reshape array" in str(error.value)
  assert "let the function in rename return an array" in str(error.value)
  assert model.a[...].tolist() == [0, 0]


def test_an_array_in_a_tuple_of_a_dict_is_loaded(path):
  tree = {"v": nnx.Param(1.0), "t": (jnp.ones(2), (jnp.zeros(1),))}
  nnx.save_safetensors(tree, path)
  tree["t"] = (jnp.zeros(2), (jnp.ones(1),))
  nnx.load_safetensors(tree, path)
  assert tree["t"][0].tolist() == [1, 1] and tree["t"][1][0].tolist() == [0]


def test_an_array_in_a_tuple_alone_cannot_be_loaded_and_nothing_else_is(path):
  tree = (nnx.Param(1.0), jnp.ones(2))
  nnx.save_safetensors(tree, path)
  tree[0][...] = 3.0
  with pytest.raises(CheckpointMismatchError, match=r"make it an nnx\.Variable"):
    nnx.load_safetensors(tree, path)
  assert float(tree[0]) == 3.0


def test_a_variable_that_cannot_be_written_now_is_found_before_any_write(path):
  a = nnx.Variable(1.0)
  b = nnx.Variable(1.0, is_hijax=False)
  nnx.save_safetensors({"a": a, "b": b}, path)
  a[...] = 2.0
  with pytest.raises(TraceContextError):
    jax.jit(lambda: nnx.load_safetensors({"a": a, "b": b}, path))()
  assert float(a) == 2.0


def test_an_abstract_model_is_filled(path):
  saved = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  nnx.save_safetensors(saved, path)
  model = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
  nnx.load_safetensors(model, path)
  assert values(model) == values(saved)
  with pytest.raises(InvalidArgumentError, match="this one is abstract"):
    nnx.save_safetensors(nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0))), path)


@pytest.mark.parametrize(
  ("tree", "kwargs", "text"),
  [
    ({"a": {"b": "text"}}, {}, r"leaf at .a.b='text'(.|\n)*only="),
    ({"a": nnx.Variable(jnp.int4(1))}, {}, r"dtype of a=dtype\(int4\)(.|\n)*only=..."),
    ({"__metadata__": jnp.ones(1)}, {}, "keeps it for itself"),
    ({}, {"metadata": {"a": 1}}, "pass a dict of str"),
    ({}, {"metadata": 3}, "pass a dict of str"),
    ({}, {"metadata": {"refax.keys": "{}"}}, "which Refax writes itself"),
    ({}, {"metadata": {"a": "\ud800"}}, "valid Unicode"),
  ],
)
def test_what_cannot_be_stored_is_refused_before_the_file_is_touched(path, tree, kwargs, text):
  path.write_bytes(b"old")
  with pytest.raises(InvalidArgumentError, match=f"save_safetensors cannot(.|\n)*{text}"):
    nnx.save_safetensors(tree, path, **kwargs)
  assert path.read_bytes() == b"old" and os.listdir(path.parent) == [path.name]


# damaged files

BROKEN = {
  "0 bytes, too short": lambda p: p.write_bytes(b""),
  "3 bytes, too short": lambda p: p.write_bytes(b"abc"),
  "more than the 100000000": lambda p: write_raw(p, {}, length=2**63),
  "a header of 99 bytes in a file of 10": lambda p: write_raw(p, {}, length=99),
  "no JSON: .*utf-8": lambda p: write_raw(p, b'{"\xff":1}'),
  "no JSON: Expecting": lambda p: write_raw(p, b"{nonsense}"),
  "no JSON: .*recursion": lambda p: write_raw(p, b'{"x":' * 100_000),
  "no JSON: .*surrogate": lambda p: write_raw(p, b'{"\\ud800":1}'),
  "no JSON: .*digits": lambda p: write_raw(p, b'{"x":' + b"9" * 5000 + b"}"),
  "header that is no JSON object": lambda p: write_raw(p, b"[1]"),
  "the name 'x' twice": lambda p: write_raw(p, b'{"x":1,"x":2}'),
  "metadata that is no JSON object of strings": lambda p: write_raw(p, {"__metadata__": {"a": 1}}),
  "without a dtype, shape": lambda p: write_raw(p, {"x": {"dtype": "F32"}}),
  "unknown dtype 'Q9'": lambda p: write_raw(p, {"x": entry("Q9")}, bytes(8)),
  "unknown dtype '3'": lambda p: write_raw(p, {"x": entry(3)}, bytes(8)),
  "no list of sizes": lambda p: write_raw(p, {"x": entry(shape=(-2,))}, bytes(8)),
  "with a shape that is no list": lambda p: write_raw(p, {"x": entry(shape=(True, 2))}, bytes(8)),
  "shape that is no list of": lambda p: write_raw(p, {"x": entry(shape=(2.0,))}, bytes(8)),
  "a shape that is no list of sizes": lambda p: write_raw(p, {"x": entry(shape=(1,) * 65)}),
  "no array can have": lambda p: write_raw(p, {"x": entry(shape=(0, 2**62, 9), offsets=(0, 0))}),
  "that are no range": lambda p: write_raw(p, {"x": entry(offsets=(8, 0))}, bytes(8)),
  "data_offsets that are no range": lambda p: write_raw(p, {"x": entry(offsets=(0,))}, bytes(8)),
  "not match its bytes": lambda p: write_raw(p, {"x": entry(shape=(3,))}, bytes(8)),
  "does not match its bytes": lambda p: write_raw(p, {"x": entry(shape=(2**61, 8))}, bytes(8)),
  "'y' overlaps another": lambda p: write_raw(
    p, {"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12)
  ),
  "'x' leaves a gap": lambda p: write_raw(p, {"x": entry(offsets=(8, 16))}, bytes(16)),
  "whose header describes": lambda p: write_raw(p, {"x": entry()}, bytes(9)),
  "file of .* bytes whose header describes": lambda p: write_raw(p, {"x": entry()}, bytes(7)),
  "'refax.keys' that is no JSON": lambda p: write_raw(p, {"__metadata__": {"refax.keys": "{"}}),
  "'refax.aliases' that is no JSON": lambda p: write_raw(
    p, {"__metadata__": {"refax.aliases": '{"a": 1}'}}
  ),
  "names a tensor that is not there": lambda p: write_raw(
    p, {"__metadata__": {"refax.aliases": '{"a": "b"}'}}
  ),
  "no data of PRNG keys": lambda p: write_raw(
    p, {"__metadata__": {"refax.keys": '{"x": "rbg"}'}, "x": entry()}, bytes(8)
  ),
  "keys: uint64 instead of uint32": lambda p: write_raw(
    p,
    {"__metadata__": {"refax.keys": '{"x": "threefry2x32"}'}, "x": entry("U64", (2,), (0, 16))},
    bytes(16),
  ),
  "'x' is no data of PRNG keys": lambda p: write_raw(
    p, {"__metadata__": {"refax.keys": '{"x": "dice"}'}, "x": entry("U32")}, bytes(8)
  ),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_damaged_file_is_refused_with_its_path_and_the_problem(path, problem):
  model = Node(x=nnx.Param(jnp.zeros(2)))
  BROKEN[problem](path)
  with pytest.raises(
    CheckpointFormatError, match=f"damaged\n  at:  .*(.|\n)*got: .*{problem}"
  ) as e:
    nnx.load_safetensors(model, path, strict=False)
  assert str(path) in str(e.value) and isinstance(e.value, ValueError)
  assert model.x[...].tolist() == [0, 0]


def small():
  """A model of few bytes with all that our metadata can say."""
  v = nnx.Param(jnp.arange(2.0))
  return Node(a=v, b=v, k=nnx.Variable(jax.random.key(0)), n=nnx.Variable(jnp.array([True, False])))


def test_a_file_cut_at_any_byte_is_refused(path):
  nnx.save_safetensors(model := small(), path)
  whole, before = path.read_bytes(), values(model)
  for n in range(len(whole)):
    path.write_bytes(whole[:n])
    with pytest.raises(CheckpointFormatError):
      nnx.load_safetensors(model, path)
  assert values(model) == before


def changes(whole):
  """Files that are nearly right, or not at all."""
  end = 8 + int.from_bytes(whole[:8], "little")
  flip = lambda at, bit: whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
  put = lambda at, char: whole[:at] + char + whole[at + 1 :]
  return (
    st.builds(flip, st.integers(0, end - 1), st.integers(0, 7))
    | st.builds(put, st.integers(8, end - 1), st.sampled_from([*b'0123456789{}[]":,BFIU']).map(chr)
                .map(str.encode))
    | st.binary(max_size=200)
    | st.binary(max_size=200).map(lambda b: len(b).to_bytes(8, "little") + b)
    | st.builds(lambda n, b: whole[:n] + b, st.integers(0, len(whole)), st.binary(max_size=20))
  )  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_bytes_are_loaded_as_the_package_reads_them_or_refused(tmp_path_factory, data):
  path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
  model = small()
  nnx.save_safetensors(model, path)
  path.write_bytes(data.draw(changes(path.read_bytes())))
  model.a[...] = -1.0
  before = values(model)
  try:
    theirs = oracle.load_file(path)
  except Exception:
    theirs = None
  try:
    report = nnx.load_safetensors(model, path, strict=False)
  except CheckpointFormatError:
    assert values(model) == before
    if theirs is not None:  # what the package does not look at
      names = header(path).get("__metadata__", {})
      assert any(key.startswith("refax") for key in names)
  except CheckpointMismatchError:
    assert values(model) == before
  else:
    assert theirs is not None
    assert set(report.loaded.values()) | set(report.unexpected) <= set(theirs)
    if "a" in report.loaded:
      assert model.a[...].tobytes() == theirs[report.loaded["a"]].tobytes()
    else:
      assert model.a[...].tolist() == [-1, -1]


def test_a_file_or_folder_that_is_not_there_is_an_oserror(path, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
    nnx.load_safetensors(small(), path)
  with pytest.raises(OSError, match=str(tmp_path)):
    nnx.load_safetensors(small(), tmp_path)
  with pytest.raises(FileNotFoundError):
    nnx.save_safetensors(small(), tmp_path / "none" / "x")


def test_a_file_that_changes_while_it_is_read_says_how_far_it_came(path, monkeypatch):
  model = Net()
  nnx.save_safetensors(Net(5), path)
  before = values(model)
  rules = {".*bias": (r"\g<0>", lambda x: x if not x.any() else x[:1])}  # right for zeros only
  saved = Net(5)
  saved.layers[1].bias[...] = 1.0
  nnx.save_safetensors(saved, path)
  with pytest.raises(CheckpointFormatError, match=r"after 2 tensors(.|\n)*nnx.transaction"):
    nnx.load_safetensors(model, path, rename=rules)
  assert values(model) != before
  model = Net()
  with pytest.raises(CheckpointFormatError), nnx.transaction(model):
    nnx.load_safetensors(model, path, rename=rules)
  assert values(model) == before


# a file appears whole or not at all


def test_a_disk_that_is_full_leaves_the_old_file(path):
  resource = pytest.importorskip("resource")
  old = nnx.Param(jnp.zeros(3))
  nnx.save_safetensors(old, path)
  whole, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
  try:  # the system refuses to write more, as it does on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    with pytest.raises(OSError, match="too large"):
      nnx.save_safetensors({f"x{i}": np.ones(10_000, "f") for i in range(9)}, path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert path.read_bytes() == whole and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_save_that_is_interrupted_leaves_the_old_file(path, monkeypatch, error):
  nnx.save_safetensors(model := Net(), path)
  whole, read, count = path.read_bytes(), jax.random.key_data, iter(range(99))

  def interrupted(x):
    if next(count) == 3:
      raise error
    return read(x)

  monkeypatch.setattr(jax.random, "key_data", interrupted)
  model.layers[0].kernel[...] = 0.0
  with pytest.raises(error):
    nnx.save_safetensors(model, path)
  assert path.read_bytes() == whole and os.listdir(path.parent) == [path.name]


def python(code, *args, **env):
  command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
  env = os.environ | {"JAX_PLATFORMS": "cpu"} | env
  return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_a_kill_in_the_middle_of_a_save_leaves_the_old_file(path):
  nnx.save_safetensors({"x": jnp.zeros(3)}, path)
  whole = path.read_bytes()
  code = """
    import os, signal, sys, numpy as np
    from refax import nnx
    class Fatal(np.ndarray):
      def __array_finalize__(self, old): pass
      def reshape(self, *shape): os.kill(os.getpid(), signal.SIGKILL)
    tree = {"a": np.ones(100_000), "b": np.ones(100_000).view(Fatal)}
    real = np.ascontiguousarray
    np.ascontiguousarray = lambda x: x if isinstance(x, Fatal) else real(x)
    from refax.io import safetensors
    safetensors.on_host = lambda x: x
    nnx.save_safetensors(tree, sys.argv[1])
    """
  done = python(code, path)
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert path.read_bytes() == whole
  left = [name for name in os.listdir(path.parent) if name != path.name]
  assert [name.startswith(".refax-") for name in left] == [True]


def test_the_data_is_on_the_disk_before_the_file_has_its_name(path, monkeypatch):
  calls = []
  for name in ("fsync", "replace"):
    call = getattr(os, name)
    monkeypatch.setattr(os, name, lambda *a, n=name, f=call: (calls.append(n), f(*a)))
  nnx.save_safetensors(small(), path)
  assert calls == ["fsync", "replace", "fsync"]  # and at the end the folder


def test_a_link_stays_a_link_and_the_mode_of_files_is_the_usual_one(path, tmp_path):
  (tmp_path / "link").symlink_to(path)
  nnx.save_safetensors(small(), tmp_path / "link")
  (tmp_path / "other").write_bytes(b"")
  assert (tmp_path / "link").is_symlink() and path.exists()
  assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


# resources


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux counts peaks there")
@pytest.mark.parametrize("what", ["save", "load", "load into an abstract model"])
def test_beside_the_model_there_is_one_tensor_on_the_host_and_one_on_the_device(path, what):
  code = """
    import sys, jax.numpy as jnp
    from refax import nnx

    def status(name):  # MiB
      with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024

    make = lambda: nnx.List([nnx.Param(jnp.full((2 * 2**20,), 1.0)) for _ in range(24)])
    file, what = sys.argv[1:]
    nnx.save_safetensors(make(), file)  # 24 tensors of 8 MiB
    nnx.load_safetensors(nnx.List([nnx.Param(jnp.ones(2 * 2**20))]), file, strict=False)  # compiles
    model = nnx.eval_shape(make) if "abstract" in what else make()
    with open("/proc/self/clear_refs", "w") as refs:
      refs.write("5")  # the peak is that from here on
    base = status("VmRSS")
    nnx.save_safetensors(model, file) if what == "save" else nnx.load_safetensors(model, file)
    assert all(float(v[0]) == 1.0 for v in model)
    print(status("VmHWM") - base)
    """
  # malloc keeps what is freed, between other things; so it does not.
  done = python(code, path, what, MALLOC_MMAP_THRESHOLD_="1000000")
  assert done.returncode == 0, done.stderr
  model = 192 if "abstract" in what else 0
  assert model - 8 < float(done.stdout) < model + 3 * 8


def test_a_sharded_variable_keeps_its_layout(path):
  code = """
    import sys, jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P, AxisType
    from refax import nnx
    assert jax.device_count() == 4
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    for hijax in (True, False):
      x = jnp.arange(32.0).reshape(8, 4)
      make = lambda x: nnx.Dict(
        a=nnx.Param(jax.device_put(x, NamedSharding(mesh, P("d"))), is_hijax=hijax),
        b=nnx.Param(jax.device_put(x, NamedSharding(mesh, P())), is_hijax=hijax),
        c=nnx.Param(jax.device_put(x, jax.devices()[2]), is_hijax=hijax),
        d=nnx.Param(x, is_hijax=hijax))
      nnx.save_safetensors(make(x), sys.argv[1])
      model = make(0 * x)
      before = [model[k][...].sharding for k in "abcd"], [model[k][...].committed for k in "abcd"]
      nnx.load_safetensors(model, sys.argv[1])
      after = [model[k][...].sharding for k in "abcd"], [model[k][...].committed for k in "abcd"]
      assert before == after, (before, after)
      assert all(np.array_equal(model[k][...], x) for k in "abcd")
    """
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
  done = python(code, path, XLA_FLAGS=flags)
  assert done.returncode == 0, done.stderr


def test_nnx_does_not_import_the_package():
  done = python("import sys; from refax import nnx; assert 'safetensors' not in sys.modules")
  assert done.returncode == 0, done.stderr


# memory
def test_tensors_are_read_into_the_same_memory_and_stay_apart(tmp_path):
  make = lambda seed: Node(
    large=nnx.Param(jnp.arange(2.0**18) + seed),
    smaller=nnx.Param(jnp.arange(2.0**17) * seed),
    last=nnx.Param(jnp.arange(2.0**18) - seed),
    small=[nnx.Param(jnp.full(3, float(seed + i))) for i in range(9)],
  )
  path, model, want = tmp_path / "m", make(1), make(5)
  nnx.save_safetensors(want, path)
  nnx.load_safetensors(model, path)
  for v, x in zip(leaves_of(model), leaves_of(want), strict=True):
    np.testing.assert_array_equal(v, x)
  nnx.jit(lambda m: m.large.set_value(m.large + 1))(model)
  np.testing.assert_array_equal(model.last[...], want.last[...])


def leaves_of(model):
  return list(map(np.asarray, jax.tree.leaves(nnx.to_lojax(model))))


def test_a_function_may_keep_what_it_is_given(tmp_path):
  path, kept = tmp_path / "m", {}
  names = [f"v{i}" for i in range(6)]
  oracle.save_file({n: np.full(2**17, float(i), "f") for i, n in enumerate(names)}, path)
  model = Node(**{n: nnx.Param(jnp.zeros(2**17)) for n in names})

  def keep(name):
    return name, lambda x: (kept.setdefault(name, []).append(x), x)[1]

  nnx.load_safetensors(model, path, rename=lambda name: keep(name) if name < "v3" else name)
  assert [float(kept[n][-1].mean()) for n in names[:3]] == [0, 1, 2]
  assert [float(model.__dict__[n][...].mean()) for n in names] == [0, 1, 2, 3, 4, 5]


def test_an_array_of_numpy_in_a_model_keeps_its_values(tmp_path):
  path = tmp_path / "m"
  make = lambda x: Node(a=np.full(2**17, x, "f"), b=np.full(2**17, x + 1, "f"), c=nnx.Param(x))
  nnx.save_safetensors(make(1.0), path)
  model = make(5.0)
  nnx.load_safetensors(model, path)
  assert float(model.a.mean()) == 1.0 and float(model.b.mean()) == 2.0


@pytest.mark.skipif(_jax._private() is None, reason="counts copies of buffers of Refs")
def test_saving_copies_nothing_on_a_cpu_and_steps_still_donate(tmp_path, monkeypatch):
  model, path = Node(w=nnx.Param(jnp.ones(2**18))), tmp_path / "m"
  step = nnx.jit(lambda m: m.w.set_value(m.w + 1))
  step(model)
  step(model)

  def refuse(*_):
    raise AssertionError("copied")

  with monkeypatch.context() as patch:
    patch.setattr(_jax, "_copy_all", refuse)
    patch.setattr(_jax, "_copy", refuse)
    nnx.save_safetensors(model, path)
  place = lambda: _jax.peek_cell(model.w.get_raw_value()).unsafe_buffer_pointer()
  before = place()
  step(model)
  assert place() == before  # the view of the file's writer is gone
  assert float(oracle.load_file(path)["w"].mean()) == 3.0


@pytest.mark.parametrize("n", [2**14 - 1, 2**14], ids=["small", "large"])
def test_tensors_of_any_layout_and_size_are_written_as_they_are(n, tmp_path):
  x = np.arange(2 * n, dtype=np.float32).reshape(2, n)
  tree = {"rows": x, "columns": x.T, "parts": x[:, ::2], "half": jnp.asarray(x, jnp.bfloat16)}
  nnx.save_safetensors(tree, tmp_path / "m")
  got = oracle.load_file(tmp_path / "m")
  for name in ("rows", "columns", "parts"):
    np.testing.assert_array_equal(got[name], tree[name])
  np.testing.assert_array_equal(got["half"].astype(np.float32), np.asarray(tree["half"], "f"))


def test_a_step_while_a_file_is_written_is_in_it_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
  model = Node(a=nnx.Param(jnp.zeros(2**18)), b=nnx.Param(jnp.zeros(2**18)))

  @nnx.jit
  def step(model):
    model.a[...] += 1
    model.b[...] += 1

  step(model)
  taken, view = [], safetensors_module._view

  def stepping(buffer, on_cpu):
    x = view(buffer, on_cpu)
    taken.append(None if x is None else x.dtype)
    if len(taken) == 1:
      assert x is not None and not x.flags.owndata
      step(model)  # `x` is a view of memory that the step would donate
      assert float(x.mean()) == 1.0
    return x

  monkeypatch.setattr(safetensors_module, "_view", stepping)
  nnx.save_safetensors(model, tmp_path / "m")
  got = oracle.load_file(tmp_path / "m")
  assert float(got["a"].mean()) == float(got["b"].mean()) == 2.0
