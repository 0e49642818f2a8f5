"""nnx.jit sees what it reaches without being given it: closures, partials, methods, globals."""

import collections
import functools
import gc
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import _jax, nnx

X = jnp.ones((4, 3))


class Net(nnx.Module):
  def __init__(self, seed=0):
    self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(seed))
    self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(seed))
    self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(seed))
    self.scale = 1.0

  def __call__(self, x):
    return self.scale * self.dropout(self.norm(self.linear(x)))

  def twice(self, x):
    return self(self(x))


class Trainer:
  """A plain class, as in most training scripts."""

  def __init__(self, net):
    self.net = net
    self.step = nnx.jit(self._step)

  def _step(self, x):
    return self.net(x)

  @functools.cached_property
  def by_name(self):
    return nnx.jit(lambda x: self.net(x))


NET = Net()


def by_global(x):
  return NET(x)


def by_helper(x):
  return by_global(x)


def with_default(x, net=NET):
  return net(x)


def by_list(net):
  nets = [net]
  return lambda x: nets[0](x)


WAYS = {
  "closure": lambda net: lambda x: net(x),
  "nested closure": lambda net: lambda x: (lambda y: net(y))(x),
  "partial": lambda net: functools.partial(lambda net, x: net(x), net),
  "keyword of a partial": lambda net: functools.partial(lambda x, net: net(x), net=net),
  "the Module itself": lambda net: net,
  "bound method": lambda net: net.__call__,
  "partial of a bound method": lambda net: functools.partial(net.__call__),
  "list by closure": by_list,
  "method of a plain object": lambda net: Trainer(net)._step,
}


def run(make, net, change):
  """A call, a change, two more calls; the results and the final state."""
  f = make(net)
  out = [f(X), change(net), f(X), f(X)]
  return [x for x in out if x is not None], net


def replaced(net):
  net.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(7))


def retyped(net):
  net.norm.scale.set_metadata(tag="x")


CHANGES = {
  "eval": lambda net: net.eval(),
  "a static attribute": lambda net: setattr(net, "scale", 3.0),
  "a layer that is replaced": replaced,
  "a value": lambda net: net.linear.kernel.set_value(net.linear.kernel * 2),
  "nothing": lambda net: None,
}


@pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", WAYS)
def test_a_change_of_what_is_reached_is_seen(way, change, hijax):
  with nnx.use_hijax(hijax):
    net, twin = Net(), Net()
    if not hijax:  # a lojax Variable cannot be written from inside
      net.eval(), twin.eval()
    got, net = run(lambda n: nnx.jit(WAYS[way](n)), net, CHANGES[change])
    want, twin = run(WAYS[way], twin, CHANGES[change])
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  for a, b in zip(
    jax.tree.leaves(nnx.to_lojax(net)), jax.tree.leaves(nnx.to_lojax(twin)), strict=True
  ):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_global_and_what_a_helper_reaches_are_seen_and_a_new_binding_too():
  global NET
  for f in (by_global, by_helper):
    NET = Net()
    compiled = nnx.jit(f)
    compiled(X)
    NET.eval()
    np.testing.assert_allclose(compiled(X), NET(X), rtol=1e-6)
    NET = Net(3)
    NET.eval()
    np.testing.assert_allclose(compiled(X), NET(X), rtol=1e-6)


def test_a_default_argument_is_seen():
  net = with_default.__defaults__[0]
  compiled = nnx.jit(with_default)
  net.train()
  compiled(X)
  net.eval()
  np.testing.assert_allclose(compiled(X), net(X), rtol=1e-6)


def test_what_a_plain_object_holds_is_seen_and_its_attributes_may_be_bound_anew():
  trainer = Trainer(Net())
  for step in (trainer.step, trainer.by_name):
    trainer.net = Net()
    step(X)
    trainer.net.eval()
    np.testing.assert_allclose(step(X), trainer.net(X), rtol=1e-6)
  trainer.net = Net(5)
  trainer.net.eval()
  np.testing.assert_allclose(trainer.step(X), trainer.net(X), rtol=1e-6)


