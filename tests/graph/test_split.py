"""split, merge, update, state, variables, clone, pop: an object taken apart and put together."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import _jax, nnx
from refax.core.variable import is_variable
from refax.errors import FilterError, ShapeMismatchError, TreeMismatchError
from refax.io.keys import is_key


class Node(nnx.Module):
  """An object with any attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


def param(x=1.0, **kwargs):
  return nnx.Param(jnp.full(2, x), **kwargs)


def model():
  tied = param(5.0)
  return Node(
    w=param(1.0, tag="first"),
    stat=nnx.BatchStat(0.0),
    layers=[Node(w=param(2.0), tied=tied), nnx.relu, param(3.0)],
    table={"k": param(4.0), "n": 3},
    tied=tied,
    x=jnp.ones(3),
    n=7,
  )


PATHS = (
  ("layers", 0, "tied"),
  ("layers", 0, "w"),
  ("layers", 2),
  ("stat",),
  ("table", "k"),
  ("w",),
  ("x",),
)
FILTERS = {
  "none": (),
  "all": (...,),
  "types": (nnx.Param, nnx.BatchStat, ...),
  "tag": ("first", ...),
  "path": (nnx.PathContains("layers"), ...),
  "nothing": (None, ...),
  "tuple": ((nnx.BatchStat, "first"), nnx.Param, ...),
  "predicate": (lambda path, v: path[-1] == "k", ...),
  "subtype": (nnx.Variable, ...),
}
STORAGE = pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])


