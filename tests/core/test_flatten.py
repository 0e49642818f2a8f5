"""The traversal: what is listed, in which order, what is shared, and when structures are equal."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.core.flatten import Walk, flatten
from refax.errors import ReturnedRefError


class Node(nnx.Pytree):
  """An object with any attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


class Other(Node):
  """The same under another name."""


def param(x=1.0):
  return nnx.Param(jnp.full(2, x))


def paths(x):
  return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(x)]


def test_children_are_the_distinct_variables_and_arrays_in_the_order_of_their_names():
  v, x = param(), jnp.ones(3)
  node = Node(b=v, a=Node(z=x, y=param()), c=v, d=7, e="text")
  flat, _ = jax.tree_util.tree_flatten(node, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
  assert len(flat) == 3
  assert flat[0] is node.a.y and flat[1] is x and flat[2] is v


def test_key_paths_are_written_as_python():
  node = Node(a=Node(w=param()), layers=[param(), {"k": param()}], x=jnp.ones(1))
  node.same = node.a.w
  assert paths(node) == [".a.w", ".layers[0]", ".layers[1].k", ".x"]
  assert paths({"m": node})[0] == "['m'].a.w"


def test_jax_names_both_places_of_a_variable_that_is_passed_twice():
  v = param()
  with pytest.raises(ValueError, match=r"a\.inner\.w(.|\n)*b\.layers\[0\]"):
    jax.jit(lambda a, b: None)(Node(inner=Node(w=v)), Node(layers=[v]))


# sharing
def shared_pairs():
  v, m, cell = param(), Node(w=param()), param()
  return {
    "variable": Node(a=v, b=v),
    "object": Node(a=m, b=m),
    "list": Node(a=[v, m], b=[v, m]),
    "handles": Node(a=cell, b=copy.copy(cell)),
    "nested": Node(a=Node(a=Node(w=v)), b=Node(c=v)),
    "lojax": nnx.to_lojax(Node(a=v, b=v)),
    "data": Node(a=nnx.data({"k": v}), b=v),
  }


REBUILDS = {
  "map": lambda m: jax.tree.map(lambda x: x, m),
  "unflatten": lambda m: jax.tree.unflatten(*jax.tree.flatten(m)[::-1]),
  "clone": nnx.clone,
  "deepcopy": copy.deepcopy,
  "pickle": lambda m: pickle.loads(pickle.dumps(m)),
  "merge": lambda m: nnx.merge(*nnx.split(m)),
  "storage": lambda m: nnx.to_hijax(nnx.to_lojax(m)),
  "nnx.jit": nnx.jit(lambda m: nnx.clone(m)),
  "jit": jax.jit(nnx.to_lojax),
}
CASES = [(s, r) for s in shared_pairs() for r in REBUILDS if (s, r) != ("handles", "pickle")]


@pytest.mark.parametrize(("shared", "rebuild"), CASES)
def test_what_is_shared_is_shared_in_the_rebuilt_object(shared, rebuild):
  node = shared_pairs()[shared]
  twin = REBUILDS[rebuild](node)
  assert nnx.find_duplicates(twin) == nnx.find_duplicates(node)
  assert nnx.graphdef(twin) == nnx.graphdef(node)
  assert [x.shape for x in jax.tree.leaves(twin)] == [x.shape for x in jax.tree.leaves(node)]


@pytest.mark.parametrize("name", [n for n in shared_pairs() if n != "lojax"])
def test_a_write_under_plain_jit_reaches_every_place(name):
  node = shared_pairs()[name]

  @jax.jit
  def write(node):
    for v in jax.tree.leaves(node.a, is_leaf=lambda x: isinstance(x, nnx.Variable)):
      v[...] += 1

  write(node)
  for tree in (node.a, node.b):
    for leaf in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable)):
      assert leaf[...].tolist() == [2.0, 2.0]


def test_gradients_of_tied_weights_add_up_under_plain_grad():
  v = param(3.0)
  node = nnx.to_lojax(Node(a=v, b=Node(w=v)))
  grads = jax.grad(lambda m: (m.a * m.b.w).sum())(node)
  assert grads.a is grads.b.w
  assert grads.a[...].tolist() == [6.0, 6.0]