def test_a_module_without_variables_is_seen():
  dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
  dropout.eval()
  compiled = nnx.jit(lambda x: dropout(x))
  np.testing.assert_array_equal(compiled(X), X)
  dropout.train()
  assert (compiled(X) == 0).any()


def test_what_only_the_trace_finds_is_seen():
  net = Net()
  holder = {"any": {"depth": [type("Box", (), {"net": net})()]}}
  box = holder["any"]["depth"][0]

  class Hidden:
    def __call__(self, x):
      return box.net(x)

  compiled = nnx.jit(Hidden())
  for _ in range(2):
    compiled(X)
  net.eval()
  np.testing.assert_allclose(compiled(X), net(X), rtol=1e-6)


def test_state_by_closure_is_updated_and_traced_once_for_each_structure():
  net, traces = Net(), []

  @nnx.jit
  def step(x):
    traces.append(None)
    return net(x)

  twin = Net()
  for _ in range(3):
    np.testing.assert_allclose(step(X), twin(X), rtol=1e-5, atol=1e-6)
  for _ in range(3):
    net.eval(), step(X), net.train(), step(X)
  assert len(traces) == 2
  twin.eval(), twin(X)
  for _ in range(3):
    twin.train(), twin(X)
  np.testing.assert_allclose(net.norm.mean, twin.norm.mean, rtol=1e-5)


def test_a_model_by_closure_and_as_an_argument():
  net = Net()
  step = nnx.jit(lambda n, x: n(x) + net.scale)
  first = step(net, X)
  net.scale = 2.0
  assert not np.allclose(step(net, X), first)


def test_a_model_that_was_reached_by_a_method_is_not_kept_alive():
  trainer = Trainer(Net())
  trainer.step(X)
  alive = weakref.ref(trainer.net)
  trainer.net = Net()
  trainer.step(X)
  del trainer
  gc.collect()
  assert alive() is None


class Slotted:
  """An object that nothing can refer to weakly."""

  __slots__ = ("net",)

  def __init__(self, net):
    self.net = net


class Runner:
  """Whoever uses it does not name where it keeps its Net."""

  def __init__(self, net=None):
    self._net = net

  @property
  def current(self):
    return self._net

  def run(self, x):
    return self.inner(x)

  def inner(self, x):
    return self.current(x)

  def __call__(self, x):
    return self._net(x)


def runs(runner, x):
  return runner._net(x)


Pair = collections.namedtuple("Pair", "net number")
BOX = {}


def by_global_dict(x):
  return BOX["net"](x)


def through(name):
  """`(call, place)`: a function of X, and what puts a Net where it finds one."""
  if name == "a global dict":
    return by_global_dict, lambda net: BOX.__setitem__("net", net)
  if name == "a variable of an outer function":
    net = None

    def bind(new):
      nonlocal net
      net = new

    return lambda x: net(x), bind
  if name == "a helper that is bound anew":
    helper = None

    def bind_helper(new):
      nonlocal helper
      helper = lambda x: new(x)

    return lambda x: helper(x), bind_helper
  if name in ("a plain object", "an object with slots"):
    holder = (Trainer if name == "a plain object" else Slotted)(Net())
    return lambda x: holder.net(x), lambda net: setattr(holder, "net", net)
  runner, runners = Runner(), [Runner()]
  put, put_first = (lambda net, r=r: setattr(r, "_net", net) for r in (runner, runners[0]))
  calls = {
    "a plain object with methods": (lambda x: runner.run(x), put),
    "a property": (lambda x: runner.current(x), put),
    "an object that a helper is given": (lambda x: runs(runner, x), put),
    "a callable object in a list": (lambda x: runners[0](x), put_first),
    "an object in a partial": (functools.partial(lambda r, x: r.run(x), runner), put),
  }
  if name in calls:
    return calls[name]
  if name in ODD:
    box, put_in, get = ODD[name]()
    return lambda x: get(box)(x), lambda net: put_in(box, net)
  if name == "a plain object that is bound anew":
    trainer = None

    def bind_trainer(new):
      nonlocal trainer
      trainer = Trainer(new)

    return lambda x: trainer.net(x), bind_trainer
  box = {
    "a list": [None, 1],
    "a dict": {0: None, "count": 1},
    "a dict of lists": {0: [None], "name": "x"},
    "a list of named tuples": [None],
  }[name]
  if name == "a list of named tuples":
    return lambda x: box[0].net(x), lambda net: box.__setitem__(0, Pair(net, 1))
  if name == "a dict of lists":
    return lambda x: box[0][0](x), lambda net: box[0].__setitem__(0, net)
  return lambda x: box[0](x), lambda net: box.__setitem__(0, net)


