"""The fast path of nnx.jit is not to be told from the general one, but by its speed."""

import collections
import dataclasses
import functools
import gc
import os
import re
import signal
import sys
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import _jax, nnx, testing
from refax.transforms.fast import FastCalls, steady

pytestmark = pytest.mark.skipif(
  not _jax.no_trace_active(), reason="the fast path needs the private API, which is switched off"
)


class Net(nnx.Module):
  def __init__(self, seed=0):
    self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(seed))
    self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(seed))
    self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(seed))
    self.calls = nnx.Variable(0)

  def __call__(self, x):
    self.calls += 1
    return self.dropout(self.norm(self.linear(x)))


X = jax.random.normal(jax.random.key(0), (4, 3))


def counted(f, most=4):
  """`nnx.jit(f)`, and the function inside, which counts its traces and may have so many."""
  traced = testing.assert_max_traces(f, most)
  return nnx.jit(traced), traced


def is_fast(jitted, *args):
  return jitted._fast.find(args) is not None


def buffer(variable):
  return _jax.peek_cell(variable.get_raw_value())


def assert_same_state(a, b):
  assert nnx.graphdef(a) == nnx.graphdef(b)
  for x, y in zip(jax.tree.leaves(nnx.to_lojax(a)), jax.tree.leaves(nnx.to_lojax(b)), strict=True):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_array_equal(x, y)


def test_many_steps_equal_those_of_plain_jit_and_are_traced_once():
  net, twin = Net(), Net()
  step, traced = counted(lambda net, x: net(x).sum())
  plain = jax.jit(lambda net, x: net(x).sum())
  for _ in range(5):
    np.testing.assert_array_equal(step(net, X), plain(twin, X))
  assert is_fast(step, net, X)
  assert_same_state(net, twin)
  assert traced.traces == 1


def test_state_that_is_written_is_donated_and_state_that_is_read_is_kept():
  net = Net()
  step, _ = counted(lambda net, x: net(x))
  step(net, X)
  written, read = buffer(net.calls), buffer(net.linear.kernel)
  step(net, X)
  assert written.is_deleted()
  assert not read.is_deleted()
  assert buffer(net.linear.kernel) is read


def test_state_that_is_not_touched_is_not_passed():
  net, dropout = Net(), nnx.Dropout(0.5, rngs=nnx.Rngs(0))
  dropout.eval()
  step, _ = counted(lambda net, dropout, x: net(dropout(x)))
  for _ in range(3):
    step(net, dropout, X)
  assert is_fast(step, net, dropout, X)
  (compiled,) = step._fast._compiled.values()
  touched = len({*compiled.written, *compiled.read})
  assert touched == len(jax.tree.leaves(net))  # the keys and counts of the dropout are left alone


def test_the_last_call_is_found_again_and_only_that():
  net, other = Net(), Net()
  step, traced = counted(lambda net, x: net(x).sum())
  twin = Net()
  want = [float(jax.jit(lambda net, x: net(x).sum())(twin, X)) for _ in range(4)]
  assert [float(step(net, X)) for _ in range(2)] == want[:2]
  calls = FastCalls()
  calls.last = (*step._fast.last[:-1], lambda args: "at once")
  way = steady(calls, lambda *_: "general")
  assert way(net, X) == way(net, X + 1) == "at once"
  for args in ((other, X), (net, X[:1]), (net, np.asarray(X)), (net,), (net, X, X), (net, None)):
    assert way(*args) == "general"
  assert way(net, x=X) == "general"
  in_a_trace = []
  jax.eval_shape(lambda: in_a_trace.append(way(net, X)))
  assert in_a_trace == ["general"]
  assert float(step(other, X)) == want[0] and float(step(net, x=X)) == want[2]
  assert float(step(net, X)) == want[3]
  net.linear.extra = 1
  assert way(net, X) == "general"
  assert traced.traces == 2


def test_an_array_that_was_read_before_a_step_stays_as_it_was():
  v = nnx.Variable(jnp.zeros(1000))
  step, _ = counted(lambda v: v.set_value(v + 1))
  before = v[...]
  for _ in range(3):
    step(v)
  np.testing.assert_array_equal(before, np.zeros(1000))
  np.testing.assert_array_equal(v, np.full(1000, 3.0))


