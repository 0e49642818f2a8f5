"""What nnx.jit reaches by closure, in places that an attack found: each change there is seen."""

import dataclasses
import functools
import gc
import sys
import textwrap
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx

X = jnp.ones((4, 2))
NS = types.SimpleNamespace


def layer(seed=0):
  return nnx.Linear(2, 2, rngs=nnx.Rngs(seed))


def module_of(monkeypatch, name, source):
  """A module of the user's, with a file."""
  module = types.ModuleType(name)
  module.__file__ = f"/user/{name}.py"
  monkeypatch.setitem(sys.modules, name, module)
  exec(compile(textwrap.dedent(source), module.__file__, "exec"), vars(module))
  return module


def agrees(f, plain, *args):
  """A compiled function gives what the plain one gives, also the second time."""
  for _ in range(3):
    np.testing.assert_allclose(f(*args), plain(*args), rtol=1e-6)


# A place is empty for a while


def _attribute():
  t = NS(m=layer(), ema=layer(1))
  step = lambda x: t.m(x) + (t.ema(x) if t.ema is not None else 0)
  return step, lambda x: setattr(t, "ema", x)


def _first_attribute():
  t = NS(m=layer(), ema=None)
  step = lambda x: t.m(x) + (t.ema(x) if t.ema is not None else 0)
  return step, lambda x: setattr(t, "ema", x)


def _deleted_attribute():
  t = NS(m=layer(), ema=layer(1))
  step = lambda x: t.m(x) + (t.ema(x) if hasattr(t, "ema") else 0)
  return step, lambda x: delattr(t, "ema") if x is None else setattr(t, "ema", x)


def _list():
  m, items = layer(), [layer(1)]
  step = lambda x: m(x) + sum(item(x) for item in items)
  return step, lambda x: items.__setitem__(slice(None), [] if x is None else [x])


def _empty_list():
  m, items = layer(), []
  step = lambda x: m(x) + sum(item(x) for item in items)
  return step, lambda x: items.__setitem__(slice(None), [] if x is None else [x])


def _dict():
  m, items = layer(), {"a": layer(1)}
  step = lambda x: m(x) + (items["a"](x) if "a" in items else 0)
  return step, lambda x: items.pop("a", None) if x is None else items.__setitem__("a", x)


def _none_in_dict():
  m, items = layer(), {"a": None}
  step = lambda x: m(x) + (items["a"](x) if items["a"] is not None else 0)
  return step, lambda x: items.__setitem__("a", x)


def _cell():
  m, other = layer(), layer(1)

  def change(x):
    nonlocal other
    other = x

  return (lambda x: m(x) + (other(x) if other is not None else 0)), change


def _global():
  globals()["_other"] = layer(1)
  m = layer()
  step = lambda x: m(x) + (_other(x) if _other is not None else 0)
  return step, lambda x: globals().__setitem__("_other", x)


_other = None


@pytest.mark.parametrize(
  "make",
  [
    _attribute, _first_attribute, _deleted_attribute, _list, _empty_list, _dict, _none_in_dict,
    _cell, _global,
  ],
)  # fmt: skip
def test_a_place_that_was_empty_is_looked_at_again(make):
  step, change = make()
  f = nnx.jit(step)
  agrees(f, step, X)
  models = [layer(seed) for seed in range(1, 4)]  # they live on: the end of one would be noticed
  old = [x for x in gc.get_objects() if isinstance(x, nnx.Module)]
  for model in (None, models[0], None, models[1], models[2], None, models[0]):
    change(model)
    agrees(f, step, X)
  assert old


# What else there is of a Variable


@pytest.mark.parametrize("hijax", [True, False])
@pytest.mark.parametrize("wrap", [lambda v: NS(v=v), lambda v: nnx.List([v]), lambda v: [v]])
def test_other_metadata_is_seen(hijax, wrap):
  v = nnx.Param(jnp.ones(2), scale=1.0, is_hijax=hijax)
  holder = wrap(v)
  get = lambda: holder.v if isinstance(holder, NS) else holder[0]
  step = lambda: get()[...] * get().scale
  f = nnx.jit(step)
  agrees(f, step)
  v.set_metadata(scale=2.0)
  agrees(f, step)


# Where models are


