"""find_duplicates, iter_graph, iter_modules, iter_children, map."""

import copy

import jax.numpy as jnp
import pytest

from refax import nnx


class Node(nnx.Module):
  """An object with any attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


class Plain(nnx.Pytree):
  """An object that is no Module."""


def param(x=1.0, **kwargs):
  return nnx.Param(jnp.full(2, x), **kwargs)


def model():
  v = param()
  plain = Plain()
  plain.v = v
  plain.m = Node(w=param())
  return Node(a=Node(w=v, n=3), l=[v, Node(), "relu"], d={"k": param()}, p=plain, x=jnp.ones(1))


# duplicates
def test_duplicates_are_the_paths_of_each_shared_thing():
  m = model()
  assert nnx.find_duplicates(m) == [[("a", "w"), ("l", 0), ("p", "v")]]
  m.again, m.l2 = m.a, m.l
  assert nnx.find_duplicates(m) == [
    [("a",), ("again",)],
    [("a", "w"), ("l", 0), ("p", "v")],
    [("l",), ("l2",)],
  ]
  assert nnx.find_duplicates(m, only=nnx.Variable) == [[("a", "w"), ("l", 0), ("p", "v")]]
  assert nnx.find_duplicates(m, only=nnx.PathContains("zz")) == []
  assert nnx.find_duplicates(Node(a=param(), b=param())) == []


def test_handles_on_one_cell_are_duplicates_and_equal_values_are_not():
  v = param()
  assert nnx.find_duplicates(Node(a=v, b=copy.copy(v))) == [[("a",), ("b",)]]
  assert nnx.find_duplicates([v, {"k": v}]) == [[(0,), (1, "k")]]
  lojax = nnx.to_lojax(v)
  assert nnx.find_duplicates(Node(a=lojax, b=copy.copy(lojax))) == []
  assert nnx.find_duplicates(Node(a=lojax, b=lojax)) == [[("a",), ("b",)]]
  x = jnp.ones(2)
  assert nnx.find_duplicates(Node(a=x, b=x)) == []


def test_a_cycle_is_a_duplicate():
  m = Node(w=param())
  m.me = m
  assert nnx.find_duplicates(m) == [[(), ("me",)]]


# iteration
def test_iter_graph_gives_everything_once_children_first():
  m = model()
  items = list(nnx.iter_graph(m))
  paths = [path for path, _ in items]
  assert paths == [
    ("a", "n"), ("a", "w"), ("a",), ("d", "k"), ("d",), ("l", 1), ("l", 2), ("l",),
    ("p", "m", "w"), ("p", "m"), ("p",), ("x",), (),
  ]  # fmt: skip
  values = dict(items)
  assert values[()] is m and values["a", "w"] is m.a.w and values["a", "n"] == 3
  m.me = m
  assert len(list(nnx.iter_graph(m))) == len(items)


def test_iter_modules_gives_modules_only():
  m = model()
  got = [(path, type(x).__name__) for path, x in nnx.iter_modules(m)]
  assert got == [
    (("a",), "Node"),
    (("d",), "Dict"),
    (("l", 1), "Node"),
    (("l",), "List"),
    (("p", "m"), "Node"),
    ((), "Node"),
  ]
  assert [p for p, _ in nnx.iter_modules([m.a, m.a])] == [(0,)]


def test_iter_children_gives_pytrees_and_variables():
  m = model()
  m.v = param()
  assert [key for key, _ in nnx.iter_children(m)] == ["a", "d", "l", "p", "v"]
  assert [key for key, _ in nnx.iter_children(m.l)] == [0, 1]
  assert dict(nnx.iter_children(m))["a"] is m.a


# map
def test_map_gives_paths_and_leaves_and_a_new_object():
  m = model()
  seen = {}
  shapes = nnx.map(lambda path, leaf: seen.setdefault(path, leaf).shape, m)
  assert list(seen) == [("a", "w"), ("d", "k"), ("p", "m", "w"), ("x",)]
  assert seen["a", "w"] is m.a.w
  assert shapes.a.w == shapes.l[0] == (2,) and shapes.x == (1,) and shapes.l[2] == "relu"
  frozen = nnx.map(lambda path, v: v.copy(v * 2) if isinstance(v, nnx.Variable) else v, m)
  assert frozen.a.w is frozen.l[0] is frozen.p.v
  assert frozen.a.w.tolist() == [2.0, 2.0] and m.a.w.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("hijax", [True, False])
def test_recursive_map_replaces_children_before_parents_in_a_copy(hijax):
  with nnx.use_hijax(hijax):
    model = nnx.Sequential(nnx.Linear(1, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5))
    seen = []

    def fn(path, x):
      seen.append(path)
      return nnx.Dropout(0.1) if isinstance(x, nnx.Dropout) else x

    new = nnx.recursive_map(fn, model)
    assert new.layers[1].rate == 0.1 and model.layers[1].rate == 0.5
    assert seen.index(("layers", 0, "kernel")) < seen.index(("layers", 0)) < seen.index(())
    new.layers[0].bias[...] = 7.0
    assert model.layers[0].bias[0] == 7.0


def test_recursive_map_goes_through_plain_containers_and_cycles():
  model = nnx.Dict(a=1)
  model["me"] = model
  assert nnx.recursive_map(lambda _, x: x + 1 if x == 1 else x, model)["a"] == 2
  tree = {"b": [nnx.Param(1.0), 2]}
  new = nnx.recursive_map(lambda _, x: 3 if isinstance(x, int) else x, tree)
  assert new["b"][1] == 3 and new["b"][0].value == 1.0


def test_set_metadata_is_that_of_the_variables_that_match():
  model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
  nnx.set_metadata(model, only=nnx.BatchStat, frozen=True)
  assert model.mean.frozen and not model.scale.has_metadata("frozen")
