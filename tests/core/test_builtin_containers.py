"""List and Dict behave as Python's own, whatever they hold."""

import copy
import operator
import random

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refax import nnx


def elements():
  """Two Variables, two arrays, a Module and two static values."""
  return [
    nnx.Param(1.0),
    jnp.array(2.0),
    nnx.Param(3.0),
    jnp.array(4.0),
    nnx.Linear(1, 1, rngs=nnx.Rngs(0)),
    np.ones(2),
    jnp.tanh,
  ]


def assert_same_elements(got, want):
  assert len(got) == len(want)
  for a, b in zip(got, want, strict=True):
    assert a is b


def assert_values_are_kept(items):
  """The Variables that are still there hold what they were made with."""
  assert {float(x[...]) for x in items if isinstance(x, nnx.Param)} <= {1.0, 3.0}


def swap(x, i, j):
  x[i], x[j] = x[j], x[i]


def rotate(x, i, j):
  k = (i + j) % len(x)
  if len({i, j, k}) == 3:
    x[i], x[j], x[k] = x[k], x[i], x[j]


MOVES = {
  "reverse": lambda x, i, j: x.reverse(),
  "swap": swap,
  "rotate": rotate,
  "shuffle": lambda x, i, j: random.Random(i * 31 + j).shuffle(x),
  "pop and insert": lambda x, i, j: x.insert(j, x.pop(i)),
  "slice": lambda x, i, j: x.__setitem__(slice(None), x[i:] + x[:i]),
  "sort": lambda x, i, j: x.sort(key=lambda e: type(e).__name__),
  "remove": lambda x, i, j: x.append(x.pop(i)),
}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(MOVES)), st.integers(0, 6), st.integers(0, 6))))
def test_elements_that_move_are_moved_and_not_written(moves):
  plain = elements()
  kept = nnx.List(plain)
  for name, i, j in moves:
    MOVES[name](kept, i, j)
    MOVES[name](plain, i, j)
    assert_same_elements(list(kept), plain)
  assert_values_are_kept(plain)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6))))
def test_items_of_a_dict_that_move_are_moved_and_not_written(moves):
  plain = dict(enumerate(elements()))
  kept = nnx.Dict(plain)
  for i, j in moves:
    for x in (plain, kept):
      x[i], x[j] = x[j], x[i]
  assert_same_elements(list(kept.values()), list(plain.values()))
  assert_values_are_kept(plain.values())


def test_an_array_in_the_place_of_a_variable_is_its_new_value():
  w = nnx.Param(1.0)
  items, d = nnx.List([w, 2]), nnx.Dict(a=w)
  items[0] = jnp.array(5.0)
  assert items[0] is w and float(w) == 5.0
  d["a"] = 6.0
  assert d["a"] is w and float(w) == 6.0
  d.a = d.a + 1
  items[0] += 1
  assert items[0] is w and float(w) == 8.0


NUMBERS = [3, 1, 2]

LIST_OPERATIONS = {
  "copy": lambda x: x.copy(),
  "copy.copy": copy.copy,
  "times": lambda x: x * 2,
  "from the left": lambda x: 2 * x,
  "in place": lambda x: operator.imul(x, 2),
  "nothing": lambda x: x * 0,
  "sort": lambda x: (x.sort(), x)[1],
  "sort down": lambda x: (x.sort(reverse=True), x)[1],
  "sort by": lambda x: (x.sort(key=lambda n: -n), x)[1],
  "reverse": lambda x: (x.reverse(), x)[1],
  "reversed": lambda x: list(reversed(x)),
  "extend": lambda x: (x.extend([7, 8]), x)[1],
  "add": lambda x: operator.add(x, [7]),
  "radd": lambda x: operator.add([7], x),
  "iadd": lambda x: operator.iadd(x, [7]),
  "count": lambda x: x.count(1),
  "index": lambda x: x.index(2),
  "in": lambda x: 1 in x and 9 not in x,
  "less": lambda x: (x < [4], x <= NUMBERS, x > [1], x >= [9]),
  "slices": lambda x: (list(x[1:]), list(x[::-1]), x[-1]),
  "del slice": lambda x: (operator.delitem(x, slice(0, 2)), x)[1],
  "set slice": lambda x: (operator.setitem(x, slice(0, 1), [5, 6]), x)[1],
  "clear": lambda x: (x.clear(), x)[1],
  "pop": lambda x: (x.pop(), x.pop(0), x),
  "insert": lambda x: (x.insert(1, 9), x)[1],
  "insert at the end": lambda x: (x.insert(99, 9), x)[1],
  "remove": lambda x: (x.remove(1), x)[1],
  "len": len,
  "bool": bool,
}

