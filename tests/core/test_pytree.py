"""Pytree: what is data and what is static, what JAX may put in, and when a flattening is stale."""

import copy
import dataclasses
import functools
import pickle

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.core.epoch import epoch
from refax.core.flatten import flatten
from refax.errors import StaticAttributeError, TraceContextError


class Node(nnx.Module):
  """An object with any attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


ABSOLUTE = abs


@dataclasses.dataclass
class Config:
  """A configuration as most programs have one: equal by value, and without a hash."""

  def __repr__(self):
    return "Config()"


class Unhashable:
  """A value that is no data and has no hash."""

  __hash__ = None

  def __repr__(self):
    return "Unhashable()"


def param(x=1.0):
  return nnx.Param(jnp.full(2, x))


# data and static
DATA = {
  "variable": param,
  "jax array": lambda: jnp.ones(2),
  "numpy array": lambda: np.ones(2, np.float32),
  "key": lambda: jax.random.key(0),
  "module": lambda: Node(w=param()),
  "struct": lambda: jax.ShapeDtypeStruct((2,), jnp.float32),
  "state": lambda: nnx.State({"a": jnp.ones(1)}),
  "list": lambda: [param()],
  "tuple": lambda: (jnp.ones(1), 3),
  "dict": lambda: {"a": {"b": param()}},
  "rngs": lambda: nnx.Rngs(0),
  "marked": lambda: nnx.data({"a": 1.0}),
}
STATIC = {
  "int": 3, "float": 0.5, "bool": True, "none": None, "str": "relu", "function": jnp.tanh,
  "dtype": jnp.dtype("float32"), "type": jnp.float32, "tuple": (1, "a"),
  "enum": jax.lax.Precision.HIGH,
  "marked": nnx.static((1, 2)), "numpy scalar": np.float32(2),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_data_has_leaves(name):
  value = DATA[name]()
  assert nnx.is_data(value)
  assert len(jax.tree.leaves(Node(x=value))) >= 1


@pytest.mark.parametrize("name", STATIC)
def test_a_static_attribute_is_structure_and_kept_as_it_is(name):
  value = STATIC[name]
  assert not nnx.is_data(value)
  node = Node(x=value)
  assert jax.tree.leaves(node) == []
  twin = jax.tree.map(lambda x: x, node)
  assert twin.x is node.x
  assert not hasattr(node.x, "dynamic")


def test_what_is_neither_data_nor_hashable_nor_comparable_is_refused():
  node = Node(x=1)
  with pytest.raises(StaticAttributeError) as error:
    node.x = bytearray(b"x")
  assert error.value.args[0] == (
    "a static attribute is part of what jax.jit compiles for: it is hashed, or compared by what is "
    "in it\n"
    "  at:  Node.x\n"
    "  got: bytearray (bytearray(b'x')), with a part that can be neither: bytearray\n"
    "  fix: keep state (arrays, Variables, Modules) in attributes of their own, or wrap a pytree "
    "of arrays in nnx.data; give a class of your own __hash__ and __eq__"
  )
  assert node.x == 1


def test_an_element_that_is_neither_data_nor_comparable_is_refused():
  with pytest.raises(StaticAttributeError, match=r"at:  List\[1\]\n  got: bytearray"):
    Node(x=[1, bytearray()])
  with pytest.raises(StaticAttributeError, match=r"at:  Dict\.a\n  got: bytearray"):
    Node(x={"a": bytearray()})


def test_an_attribute_may_turn_from_static_to_data_and_back():
  node = Node(x=3)
  assert jax.tree.leaves(node) == []
  node.x = jnp.ones(2)
  assert len(jax.tree.leaves(node)) == 1
  node.x = "text"
  assert jax.tree.leaves(node) == [] and node.x == "text"


def test_marked_data_stays_a_builtin_and_its_numbers_are_leaves():
  node = Node(x=nnx.data({"a": 1.0, "b": [2, None]}))
  assert type(node.x) is dict and jax.tree.leaves(node) == [1.0, 2]


def test_a_property_with_a_setter_is_called():
  class Scaled(nnx.Module):
    def __init__(self):
      self.w = param()

    @property
    def scale(self):
      return self.w * 2

    @scale.setter
    def scale(self, value):
      self.w = value / 2

  m = Scaled()
  m.scale = jnp.full(2, 6.0)
  assert m.w[...].tolist() == [3.0, 3.0] and isinstance(m.w, nnx.Param)
  assert len(jax.tree.leaves(m)) == 1


def test_a_dataclass_is_a_module():
  @dataclasses.dataclass
  class Point(nnx.Module):
    x: nnx.Param
    n: int = 3

  p = Point(param())
  assert jax.tree.map(lambda v: v, p).n == 3
  jax.jit(lambda p: p.x.set_value(5))(p)
  assert p.x[...].tolist() == [5.0, 5.0]


# what JAX does with pytrees
def test_a_map_of_the_identity_gives_an_equal_object_on_the_same_cells():
  m = Node(w=param(), inner=[Node(v=param())], n=3)
  twin = jax.tree.map(lambda x: x, m)
  assert twin is not m and twin.inner[0] is not m.inner[0]
  assert twin.w.get_raw_value() is m.w.get_raw_value()
  twin.inner[0].v[...] = 9
  assert m.inner[0].v[...].tolist() == [9.0, 9.0]
  assert jax.tree.structure(twin) == jax.tree.structure(m)


@pytest.mark.parametrize(
  "leaf",
  [None, 0, 1.5, "x", object(), jax.ShapeDtypeStruct((2,), jnp.float32)],
  ids=lambda leaf: type(leaf).__name__,
)
def test_any_leaf_may_be_put_in(leaf):
  m = Node(w=param(), x=jnp.ones(2), inner=[param()])
  twin = jax.tree.map(lambda _: leaf, m)
  assert twin.w.get_raw_value() is leaf and twin.x is leaf
  assert isinstance(repr(twin), str)
  is_leaf = lambda x: x is leaf
  assert jax.tree.structure(twin, is_leaf=is_leaf) == jax.tree.structure(m)
  assert jax.tree.map(lambda x: x, twin, is_leaf=is_leaf).inner[0].get_raw_value() is leaf


@pytest.mark.parametrize("subtree", [(), {"a": 1}, [1, 2], nnx.State({"a": 1})], ids=repr)
def test_a_map_may_give_subtrees(subtree):
  m = Node(w=param(), x=jnp.ones(2))
  twin = jax.tree.map(lambda _: subtree, m)
  assert twin.w.get_raw_value() is subtree and twin.x is subtree
  assert jax.tree.leaves(twin) == 2 * jax.tree.leaves(subtree)
  assert jax.tree.map(lambda x: x, twin).x == subtree


def test_variables_are_leaves_on_demand():
  m = Node(w=param(), inner=[param()], n=1)
  is_variable = lambda x: isinstance(x, nnx.Variable)
  leaves = jax.tree.leaves(m, is_leaf=is_variable)
  assert leaves[0] is m.inner[0] and leaves[1] is m.w
  shapes = jax.tree.map(lambda v: v.shape, m, is_leaf=is_variable)
  assert shapes.w == (2,) and shapes.inner[0] == (2,)


def test_a_module_of_ints_is_a_prefix_for_in_axes():
  m = Node(w=nnx.Param(jnp.arange(6.0).reshape(3, 2)), b=nnx.Param(jnp.ones(2)))
  m = nnx.to_lojax(m)
  axes = jax.tree.map(lambda x: 0 if x.shape[0] == 3 else None, m)
  got = jax.vmap(lambda m: m.w.sum() + m.b.sum(), in_axes=(axes,))(m)
  assert got.tolist() == [3.0, 7.0, 11.0]
  assert jax.vmap(lambda m: m.w.sum(), in_axes=1)(Node(w=m.w)).tolist() == [6.0, 9.0]


def test_an_abstract_model_has_shapes_and_no_memory():
  abstract = jax.eval_shape(lambda: nnx.to_lojax(Node(w=param(), n=2)))
  assert isinstance(abstract.w.get_raw_value(), jax.ShapeDtypeStruct)
  assert abstract.w.shape == (2,) and abstract.n == 2
  assert "ShapeDtypeStruct" in repr(abstract)


def test_a_lojax_model_goes_through_every_functional_transform():
  m = nnx.to_lojax(Node(w=nnx.Param(jnp.ones((3, 2))), n=2))
  assert jax.vmap(lambda m: m.w.sum() * m.n)(m).tolist() == [4.0] * 3
  assert jax.grad(lambda m: m.w.sum() * m.n)(m).w[...].tolist() == [[2.0, 2.0]] * 3
  out, _ = jax.lax.scan(lambda c, m: (c + m.w.sum(), None), 0.0, m)
  assert float(out) == 6.0
  twin = jax.jit(lambda m: jax.tree.map(lambda x: x + 1, m))(m)
  assert twin.w[...].tolist() == [[2.0, 2.0]] * 3 and twin.n == 2
  assert isinstance(jax.device_put(m).w, nnx.Param)
  assert jax.block_until_ready(m).n == 2


# copies
@pytest.mark.parametrize(
  "duplicate",
  [
    copy.deepcopy,
    lambda m: pickle.loads(pickle.dumps(m)),
    lambda m: cloudpickle.loads(cloudpickle.dumps(m)),
  ],
  ids=["deepcopy", "pickle", "cloudpickle"],
)
def test_a_deep_copy_keeps_statics_containers_and_arrays(duplicate):
  f = ABSOLUTE
  m = Node(w=param(), x=jnp.ones(2), n=3, f=f, layers=[param(), "relu"], d={"k": param()})
  flatten(m)
  twin = duplicate(m)
  assert (twin.n, twin.f, twin.layers[1]) == (3, f, "relu")
  assert nnx.graphdef(twin) == nnx.graphdef(m)
  twin.layers.append(param())
  twin.d["new"] = param()
  twin.w[...] = 0
  assert len(m.layers) == 2 and list(m.d) == ["k"] and m.w[...].tolist() == [1.0, 1.0]
  assert len(jax.tree.leaves(twin)) == len(jax.tree.leaves(m)) + 2


def test_a_deep_copy_keeps_static_objects_so_that_its_structure_is_the_same():
  """JAX's jitted functions and partials are copied into other ones by `copy.deepcopy`."""
  m = Node(f=jnp.tanh, g=functools.partial(jnp.add, 1), h=jax.nn.relu, w=param())
  m.layers, m.table = [jnp.tanh, m], {"f": jnp.tanh, "w": m.w}
  twin = copy.deepcopy(m)
  assert twin.f is m.f and twin.g is m.g and twin.h is m.h
  assert twin.layers[0] is jnp.tanh and twin.layers[1] is twin and twin.table["w"] is twin.w
  assert jax.tree.structure(twin) == jax.tree.structure(m)
  mean = jax.tree.map(lambda a, b: (a[...] + b[...]) / 2, m, twin)
  assert mean.w[...].tolist() == [1.0, 1.0]


