"""nnx.scan, while_loop and fori_loop: what is carried, sliced, shared and stacked; closures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import TreeMismatchError


class Node(nnx.Module):
  """An object with any attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


STORAGE = pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])


def close(got, want):
  np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-6)


def layers(n, size=2):
  return nnx.vmap(lambda rngs: nnx.Linear(size, size, rngs=rngs))(nnx.Rngs(0).split(n))


# scan: the carry
@STORAGE
def test_state_in_the_carry_is_written_and_the_carry_is_the_callers_object(hijax):
  m = Node(v=nnx.Variable(1.0, is_hijax=hijax), inner=Node(n=nnx.Variable(0, is_hijax=hijax)))

  def step(m, x):
    m.v[...] = m.v * 2 + x
    m.inner.n += 1
    return m, m.v + 0

  last, ys = nnx.scan(step)(m, jnp.arange(3.0))
  assert last is m
  close(ys, [2.0, 5.0, 12.0])
  assert float(m.v) == 12.0 and int(m.inner.n) == 3 and m.v.is_hijax == hijax


def test_several_carries_and_results_of_any_structure():
  def step(a, x, b):
    return b + x, {"y": (a, x)}, a

  axes = (nnx.Carry, 0, nnx.Carry)
  a, ys, b = nnx.scan(step, in_axes=axes, out_axes=axes)(0.0, jnp.arange(1.0, 4.0), 10.0)
  state, want = (0.0, 10.0), []
  for x in (1.0, 2.0, 3.0):
    want.append(state[0])
    state = (state[1] + x, state[0])
  assert (float(a), float(b)) == state
  close(ys["y"][0], want)
  close(ys["y"][1], [1.0, 2.0, 3.0])


def test_an_array_attribute_in_the_carry_is_carried():
  m = Node(total=jnp.zeros(2), kept=jnp.ones(2), k=3)
  kept = m.kept

  def step(m, x):
    m.total = m.total + x * m.k
    return m

  last = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(m, jnp.arange(4.0))
  assert last is m and m.kept is kept
  close(m.total, [18.0, 18.0])


def test_a_new_object_as_the_next_carry_leaves_the_old_one():
  start = Node(v=nnx.Variable(1.0), k=2)
  step = lambda m, x: (Node(v=nnx.Variable(m.v * m.k + x), k=2), m.v + 0)
  last, ys = nnx.scan(step)(start, jnp.ones(3))
  assert last is not start and float(start.v) == 1.0 and last.v.is_hijax
  assert float(last.v) == 15.0
  close(ys, [1.0, 3.0, 7.0])


def test_a_variable_in_two_places_of_the_carry_stays_shared():
  v = nnx.Variable(1.0)
  m = Node(a=v, b=[v])

  def step(m):
    m.a[...] += 1
    m.b[0][...] *= 2
    return m

  last = nnx.scan(step, in_axes=(nnx.Carry,), out_axes=nnx.Carry, length=2)(m)
  assert float(v) == 10.0 and last.a is last.b[0]


@pytest.mark.parametrize("start", [0, 0.0, np.int32(0), jnp.int32(0)], ids=repr)
def test_weakly_typed_carries_become_what_the_step_returns_as_in_jax(start):
  step = lambda c, x: (c + x, c)
  xs = jnp.arange(3.0)
  try:
    want = jax.lax.scan(step, start, xs)
  except TypeError:
    with pytest.raises(TreeMismatchError, match=r"got: float32\[\], the carry .* has int32\[\]"):
      nnx.scan(step)(start, xs)
    return
  got = nnx.scan(step)(start, xs)
  for a, b in zip(got, want, strict=True):
    assert a.dtype == b.dtype
    close(a, b)


def test_a_weak_carry_never_loses_its_kind():
  with pytest.raises(TreeMismatchError, match=r"got: int32\[\], the carry .* has float32\[\]"):
    nnx.fori_loop(0, 3, lambda i, c: jnp.int32(i), 0.5)


