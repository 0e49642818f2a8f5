"""Laws of structure, on random objects with sharing: taking apart and putting together."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refax import nnx
from refax.core.flatten import Walk

EXAMPLES = settings(
  max_examples=25,
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=list(HealthCheck),
)


class A(nnx.Module):
  """An object with any attributes."""


class B(nnx.Pytree):
  """Another sort of object with any attributes."""


KINDS = (nnx.Param, nnx.BatchStat, nnx.Cache)
NAMES = ("a", "b", "c")
STATICS = (0, 1, 1.0, True, None, "relu", (1, 2), (1.0, 2), jnp.tanh)
FILTERS = st.lists(
  st.sampled_from(
    [*KINDS, nnx.Variable, "t", nnx.PathContains("a"), nnx.Not(nnx.Param), (nnx.Cache, "t"), None]
  ),
  max_size=3,
).map(lambda filters: (*filters, ...))


# A recipe is a tuple that says how to build an object: so the same structure can be built twice,
# and two recipes are the same structure exactly when they are equal. Sharing is by a number: the
# first place builds the Variable or object, a later one refers to it.
@st.composite
def recipes(draw, storage=(True, False)):
  made = {"variable": 0, "object": 0}
  is_hijax = draw(st.sampled_from(storage))

  def variable():
    if made["variable"] and draw(st.integers(0, 3)) == 0:
      return ("same variable", draw(st.integers(0, made["variable"] - 1)))
    made["variable"] += 1
    return ("variable", draw(st.sampled_from(KINDS)), draw(st.sampled_from([None, "t"])), is_hijax)

  def entry(depth):
    sorts = ["variable", "variable", "variable", "static", "array"]
    sorts += ["object", "list", "dict"] * (depth > 0)
    sorts += ["same object"] * (made["object"] > 0)
    sort = draw(st.sampled_from(sorts))
    if sort == "variable":
      return variable()
    if sort == "static":
      return ("static", draw(st.integers(0, len(STATICS) - 1)))
    if sort == "array":
      return ("array",)
    if sort == "same object":
      return ("same object", draw(st.integers(0, made["object"] - 1)))
    if sort == "object":
      return node(depth - 1)
    children = tuple(entry(depth - 1) for _ in range(draw(st.integers(0, 2))))
    return (sort, children)

  def node(depth):
    cls = draw(st.sampled_from([A, B]))
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=3).map(sorted))
    entries = tuple((name, entry(depth)) for name in names)
    made["object"] += 1  # only afterwards: a cycle is built by hand in another test
    return ("object", cls, entries)

  return node(3)


def build(recipe, counter=None):
  """The object that a recipe describes; its values count up."""
  variables, objects, counter = [], [], counter or iter(range(1000))

  def value(recipe):
    sort = recipe[0]
    if sort == "variable":
      _, kind, tag, hijax = recipe
      metadata = {} if tag is None else {"tag": tag}
      variables.append(kind(jnp.full(2, float(next(counter))), is_hijax=hijax, **metadata))
      return variables[-1]
    if sort == "same variable":
      return variables[recipe[1]]
    if sort == "same object":
      return objects[recipe[1]]
    if sort == "static":
      return STATICS[recipe[1]]
    if sort == "array":
      return jnp.full(3, float(next(counter)))
    if sort == "list":
      return nnx.List([value(r) for r in recipe[1]])
    if sort == "dict":
      return nnx.Dict({NAMES[i]: value(r) for i, r in enumerate(recipe[1])})
    node = recipe[1]()
    for name, r in recipe[2]:
      setattr(node, name, value(r))
    objects.append(node)
    return node

  return value(recipe)


def leaves(x):
  return jax.tree.leaves(x, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def values(x):
  return [np.asarray(v[...] if isinstance(v, nnx.Variable) else v).tolist() for v in leaves(x)]


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  assert hash(nnx.graphdef(a)) == hash(nnx.graphdef(b))
  assert nnx.find_duplicates(a) == nnx.find_duplicates(b)
  assert values(a) == values(b)


def is_hijax(x):
  return [v.is_hijax for v in leaves(x) if isinstance(v, nnx.Variable)]


@EXAMPLES
@given(recipe=recipes(), filters=FILTERS)
def test_merge_of_split_is_the_object_on_the_same_cells(recipe, filters):
  m = build(recipe)
  graphdef, *states = nnx.split(m, *filters)
  twin = nnx.merge(graphdef, *states[::-1])
  assert_same(twin, m)
  assert is_hijax(twin) == is_hijax(m)
  for a, b in zip(leaves(twin), leaves(m), strict=True):
    if isinstance(a, nnx.Variable):
      assert type(a) is type(b) and a.get_metadata() == b.get_metadata()
      assert a.get_raw_value() is b.get_raw_value()
      a[...] = a + 1
      assert bool((a == b).all()) is a.is_hijax
  for state, f in zip(states, filters, strict=True):
    assert len(nnx.to_flat_state(state)) == 0 or f is not None


@EXAMPLES
@given(recipe=recipes())
def test_storage_goes_there_and_back(recipe):
  m = build(recipe)
  hijax, lojax = nnx.to_hijax(m), nnx.to_lojax(m)
  assert all(is_hijax(hijax)) and not any(is_hijax(lojax))
  for twin in (hijax, lojax, nnx.to_lojax(hijax), nnx.to_hijax(lojax)):
    assert_same(twin, m)
  before = values(m)
  for twin in (hijax, lojax):
    for v in leaves(twin):
      if isinstance(v, nnx.Variable):
        v[...] = -1.0
  assert values(m) == before


@EXAMPLES
@given(recipe=recipes())
def test_a_map_of_the_identity_and_every_copy_are_the_same(recipe):
  m = build(recipe)
  flat, treedef = jax.tree.flatten(m)
  for twin in (
    jax.tree.map(lambda x: x, m),
    treedef.unflatten(flat),
    nnx.clone(m),
    nnx.clone(m, variables=False),
    copy.deepcopy(m),
    copy.copy(m),
    nnx.map(lambda path, leaf: leaf, m),
  ):
    assert_same(twin, m)


@EXAMPLES
@given(recipe=recipes())
def test_key_paths_are_those_of_the_graphdef_and_of_the_state(recipe):
  m = build(recipe)
  is_leaf = lambda leaf: isinstance(leaf, nnx.Variable)
  with_paths = jax.tree_util.tree_leaves_with_path(m, is_leaf=is_leaf)
  assert len(with_paths) == len(leaves(m))
  paths = nnx.graphdef(m).paths
  assert [str(p[0]) for p, _ in with_paths] == [
    "".join(f".{k}" if isinstance(k, str) else f"[{k}]" for k in path) for path in paths
  ]
  for path, (_, leaf) in zip(paths, with_paths, strict=True):
    value = m
    for key in path:
      value = getattr(value, key) if isinstance(value, A | B) else value[key]
    assert value is leaf
  assert sorted(nnx.to_flat_state(nnx.state(m)).paths, key=str) == sorted(paths, key=str)


@EXAMPLES
@given(first=recipes(storage=(True,)), second=recipes(storage=(True,)))
def test_structures_are_equal_exactly_when_they_are_built_alike(first, second):
  a, b, twin = build(first), build(second), build(first, iter(range(50, 1000)))
  assert jax.tree.structure(a) == jax.tree.structure(twin)
  assert hash(jax.tree.structure(a)) == hash(jax.tree.structure(twin))
  alike = first == second
  assert (jax.tree.structure(a) == jax.tree.structure(b)) is alike
  assert nnx.graphdef(a) == nnx.graphdef(twin)


@EXAMPLES
@given(recipe=recipes(storage=(True,)), data=st.data())
def test_a_changed_recipe_is_another_structure(recipe, data):
  """One entry is replaced by another static value: only then do structures differ."""
  a, b = build(recipe), build(recipe)
  i = data.draw(st.integers(0, len(STATICS) - 1))
  j = data.draw(st.integers(0, len(STATICS) - 1))
  a.extra, b.extra = STATICS[i], STATICS[j]
  assert (jax.tree.structure(a) == jax.tree.structure(b)) is (i == j)
  b.extra = STATICS[i]
  assert jax.tree.structure(a) == jax.tree.structure(b)


@EXAMPLES
@given(recipe=recipes(storage=(True,)))
def test_a_write_under_plain_jit_and_nnx_jit_reaches_every_variable_once(recipe):
  def add(m):
    for v in leaves(m):
      if isinstance(v, nnx.Variable):
        v[...] += 1

  m = build(recipe)
  before = [v[...].tolist() for v in leaves(m) if isinstance(v, nnx.Variable)]
  jax.jit(add)(m)
  nnx.jit(add)(m)
  after = [v[...].tolist() for v in leaves(m) if isinstance(v, nnx.Variable)]
  assert after == [[x + 2 for x in row] for row in before]


CHANGES = st.sampled_from(
  [
    "set",
    "delete",
    "append",
    "insert",
    "pop",
    "dict set",
    "dict delete",
    "replace",
    "share",
    "write",
  ]
)


@EXAMPLES
@given(recipe=recipes(), changes=st.lists(st.tuples(CHANGES, st.integers(0, 99)), max_size=8))
def test_a_cached_flattening_is_never_stale(recipe, changes):
  m = build(recipe)
  for name, n in changes:
    jax.tree.leaves(m)  # fill the caches
    parts = [
      value for _, value in nnx.iter_graph(m) if isinstance(value, A | B | nnx.List | nnx.Dict)
    ]
    for part in parts[::2]:
      jax.tree.leaves(part)
    change(name, parts[n % len(parts)], parts[(n // 7) % len(parts)])
    for part in [value for _, value in nnx.iter_graph(m) if isinstance(value, A | B | nnx.List)]:
      walk = Walk()  # has no cache
      fresh = walk.graphdef(walk.entry(part))
      assert nnx.graphdef(part) == fresh
      got = leaves(part)
      assert len(got) == len(walk.leaves)
      assert all(a is b for a, b in zip(got, walk.leaves, strict=True))


def change(name, part, other):
  """Change one object in one way, if it can be."""
  new = nnx.Param(jnp.zeros(2))
  if isinstance(part, nnx.List):
    if name in ("append", "set", "share"):
      part.append(other if name == "share" and other is not part else new)
    elif name == "insert":
      part.insert(0, new)
    elif name in ("pop", "delete") and len(part):
      part.pop()
    elif len(part):
      part[0] = new if name == "replace" else "static"
  elif isinstance(part, nnx.Dict):
    if name in ("dict set", "set", "share"):
      part["z"] = other if name == "share" else new
    elif name in ("dict delete", "delete") and len(part):
      del part[next(iter(part))]
    elif len(part):
      part[next(iter(part))] = "static"
  elif name == "delete" and part.__dict__:
    delattr(part, next(iter(part.__dict__)))
  elif name == "share":
    part.z = other
  elif name == "write":
    for v in part.__dict__.values():
      if isinstance(v, nnx.Variable):
        v[...] = 5.0
  else:
    setattr(part, "a" if name == "replace" else "z", new if name != "set" else name)
