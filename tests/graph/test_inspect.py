"""find_duplicates, iter_graph, iter_modules, iter_children, map."""

import copy

import jax.numpy as jnp

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
