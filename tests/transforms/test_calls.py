"""Every ordinary way to call nnx.jit: right, fast from the second call on, and nothing kept alive.

Right is what the same function does eagerly, without `jit`, to a model of its own.
"""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import _jax, nnx

pytestmark = pytest.mark.skipif(
  not _jax.no_trace_active(), reason="the fast path needs the private API, which is switched off"
)


class Net(nnx.Module):
  def __init__(self, hijax=True, seed=0):
    rngs = nnx.Rngs(seed)
    with nnx.use_hijax(hijax):
      self.layers = [nnx.Linear(3, 3, rngs=rngs) for _ in range(2)]
      self.norm = nnx.BatchNorm(3, rngs=rngs)
      self.calls = nnx.Variable(0)
      self.pair = nnx.Variable({"a": jnp.ones(2), "b": (jnp.zeros(()),)})
    self.table = jnp.arange(3.0)
    self.array = np.arange(3.0, dtype=np.float32)
    self.mode = "plus"

  def __call__(self, x):
    self.calls += 1
    for layer in self.layers:
      x = layer(x)
    y = self.norm(x) + self.table + self.array + self.pair["a"].sum()
    return y if self.mode == "plus" else -y


def x_of(i):
  return jax.random.normal(jax.random.key(i), (4, 3))


def is_variable(x):
  return isinstance(x, nnx.Variable)


def loss(net, x):
  return (net(x) ** 2).mean()


def none(net, x):
  net(x)


def new(net, x):
  made = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
  made.kernel[...] = made.kernel + net(x).mean()
  return made, {"net": net, "shared": (made, net.layers[0].kernel)}


def grads_in(net, grads, x):
  params = nnx.state(net, nnx.Param)
  nnx.update(net, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads, is_leaf=is_variable))
  return jax.tree.map(lambda g: g * 0.5 + x.mean(), grads)


def sow(net, x):
  net.sow(nnx.Intermediate, "seen", net(x))
  net.sow(nnx.Intermediate, "seen", x.sum())


def sets(net, x):
  net.table = net.table + x.sum(0)
  return net(x)


def swaps(net, x):
  net.layers[0], net.layers[1] = net.layers[1], net.layers[0]
  return net(x)


def made(net, x):
  net.first = nnx.Variable(x.sum()) if not hasattr(net, "first") else net.first
  return net.first + net(x).sum()


class Held:
  """An object of a plain class whose method is compiled."""

  def __init__(self, net):
    self.net = net

  def step(self, x):
    return self.net(x)


# name: (the function, its arguments from a model, the number of the call and the last result)
CALLS = {
  "a model and an array": (lambda net, x: net(x), lambda net, i, _: ((net, x_of(i)), {})),
  "returns None": (none, lambda net, i, _: ((net, x_of(i)), {})),
  "None and empty arguments": (
    lambda net, x, mask, options: net(x),
    lambda net, i, _: ((net, x_of(i), None, {}), {}),
  ),
  "a scalar in a dict": (
    lambda net, x, rates: net(x) * rates["rate"],
    lambda net, i, _: ((net, x_of(i), {"rate": np.float32(i)}), {}),
  ),
  "a Python number": (lambda net, x: net(x + 0.0), lambda net, i, _: ((net, x_of(i) * i), {})),
  "keywords in any order": (
    lambda net, *, x, y: net(x) + y,
    lambda net, i, _: ((net,), {"y": float(i), "x": x_of(i)}),
  ),
  "a dict and a list of Modules": (
    lambda nets, x: nets["a"](x) + nets["b"][0](x) + nets["b"][1],
    lambda net, i, _: (({"a": net.layers[0], "b": [net, jnp.ones(3) * i]}, x_of(i)), {}),
  ),
  "a Module twice, and a part of it": (
    lambda nets, layer, x: nets[0](x) + nets[1](x) + layer(x),
    lambda net, i, _: (((net, net), net.layers[1], x_of(i)), {}),
  ),
  "value_and_grad": (nnx.value_and_grad(loss), lambda net, i, _: ((net, x_of(i)), {})),
  "gradients in and out": (
    grads_in,
    lambda net, i, last: (
      (net, nnx.grad(loss)(net, x_of(0)) if last is None else last, x_of(i)),
      {},
    ),
  ),
  "split outside, merge inside": (
    lambda graphdef, state, x: nnx.merge(graphdef, state)(x),
    lambda net, i, _: ((*nnx.split(net), x_of(i)), {}),
  ),
  "a Variable by itself": (
    lambda v, x: (v.set_value(v + 1), x * v)[1],
    lambda net, i, _: ((net.calls, x_of(i)), {}),
  ),
  "returns the model and a part": (
    lambda net, x: (net, net.layers, net.calls, net(x)),
    lambda net, i, _: ((net, x_of(i)), {}),
  ),
  "returns a State": (
    lambda net, x: (nnx.state(net, nnx.Param), net(x)),
    lambda net, i, _: ((net, x_of(i)), {}),
  ),
  "returns new Modules": (new, lambda net, i, _: ((net, x_of(i)), {})),
  "sow": (sow, lambda net, i, _: ((net, x_of(i)), {})),
  "sets an attribute": (sets, lambda net, i, _: ((net, x_of(i)), {})),
  "adds an attribute once": (made, lambda net, i, _: ((net, x_of(i)), {})),
  "moves parts": (swaps, lambda net, i, _: ((net, x_of(i)), {})),
  "a raw Ref": (
    lambda net, ref, x: (ref.__setitem__(..., ref[...] + 1), net(x) * ref[...])[1],
    lambda net, i, _: ((net, ref_of(net), x_of(i)), {}),
  ),
}
CHANGES_STRUCTURE = ("adds an attribute once", "moves parts")
_REFS = weakref.WeakKeyDictionary()