class ByKey:
  """A class of the user's that only looks like a container."""

  def __init__(self, inside):
    self._inside = inside

  def __getitem__(self, key):
    return self._inside[key]


def around(make, inside):
  """A container around another one, which is written to."""
  return (
    make(inside),
    lambda box, net: inside.__setitem__(0, net),
    lambda box: box[0],
  )


def itself(box):
  return box, lambda box, net: box.__setitem__(0, net), lambda box: box[0]


def kept_alive(box, net):
  KEPT.append(net)
  box[0] = net


KEPT = []
ODD = {
  "a deque": lambda: itself(collections.deque([None])),
  "a UserDict": lambda: itself(collections.UserDict({0: None})),
  "a UserList": lambda: itself(collections.UserList([None])),
  "a ChainMap": lambda: itself(collections.ChainMap({0: None})),
  "an OrderedDict": lambda: itself(collections.OrderedDict({0: None})),
  "a read-only dict": lambda: around(types.MappingProxyType, {0: None}),
  "a class with __getitem__": lambda: around(ByKey, {0: None}),
  "weak values": lambda: (weakref.WeakValueDictionary(), kept_alive, lambda box: box[0]),
  "a set": lambda: (
    set(),
    lambda box, net: (box.clear(), box.add(net)),
    lambda box: next(iter(box)),
  ),
}

PLACES = (
  *(name for name in ODD if name != "weak values"),
  "a global dict",
  "a variable of an outer function",
  "a helper that is bound anew",
  "a plain object",
  "an object with slots",
  "a plain object that is bound anew",
  "a plain object with methods",
  "a property",
  "an object that a helper is given",
  "a callable object in a list",
  "an object in a partial",
  "a list",
  "a dict",
  "a dict of lists",
  "a list of named tuples",
)


@pytest.mark.parametrize("name", [*PLACES, "weak values"])
def test_models_in_turn_in_a_place_are_each_traced_once(name):
  call, place = through(name)
  traces = []

  def counted(x):
    traces.append(None)
    return call(x)

  nets, twins = ([Net(seed) for seed in (0, 1)] for _ in range(2))
  step = nnx.jit(counted)
  for _ in range(4):
    for net, twin in zip(nets, twins, strict=True):
      place(net)
      np.testing.assert_allclose(step(X), twin(X), rtol=1e-5, atol=1e-6)
  assert len(traces) == 2
  if _jax.no_trace_active():
    assert step._fast.find((X,)) is not None


@pytest.mark.parametrize("name", PLACES)
def test_a_model_is_gone_when_another_one_is_bound_in_its_place(name):
  call, place = through(name)
  step, gone = nnx.jit(call), []
  for seed in range(3):
    net = Net(seed)
    gone += [weakref.ref(net), weakref.ref(net.linear.kernel.get_raw_value())]
    place(net)
    del net
    step(X), step(X)
    gc.collect()
    step(X)  # what it knew with a model that is gone, it forgets at its next call
    assert [ref() is None for ref in gone] == [True] * (2 * seed) + [False] * 2