def test_what_goes_in_or_comes_out_never_shares_a_buffer_with_a_cell():
  a, b, x = nnx.Variable(jnp.zeros(1000)), nnx.Variable(jnp.ones(1000)), jnp.arange(1000.0)
  constant = jnp.full(1000, 7.0)

  def write_both(a, b, x):
    a[...] = x
    b[...] = x

  def swap(a, b):
    a[...], b[...] = b[...], a[...]

  def store(a, b):
    a[...] = constant
    b[...] = constant

  def old(a):
    value = a[...]
    a[...] = value + 1
    return value

  increment, _ = counted(lambda a: a.set_value(a + 1))
  read, _ = counted(lambda a: a[...])
  write_both, swap, store, old = (nnx.jit(f) for f in (write_both, swap, store, old))
  for _ in range(2):
    write_both(a, b, x)
    increment(a)
    np.testing.assert_array_equal(b, x)
    swap(a, b)
    increment(b)
    np.testing.assert_array_equal(a, x)
    kept, before = read(a), old(a)
    increment(a)
    np.testing.assert_array_equal(kept, x)
    np.testing.assert_array_equal(before, x)
    store(a, b)
    increment(a)
    np.testing.assert_array_equal(b, constant)
  np.testing.assert_array_equal(x, np.arange(1000.0))
  np.testing.assert_array_equal(constant, np.full(1000, 7.0))


def test_a_structural_change_is_seen_and_back_and_forth_compiles_twice():
  jax.clear_caches()  # it keeps 8192 executables in all, which a run of all tests fills
  net = Net()
  step, traced = counted(lambda net, x: net(x))
  assert np.isin(0.0, step(net, X))
  for _ in range(3):
    net.eval()
    assert not np.isin(0.0, step(net, X))
    net.train()
    assert np.isin(0.0, step(net, X))
  assert traced.traces == 2
  compiled = [c for c in step._fast._compiled.values() if c is not None]
  assert [c.call._cache_size() for c in compiled] == [1, 1]
  net.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  net.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
  assert step(net, X).shape == (4, 2)
  net.calls = nnx.Variable(10)
  step(net, X)
  assert int(net.calls) == 11


def test_a_replaced_cell_and_changed_metadata_are_seen():
  v = nnx.Variable(1.0, scale=2.0)
  step, traced = counted(lambda v: v * v.scale)
  assert float(step(v)) == float(step(v)) == 2.0
  v.set_raw_value(nnx.Variable(5.0).get_raw_value())
  assert float(step(v)) == 10.0
  v.set_metadata(scale=3.0)
  assert float(step(v)) == 15.0
  assert traced.traces == 2


def test_keywords_and_trees_of_arrays_are_ordinary():
  net, other = Net(), nnx.Variable(0.0)
  step, traced = counted(lambda net, batch, *, other, scale: (
    other.set_value(other + scale), {"y": net(batch["x"]) * scale, "pair": batch["pair"]}
  )[1])  # fmt: skip
  batch = {"x": X, "pair": (jnp.ones(2), np.zeros(3))}
  for i in range(1, 4):
    out = step(net, batch, scale=2.0, other=other)
    assert sorted(out) == ["pair", "y"]
    assert out["y"].shape == (4, 3)
    assert [p.shape for p in out["pair"]] == [(2,), (3,)]
    assert float(other) == 2.0 * i
    assert int(net.calls) == i
  find = step._fast.find
  assert find((net, batch, 2.0, other), ("scale", "other")) is not None
  assert find((net, {"x": X}, 2.0, other), ("scale", "other")) is None
  assert find((net, batch, other, 2.0), ("scale", "other")) is None
  assert find((net, batch, other, 2.0), ("other", "scale")) is None  # not in this order, yet
  step(net, batch, other=other, scale=2.0)
  assert find((net, batch, other, 2.0), ("other", "scale")) is not None
  assert traced.traces == 1
  nested = nnx.jit(lambda trees: trees["net"](X))
  for i in (5, 6):
    assert nested({"net": net}).shape == (4, 3)
    assert int(net.calls) == i
  assert nested._fast.find(({"net": net},)) is not None
  assert nested._fast.find(({"net": Net()},)) is None
  both = nnx.jit(lambda net, trees: net(trees["net"](X)))
  for i in (8, 10):
    assert both(net, {"net": net}).shape == (4, 3)
    assert int(net.calls) == i
  assert both._fast.find((net, {"net": net})) is not None
  assert both._fast.find((net, {"net": Net()})) is None