def test_cloudpickle_takes_a_class_defined_in_a_function():
  class Local(nnx.Module):
    def __init__(self):
      self.w = param()
      self.f = lambda x: x + 1

  twin = cloudpickle.loads(cloudpickle.dumps(Local()))
  assert twin.f(1) == 2 and twin.w[...].tolist() == [1.0, 1.0]


def test_a_shallow_copy_has_attributes_of_its_own_and_shares_the_cells():
  m = Node(w=param(), n=3)
  jax.tree.leaves(m)
  twin = copy.copy(m)
  twin.n = 4
  twin.extra = param()
  assert m.n == 3 and not hasattr(m, "extra")
  assert len(jax.tree.leaves(m)) == 1 and len(jax.tree.leaves(twin)) == 2
  twin.w[...] = 5
  assert m.w[...].tolist() == [5.0, 5.0]


@pytest.mark.parametrize(
  ("first", "values"),
  [(3, [3, 4, "a", True, 5]), ([1.0, 2.0], [[3.0], [4.0, 5.0, 6.0]]), ((1,), [(2, 3), 4])],
)
def test_an_attribute_that_was_marked_as_data_stays_data(first, values):
  m = Node(w=param(), n=nnx.data(first))
  for value in values:
    m.n = value
    assert type(m.n) is type(value)
    assert jax.tree.leaves(m)[:-1] == jax.tree.leaves(value)
  twin = nnx.clone(m)
  twin.n = 7
  assert jax.tree.leaves(twin)[0] == 7
  m.n = nnx.static(7)
  assert len(jax.tree.leaves(m)) == 1
  m.n = 8
  assert len(jax.tree.leaves(m)) == 1 and m.n == 8


