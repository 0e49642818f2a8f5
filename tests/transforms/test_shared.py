"""nnx.jit of one function, written again: what was compiled is shared, if it would be the same."""

import dataclasses
import datetime
import dis
import enum
import functools
import gc
import os
import pathlib
import random
import signal
import threading
import time
import types
import uuid
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import AliasError
from refax.transforms import around, places, shared

X = jnp.arange(3.0)


def same(a, b):
  """Whether two functions of nnx.jit share what was compiled."""
  return a._fast is b._fast


scale: Any = 2.0
other: Any = types.ModuleType("other")
other.scale = 2.0


class Net(nnx.Module):
  factor = 1.0

  def __init__(self):
    self.w = nnx.Param(jnp.ones(3))
    self.calls = nnx.Variable(0)

  @property
  def doubled(self):
    return 2 * self.factor

  def __call__(self, x, times=1):
    self.calls[...] += 1
    return self.w * x * self.factor * times

  def twice(self, x):
    return self(x) + self(x)

  def doubled_by(self, x):
    return x * self.doubled


class Wider(Net):
  pass


@dataclasses.dataclass
class Config:
  scale: float = 2.0
  inner: Any = None

  def scaled(self, x):
    return x * self.scale


class Plain:
  scale = 2.0

  def __init__(self):
    self.own = 2.0

  def times(self, x):
    return x * self.own * self.scale


class Slotted:
  __slots__ = ("scale",)

  def __init__(self):
    self.scale = 2.0


class Mode(enum.Enum):
  ON = 1
  OFF = 2


config: Any = Config()
plain: Any = Plain()
slotted: Any = Slotted()
table: Any = {"scale": 2.0, "more": [1.0, {"x": 2.0}]}
mode: Any = Mode.ON
array: Any = jnp.ones(3)
small: Any = np.ones(3)
large: Any = np.ones(100_000)
namespace: Any = types.SimpleNamespace(scale=2.0)
stream: Any = np.random.default_rng(0)
counter: Any = iter([])


def helper(x):
  return x * scale


partly: Any = functools.partial(lambda factors, x: x * factors[0], [2.0])


def decorated(f):
  factors = [1.0]

  @functools.wraps(f)
  def call(*args):
    return f(*args) * factors[0]

  call.factors = factors
  return call


def plus(model, x):
  return model(x)


def by_global(model, x):
  return model(x) * scale


def by_helper(model, x):
  return helper(model(x))


def by_lambda(model, x):
  return jax.tree.map(lambda y: y * scale, model(x))


def by_module(model, x):
  return model(x) * other.scale


def by_import(model, x):
  import other_at_runtime  # pyright: ignore[reportMissingImports]

  return model(x) * other_at_runtime.scale


def by_config(model, x):
  return model(x) * config.scale


def by_method_of_config(model, x):
  return config.scaled(model(x))


def by_plain(model, x):
  return plain.times(model(x))


def by_slots(model, x):
  return model(x) * slotted.scale


def by_table(model, x):
  return model(x) * table["scale"] * table["more"][1]["x"]


def by_mode(model, x):
  return model(x) if mode is Mode.ON else -model(x)


def by_array(model, x):
  return model(x) * array


def by_numpy(model, x):
  return model(x) * small


def by_large(model, x):
  return model(x) * large[:3]


def by_namespace(model, x):
  return model(x) * namespace.scale


def by_partial(model, x):
  return partly(model(x))


def by_default(model, x, scale=2.0):
  return model(x) * scale


def by_list_default(model, x, scales=[2.0]):  # noqa: B006
  return model(x) * scales[0]


@decorated
def by_closure(model, x):
  return model(x)


def _with_cells():
  defaults, kwdefaults = [1.0], [1.0]

  @functools.wraps(plus)
  def call(model, x):
    return plus(model, x) * defaults[0] * kwdefaults[0]

  call.cells = defaults, kwdefaults
  call.__qualname__ = "by_cells"
  return call


by_cells = _with_cells()


def by_property(model, x):
  return model.doubled_by(x)


def by_global_model(x):
  return one(x)


one: Any = None


def _set(owner: str, name: str, value: Any):
  def change(monkeypatch):
    monkeypatch.setattr(globals()[owner], name, value)

  return change