def _states():
  box = NS(s=nnx.state(layer()))
  return (lambda x: x @ box.s["kernel"] + box.s["bias"]), lambda: setattr(
    box, "s", nnx.state(layer(1))
  )


def _variable_in_state():
  s = nnx.state(layer())
  return (lambda x: x + s["bias"]), lambda: s.__setitem__("bias", nnx.Param(jnp.ones(2)))


def _merged_state():
  graphdef, s = nnx.split(layer())
  d = {"s": s}
  return (lambda x: nnx.merge(graphdef, d["s"])(x)), lambda: d.__setitem__("s", nnx.state(layer(1)))


def _function_of_object():
  box = NS(m=layer())
  trainer = NS(loss=lambda x: box.m(x))
  return (lambda x: trainer.loss(x)), lambda: setattr(box, "m", layer(1))


def _function_replaced():
  state = NS(apply_fn=layer().__call__)
  return (lambda x: state.apply_fn(x)), lambda: setattr(state, "apply_fn", layer(1).__call__)


def _partial_replaced():
  state = NS(apply_fn=functools.partial(layer()))
  return (lambda x: state.apply_fn(x)), lambda: setattr(
    state, "apply_fn", functools.partial(layer(1))
  )


def _jitted_of_object():
  class Trainer:
    def __init__(self):
      self.m = layer()
      self.step = nnx.jit(self._step)

    def _step(self, x):
      return self.m(x)

  t = Trainer()
  return (lambda x: t.step(x)), lambda: setattr(t, "m", layer(1))


def _class_container():
  class Registry:
    models = {"a": layer()}

  return (lambda x: Registry.models["a"](x)), lambda: Registry.models.__setitem__("a", layer(1))


def _classmethod():
  class Registry:
    model = layer()

    @classmethod
    def predict(cls, x):
      return cls.model(x)

  return (lambda x: Registry.predict(x)), lambda: setattr(Registry, "model", layer(1))


def _static_object():
  class Trainer:
    def __init__(self):
      self.m = layer()

  t = Trainer()
  f = functools.partial(lambda t, x: t.m(x), t)
  return f, lambda: setattr(t, "m", layer(1))


def _deep_object():
  top = t = NS()
  for _ in range(30):
    t.next = NS()
    t = t.next
  t.m = layer()

  def step(x):
    at = top
    while hasattr(at, "next"):
      at = at.next
    return at.m(x)

  return step, lambda: setattr(t, "m", layer(1))


def _deep_decorators():
  box = NS(m=layer())
  step = lambda x: box.m(x)

  def decorated(f):
    def call(x):
      return f(x)

    return call

  for _ in range(40):
    step = decorated(step)
  return step, lambda: setattr(box, "m", layer(1))


def _without_module():
  space = {"box": NS(m=layer())}
  exec("t = type('T', (), {})()\ndef f(x): return box.m(x) if t else x", space)
  return space["f"], lambda: setattr(space["box"], "m", layer(1))


def _defaults():
  def step(x, m=layer()):  # noqa: B008
    return m(x)

  return step, lambda: setattr(step, "__defaults__", (layer(1),))


def _partialmethod():
  class Trainer:
    def __init__(self):
      self.m = layer()

    def _run(self, scale, x):
      return scale * self.m(x)

    run = functools.partialmethod(_run, 2.0)

  t = Trainer()
  return (lambda x: t.run(x)), lambda: setattr(t, "m", layer(1))


def _context():
  class Box:
    def __init__(self):
      self.m = layer()

    def __enter__(self):
      return self.m

    def __exit__(self, *_):
      pass

  box = Box()

  def step(x):
    with box as m:
      return m(x)

  return step, lambda: setattr(box, "m", layer(1))


def _values_of_dict():
  d = {"a": layer()}
  values = d.values()
  return (lambda x: sum(m(x) for m in values)), lambda: d.__setitem__("a", layer(1))


def _attribute_of_function():
  def step(x):
    return step.model(x)

  step.model = layer()
  return step, lambda: setattr(step, "model", layer(1))


PLACES = [
  _attribute_of_function,
  _states, _variable_in_state, _merged_state, _function_of_object, _function_replaced,
  _partial_replaced, _jitted_of_object, _class_container, _classmethod, _static_object,
  _deep_object, _deep_decorators, _without_module, _defaults, _partialmethod, _context,
  _values_of_dict,
]  # fmt: skip