def test_a_mark_goes_with_the_attribute_and_with_a_value_that_is_data_by_itself():
  m = Node(w=param(), n=nnx.data(3))
  del m.n
  m.n = 4
  assert len(jax.tree.leaves(m)) == 1
  m.x = jnp.ones(2)
  m.x = 3  # nobody has marked it
  assert len(jax.tree.leaves(m)) == 1


def test_a_number_that_is_marked_as_data_is_not_compiled_for():
  m, traces = Node(w=param(), n=nnx.data(1)), []
  f = nnx.jit(lambda m: traces.append(None) or m.w * m.n)
  for n in (2, 3, 4):
    m.n = n
    assert f(m).tolist() == (m.w * n).tolist()
  assert len(traces) == 1


@pytest.mark.parametrize("value", ["a", 1, None])
def test_an_attribute_of_an_object_from_outside_a_trace_is_not_set_in_it_to_the_same_either(value):
  m = Node(w=param())
  m.mode = value
  with pytest.raises(TraceContextError, match="mode"):
    jax.jit(lambda: setattr(m, "mode", value))()
  m.mode = value


# the structure epoch
def model():
  shared = Node(w=param(), n=1)
  return Node(
    w=param(),
    n=1,
    x=jnp.ones(2),
    layers=[Node(w=param(), n=1), param(), [param()]],
    table={"k": param(), "deep": {"k": Node(w=param(), n=1)}},
    first=Node(shared=shared),
    second=Node(shared=shared),
    state=nnx.State({"a": {"b": param()}}),
    plain=nnx.data((param(), Node(n=1))),
    mutable=nnx.data({"k": param(), "l": [param()]}),
  )


