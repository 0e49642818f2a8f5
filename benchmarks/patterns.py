"""The ordinary ways to call `nnx.jit`: what each costs beside the same step written by hand.

Each case is one function of the library (Refax or Flax NNX: the code is the same) that makes a
step, and the same step as a donated `jax.jit` of arrays. The step adds a number to each of `n`
small arrays, so that what is measured is the call. Equinox is there where its functions take the
same arguments.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx as flax

from benchmarks.dispatch import threaded
from benchmarks.measure import BASE, Steps
from refax import nnx

Step = Callable[[], Any]
ONE = jnp.ones(())


def zeros(n: int) -> list[jax.Array]:
  return [jnp.zeros(8) for _ in range(n)]


def model_of(lib: Any, n: int, **options: Any) -> Any:
  """A model of `n` small Variables, in layers of five."""
  return _model_class(lib)(n, options)


@functools.cache
def _model_class(lib: Any) -> Any:
  class Layer(lib.Module):
    def __init__(self, options):
      for i in range(5):
        setattr(self, f"v{i}", lib.Param(jnp.zeros(8), **options))

    def __call__(self, x):
      for i in range(5):
        v = getattr(self, f"v{i}")
        v[...] = v[...] + x

    def total(self, x):
      return sum((getattr(self, f"v{i}")[...] * x).sum() for i in range(5))

  class Model(lib.Module):
    def __init__(self, n, options):
      self.layers = lib.List([Layer(options) for _ in range(n // 5)])

    def __call__(self, x):
      for layer in self.layers:
        layer(x)
      return x

    def total(self, x):
      return sum(layer.total(x) for layer in self.layers)

  return Model


def increment(model: Any, x: Any) -> Any:
  return model(x)


@functools.partial(jax.jit, donate_argnums=0)
def by_hand(arrays, x):
  return [a + x for a in arrays], x


@eqx.filter_jit(donate="all-except-first")
def equinox_step(x, arrays):
  return [a + x for a in arrays], x


def base(n: int, x: Any = ONE) -> Step:
  return threaded(by_hand, zeros(n), x)


def equinox(n: int, x: Any = ONE) -> Step:
  return threaded(lambda arrays, x: equinox_step(x, arrays), zeros(n), x)


def both(make: Callable[[Any], Step], hand: Step, eqx_: Step | None = None, **more: Step) -> Steps:
  """The steps of a case whose code is the same in Refax and Flax."""
  steps = {BASE: hand, "Refax nnx.jit": make(nnx), "Flax nnx.jit": make(flax)}
  return steps | ({} if eqx_ is None else {"Equinox filter_jit": eqx_}) | more


def partial_of(f: Callable, model: Any, *args: Any) -> Step:
  """The call in Flax's fastest style: the model's Variables are found once."""
  call = flax.jit_partial(f, model, graph=False)
  return lambda: call(*args)


def steady(n: int) -> Steps:
  def make(lib):
    model, f = model_of(lib, n), lib.jit(increment)
    return lambda: f(model, ONE)

  partial = partial_of(increment, model_of(flax, n), ONE)
  return both(make, base(n), equinox(n), **{"Flax jit_partial": partial})


def returns_none(n: int) -> Steps:
  def step(model, x):
    model(x)

  @functools.partial(jax.jit, donate_argnums=0)
  def hand(arrays, x):
    return [a + x for a in arrays], None

  def make(lib):
    model, f = model_of(lib, n), lib.jit(step)
    return lambda: f(model, ONE)

  partial = partial_of(step, model_of(flax, n), ONE)
  return both(make, threaded(hand, zeros(n), ONE), **{"Flax jit_partial": partial})


def none_argument(n: int) -> Steps:
  def step(model, x, mask, options):
    return model(x)

  @functools.partial(jax.jit, donate_argnums=0)
  def hand(arrays, x, mask, options):
    return [a + x for a in arrays], x

  def make(lib):
    model, f = model_of(lib, n), lib.jit(step)
    return lambda: f(model, ONE, None, {})

  partial = partial_of(step, model_of(flax, n), ONE, None, {})
  return both(make, threaded(hand, zeros(n), ONE, None, {}), **{"Flax jit_partial": partial})


def numpy_scalar(n: int) -> Steps:
  rate = np.float32(0.5)

  def step(model, rates):
    return model(rates["rate"])

  @functools.partial(jax.jit, donate_argnums=0)
  def hand(arrays, rates):
    return [a + rates["rate"] for a in arrays], rates["rate"]

  def make(lib):
    model, f = model_of(lib, n), lib.jit(step)
    return lambda: f(model, {"rate": rate})

  partial = partial_of(step, model_of(flax, n), {"rate": rate})
  return both(make, threaded(hand, zeros(n), {"rate": rate}), **{"Flax jit_partial": partial})


def static_argument(n: int) -> Steps:
  def step(model, x, mode):
    return model(x if mode == "train" else -x)

  def make(lib):
    model, f = model_of(lib, n), lib.jit(step, static_argnames="mode")
    return lambda: f(model, ONE, mode="train")

  @functools.partial(jax.jit, donate_argnums=0, static_argnames="mode")
  def hand(arrays, x, mode):
    return [a + x for a in arrays], x

  call = lambda arrays, x: hand(arrays, x, mode="train")
  return both(make, threaded(call, zeros(n), ONE))


def array_attribute(n: int) -> Steps:
  """The model holds an array as an attribute, and a Variable with a pytree."""

  def step(model, x):
    pair = model.pair[...] if isinstance(model, nnx.Module) else model.pair.get_value()
    return model(x) + model.table.sum() + pair["a"]

  def make(lib):
    model, f = model_of(lib, n), lib.jit(step)
    model.table = lib.data(jnp.ones(8))
    model.pair = lib.Variable({"a": jnp.ones(()), "b": jnp.ones(())})
    return lambda: f(model, ONE)

  @functools.partial(jax.jit, donate_argnums=0)
  def hand(arrays, table, pair, x):
    return [a + x for a in arrays], x + table.sum() + pair["a"]

  rest = (jnp.ones(8), {"a": jnp.ones(()), "b": jnp.ones(())}, ONE)
  return both(make, threaded(hand, zeros(n), *rest))


def containers(n: int) -> Steps:
  def step(models, x):
    models["a"](x)
    for model in models["b"]:
      model(x)
    return x

  def make(lib):
    third = n // 10 * 5
    models = {"a": model_of(lib, n - third), "b": [model_of(lib, third)]}
    f = lib.jit(step)
    return lambda: f(models, ONE)

  return both(make, base(n), equinox(n))


def loss_of(model: Any, x: Any) -> Any:
  return model.total(x)


def value_and_grad(n: int) -> Steps:
  def make(lib):
    model, f = model_of(lib, n), lib.jit(lib.value_and_grad(loss_of))
    return lambda: f(model, ONE)[0]

  loss = lambda arrays, x: sum((a * x).sum() for a in arrays)
  hand, arrays = jax.jit(jax.value_and_grad(loss)), zeros(n)
  of_equinox = eqx.filter_jit(eqx.filter_value_and_grad(loss))
  return both(make, lambda: hand(arrays, ONE)[0], lambda: of_equinox(arrays, ONE)[0])


def gradients_in(n: int) -> Steps:
  """Gradients as a State go into the step and come out of it."""

  def step(model, grads, x):
    lib = nnx if isinstance(model, nnx.Module) else flax
    params = lib.state(model, lib.Param)
    lib.update(
      model, jax.tree.map(lambda p, g: p[...] - g[...], params, grads, is_leaf=_is_variable)
    )
    return jax.tree.map(lambda g: g + x, grads), x

  def make(lib):
    model = model_of(lib, n)
    box = [lib.grad(loss_of)(model, ONE)]
    f = lib.jit(step)

    def call():
      box[0], out = f(model, box[0], ONE)
      return out

    return call

  @functools.partial(jax.jit, donate_argnums=0)
  def hand(both, x):
    arrays, grads = both
    return ([a - g for a, g in zip(arrays, grads, strict=True)], [g + x for g in grads]), x

  return both(make, threaded(hand, (zeros(n), zeros(n)), ONE))


def _is_variable(x: Any) -> bool:
  return isinstance(x, nnx.Variable | flax.Variable)


def split_outside(n: int) -> Steps:
  def make(lib):
    def step(graphdef, state, x):
      return lib.merge(graphdef, state).total(x)

    f = lib.jit(step, static_argnums=0)
    graphdef, state = lib.split(model_of(lib, n))
    return lambda: f(graphdef, state, ONE)

  hand, arrays = jax.jit(lambda arrays, x: sum((a * x).sum() for a in arrays)), zeros(n)
  return both(make, lambda: hand(arrays, ONE))


def returns_model(n: int) -> Steps:
  def step(model, x):
    model(x)
    return model, x

  def make(lib):
    model, f = model_of(lib, n), lib.jit(step)
    return lambda: f(model, ONE)[1]

  return both(make, base(n), equinox(n))


def returns_state(n: int) -> Steps:
  def make(lib):
    def step(model, x):
      return lib.state(model), x

    model, f = model_of(lib, n), lib.jit(step)
    return lambda: f(model, ONE)[1]

  hand, arrays = jax.jit(lambda arrays, x: (list(map(jnp.copy, arrays)), x)), zeros(n)
  return both(make, lambda: hand(arrays, ONE)[1])


def returns_new(n: int) -> Steps:
  def make(lib):
    def step(model, x):
      new = lib.clone(model)
      new(x)
      return new, x

    model, f = model_of(lib, n), lib.jit(step)
    return lambda: f(model, ONE)[1]

  hand, arrays = jax.jit(lambda arrays, x: ([a + x for a in arrays], x)), zeros(n)
  of_equinox = eqx.filter_jit(lambda model, x: (jax.tree.map(lambda a: a + x, model), x))
  model = _equinox_model(n)
  return both(make, lambda: hand(arrays, ONE)[1], lambda: of_equinox(model, ONE)[1])


def _equinox_model(n: int) -> eqx.Module:
  """A model like `model_of`, of arrays."""

  class Layer(eqx.Module):
    v0: jax.Array
    v1: jax.Array
    v2: jax.Array
    v3: jax.Array
    v4: jax.Array

  class Model(eqx.Module):
    layers: list[Layer]

  return Model([Layer(*zeros(5)) for _ in range(n // 5)])


def sow_and_pop(n: int) -> Steps:
  def make(lib):
    def step(model, x):
      model(x)
      model.sow(lib.Intermediate, "seen", x + 1)
      return x

    model, f = model_of(lib, n), lib.jit(step)

    def call():
      f(model, ONE)
      return jax.tree.leaves(lib.pop(model, lib.Intermediate))[0]

    return call

  @functools.partial(jax.jit, donate_argnums=0)
  def hand(arrays, x):
    return [a + x for a in arrays], (x, x + 1)

  return both(make, threaded(hand, zeros(n), ONE))


def closure(n: int) -> Steps:
  def make(lib):
    model = model_of(lib, n)
    f = lib.jit(lambda x: model(x))
    return lambda: f(ONE)

  def jitted_model():
    f = nnx.jit(model_of(nnx, n))
    return lambda: f(ONE)

  steps = {BASE: base(n), "Refax nnx.jit": make(nnx), "Refax nnx.jit(model)": jitted_model()}
  return steps | {"Flax jit_partial": partial_of(increment, model_of(flax, n), ONE)}


def modes(n: int) -> Steps:
  """`model.train()` and `model.eval()` before every second call."""

  def make(lib):
    model, f = model_of(lib, n), lib.jit(increment)
    model.dropout = lib.Dropout(0.5, rngs=lib.Rngs(0))
    turns = itertools.cycle((model.train, model.eval))

    def call():
      next(turns)()
      return f(model, ONE)

    return call

  return both(make, base(n))


def another_model(n: int) -> Steps:
  """An attribute is set on another model, which a compiled function knows too, between calls."""

  def make(lib):
    model, other, f = model_of(lib, n), model_of(lib, 5), lib.jit(increment)
    f(other, ONE)
    numbers = itertools.count()

    def call():
      other.layers[0].number = next(numbers)
      return f(model, ONE)

    return call

  return both(make, base(n), equinox(n))


def many_models(n: int) -> Steps:
  def make(lib):
    models, f = [model_of(lib, n) for _ in range(100)], lib.jit(increment)
    turns = itertools.cycle(models)
    for model in models:
      f(model, ONE)
    return lambda: f(next(turns), ONE)

  states, turns = [[zeros(n)] for _ in range(100)], itertools.cycle(range(100))

  def hand():
    box = states[next(turns)]
    box[0], out = by_hand(box[0], ONE)
    return out

  return both(make, hand)


def lojax_read(n: int) -> Steps:
  def make(lib):
    model = model_of(lib, n, **({"is_hijax": False} if lib is nnx else {}))
    f = lib.jit(loss_of)
    return lambda: f(model, ONE)

  hand, arrays = jax.jit(lambda arrays, x: sum((a * x).sum() for a in arrays)), zeros(n)
  of_equinox = eqx.filter_jit(lambda arrays, x: sum((a * x).sum() for a in arrays))
  return both(make, lambda: hand(arrays, ONE), lambda: of_equinox(arrays, ONE))


def lojax_written(n: int) -> Steps:
  def make(lib):
    model = model_of(lib, n, **({"is_hijax": False} if lib is nnx else {}))
    f = lib.jit(increment)
    return lambda: f(model, ONE)

  return both(make, base(n), equinox(n))


def batches(n: int) -> Steps:
  """A dict and a tuple as the batch, and keyword arguments."""

  def step(model, batch, pair, *, scale):
    return model(batch["x"] + batch["y"] + pair[0] * scale)

  @functools.partial(jax.jit, donate_argnums=0)
  def hand(arrays, batch, pair, *, scale):
    x = batch["x"] + batch["y"] + pair[0] * scale
    return [a + x for a in arrays], x

  given = ({"x": ONE, "y": ONE}, (ONE, ONE))

  def make(lib):
    model, f = model_of(lib, n), lib.jit(step)
    return lambda: f(model, *given, scale=ONE)

  of_equinox = eqx.filter_jit(
    lambda x, arrays: ([a + x["scale"] for a in arrays], x["scale"]), donate="all-except-first"
  )
  call = lambda arrays: of_equinox({"batch": given, "scale": ONE}, arrays)
  return both(
    make,
    threaded(lambda arrays: hand(arrays, *given, scale=ONE), zeros(n)),
    threaded(call, zeros(n)),
  )


PATTERNS: dict[str, Callable[[int], Steps]] = {
  "a model and an array": steady,
  "the step returns None": returns_none,
  "an argument is None, or {}": none_argument,
  "a NumPy scalar in a dict": numpy_scalar,
  "static_argnames": static_argument,
  "an array attribute, a pytree Variable": array_attribute,
  "a dict and a list of Modules": containers,
  "nnx.jit(nnx.value_and_grad(f))": value_and_grad,
  "gradients as a State, in and out": gradients_in,
  "split outside, merge inside": split_outside,
  "returns the model": returns_model,
  "returns a State": returns_state,
  "returns a new Module": returns_new,
  "sow and pop each step": sow_and_pop,
  "a model by closure": closure,
  "train() and eval() in turn": modes,
  "an attribute set on another model": another_model,
  "100 models in turn": many_models,
  "a lojax model, read": lojax_read,
  "a lojax model, written": lojax_written,
  "dict and tuple batch, keywords": batches,
}


def serving(n: int) -> Steps:
  """A step of decoding in a large model: `n` Variables are read, two are written.

  The size is that of a model served by vLLM on TPU, whose host lost 13 of 41 ms a token in
  flattening (vllm-project/tpu-inference#2607).
  """

  def step(model, cache, x):
    weights = jax.lax.optimization_barrier([v[...] for v in model.weights])  # all are needed
    cache.keys[...] = cache.keys[...] + x
    cache.values[...] = cache.values[...] - x
    return weights[0].sum() * x

  def models(lib):
    class Model(lib.Module):
      def __init__(self):
        self.weights = lib.List([lib.Param(w) for w in zeros(n)])

    class Cache(lib.Module):
      def __init__(self):
        self.keys, self.values = (lib.Variable(jnp.zeros(8)) for _ in range(2))

    return Model(), Cache()

  def make(lib):
    f, (model, cache) = lib.jit(step), models(lib)
    return lambda: f(model, cache, ONE)

  @functools.partial(jax.jit, donate_argnums=0)
  def hand(cache, weights, x):
    keys, values = cache
    return (keys + x, values - x), jax.lax.optimization_barrier(weights)[0].sum() * x

  steps = both(make, threaded(hand, (jnp.zeros(8), jnp.zeros(8)), zeros(n), ONE))
  partial = flax.jit_partial(step, *models(flax), graph=False)
  return steps | {"Flax jit_partial": lambda: partial(ONE)}
