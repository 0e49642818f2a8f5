"""nnx.cond and nnx.switch: what one branch does happens, what the others do does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import DifferentiatedWriteError, TreeMismatchError


class Node(nnx.Module):
  """An object with any attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


STORAGE = pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
OUTER = pytest.mark.parametrize("outer", [lambda f: f, nnx.jit], ids=["eager", "jit"])


def close(got, want):
  np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-6)


def model(hijax=True):
  m = Node(w=nnx.Param(jnp.array([3.0, 4.0])), n=nnx.Variable(0), s=nnx.BatchStat(1.0))
  return m if hijax else nnx.to_lojax(m)


def more(m, x):
  m.n += 1
  m.s[...] = x.sum()
  return (m.w * x).sum()


def less(m, x):
  m.n -= 10
  return m.s + x[0]


@OUTER
@STORAGE
@pytest.mark.parametrize("pred", [True, False])
def test_one_branch_runs_and_writes(pred, hijax, outer):
  m, x = model(hijax), jnp.array([1.0, 2.0])
  got = outer(lambda p, m, x: nnx.cond(p, more, less, m, x))(pred, m, x)
  assert float(got) == (11.0 if pred else 2.0)
  assert int(m.n) == (1 if pred else -10) and float(m.s) == (3.0 if pred else 1.0)


@OUTER
def test_state_by_closure(outer):
  m, x = model(), jnp.array([1.0, 2.0])
  f = outer(lambda p: nnx.cond(p, lambda: more(m, x), lambda: less(m, x)))
  assert [float(f(p)) for p in (True, False, True)] == [11.0, 4.0, 11.0]
  assert int(m.n) == -8


@pytest.mark.parametrize(("index", "want"), [(-3, 0), (0, 0), (1, 1), (2, 2), (9, 2)])
def test_switch_clamps_its_index(index, want):
  v = nnx.Variable(0)
  branches = [lambda v, k=k: v.set_value(v + 10**k) for k in range(3)]
  nnx.switch(index, branches, v)
  assert int(v) == 10**want
  nnx.jit(lambda i, v: nnx.switch(i, branches, v))(index, v)
  assert int(v) == 2 * 10**want


def test_predicates_and_indices_may_be_variables():
  m = model()
  nnx.cond(nnx.Variable(True), lambda m: m.n.set_value(5), lambda m: None, m)
  assert nnx.switch(nnx.Variable(1), [lambda m: 0, lambda m: m.n + 1], m) == 6


def test_new_objects_are_returned_as_objects():
  create = lambda rngs: nnx.Linear(2, 3, rngs=rngs)
  rngs = nnx.Rngs(0)
  m = nnx.jit(lambda p, rngs: nnx.cond(p, create, create, rngs))(True, rngs)
  assert type(m) is nnx.Linear and m.kernel.is_hijax
  assert int(rngs.default.count) == 2
  m.kernel[...] = 0.0


def test_attributes_that_all_branches_set_reach_the_caller():
  m = model()

  def add(value):
    def branch(m):
      m.cache = nnx.Cache(jnp.full(2, value))
      m.mode = "cached"

    return branch

  nnx.cond(m.n > 3, add(1.0), add(2.0), m)
  assert m.cache[...].tolist() == [2.0, 2.0] and m.mode == "cached"


def test_the_operand_itself_may_be_returned():
  m = model()
  assert nnx.cond(True, lambda m: m, lambda m: m, m) is m
  assert nnx.cond(True, lambda m: m.w, lambda m: m.w, m) is m.w


def test_one_variable_in_two_operands():
  v = nnx.Variable(1.0)

  def f(a, b):
    a[...] += 1
    b[...] *= 2
    return a + b

  assert float(nnx.cond(True, f, lambda a, b: 0.0 * a, v, v)) == 8.0
  assert float(v) == 4.0


@pytest.mark.parametrize("pred", [True, False])
def test_gradients_flow_through_the_branch_that_ran(pred):
  m, x = model(), jnp.array([1.0, 2.0])
  grads = nnx.grad(lambda m: nnx.cond(m.n < 5 if pred else m.n > 5, more, less, m, x))(m)
  close(grads["w"], x if pred else [0.0, 0.0])
  assert int(m.n) == (1 if pred else -10)
  close(jax.grad(lambda x: nnx.cond(pred, more, less, m, x))(x), m.w[...] if pred else [1.0, 0.0])


def test_under_vmap_each_element_takes_its_branch():
  m = Node(n=nnx.Variable(jnp.zeros(3, jnp.int32)), s=nnx.BatchStat(jnp.ones(3)))

  def f(m, x):
    def up(m):
      m.n += 1
      m.s[...] = x
      return x

    return nnx.cond(x > 0, up, lambda m: m.s + 0, m)

  for outer in (nnx.vmap, jax.vmap):
    ys = outer(f)(m, jnp.array([5.0, -1.0, 2.0]))
  close(ys, [5.0, 1.0, 2.0])
  assert m.n[...].tolist() == [2, 0, 2]
  close(m.s[...], [5.0, 1.0, 2.0])


def test_random_streams_advance_only_where_they_are_used():
  drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
  for _ in range(2):
    nnx.cond(True, lambda d: d(jnp.ones(4)), lambda d: jnp.ones(4), drop)
    nnx.cond(False, lambda d: d(jnp.ones(4)), lambda d: jnp.ones(4), drop)
  assert int(drop.rngs.count) == 2


def test_a_differentiated_write_in_a_branch_that_does_not_run_is_an_error_too():
  v = nnx.Variable(0.0)
  f = lambda x: nnx.cond(False, lambda x: (v.set_value(x), x)[1], lambda x: x, x)
  with pytest.raises(DifferentiatedWriteError, match="its gradient would be lost"):
    jax.grad(f)(1.0)
  assert float(v) == 0.0


def test_nested_branches():
  v = nnx.Variable(0)
  add = lambda k: lambda v: v.set_value(v + k)
  inner = lambda a, b: lambda v: nnx.switch(v % 2, [add(a), add(b)], v)
  for _ in range(3):
    nnx.cond(v < 5, inner(1, 10), inner(100, 1000), v)
  assert int(v) == 0 + 1 + 10 + 1000


def test_branches_that_differ_leave_everything_as_it_was():
  m = model()

  def f(m):
    m.n += 1
    m.extra = nnx.Variable(0)

  with pytest.raises(
    TreeMismatchError, match=r"got: nothing at \.extra, and \.extra from branch 0"
  ):
    nnx.cond(True, f, lambda m: None, m)
  assert int(m.n) == 0 and not hasattr(m, "extra")
