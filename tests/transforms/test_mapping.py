"""nnx.vmap: ensembles, axes by filter, what is shared, what is reduced, what comes by closure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import DifferentiatedWriteError, SharedWriteError, TreeMismatchError


class Node(nnx.Module):
  """An object with any attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


STORAGE = pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
XS = jnp.arange(12.0).reshape(3, 2, 2)


def close(got, want):
  np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-6)


def ensemble(n=3):
  return nnx.vmap(lambda rngs: nnx.Linear(2, 1, rngs=rngs))(nnx.Rngs(0).split(n))


# models
def test_models_created_inside_are_a_stack_with_cells_of_its_own():
  stack = ensemble()
  assert type(stack) is nnx.Linear and stack.kernel.shape == (3, 2, 1) and stack.kernel.is_hijax
  assert not np.allclose(stack.kernel[0], stack.kernel[1])
  stack.kernel[0] = 0.0
  assert float(jnp.abs(stack.kernel[1]).sum()) > 0


@STORAGE
@pytest.mark.parametrize("outer", [lambda f: f, jax.jit, nnx.jit], ids=["eager", "jax", "nnx"])
def test_an_ensemble_equals_its_members(outer, hijax):
  stack = (nnx.to_hijax if hijax else nnx.to_lojax)(ensemble())
  xs = XS[:, 0]
  got = outer(lambda m, xs: nnx.vmap(lambda m, x: m(x))(m, xs))(stack, xs)
  close(got, [xs[i] @ stack.kernel[i] + stack.bias[i] for i in range(3)])


@STORAGE
def test_an_ensemble_is_trained_in_place(hijax):
  m = Node(w=nnx.Param(jnp.arange(3.0)), n=nnx.Variable(jnp.zeros(3, jnp.int32)))
  m = (nnx.to_hijax if hijax else nnx.to_lojax)(m)

  @nnx.vmap
  def step(m, x):
    grads = nnx.grad(lambda m: (m.w * x) ** 2)(m)
    m.w[...] -= 0.5 * grads["w"]
    m.n += 1
    return grads

  grads = step(m, jnp.array([1.0, 2.0, 0.0]))
  close(grads["w"], [0.0, 8.0, 0.0])
  close(m.w[...], [0.0, 1 - 4.0, 2.0])
  assert m.n[...].tolist() == [1, 1, 1]


def test_state_axes_in_and_out():
  axes = nnx.StateAxes({nnx.Param: 1, nnx.BatchStat: None, ...: 0})
  create = lambda rngs: Node(
    w=nnx.Param(rngs.normal((2,))), s=nnx.BatchStat(jnp.zeros(4)), rngs=nnx.Rngs(rngs())
  )
  m = nnx.vmap(create, out_axes=axes)(nnx.Rngs(0).split(3))
  assert (m.w.shape, m.s.shape, m.rngs.default.key.shape) == ((2, 3), (4,), (3,))

  def f(m, x):
    m.w[...] += x
    return m.w + m.s[0]

  before = m.w[...]
  ys = nnx.vmap(f, in_axes=(axes, 0), out_axes=-1)(m, jnp.arange(3.0))
  close(ys, before + jnp.arange(3.0))
  close(m.w[...], ys)


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_any_axis(axis):
  v, xs = nnx.Variable(XS[0]), jnp.arange(4.0).reshape(2, 2)

  def f(v, x):
    v[...] += x
    return v * 2

  ys = nnx.vmap(f, in_axes=(axis, axis), out_axes=axis)(v, xs)
  close(v[...], XS[0] + xs)
  close(ys, 2 * v[...])


def test_keyword_arguments_are_mapped_over_axis_0():
  v = nnx.Variable(jnp.zeros(3))

  def f(x, *, v, y):
    v[...] = x + y
    return x * y

  close(nnx.vmap(f, in_axes=None)(2.0, v=v, y=jnp.arange(3.0)), [0.0, 2.0, 4.0])
  close(v[...], [2.0, 3.0, 4.0])


def test_axis_size_tells_where_no_argument_does():
  assert nnx.vmap(lambda: nnx.Param(1.0), axis_size=3)().shape == (3,)
  assert nnx.vmap(lambda x: x, in_axes=None, axis_size=2)(1.0).shape == (2,)
  with pytest.raises(TreeMismatchError, match="no axis_size"):
    nnx.vmap(lambda x: x, in_axes=None)(1.0)


