"""nnx.jit: any pytree in any position, sharing, structural changes, writes, identity, caching."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import ShapeMismatchError, TraceContextError


class Node(nnx.Module):
  """An object with any attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


def param(x=1.0, **kwargs):
  return nnx.Param(jnp.full(2, x), **kwargs)


def values(tree):
  """The values of all Variables and arrays, as lists."""
  is_variable = lambda x: isinstance(x, nnx.Variable)
  get = lambda x: x[...].tolist() if is_variable(x) else np.asarray(x).tolist()
  return [get(x) for x in jax.tree.leaves(tree, is_leaf=is_variable)]


def double(tree):
  """Writes twice its value to every Variable."""
  for v in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable)):
    if isinstance(v, nnx.Variable):
      v[...] *= 2


STORAGE = pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
ARGUMENTS = {
  "variable": param,
  "module": lambda: Node(w=param(), n=3),
  "state": lambda: nnx.state(Node(w=param(), inner=Node(v=param(2.0)))),
  "list": lambda: [param(), Node(w=param())],
  "dict": lambda: {"b": param(), "a": (Node(w=param()), 1.5)},
  "nested": lambda: {"x": [{"y": Node(layers=[param()])}], "none": None},
  "pytree value": lambda: nnx.Variable({"a": jnp.ones(2)}),
}


# arguments
@STORAGE
@pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword"])
@pytest.mark.parametrize("name", [n for n in ARGUMENTS if n != "pytree value"])
def test_writes_to_any_argument_reach_the_caller(name, keyword, hijax):
  tree = (nnx.to_hijax if hijax else nnx.to_lojax)(ARGUMENTS[name]())
  other = param()
  before = values(tree)

  @nnx.jit
  def step(x, other, *, tree=None):
    double(x if tree is None else tree)

  step(0, other, tree=tree) if keyword else step(tree, other)
  want = [np.asarray(x) * 2 for x in before]
  if name == "dict":
    want[0] = before[0] if isinstance(before[0], float) else want[0]
  got = values(tree)
  for a, b, old in zip(got, want, before, strict=True):
    np.testing.assert_array_equal(a, old if isinstance(old, float) else b)
  assert values(other) == [[1.0, 1.0]]


@STORAGE
def test_a_variable_with_a_pytree_is_written(hijax):
  v = nnx.Variable({"a": jnp.ones(2), "b": jnp.zeros(())}, is_hijax=hijax)

  @nnx.jit
  def step(v):
    v["a"] += 1
    v["b"] = v["a"].sum()

  step(v)
  assert v["a"].tolist() == [2.0, 2.0] and float(v["b"]) == 4.0


def test_a_lojax_pytree_that_changes_its_structure_reaches_the_caller():
  v = nnx.Variable({"a": jnp.ones(2)}, is_hijax=False)

  @nnx.jit
  def step(v):
    v["new"] = v["a"] * 2

  step(v)
  assert v["new"].tolist() == [2.0, 2.0]


@STORAGE
def test_arguments_may_share(hijax):
  v = param(is_hijax=hijax)
  m = Node(w=v)

  @nnx.jit
  def step(a, b, c, *, d):
    a.w[...] += 1
    b[...] *= 10
    assert a.w is b and c["deep"][0] is a and d is b
    return (c["deep"][0].w + d).sum()

  assert float(step(m, v, {"deep": [m]}, d=v)) == 80.0
  assert values(v) == [[20.0, 20.0]] and m.w is v


def test_two_handles_on_one_cell_are_one_variable_inside():
  m = Node(w=param())
  graphdef, state = nnx.split(m)

  @nnx.jit
  def step(m, graphdef, state):
    nnx.merge(graphdef, state).w[...] += 1
    m.w[...] *= 10

  step(m, graphdef, state)
  assert values(m) == values(state) == [[20.0, 20.0]]