def test_keys_are_carried():
  def step(key, _):
    key, sub = jax.random.split(key)
    return key, jax.random.normal(sub)

  got = nnx.scan(step, length=3)(jax.random.key(0), None)
  want = jax.lax.scan(step, jax.random.key(0), length=3)
  close(got[1], want[1])


# scan: axes
@STORAGE
def test_mapped_state_is_sliced_and_written_back_along_its_axis(hijax):
  m = Node(
    w=nnx.Param(jnp.arange(6.0).reshape(2, 3), is_hijax=hijax),
    count=nnx.Variable(0, is_hijax=hijax),
    fixed=nnx.BatchStat(jnp.array([1.0, 2.0]), is_hijax=hijax),
  )
  axes = nnx.StateAxes({nnx.Param: 1, nnx.BatchStat: None, ...: nnx.Carry})

  def step(x, m):
    m.count[...] += 1
    m.w[...] *= m.count[...]
    return x + (m.w * m.fixed).sum()

  y = nnx.scan(step, in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)(0.0, m)
  w = np.arange(6.0).reshape(2, 3) * np.array([1, 2, 3])
  close(m.w[...], w)
  close(y, (w * np.array([[1.0], [2.0]])).sum())
  assert int(m.count) == 3 and m.fixed[...].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_any_axis_in_and_out(axis):
  xs = jnp.arange(6.0).reshape(2, 3)
  v = nnx.Variable(xs)

  def step(c, x, v):
    v[...] = -x
    return c + 1, x * 2

  run = nnx.scan(step, in_axes=(nnx.Carry, axis, axis), out_axes=(nnx.Carry, axis))
  n, ys = run(0, xs, v)
  assert int(n) == xs.shape[axis]
  close(ys, 2 * xs)
  close(v[...], -xs)


def test_a_tree_of_axes():
  xs = {"a": jnp.arange(3.0), "b": (jnp.ones((2, 3)), jnp.full(2, 5.0))}
  axes = {"a": 0, "b": (1, None)}
  step = lambda c, x: (c + x["a"] * x["b"][0] + x["b"][1], {"s": x["a"], "t": x["b"][0]})
  c, ys = nnx.scan(step, in_axes=(nnx.Carry, axes), out_axes=(nnx.Carry, {"s": 0, "t": -1}))(
    jnp.zeros(2), xs
  )
  close(c, [18.0, 18.0])
  assert ys["s"].shape == (3,) and ys["t"].shape == (2, 3)


def test_keyword_arguments_are_shared():
  v = nnx.Variable(0.0)

  def step(c, x, *, v, scale):
    v[...] += x * scale
    return c + v, x

  c, _ = nnx.scan(step)(0.0, jnp.arange(1.0, 4.0), v=v, scale=2.0)
  assert float(v) == 12.0 and float(c) == 2 + 6 + 12


def test_out_axes_none_is_the_result_of_the_last_step():
  step = lambda c, x: (c + x, c * 10, x)
  run = lambda **kw: nnx.scan(step, out_axes=(nnx.Carry, None, 0), **kw)(0.0, jnp.arange(1.0, 4.0))
  c, last, xs = run()
  assert (float(c), float(last)) == (6.0, 30.0)
  c, last, xs = run(reverse=True)
  assert (float(c), float(last)) == (6.0, 50.0)
  close(xs, [1.0, 2.0, 3.0])


def test_no_carry_is_a_map():
  got = nnx.scan(lambda x: x**2, in_axes=(0,), out_axes=0)(jnp.arange(4.0))
  close(got, [0.0, 1.0, 4.0, 9.0])


@pytest.mark.parametrize(
  "options", [{}, {"unroll": 2}, {"unroll": True}, {"reverse": True}], ids=str
)
def test_options_as_in_jax(options):
  v = nnx.Variable(0.0)

  def step(c, x):
    v[...] = v * 0.5 + x
    return c * 2 + x, c + v

  def pure(state, x):
    c, v = state
    v = v * 0.5 + x
    return (c * 2 + x, v), c + v

  xs = jnp.array([1.0, 5.0, 2.0, 4.0, 3.0])
  c, ys = nnx.scan(step, **options)(0.0, xs)
  (want_c, want_v), want_ys = jax.lax.scan(pure, (0.0, 0.0), xs, **options)
  close(ys, want_ys)
  close((c, v), (want_c, want_v))


