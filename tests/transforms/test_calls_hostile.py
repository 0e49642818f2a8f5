"""Calls of nnx.jit that are out of the ordinary: right, forgotten in time, and with good errors."""

import dataclasses
import functools
import gc
import random
import types
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import hijax

from refax import _jax, nnx

HiPrim: Any = getattr(hijax, "HiPrim", None) or getattr(hijax, "VJPHiPrimitive")  # noqa: B009

pytestmark = pytest.mark.skipif(
  not _jax.no_trace_active(), reason="the fast path needs the private API, which is switched off"
)


def is_known(step, *args, **kwargs):
  return step._fast.find((*args, *kwargs.values()), tuple(kwargs)) is not None


class Counter(nnx.Module):
  def __init__(self, size=()):
    self.count = nnx.Variable(jnp.zeros(size))


RESULTS = {
  "nothing": lambda counter: None,
  "an empty dict": lambda counter: {},
  "None in a tuple": lambda counter: (None, None),
  "the model": lambda counter: counter,
  "the model and None": lambda counter: (counter, None),
  "an empty Module": lambda counter: nnx.Module(),
}


@pytest.mark.parametrize("result", RESULTS)
def test_a_function_that_only_calls_back_is_called(result):
  seen = []

  @nnx.jit
  def f(counter, x):
    jax.debug.callback(lambda x: seen.append(int(x)), x)
    return RESULTS[result](counter)

  counter = Counter()
  for i in range(3):
    f(counter, i)
  jax.effects_barrier()
  assert seen == [0, 1, 2]


def test_an_argument_is_given_away_also_where_nothing_is_returned():
  f = nnx.jit(lambda x: None, donate_argnums=0)
  g = jax.jit(lambda x: None, donate_argnums=0)
  x, y = jnp.ones(3), jnp.ones(3)
  f(x), g(y)
  assert x.is_deleted() == y.is_deleted()


def test_an_array_that_is_an_attribute_of_a_list_may_be_replaced():
  class Layers(nnx.List):
    def __init__(self):
      super().__init__([nnx.Variable(1.0), jnp.ones(())])
      self.scale = jnp.array(2.0)

  layers = Layers()
  f = nnx.jit(lambda layers: layers.scale * layers[0] + layers[1])
  for scale in (2.0, 2.0, 5.0, 5.0, 7.0):
    layers.scale = jnp.array(scale)
    assert float(f(layers)) == scale + 1
  layers[1] = jnp.zeros(())
  assert float(f(layers)) == 7.0


def plus_one(x):
  v = nnx.Variable(x)
  v[...] += 1
  return v[...]


INSIDE = {
  "jit": lambda x: jax.jit(plus_one)(x),
  "jit in jit": lambda x: jax.jit(jax.jit(plus_one))(x),
  "cond": lambda x: jax.lax.cond(x > 0, plus_one, lambda x: x, x),
  "switch": lambda x: jax.lax.switch(1, [lambda x: x, plus_one], x),
  "scan": lambda x: jax.lax.scan(lambda c, _: (plus_one(c), c), x, None, 3)[0],
  "while": lambda x: jax.lax.while_loop(lambda x: plus_one(x) < 9, plus_one, x),
  "fori": lambda x: jax.lax.fori_loop(0, 3, lambda _, x: plus_one(x), x),
  "checkpoint": lambda x: jax.checkpoint(plus_one)(x),
  "vmap": lambda x: jax.vmap(plus_one)(x[None])[0],
  "grad of jit": lambda x: jax.grad(lambda x: jax.jit(lambda x: (plus_one(0.0) + x) ** 2)(x))(x),
  "jit in scan": lambda x: jax.lax.scan(lambda c, _: (jax.jit(plus_one)(c), c), x, None, 3)[0],
  "map": lambda x: jax.lax.map(plus_one, x[None])[0],
}


@pytest.mark.parametrize("name", INSIDE)
def test_state_that_is_made_inside_a_function_inside(name):
  f, v = INSIDE[name], nnx.Variable(1.0)

  @nnx.jit
  def step(v):
    v[...] = f(v[...])
    return v * 2

  want = f(jnp.array(1.0))
  assert float(step(v)) == float(want) * 2
  assert float(v) == float(want)


class Tripled(HiPrim):
  """An operation that JAX lowers to others; its gradient is not theirs."""

  def __init__(self, aval):
    self.in_avals, self.out_aval, self.params = (aval,), aval, {}
    super().__init__()

  def expand(self, x):
    return x * 3.0

  def vjp_fwd(self, nonzero, x):
    return self(x), None

  def vjp_bwd_retval(self, residuals, g):
    return (5.0 * g,)