def ref_of(net):
  return _REFS.setdefault(net, jax.new_ref(jnp.ones(())))


def arrays_of(tree):
  leaves = jax.tree.leaves(nnx.to_lojax(tree)) if tree is not None else []
  leaves = [x[...] if isinstance(x, jax.Ref) else x for x in leaves]
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in map(jnp.asarray, leaves)]


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(arrays_of(a), arrays_of(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5)


def find(step, args, kwargs):
  return step._fast.find((*args, *kwargs.values()), tuple(kwargs))


@pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_right_and_known_from_the_second_time_on(name, hijax):
  f, args_of = CALLS[name]
  net, twin = Net(hijax), Net(hijax)
  step, got, want = nnx.jit(f), None, None
  for i in range(4):
    args, kwargs = args_of(net, i, got)
    if i > 1 and name not in CHANGES_STRUCTURE:
      assert find(step, args, kwargs) is not None, f"call {i}"
    got = step(*args, **kwargs)
    args, kwargs = args_of(twin, i, want)
    want = f(*args, **kwargs)
    assert_equal(got, want)
    if name == "sow":
      assert_equal(nnx.pop(net, nnx.Intermediate), nnx.pop(twin, nnx.Intermediate))
    assert_equal(net, twin)
  # What an array is committed to may change once: then the types of two calls differ.
  assert all(compiled.call._cache_size() <= 2 for compiled in step._fast._compiled.values())


@pytest.mark.parametrize(
  "hijax", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["hijax", "lojax"]
)
@pytest.mark.parametrize("name", CALLS)
def test_no_call_keeps_a_model_alive(name, hijax):
  f, args_of = CALLS[name]
  step, got = nnx.jit(f), None
  net = Net(hijax)
  for i in range(3):
    args, kwargs = args_of(net, i, got)
    got = step(*args, **kwargs)
    if name == "sow":
      nnx.pop(net, nnx.Intermediate)
  alive = [weakref.ref(x) for x in (net, net.layers[0], net.layers[1].kernel, net.calls)]
  del net, args, kwargs, got
  gc.collect()
  assert [ref() is None for ref in alive] == [True] * 4


CHANGES = {
  "static": lambda net: setattr(net, "mode", "minus"),
  "static below": lambda net: setattr(net.norm, "use_running_average", True),
  "layer replaced": lambda net: net.layers.__setitem__(0, nnx.Linear(3, 3, rngs=nnx.Rngs(7))),
  "layer added": lambda net: net.layers.append(nnx.Linear(3, 3, rngs=nnx.Rngs(8))),
  "layer removed": lambda net: net.layers.pop(),
  "part replaced": lambda net: setattr(net, "norm", nnx.BatchNorm(3, rngs=nnx.Rngs(0))),
  "variable replaced": lambda net: setattr(net.norm, "scale", nnx.Param(jnp.full(3, 5.0))),
  "variable written": lambda net: setattr(net.norm, "scale", jnp.full(3, 5.0)),
  "raw value": lambda net: net.calls.set_raw_value(nnx.Variable(50).get_raw_value()),
  "metadata": lambda net: net.calls.set_metadata(tag="x"),
  "array replaced": lambda net: setattr(net, "table", net.table + 1),
  "array of another type": lambda net: setattr(net, "table", jnp.arange(3) + 1),
  "array to NumPy": lambda net: setattr(net, "table", np.arange(3.0) * 2),
  "NumPy in place": lambda net: net.array.__iadd__(2),
  "pytree written": lambda net: net.pair.set_value({"a": jnp.ones(2) * 3, "b": (jnp.ones(()),)}),
  "array to Variable": lambda net: setattr(net, "array", nnx.Variable(jnp.ones(3))),
  "shared": lambda net: setattr(net.layers[1], "kernel", net.layers[0].kernel),
  "all moved": lambda net: nnx.update(net, nnx.state(Net(seed=3))),
}


@pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
  "name",
  [
    "a model and an array",
    pytest.param("a dict and a list of Modules", marks=pytest.mark.slow),
  ],
)
def test_a_change_between_calls_is_seen_and_taking_it_back_too(name, change, hijax):
  f, args_of = CALLS[name]
  net, twin, step = Net(hijax), Net(hijax), nnx.jit(f)
  for i in range(6):
    for n in (net, twin):
      if i == 2 or (i == 4 and "removed" not in change):
        CHANGES[change](n)
      if i == 3:
        n.mode = "plus" if n.mode == "minus" else "minus"
    args, kwargs = args_of(net, i, None)
    got = step(*args, **kwargs)
    args, kwargs = args_of(twin, i, None)
    assert_equal(got, f(*args, **kwargs))
    assert_equal(net, twin)