@pytest.mark.parametrize("mapped", [True, False])
def test_no_steps_at_all(mapped):
  v = nnx.Variable(3.0)
  m = Node(w=nnx.Param(jnp.zeros((0, 2))))

  def step(c, x, m):
    v[...] += 1
    m.w[...] += 1
    return c + m.w.sum(), c

  c, ys = nnx.scan(step, length=0, in_axes=(nnx.Carry, 0 if mapped else None, 0))(
    1.0, jnp.zeros(0) if mapped else 0.0, m
  )
  assert float(c) == 1.0 and ys.shape == (0,) and float(v) == 3.0 and m.w.shape == (0, 2)


def test_length_without_anything_mapped():
  c, ys = nnx.scan(lambda c, x: (c + 1, c), length=3)(0, None)
  assert int(c) == 3
  close(ys, [0, 1, 2])


def test_length_must_agree():
  assert nnx.scan(lambda c, x: (c, x), length=2)(0, jnp.ones(2))[1].shape == (2,)
  with pytest.raises(TreeMismatchError, match="3 at length, 2 at the arguments"):
    nnx.scan(lambda c, x: (c, x), length=3)(0, jnp.ones(2))


def test_the_number_of_carries_must_agree():
  with pytest.raises(TreeMismatchError, match=r"1 nnx\.Carry in in_axes, 0 in out_axes"):
    nnx.scan(lambda c, x: (c, x), out_axes=(0, 0))(0, jnp.ones(2))
  with pytest.raises(TreeMismatchError, match="2 axes for 3 result"):
    nnx.scan(lambda c, x: (c, x, x))(0, jnp.ones(2))


# scan: models
@STORAGE
def test_a_stack_of_layers_equals_a_loop_over_them(hijax):
  stack = (nnx.to_hijax if hijax else nnx.to_lojax)(layers(3))
  x = jnp.array([[1.0, -2.0]])
  forward = nnx.scan(
    lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
  )

  def loop(stack, x):
    for i in range(3):
      x = jnp.tanh(x @ stack.kernel[i] + stack.bias[i])
    return x

  close(forward(x, stack), loop(stack, x))
  got = nnx.grad(lambda s: forward(x, s).sum())(stack)
  want = nnx.grad(lambda s: loop(s, x).sum())(stack)
  jax.tree.map(close, got, want)
  close(nnx.jit(forward)(x, stack), loop(stack, x))


def test_layers_created_inside_are_stacked():
  rngs = nnx.Rngs(0)
  rngs_twin = nnx.Rngs(0)

  def create(rngs, scale):
    layer = nnx.Linear(2, 3, rngs=rngs)
    layer.kernel[...] *= scale
    return rngs, layer

  last, stack = nnx.scan(create)(rngs, jnp.array([1.0, 2.0]))
  want = [create(rngs_twin, s)[1] for s in (1.0, 2.0)]
  assert last is rngs and type(stack) is nnx.Linear and stack.kernel.is_hijax
  close(stack.kernel[...], [m.kernel[...] for m in want])
  assert int(rngs.default.count) == int(rngs_twin.default.count)


def test_what_an_object_by_argument_gains_is_the_last_step_s():
  m = Node(v=nnx.Variable(0.0))

  def step(c, x, m):
    m.sow(nnx.Intermediate, "seen", x)
    m.last = nnx.Variable(x)
    return c, x

  nnx.scan(step, in_axes=(nnx.Carry, 0, None))(0.0, jnp.arange(3.0), m)
  assert float(m.last) == 2.0
  close(nnx.pop(m, nnx.Intermediate)["seen"][0], 2.0)


