"""Slices of a scan that a step writes in part: the stacked array is updated in place."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import DifferentiatedWriteError
from refax.transforms.loops import Scan

N, ROOM, SIZE = 3, 8, 4


class Memory(nnx.Module):
  """A slice of a memory, a count of its rows, and a weight."""

  def __init__(self, dtype, key):
    self.rows = nnx.Cache(jax.random.normal(key, (ROOM, SIZE)).astype(dtype))
    self.used = nnx.Variable(jnp.array(1))
    self.weight = nnx.Param(jax.random.normal(jax.random.fold_in(key, 1), (SIZE, SIZE)) / 4)


def memories(hijax=True, dtype=jnp.float32, count=N):
  with nnx.use_hijax(hijax):
    return nnx.vmap(functools.partial(Memory, dtype))(jax.random.split(jax.random.key(0), count))


def put(m, x, at=None):
  """Write one row."""
  at = m.used[...] if at is None else at
  row = x[None].astype(m.rows.dtype)
  m.rows[...] = jax.lax.dynamic_update_slice(m.rows[...], row, (at, 0))


def once(x, m):
  put(m, x @ m.weight)
  m.used += 1
  return jnp.tanh(m.rows[...].sum(0)).astype(x.dtype)


def twice(x, m):
  put(m, x @ m.weight)
  put(m, x, ROOM)  # past the end: it goes where there is room, as in JAX
  return x + m.rows[...].mean(0).astype(x.dtype)


def reads_what_was_before(x, m):
  old = m.rows[...]
  first = jax.lax.dynamic_slice(old, (m.used[...], 1), (1, 2))
  put(m, x @ m.weight)
  return x + old.sum(0).astype(x.dtype) * first.sum().astype(x.dtype) - m.rows[1].astype(x.dtype)


def in_part_and_in_whole(x, m):
  put(m, x)
  m.rows[...] = m.rows[...] * 2
  return x + m.rows[...].sum(0).astype(x.dtype)


def in_whole_and_in_part(x, m):
  m.rows[...] = m.rows[...] * 2
  put(m, x)
  return x + m.rows[...].sum(0).astype(x.dtype)


def in_a_function(x, m):
  return jax.jit(once)(x, m)


def in_a_branch(x, m):
  nnx.cond(x[0] > -100, put, lambda m, x: None, m, x)
  return x + m.rows[...].sum(0).astype(x.dtype)


def hands_it_out(x, m):
  put(m, x)
  return x + 1, m.rows[...]


STEPS = [
  once,
  twice,
  reads_what_was_before,
  in_part_and_in_whole,
  in_whole_and_in_part,
  in_a_function,
  in_a_branch,
]
IN_PLACE = {once, twice, reads_what_was_before}
X = jnp.linspace(-1, 1, SIZE)


def layers(stack):
  """Each slice as a Module of its own."""
  take = lambda i: jax.tree.map(
    lambda v: v.copy(v[i]), stack, is_leaf=lambda v: isinstance(v, nnx.Variable)
  )
  return [take(i) for i in range(N)]


def assert_same(stack, parts, **tolerance):
  for name in ("rows", "used"):
    want = np.stack([np.asarray(getattr(m, name), np.float32) for m in parts])
    np.testing.assert_allclose(np.asarray(getattr(stack, name), np.float32), want, **tolerance)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, nnx.jit], ids=["eager", "jit", "nnx.jit"])
@pytest.mark.parametrize("step", STEPS)
def test_a_scan_equals_its_steps_one_after_the_other(step, wrap):
  stack = memories()
  parts = layers(stack)
  run = wrap(nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry))
  for _ in range(2):
    want = functools.reduce(step, parts, X)
    np.testing.assert_allclose(run(X, stack), want, rtol=1e-5, atol=1e-5)
  assert_same(stack, parts, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("options", [{"reverse": True}, {"unroll": 2}, {"unroll": True}])
def test_backwards_and_unrolled(step, options):
  stack = memories(hijax=False, dtype=jnp.bfloat16)
  parts = layers(stack)
  run = nnx.jit(nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, **options))
  want = functools.reduce(step, parts[::-1] if "reverse" in options else parts, X)
  np.testing.assert_allclose(run(X, stack), want, rtol=3e-2, atol=3e-2)
  assert_same(stack, parts, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("hijax", [True, False])
def test_a_slice_that_is_handed_out_is_stacked(hijax):
  stack = memories(hijax)
  before = stack.rows[...]
  run = nnx.scan(hands_it_out, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
  _, rows = nnx.jit(run)(X, stack)
  np.testing.assert_array_equal(rows, stack.rows[...])
  np.testing.assert_array_equal(rows, before.at[:, 1].set(X + jnp.arange(N)[:, None]))


@pytest.mark.parametrize("hijax", [True, False])
@pytest.mark.parametrize("step", [once, twice, reads_what_was_before])
def test_gradients_through_the_memory(step, hijax):
  stack = memories(hijax)
  parts = nnx.List(layers(stack))
  run = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
  grad = lambda f, m: nnx.jit(nnx.grad(lambda m: (f(m) ** 2).sum(), through=nnx.Cache))(m)
  got = grad(lambda m: run(X, m), stack)["weight"][...]
  want = grad(lambda parts: functools.reduce(step, parts, X), parts)
  want = jnp.stack([want[i]["weight"][...] for i in range(N)])
  assert float(jnp.abs(want).max()) > 1e-3
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hijax", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_an_ensemble(step, hijax):
  with nnx.use_hijax(hijax):
    build = lambda key: nnx.vmap(functools.partial(Memory, jnp.float32))(jax.random.split(key, N))
    stacks = nnx.vmap(build)(jax.random.split(jax.random.key(1), 2))
  each = [
    jax.tree.map(lambda v, i=i: v.copy(v[i]), stacks, is_leaf=lambda v: isinstance(v, nnx.Variable))
    for i in range(2)
  ]
  run = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
  got = nnx.vmap(run, in_axes=(None, 0))(X, stacks)
  want = jnp.stack([run(X, m) for m in each])
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  rows = jnp.stack([m.rows[...] for m in each])
  np.testing.assert_allclose(stacks.rows[...], rows, rtol=1e-4, atol=1e-5)


def test_a_write_of_what_is_differentiated_is_refused_as_ever():
  run = nnx.scan(once, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
  with pytest.raises(DifferentiatedWriteError):
    nnx.grad(lambda m: run(X, m).sum())(memories())


@pytest.mark.parametrize("hijax", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_only_what_is_written_in_part_alone_is_carried(step, hijax):
  stack = memories(hijax)
  call = Scan(step, (X, stack), {}, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, length=None)
  assert bool(call.in_place) == (step in IN_PLACE)


@pytest.mark.parametrize("hijax", [True, False])
def test_nothing_as_large_as_the_memory_is_copied(hijax):
  stack = memories(hijax, count=5)
  run = nnx.scan(once, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
  jit = nnx.jit if hijax else functools.partial(jax.jit, donate_argnums=1)
  text = jit(lambda x, m: (run(x, m), m)).lower(X, stack).compile().as_text()
  assert re.findall(rf"= f32\[5,{ROOM},{SIZE}\]\S* (?:copy|dynamic-slice|slice)\(.*", text) == []