def test_cycles_are_flattened_and_rebuilt():
  node = Node(w=param(), child=Node())
  node.child.parent = node
  node.me = node
  assert len(jax.tree.leaves(node)) == 1
  twin = jax.tree.map(lambda x: x, node)
  assert twin.child.parent is twin and twin.me is twin
  assert hash(nnx.graphdef(node)) == hash(nnx.graphdef(twin))

  @jax.jit
  def write(node):
    node.child.parent.me.w[...] = 5

  write(node)
  assert node.w[...].tolist() == [5.0, 5.0]
  assert nnx.clone(node).child.parent.w[...].tolist() == [5.0, 5.0]
  assert "Node(...)" in repr(node)


def test_a_deep_object_is_flattened():
  node = Node(w=param())
  for _ in range(100):
    node = Node(child=node)
  assert len(jax.tree.leaves(jax.tree.map(lambda x: x, node))) == 1


def test_a_module_inside_a_plain_pytree_inside_a_module_is_seen():
  node = Node(table=nnx.data({"m": Node(w=param()), "n": (param(), 3)}))
  assert paths(node) == [".table.m.w", ".table.n[0]", ".table.n[1]"]
  jax.jit(lambda node: node.table["m"].w.set_value(7))(node)
  assert node.table["m"].w[...].tolist() == [7.0, 7.0]


# equality of structures
STATICS = [0, 0.0, -0.0, False, None, "0", 1, 1.0, True, 1 + 0j, (1,), (1.0,), (True,), ((1,),),
           ((1.0,),), (0.0,), (-0.0,), b"1", jnp.float32, np.dtype("float32"), len]  # fmt: skip


@pytest.mark.parametrize("i", range(len(STATICS)))
def test_structures_are_equal_exactly_when_statics_and_their_types_are(i):
  a = Node(x=STATICS[i], w=param())
  for j, other in enumerate(STATICS):
    b = Node(x=other, w=param(2.0))
    assert (nnx.graphdef(a) == nnx.graphdef(b)) is (i == j), other
    assert (jax.tree.structure(a) == jax.tree.structure(b)) is (i == j), other


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit], ids=["jax.jit", "nnx.jit"])
def test_a_function_is_compiled_for_each_static_value(jit):
  seen = []
  step = jit(lambda node: seen.append(repr(node.x)))
  for _ in range(2):
    for static in STATICS:
      step(Node(x=static, w=param()))
  assert seen == list(map(repr, STATICS))


def different_structures():
  v, m = param(), Node(w=param())
  return [
    Node(a=v),
    Node(b=v),
    Other(a=v),
    Node(a=v, b=v),
    Node(a=v, b=param()),
    Node(a=nnx.Variable(1.0)),
    Node(a=nnx.Param(1.0, tag="x")),
    Node(a=jnp.ones(2)),
    Node(a=[v]),
    Node(a=[v, v]),
    Node(a=[v, param()]),
    Node(a={"k": v}),
    Node(a=nnx.data({"k": v})),
    Node(a=nnx.data([v])),
    Node(a=m),
    Node(a=m, b=m),
    Node(a=m, b=Node(w=m.w)),
    Node(a=m, b=Node(w=param())),
    Node(a=v, x=1),
    Node(a=v, x=None),
    [v],
    {"a": v},
  ]


def test_structures_are_equal_exactly_when_they_are_built_alike():
  first, second = different_structures(), different_structures()
  for i, a in enumerate(first):
    for j, b in enumerate(second):
      assert (jax.tree.structure(a) == jax.tree.structure(b)) is (i == j), (i, j)
      if i == j:
        assert hash(jax.tree.structure(a)) == hash(jax.tree.structure(b))
        assert hash(nnx.graphdef(a)) == hash(nnx.graphdef(b))


def test_shapes_and_storage_are_no_structure():
  a, b = Node(w=nnx.Param(jnp.ones(2))), Node(w=nnx.Param(jnp.ones((3, 3), jnp.int32)))
  assert jax.tree.structure(a) == jax.tree.structure(b) == jax.tree.structure(nnx.to_lojax(a))