@pytest.mark.parametrize("make", PLACES, ids=lambda f: f.__name__)
def test_another_model_is_seen(make):
  step, change = make()
  f = nnx.jit(step)
  agrees(f, step, X)
  before = np.asarray(step(X))
  old = [x for x in gc.get_objects() if isinstance(x, nnx.Module)]  # their end would be noticed
  change()
  assert not np.allclose(before, step(X))
  agrees(f, step, X)
  assert old


def test_models_in_static_arguments_are_found():
  class Trainer:
    def __init__(self):
      self.m = layer()

    @functools.partial(nnx.jit, static_argnums=0)
    def step(self, x):
      self.m.bias[...] = self.m.bias + 1
      return self.m(x)

  t, other = Trainer(), Trainer()
  for trainer in (t, other, t):
    trainer.step(X)
  assert (t.m.bias.tolist(), other.m.bias.tolist()) == ([2, 2], [1, 1])
  old, t.m = t.m, layer(1)
  for _ in range(3):
    t.step(X)
  assert (old.bias.tolist(), t.m.bias.tolist()) == ([2, 2], [3, 3])


def test_functions_as_static_arguments_are_looked_through():
  box = NS(m=layer())
  loss = lambda x: box.m(x)
  f = nnx.jit(lambda loss, x: loss(x) * 2, static_argnums=0)
  agrees(functools.partial(f, loss), lambda x: 2 * loss(x), X)
  old, box.m = box.m, layer(1)
  agrees(functools.partial(f, loss), lambda x: 2 * loss(x), X)
  assert old


def test_modules_of_the_users_whose_names_begin_like_a_librarys(monkeypatch):
  module = module_of(
    monkeypatch,
    "jaxtrainer",
    """
    class Trainer:
      def __init__(self, net):
        self.net = net

      def step(self, x):
        return self.net(x)
    """,
  )
  trainer = module.Trainer(layer())
  step = lambda x: trainer.step(x)
  f = nnx.jit(step)
  agrees(f, step, X)
  old, trainer.net = trainer.net, layer(1)
  agrees(f, step, X)
  assert old is not trainer.net


def test_helpers_in_other_modules_are_followed(monkeypatch):
  module = module_of(
    monkeypatch,
    "registry_of_models",
    """
    model = None
    MODELS = {}

    def current():
      return model

    def predict(x):
      return MODELS["a"](x)
    """,
  )
  module.model, module.MODELS["a"] = layer(), layer(5)
  current = module.current
  steps = [
    lambda x: current()(x),
    lambda x: module.current()(x),
    lambda x: module.predict(x),
    lambda x: module.MODELS["a"](x),
  ]
  fs = list(map(nnx.jit, steps))
  for f, step in zip(fs, steps, strict=True):
    agrees(f, step, X)
  old = module.model, module.MODELS["a"]
  module.model, module.MODELS["a"] = layer(1), layer(6)
  for f, step in zip(fs, steps, strict=True):
    agrees(f, step, X)
  assert old


def test_all_helpers_are_looked_through(monkeypatch):
  functions = "\n".join(f"def h{i}(x): return x" for i in range(300))
  calls = "\n".join(f"  x = h{i}(x)" for i in range(300))
  source = f"{functions}\ndef use(x): return box.net(x)\ndef main(x):\n{calls}\n  return use(x)\n"
  module = module_of(monkeypatch, "many_helpers", source)
  module.box = NS(net=layer())
  f = nnx.jit(module.main)
  agrees(f, module.main, X)
  old, module.box.net = module.box.net, layer(1)
  agrees(f, module.main, X)
  assert old


def test_a_weak_proxy_of_a_model_is_the_model():
  q = layer()
  proxy = weakref.proxy(q)
  step = lambda x: proxy(x)
  f = nnx.jit(step)
  agrees(f, step, X)
  q.kernel[...] *= 2
  agrees(f, step, X)
  q.kernel = nnx.Param(jnp.ones((2, 2)))
  agrees(f, step, X)


# Static values that have a hash, of what is in them, and change


@dataclasses.dataclass(unsafe_hash=True)
class Settings:
  scale: float

  def __call__(self, x):
    return x * self.scale


class ByName:
  def __init__(self, scale):
    self.scale = scale

  def __hash__(self):
    return hash(self.scale)

  def __eq__(self, other):
    return isinstance(other, ByName) and self.scale == other.scale

  def __call__(self, x):
    return x * self.scale