DICT_OPERATIONS = {
  "copy": lambda x: x.copy(),
  "copy.copy": copy.copy,
  "or": lambda x: x | {"z": 9, "a": 0},
  "ror": lambda x: {"z": 9, "a": 0} | x,
  "ior": lambda x: operator.ior(x, {"z": 9}),
  "ior of pairs": lambda x: operator.ior(x, [("z", 9)]),
  "update": lambda x: (x.update(b=5), x)[1],
  "pop": lambda x: (x.pop("a"), x.pop("zz", None), x),
  "popitem": lambda x: x.popitem()[0] in ("a", "b", "c"),
  "setdefault": lambda x: (x.setdefault("a", 7), x.setdefault("q", 7), x),
  "get": lambda x: (x.get("a"), x.get("zz"), x.get("zz", 1)),
  "keys": lambda x: list(x.keys()),
  "values": lambda x: list(x.values()),
  "items": lambda x: list(x.items()),
  "reversed": lambda x: list(reversed(x)),
  "fromkeys": lambda x: dict(type(x).fromkeys(["p", "q"], 1)),
  "in": lambda x: "a" in x and "zz" not in x,
  "del": lambda x: (operator.delitem(x, "a"), x)[1],
  "clear": lambda x: (x.clear(), x)[1],
  "len": len,
}


def plain(x):
  if isinstance(x, nnx.List):
    return [plain(v) for v in x]
  if isinstance(x, nnx.Dict):
    return {k: plain(v) for k, v in x.items()}
  return tuple(map(plain, x)) if isinstance(x, tuple) else x


@pytest.mark.parametrize("name", LIST_OPERATIONS)
def test_a_list_is_like_pythons(name):
  want, got = LIST_OPERATIONS[name](list(NUMBERS)), LIST_OPERATIONS[name](nnx.List(NUMBERS))
  assert plain(got) == want
  if isinstance(want, list) and not name.startswith("reversed"):
    assert isinstance(got, nnx.List)


@pytest.mark.parametrize("name", DICT_OPERATIONS)
def test_a_dict_is_like_pythons(name):
  items = {"b": 1, "a": 2, "c": 3}
  want, got = DICT_OPERATIONS[name](dict(items)), DICT_OPERATIONS[name](nnx.Dict(items))
  assert plain(got) == want
  if isinstance(want, dict) and name != "fromkeys":
    assert isinstance(got, nnx.Dict)


def test_an_item_is_deleted_as_an_attribute():
  d = nnx.Dict(a=nnx.Param(1.0), b=2)
  del d.a
  assert list(d) == ["b"]
  with pytest.raises(AttributeError, match="no item 'a'"):
    del d.a


@pytest.mark.parametrize(
  "make", [lambda: nnx.List([1, nnx.Param(1.0)]), lambda: nnx.Dict(a=1, b=nnx.Param(1.0))]
)
def test_a_copy_is_another_container_with_the_same_elements(make):
  first = make()
  second = first.copy()
  key = 0 if isinstance(first, nnx.List) else "a"
  second[key] = 5
  assert first[key] == 1
  last = 1 if isinstance(first, nnx.List) else "b"
  assert second[last] is first[last]