def test_a_variable_by_closure_is_written():
  m = Node(w=param())

  @nnx.jit
  def step(x):
    m.w[...] += x
    return m.w[...]

  assert step(1.0).tolist() == [2.0, 2.0]
  assert step(1.0).tolist() == [3.0, 3.0]
  assert values(m) == [[3.0, 3.0]]


def test_a_method_is_jitted():
  class Counter(nnx.Module):
    def __init__(self):
      self.count = nnx.Variable(0)

    @nnx.jit
    def step(self, by):
      """Count."""
      self.count[...] += by
      self.calls = getattr(self, "calls", 0) + 1
      return self

  counter = Counter()
  assert counter.step(2) is counter and counter.step(by=3) is counter
  assert int(counter.count) == 5 and counter.calls == 2
  assert Counter.step.__doc__ == "Count." and Counter.step.__name__ == "step"


# results
def test_a_model_created_inside_is_returned_with_cells_of_its_own():
  @nnx.jit
  def create(rngs):
    m = Node(layers=[nnx.Linear(2, 3, rngs=rngs), nnx.relu], n=3, d={"k": param()})
    m.tied = m.layers[0].kernel
    return m

  a, b = create(nnx.Rngs(0)), create(nnx.Rngs(0))
  assert a.n == 3 and a.layers[1] is nnx.relu and a.tied is a.layers[0].kernel
  assert all(v.is_hijax for _, v in nnx.iter_graph(a) if isinstance(v, nnx.Variable))
  np.testing.assert_array_equal(a.tied, nnx.Linear(2, 3, rngs=nnx.Rngs(0)).kernel)
  a.tied[...] = 0
  a.extra = 1
  assert bool((b.tied != 0).any())
  jax.jit(lambda a: a.tied.set_value(1))(a)
  assert float(a.layers[0].kernel.sum()) == 6.0


def test_a_lojax_model_created_inside_stays_lojax():
  @nnx.jit
  def create():
    return Node(a=param(is_hijax=False), b=param())

  m = create()
  assert not m.a.is_hijax and m.b.is_hijax


def test_returned_arguments_keep_their_identity():
  m, v, s = Node(w=param(), inner=Node(v=param())), param(), nnx.State({"a": param()})

  @nnx.jit
  def step(m, v, s):
    return {"m": m, "inner": [m.inner, m.inner.v], "v": v, "new": Node(w=v), "leaf": s["a"]}

  out = step(m, v, s)
  assert out["m"] is m and out["inner"][0] is m.inner and out["inner"][1] is m.inner.v
  assert out["v"] is v and out["new"].w is v and out["leaf"] is s["a"]


def test_a_returned_array_is_not_the_argument():
  x = jnp.ones(2)
  out = nnx.jit(lambda x: (x, x))(x)
  assert out[0].tolist() == out[1].tolist() == [1.0, 1.0]


def test_an_array_attribute_that_is_not_changed_keeps_its_identity():
  m = Node(x=jnp.ones(2), w=param())
  x = m.x
  nnx.jit(lambda m: m.w.set_value(m.x * 2))(m)
  assert m.x is x and values(m.w) == [[2.0, 2.0]]


@pytest.mark.parametrize(
  "result",
  [None, 3, 1.5, "text", (), {"a": 1, "b": None}, np.arange(2)],
  ids=repr,
)
def test_what_jax_jit_returns_nnx_jit_returns(result):
  if isinstance(result, str):
    for jit in (jax.jit, nnx.jit):
      with pytest.raises(TypeError):
        jit(lambda: result)()
    return
  got, want = nnx.jit(lambda: result)(), jax.jit(lambda: result)()
  assert jax.tree.structure(got) == jax.tree.structure(want)
  assert values(got) == values(want)
  assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(want)]


