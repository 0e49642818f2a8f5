"""List and Dict behave as the built-in ones, hold data and statics, and know when they change."""

import copy
import json
import operator
import pickle

import jax
import jax.numpy as jnp
import pytest

from refax import nnx
from refax.errors import ShapeMismatchError


class Node(nnx.Module):
  """An object with any attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


def param(x=1.0):
  return nnx.Param(jnp.full(2, x))


# what becomes a container
def test_builtin_containers_become_lists_and_dicts():
  m = Node(a=[1, 2], b={"k": 1}, c=(param(), 2), d=(1, 2), e=[], f={}, g=())
  kinds = {name: type(getattr(m, name)) for name in "abcdefg"}
  assert kinds == {"a": nnx.List, "b": nnx.Dict, "c": nnx.List, "d": tuple, "e": nnx.List,
                   "f": nnx.Dict, "g": tuple}  # fmt: skip


def test_nested_containers_are_converted_too():
  m = Node(a=[[param()], {"k": [param(), {"deep": param()}]}])
  assert isinstance(m.a[0], nnx.List) and isinstance(m.a[1]["k"][1], nnx.Dict)
  assert nnx.graphdef(m).paths == (
    ("a", 0, 0), ("a", 1, "k", 0), ("a", 1, "k", 1, "deep"),
  )  # fmt: skip


def test_the_original_is_left_alone():
  original = [param()]
  m = Node(a=original)
  m.a.append(3)
  assert len(original) == 1


def test_an_assigned_list_is_the_same_object():
  layers = nnx.List([param()])
  m = Node(a=layers, b=layers)
  assert m.a is layers and m.b is layers
  assert nnx.find_duplicates(m) == [[("a",), ("b",)]]


# List
OPERATIONS = {
  "append": lambda x: x.append(9),
  "extend": lambda x: x.extend([8, 9]),
  "iadd": lambda x: x.__iadd__([8]),
  "insert": lambda x: x.insert(1, 9),
  "insert end": lambda x: x.insert(99, 9),
  "insert negative": lambda x: x.insert(-1, 9),
  "set": lambda x: x.__setitem__(0, 9),
  "set negative": lambda x: x.__setitem__(-1, 9),
  "set slice": lambda x: x.__setitem__(slice(1, 3), [7, 8, 9]),
  "set step": lambda x: x.__setitem__(slice(None, None, 2), [7, 8]),
  "delete": lambda x: x.__delitem__(1),
  "delete slice": lambda x: x.__delitem__(slice(1, None)),
  "pop": lambda x: x.pop(),
  "pop first": lambda x: x.pop(0),
  "remove": lambda x: x.remove(3),
  "reverse": lambda x: x.reverse(),
  "clear": lambda x: x.clear(),
  "index": lambda x: x.index(3),
  "count": lambda x: x.count(3),
  "contains": lambda x: 3 in x,
  "len": lambda x: len(x),
  "get": lambda x: x[2],
  "get negative": lambda x: x[-1],
  "slice": lambda x: list(x[1:3]),
  "iter": lambda x: [i * 2 for i in x],
  "reversed": lambda x: list(reversed(x)),
  "add": lambda x: list(operator.add(x, [5])),
  "radd": lambda x: list(operator.add([5], x)),
  "equal": lambda x: (x == [1, 2, 3, 4], x == [1], x != [1]),
  "bool": lambda x: bool(x),
  "out of range": lambda x: x[9],
  "delete out of range": lambda x: x.__delitem__(9),
  "set out of range": lambda x: x.__setitem__(9, 1),
  "remove missing": lambda x: x.remove(99),
  "hash": lambda x: hash(x),
}


def outcome(operation, x):
  try:
    result = operation(x)
  except Exception as error:
    return type(error), list(x)
  return (list(result) if isinstance(result, nnx.List) else result), list(x)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_list_does_what_the_builtin_list_does(name):
  assert outcome(OPERATIONS[name], nnx.List([1, 2, 3, 4])) == outcome(
    OPERATIONS[name], [1, 2, 3, 4]
  )


def test_a_list_holds_data_and_statics():
  v, m = param(), Node(w=param())
  layers = nnx.List([v, nnx.relu, m, "text", None, 3, jnp.ones(1)])
  assert layers[0] is v and layers[1] is nnx.relu and layers[2] is m
  assert len(jax.tree.leaves(layers)) == 3
  twin = jax.tree.map(lambda x: x, layers)
  assert twin[1] is nnx.relu and list(twin)[3:6] == ["text", None, 3]
  assert jax.tree.structure(twin) == jax.tree.structure(layers)
  assert jax.tree.structure(nnx.List([1])) != jax.tree.structure(nnx.List([1.0]))
  assert jax.tree.structure(nnx.List([v])) != jax.tree.structure(nnx.Dict({0: v}))


def test_a_slice_of_a_list_shares_its_elements():
  layers = nnx.List([param(i) for i in range(4)])
  part = layers[1:3]
  assert isinstance(part, nnx.List) and part[0] is layers[1]
  part.append(1)
  assert len(layers) == 4


def test_an_array_assigned_to_an_element_writes_the_variable():
  v, w = param(), param()
  m = Node(l=[v, 3], d={"k": w})
  m.l[0] = jnp.full(2, 5.0)
  m.l[0] += 1
  m.d["k"] = m.d["k"] * 3
  m.d.k = m.d.k + 1
  assert m.l[0] is v and v[...].tolist() == [6.0, 6.0]
  assert m.d["k"] is w and w[...].tolist() == [4.0, 4.0]
  m.l[1] = jnp.ones(1)  # not a Variable: replaced
  assert m.l[1].tolist() == [1.0]
  with pytest.raises(ShapeMismatchError, match=r"at:  Node\.l\[0\]"):
    m.l[0] = jnp.ones(5)


def test_the_path_in_messages_follows_a_list_that_changes():
  m = Node(l=[param(), param(), param()])
  del m.l[0]
  m.l.insert(0, "static")
  m.l[2:] = [param()]
  for i in (1, 2):
    with pytest.raises(ShapeMismatchError, match=rf"at:  Node\.l\[{i}\]"):
      m.l[i][...] = jnp.ones(5)


# Dict
DICT_OPERATIONS = {
  "set": lambda d: d.__setitem__("z", 9),
  "overwrite": lambda d: d.__setitem__("a", 9),
  "delete": lambda d: d.__delitem__("a"),
  "pop": lambda d: d.pop("a"),
  "pop default": lambda d: d.pop("zz", 5),
  "pop missing": lambda d: d.pop("zz"),
  "get": lambda d: (d.get("a"), d.get("zz"), d.get("zz", 3)),
  "missing": lambda d: d["zz"],
  "setdefault": lambda d: (d.setdefault("a", 5), d.setdefault("z", 6)),
  "update": lambda d: d.update({"a": 7, "y": 8}, z=9),
  "clear": lambda d: d.clear(),
  "keys": lambda d: list(d.keys()),
  "values": lambda d: list(d.values()),
  "items": lambda d: list(d.items()),
  "iter": lambda d: list(d),
  "len": lambda d: len(d),
  "contains": lambda d: ("a" in d, "zz" in d),
  "equal": lambda d: (d == {"b": 2, "a": 1, 3: "x"}, d == {}, d != {}),
  "hash": lambda d: hash(d),
}


@pytest.mark.parametrize("name", DICT_OPERATIONS)
def test_a_dict_does_what_the_builtin_dict_does(name):
  def outcome(d):
    try:
      result = DICT_OPERATIONS[name](d)
    except Exception as error:
      result = type(error)
    return result, list(d.items())

  items = {"b": 2, "a": 1, 3: "x"}
  assert outcome(nnx.Dict(items)) == outcome(dict(items))


def test_dicts_are_read_and_written_by_attribute():
  d = nnx.Dict({"a": 1}, b=2)
  d.c = param()
  assert (d.a, d["b"], d["c"] is d.c) == (1, 2, True)
  with pytest.raises(AttributeError, match=r"^Dict has no item 'zz'; it has \['a', 'b', 'c'\]$"):
    d.zz
  assert nnx.Dict([("a", 1)]) == {"a": 1}


def test_keys_of_several_types_have_an_order():
  d = nnx.Dict({"b": param(1), 2: param(2), "a": param(3), (1, 2): param(4), 1: param(5)})
  assert nnx.graphdef(d).paths == ((1,), (2,), ("a",), ("b",), ((1, 2),))
  twin = jax.tree.map(lambda x: x, d)
  assert {k: v.tolist() for k, v in twin.items()} == {k: v.tolist() for k, v in d.items()}


def test_the_order_of_insertion_is_no_structure():
  v = param()
  a, b = nnx.Dict({"a": 1, "b": v}), nnx.Dict({"b": v, "a": 1})
  assert jax.tree.structure(a) == jax.tree.structure(b) and a["b"] is b["b"]


# both
@pytest.mark.parametrize(
  "duplicate",
  [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), nnx.clone],
  ids=["deepcopy", "pickle", "clone"],
)
def test_copies_are_independent(duplicate):
  v = param()
  layers, table = nnx.List([v, [v], "x"]), nnx.Dict({"k": v, "d": {"e": v}, "x": 1})
  twin = duplicate(layers)
  assert twin[0] is twin[1][0]
  twin[1].append(3)
  twin[0][...] = 9.0
  twin = duplicate(table)
  assert twin["k"] is twin.d.e
  twin["new"] = 3
  twin.k[...] = 9.0
  assert v[...].tolist() == [1.0, 1.0] and len(layers[1]) == 1 and "new" not in table


@pytest.mark.parametrize("make", [lambda: nnx.List([1]), lambda: nnx.Dict(a=1)], ids=["l", "d"])
def test_a_shallow_copy_has_items_of_its_own(make):
  x = make()
  twin = copy.copy(x)
  twin.clear()
  assert len(x) == 1 and len(twin) == 0


def test_containers_print_their_elements():
  assert repr(nnx.List([1, "a"])) == "List([\n  1,\n  'a'\n])"
  assert repr(nnx.Dict(b=1, a="x")) == "Dict({\n  'a': 'x',\n  'b': 1\n})"
  assert repr(nnx.List()) == "List([])" and repr(nnx.Dict()) == "Dict({})"


def test_a_list_of_numbers_is_json_when_it_is_made_a_list():
  assert json.dumps(list(nnx.List([1, 2]))) == "[1, 2]"
  assert json.dumps(dict(nnx.Dict(a=1))) == '{"a": 1}'


def test_containers_change_inside_a_transform_that_made_them():
  @jax.jit
  def f(x):
    layers = nnx.List([nnx.Variable(x)])
    layers.append(nnx.Variable(x * 2))
    table = nnx.Dict(a=layers)
    table["b"] = layers[1]
    return sum(v[...] for v in table["a"]) + table.b

  assert float(f(1.0)) == 5.0