def replace_variable(m):
  m.w = nnx.Param(jnp.ones(7))


CHANGES = {
  "static set": lambda m: setattr(m, "n", 2),
  "static type": lambda m: setattr(m, "n", 1.0),
  "static added": lambda m: setattr(m, "new", 2),
  "variable added": lambda m: setattr(m, "new", param()),
  "variable replaced": replace_variable,
  "variable to static": lambda m: setattr(m, "w", "text"),
  "variable deleted": lambda m: delattr(m, "w"),
  "static deleted": lambda m: delattr(m, "n"),
  "array replaced": lambda m: setattr(m, "x", jnp.ones(5)),
  "array deleted": lambda m: delattr(m, "x"),
  "list append": lambda m: m.layers.append(param()),
  "list append static": lambda m: m.layers.append("relu"),
  "list insert": lambda m: m.layers.insert(0, param()),
  "list extend": lambda m: m.layers.extend([param(), param()]),
  "list iadd": lambda m: m.layers.__iadd__([param()]),
  "list delete": lambda m: m.layers.__delitem__(0),
  "list delete slice": lambda m: m.layers.__delitem__(slice(0, 2)),
  "list pop": lambda m: m.layers.pop(),
  "list remove": lambda m: m.layers.remove(m.layers[0]),
  "list clear": lambda m: m.layers.clear(),
  "list reverse": lambda m: m.layers.reverse(),
  "list set": lambda m: m.layers.__setitem__(0, "text"),
  "list set slice": lambda m: m.layers.__setitem__(slice(0, 2), [param()]),
  "list in list": lambda m: m.layers[2].append(param()),
  "list element": lambda m: setattr(m.layers[0], "n", 5),
  "dict set": lambda m: m.table.__setitem__("new", param()),
  "dict attribute": lambda m: setattr(m.table, "new", param()),
  "dict replace": lambda m: m.table.__setitem__("k", "text"),
  "dict delete": lambda m: m.table.__delitem__("k"),
  "dict pop": lambda m: m.table.pop("k"),
  "dict update": lambda m: m.table.update(a=param(), b=1),
  "dict clear": lambda m: m.table.clear(),
  "dict setdefault": lambda m: m.table.setdefault("new", 3),
  "deep": lambda m: setattr(m.table["deep"]["k"], "n", 5),
  "shared by the first": lambda m: setattr(m.first.shared, "n", 5),
  "shared by the second": lambda m: setattr(m.second.shared, "new", param()),
  "unshared": lambda m: setattr(m.second, "shared", Node(w=param(), n=1)),
  "shared variable": lambda m: setattr(m.second.shared, "w", m.w),
  "state set": lambda m: m.state.__setitem__("new", param()),
  "state nested": lambda m: m.state["a"].__setitem__("new", param()),
  "state delete": lambda m: m.state["a"].__delitem__("b"),
  "state attribute": lambda m: setattr(m.state, "new", param()),
  "in a tuple": lambda m: setattr(m.plain[1], "n", 5),
  "plain dict": lambda m: m.mutable.__setitem__("new", param()),
  "plain list": lambda m: m.mutable["l"].append(param()),
  "metadata": lambda m: m.w.set_metadata(tag="x"),
  "set_attributes": lambda m: m.set_attributes(n=9),
  "sow": lambda m: m.first.sow(nnx.Intermediate, "h", jnp.ones(1)),
  "perturb": lambda m: m.first.perturb("p", jnp.ones(1)),
  "pop": lambda m: nnx.pop(m, nnx.All(nnx.Param, nnx.Not(nnx.PathContains("plain")))),
  "update": lambda m: nnx.update(m, {"first": {"new": param()}}),
  "nnx.jit": lambda m: nnx.jit(lambda m: setattr(m.first.shared, "n", 5))(m),
  "raw value": lambda m: m.w.set_raw_value(m.first.shared.w.get_raw_value()),
}