# structural changes
def test_structural_changes_reach_the_caller():
  m = Node(w=param(), inner=Node(v=param(), n=1), layers=[param()], gone=param(), d={"k": 1})
  inner, layers = m.inner, m.layers

  @nnx.jit
  def change(m, x):
    m.new = nnx.Param(x)
    m.inner.n = 2
    m.inner.back = m
    m.layers.append(Node(u=m.new))
    del m.gone
    m.array = x * 2
    m.d["k"] = "two"
    m.w, m.inner.v = m.inner.v, m.w

  w, v = m.w, m.inner.v
  change(m, jnp.full(2, 7.0))
  assert m.inner is inner and m.layers is layers
  assert m.new.is_hijax and m.layers[1].u is m.new and m.inner.back is m
  assert m.inner.n == 2 and m.d["k"] == "two" and not hasattr(m, "gone")
  assert m.array.tolist() == [14.0, 14.0]
  assert m.w is v and m.inner.v is w
  m.new[...] = 1.0
  assert len(jax.tree.leaves(m)) == 5
  m.later = 3  # the new objects belong to the caller's trace
  m.layers[1].later = 3


def test_a_change_of_an_object_that_two_arguments_share_reaches_both():
  shared = Node(w=param(), n=1)
  a, b = Node(s=shared), Node(s=shared)
  nnx.jit(lambda a, b: setattr(b.s, "n", a.s.n + 1))(a, b)
  assert a.s is b.s and a.s.n == 2


def test_changed_metadata_reaches_the_caller():
  m = Node(w=param(tag="a"))
  nnx.jit(lambda m: m.w.set_metadata(tag="b"))(m)
  assert m.w.tag == "b"


def test_sown_values_are_handed_out():
  class Net(nnx.Module):
    def __call__(self, x):
      self.sow(nnx.Intermediate, "h", x * 2)
      return x

  net = Net()
  forward = nnx.jit(lambda net, x: net(x))
  forward(net, 1.0)
  forward(net, 2.0)
  assert [float(x) for x in nnx.pop(net, nnx.Intermediate)["h"]] == [2.0, 4.0]


def test_a_new_array_attribute_replaces_the_old_one():
  m = Node(x=jnp.ones(2))

  @nnx.jit
  def step(m):
    m.x = m.x + 1

  step(m)
  step(m)
  assert m.x.tolist() == [3.0, 3.0]


def test_two_attributes_that_hold_one_array_stay_apart():
  x = jnp.ones(2)
  m = Node(a=x, b=x)

  @nnx.jit
  def step(m):
    m.a = m.a + 1

  step(m)
  assert m.a.tolist() == [2.0, 2.0] and m.b.tolist() == [1.0, 1.0]


# static and donated arguments
def test_static_arguments_are_told_apart_by_value_and_type():
  seen = []

  @nnx.jit(static_argnums=0)
  def f(n, x):
    seen.append(n)
    return repr(n) and x * 2

  for _ in range(2):
    for n in (1, 1.0, True, "1", (1,), (True,), 0.0, -0.0, None):
      f(n, 2.0)
  assert list(map(repr, seen)) == ["1", "1.0", "True", "'1'", "(1,)", "(True,)", "0.0", "-0.0",
                                   "None"]  # fmt: skip


@pytest.mark.parametrize(
  "options",
  [
    {"static_argnums": 1},
    {"static_argnums": (1,)},
    {"static_argnums": -2},
    {"static_argnames": "mode"},
    {"static_argnames": ["mode"]},
  ],
  ids=str,
)
def test_a_static_argument_may_be_given_by_position_or_name(options):
  @nnx.jit(**options)
  def f(m, mode, x):
    m.w[...] = x if mode == "set" else m.w * 2
    return mode

  with pytest.raises(TypeError):
    f(Node(w=param()), "set", 3.0)  # a string is no result
  g = nnx.jit(lambda m, mode, x: m.w.set_value(x if mode == "set" else m.w * 2), **options)
  m = Node(w=param())
  g(m, "set", 3.0)
  g(m, "double", 3.0)
  g(m, mode="double", x=3.0)
  assert values(m) == [[12.0, 12.0]]


def test_an_unhashable_static_argument_is_refused():
  for jit in (jax.jit, nnx.jit):
    with pytest.raises((ValueError, TypeError), match=r"unhashable|Non-hashable"):
      jit(lambda n, x: x, static_argnums=0)([1], 2.0)