def test_operations_that_jax_lowers_to_others():
  tripled = lambda x: Tripled(jax.typeof(x))(x)

  @nnx.jit
  def f(v, x):
    v[...] = tripled(v[...])
    ys = jax.lax.scan(lambda c, _: (c, tripled(c) + v), x, None, 2)[1]
    return ys, jax.grad(tripled)(x)

  v = nnx.Variable(1.0)
  for i in (1, 2, 3):
    ys, gradient = f(v, 2.0)
    assert (float(v), ys.tolist(), float(gradient)) == (3**i, [6 + 3**i] * 2, 5)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("wrap", [lambda n: n, lambda n: [n]], ids=["alone", "in a list"])
def test_a_number_that_is_too_large_is_named_in_a_known_call_too(times, wrap):
  @nnx.jit
  def f(counter, steps):
    counter.count[...] += 1
    return steps

  counter = Counter()
  for _ in range(times):
    f(counter, wrap(1))
  with pytest.raises(OverflowError, match=r"argument path is steps(\[0\])?\."):
    f(counter, wrap(2**40))
  assert float(counter.count) == times


def test_settings_of_jax_that_go_back_and_forth_are_each_compiled_once():
  @nnx.jit
  def f(counter, x):
    counter.count[...] += 1
    return x @ x

  counter, x = Counter(), jnp.ones((4, 4))
  for _ in range(3):
    f(counter, x)
    with jax.default_matmul_precision("highest"):
      f(counter, x)
    with nnx.use_hijax(False):
      f(counter, x)
  assert float(counter.count) == 9
  assert len(f._fast._compiled) == 3
  assert all(compiled.call._cache_size() <= 2 for compiled in f._fast._compiled.values())


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box:
  content: Any


@pytest.mark.parametrize(
  "hold",
  [
    Box,
    lambda layer: layer.__call__,
    functools.partial,
    lambda layer: (layer,),
    lambda x: {"k": x},
  ],
  ids=["dataclass", "method", "partial", "tuple", "dict"],
)
def test_a_layer_in_the_place_of_an_array_changes_its_mode_with_the_model(hold):
  class Model(nnx.Module):
    def __init__(self):
      self.part = jnp.ones(1)
      self.deterministic = False

  model, layer = Model(), nnx.Dropout(0.5, rngs=nnx.Rngs(0))
  for _ in range(2):
    model.eval(), model.train()
  model.part = nnx.data(hold(layer))
  model.eval()
  assert layer.deterministic and model.deterministic


def test_another_class_is_another_structure():
  class One(Counter):
    def __call__(self):
      return self.count + 1

  class Two(One):
    def __call__(self):
      return self.count + 2

  counter, f = One(), nnx.jit(lambda counter: counter())
  assert float(f(counter)) == float(f(counter)) == 1
  counter.__class__ = Two
  assert isinstance(counter, Two)
  assert float(f(counter)) == float(counter()) == 2


class Plain:
  def __init__(self, counter):
    self.counter = counter

  def step(self):
    return self.counter + 0


class Slotted:
  __slots__ = ("counter",)
  __init__ = Plain.__init__
  step = Plain.step


def in_a_class(counter):
  class Holder:
    step = Plain.step

  Holder.counter = counter
  return Holder().step, lambda counter: setattr(Holder, "counter", counter)


def in_a_plain_object(counter):
  holder = Plain(counter)
  return lambda: holder.counter + 0, lambda counter: setattr(holder, "counter", counter)


def in_an_object_that_a_helper_mentions(counter):
  holder = Plain(counter)
  holder.rate = 1.0
  helper = lambda: holder.counter + 0
  return lambda: helper() * holder.rate, lambda counter: setattr(holder, "counter", counter)


def in_an_object_in_an_object(counter):
  holder = Plain(Plain(counter))
  f = lambda: holder.counter.counter + 0
  return f, lambda counter: setattr(holder.counter, "counter", counter)


def in_a_module_of_python(counter):
  module = types.ModuleType("settings")
  module.counter = counter
  return lambda: module.counter + 0, lambda counter: setattr(module, "counter", counter)


def in_slots(counter):
  holder = Slotted(counter)
  return holder.step, lambda counter: setattr(holder, "counter", counter)


@pytest.mark.parametrize(
  "hold",
  [
    in_a_class,
    in_a_plain_object,
    in_an_object_that_a_helper_mentions,
    in_an_object_in_an_object,
    in_a_module_of_python,
    in_slots,
  ],
)
def test_another_object_under_the_same_name_is_seen_wherever_the_function_finds_it(hold):
  f, put = hold(nnx.Variable(1.0))
  f = nnx.jit(f)
  assert float(f()) == float(f()) == 1.0
  put(nnx.Variable(2.0))
  assert float(f()) == float(f()) == 2.0
  assert is_known(f)