def test_sizes_must_agree():
  with pytest.raises(
    TreeMismatchError,
    match=r"3 at \[0\], 2 at \[1\]\.kernel, 2 at \[1\]\.bias|"
    r"3 at \[0\], 2 at \[1\]\.bias, 2 at \[1\]\.kernel",
  ):
    nnx.vmap(lambda x, m: None)(jnp.ones(3), ensemble(2))


def test_nested_maps_with_axis_names():
  v = nnx.Variable(jnp.zeros((2, 3)))

  def f(v, x):
    v[...] = jax.lax.psum(x, "i") * 10 + jax.lax.axis_index("j")
    return jax.lax.pmean(x, ("i", "j"))

  xs = jnp.arange(6.0).reshape(2, 3)
  ys = nnx.vmap(nnx.vmap(f, axis_name="j"), axis_name="i")(v, xs)
  close(v[...], xs.sum(0, keepdims=True).repeat(2, 0) * 10 + jnp.arange(3))
  close(ys, jnp.full((2, 3), 2.5))


def test_nested_maps_over_different_axes():
  m = Node(w=nnx.Param(jnp.arange(6.0).reshape(2, 3)))
  inner = lambda m, x: m.w * x
  both = nnx.vmap(nnx.vmap(inner, in_axes=(None, 0)), in_axes=(1, None))
  ys = both(m, jnp.arange(4.0))
  assert ys.shape == (3, 4, 2)
  close(ys, jnp.einsum("ij,k->jki", m.w[...], jnp.arange(4.0)))


# what is shared
def test_a_shared_variable_may_be_read_and_written_with_one_value():
  m = Node(w=nnx.Param(2.0), n=nnx.Variable(0))
  other = nnx.Variable(0)

  def f(m, x):
    m.n += 1
    other[...] += 2
    return m.w * x

  close(nnx.vmap(f, in_axes=(None, 0))(m, jnp.arange(3.0)), [0.0, 2.0, 4.0])
  assert int(m.n) == 1 and int(other) == 2


@pytest.mark.parametrize("how", ["closure", "argument"])
def test_a_shared_write_that_differs_is_refused_and_nothing_is_written(how):
  m = Node(first=nnx.Variable(0.0), last=nnx.Variable(0.0))

  def f(m, x):
    m.first[...] = 1.0
    m.last[...] = x
    return None, (x, None)

  run = nnx.vmap(f, in_axes=(None, 0)) if how == "argument" else nnx.vmap(lambda x: f(m, x))
  with pytest.raises(SharedWriteError, match=r"at:  Node\.last"):
    run(*((m,) if how == "argument" else ()), jnp.arange(3.0))
  assert float(m.first) == 0.0 and float(m.last) == 0.0


def test_what_a_shared_object_gains_is_a_stack():
  m = Node(n=nnx.Variable(0))

  def f(m, x):
    m.seen = nnx.Variable(x * 2)
    m.array = x

  nnx.vmap(f, in_axes=(None, 0))(m, jnp.arange(3.0))
  close(m.seen[...], [0.0, 2.0, 4.0])
  close(m.array, [0.0, 1.0, 2.0])


POLICIES = {"mean": 2.0, "sum": 6.0, "first": 1.0}


@STORAGE
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_makes_one_value_of_many(name, hijax):
  m = Node(v=nnx.BatchStat(0.0, is_hijax=hijax), n=nnx.Variable(0, is_hijax=hijax))

  def f(m, x):
    m.v[...] = x
    m.n += 1
    return x

  nnx.vmap(f, in_axes=(None, 0), reduce={nnx.BatchStat: name})(m, jnp.array([1.0, 2.0, 3.0]))
  assert float(m.v) == POLICIES[name] and int(m.n) == 1 and m.v.dtype == jnp.float32