def test_donated_arrays_are_given_up_and_others_stay():
  x, y, v = jnp.ones(1000), jnp.ones(1000), nnx.Param(jnp.ones(1000))
  f = nnx.jit(lambda x, y, v: (x + 1, y + v), donate_argnums=0)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    f(x, y, v)
  assert x.is_deleted() and not y.is_deleted()
  assert float(v.sum()) == 1000.0


def test_donation_by_name_reaches_nested_arrays():
  state = {"a": jnp.ones(1000), "b": [jnp.ones(1000)]}
  f = nnx.jit(lambda x, *, state: jax.tree.map(lambda s: s + x, state), donate_argnames="state")
  out = f(1.0, state=state)
  assert state["a"].is_deleted() and state["b"][0].is_deleted()
  assert float(out["a"].sum()) == 2000.0


# traces
def counting():
  traces = []

  @nnx.jit
  def step(m, x):
    traces.append(1)
    m.w[...] += x
    return m.w.sum()

  return step, traces


def test_values_are_no_reason_to_trace_again():
  step, traces = counting()
  m = Node(w=param(), n=1, x=jnp.ones(2))
  for i in range(5):
    step(m, jnp.float32(i))
    m.w[...] = i
    m.x = jnp.ones(2) * jnp.float32(i)
  step(nnx.clone(m), jnp.float32(1))
  step(Node(w=param(), n=1, x=jnp.ones(2)), jnp.float32(1))
  assert len(traces) == 1


def test_structure_shape_and_storage_are_reasons_to_trace_again():
  step, traces = counting()
  m, x = Node(w=param(), n=1), jnp.float32(1)
  step(m, x)
  m.n = 2
  step(m, x)
  m.new = param()
  step(m, x)
  step(nnx.to_lojax(m), x)
  m.w = nnx.Param(jnp.ones(5))
  step(m, x)
  m.new = m.w
  step(m, x)
  assert len(traces) == 6
  m.n = 1
  step(m, x)
  m.n = 2
  step(m, x)
  assert len(traces) == 7


def test_a_change_made_inside_is_seen_by_the_next_call():
  traces = []

  @nnx.jit
  def step(m):
    traces.append(m.n)
    m.n += 1

  m = Node(w=param(), n=0)
  for _ in range(3):
    step(m)
  assert traces == [0, 1, 2] and m.n == 3


def test_a_trace_is_kept_apart_for_each_default_storage():
  create = nnx.jit(lambda: nnx.Param(jnp.ones(2)))
  assert create().is_hijax
  with nnx.use_hijax(False):
    assert not create().is_hijax
  assert create().is_hijax


def test_the_cache_is_cleared():
  step, traces = counting()
  m = Node(w=param())
  step(m, 1.0)
  step.clear_cache()
  step(m, 1.0)
  assert len(traces) == 2


def test_lower_and_trace_show_the_users_function_and_change_nothing():
  step, _ = counting()
  m = Node(w=param())
  assert "jit_step" in step.lower(m, 1.0).as_text()
  assert "add" in str(step.trace(m, 1.0).jaxpr)
  assert values(m) == [[1.0, 1.0]]


# errors
def failing(case):
  @nnx.jit
  def step(m, x):
    m.w[...] = x
    m.lo[...] = x
    m.new = nnx.Param(x)
    m.n = 5
    m.layers.append(1)
    m.inner.v[...] *= 2
    if case == "raise":
      raise RuntimeError("boom")
    if case == "shape":
      m.w[...] = jnp.ones(7)
    if case == "leak":
      return object()
    return m

  return step