@pytest.mark.parametrize(
  ("name", "mutable"), [(n, p) for n in CHANGES for p in (True, False) if p or n[:5] != "plain"]
)
def test_a_structural_change_is_seen_by_the_next_flattening(name, mutable):
  m = model()
  if not mutable:  # then the whole is cached; the changes are seen by the epoch
    del m.mutable
  before, leaves = jax.tree.structure(m), len(jax.tree.leaves(m))
  flatten(m.first), flatten(m.layers)  # parts have caches of their own
  CHANGES[name](m)
  after, copied = jax.tree.structure(m), jax.tree.structure(copy.copy(m))
  assert after == copied
  assert after != before or name in ("array replaced", "variable replaced")
  fresh = jax.tree.leaves(copy.copy(m))
  assert len(jax.tree.leaves(m)) == len(fresh)
  assert all(a is b for a, b in zip(jax.tree.leaves(m), fresh, strict=True))
  for part in (m.first, m.layers, m.table):
    assert jax.tree.structure(part) == jax.tree.structure(copy.copy(part))
  assert leaves > 0


def cached():
  m = model()
  del m.mutable
  flat = flatten(m)
  assert flatten(m) is flat
  return m, flat


QUIET = {
  "write": lambda m: m.w.set_value(3.0),
  "in place": lambda m: m.layers[1].__iadd__(1),
  "indexed": lambda m: m.table["k"].__setitem__(0, 5.0),
  "through the attribute": lambda m: setattr(m, "w", jnp.zeros(2)),
  "through the list": lambda m: m.layers.__setitem__(1, jnp.zeros(2)),
  "through the dict": lambda m: m.table.__setitem__("k", jnp.zeros(2)),
  "the same static": lambda m: setattr(m, "n", 1),
  "the same object": lambda m: setattr(m, "first", m.first),
  "the same element": lambda m: m.layers.__setitem__(0, m.layers[0]),
  "train": lambda m: m.train(),
  "plain jit": lambda m: jax.jit(lambda m: m.w.set_value(m.w * 2))(m),
  "nnx.jit": lambda m: nnx.jit(lambda m: m.w.set_value(m.w * 2))(m),
  "nnx.grad": lambda m: nnx.grad(lambda m: m.w.sum())(m),
  "a new object": lambda m: Node(a=param(), l=[param()], child=m.first).__delattr__("l"),
  "a copy": lambda m: setattr(nnx.clone(m), "n", 4),
  "a mapped copy": lambda m: setattr(jax.tree.map(lambda x: x, m), "n", 4),
  "split and merge": lambda m: nnx.merge(*nnx.split(m, nnx.Param, ...)),
  "a state": lambda m: nnx.state(m).__setitem__("new", 3),
  "a new Rngs": lambda m: nnx.Rngs(0)().shape,
  "read": lambda m: (repr(m), m.w + 1, nnx.find_duplicates(m), list(nnx.iter_graph(m))),
  "update": lambda m: nnx.update(m, nnx.state(m)),
  "lojax copy": lambda m: nnx.to_lojax(m).w.set_value(2.0),
}