@pytest.mark.parametrize("axes", [0, nnx.StateAxes({nnx.Param: 0, ...: 0})], ids=["axis", "filter"])
@pytest.mark.parametrize("reverse", [False, True])
def test_what_a_sliced_object_gains_is_stacked(axes, reverse):
  layers = nnx.vmap(lambda rngs: Node(w=nnx.Param(rngs.normal(()))))(nnx.Rngs(0).split(3))

  def step(x, layer):
    layer.sow(nnx.Intermediate, "seen", x)
    layer.last = nnx.Variable(x * 2)
    return x * layer.w

  run = nnx.scan(step, in_axes=(nnx.Carry, axes), out_axes=nnx.Carry, reverse=reverse)
  run(1.0, layers)
  w = layers.w[...]
  want = [w[1] * w[2], w[2], 1.0] if reverse else [1.0, w[0], w[0] * w[1]]
  close(layers.last[...], 2 * jnp.array(want))
  (seen,) = nnx.pop(layers, nnx.Intermediate)["seen"]
  close(seen, want)


@pytest.mark.parametrize("outer", [lambda f: f, jax.jit, nnx.jit], ids=["eager", "jax", "nnx"])
def test_state_by_closure_is_carried(outer):
  m = Node(count=nnx.Variable(0), stat=nnx.BatchStat(1.0))
  rngs = nnx.Rngs(0)

  def step(c, x):
    m.count[...] += 1
    m.stat[...] = m.stat * 2 + c
    return c + x + m.count, jax.random.normal(rngs())

  c, noise = outer(lambda xs: nnx.scan(step)(0.0, xs))(jnp.ones(3))
  assert float(c) == 9.0 and int(m.count) == 3
  assert float(m.stat) == ((1 * 2 + 0) * 2 + 2) * 2 + 5
  twin = nnx.Rngs(0)
  close(noise, [jax.random.normal(twin()) for _ in range(3)])
  assert int(rngs.default.count) == 3


def test_gradients_flow_through_the_carry_and_to_parameters_by_closure():
  w = nnx.Param(2.0)

  def loss(w):
    return nnx.scan(lambda c, x: (c * w[...] + x, c))(1.0, jnp.array([1.0, 2.0]))[0]

  assert float(nnx.grad(loss)(w)) == 2 * 2.0 + 1.0
  close(jax.grad(lambda c: nnx.scan(lambda c, x: (c * w + x, c))(c, jnp.ones(2))[0])(1.0), 4.0)


def test_batch_norm_and_dropout_in_a_stack():
  def create(rngs):
    return Node(norm=nnx.BatchNorm(2, momentum=0.5, rngs=rngs), drop=nnx.Dropout(0.5, rngs=rngs))

  stack = nnx.vmap(create)(nnx.Rngs(0).split(3))
  separate = [nnx.map(lambda p, v, i=i: v.copy(v[...][i]), stack) for i in range(3)]
  x = jnp.arange(8.0).reshape(4, 2)
  y = nnx.scan(lambda x, m: m.drop(m.norm(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, stack)
  for m in separate:
    x = m.drop(m.norm(x))
  np.testing.assert_allclose(y, x, rtol=1e-5)
  close(stack.norm.mean[...], [m.norm.mean[...] for m in separate])
  close(stack.drop.rngs.count[...], [1, 1, 1])


def test_under_vmap_and_grad_together():
  w = nnx.Param(jnp.array([1.0, 2.0]))
  count = nnx.Variable(jnp.zeros(2, jnp.int32))

  def one(w, count, x):
    def step(c, _):
      count[...] += 1
      return c * w * count, None

    return nnx.scan(step, length=2)(x, None)[0]

  run = lambda w, count: nnx.vmap(one)(w, count, jnp.ones(2)).sum()
  grads = nnx.grad(run)(w, count)
  close(grads[...], 2 * 2 * w[...])  # x * w * 1 * w * 2
  close(count[...], [2, 2])


# while_loop
@STORAGE
def test_the_condition_reads_what_the_body_writes(hijax):
  m = Node(n=nnx.Variable(0, is_hijax=hijax), limit=nnx.Variable(5, is_hijax=hijax))

  def body(carry):
    m, total = carry
    m.n += 2
    return m, total + m.n

  last, total = nnx.while_loop(lambda c: c[0].n < c[0].limit, body, (m, 0))
  assert last is m and int(m.n) == 6 and int(total) == 12


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit, nnx.jit], ids=["eager", "jax", "nnx"])
def test_the_condition_reads_by_closure_what_the_body_writes_by_closure(jit):
  n = nnx.Variable(0)

  def body(x):
    n[...] += 1
    return x * 2

  x = jit(lambda x: nnx.while_loop(lambda _: n < 4, body, x))(1.0)
  assert float(x) == 16.0 and int(n) == 4