@pytest.mark.parametrize("case", ["raise", "shape", "leak"])
def test_after_an_exception_all_state_is_as_before(case):
  m = Node(w=param(), lo=param(is_hijax=False), n=1, layers=[param()], inner=Node(v=param()))
  objects = dict(nnx.iter_graph(m))
  cells = [v.get_raw_value() for v in objects.values() if isinstance(v, nnx.Variable)]
  before = values(m)
  error = {"raise": RuntimeError, "shape": ShapeMismatchError, "leak": TypeError}[case]
  with pytest.raises(error):
    failing(case)(m, jnp.full(2, 9.0))
  assert values(m) == before and m.n == 1 and len(m.layers) == 1 and not hasattr(m, "new")
  assert all(value is objects[path] for path, value in nnx.iter_graph(m))
  after = [v.get_raw_value() for _, v in nnx.iter_graph(m) if isinstance(v, nnx.Variable)]
  assert all(a is b for a, b in zip(cells, after, strict=True))
  failing("none")(m, jnp.full(2, 9.0))
  assert values(m.w) == values(m.lo) == [[9.0, 9.0]] and m.n == 5


def test_an_object_from_outside_a_transform_is_not_changed_by_a_jit_inside_it():
  m = Node(w=param(), n=1, lo=param(is_hijax=False))

  @jax.jit
  def outer(x):
    nnx.jit(lambda m: setattr(m, "n", 2))(m)

  with pytest.raises(TraceContextError, match="cannot change its structure inside it"):
    outer(1.0)

  @jax.jit
  def outer_write(x):
    nnx.jit(lambda m, x: m.lo.set_value(x))(m, x)

  with pytest.raises(TraceContextError, match="a lojax Variable from outside"):
    outer_write(jnp.ones(2))
  assert m.n == 1 and values(m) == [[1.0, 1.0], [1.0, 1.0]]


# nesting
def test_nnx_jit_inside_plain_transforms():
  m = Node(w=param(), n=1)

  @jax.jit
  def outer(m, x):
    @nnx.jit
    def inner(m, x):
      m.w[...] += x
      m.extra = m.w * 2
      return m

    out = inner(m, x)
    assert out is m
    return m.extra.sum() + m.w.sum()

  assert float(outer(m, 1.0)) == 12.0
  assert values(m) == [[2.0, 2.0]]

  stack = Node(w=nnx.Param(jnp.arange(6.0).reshape(3, 2)))
  bump = nnx.jit(lambda m: m.w.set_value(m.w + 1))
  jax.vmap(bump)(stack)
  jax.lax.scan(lambda c, m: (c, bump(m)), 0, stack)
  assert stack.w[...].tolist() == [[2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
  assert float(jax.grad(lambda x: nnx.jit(lambda x: x * m.w.sum())(x))(2.0)) == 4.0


def test_plain_transforms_inside_nnx_jit():
  m = Node(w=param(), count=nnx.Variable(0))

  @nnx.jit
  def step(m, x):
    @jax.jit
    def add(m):
      m.w[...] += x

    add(m)
    jax.lax.fori_loop(0, 3, lambda i, _: m.count.set_value(m.count + 1), None)
    jax.lax.cond(x > 0, lambda: m.w.set_value(m.w * 10), lambda: None)
    y = jax.checkpoint(lambda x: jnp.sin(x) * m.w.sum())(x)
    return jax.vmap(lambda x: x * m.w.sum())(jnp.arange(2.0)), y

  out, _ = step(m, 1.0)
  assert out.tolist() == [0.0, 40.0]
  assert values(m.w) == [[20.0, 20.0]] and int(m.count) == 3


def test_nnx_jit_inside_nnx_jit_and_nnx_grad():
  m = Node(w=param(2.0), stat=nnx.BatchStat(0.0))

  @nnx.jit
  def loss(m, x):
    m.stat[...] = m.w.sum()
    return (m.w * x).sum()

  @nnx.jit
  def step(m, x):
    value, grads = nnx.value_and_grad(loss)(m, x)
    m.w[...] -= 0.5 * grads.w
    return value

  assert float(step(m, jnp.ones(2))) == 4.0
  assert values(m.w) == [[1.5, 1.5]] and float(m.stat) == 4.0


def test_options_of_jax_jit_are_kept():
  f = nnx.jit(lambda x, y: x, keep_unused=True, inline=True)
  assert float(f(1.0, 2.0)) == 1.0