def test_other_shapes_dtypes_objects_and_settings_each_get_their_own_call():
  step, traced = counted(lambda v, x: (v.set_value(v + 1), v * x)[1])
  v, w = nnx.Variable(1.0), nnx.Variable(2.0)
  for _ in range(2):
    assert step(v, jnp.ones(2)).shape == (2,)
    assert step(v, jnp.ones(3)).shape == (3,)
    assert step(v, 2).shape == ()
    assert step(w, jnp.ones(2)).shape == (2,)
    assert step(v, np.ones(2, np.int32)).dtype == jnp.float32
  assert float(v) == 9.0
  assert float(w) == 4.0
  assert traced.traces == 4
  make, _ = counted(lambda v: nnx.Variable(v[...]).is_hijax)
  assert make(v)
  with nnx.use_hijax(False):
    assert not make(v)


def test_a_new_object_at_the_address_of_an_old_one_is_not_taken_for_it():
  step, _ = counted(lambda v: v.set_value(v + 1))
  for _ in range(50):
    v = nnx.Variable(0)
    step(v)
    step(v)
    assert int(v) == 2
    del v
  gc.collect()
  assert len(step._fast._entries) <= 1


def test_a_model_is_not_kept_alive():
  net = Net()
  step, _ = counted(lambda net, x: net(x))
  step(net, X)
  step(net, X)
  alive = weakref.ref(net)
  del net
  gc.collect()
  assert alive() is None
  assert step._fast._entries == {}


def test_another_context_traces_again_and_is_right():
  v = nnx.Variable(jnp.eye(3))
  step, traced = counted(lambda v, x: x @ v[...])
  step(v, X)
  with jax.default_matmul_precision("highest"):
    np.testing.assert_allclose(step(v, X), X, rtol=1e-6)
    np.testing.assert_allclose(step(v, X), X, rtol=1e-6)
  np.testing.assert_allclose(step(v, X), X, rtol=1e-6)
  assert traced.traces == 2


def test_inside_a_trace_and_without_jit_it_goes_the_general_way():
  v = nnx.Variable(0.0)
  step, _ = counted(lambda v, x: (v.set_value(v + x), v[...])[1], most=5)
  step(v, 1.0)
  assert float(jax.jit(lambda v: step(v, 2.0))(v)) == 3.0
  np.testing.assert_allclose(
    jax.lax.scan(lambda _, x: (None, step(v, x)), None, jnp.ones(3))[1], [4.0, 5.0, 6.0]
  )
  with jax.disable_jit():
    assert float(step(v, 1.0)) == 7.0
    assert float(step(v, 1.0)) == 8.0
  assert float(step(v, 1.0)) == 9.0


@pytest.mark.parametrize("kind", ["callback", "closure", "lojax", "keyword", "returns the model"])
def test_what_is_out_of_the_ordinary_is_right_too(kind):
  seen, v, other = [], nnx.Variable(0.0), nnx.Variable(10.0)
  if kind == "lojax":
    v = nnx.to_lojax(v)

  def f(v, x=1.0):
    v[...] += x
    if kind == "callback":
      jax.debug.callback(lambda y: seen.append(float(y)), v[...], ordered=True)
    if kind == "closure":
      other[...] += 1.0
    return v if kind == "returns the model" else v[...]

  step = nnx.jit(f)
  for i in range(1, 4):
    out = step(v, x=1.0) if kind == "keyword" else step(v)
    assert float(out) == float(v) == i
    assert (out is v) == (kind == "returns the model")
  jax.effects_barrier()
  assert seen == ([1.0, 2.0, 3.0] if kind == "callback" else [])
  assert float(other) == (13.0 if kind == "closure" else 10.0)


def test_an_error_while_tracing_leaves_the_state_and_the_next_call_works():
  v = nnx.Variable(jnp.zeros(3))

  def f(v, x):
    v[...] = v + 1
    return v @ x

  step = nnx.jit(f)
  step(v, jnp.ones(3))
  with pytest.raises(TypeError):
    step(v, jnp.ones(4))
  assert v[...].tolist() == [1.0, 1.0, 1.0]
  assert float(step(v, jnp.ones(3))) == 6.0