@pytest.mark.parametrize("how", ["closure", "argument"])
@pytest.mark.parametrize("outer", [lambda f: f, jax.jit, nnx.jit], ids=["eager", "jax", "nnx"])
def test_batch_norm_shared_by_all_moves_to_the_mean(outer, how):
  norm = nnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
  twin = nnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
  policy = {nnx.BatchStat: "mean"}
  if how == "closure":
    ys = outer(lambda xs: nnx.vmap(lambda x: norm(x), reduce=policy)(xs))(XS)
  else:
    run = nnx.vmap(lambda norm, x: norm(x), in_axes=(None, 0), reduce=policy)
    ys = outer(lambda norm, xs: run(norm, xs))(norm, XS)
  want, means = [], []
  for x in XS:
    fresh = nnx.clone(twin)
    want.append(fresh(x))
    means.append(fresh.mean[...])
  np.testing.assert_allclose(ys, jnp.stack(want), rtol=1e-4, atol=1e-5)
  close(norm.mean[...], np.mean(means, 0))


def test_batch_norm_with_an_axis_name_needs_no_policy():
  norm = nnx.BatchNorm(2, momentum=0.5, axis_name="batch", rngs=nnx.Rngs(0))
  whole = nnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
  ys = nnx.vmap(lambda x: norm(x), axis_name="batch")(XS)
  np.testing.assert_allclose(ys, whole(XS), rtol=1e-4, atol=1e-5)
  close(norm.mean[...], whole.mean[...])


def test_rngs_by_closure_are_shared_and_split_rngs_differ():
  rngs = nnx.Rngs(0)
  same = nnx.vmap(lambda x: x + rngs.normal())(jnp.zeros(3))
  assert len(set(np.asarray(same).tolist())) == 1 and int(rngs.default.count) == 1
  differ = nnx.vmap(lambda rngs, x: x + rngs.normal())(rngs.split(3), jnp.zeros(3))
  assert len(set(np.asarray(differ).tolist())) == 3


def test_counts_that_differ_are_reduced():
  rngs = nnx.Rngs(0)

  def f(x):
    return nnx.cond(x > 0, lambda: rngs.normal(), lambda: 0.0)

  with pytest.raises(SharedWriteError, match="count"):
    nnx.vmap(f)(jnp.array([1.0, 0.0]))
  nnx.vmap(f, reduce={nnx.RngState: "sum"})(jnp.array([1.0, 0.0]))
  assert int(rngs.default.count) == 1


# derivatives
@STORAGE
def test_gradients_of_each_example(hijax):
  m = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
  m = m if hijax else nnx.to_lojax(m)
  loss = lambda m, x: (m(x) ** 2).sum()
  xs = XS[:, 0]
  grads = nnx.vmap(nnx.grad(loss), in_axes=(None, 0))(m, xs)
  assert isinstance(grads, nnx.State)
  for i in range(3):
    want = nnx.grad(loss)(m, xs[i])
    jax.tree.map(lambda a, b, i=i: close(a[i], b), grads, want)
  plain = jax.vmap(lambda x: nnx.grad(loss)(m, x))(xs)
  jax.tree.map(close, plain, grads)


def test_the_hessian_as_vmap_of_jvp_of_grad():
  m = Node(w=nnx.Param(jnp.array([1.0, 2.0])), n=nnx.Variable(0))

  def loss(m):
    m.n += 1
    return (m.w**3).sum() + m.w[0] * m.w[1]

  def column(direction):
    gradient = lambda m: nnx.grad(loss)(m)["w"][...]
    return nnx.jvp(gradient, (m,), ({"w": direction},))[1]

  hessian = [[6.0, 1.0], [1.0, 12.0]]
  close(nnx.vmap(column)(jnp.eye(2)), hessian)
  assert int(m.n) == 1


def test_gradients_through_a_map_of_shared_parameters_add_up():
  w = nnx.Param(2.0)
  loss = lambda w: nnx.vmap(lambda w, x: w * x**2, in_axes=(None, 0))(w, jnp.arange(4.0)).sum()
  assert float(nnx.grad(loss)(w)) == 14.0
  assert float(nnx.grad(lambda w: nnx.vmap(lambda x: w * x**2)(jnp.arange(4.0)).sum())(w)) == 14.0