def grown(box):
  box["more"] = Net(3)


def exchanged(box):
  box["a"], box["b"] = box["b"], box["a"]


def filled(box):
  box["none"] = Net(4)


def renamed(box):
  box["c"] = box.pop("b")


def deeper(box):
  box["inner"]["list"].append(Net(5))


@pytest.mark.parametrize("change", [grown, exchanged, filled, renamed, deeper])
def test_a_change_of_a_container_is_seen(change):
  def make():
    inner = {"list": [Net(2)], "number": 0}
    box = {"a": Net(0), "b": Net(1), "none": None, "inner": inner, "scale": 2.0}

    def call(x):
      for key in ("a", "b", "c", "none", "more"):
        if box.get(key) is not None:
          x = x + len(key) * (key != "a") + box[key](x)
      for net in box["inner"]["list"]:
        x = x + net(x)
      return x

    return box, call

  (box, call), (twin, by_python) = make(), make()
  step = nnx.jit(call)
  for _ in range(3):
    np.testing.assert_allclose(step(X), by_python(X), rtol=1e-4, atol=1e-5)
  change(box), change(twin)
  for _ in range(2):
    np.testing.assert_allclose(step(X), by_python(X), rtol=1e-4, atol=1e-5)


def test_the_same_model_in_another_way_is_seen():
  net = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
  lists, dicts, traces = [net], {"a": net}, []

  @nnx.jit
  def step(x):
    traces.append(None)
    for layer in lists:
      x = layer(x)
    return dicts["a"](x) if "a" in dicts else -dicts["b"](x)

  def check(traced):
    for _ in range(2):
      y = functools.reduce(lambda y, layer: layer(y), lists, X)
      np.testing.assert_allclose(step(X), net(y) * (1 if "a" in dicts else -1), rtol=1e-5)
    assert len(traces) == traced

  check(1)
  lists.append(net)
  check(2)
  dicts["b"] = dicts.pop("a")
  check(3)
  lists.pop()
  check(4)
  dicts["a"] = dicts.pop("b")
  check(4)


def test_a_counter_beside_a_model_does_not_trace_again():
  box, traces = {"net": Net(), "step": 0, "losses": [], "batch": X}, []

  @nnx.jit
  def step(x):
    traces.append(None)
    return box["net"](x)

  for i in range(5):
    box["step"], box["batch"], box[f"note {i}"] = i, X + i, "x"
    box["losses"].append(i)
    step(X)
  assert len(traces) == 1


def test_a_large_container_and_one_that_holds_itself_are_seen_too():
  large = [Net(), *range(1000)]
  loop = {"net": Net()}
  loop["self"] = loop
  for box, key in ((large, 0), (loop, "net")):
    step = nnx.jit(lambda x, box=box, key=key: box[key](x))
    for seed in (0, 1):
      box[key], twin = Net(seed), Net(seed)
      for _ in range(2):
        np.testing.assert_allclose(step(X), twin(X), rtol=1e-5, atol=1e-6)


def test_two_names_for_one_object_may_be_bound_apart():
  first = second = Trainer(Net())
  step = nnx.jit(lambda x: first.net(x) + second.net(x))
  step(X)
  second = Trainer(Net(1))
  twins = Net(), Net(1)
  twins[0](X), twins[0](X)
  np.testing.assert_allclose(step(X), twins[0](X) + twins[1](X), rtol=1e-5, atol=1e-6)