class Scaled(nnx.Module):
  def __init__(self, settings):
    self.settings = settings

  def __call__(self, x):
    return self.settings(x)


@pytest.mark.parametrize("cls", [Settings, ByName])
def test_a_static_value_that_changes_its_hash_is_another(cls):
  settings = cls(2.0)
  model = Scaled(settings)
  fs = [
    functools.partial(nnx.jit(lambda settings, x: settings(x), static_argnums=0), settings),
    functools.partial(nnx.jit(lambda model, x: model(x)), model),
    nnx.jit(lambda x: model(x)),
  ]
  for scale in (2.0, 3.0, 4.0, 2.0, 2.0, 5.0):
    settings.scale = scale
    for f in fs:
      for _ in range(3):
        assert f(X)[0].tolist() == [scale, scale]
  settings.scale = []
  with pytest.raises((TypeError, ValueError)):
    fs[0](X)
  settings.scale = 3.0
  assert fs[0](X)[0].tolist() == [3.0, 3.0]


# Memory


def test_a_part_that_was_replaced_is_freed():
  class Trainer(nnx.Module):
    def __init__(self):
      self.net = None

  t = Trainer()
  f = nnx.jit(lambda x: t.net(x))
  size = lambda: sum(a.nbytes for a in jax.live_arrays())
  sizes = []
  for i in range(6):
    t.net = nnx.Linear(64, 64, rngs=nnx.Rngs(i))
    for _ in range(3):
      f(jnp.ones((1, 64)))
    gc.collect()
    sizes.append(size())
  assert max(sizes[1:]) <= sizes[1] + 1000


def test_parts_that_take_turns_are_traced_once_each():
  class Trainer(nnx.Module):
    def __init__(self):
      self.net = None

  t, traces = Trainer(), []

  def step(x):
    traces.append(1)
    return t.net(x)

  f, nets = nnx.jit(step), [layer(i) for i in range(3)]
  for _ in range(4):
    for net in nets:
      t.net = net
      np.testing.assert_allclose(f(X), net(X), rtol=1e-6)
  assert len(traces) == 3


# Loops of JAX itself, whose traces JAX keeps by the function that they run


def _scan(body):
  return lambda x: jax.lax.scan(lambda c, _: (body(c), None), x, None, length=1)[0]


LOOPS = {
  "scan": lambda body: lambda x: jax.lax.scan(body, x, None, length=1)[0],
  "fori_loop": lambda body: lambda x: jax.lax.fori_loop(0, 1, lambda i, x: body(x, None)[0], x),
  "fori_loop, same function": lambda body: lambda x: jax.lax.fori_loop(0, 1, _swapped(body), x),
  "cond": lambda body: lambda x: jax.lax.cond(True, _alone(body), _alone(body), x),
  "switch": lambda body: lambda x: jax.lax.switch(0, [_alone(body), _alone(body)], x),
  "checkpoint": lambda body: jax.checkpoint(_alone(body)),
  "jit": lambda body: jax.jit(_alone(body)),
}


@functools.lru_cache
def _swapped(body):
  return lambda i, x: body(x, None)[0]


@functools.lru_cache
def _alone(body):
  return lambda x: body(x, None)[0]


@pytest.mark.parametrize("name", LOOPS)
def test_a_body_that_jax_knows_already_is_traced_again(name):
  model = nnx.Sequential(layer(), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
  box = NS(m=model)
  body = lambda c, _: (box.m(c), None)
  run = LOOPS[name](body)
  f = nnx.jit(lambda x: run(x))
  f(X)
  model.eval()
  for _ in range(2):
    np.testing.assert_allclose(f(X), model(X), rtol=1e-6)
  old, box.m = box.m, layer(1)
  for _ in range(2):
    np.testing.assert_allclose(f(X), box.m(X), rtol=1e-6)
  assert old


def test_writes_of_such_a_body_go_to_the_model_that_is_there():
  box = NS(m=layer())

  def body(i, x):
    box.m.bias[...] = box.m.bias + 1
    return x

  f = nnx.jit(lambda x: jax.lax.fori_loop(0, 3, body, x))
  f(1.0)
  old, box.m = box.m, layer(1)
  f(1.0)
  assert old.bias.tolist() == box.m.bias.tolist() == [3, 3]