def test_shapes_of_lojax_state_may_change_between_calls():
  net = Net(hijax=False)
  step = nnx.jit(lambda net: net.extra.sum())
  for i in range(1, 5):
    net.extra = nnx.Variable(jnp.ones(i), is_hijax=False)
    assert float(step(net)) == i
    net.extra.set_raw_value(jnp.ones(i + 1))
    assert float(step(net)) == i + 1
    net.extra.set_raw_value({"a": jnp.ones(())})
    with pytest.raises(AttributeError):
      step(net)


def test_a_pytree_of_lojax_state_with_other_keys_is_another_call():
  v = nnx.Variable({"a": jnp.ones(()), "b": jnp.zeros(())}, is_hijax=False)
  holder = nnx.Dict(v=v)
  step = nnx.jit(lambda holder: sorted(holder["v"].get_value().items())[0][1])
  assert float(step(holder)) == float(step(holder)) == 1.0
  v.set_value({"b": jnp.full((), 3.0), "c": jnp.full((), 4.0)})
  assert float(step(holder)) == 3.0
  v.set_value({"a": jnp.full((), 5.0), "b": jnp.full((), 6.0)})
  assert float(step(holder)) == 5.0


@pytest.mark.parametrize("where", ["in one State", "in two", "with the model"])
def test_lojax_variables_that_are_shared_in_one_call_and_not_in_the_next(where):
  def f(a, b, net):
    a["v"][...] += 1
    b["v"][...] += 10

  step = nnx.jit(f)
  new_net = lambda v: nnx.Dict(v=v)
  new = lambda: nnx.Variable(jnp.zeros(()), is_hijax=False)
  v, w, u = new(), new(), new()
  net = new_net(u)
  for _ in range(2):  # apart
    step(nnx.State({"v": v}), {"v": w}, net)
  assert [float(x) for x in (v, w, u)] == [2.0, 20.0, 0.0]
  if where == "with the model":
    step(nnx.State({"v": u}), {"v": w}, net)
    assert [float(x) for x in (v, w, u)] == [2.0, 30.0, 1.0]
  else:
    step(nnx.State({"v": v}), {"v": v}, net)  # one Variable, written twice
    assert [float(x) for x in (v, w, u)] == [13.0, 20.0, 0.0]
  step(nnx.State({"v": v}), {"v": w}, net)
  assert float(v) == (3.0 if where == "with the model" else 14.0)