class Tables(nnx.Module):
  """Arrays that are in no Ref: a compiled function keeps those that it reaches by closure."""

  def __init__(self):
    self.net = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    self.table = jnp.ones(3)
    self.host = np.ones(3)
    self.rows = nnx.List([jnp.ones(3), jnp.ones(3)])
    self.named = nnx.Dict(a=jnp.ones(3))
    self.pair = nnx.data((jnp.ones(3), {"inner": jnp.ones(3)}))
    self.tree = nnx.Variable({"a": jnp.ones(3)}, is_hijax=False)
    self.plain = nnx.Variable(jnp.ones(3), is_hijax=False)
    self.gains = nnx.data(nnx.State({"a": jnp.ones(3)}))

  def __call__(self, x):
    rows = self.rows[0] * self.rows[1] * self.pair[0] * self.pair[1]["inner"]
    tables = self.table * self.host * self.named["a"] * self.gains["a"]
    return self.net(x) * rows * tables * self.tree[...]["a"] * self.plain[...]


ARRAYS = {
  "an attribute": lambda m, x: setattr(m, "table", x),
  "one of NumPy": lambda m, x: setattr(m, "host", np.asarray(x)),
  "in a List": lambda m, x: m.rows.__setitem__(1, x),
  "in a Dict": lambda m, x: m.named.__setitem__("a", x),
  "in a tuple": lambda m, x: setattr(m, "pair", (x, m.pair[1])),
  "in a dict in a tuple": lambda m, x: m.pair[1].__setitem__("inner", x),
  "in a pytree of a Variable": lambda m, x: m.tree.set_value({"a": x}),
  "in a lojax Variable": lambda m, x: m.plain.set_value(x),
  "in a State": lambda m, x: m.gains.__setitem__("a", x),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_another_array_is_seen_in_what_comes_by_closure(name):
  model, twin = Tables(), Tables()
  step = nnx.jit(lambda x: model(x))
  for i in range(4):
    for _ in range(3):
      np.testing.assert_allclose(step(X), twin(X), rtol=1e-5)
    for m in (model, twin):
      ARRAYS[name](m, jnp.full(3, 2.0 + i))


def test_arrays_by_closure_take_the_steady_path_and_old_ones_are_not_kept():
  model = Tables()
  del model.gains, model.pair  # of these, each call is compared as a whole
  step = nnx.jit(lambda x: model.net(x) * model.table * model.rows[0])
  gone = []
  for i in range(4):
    model.table = jnp.full(3, float(i))
    gone.append(weakref.ref(model.table))
    step(X), step(X)
    if _jax.no_trace_active():
      assert step._fast.find((X,)) is not None
  gc.collect()
  assert [ref() is None for ref in gone] == [True, True, True, False]


def test_a_model_that_goes_leaves_what_was_compiled_for_others():
  keep, traces = Net(), []
  box = {"net": keep}

  @nnx.jit
  def step(x):
    traces.append(None)
    return box["net"](x)

  step(X), step(X)
  for seed in range(3):
    box["net"] = Net(seed)
    step(X), step(X)
    box["net"] = keep
    gc.collect()
    step(X)
  assert len(traces) == 4


def test_new_objects_on_the_same_cells_are_no_reason_to_trace_again():
  graphdef, state = nnx.split(Net())
  traces, net = [], None

  @nnx.jit
  def step(x):
    traces.append(None)
    return net(x)

  for _ in range(4):
    net = nnx.merge(graphdef, state)
    gc.collect()
    step(X)
  assert len(traces) == 1


def made_inside(x):
  return nnx.Variable(CONSTANT, is_hijax=False)[...] + x


def cloned_inside(x):
  return nnx.clone(LOJAX)(x)


def made_before_compiling(x):
  with jax.ensure_compile_time_eval():
    layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
  return layer(x)


CONSTANT = jnp.ones(3)
LOJAX = nnx.to_lojax(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("f", [made_inside, cloned_inside, made_before_compiling])
def test_what_a_trace_makes_and_drops_is_traced_once(f):
  traces = []

  @nnx.jit
  def step(x):
    traces.append(None)
    return f(x)

  for _ in range(3):
    step(X)
    gc.collect()
  assert len(traces) == 1
