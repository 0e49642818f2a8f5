"""Objects that are rebuilt are what they were, and share nothing that may change."""

import functools
import gc
import pickle
import weakref

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refax import nnx
from refax.core.flatten import Walk, flatten
from refax.core.node import Node, make_nodes
from refax.core.rebuild import Blueprint, unflatten


class Box(nnx.Module):
  pass


def first(x, *_):
  return x


STATIC = st.sampled_from([1, True, 1.0, "relu", None, (1, 2), len])
UNHASHABLE = st.sampled_from([[1], {"a": [2]}]).map(nnx.static)


@st.composite
def graphs(draw):
  """A Box of Boxes, Variables, arrays, containers and static values, some of them shared."""
  root = Box()
  pool = [root]
  for name in draw(st.lists(st.sampled_from("abcdefghijkl"), min_size=1, unique=True)):
    sort = draw(
      st.sampled_from(["shared", "box", "variable", "array", "static", "list", "partial"])
    )
    value = {
      "shared": lambda: draw(st.sampled_from(pool)),
      "box": Box,
      "variable": lambda: nnx.Variable(jnp.ones(2), is_hijax=draw(st.booleans())),
      "array": lambda: jnp.arange(3),
      "static": lambda: draw(st.one_of(STATIC, UNHASHABLE)),
      "list": lambda: [draw(st.sampled_from(pool)), draw(STATIC), {"d": jnp.ones(1)}],
      "partial": lambda: functools.partial(first, draw(st.sampled_from(pool))),
    }[sort]()
    parent = draw(st.sampled_from([x for x in pool if isinstance(x, Box)]))
    setattr(parent, name, value)
    if sort in ("box", "variable"):
      pool.append(value)
  return root


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_what_is_rebuilt_flattens_to_the_same(root):
  flat = flatten(root)
  twins = [unflatten(flat.graphdef, flat.leaves)[0] for _ in range(2)]  # by one blueprint
  for new in twins:
    walk = Walk()
    assert walk.graphdef(walk.entry(new)) == flat.graphdef
    assert all(a is b for a, b in zip(walk.leaves, flat.leaves, strict=True))
  objects = [{id(x) for _, x in nnx.iter_graph(x) if isinstance(x, Node)} for x in (root, *twins)]
  assert not objects[0] & objects[1] and not objects[1] & objects[2]


@settings(max_examples=50, deadline=None)
@given(graphs())
def test_each_object_that_is_rebuilt_lives_in_one_that_has_it(root):
  flat = flatten(root)
  new, objects = unflatten(flat.graphdef, flat.leaves)
  for node in objects:
    owner, key = node._pytree.home
    if owner is not None:
      assert any(k == key and x is node for k, x, _ in owner()._entries())
    else:
      assert node is new or not any(x is node for o in objects for _, x, _ in o._entries())


def test_a_variable_stays_where_it_lives_and_moves_when_that_is_gone():
  class Home(nnx.Module):
    def __init__(self):
      self.v = nnx.Variable(0)

  class Other(nnx.Module):
    def __init__(self, v):
      self.w = v

  home = Home()
  v, copy = home.v, nnx.clone(Other(home.v), variables=False)
  assert v._def.origin.path() == "Home.v" and copy.w is v
  del home
  gc.collect()
  copy = nnx.clone(copy, variables=False)
  assert v._def.origin.path() == "Other.w"


def test_values_without_a_hash_are_fresh_and_shared_as_they_were():
  sizes = nnx.static([1, 2])
  box = Box()
  box.a, box.b = Box(), Box()
  box.a.c = box.b.c = sizes.value
  flat = flatten(box)
  one, two = (unflatten(flat.graphdef, flat.leaves)[0] for _ in range(2))
  assert one.a.c == [1, 2] and one.a.c is not sizes.value and one.a.c is not two.a.c


def test_new_objects_are_built_beside_those_that_exist():
  box, variable = Box(), nnx.Variable(1)
  nodes = [None, (Box, (("a", (2, 0)), ("b", (1, 0)), ("c", (2, 2)))), (Box, ())]
  objects, value = Blueprint(nodes[1:], 1).build([variable], [box])
  assert objects[0] is box and objects[1].a is box and objects[1].b is variable
  assert objects[1].c is objects[2] and value((2, 1)) is objects[1] and value((1, 0)) is variable
  assert Blueprint([], 1).build([variable], [box])[0] == [box]


def test_nodes_that_are_made_together_are_like_any_other():
  made = make_nodes([Box, nnx.Linear, Box])
  assert [type(x) for x in made] == [Box, nnx.Linear, Box]
  one, _, other = made
  one.a = nnx.Variable(1)
  vars(other)["b"] = 2  # an assignment, as in any Module
  assert other.b == 2 and not hasattr(other, "a") and not hasattr(one, "b")
  assert one.a._def.origin.path() == "Box.a"
  ref = weakref.ref(one)
  del one, made
  assert ref() is None, "no cycle holds it"


def test_a_graphdef_that_has_built_something_is_pickled_without_its_blueprint():
  flat = flatten(nnx.List([Box(), Box()]))
  unflatten(flat.graphdef, flat.leaves)
  assert flat.graphdef.blueprint is not None
  new = pickle.loads(pickle.dumps(flat.graphdef))
  assert new == flat.graphdef and new.blueprint is None


@pytest.mark.parametrize("way", ["jit", "vmap", "scan", "tree.map"])
def test_what_a_transform_rebuilds_is_in_its_trace_and_what_comes_out_is_not(way):
  model = nnx.to_lojax(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))

  def f(model):
    model.kernel[...] = model.kernel[...] + 1
    model.more = 3
    return model

  stacked = jax.tree.map(lambda x: x[None], model)
  ways = {
    "jit": lambda: jax.jit(f)(model),
    "vmap": lambda: jax.vmap(f)(stacked),
    "scan": lambda: jax.lax.scan(lambda _, model: (0, f(model)), 0, stacked)[1],
    "tree.map": lambda: f(jax.tree.map(lambda x: x, model)),
  }
  new = ways[way]()
  new.more = 4
  new.kernel[...] = new.kernel[...] * 0
  assert new.more == 4 and not hasattr(model, "more") and model.kernel[...].any()