@pytest.mark.parametrize("closure", [False, True])
def test_shared_random_streams_draw_other_numbers_for_each_element_if_asked(closure):
  rngs, x = nnx.Rngs(0), jnp.zeros(3)

  def draw(reduce):
    if closure:
      return nnx.vmap(lambda x: x + rngs.normal(), reduce=reduce)(x)
    mapped = nnx.vmap(lambda rngs, x: x + rngs.normal(), in_axes=(None, 0), reduce=reduce)
    return mapped(rngs, x)

  key = jax.random.key_data(rngs.default.key[...])
  same, one, two = draw(None), draw({nnx.RngKey: "split"}), draw({nnx.RngKey: "split"})
  assert len(set(same.tolist())) == 1
  assert len({*one.tolist(), *two.tolist()}) == 6
  assert int(rngs.default.count) == 3
  np.testing.assert_array_equal(jax.random.key_data(rngs.default.key[...]), key)


ELEMENTS = {
  "keys": (jax.random.split(jax.random.key(0), 3), 0),
  "a negative axis": (np.ones((2, 3), np.float32), -1),
  "weak": (jnp.full(3, 2.0), 0),
  "NumPy": (np.arange(3), 0),
  "a pytree": ({"a": jnp.ones((3, 2)), "b": jnp.ones(3)}, 0),
}


@pytest.mark.parametrize("name", ELEMENTS)
def test_the_function_sees_one_element_of_the_type_that_jax_shows(name):
  x, axis = ELEMENTS[name]
  seen = []

  def f(v, x):
    seen.append([jax.typeof(leaf) for leaf in jax.tree.leaves(x)])
    return v + 1

  jax.vmap(lambda x: f(1.0, x), in_axes=(axis,))(x)
  nnx.vmap(f, in_axes=(None, axis))(nnx.Variable(1.0), x)
  assert seen[0] == seen[1]


def test_the_function_runs_at_every_call_for_what_it_reads_may_have_changed():
  scale = [1.0]
  f = nnx.vmap(lambda v, x: v * x * scale[0], in_axes=(None, 0))
  v = nnx.Variable(2.0)
  close(f(v, jnp.ones(2)), [2.0, 2.0])
  scale[0] = 3.0
  close(f(v, jnp.ones(2)), [6.0, 6.0])


@pytest.mark.parametrize("axis_name", [None, "batch"])
def test_a_write_of_what_is_differentiated_inside_is_refused(axis_name):
  v = nnx.Variable(jnp.zeros(3))

  def f(v, x):
    def loss(w):
      v[...] = 2 * w
      return w * x

    return jax.grad(loss)(x)

  with pytest.raises(DifferentiatedWriteError):
    nnx.vmap(f, axis_name=axis_name)(v, jnp.ones(3))
  close(v, [0, 0, 0])


@pytest.mark.parametrize("axis_name", [None, "batch"])
def test_gradients_flow_through_a_function_that_is_mapped_inside(axis_name):
  stat = nnx.BatchStat(jnp.zeros(3))

  def f(w, v, x):
    v[...] = v + x
    return w * x

  def loss(w):
    return nnx.vmap(f, in_axes=(None, 0, 0), axis_name=axis_name)(w, stat, jnp.arange(3.0)).sum()

  close(jax.grad(loss)(1.0), 3.0)
  close(nnx.grad(lambda p: loss(p))(nnx.Param(1.0)), 3.0)


def test_a_mapped_constructor_names_the_axis_of_what_it_makes():
  names = {nnx.PARTITION_NAME: "layers"}

  class Stack(nnx.Module):
    @nnx.vmap(in_axes=(0, 0), transform_metadata=names)
    def __init__(self, rngs):
      self.w = nnx.Param(rngs.normal((4, 4)), out_sharding=("din", "dout"))

    @nnx.scan(in_axes=(0, nnx.Carry), transform_metadata=names)
    def __call__(self, x):
      return x @ self.w, None

  model = Stack(nnx.Rngs(0).split(5))
  assert model.w.shape == (5, 4, 4)
  assert model.w.sharding_names == ("layers", "din", "dout")
  want = x = jnp.ones((1, 4))
  for w in model.w[...]:
    want = want @ w
  np.testing.assert_allclose(model(x)[0], want, rtol=1e-5)
  assert model.w.sharding_names == ("layers", "din", "dout")