def test_attributes_in_another_order_are_the_same_structure():
  a, b = Node(x=1, w=param(), y=2), Node(y=2, w=param(), x=1)
  assert jax.tree.structure(a) == jax.tree.structure(b)
  assert nnx.graphdef(a) == nnx.graphdef(b)


def test_a_function_made_anew_is_another_structure_and_the_same_one_is_not():
  f = functools.partial(jnp.add, 1)
  assert nnx.graphdef(Node(f=f)) == nnx.graphdef(Node(f=f))
  assert nnx.graphdef(Node(f=f)) != nnx.graphdef(Node(f=functools.partial(jnp.add, 1)))


def test_a_graphdef_is_static_pickles_and_names_what_it_is():
  graphdef = nnx.graphdef(Node(a=param(), x=(1, "t"), child=Node(w=param())))
  assert jax.tree.leaves(graphdef) == []
  twin = pickle.loads(pickle.dumps(graphdef))
  assert twin == graphdef and hash(twin) == hash(graphdef)
  assert repr(graphdef) == "GraphDef(Node, nodes=2, leaves=2)"
  assert graphdef.paths == (("a",), ("child", "w"))
  assert graphdef != nnx.graphdef(param()) and graphdef != 3


def rebuilt(model):
  """The model as a functional program gets it back from a step, every Variable new."""
  return jax.jit(lambda m: jax.tree.map(lambda x: x + 1, m))(model)


def walked(model):
  """What a walk finds, whatever is known already."""
  walk = Walk()
  return walk.graphdef(walk.entry(model)), walk.leaves


class Tree(nnx.Module):
  def __init__(self):
    self.parts = [nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Dict(a=nnx.Variable(1.0))]
    self.table = nnx.data({"x": nnx.Variable(2.0)})
    self.again = self.parts[0].kernel


CHANGES = {
  "nothing": lambda m: None,
  "an attribute of the root": lambda m: setattr(m, "extra", nnx.Variable(0.0)),
  "an attribute below": lambda m: setattr(m.parts[0], "extra", 3),
  "a Variable below": lambda m: setattr(m.parts[0], "bias", nnx.Param(jnp.ones(2))),
  "a deletion": lambda m: delattr(m, "again"),
  "a list": lambda m: m.parts.append(nnx.Variable(5.0)),
  "a dict": lambda m: m.parts[1].update(b=nnx.Variable(5.0)),
  "a value": lambda m: m.parts[0].kernel.set_value(jnp.zeros((2, 2))),
  "a cell": lambda m: m.parts[0].kernel.set_raw_value(jax.new_ref(jnp.zeros((2, 2)))),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [Tree, lambda: Tree().parts[0], lambda: Tree().parts])
@pytest.mark.parametrize("hijax", [True, False])
def test_a_rebuilt_object_flattens_to_what_a_walk_finds(make, change, hijax):
  with nnx.use_hijax(hijax):
    model = nnx.to_hijax(make()) if hijax else nnx.to_lojax(make())
    model = jax.tree.map(lambda x: x, model) if hijax else rebuilt(model)
    if change != "nothing" and isinstance(model, Tree):
      CHANGES[change](model)
  graphdef, leaves = walked(model)
  for _ in range(2):
    flat = flatten(model)
    assert flat.graphdef == graphdef
    assert all(a is b for a, b in zip(flat.leaves, leaves, strict=True))
    assert jax.tree.structure(model) == jax.tree.structure(jax.tree.map(lambda x: x, model))


def test_a_rebuilt_object_is_not_walked_through(monkeypatch):
  model = rebuilt(nnx.to_lojax(nnx.Linear(2, 2, rngs=nnx.Rngs(0))))
  monkeypatch.setattr(Walk, "entry", None)
  assert len(jax.tree.leaves(model)) == 2
  model.extra = 1
  with pytest.raises(TypeError):
    jax.tree.leaves(model)


def test_one_variable_in_two_places_of_a_rebuilt_object_is_one():
  model = nnx.to_lojax(nnx.List([nnx.Variable(1.0), nnx.Variable(2.0)]))
  shared = model[0]
  is_variable = lambda x: isinstance(x, nnx.Variable)
  both = jax.tree.map(lambda _: shared, model, is_leaf=is_variable)
  assert len(jax.tree.leaves(both)) == 1
  refs = jax.tree.map(lambda _: nnx.Variable(0.0, is_hijax=True), model, is_leaf=is_variable)
  assert len(jax.tree.leaves(refs)) == 2
  numbers = jax.tree.map(lambda _: 0, model, is_leaf=is_variable)
  assert jax.tree.leaves(numbers) == [0, 0]