def test_a_static_argument_is_known_by_its_value_and_type():
  seen = []

  def f(net, x, scale):
    seen.append(scale)
    return x * scale

  step, net = nnx.jit(f, static_argnames="scale"), Net()
  for scale in (1, 1.0, True, 2, 1, (1, 2.0), 1.0):
    if not isinstance(scale, tuple):
      np.testing.assert_array_equal(step(net, 3.0, scale), 3.0 * scale)
      np.testing.assert_array_equal(step(net, 3.0, scale=scale), 3.0 * scale)
  assert [type(x) for x in seen] == [int, int, float, float, bool, bool, int, int]
  assert find(step, (net, 3.0), {"scale": 2}) is not None
  assert find(step, (net, 3.0), {"scale": 3}) is None


def test_arguments_that_are_given_away_are_overwritten_and_all_others_are_kept():
  net, step = Net(), nnx.jit(lambda net, a, b: (a + b, net(b)), donate_argnames="a")
  for i in range(3):
    a, b = x_of(i), x_of(i + 1)
    want = np.asarray(a + b)
    np.testing.assert_array_equal(step(net, a, b)[0], want)
    assert a.is_deleted() and not b.is_deleted()
  assert find(step, (net, x_of(0), x_of(1)), {}) is not None


def test_an_attribute_of_another_model_leaves_a_call_as_it_is():
  net, other = Net(), Net()
  step = nnx.jit(lambda net, x: net(x))
  step(net, x_of(0)), step(other, x_of(0))
  last = step._fast.find((net, x_of(0)))[0]
  other.mode = "minus"
  other.layers.append(nnx.Linear(3, 3, rngs=nnx.Rngs(1)))
  assert step._fast.find((net, x_of(1)))[0] is last
  assert step._fast.find((other, x_of(1))) is None


def test_a_model_that_goes_back_and_forth_has_two_entries_and_no_more():
  net = Net()
  step = nnx.jit(lambda net, x: net(x))
  for _ in range(5):
    net.train(), step(net, x_of(0)), net.eval(), step(net, x_of(0))
  assert [len(lot) for lot in step._fast._entries.values()] == [2]


def test_many_models_in_turn_are_all_known():
  nets = [Net(seed=i) for i in range(100)]
  step = nnx.jit(lambda net, x: net(x))
  for _ in range(2):
    for net in nets:
      step(net, x_of(0))
  assert all(step._fast.find((net, x_of(1))) is not None for net in nets)
  assert len(step._fast._compiled) == 1


def test_what_was_touched_does_not_grow_and_forgotten_watches_go():
  net = Net()
  step = nnx.jit(lambda net, x: net(x))
  for i in range(200):
    net.number = i
    step(net, x_of(0))
  assert len(net._pytree.watches) < 300  # those of the entries, which are limited, and a few
  wrapped = [nnx.Dict(net=net) for _ in range(3)]
  for _ in range(300):
    nnx.state(nnx.Dict(net=net))
  alive = sum(ref() is not None for ref in net._pytree.watches)
  assert len(net._pytree.watches) < 2 * alive + 300 and wrapped


def test_an_error_in_a_known_call_names_the_argument_and_leaves_all_as_it_was():
  net = Net()
  step = nnx.jit(lambda net, x: net(x))
  step(net, x_of(0)), step(net, x_of(0))
  before = arrays_of(net)
  with pytest.raises(TypeError, match="x"):
    step(net, "text")
  with pytest.raises(nnx.ShapeMismatchError if hasattr(nnx, "ShapeMismatchError") else ValueError):
    step(net, jnp.ones((4, 5)))
  for a, b in zip(before, arrays_of(net), strict=True):
    np.testing.assert_array_equal(a, b)
  gone = x_of(0)
  gone.delete()
  with pytest.raises((RuntimeError, ValueError), match="deleted"):
    step(net, gone)
  step(net, x_of(0))