@pytest.mark.parametrize("name", QUIET)
def test_no_write_and_no_new_object_makes_a_cached_flattening_stale(name):
  m, flat = cached()
  now = epoch.value
  QUIET[name](m)
  assert epoch.value == now
  assert flatten(m) is flat


def test_a_change_to_an_object_that_no_cache_depends_on_keeps_the_caches():
  m, flat = cached()
  other = Node(w=param(), l=[param()])
  other.l.append(3)
  other.n = 5
  del other.w
  assert flatten(m) is flat


def test_an_object_that_left_a_model_and_came_back_is_seen():
  m = model()
  first = m.first
  jax.tree.leaves(m)
  m.first = None
  jax.tree.leaves(m)
  first.shared.extra = param()
  m.first = first
  jax.tree.leaves(m)
  first.shared.more = param()
  assert jax.tree.structure(m) == jax.tree.structure(copy.copy(m))


def test_an_object_made_inside_a_transform_may_change_there_and_one_from_outside_may_not():
  m = Node(n=1, layers=[param()], d={"k": 1})

  @jax.jit
  def change(how):
    inner = Node(n=1)
    inner.n = 2
    inner.layers = [param()]
    inner.layers.append(3)
    [lambda: setattr(m, "n", 2), lambda: m.layers.append(1), lambda: m.d.update(k=2),
     lambda: delattr(m, "n")][how.shape[0]]()  # fmt: skip

  fix = (
    "  got: an attribute set from another trace than the one where the object was made\n"
    "  fix: keep what changes in a Variable and write that (self.count[...] = x), or pass the "
    "object as an argument, by a transform of Refax (nnx.jit, nnx.grad, nnx.scan, ...)"
  )
  for how, at in enumerate(["Node.n", "List", "Dict", "Node.n"]):
    with pytest.raises(TraceContextError) as error:
      change(jnp.zeros(how))
    lines = error.value.args[0].split("\n", 2)
    assert lines[0] == ("an object from outside a transform cannot change its structure inside it")
    assert lines[1].startswith(f"  at:  {at}") and lines[2] == fix
  assert m.n == 1 and len(m.layers) == 1 and m.d["k"] == 1


@pytest.mark.parametrize(
  "context",
  [
    jax.disable_jit,
    lambda: jax.default_matmul_precision("float32"),
    lambda: jax.named_scope("x"),
    jax.ensure_compile_time_eval,
    lambda: jax.debug_nans(True),
  ],
  ids=["disable_jit", "precision", "scope", "compile_time", "debug_nans"],
)
def test_a_context_of_jax_is_no_other_trace(context):
  m = Node(n=1, w=nnx.Param(1.0, is_hijax=False))
  with context():
    m.n = 2
    m.w[...] = 3.0
  assert m.n == 2 and float(m.w) == 3.0