def test_threads_may_read_one_model_at_once():
  net = Net()
  net.eval()
  predict = nnx.jit(lambda net, x: net.norm(net.linear(x)))
  want, wrong = predict(net, X), []

  def work():
    for _ in range(100):
      if not np.array_equal(predict(net, X), want):
        wrong.append(True)

  threads = [threading.Thread(target=work) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert wrong == []


def test_a_writer_beside_readers_works_or_raises_and_nothing_is_garbage():
  v = nnx.Variable(jnp.zeros(1000))
  write = nnx.jit(lambda v: v.set_value(v + 1))
  read = nnx.jit(lambda v: v + 0)
  write(v)
  read(v)
  wrong = []

  def reader():
    for _ in range(200):
      try:
        value = np.asarray(read(v))
      except (RuntimeError, ValueError):
        continue  # the buffer was donated in between: said aloud
      if not (value == value[0]).all() or value[0] != round(float(value[0])):
        wrong.append(value)

  def writer():
    for _ in range(200):
      write(v)

  threads = [threading.Thread(target=t) for t in (reader, reader, writer)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert wrong == []
  np.testing.assert_array_equal(v, np.full(1000, 201.0))


@pytest.mark.parametrize(
  "args, kwargs",
  [
    (lambda m: (m, {"x": X}), {}),
    (lambda m: (m, None, {}), {}),
    (lambda m: ([m], X), {}),
    (lambda m: (m,), {"x": X, "mask": None}),
    (lambda m: (m, nnx.state(nnx.to_lojax(m))), {}),
    (lambda m: (m, np.float32(1)), {"x": {"y": (X, X)}}),
  ],
)
def test_a_call_with_keywords_or_containers_is_known_at_once(args, kwargs, monkeypatch):
  model = nnx.Dict(count=nnx.Variable(jnp.zeros(3)))

  def step(first, *rest, **named):
    model = first if isinstance(first, nnx.Dict) else first[0]
    model.count[...] += 1.0

  jitted = nnx.jit(step)
  for _ in range(3):
    jitted(*args(model), **kwargs)

  def searched(*_, **__):
    raise AssertionError("it was looked for among the entries")

  monkeypatch.setattr(FastCalls, "find", searched)
  jitted(*args(model), **kwargs)
  assert model.count[...].tolist() == [4.0] * 3
  with pytest.raises(AssertionError, match="looked for"):
    jitted(*args(model), **{**kwargs, "other": X})
  with pytest.raises(AssertionError, match="looked for"):
    jitted(*args(model), X)


ONE = jnp.float32(1)


def test_keywords_in_another_order_are_not_mixed_up():
  step = nnx.jit(lambda a, b, c=0.0: a - 2 * b + c)
  for _ in range(3):
    assert float(step(1.0, b=ONE, c=5.0)) == 4.0
    assert float(step(1.0, c=5.0, b=ONE)) == 4.0
    assert float(step(a=ONE, b=1.0)) == -1.0
    assert float(step(b=1.0, a=ONE)) == -1.0
    assert float(step(1.0, ONE)) == -1.0


def _first_leaf(x):
  return jax.tree.leaves(x)[0]


@pytest.mark.parametrize(
  "where", ["argument", "container", "attribute", "lojax", "State", "State of Variables"]
)
def test_an_array_that_is_committed_is_another_call_and_ctrl_c_comes_when_it_has_ended(where):
  """JAX compiles for it in Python, between whose lines the buffers of the model would be lost."""

  @nnx.jit
  def step(model, x):
    model.total[...] += _first_leaf(x).sum() + model.table.sum() + model.lojax[...].sum()

  on_device = jax.device_put(X, jax.devices()[0])
  assert on_device.committed and not X.committed
  one = float(X.sum())

  def batch_of(x):
    state = lambda x: nnx.State({"x": {"y": x}})
    variables = state(nnx.Variable(x, is_hijax=False))
    return {"container": {"x": x}, "State": state(x), "State of Variables": variables}.get(where, x)

  def interrupted_at(event):
    """How many steps the model has made, one with Ctrl-C; how many events there are in JAX."""
    step.clear_cache()
    zero = jnp.zeros_like(X)
    model = nnx.Dict(
      total=nnx.Variable(0.0), table=nnx.data(zero), lojax=nnx.Variable(zero, is_hijax=False)
    )
    for _ in range(3):
      step(model, batch_of(X))
    if where == "attribute":
      model.table = on_device * 0
    if where == "lojax":
      model.lojax[...] = on_device * 0
    is_inside = where in ("attribute", "lojax")
    batch, count = batch_of(X if is_inside else on_device), 0

    def profile(frame, kind, arg):
      nonlocal count
      if f"{os.sep}jax{os.sep}" in frame.f_code.co_filename:
        count += 1
        if count == event:
          signal.raise_signal(signal.SIGINT)

    sys.setprofile(profile)
    try:
      step(model, batch)
    except KeyboardInterrupt:
      pass
    finally:
      sys.setprofile(None)
    return round(float(model.total) / one), count

  steps, last = interrupted_at(-1)
  assert steps == 4 and last > 100
  assert {interrupted_at(event)[0] for event in range(last - 40, last + 1, 8)} <= {3, 4}


def test_containers_of_arrays_go_to_jax_as_they_are():
  seen = []

  @nnx.jit
  def step(v, batch, pair, empty, *, extra):
    seen.append(jax.tree.structure((batch, pair, empty, extra)))
    v[...] += batch["x"].sum() * pair[1]
    return {"x": batch["x"], "y": batch["n"][0], "extra": extra}, v[...]

  v, total = nnx.Variable(0.0), 0.0
  batches = [{"x": X * i, "n": [i, None]} for i in range(1, 5)]
  for i, batch in enumerate(batches, 1):
    out, _ = step(v, batch, (np.float32(9), 2.0), {}, extra=(np.ones(2), (X,)))
    total += 2 * float(X.sum()) * i
    np.testing.assert_allclose(float(v), total, rtol=1e-6)
    np.testing.assert_array_equal(out["x"], batch["x"])
    assert out["y"] == i and len(out["extra"]) == 2
  assert len(seen) == 1
  found = step._fast.find
  numbers = (np.float32(9), 2.0)
  call = lambda *, n=(1, None), pair=numbers, empty=(), x=X: found(
    (v, {"x": x, "n": list(n)}, pair, dict(empty), (np.ones(2), (X,))), ("extra",)
  )
  assert call() is not None
  for other in ({"n": (1.0, None)}, {"n": (1, 1)}, {"pair": (np.float64(9), 2.0)}, {"x": X[:1]},
                {"pair": [np.float32(9), 2.0]}, {"empty": {"a": X}}, {"x": v}, {"x": "text"},
                {"x": jax.device_put(X, jax.devices()[0])}):  # fmt: skip
    assert call(**other) is None, other
  with pytest.raises(OverflowError, match=re.escape("batch.n[0]")):
    step(v, {"x": X, "n": [2**40, None]}, (np.float32(9), 2.0), {}, extra=(np.ones(2), (X,)))
  np.testing.assert_allclose(float(v), total, rtol=1e-6)


def test_containers_with_objects_with_odd_keys_and_of_other_classes_are_right_too():
  class Odd(str):
    __slots__ = ()

  Pair = collections.namedtuple("Pair", "a b")
  v, w = nnx.Variable(0.0), nnx.Variable(1.0, is_hijax=False)
  for batch in ({"v": v, "x": X}, {Odd("x"): X}, Pair(X, None), [w, X], {"x": X, "y": (w,)}):
    step = nnx.jit(lambda v, batch: (v.set_value(v + 1), batch)[1])
    start = float(v)
    for i in range(4):
      out = step(v, batch)
      assert float(v) == start + i + 1
      assert jax.tree.structure(out) == jax.tree.structure(batch)
      np.testing.assert_array_equal(jax.tree.leaves(out)[-1], jax.tree.leaves(batch)[-1])


def test_a_container_that_may_be_overwritten_or_is_lowered():
  step = nnx.jit(lambda v, batch: (v.set_value(v + 1), batch["x"] + 1)[1], donate_argnames="batch")
  v = nnx.Variable(0.0)
  for _ in range(3):
    x = X + 0
    step(v, {"x": x})
    assert x.is_deleted()
  plain = nnx.jit(lambda v, batch: (v.set_value(v + 1), batch["x"] + 1)[1])
  ahead = plain.lower(v, {"x": X}).compile()
  np.testing.assert_array_equal(ahead(v, {"x": X}), X + 1)
  np.testing.assert_array_equal(plain(v, {"x": X}), X + 1)
  assert float(v) == 5.0


def test_a_state_of_variables_is_compared_with_the_one_before():
  step = nnx.jit(lambda v, grads: (v.set_value(v + grads["a"]["b"][...]), grads)[1])
  v = nnx.Variable(jnp.zeros(3))
  grads = lambda cls=nnx.Param, x=1.0, **options: nnx.State(
    {"a": {"b": cls(jnp.full(3, x), is_hijax=False, **options)}, "c": cls(x, is_hijax=False)}
  )
  for i in range(1, 5):
    out = step(v, grads())  # made anew: other definitions and shardings, and equal ones
    assert v[...].tolist() == [i] * 3
    assert out["a"]["b"][...].tolist() == [1.0] * 3
  (compiled,) = step._fast._compiled.values()
  state = out
  for _ in range(3):
    state = step(v, state)
  assert [compiled] == list(step._fast._compiled.values())
  assert v[...].tolist() == [7.0] * 3
  find = lambda state: step._fast.find((v, state))
  assert find(grads()) is not None
  others = [
    grads(nnx.BatchStat), grads(sharding_names=("x",)), grads(x=jnp.full(3, 1, jnp.bfloat16)),
    nnx.State({"a": {"b": grads()["c"]}, "c": grads()["c"]}), nnx.State({"a": grads()["a"]}),
    nnx.State({"a": {"b": grads()["a"]["b"]}, "d": grads()["c"]}),
    nnx.State({"a": grads()["a"], "c": jnp.float32(1)}),
  ]  # fmt: skip
  key = nnx.Variable(jax.random.key(0), is_hijax=False)
  others += [nnx.State({"a": grads()["a"], "c": key})]
  for other in others:
    assert find(other) is None, other
  shared = grads()
  shared["c"] = shared["a"]["b"]
  assert find(shared) is None


@pytest.mark.parametrize("wrap", [lambda k: k, lambda k: {"key": k}, lambda k: [k, 1]])
def test_typed_keys_are_told_apart_by_shape_and_implementation(wrap):
  net, twin = Net(), Net()
  draw = lambda k: jax.random.uniform(k if k.ndim == 0 else k[1], (4, 3))
  step, traced = counted(lambda net, lot: net(draw(jax.tree.leaves(lot)[0])), most=3)
  keys = [jax.random.key(0), jax.random.key(1), jax.random.split(jax.random.key(0), 2)]
  keys.append(jax.random.key(0, impl="rbg"))
  for key in [*keys, *keys, *reversed(keys)]:
    np.testing.assert_allclose(step(net, wrap(key)), twin(draw(key)), rtol=1e-5, atol=1e-6)
    assert is_fast(step, net, wrap(key))
  assert traced.traces == 3


class Scaled(Net):
  def scaled(self, x, by=1.0):
    return by * self(x)


def test_bound_methods_and_partials_are_arguments_like_others():
  nets, twins = ([Scaled(0), Scaled(1)] for _ in range(2))
  step, traced = counted(lambda f, x: f(x) if callable(f) else f[0](x), most=8)
  lots = [
    lambda net: net.scaled,
    lambda net: functools.partial(Scaled.scaled, net),
    lambda net: functools.partial(Scaled.scaled, net, by=jnp.float32(2.0)),
    lambda net: functools.partial(Scaled.scaled, net, by=3.0),
    lambda net: functools.partial(Scaled.scaled, net, by=4.0),
    lambda net: [net],
    lambda net: functools.partial(net.scaled, by=5.0),
  ]
  for _ in range(3):
    for lot in lots:
      for net, twin in zip(nets, twins, strict=True):
        f = lot(twin)
        want = f(X) if callable(f) else f[0](X)
        np.testing.assert_allclose(step(lot(net), X), want, rtol=1e-5, atol=1e-6)
  assert all(is_fast(step, lot(net), X) for lot in lots[:6] for net in nets)
  assert traced.traces == len(lots)
  for net, twin in zip(nets, twins, strict=True):
    assert int(net.calls) == int(twin.calls) == 21


def test_a_method_of_a_model_keeps_no_model_alive():
  step, _ = counted(lambda f, x: f(x))
  net = Scaled()
  for _ in range(3):
    step(net.scaled, X), step(functools.partial(Scaled.scaled, net), X)
  gone = weakref.ref(net)
  del net
  gc.collect()
  assert gone() is None


class Tabled(nnx.Module):
  """What tells nobody that it changes: plain dicts and lists, and another library's pytree."""

  def __init__(self):
    self.table = nnx.data({"a": jnp.ones(3), "v": nnx.Variable(jnp.zeros(3)), "n": 1.0})
    self.pair = (nnx.data([nnx.Variable(jnp.ones(3))]), 2.0)
    self.rows = nnx.data([jnp.ones(3), {"inner": nnx.Variable(jnp.ones(()))}])
    self.point = nnx.data(Point(jnp.ones(3), nnx.Variable(jnp.ones(3))))

  def __call__(self, x):
    table, (inner, *more) = self.table, self.rows
    table["v"][...] += table["a"] * table["n"]
    total = x + table["v"][...] + inner + self.point.x * self.point.y[...]
    for row in more:
      row["inner"][...] += 1
      total = total + sum(v[...] for v in row.values())
    return total + sum(v[...] for k, v in table.items() if k not in ("a", "n"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Point:
  x: jax.Array
  y: nnx.Variable


def replaced_array(net):
  net.table["a"] = 2 * jnp.ones(3)


def replaced_number(net):
  net.table["n"] = 3.0


def new_variable(net):
  net.table["w"] = nnx.Variable(5 * jnp.ones(3))


def another_variable(net):
  net.table["v"] = nnx.Variable(7 * jnp.ones(3))


def longer_list(net):
  net.rows.append({"inner": nnx.Variable(jnp.ones(())), "more": nnx.Variable(jnp.ones(()))})


def deeper(net):
  net.rows[1]["more"] = nnx.Variable(4 * jnp.ones(()))


def another_field(net):
  net.point.y = nnx.Variable(9 * jnp.ones(3))


def another_container(net):
  net.table = nnx.data(dict(net.table, a=5 * jnp.ones(3)))


@pytest.mark.parametrize(
  "change",
  [
    replaced_array,
    replaced_number,
    new_variable,
    another_variable,
    longer_list,
    deeper,
    another_field,
    another_container,
  ],
)
def test_a_change_in_a_plain_container_of_a_model_is_seen(change):
  net, twin, x = Tabled(), Tabled(), jnp.ones(3)
  step, _ = counted(lambda net, x: net(x))
  close = lambda: np.testing.assert_allclose(step(net, x), twin(x), rtol=1e-6)
  close(), close()
  assert is_fast(step, net, x)
  change(net), change(twin)
  close(), close()
  assert is_fast(step, net, x)
  leaves = [jax.tree.leaves(nnx.to_lojax(m)) for m in (net, twin)]
  for a, b in zip(*leaves, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_what_was_sown_beside_a_plain_container_is_popped_with_what_came_into_it():
  net = Tabled()
  for i in range(4):
    net.sow(nnx.Intermediate, "seen", i)
    if i == 3:
      net.table["late"] = nnx.Intermediate(jnp.ones(()))
    popped = nnx.pop(net, nnx.Intermediate)
    assert len(jax.tree.leaves(popped)) == 1 + (i == 3)


@pytest.mark.parametrize(
  "tx",
  [
    optax.inject_hyperparams(optax.adam)(1e-2),
    optax.partition({"a": optax.adam(1e-2), "b": optax.sgd(1e-2)}, lambda p: _labels(p)),
    optax.chain(optax.clip(1.0), optax.masked(optax.adam(1e-2), True)),
    optax.MultiSteps(optax.adam(1e-2), 2),
    optax.contrib.schedule_free_sgd(1e-2),
    optax.apply_if_finite(optax.adam(1e-2), 3),
    optax.lion(1e-2),
  ],
)
def test_steps_of_any_optimizer_of_optax_are_known(tx):
  net = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)

  @nnx.jit
  def step(net, optimizer, x):
    grads = nnx.grad(lambda net: (net(x) ** 2).mean())(net)
    optimizer.update(net, grads)

  for _ in range(3):
    step(net, optimizer, X)
  assert is_fast(step, net, optimizer, X)


def _labels(params):
  label = lambda path, _: "a" if "bias" in str(path) else "b"
  return jax.tree_util.tree_map_with_path(label, params)
