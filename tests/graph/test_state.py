"""State and FlatState: nested mappings of leaves, as pytrees and as pure dicts."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import FilterError, TreeMismatchError


def state():
  return nnx.State(
    {
      "b": {"w": nnx.Param(jnp.ones(2)), "s": nnx.BatchStat(0.0)},
      "a": nnx.Param(jnp.zeros(3), tag="t"),
      1: {"x": jnp.ones(1)},
    }
  )


PATHS = ((1, "x"), ("a",), ("b", "s"), ("b", "w"))


def test_a_state_is_a_nested_mapping_read_by_key_or_attribute():
  s = state()
  assert list(s) == [1, "a", "b"] and len(s) == 3 and "a" in s and "z" not in s
  assert isinstance(s["b"], nnx.State) and s.b.w is s["b"]["w"]
  assert [k for k, _ in s.items()] == [1, "a", "b"]
  s.new = {"deep": nnx.Param(1.0)}
  assert isinstance(s.new, nnx.State) and float(s["new"]["deep"]) == 1.0
  del s["new"]
  assert s.get("new") is None
  with pytest.raises(AttributeError, match=r"^State has no 'zz'; it has \['1', 'a', 'b'\]$"):
    s.zz
  with pytest.raises(KeyError):
    s["zz"]


def test_a_state_is_a_pytree_with_key_paths():
  s = state()
  paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(nnx.to_lojax(s))]
  assert paths == ["[1]['x']", "['a']", "['b']['s']", "['b']['w']"]
  twin = jax.tree.map(lambda x: x, s)
  assert isinstance(twin, nnx.State) and isinstance(twin["b"], nnx.State)
  assert twin.a.get_raw_value() is s.a.get_raw_value() and twin.a.tag == "t"
  assert jax.tree.structure(twin) == jax.tree.structure(s)
  assert jax.tree.structure(nnx.State({"a": 1})) != jax.tree.structure(nnx.State({"b": 1}))
  assert jax.tree.structure(nnx.State({"a": 1})) != jax.tree.structure({"a": 1})


def test_states_go_through_plain_jit_and_their_variables_are_written():
  s = state()

  @jax.jit
  def step(s):
    s.b.w[...] += 1
    s["b"]["s"][...] = s.a.sum() + 5
    return jax.tree.map(lambda x: x * 2, nnx.to_lojax(s))

  out = step(s)
  assert s.b.w[...].tolist() == [2.0, 2.0] and float(s.b.s) == 5.0
  assert out.b.w[...].tolist() == [4.0, 4.0] and not out.b.w.is_hijax


def test_flat_states_and_back():
  s = state()
  flat = nnx.to_flat_state(s)
  assert isinstance(flat, nnx.FlatState) and flat.paths == PATHS and len(flat) == 4
  assert flat.leaves[1] is s.a and [p for p, _ in flat] == list(PATHS)
  for source in (flat, dict(flat), list(flat)):
    twin = nnx.from_flat_state(source)
    assert nnx.to_flat_state(twin).paths == PATHS and twin.b.w is s.b.w
  assert s.flat_state().paths == PATHS
  doubled = jax.tree.map(lambda x: x * 2, nnx.FlatState([(("a",), jnp.ones(1))]))
  assert isinstance(doubled, nnx.FlatState) and doubled.leaves[0].tolist() == [2.0]


def test_filter_split_and_merge():
  s = state()
  assert nnx.to_flat_state(nnx.filter_state(s, nnx.BatchStat)).paths == (("b", "s"),)
  params, tagged = s.filter(nnx.BatchStat, "t")
  assert list(params) == ["b"] and list(tagged) == ["a"]
  a, b, c = nnx.split_state(s, "t", nnx.Param, ...)
  assert [nnx.to_flat_state(x).paths for x in (a, b, c)] == [
    (("a",),),
    (("b", "w"),),
    ((1, "x"), ("b", "s")),
  ]
  assert s.split(...).flat_state().paths == PATHS
  with pytest.raises(FilterError, match=r"got: nothing matches \[1\]\.x, \.b\.s"):
    nnx.split_state(s, nnx.Param)
  merged = nnx.merge_state(c, b, a)
  assert merged.flat_state().paths == PATHS and merged.a is s.a
  later = nnx.State.merge(s, nnx.State({"a": nnx.Param(7.0)}))
  assert float(later.a) == 7.0 and s.a.shape == (3,)


def test_map_takes_paths():
  shapes = state().map(lambda path, v: (path, v.shape))
  assert shapes["b"]["w"] == (("b", "w"), (2,)) and shapes[1]["x"] == ((1, "x"), (1,))


def test_pure_dicts_and_back():
  s = state()
  pure = nnx.to_pure_dict(s)
  assert type(pure) is dict and type(pure["b"]) is dict
  assert isinstance(pure["b"]["w"], jax.Array) and pure["b"]["w"].tolist() == [1.0, 1.0]
  assert s.to_pure_dict(lambda x: x.shape) == {1: {"x": (1,)}, "a": (3,), "b": {"s": (), "w": (2,)}}
  w = s.b.w
  nnx.replace_by_pure_dict(s, {"b": {"w": np.full(2, 5, np.float32)}, 1: {"x": jnp.full(1, 9.0)}})
  assert s.b.w is w and w[...].tolist() == [5.0, 5.0] and s[1]["x"].tolist() == [9.0]
  nnx.replace_by_pure_dict(s, {"1": {"x": jnp.zeros(1)}})  # keys of files are strings
  assert s[1]["x"].tolist() == [0.0]
  s.replace_by_pure_dict({"a": jnp.ones(3)}, lambda old, new: old.copy(new * 2))
  assert s.a[...].tolist() == [2.0] * 3 and s.a.tag == "t"


def test_an_unknown_path_is_refused_and_nothing_is_written():
  s = state()
  with pytest.raises(TreeMismatchError, match=r"no place for \.b\.nope"):
    nnx.replace_by_pure_dict(s, {"a": jnp.ones(3), "b": {"nope": 1.0}})
  with pytest.raises(ValueError, match="keeps its shape"):
    nnx.replace_by_pure_dict(s, {1: {"x": jnp.ones(9)}, "a": jnp.ones(3), "b": {"w": jnp.ones(9)}})
  assert s.a[...].tolist() == [0.0] * 3 and s[1]["x"].tolist() == [1.0]


@pytest.mark.parametrize(
  "duplicate",
  [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), nnx.clone],
  ids=["deepcopy", "pickle", "clone"],
)
def test_a_copy_has_cells_of_its_own(duplicate):
  s = state()
  twin = duplicate(s)
  assert isinstance(twin, nnx.State) and twin.flat_state().paths == PATHS
  twin.a[...] = 7.0
  twin["new"] = 1
  assert s.a[...].tolist() == [0.0] * 3 and "new" not in s


def test_a_shallow_copy_is_another_mapping_of_the_same_variables():
  s = state()
  twin = copy.copy(s)
  twin["new"] = 1
  assert "new" not in s and twin.a is s.a


def test_states_print_as_nested_mappings():
  assert repr(nnx.State({"a": nnx.Param(1.0), "b": {"c": 3}})) == (
    "State({\n"
    "  'a': Param( # 1 (4 B)\n"
    "    value=Array(1., dtype=float32),\n"
    "    is_hijax=True\n"
    "  ),\n"
    "  'b': {\n"
    "    'c': 3\n"
    "  }\n"
    "})"
  )
