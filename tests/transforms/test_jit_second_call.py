"""What nnx.jit and nnx.grad refuse in a first call, they refuse in a second one, traced or not."""

import functools
import operator
import types
import unittest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx
from refax.errors import AliasError, DifferentiatedWriteError
from refax.transforms import around

X = jnp.arange(3.0) + 1


class Net(nnx.Module):
  def __init__(self, value):
    self.v = nnx.Param(jnp.full(3, value))
    self.calls = nnx.Variable(0)

  def __call__(self, x):
    self.calls[...] += 1
    return self.v * x


# An argument that is reached by closure, too


CALLS = {
  "plain": lambda f: f,
  "value_and_grad": nnx.value_and_grad,
  "grad": nnx.grad,
  "remat": nnx.remat,
  "print": lambda f: lambda m: (jax.debug.callback(lambda: None), f(m))[1],
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_second_call_with_what_is_reached_by_closure_is_refused(name, tied):
  reached, other = Net(2.0), Net(3.0)
  step = nnx.jit(CALLS[name](lambda m: (reached(X) * m(X)).sum()))
  for _ in range(2):
    step(other)
  calls = int(reached.calls)
  if tied:
    other.v = reached.v
  for _ in range(2):
    with pytest.raises(AliasError, match="came as an argument and by closure"):
      step(other if tied else reached)
  assert int(reached.calls) == calls
  np.testing.assert_array_equal(reached.v, np.full(3, 2.0))


NESTED = {
  "jax.jit": lambda f: jax.jit(f),
  "nnx.jit": lambda f: nnx.jit(f),
  "scan": lambda f: lambda: jax.lax.scan(lambda c, _: (c, f()), 0, None, length=2),
  "fori_loop": lambda f: lambda: jax.lax.fori_loop(0, 2, lambda i, c: f().sum() * 0 + c, 0.0),
  "nnx.cond": lambda f: lambda: nnx.cond(True, lambda: f(), lambda: X),
  "grad": lambda f: lambda: jax.grad(lambda x: (x * f()).sum())(X),
}


@pytest.mark.parametrize("name", NESTED)
def test_inside_of_other_transforms_too(name):
  reached, other = Net(2.0), Net(3.0)
  step = nnx.jit(lambda m: m(X) + reached(X))
  NESTED[name](lambda: step(other))()
  with pytest.raises(AliasError):
    NESTED[name](lambda: step(reached))()
  assert int(other.calls) >= 1


def test_ahead_of_time_and_after_another_model_too():
  reached, other = Net(2.0), Net(3.0)
  compiled = nnx.jit(lambda m: (reached(X) * m(X)).sum()).lower(other).compile()
  assert float(compiled(other)) == float((reached.v * X * other.v * X).sum())
  with pytest.raises(Exception, match=r"by closure|other arguments"):
    compiled(reached)
  assert int(reached.calls) == 1


def test_what_is_reached_and_not_used_may_be_an_argument():
  holder = types.SimpleNamespace(a=Net(2.0), b=Net(3.0))
  step = nnx.jit(lambda m, x: m(x) if m is not holder.b else x)
  np.testing.assert_array_equal(step(Net(4.0), X), 4 * X)


# A gradient of code that was traced before


TRACED = {
  "nnx.jit": nnx.jit,
  "jax.jit": jax.jit,
  "checkpoint": jax.checkpoint,
  "scan": lambda f: lambda x: jax.lax.scan(f_of(f), x, None, length=1)[0],
  "cond": lambda f: lambda x: jax.lax.cond(True, f, f, x),
  "nnx.scan": lambda f: nnx.scan(f, in_axes=nnx.Carry, out_axes=nnx.Carry, length=1),
}


@functools.cache
def f_of(f):
  return lambda x, _: (f(x), None)


@pytest.mark.parametrize("name", TRACED)
def test_a_read_of_what_is_differentiated_is_refused_in_traced_code(name):
  actor, critic = Net(2.0), Net(3.0)

  def read(x):
    return critic.v * x

  value = TRACED[name](read)
  before = nnx.grad(lambda m: value(m.v * X).sum())(actor)
  np.testing.assert_array_equal(before["v"], 3 * X)
  for _ in range(2):
    with pytest.raises(AliasError, match="read through another object"):
      nnx.grad(lambda m: (value(X) ** 2).sum())(critic)
  again = nnx.grad(lambda m: value(m.v * X).sum())(actor)
  np.testing.assert_array_equal(again["v"], 3 * X)


def test_gradients_are_not_traced_again_for_each_call_nor_for_each_model():
  traces = []

  @jax.jit
  def square(x):
    traces.append(x)
    return x * x

  for model in (Net(2.0), Net(3.0)):
    for _ in range(2):
      nnx.grad(lambda m: square(m.v).sum())(model)
  assert len(traces) == 1
  jax.jit(lambda: model.v + 1)()  # a trace has it by closure
  for _ in range(2):
    nnx.grad(lambda m: square(m.v).sum())(model)
  assert len(traces) == 2


def test_a_write_to_what_is_differentiated_is_refused_after_one_to_a_copy():
  def write(m):
    m.v[...] = 5 * X
    return m.v.sum()

  step, model = nnx.jit(write), Net(2.0)
  nnx.grad(lambda m: step(nnx.clone(m)))(model)
  for _ in range(2):
    with pytest.raises(DifferentiatedWriteError):
      nnx.grad(step)(model)
  np.testing.assert_array_equal(model.v, np.full(3, 2.0))


# Another class


class Double(Net):
  def __call__(self, x):
    return 2 * super().__call__(x)


SETTERS = {
  "assignment": lambda m, cls: setattr(m, "__class__", cls),
  "object": lambda m, cls: object.__setattr__(m, "__class__", cls),  # as IPython's autoreload
}


@pytest.mark.parametrize("name", SETTERS)
@pytest.mark.parametrize("make", [nnx.jit, jax.jit, lambda f: lambda m: f(nnx.clone(m))])
def test_an_object_of_another_class_is_one(name, make):
  model = Net(2.0)
  step = make(lambda m: m(X))
  np.testing.assert_array_equal(step(model), 2 * X)
  SETTERS[name](model, Double)
  assert type(model) is model.__class__ is Double
  for f in (step, make(lambda m: m(X))):
    np.testing.assert_array_equal(f(model), 4 * X)
  SETTERS[name](model, Net)
  np.testing.assert_array_equal(step(model), 2 * X)
  with pytest.raises(TypeError):
    SETTERS[name](model, int)


# Another model in a place that text names


def _holder():
  def holder():
    pass

  return holder


def _match(t, x):
  match t:
    case types.SimpleNamespace(model=m):
      return m(x)


PLACES = {
  "getattr": (types.SimpleNamespace(), lambda t, x: getattr(t, "model")(x)),  # noqa: B009
  "getattr with a default": (types.SimpleNamespace(), lambda t, x: getattr(t, "model", None)(x)),
  "__dict__": (types.SimpleNamespace(), lambda t, x: t.__dict__["model"](x)),
  "vars": (types.SimpleNamespace(), lambda t, x: vars(t)["model"](x)),
  "attrgetter": (types.SimpleNamespace(), lambda t, x: operator.attrgetter("model")(t)(x)),
  "match": (types.SimpleNamespace(), _match),
  "an attribute of a function": (_holder(), lambda t, x: t.model(x)),
}


@pytest.mark.parametrize("name", PLACES)
def test_another_model_under_a_name_in_text_is_seen(name):
  t, use = PLACES[name]
  t.model = first = Net(2.0)
  step = nnx.jit(lambda x: use(t, x))
  for _ in range(2):
    np.testing.assert_array_equal(step(X), 2 * X)
  t.model = second = Net(3.0)
  for _ in range(2):
    np.testing.assert_array_equal(step(X), 3 * X)
  assert (int(first.calls), int(second.calls)) == (2, 2)


def test_a_model_in_an_attribute_of_a_decorated_function_is_seen():
  @functools.wraps(times)
  def holder():
    pass

  holder.model = Net(2.0)
  tools = {"holder": holder}
  step = nnx.jit(lambda x: tools["holder"].model(x))
  assert step(X).tolist() == (2 * X).tolist()
  other = functools.wraps(times)(lambda: None)
  other.model = Net(3.0)
  tools["holder"] = other
  assert step(X).tolist() == (3 * X).tolist()


def test_another_model_in_a_derivative_of_the_user_is_seen():
  box = types.SimpleNamespace(model=Net(2.0))
  rule = jax.custom_vjp(lambda x: x)
  rule.defvjp(lambda x: (x, None), lambda _, g: (box.model.v * g,))
  step = nnx.jit(lambda x: jax.grad(lambda x: rule(x).sum())(x))
  assert step(X).tolist() == [2, 2, 2]
  box.model = Net(3.0)
  assert step(X).tolist() == [3, 3, 3]


# Around the code of a lambda that is written again


def times():
  return 2.0


def thrice():
  return 3.0


def with_gain():
  pass


class Scaled(nnx.Param):
  gain = 2.0


class Setting(Net):
  @property
  def k(self):
    return self.v[...]

  @k.setter
  def k(self, value):
    self.v[...] = value * factor


class Meta(type):
  gain = 2.0


class WithMeta(metaclass=Meta):
  pass


@functools.singledispatch
def by_case(m, x):
  return x


@by_case.register
def _(m: Net, x):
  return x * factor


factor = 2.0
with_gain.gain = 2.0
rule = jax.custom_vjp(lambda x: x)
rule.defvjp(lambda x: (x, None), lambda _, g: (g * factor,))
rule_jvp = jax.custom_jvp(lambda x: x)
rule_jvp.defjvp(lambda primals, tangents: (primals[0], tangents[0] * factor))
schedule = optax.scale_by_schedule(lambda count: factor)
settings = types.ModuleType("settings")
settings.__file__, settings.scale = "/user/settings.py", 2.0
view = types.MappingProxyType(options := {"scale": 2.0})


def _set_k(m, x):
  m.k = x
  return m.v[...]


AROUND = {
  "bwd": lambda jit: jit(lambda x: jax.grad(lambda x: rule(x).sum())(x))(X),
  "jvp": lambda jit: jit(lambda x: jax.grad(lambda x: rule_jvp(x).sum())(x))(X),
  "schedule": lambda jit: jit(lambda x: schedule.update(x, schedule.init(x))[0])(X),
  "class of a Variable": lambda jit: jit(lambda v, x: v[...] * v.gain)(Scaled(jnp.ones(3)), X),
  "cases": lambda jit: jit(lambda m, x: by_case(m, x))(Net(1.0), X),
  "code": lambda jit: jit(lambda x: x * times())(X),
  "setter": lambda jit: jit(lambda m, x: _set_k(m, x))(Setting(1.0), X),
  "attribute of a function": lambda jit: jit(lambda x: x * with_gain.gain)(X),
  "metaclass": lambda jit: jit(lambda x: x * WithMeta.gain)(X),
  "getattr": lambda jit: jit(lambda x: x * getattr(settings, "scale"))(X),  # noqa: B009
  "hasattr": lambda jit: jit(lambda x: x * 3 if hasattr(settings, "more") else x)(X),
  "view": lambda jit: jit(lambda x: x * view["scale"])(X),
}


@pytest.fixture
def changed(monkeypatch):
  def change():
    monkeypatch.setitem(globals(), "factor", 3.0)
    monkeypatch.setattr(times, "__code__", thrice.__code__)
    monkeypatch.setattr(with_gain, "gain", 3.0)
    monkeypatch.setattr(Scaled, "gain", 3.0)
    monkeypatch.setattr(Meta, "gain", 3.0)
    monkeypatch.setattr(settings, "scale", 3.0)
    monkeypatch.setattr(settings, "more", 3.0, raising=False)
    monkeypatch.setitem(options, "scale", 3.0)

  return change


@pytest.mark.parametrize("name", AROUND)
def test_a_lambda_that_is_written_again_sees_what_has_changed(name, changed):
  before = np.asarray(AROUND[name](nnx.jit))
  np.testing.assert_array_equal(AROUND[name](nnx.jit), before)
  changed()
  want = np.asarray(AROUND[name](jax.jit))
  assert not np.array_equal(before, want)
  np.testing.assert_array_equal(AROUND[name](nnx.jit), want)


@pytest.mark.parametrize(
  "defaults",
  [(np.float32(0.0), np.float32(-0.0)), (frozenset({1}), frozenset({True})), (0.0, -0.0)],
)
def test_defaults_that_python_takes_for_equal_are_others(defaults):
  def run(default):
    text = nnx.jit(lambda x, d=default: x if str(d) == str(defaults[0]) else -x)
    return np.asarray(text(X))

  for _ in range(2):
    np.testing.assert_array_equal(run(defaults[0]), X)
    np.testing.assert_array_equal(run(defaults[1]), -X)


# One function, again and again


def _closure():
  model, k = Net(2.0), 3.0
  return lambda x: model(x) * k


def _loss():
  other = Net(3.0)
  return lambda m: (m(X) * other(X)).sum()


def _callable():
  class Step:
    def __init__(self):
      self.model = Net(2.0)

    def __call__(self, x):
      return self.model(x)

  return Step()


class Trainer:
  def __init__(self):
    self.model = Net(2.0)

  def step(self, x):
    return self.model(x)


key = jax.random.key(0)
array = jnp.ones(3)


def with_key(x):
  return x + jax.random.normal(key, x.shape) + array


ONE = {
  "closure": (_closure(), (X,)),
  "gradient": (nnx.value_and_grad(_loss()), (Net(2.0),)),
  "callable": (_callable(), (X,)),
  "method": (Trainer().step, (X,)),
  "jax.vmap": (jax.vmap(lambda x, k=X: x * k.sum()), (X,)),
  "partial": (functools.partial(jnp.add, jnp.ones(3)), (X,)),
  "built in": (jnp.sin, (X,)),
  "global arrays": (with_key, (X,)),
}


@pytest.mark.parametrize("name", ONE)
def test_one_function_is_compiled_once(name):
  f, args = ONE[name]
  made = nnx.jit(f)
  want = made(*args)
  for _ in range(2):
    again = nnx.jit(f)
    assert again._fast is made._fast
    jax.tree.map(np.testing.assert_array_equal, again(*args), want)


def test_one_function_with_other_things_around_it_is_traced_again(monkeypatch):
  box = [3.0]
  f = lambda x: x * box[0] * factor + array
  assert nnx.jit(f)(X).tolist() == (X * 6 + 1).tolist()
  box[0] = 4.0
  assert nnx.jit(f)(X).tolist() == (X * 8 + 1).tolist()
  monkeypatch.setitem(globals(), "array", jnp.zeros(3))
  assert nnx.jit(f)(X).tolist() == (X * 8).tolist()
  monkeypatch.setitem(globals(), "factor", 1.0)
  assert nnx.jit(f)(X).tolist() == (X * 4).tolist()


# A test case leads to everything that runs it


class InTestCase(unittest.TestCase):
  def test_a_step_that_uses_the_test_case_is_looked_through_in_no_time(self):
    model = Net(2.0)

    @nnx.jit
    def step(m, x):
      self.assertEqual(x.shape, (3,))
      return m(x)

    np.testing.assert_array_equal(step(model, X), 2 * X)
    np.testing.assert_array_equal(step(model, X), 2 * X)
    self.assertEqual(int(model.calls), 2)


# What a step mentions is known, or nnx.jit(f) would be compiled in each call


STRANGE = {"c_", "r_", "s_", "index_exp", "mgrid", "ogrid"}  # indexed, and not called


@pytest.mark.parametrize("name", ["jnp", "jax.nn", "jax.lax", "jax.random", "optax", "nnx"])
def test_code_that_mentions_functions_of_a_library_is_known(name):
  space = {"jnp": jnp, "jax": jax, "optax": optax, "nnx": nnx}
  library = eval(name, space)
  unknown = []
  for attribute in dir(library):
    if attribute.startswith("_") or isinstance(getattr(library, attribute), types.ModuleType):
      continue
    exec(f"def f(x): return {name}.{attribute}", space)
    looked = around.Around()
    looked.add([space["f"]])
    if not (looked.is_known and looked.is_light and looked.holds()):
      unknown.append(attribute)
  assert set(unknown) <= STRANGE


TRANSFORMATIONS = ["adam", "adamw", "sgd", "lion", "rmsprop", "adafactor", "lamb"]


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_code_that_uses_a_transformation_of_optax_is_known(name):
  tx = optax.chain(
    optax.clip_by_global_norm(1.0), getattr(optax, name)(optax.cosine_decay_schedule(1.0, 10))
  )
  step = lambda x: tx.update(x, tx.init(x))
  looked = around.Around()
  looked.add([step])
  assert looked.is_known and looked.holds()