def test_the_condition_may_return_a_variable():
  m = Node(alive=nnx.Variable(True), n=nnx.Variable(0))

  def body(m):
    m.n += 1
    m.alive[...] = m.n < 3
    return m

  nnx.while_loop(lambda m: m.alive, body, m)
  assert int(m.n) == 3 and not bool(m.alive)


def test_a_condition_that_is_false_at_once():
  m = Node(n=nnx.Variable(7))
  nnx.while_loop(lambda m: m.n < 3, lambda m: (m.n.set_value(0), m)[1], m)
  assert int(m.n) == 7


def test_while_loop_under_vmap_stops_for_each_by_itself():
  n = nnx.Variable(jnp.array([0, 5, 8]))

  def run(n):
    def body(n):
      n[...] += 3
      return n

    nnx.while_loop(lambda n: n < 7, body, n)

  nnx.vmap(run)(n)
  assert n[...].tolist() == [9, 8, 8]


def test_the_condition_must_not_write():
  n = nnx.Variable(0)

  def condition(_):
    n[...] += 1
    return n < 3

  with pytest.raises(TreeMismatchError, match="must not write state"):
    nnx.while_loop(condition, lambda x: x, 0)
  assert int(n) == 0


# fori_loop
@STORAGE
def test_fori_loop_counts_from_lower_to_upper(hijax):
  seen = nnx.Variable(jnp.zeros(6), is_hijax=hijax)

  def body(i, seen):
    seen[i] = seen[i - 1] + i
    return seen

  assert nnx.fori_loop(2, 5, body, seen) is seen
  close(seen[...], [0, 0, 2, 5, 9, 0])


def test_fori_loop_with_traced_bounds_and_variables_as_bounds():
  total = nnx.Variable(0)

  def body(i, x):
    total[...] += i
    return x

  jax.jit(lambda n: nnx.fori_loop(0, n, body, 0.0))(4)
  assert int(total) == 6
  nnx.fori_loop(nnx.Variable(1), nnx.Variable(3), body, 0.0)
  assert int(total) == 9
  nnx.fori_loop(3, 1, body, 0.0)
  assert int(total) == 9


def test_fori_loop_with_static_bounds_can_be_differentiated():
  m = Node(w=nnx.Param(2.0), n=nnx.Variable(0))

  def loss(m):
    def body(i, carry):
      m, x = carry
      m.n += 1
      return m, x * m.w

    return nnx.fori_loop(0, 3, body, (m, 1.0))[1]

  assert float(nnx.grad(loss)(m)["w"]) == 12.0
  assert int(m.n) == 3


def test_nested_loops():
  m = Node(n=nnx.Variable(0))

  def outer(i, m):
    def inner(c, x):
      m.n += 1
      return c + 1, x

    nnx.scan(inner)(0, jnp.arange(2))
    return nnx.while_loop(lambda m: m.n % 3 != 0, lambda m: (m.n.set_value(m.n + 1), m)[1], m)

  nnx.fori_loop(0, 3, outer, m)
  assert int(m.n) == 9


def test_models_without_variables():
  m = Node(a=jnp.array(0.0), k=2)

  def step(i, m):
    m.a = m.a + m.k
    return m

  assert float(nnx.fori_loop(0, 4, step, m).a) == 8.0


def test_array_attributes_may_move_in_a_carry():
  def step(m):
    m.a, m.b = m.b, m.a + m.b
    return m

  class Fibonacci(nnx.Module):
    def __init__(self):
      self.a, self.b = jnp.array(0.0), jnp.array(1.0)

  m = Fibonacci()
  out = nnx.scan(step, in_axes=(nnx.Carry,), out_axes=nnx.Carry, length=5)(m)
  assert out is m
  assert (float(m.a), float(m.b)) == (5.0, 8.0)