class Returning(nnx.Module):
  """An object that a function gives back."""

  def __init__(self):
    self.v = nnx.Param(jnp.ones(3))


RETURNS = {
  "jit": (lambda m, f: jax.jit(f)(m), "nnx.jit"),
  "eval_shape": (lambda m, f: jax.eval_shape(f, m), "nnx.jit"),
  "scan": (lambda m, f: jax.lax.scan(lambda c, _: (c, f(m)), 0.0, None, length=2), "nnx.scan"),
  "carry": (lambda m, f: jax.lax.scan(lambda c, _: (f(c), 0), m, None, length=2), "nnx.scan"),
  "cond": (lambda m, f: jax.lax.cond(True, lambda: f(m), lambda: f(m)), "nnx.cond"),
  "while": (lambda m, f: jax.lax.while_loop(lambda c: True, f, m), "nnx.while_loop"),
  "checkpoint": (lambda m, f: jax.checkpoint(f)(m), "nnx.remat"),
  "jit in vmap": (lambda m, f: jax.vmap(lambda x: jax.jit(f)(m))(jnp.ones(2)), "nnx.jit"),
}
RETURNED = {
  "an argument": lambda m: m,
  "in a tuple": lambda m: (1, {"m": m}),
  "a new object": lambda m: Returning(),
  "a State": lambda m: nnx.state(m),
}


@pytest.mark.parametrize("what", RETURNED)
@pytest.mark.parametrize("where", RETURNS)
def test_an_object_returned_where_jax_lets_none_out_is_an_error_with_a_fix(where, what):
  call, function = RETURNS[where]
  m = Returning()
  before = m.v[...]
  with pytest.raises(ValueError) as info:  # as JAX's own error is
    call(m, RETURNED[what])
  assert type(info.value) is ReturnedRefError
  text = info.value.args[0]
  assert "returned a mutable array reference of type Ref{float32[3]}" in text
  assert "\n  at:  " in text and "v" in text.split("at:")[1].split("\n")[0]
  assert "fix: return arrays: nnx.pure(" in text and function in text.split("fix:")[1]
  assert jnp.array_equal(m.v[...], before)


def test_the_fix_of_a_returned_object_works():
  m = Returning()
  assert jax.jit(nnx.pure)(m).v.tolist() == [1.0] * 3
  assert nnx.jit(lambda m: m)(m) is m
  assert type(nnx.jit(Returning)()) is Returning


def test_what_jax_lets_out_is_returned():
  m = Returning()
  x = jnp.ones(2)
  assert jax.vmap(lambda x: Returning())(x).v.shape == (2, 3)
  assert jax.grad(lambda x: (x, m), has_aux=True)(1.0)[1].v.shape == (3,)
  assert jax.vjp(lambda x: m, 1.0)[0].v.shape == (3,)
  assert jax.jvp(lambda x: (x, m), (1.0,), (1.0,))[0][1].v.shape == (3,)
  lojax = nnx.to_lojax(m)
  assert jax.jit(lambda m: m)(lojax).v.shape == (3,)
  assert jax.eval_shape(lambda m: nnx.state(m), lojax)["v"].shape == (3,)
  assert jax.lax.scan(lambda c, _: (c, lojax), 0.0, None, length=2)[1].v.shape == (2, 3)
  for f in (nnx.jit, nnx.remat, lambda f: functools.partial(nnx.eval_shape, f)):
    assert f(lambda m: (m, nnx.state(m)))(m)[1]["v"].shape == (3,)
  assert nnx.vmap(lambda x: Returning())(x).v.shape == (2, 3)
  assert nnx.scan(lambda c, x: (c, Returning()))(0.0, x)[1].v.shape == (2, 3)
  assert nnx.jit(lambda m: jax.vmap(lambda x: Returning())(x))(m).v.shape == (2, 3)