def same(a, b):
  """Equal structure and values."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(nnx.to_lojax(a)), jax.tree.leaves(nnx.to_lojax(b)), strict=True):
    np.testing.assert_array_equal(x, y)


# split and merge
@STORAGE
@pytest.mark.parametrize("name", FILTERS)
def test_merge_undoes_split(name, hijax):
  m = model() if hijax else nnx.to_lojax(model())
  graphdef, *states = nnx.split(m, *FILTERS[name])
  assert len(states) == max(1, len(FILTERS[name]))
  paths = sorted((p for s in states for p in nnx.to_flat_state(s).paths), key=str)
  assert paths == sorted(PATHS, key=str)
  for order in (states, states[::-1]):
    twin = nnx.merge(graphdef, *order)
    same(twin, m)
    assert twin.tied is twin.layers[0].tied and twin.layers[1] is nnx.relu and twin.n == 7
    assert nnx.find_duplicates(twin) == nnx.find_duplicates(m)
    for path in PATHS[:-1]:
      a, b = nnx.variables(twin), nnx.variables(m)
      for key in path:
        a, b = a[key], b[key]
      assert a is not b and a.get_raw_value() is b.get_raw_value()


def test_the_first_filter_that_matches_takes_a_variable():
  _, everything, rest = nnx.split(model(), nnx.Variable, ...)
  assert len(nnx.to_flat_state(everything)) == 6 and nnx.to_flat_state(rest).paths == (("x",),)
  _, a, b, _ = nnx.split(model(), "first", nnx.Param, ...)
  assert nnx.to_flat_state(a).paths == (("w",),)
  assert ("w",) not in nnx.to_flat_state(b).paths


def test_writes_to_a_state_reach_the_model_and_the_other_way_round():
  m = model()
  graphdef, params, rest = nnx.split(m, nnx.Param, ...)
  params["layers"][0]["tied"][...] = 9.0
  m.w[...] = 8.0
  assert float(m.tied.sum()) == 18.0 and params.w[...].tolist() == [8.0, 8.0]
  twin = nnx.merge(graphdef, params, rest)
  twin.w[...] = 7.0
  assert m.w[...].tolist() == [7.0, 7.0]


def test_the_variables_of_a_state_are_handles_of_their_own():
  m = model()
  state = nnx.state(m)
  assert state.w is not m.w
  state.w.set_metadata(tag="other")
  assert m.w.tag == "first"
  assert nnx.variables(m).w is m.w


def test_lojax_states_are_independent_values():
  m = nnx.to_lojax(model())
  graphdef, state = nnx.split(m)
  state.w[...] = 9.0
  assert m.w[...].tolist() == [1.0, 1.0]
  assert nnx.merge(graphdef, state).w[...].tolist() == [9.0, 9.0]


def test_split_refuses_filters_that_do_not_cover():
  with pytest.raises(FilterError) as error:
    nnx.split(model(), nnx.BatchStat)
  assert error.value.args[0] == (
    "the filters do not cover everything\n"
    "  got: nothing matches .layers[0].tied, .layers[0].w, .layers[2], .table.k, .w and 1 more\n"
    "  fix: add a filter, or `...` as the last one for all the rest"
  )
  with pytest.raises(FilterError) as error:
    nnx.split(model(), ..., nnx.Param)
  assert error.value.args[0] == (
    "`...` matches all that is left, so it comes last\n"
    "  got: `...` as filter 1 of 2\n"
    "  fix: move it to the end"
  )


def test_merge_refuses_states_that_do_not_fit():
  graphdef, params, rest = nnx.split(model(), nnx.Param, ...)
  with pytest.raises(TreeMismatchError) as error:
    nnx.merge(graphdef, params)
  assert error.value.args[0] == (
    "the states do not fit the GraphDef\n"
    "  got: no value for .stat, .x\n"
    "  fix: pass all the states that nnx.split returned, in any order"
  )
  params["layers"][0]["new"] = param()
  with pytest.raises(TreeMismatchError, match=r"got: no place for \.layers\[0\]\.new\n"):
    nnx.merge(graphdef, params, rest)


def test_merge_takes_arrays_and_a_later_state_wins():
  graphdef, state = nnx.split(model())
  twin = nnx.merge(graphdef, state, nnx.State({"w": nnx.Param(jnp.zeros(2))}))
  assert twin.w[...].tolist() == [0.0, 0.0]
  pure = jax.tree.map(lambda v: v[...] if isinstance(v, nnx.Variable) else v, state,
                      is_leaf=lambda v: isinstance(v, nnx.Variable))  # fmt: skip
  twin = nnx.merge(graphdef, pure)
  assert twin.w.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
  "root",
  [
    param,
    lambda: jnp.ones(2),
    lambda: [param(), {"a": Node(w=param())}],
    lambda: (lambda v: {"a": v, "b": [v]})(param()),
    lambda: nnx.state(model()),
    lambda: nnx.List([param(), 3]),
    lambda: nnx.Dict(a=param(), b="x"),
    lambda: Node(),
    lambda: Node(n=1),
    lambda: {},
  ],
  ids=["variable", "array", "pytree", "shared", "state", "list", "dict", "empty", "static", "{}"],
)
def test_any_pytree_is_split_and_merged(root):
  x = root()
  same(nnx.merge(*nnx.split(x)), x)
  same(nnx.clone(x), x)
  assert nnx.find_duplicates(nnx.clone(x)) == nnx.find_duplicates(x)


def test_split_and_merge_inside_plain_jit_write_the_callers_cells():
  m = model()
  graphdef, params, rest = nnx.split(m, nnx.Param, ...)

  @jax.jit
  def step(graphdef, params, rest):
    twin = nnx.merge(graphdef, params, rest)
    twin.tied[...] += 1
    twin.stat[...] = twin.layers[0].tied.sum()
    return nnx.split(nnx.to_lojax(twin), nnx.BatchStat, ...)[1]

  out = step(graphdef, params, rest)
  assert m.tied[...].tolist() == [6.0, 6.0] and float(m.stat) == float(out.stat) == 12.0


def test_a_graphdef_is_static_under_jit():
  m, traces = model(), []

  @jax.jit
  def f(graphdef, state):
    traces.append(1)
    return nnx.merge(graphdef, state).w.sum()

  f(*nnx.split(m))
  f(*nnx.split(nnx.clone(m)))
  m.n = 8
  f(*nnx.split(m))
  assert len(traces) == 2


# state and variables
def test_state_leaves_out_what_no_filter_matches():
  m = model()
  assert nnx.to_flat_state(nnx.state(m)).paths == PATHS
  assert nnx.to_flat_state(nnx.state(m, nnx.BatchStat)).paths == (("stat",),)
  a, b = nnx.state(m, nnx.BatchStat, "first")
  assert list(a) == ["stat"] and list(b) == ["w"]
  assert len(nnx.state(m, None)) == 0
  assert nnx.to_flat_state(nnx.variables(m)).paths == PATHS[:-1]


def test_parameter_paths_are_those_of_flax_nnx():
  flax = pytest.importorskip("flax.nnx", reason="flax is the oracle here")

  def build(lib):
    class Block(lib.Module):
      def __init__(self, rngs):
        self.conv = lib.Conv(1, 2, (3, 3), rngs=rngs)
        self.norm = lib.BatchNorm(2, rngs=rngs)
        self.layers = lib.List([lib.Linear(2, 2, rngs=rngs), lib.LayerNorm(2, rngs=rngs)])
        self.table = lib.Dict({"e": lib.Embed(3, 2, rngs=rngs)})
        self.seq = lib.Sequential(lib.Linear(2, 3, rngs=rngs), jax.nn.relu)
        self.tied = self.seq.layers[0]

    m = Block(lib.Rngs(0))
    return {
      kind.__name__: [(p, np.asarray(v[...])) for p, v in lib.to_flat_state(lib.state(m, kind))]
      for kind in (lib.Param, lib.BatchStat)
    }

  got, want = build(nnx), build(flax)
  for kind, pairs in want.items():
    assert [p for p, _ in got[kind]] == [p for p, _ in pairs]
    for (path, a), (_, b) in zip(got[kind], pairs, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=str(path))


# clone
@STORAGE
def test_a_clone_has_cells_of_its_own_or_shares_them(hijax):
  m = model() if hijax else nnx.to_lojax(model())
  twin, alias = nnx.clone(m), nnx.clone(m, variables=False)
  same(twin, m)
  assert twin.tied is twin.layers[0].tied and alias.tied is alias.layers[0].tied
  twin.w[...] = 9.0
  assert m.w[...].tolist() == [1.0, 1.0]
  alias.w[...] = 9.0
  assert m.w[...].tolist() == [9.0, 9.0]
  twin.layers.append(3)
  assert len(m.layers) == 3


# update
@STORAGE
def test_update_writes_in_place(hijax):
  m = model() if hijax else nnx.to_lojax(model())
  w, x = m.w, jnp.full(3, 2.0)
  other = jax.tree.map(lambda v: v * 10, nnx.to_lojax(nnx.state(model())))
  nnx.update(m, other)
  assert m.w is w and w[...].tolist() == [10.0, 10.0]
  assert m.tied is m.layers[0].tied and m.tied[...].tolist() == [50.0, 50.0]
  assert m.x.tolist() == [10.0] * 3 and isinstance(m.x, jax.Array)
  nnx.update(m, {"w": [3, 4], "x": x}, nnx.State({"w": jnp.full(2, 5.0)}))
  assert w[...].tolist() == [5.0, 5.0] and m.x.tolist() == [2.0] * 3
  nnx.update(m, {"layers": {2: 7.0}})
  assert m.layers[2][...].tolist() == [7.0, 7.0]


def test_update_with_the_models_own_state_changes_nothing():
  m = model()
  want = nnx.clone(m)
  nnx.update(m, nnx.state(m))
  nnx.update(m, nnx.variables(m))
  same(m, want)


def test_update_of_a_variable_and_of_a_list():
  v = param()
  nnx.update(v, jnp.full(2, 3.0))
  assert v[...].tolist() == [3.0, 3.0]
  layers = nnx.List([param(), Node(w=param())])
  nnx.update(layers, {0: jnp.zeros(2), 1: {"w": jnp.zeros(2)}, 2: param(9.0)})
  assert [float(layers[i].sum()) for i in (0, 2)] == [0.0, 18.0]
  assert layers[1].w[...].tolist() == [0.0, 0.0]


def test_update_adds_what_the_object_does_not_have():
  m = model()
  nnx.update(m, {"new": param(9.0), "table": {"more": param(8.0)}, "arr": jnp.ones(1)})
  assert m.new[...].tolist() == [9.0, 9.0] and m.table["more"][...].tolist() == [8.0, 8.0]
  assert m.arr.tolist() == [1.0]
  assert len(jax.tree.leaves(m)) == len(PATHS) + 3


@pytest.mark.parametrize(
  ("bad", "error", "message"),
  [
    ({"w": jnp.ones(5)}, ShapeMismatchError, r"at:  Node\.w "),
    ({"nope": {"deep": jnp.ones(1)}}, TreeMismatchError, r"at:  \.nope\.deep"),
    ({"w": {"deep": jnp.ones(1)}}, TreeMismatchError, r"at:  \.w\.deep"),
    ({"layers": {3: param(), 5: param()}}, TreeMismatchError, r"at:  \.layers\[5\]"),
    ({"table": param()}, TreeMismatchError, r"at:  \.table\n  got: one value in .* of a Dict"),
    ({"layers": {0: param()}}, TreeMismatchError, r"at:  \.layers\[0\]\n  got: one .* of a Node"),
  ],
  ids=["shape", "no parent", "below a variable", "gap in a list", "a dict", "a module"],
)
def test_an_update_that_fails_writes_nothing(bad, error, message):
  m = model()
  want = nnx.clone(m)
  with pytest.raises(error, match=message):
    nnx.update(m, {"stat": 7.0, "table": {"k": 0.0}, "aaa": param(), **bad})
  same(m, want)


# pop
def test_pop_removes_and_returns():
  m = model()
  stats = nnx.pop(m, nnx.BatchStat)
  assert list(stats) == ["stat"] and not hasattr(m, "stat")
  params, rest = nnx.pop(m, "first", nnx.Param)
  assert nnx.to_flat_state(params).paths == (("w",),)
  assert len(nnx.to_flat_state(rest)) == 4
  assert not hasattr(m, "tied") and not hasattr(m.layers[0], "tied")
  assert list(m.layers)[1:] == [nnx.relu] and dict(m.table) == {"n": 3}
  assert len(jax.tree.leaves(m)) == 1
  assert len(nnx.pop(m, nnx.Param)) == 0


@pytest.mark.parametrize("hijax", [True, False])
def test_pop_takes_dicts_and_lists_of_modules_and_variables(hijax):
  with nnx.use_hijax(hijax):
    node, v, w = Node(stat=nnx.BatchStat(1.0), w=param()), nnx.BatchStat(2.0), param()
    shared = {"v": v, "w": w}
    tree = {"a": [node, (node, 1)], "b": shared, "c": [v, w, nnx.BatchStat(3.0), shared]}
    popped = nnx.pop(tree, nnx.BatchStat)
  assert nnx.to_flat_state(popped).paths == (("a", 0, "stat"), ("b", "v"), ("c", 2))
  assert [float(x) for x in jax.tree.leaves(nnx.pure(popped))] == [1.0, 2.0, 3.0]
  assert not hasattr(node, "stat") and tree["a"] == [node, (node, 1)]
  assert tree["b"] is shared and list(shared) == ["w"] and tree["c"] == [w, shared]
  assert len(nnx.pop(tree, nnx.BatchStat)) == 0


def test_pop_reaches_into_plain_containers_in_attributes():
  v, w = nnx.BatchStat(2.0), param()
  m = Node(d=nnx.data({"v": v, "l": [v, w]}), s=nnx.State({"a": {"v": nnx.BatchStat(1.0), "w": w}}))
  assert len(jax.tree.leaves(m)) == 3
  assert list(nnx.pop(m, nnx.BatchStat)) == ["d", "s"]
  assert m.d == {"l": [w]} and list(m.s["a"]) == ["w"] and len(jax.tree.leaves(m)) == 1


@pytest.mark.parametrize(
  ("make", "path"),
  [
    (lambda v: {"a": v, "b": (v,)}, r"\['b'\]\[0\]|\.b\[0\]"),
    (lambda v: Node(a=v, t=nnx.data((1, v))), r"\.t\[1\]"),
    (lambda v: v, r""),
  ],
)
def test_pop_of_what_cannot_lose_a_variable_changes_nothing(make, path):
  v = nnx.BatchStat(1.0)
  tree = make(v)
  count = len(jax.tree.leaves(tree))
  with pytest.raises(TreeMismatchError, match=rf"nnx.pop removes(.|\n)*{path}(.|\n)*in a tuple"):
    nnx.pop(tree, nnx.BatchStat)
  assert len(jax.tree.leaves(tree)) == count


def test_pop_needs_a_filter():
  with pytest.raises(FilterError) as error:
    nnx.pop(model())
  assert error.value.args[0] == (
    "nnx.pop takes at least one filter\n"
    "  got: no filter\n"
    "  fix: say what is meant: nnx.pop(model, nnx.Intermediate), or `...` for everything"
  )


def test_pop_of_neighbours_in_a_list_removes_all():
  m = Node(l=[param(), nnx.BatchStat(0.0), param(), param(), "x", nnx.BatchStat(1.0)])
  nnx.pop(m, nnx.Param)
  assert [type(x) for x in m.l] == [nnx.BatchStat, str, nnx.BatchStat]
  assert [float(v) for v in list(m.l)[::2]] == [0.0, 1.0]


def test_copies_of_a_state_are_independent_mappings():
  state = nnx.state(model())
  twin = copy.copy(state)
  twin["new"] = 1
  assert "new" not in state


# arrays in the place of Variables
class Tagged(nnx.Module):
  """Variables of several types, with metadata, one of them shared."""

  def __init__(self):
    self.conv = nnx.Conv(1, 2, (3,), rngs=nnx.Rngs(0))
    self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    self.tagged = nnx.Param(jnp.ones(2), tag="x")
    self.tied = self.tagged

  def __call__(self, x):
    return self.norm(self.conv(x)) * self.tagged + self.tied


@pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
@pytest.mark.parametrize("form", [nnx.to_pure_dict, lambda s: s.map(lambda _, v: v[...])])
def test_merge_builds_the_variables_of_arrays(form, hijax):
  x = jnp.arange(8.0).reshape(1, 8, 1)
  with nnx.use_hijax(hijax):
    model = Tagged()
  graphdef, state = nnx.split(model)
  merged = nnx.merge(graphdef, form(state))
  assert nnx.graphdef(merged) == graphdef
  assert merged.tied is merged.tagged and merged.tagged.tag == "x"
  for (path, a), (_, b) in zip(
    nnx.to_flat_state(nnx.state(merged)), nnx.to_flat_state(state), strict=True
  ):
    assert type(a) is type(b) and a.is_hijax == b.is_hijax == hijax, path
  loss = lambda m: (m(x) ** 3).sum()
  want, got = (nnx.grad(loss)(m) for m in (model, merged))
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
    np.testing.assert_array_equal(a, b)
  merged.tagged[...] = jnp.zeros(2)
  np.testing.assert_array_equal(model.tagged, [1.0, 1.0])


def test_merge_of_abstract_values_is_an_abstract_model():
  graphdef, state = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
  shapes = state.map(lambda _, v: jax.ShapeDtypeStruct(v.shape, v.dtype))
  merged = nnx.merge(graphdef, shapes)
  assert merged.kernel.is_hijax and merged.kernel.shape == (2, 3)
  nnx.update(merged, state)
  assert merged(jnp.ones(2)).shape == (3,)


def test_a_graphdef_that_was_pickled_builds_them_too():
  graphdef, state = nnx.split(Node(mean=nnx.BatchStat(0.0), tagged=nnx.Param(1.0, tag="x")))
  merged = nnx.merge(pickle.loads(pickle.dumps(graphdef)), nnx.to_pure_dict(state))
  assert type(merged.mean) is nnx.BatchStat and merged.tagged.tag == "x"


class Mixed(nnx.Module):
  """All sorts of Variables: shared, of keys, of bfloat16, of a pytree, empty, and an array."""

  def __init__(self, seed=0):
    self.linear = nnx.Linear(2, 3, rngs=nnx.Rngs(seed))
    self.tied = self.linear.kernel
    self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(seed))
    self.half = nnx.Param(jnp.full(3, seed, jnp.bfloat16))
    self.tree = nnx.Cache({"a": jnp.full(2, seed), "b": (jnp.ones(()), jnp.zeros(0))})
    self.nan = nnx.BatchStat(jnp.full(2, jnp.nan))


def cells(model):
  leaves = [v for v in jax.tree.leaves(model, is_leaf=is_variable) if is_variable(v)]
  return [x for v in leaves for x in jax.tree.leaves(v.get_raw_value())]


def buffers(model):
  return [_jax.bits(_jax.peek_cell(x)).unsafe_buffer_pointer() for x in cells(model) if x.size]


@pytest.fixture
def copies(monkeypatch):
  """The arrays that are copied, one after the other."""
  found, copy = [], _jax._copy
  monkeypatch.setattr(_jax, "_copy", lambda x: (found.append(x), copy(x))[1])
  return found


needs_buffers = pytest.mark.skipif(_jax._private() is None, reason="looks at buffers of Refs")


@needs_buffers
@pytest.mark.parametrize(
  "duplicate",
  [nnx.clone, copy.deepcopy, nnx.to_hijax, lambda m: nnx.merge(*copy.deepcopy(nnx.split(m)))],
  ids=["clone", "deepcopy", "to_hijax", "state"],
)
def test_a_copy_takes_one_copy_of_each_array_and_shares_none(duplicate, copies):
  model = Mixed(1)
  del copies[:]
  twin = duplicate(model)
  assert len(copies) == len(cells(model))
  assert not set(buffers(twin)) & set(buffers(model))
  assert len(set(buffers(twin))) == len(buffers(twin))
  assert twin.tied is twin.linear.kernel or twin.tied.get_raw_value() is cells(twin.linear)[1]
  equal(nnx.to_lojax(twin), nnx.to_lojax(model))
  jax.jit(lambda m: m.half.set_value(m.half * 3))(twin)
  assert model.half[...].tolist() == [1, 1, 1]


def equal(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = (jax.random.key_data(z) if is_key(z) else z for z in (x, y))
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@needs_buffers
def test_an_update_takes_one_copy_of_each_array_and_shares_none(copies):
  model, other = Mixed(1), Mixed(2)
  state = nnx.state(other)
  trees = len(jax.tree.leaves(other.tree.get_raw_value()))  # of these, there are two
  del copies[:]
  nnx.update(model, state)
  assert len(copies) == len(cells(other)) + trees
  assert not set(buffers(model)) & set(buffers(other))
  equal(nnx.to_lojax(model), nnx.to_lojax(other))


@pytest.mark.parametrize("target", [True, False])
@pytest.mark.parametrize("source", [True, False])
def test_an_update_shares_no_buffer_that_a_step_donates(target, source):
  convert = lambda model, hijax: (nnx.to_hijax if hijax else nnx.to_lojax)(model)
  model, other = convert(Mixed(1), target), convert(Mixed(2), source)
  nnx.update(model, nnx.state(other))
  step = nnx.jit(lambda m: m.linear.bias.set_value(m.linear.bias + 1))
  for m in (model, other):
    step(m)
    step(m)
  equal(nnx.to_lojax(model), nnx.to_lojax(other))


def test_an_update_of_variables_with_each_others_values_swaps_them():
  class Two(nnx.Module):
    def __init__(self):
      self.a, self.b = nnx.Param(jnp.zeros(2)), nnx.Param(jnp.ones(2))

  model = Two()
  nnx.update(model, {"a": model.b, "b": model.a})
  assert model.a[...].tolist() == [1, 1] and model.b[...].tolist() == [0, 0]


def test_an_update_reaches_a_shared_variable_by_each_of_its_names():
  model = Mixed(1)
  nnx.update(model, {"tied": jnp.full((2, 3), 7.0)})
  assert float(model.linear.kernel[0, 0]) == 7.0
  nnx.update(model, {"linear": {"kernel": jnp.full((2, 3), 8.0)}})
  assert float(model.tied[0, 0]) == 8.0


def test_a_model_is_walked_once_for_an_update(monkeypatch):
  model = nnx.Sequential(*(nnx.Linear(1, 1, rngs=nnx.Rngs(i)) for i in range(20)))
  state = nnx.state(model)
  calls, entries = [], nnx.List._entries
  monkeypatch.setattr(nnx.List, "_entries", lambda self: (calls.append(0), entries(self))[1])
  nnx.update(model, state)
  assert len(calls) <= 1


@pytest.mark.parametrize("hijax", [True, False])
def test_merge_takes_lists_of_states_and_a_list_of_leaves(hijax):
  with nnx.use_hijax(hijax):
    graphdef, params, stats = nnx.split(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), nnx.Param, ...)
    for states in (
      [params, stats],
      (params, [stats]),
      ([params], {"mean": stats["mean"], "var": stats["var"]}),
    ):
      merged = (
        nnx.merge(graphdef, states) if isinstance(states, list) else nnx.merge(graphdef, *states)
      )
      assert merged.mean.shape == (2,)
    leaves = jax.tree.leaves(nnx.pure(nnx.state(nnx.merge(graphdef, params, stats))))
    assert isinstance(nnx.merge(graphdef, leaves).scale, nnx.Param)


def test_graphdef_and_state_are_generic_and_a_graphdef_applies():
  assert nnx.GraphDef[nnx.Linear] and nnx.State[str, nnx.Param]
  graphdef, state = nnx.split(nnx.Dict(a=nnx.Dropout(0.5, rngs=nnx.Rngs(0)), b=nnx.Param(2.0)))
  y, (graphdef, state) = graphdef.apply(state)["a"](jnp.ones(3))
  assert y.shape == (3,) and int(nnx.merge(graphdef, state)["a"].rngs.count) == 1
  assert graphdef.apply(state)["b"].get_value()[0] == 2.0


def test_update_reaches_into_plain_containers():
  tree = {"a": [nnx.Param(1.0)], "b": jnp.zeros(2)}
  nnx.update(tree, {"a": {0: jnp.array(5.0)}, "b": jnp.ones(2), "c": jnp.ones(1)})
  assert float(tree["a"][0]) == 5.0 and tree["b"].tolist() == [1.0, 1.0] and tree["c"].shape == (1,)


@pytest.mark.parametrize("hijax", [True, False])
def test_clone_with_arrays_shares_no_memory(hijax):
  with nnx.use_hijax(hijax):
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    twin = nnx.clone(model, arrays=True)
    donate = jax.jit(lambda x: x + 1, donate_argnums=0)
    donate(nnx.pure(twin).kernel)
    assert model.kernel[...].shape == (2, 2)


def test_a_clone_without_copies_has_the_same_variables():
  with nnx.use_hijax(False):
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    assert nnx.clone(model, variables=False).kernel is model.kernel


def test_a_clone_in_a_trace_copies_keys_from_outside():
  rngs = nnx.Rngs(0)
  for hijax in (True, False):
    with nnx.use_hijax(hijax):
      kept = nnx.to_hijax(rngs) if hijax else nnx.to_lojax(rngs)
      assert nnx.eval_shape(lambda kept=kept: nnx.Dropout(0.5, rngs=nnx.clone(kept))).rate == 0.5


class Sower(nnx.Module):
  def __init__(self):
    self.linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    self.layers = [nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5)]

  def __call__(self, x):
    self.sow(nnx.Intermediate, "h", x)
    self.layers[0].sow(nnx.Intermediate, "g", 2 * x)
    return self.linear(x)


def popped(model):
  state = nnx.pop(model, nnx.Intermediate)
  return {path: float(v[...][0].sum()) for path, v in nnx.to_flat_state(state)}


def test_popping_in_each_step_gives_what_each_step_has_sown():
  model, step = Sower(), nnx.jit(lambda model, x: model(x).sum())
  for i in range(6):
    step(model, jnp.full(2, float(i)))
    assert popped(model) == {("h",): 2.0 * i, ("layers", 0, "g"): 4.0 * i}
    assert popped(model) == {}
  assert not hasattr(model, "h")


CHANGES = {
  "a mode": lambda m: m.eval(),
  "a number": lambda m: setattr(m, "n", 3),
  "an array": lambda m: setattr(m, "table", jnp.ones(2)),
  "a layer": lambda m: setattr(m, "more", nnx.Dict(k=nnx.Intermediate((jnp.ones(2),)))),
  "an item": lambda m: m.layers.append(nnx.Dict(k=nnx.Intermediate((jnp.ones(2),)))),
  "a moved layer": lambda m: m.layers.insert(0, m.layers.pop()),
  "another layer": lambda m: setattr(m, "linear", nnx.Dict(k=nnx.Intermediate((jnp.ones(2),)))),
  "a lost layer": lambda m: delattr(m, "linear"),
  "another type": lambda m: setattr(m, "linear", nnx.Intermediate((jnp.ones(2),))),
  "a shared one": lambda m: setattr(m, "again", getattr(m, "h", None) or nnx.Param(1.0)),
  "a dict": lambda m: vars(m).update(k=nnx.Intermediate((jnp.ones(2),))),
}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_popping_after_a_change_is_popping_from_a_model_that_was_never_popped(name, before):
  model, fresh = Sower(), Sower()
  for _ in range(4):
    model(jnp.ones(2))
    nnx.pop(model, nnx.Intermediate)
  for m in (model, fresh):
    if before:
      CHANGES[name](m)
    m.sow(nnx.Intermediate, "h", jnp.full(2, 3.0))
    m.layers[0].sow(nnx.Intermediate, "g", jnp.full(2, 4.0))
    if not before:
      CHANGES[name](m)
  assert popped(model) == popped(fresh)
  assert nnx.graphdef(model) == nnx.graphdef(fresh)
  assert popped(model) == {}