SIZE = 12345


def live():
  gc.collect()
  return sum(x.size == SIZE for x in jax.live_arrays())


ARGUMENTS = {
  "the model": lambda counter: counter,
  "in a list": lambda counter: [counter],
  "in a tuple with a number": lambda counter: (counter, 1),
  "a State": nnx.state,
  "a Variable": lambda counter: counter.count,
  "a Variable in a dict": lambda counter: {"count": counter.count},
  "a Ref": lambda counter: counter.count.get_raw_value(),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_state_held_is_forgotten_with_it(name):
  @nnx.jit
  def step(x):
    for ref in jax.tree.leaves(x):
      if isinstance(ref, jax.Ref):
        ref[...] += 1

  for _ in range(3):
    counter = Counter(SIZE)
    for _ in range(3):
      step(ARGUMENTS[name](counter))
    assert is_known(step, ARGUMENTS[name](counter))
  del counter
  assert live() == 0


def test_state_that_was_replaced_in_a_model_is_forgotten():
  @nnx.jit
  def step(counter):
    counter.count[...] += 1

  counter = Counter(SIZE)
  for _ in range(5):
    counter.count = nnx.Variable(jnp.zeros(SIZE))
    step(counter), step(counter)
  assert is_known(step, counter)
  assert live() == 1


def test_entries_that_can_never_hold_again_go():
  step = nnx.jit(lambda counter: counter.count + 1)
  counter, other = Counter(), Counter()
  for i in range(10):
    other.count.set_metadata(tag=i)
    counter.parts = [i]
    step(counter), step(counter)
  assert is_known(step, counter)
  assert sum(map(len, step._fast._entries.values())) <= 2


def test_the_death_of_one_argument_leaves_the_entries_of_others():
  @nnx.jit
  def step(counters):
    counters[0].count[...] += 1

  one, other = Counter(), Counter()
  for counter in (one, other, one, other):
    step([counter])
  del one, counter
  gc.collect()
  assert is_known(step, [other])


def test_an_attribute_that_each_step_replaces_is_not_kept_of_any_step():
  optimizer = optax.trace(0.9)

  class Trained(nnx.Module):
    def __init__(self):
      self.weights = nnx.Param(jnp.ones(SIZE))
      self.state = optimizer.init(self.weights[...])

  @nnx.jit
  def step(model, x):
    updates, model.state = optimizer.update(model.weights * x, model.state)
    model.weights[...] -= updates

  model = Trained()
  for _ in range(8):
    step(model, 0.1)
  assert live() == 2
  assert sum(map(len, step._fast._entries.values())) <= 1


class Pair(NamedTuple):
  first: Any
  second: Any


class Part(nnx.Module):
  def __init__(self, name):
    self.name = name


def built():
  root = Part("root")
  root.weight, root.table = nnx.Param(1.0), jnp.float32(2.0)
  root.child = Part("child")
  root.child.norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
  root.child.lojax = nnx.Variable(0.25, is_hijax=False)
  root.layers = [nnx.Variable(1.5), Part("layer"), jnp.float32(3.0), "static"]
  root.layers.scale = jnp.float32(7.0)
  root.items = {"x": nnx.Variable(0.3), "y": Part("item"), "z": 5}
  root.state = nnx.State({"p": nnx.Variable(0.6), "q": jnp.float32(0.7)})
  root.pair = Pair(jnp.float32(0.8), nnx.Variable(0.9))
  return root


def entries(x):
  """The keys and values directly in a value, in an order of their own."""
  if isinstance(x, nnx.List):
    return [*enumerate(x), *sorted(vars(x).items())]
  if isinstance(x, nnx.Dict | nnx.State | dict):
    return sorted(x.items(), key=str)
  if isinstance(x, nnx.Module):
    return sorted(vars(x).items())
  return list(enumerate(x)) if isinstance(x, tuple | list) else []


def modules(x, seen=None):
  seen = {} if seen is None else seen
  if isinstance(x, nnx.Module):
    if id(x) in seen:
      return []
    seen[id(x)] = x
  here = [x] if isinstance(x, nnx.Module) else []
  return here + [m for _, child in entries(x) for m in modules(child, seen)]


def digest(root, write):
  """A number that tells any two structures apart, and that is made of all values."""
  seen, total = {}, [jnp.float32(0.0)]

  def add(x):
    total[0] = total[0] * 0.7 + x

  def name(x):
    add(zlib.crc32(repr(x).encode()) % 1000 / 1000)

  def go(x):
    if isinstance(x, nnx.Variable | nnx.Module):
      key = id(x.get_raw_value()) if isinstance(x, nnx.Variable) and x.is_hijax else id(x)
      is_new = key not in seen
      name((type(x).__name__, seen.setdefault(key, len(seen))))
      if not is_new:
        return
    if isinstance(x, nnx.Variable):
      name(x.get_metadata("tag"))
      add(x[...])
      if write and jnp.issubdtype(x.dtype, jnp.floating):
        x[...] = x * 0.9 + 0.01
    elif isinstance(x, jax.Array):
      add(x)
    elif entries(x):
      for key, child in entries(x):
        name(key)
        go(child)
    else:
      name((type(x).__name__, x if isinstance(x, str | int | float) else None))

  go(root)
  return total[0]


def swap(items):
  items[0], items[-1] = items[-1], items[0]


MUTATIONS = {
  Part: [
    lambda m, r: setattr(m, r.choice("ab"), r.choice([True, 1, 1.0, 0.0, -0.0, "x", None, (1,)])),
    lambda m, r: setattr(m, "table", jnp.float32(r.random())),
    lambda m, r: vars(m).update(c=r.choice([1, jnp.float32(r.random())])),
    lambda m, r: vars(m).pop(r.choice("abc"), None),
    lambda m, r: setattr(m, "made", nnx.Variable(r.random(), is_hijax=r.random() < 0.5)),
    lambda m, r: hasattr(m, "made") and delattr(m, "made"),
    lambda m, r: hasattr(m, "made") and m.made.set_metadata(tag=r.choice([1, 1.0, True])),
    lambda m, r: hasattr(m, "made") and m.made.set_raw_value(nnx.Variable(3.0).get_raw_value()),
    lambda m, r: setattr(m, "me", m),
    lambda m, r: (m.eval, m.train)[r.random() < 0.5](),
    lambda m, r: hasattr(m, "pair") and setattr(m, "pair", Pair(jnp.float32(2.0), m.pair[1])),
    lambda m, r: hasattr(m, "state") and m.state.update({r.choice("pq"): jnp.float32(r.random())}),
    lambda m, r: hasattr(m, "state") and m.state.update({"n": {"k": nnx.Variable(r.random())}}),
  ],
  nnx.List: [
    lambda m, r: m.append(r.choice([1, "x", jnp.float32(0.2), nnx.Variable(0.1)])),
    lambda m, r: m.insert(0, Part("inserted")),
    lambda m, r: len(m) and m.append(m.pop(0)),
    lambda m, r: m.reverse(),
    lambda m, r: len(m) and swap(m),
    lambda m, r: m.__setitem__(slice(1, 2), [jnp.float32(r.random())]),
    lambda m, r: setattr(m, "scale", jnp.float32(r.random())),
  ],
  nnx.Dict: [
    lambda m, r: m.update({r.choice("xyz"): r.choice([4, jnp.float32(0.4), nnx.Variable(0.2)])}),
    lambda m, r: m.pop(r.choice("xyz"), None),
  ],
}
ARGUMENTS_OF = [
  lambda m: (m,),
  lambda m: (m,),
  lambda m: ([m, None],),
  lambda m: (m, nnx.state(m)),
  lambda m: ({"part": modules(m)[-1], "all": (m, jnp.float32(1.0))},),
  lambda m: (Pair(m.child, jnp.float32(3.0)), m),
]


def grow(*args):
  total, first = digest(args, True), modules(args)[0]
  first.last, first.table = nnx.Variable(total), jnp.float32(total)
  first.count = (getattr(first, "count", 0) + 1) % 2
  return total, {"first": first, "new": Part("new")}


FUNCTIONS = [lambda *args: digest(args, True), lambda *args: digest(args, False), grow]


@pytest.mark.parametrize(
  "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 5))]
)
def test_any_arguments_and_any_changes_between_calls(seed):
  r, ours, twin = random.Random(seed), built(), built()
  compiled = [nnx.jit(f) for f in FUNCTIONS]
  for _ in range(16):
    for _ in range(r.choice([0, 1, 1, 2])):
      index, which, state = r.randrange(99), r.randrange(99), r.getrandbits(30)
      for root in (ours, twin):
        found = [m for m in modules(root) if type(m) in MUTATIONS]
        changed = found[index % len(found)]
        change = MUTATIONS[type(changed)]
        change[which % len(change)](changed, random.Random(state))
    f, arguments = r.randrange(len(FUNCTIONS)), r.choice(ARGUMENTS_OF)
    got, want = compiled[f](*arguments(ours)), FUNCTIONS[f](*arguments(twin))
    for a, b in ((got, want), (ours, twin)):
      np.testing.assert_allclose(digest(a, False), digest(b, False), rtol=1e-4, atol=1e-5)