def _global(name: str, value: Any):
  return lambda monkeypatch: monkeypatch.setitem(globals(), name, value)


def _item(get, key: Any, value: Any):
  def change(monkeypatch):
    holder, old = get(), get()[key]
    holder[key] = value
    monkeypatch.undo_item = lambda: holder.__setitem__(key, old)

  return change


CHANGES = {
  "a global": (by_global, _global("scale", 5.0)),
  "its type": (by_global, _global("scale", 2)),
  "a global of a helper": (by_helper, _global("scale", 5.0)),
  "a helper": (by_helper, _global("helper", lambda x: -x)),
  "a global in a lambda": (by_lambda, _global("scale", 5.0)),
  "an attribute of a module": (by_module, _set("other", "scale", 5.0)),
  "a field of a config": (by_config, _set("config", "scale", 5.0)),
  "what a method of a config reads": (by_method_of_config, _set("config", "scale", 5.0)),
  "what a method reads": (by_plain, _set("plain", "own", 5.0)),
  "an attribute of a class": (by_plain, _set("Plain", "scale", 5.0)),
  "one that hides it": (by_plain, lambda m: m.setattr(plain, "scale", 5.0)),
  "a method": (by_plain, _set("Plain", "times", lambda self, x: -x)),
  "a slot": (by_slots, _set("slotted", "scale", 5.0)),
  "an item": (by_table, _item(lambda: table, "scale", 5.0)),
  "an item below": (by_table, _item(lambda: table["more"][1], "x", 5.0)),
  "an enum": (by_mode, _global("mode", Mode.OFF)),
  "an array": (by_array, _global("array", 5 * jnp.ones(3))),
  "an array of NumPy, in place": (by_numpy, _item(lambda: small, 1, 5.0)),
  "a large one": (by_large, _item(lambda: large, 1, 5.0)),
  "a namespace": (by_namespace, _set("namespace", "scale", 5.0)),
  "a list in a partial": (by_partial, _item(lambda: partly.args[0], 0, 5.0)),
  "a default": (by_default, _set("by_default", "__defaults__", (5.0,))),
  "a list as a default": (by_list_default, _item(lambda: by_list_default.__defaults__[0], 0, 5.0)),
  "a closure of a decorator": (by_closure, _item(lambda: by_closure.factors, 0, 5.0)),
  "a cell called defaults": (by_cells, _item(lambda: by_cells.cells[0], 0, 5.0)),
  "a cell called kwdefaults": (by_cells, _item(lambda: by_cells.cells[1], 0, 5.0)),
  "an attribute of the model's class": (plus, _set("Net", "factor", 5.0)),
  "a method of the model's class": (plus, _set("Net", "__call__", lambda self, x: -x)),
  "what a property reads": (by_property, _set("Net", "factor", 5.0)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_around_a_function_is_seen_by_a_new_jit(name, monkeypatch):
  f, change = CHANGES[name]
  model = Wider() if "class" in name else Net()
  for _ in range(3):
    nnx.jit(f)(model, X)
  before = np.asarray(f(model, X))
  change(monkeypatch)
  after = np.asarray(f(model, X))
  assert name == "its type" or not np.array_equal(before, after)
  found = nnx.jit(f)(model, X)
  np.testing.assert_array_equal(np.asarray(found), after)
  assert found.dtype == jnp.asarray(f(model, X)).dtype
  getattr(monkeypatch, "undo_item", monkeypatch.undo)()
  np.testing.assert_array_equal(np.asarray(nnx.jit(f)(model, X)), before)


def test_a_module_that_is_imported_in_the_function_is_looked_at(monkeypatch):
  module = types.ModuleType("other_at_runtime")
  module.scale = 2.0  # pyright: ignore[reportAttributeAccessIssue]
  monkeypatch.setitem(__import__("sys").modules, "other_at_runtime", module)
  model = Net()
  assert nnx.jit(by_import)(model, X).tolist() == [0, 2, 4]
  assert same(nnx.jit(by_import), nnx.jit(by_import))
  module.scale = 5.0  # pyright: ignore[reportAttributeAccessIssue]
  assert nnx.jit(by_import)(model, X).tolist() == [0, 5, 10]


SHARED = [by_global, by_helper, by_module, by_config, by_plain, by_table, by_numpy, plus]


@pytest.mark.parametrize("f", SHARED, ids=lambda f: f.__name__)
def test_what_was_compiled_for_a_function_is_found_again(f):
  model = Net()
  made = nnx.jit(f)
  made(model, X)
  assert same(nnx.jit(f), made)
  assert not same(nnx.jit(f, donate_argnums=1), made)
  assert same(nnx.jit(f, static_argnums=()), made)


def test_what_a_transform_makes_of_a_function_is_found_again():
  model = Net()
  made = {
    "grad": lambda: nnx.jit(nnx.grad(total)),
    "value_and_grad": lambda: nnx.jit(nnx.value_and_grad(total, wrt=nnx.Param)),
    "vmap": lambda: nnx.jit(nnx.vmap(nnx.grad(total), in_axes=(None, 0))),
  }
  for name, make in made.items():
    f = make()
    f(model, X if name != "vmap" else jnp.ones((2, 3)))
    assert same(make(), f), name
  assert len({id(make()._fast) for make in made.values()}) == 3
  assert not same(nnx.jit(nnx.grad(total, argnums=1)), nnx.jit(nnx.grad(total)))


def total(model, x):
  return model(x).sum()


def test_a_function_with_the_marks_of_another_one_is_not_taken_for_it():
  gradient = nnx.grad(total)

  @functools.wraps(gradient)
  def negative(*args):
    return jax.tree.map(jnp.negative, gradient(*args))

  model = Net()
  assert nnx.jit(gradient)(model, X)["w"].tolist() == [0, 1, 2]
  assert nnx.jit(negative)(model, X)["w"].tolist() == [0, -1, -2]


def random_numbers(model, x):
  return model(x) * stream.normal()


def numbers_in_turn(model, x):
  return model(x) * next(counter)


@pytest.mark.parametrize("f", [by_large, by_slots, random_numbers])
def test_what_cannot_be_compared_is_compiled_again(f):
  made = nnx.jit(f)
  made(Net(), X)
  assert not same(nnx.jit(f), made)


def test_an_iterator_is_asked_by_each_new_trace(monkeypatch):
  monkeypatch.setitem(globals(), "counter", iter([1.0, 2.0, 3.0]))
  model = Net()
  assert [float(nnx.jit(numbers_in_turn)(model, X)[1]) for _ in range(3)] == [1, 2, 3]


def _made_here(k=None):
  def with_closure(model, x):
    return model(x) * k

  return {
    "lambda": lambda model, x: model(x) * scale,
    "gradient": nnx.grad(lambda model, x: total(model, x)),
    "with closure": with_closure,
    "list as default": lambda model, x, more=[]: model(x),
    "default": lambda model, x, times=(2, 3): model(x) * times[0],
  }


def test_lambdas_of_the_same_code_share_what_was_compiled(monkeypatch):
  first = {name: nnx.jit(f) for name, f in _made_here(1).items()}
  model = Net()
  for f in first.values():
    f(model, X)
  second = {name: nnx.jit(f) for name, f in _made_here(2).items()}
  assert {name: same(second[name], first[name]) for name in first} == {
    "lambda": True, "gradient": True, "with closure": False, "list as default": False,
    "default": True,
  }  # fmt: skip
  assert second["with closure"](model, X).tolist() == [0, 2, 4]
  monkeypatch.setitem(globals(), "scale", 5.0)
  assert nnx.jit(_made_here()["lambda"])(model, X).tolist() == [0, 5, 10]


def test_partials_of_the_same_share_what_was_compiled():
  model, mine = Net(), Plain()
  for make in (
    lambda: functools.partial(by_default, scale=3.0),
    lambda: functools.partial(nnx.grad(scaled_total), scale=2.0),
  ):
    made = nnx.jit(make())
    made(model, x=X)
    assert same(nnx.jit(make()), made)
  assert nnx.jit(functools.partial(by_default, scale=3.0))(model, X).tolist() == [0, 3, 6]
  assert nnx.jit(functools.partial(by_default, scale=4.0))(model, X).tolist() == [0, 4, 8]
  one, other = (nnx.jit(functools.partial(by_default, scale=k)) for k in (3.0, 3))
  assert not same(one, other)
  for held in (mine, model, X):  # they would be kept alive
    make = lambda held=held: nnx.jit(functools.partial(plus, x=held))
    assert not same(make(), make())


def scaled_total(model, x, scale):
  return total(model, x) * scale


def test_lambdas_with_other_defaults_are_others():
  model = Net()
  fs = [(lambda model, x, k=k: model(x) * k) for k in (1, 1.0, 2, True)]
  found = [nnx.jit(f)(model, X) for f in fs]
  assert [x.tolist() for x in found] == [[0, 1, 2], [0, 1, 2], [0, 2, 4], [0, 1, 2]]
  assert len({id(nnx.jit(f)._fast) for f in fs}) == 4


def test_functions_that_ask_the_world_are_traced_anew(monkeypatch):
  model = Net()
  for f in (by_environment, by_clock, by_numpy_random, by_file):
    made = nnx.jit(f)
    made(model, X)
    assert not same(nnx.jit(f), made), f


def by_environment(model, x):
  return model(x) * float(os.environ.get("SCALE", "2"))


def by_clock(model, x):
  return model(x) * time.time()


def by_numpy_random(model, x):
  return model(x) * np.random.normal()


def by_name(model, x):
  return model(x) * draw()


draw: Any = None


def _random_numbers():
  return {
    "random": random.random,
    "now": datetime.datetime.now().timestamp,
    "uuid": uuid.uuid4,
    "getenv": os.getenv,
    "numpy": np.random.default_rng,
    "clock": time.perf_counter,
    "bound": [1.0, 2.0].pop,
    "path": pathlib.Path(__file__),
    "method of a path": pathlib.Path(__file__).read_text,
    "moment": datetime.datetime.now(),
    "pattern in a package": np.random.default_rng(0).integers,
    "class": uuid.UUID,
    "path itself": pathlib.Path,
    "stream": np.random.default_rng(0).normal,
    "package": pytest.approx,
  }


@pytest.mark.parametrize("name", _random_numbers())
def test_names_from_modules_that_ask_the_world_are_known(name):
  given = _random_numbers()[name]
  looked = around.Around()
  looked.add([given])
  assert not looked.holds()


def test_a_random_number_is_drawn_by_each_new_trace(monkeypatch):
  monkeypatch.setitem(globals(), "draw", random.random)
  model = Net()
  assert len({float(nnx.jit(by_name)(model, X)[1]) for _ in range(3)}) == 3


class Acting(nnx.Module):
  def __init__(self, act):
    self.act = act

  def __call__(self, x):
    return self.act(x)


@pytest.mark.parametrize(
  "make",
  [
    lambda: Acting(helper),
    lambda: nnx.Sequential(Net(), helper),
    lambda: Acting(functools.partial(helper)),
    lambda: Acting(config_like),
  ],
)
def test_functions_in_attributes_of_a_module_are_followed(make, monkeypatch):
  model = make()
  for value in (2.0, 3.0):
    monkeypatch.setitem(globals(), "scale", value)
    assert nnx.jit(plus)(model, X).tolist() == [0, value, 2 * value]


class Callable_:
  def __call__(self, x):
    return x * scale


config_like: Any = Callable_()


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w"], meta_fields=["apply"])
@dataclasses.dataclass
class TrainState:
  w: Any
  apply: Any


def apply_state(state, x):
  return state.apply(state.w * x)


def test_functions_in_a_pytree_are_followed(monkeypatch):
  for value in (2.0, 3.0):
    monkeypatch.setitem(globals(), "scale", value)
    state = TrainState(jnp.ones(3), helper)
    assert nnx.jit(apply_state)(state, X).tolist() == [0, value, 2 * value]
    assert nnx.jit(lambda pair: apply_state(*pair))((state, X)).tolist() == [0, value, 2 * value]


class Number:
  def __init__(self, value):
    self.value = value

  def __mul__(self, other):
    return self.value * other * scale

  def __len__(self):
    return int(scale)


number: Any = Number(1.0)


def by_operator(model, x):
  return (number * model(x)) * len(number)


def test_operators_of_classes_are_followed(monkeypatch):
  model = Net()
  assert nnx.jit(by_operator)(model, X).tolist() == [0, 4, 8]
  monkeypatch.setitem(globals(), "scale", 3.0)
  assert nnx.jit(by_operator)(model, X).tolist() == [0, 9, 18]
  monkeypatch.setattr(Number, "__mul__", lambda self, other: other)
  assert nnx.jit(by_operator)(model, X).tolist() == [0, 3, 6]


def test_what_is_patched_in_a_package_is_seen(monkeypatch):
  model = Net()
  assert nnx.jit(by_package)(model, X).tolist() == [0, 1, 2]
  monkeypatch.setattr(jnp, "negative", lambda x: x)
  assert nnx.jit(by_package)(model, X).tolist() == [0, -1, -2]


def by_package(model, x):
  return -jnp.negative(model(x))


def test_attributes_of_one_are_not_those_of_another():
  one, other = nnx.jit(plus), nnx.jit(plus)
  one.mark = 1
  assert not hasattr(other, "mark")


def by_file(model, x):
  with open(__file__) as file:
    return model(x) * len(file.readline())


def test_which_functions_can_be_imported():
  local = lambda model, x: model(x)
  assert not shared.is_importable(local)
  assert shared.is_importable(Net.twice)
  assert not shared.is_importable(Net().twice)


def test_one_that_was_defined_anew_is_another(monkeypatch):
  model = Net()
  old = nnx.jit(helper_step)
  assert old(model, X).tolist() == [0, 1, 2]
  source = "def helper_step(model, x):\n  return -model(x)"
  space = dict(globals())
  exec(source, space)
  monkeypatch.setitem(globals(), "helper_step", space["helper_step"])
  assert nnx.jit(helper_step)(model, X).tolist() == [0, -1, -2]
  assert old(model, X).tolist() == [0, 1, 2]


def helper_step(model, x):
  return model(x)


def test_traces_at_two_times_are_not_mixed(monkeypatch):
  small, large = Net(), nnx.Sequential(Net(), Net())
  made = nnx.jit(by_global)
  made(small, X)
  with monkeypatch.context() as m:
    m.setitem(globals(), "scale", 5.0)
    made(large, X)  # the same wrapper has a trace with another number now, as in JAX
  assert not same(nnx.jit(by_global), made)
  assert nnx.jit(by_global)(large, X).tolist() == [0, 2, 4]


def test_a_global_model_that_is_bound_anew_is_seen(monkeypatch):
  for value in (1.0, 2.0, 3.0):
    model = Net()
    model.w[...] *= value
    monkeypatch.setitem(globals(), "one", model)
    assert nnx.jit(by_global_model)(X).tolist() == [0, value, 2 * value]
    assert int(model.calls) == 1


def test_a_model_by_closure_is_freed_with_its_name():
  globals()["one"] = Net()
  end = weakref.ref(one.w.get_raw_value())
  for _ in range(2):
    nnx.jit(lambda x: one(x))(X)
    nnx.jit(by_global_model)(X)
  gc.collect()
  gc.disable()
  try:
    globals()["one"] = None
    assert end() is None
  finally:
    gc.enable()


def test_it_keeps_no_model_and_no_array_alive(monkeypatch):
  model = Net()
  monkeypatch.setitem(globals(), "one", Net())
  monkeypatch.setitem(globals(), "array", jnp.ones(3) * 7)
  monkeypatch.setitem(globals(), "config", Config(inner=Plain()))
  nnx.jit(plus)(model, X)
  nnx.jit(by_global_model)(X)
  nnx.jit(by_config)(model, X)
  ends = [weakref.ref(model), weakref.ref(one), weakref.ref(config.inner)]
  gc.collect()
  gc.disable()
  try:
    monkeypatch.undo()
    del model
    assert [ref() for ref in ends] == [None] * 3
  finally:
    gc.enable()


def test_defaults_and_filters_keep_no_model_alive():
  def run(model):
    nnx.jit(lambda x, m=model: m(x))(X)
    nnx.jit(nnx.grad(total, wrt=lambda path, v: v is model.w))(model, X)
    return weakref.ref(model)

  end = run(Net())
  gc.collect()
  assert end() is None


def test_what_holds_an_array_that_was_replaced_is_forgotten():
  old = array
  globals()["array"] = jnp.ones(1000)
  end = weakref.ref(array)
  nnx.jit(lambda x: x.sum() * array.sum())(X)
  globals()["array"] = old
  nnx.jit(lambda x: x + 1)(X)
  gc.collect()
  assert end() is None


def test_globals_and_imports_are_read_from_code_as_dis_does():
  import argparse
  import typing

  def wanted(code):
    globals_, imports = set(), set()
    for part in places.codes_in(code):
      for x in dis.get_instructions(part):
        if x.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
          globals_.add(x.argval)
        if x.opname == "IMPORT_NAME":
          imports.add(x.argval)
    return globals_, imports

  many = compile("\n".join(f"a{i} = b{i}; import c{i}" for i in range(700)), "many", "exec")
  space: dict[str, Any] = {}
  exec("def f():\n" + "\n".join(f"  b{i}; import c{i}" for i in range(700)), space)
  codes = [many, space["f"].__code__, by_import.__code__]
  for module in (argparse, typing, shared, jax.tree_util):
    codes += [x.__code__ for x in vars(module).values() if isinstance(x, types.FunctionType)]
  assert len(codes) > 80
  for code in codes:
    assert around._loaded(code) == wanted(code), code


class Rude:
  """Its equality raises."""

  def __hash__(self):
    return 1

  def __eq__(self, other):
    raise RuntimeError("no")


class Link:
  def __init__(self, next_):
    self.next = next_


rude: Any = Rude()
chain: Any = functools.reduce(lambda link, _: Link(link), range(3000), None)
own: Any = [1.0]
own.append(own)


@pytest.mark.parametrize("name", ["rude", "chain", "own"])
def test_to_look_around_breaks_no_program(name, monkeypatch):
  monkeypatch.setitem(globals(), "odd", globals()[name])
  model = Net()
  for _ in range(3):
    assert nnx.jit(by_odd)(model, X).tolist() == [0, 1, 2]
  monkeypatch.setitem(globals(), "odd", Rude())
  assert nnx.jit(by_odd)(model, X).tolist() == [0, 1, 2]


def by_odd(model, x):
  return model(x) if odd is not None else x


odd: Any = None


class Late(Exception):
  """What a time limit raises."""


def test_a_signal_that_comes_while_it_looks_is_handled(monkeypatch):
  def late(*_):
    raise Late

  def ringing(value):
    signal.raise_signal(signal.SIGUSR1)
    return lambda x: signal.raise_signal(signal.SIGUSR1) is None

  monkeypatch.setattr(around, "_sameness", ringing)
  looked = around.Around()
  old = signal.signal(signal.SIGUSR1, late)
  try:
    with pytest.raises(Late):
      looked.add([by_helper])
    assert looked.is_known
    with pytest.raises(Late):
      looked.holds()
  finally:
    signal.signal(signal.SIGUSR1, old)


def test_random_keys_and_names_of_modules_do_no_harm():
  def names(model, x, key):
    return model(x) + jax.random.normal(key, x.shape) + x.eval if hasattr(x, "eval") else model(x)

  model = Net()
  made = nnx.jit(names)
  made(model, X, jax.random.key(0))
  again = types.FunctionType(names.__code__, names.__globals__)
  assert same(nnx.jit(again), made)


def test_a_step_that_is_defined_in_a_function_is_compiled_once():
  def evaluate(model):
    @nnx.jit
    def step(model, x):
      return total(model, x) * scale

    return step, float(step(model, X))

  (a, first), (b, second) = evaluate(Net()), evaluate(Net())
  assert same(a, b)
  assert first == second == 6.0


def test_a_trace_that_failed_is_made_again(monkeypatch):
  model = Net()
  monkeypatch.setitem(globals(), "helper", lambda x: 1 / 0)
  for _ in range(2):
    with pytest.raises(ZeroDivisionError):
      nnx.jit(by_helper)(model, X)
  monkeypatch.undo()
  assert nnx.jit(by_helper)(model, X).tolist() == [0, 2, 4]
  assert int(model.calls) == 1


def test_threads_may_share(monkeypatch):
  models = [Net() for _ in range(8)]

  def run(model):
    for _ in range(50):
      nnx.jit(by_global)(model, X)
      nnx.jit(lambda model, x: model(x))(model, X)

  threads = [threading.Thread(target=run, args=(model,)) for model in models]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert [int(model.calls) for model in models] == [100] * 8


def test_globals_that_are_no_modules_are_freed():
  space = {"nnx": nnx, "__name__": __name__, "held": (held := Net())}
  exec("f = nnx.jit(lambda model, x: model(x))", space)
  assert space["f"](held, X).tolist() == [0, 1, 2]
  end = weakref.ref(held)
  del space, held
  gc.collect()
  assert end() is None


def test_only_so_many_are_remembered():
  known = shared.Known()
  make = lambda around: object()
  for i in range(3 * shared._MOST):
    known.shared(plus, i, make)
  assert len(known._kept) == shared._MOST


def test_static_arguments_that_have_changed_are_seen():
  model, options = Net(), Plain()
  assert nnx.jit(with_options, static_argnums=1)(model, options, X).tolist() == [0, 4, 8]
  options.own = 5.0
  assert nnx.jit(with_options, static_argnums=1)(model, options, X).tolist() == [0, 10, 20]


def with_options(model, options, x):
  return options.times(model(x))


# Modules and their methods


def test_modules_of_one_class_share_what_was_compiled():
  a, b = Net(), Net()
  b.w[...] *= 3
  for _ in range(2):
    assert nnx.jit(a)(X).tolist() == [0, 1, 2]
    assert nnx.jit(b)(X).tolist() == [0, 3, 6]
    assert nnx.jit(b.twice)(X).tolist() == [0, 6, 12]
  assert (int(a.calls), int(b.calls)) == (2, 6)
  compiled = nnx.jit(Net.__call__)._fast._compiled
  assert len(compiled) == 1


def test_options_of_a_method_count_its_own_arguments():
  model = Net()
  assert nnx.jit(model, static_argnums=1)(X, 2).tolist() == [0, 2, 4]
  assert nnx.jit(model, static_argnames="times")(X, times=3).tolist() == [0, 3, 6]
  assert nnx.jit(model, static_argnums=-1)(X, 4).tolist() == [0, 4, 8]
  given = jnp.arange(3.0)
  nnx.jit(model, donate_argnums=0)(given)
  assert given.is_deleted()
  given = jnp.arange(3.0)
  nnx.jit(model, donate_argnames="x")(x=given)
  assert given.is_deleted()


def test_a_method_is_compiled_ahead_of_time_without_its_module():
  model = Net()
  jitted = nnx.jit(model.twice)
  compiled = jitted.lower(X).compile()
  assert compiled(X).tolist() == [0, 2, 4]
  assert "twice" in jitted.lower(X).as_text()
  assert jitted.trace(X).jaxpr is not None
  jitted.clear_cache()
  assert jitted(X).tolist() == [0, 2, 4]
  assert int(model.calls) == 4
  assert jitted.__wrapped__ == model.twice
  assert jitted.__name__ == "twice"


def test_a_method_may_find_its_module_by_closure_too():
  class Twice(nnx.Module):
    def __init__(self, inner):
      self.inner = inner

    def run(self, x):
      return self.inner(x) + net(x)

  net = Net()
  jitted = nnx.jit(Twice(net).run)
  for _ in range(3):
    assert jitted(X).tolist() == [0, 2, 4]
  assert int(net.calls) == 6
  assert nnx.jit(Twice(net).run).lower(X).compile()(X).tolist() == [0, 2, 4]
  assert nnx.jit(Twice(net).run).trace(X).jaxpr is not None
  with pytest.raises(AliasError, match=r"as an argument and by closure\n  at:  .*w"):
    nnx.jit(lambda model, x: model(x) + net(x))(net, X)
  assert int(net.calls) == 8


def test_a_method_in_another_jit_is_found():
  model = Net()
  inner = nnx.jit(model)
  outer = nnx.jit(lambda x: inner(x) * 2)
  for _ in range(3):
    assert outer(X).tolist() == [0, 2, 4]
  model.w[...] *= 2
  assert outer(X).tolist() == [0, 4, 8]
  assert int(model.calls) == 4


def test_a_method_sets_attributes_of_its_module():
  class Growing(nnx.Module):
    def __init__(self):
      self.grown = False

    def grow(self, x):
      self.w = nnx.Param(x)
      self.grown = True
      return x

  model = Growing()
  nnx.jit(model.grow)(X)
  assert model.grown
  assert model.w.tolist() == X.tolist()
