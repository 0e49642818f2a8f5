"""nnx.explain_retrace says which argument or attribute made JAX trace again."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx


class Net(nnx.Module):
  def __init__(self):
    self.layers = [nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5)]
    self.scale = 1.0

  def __call__(self, x):
    return self.layers[0](x) * self.scale


X = jnp.ones((3, 2))


def explained(f, *calls, jit=nnx.jit, between=lambda: None, **options):
  """What is said of calls, one after the other."""
  inner = nnx.explain_retrace(f)
  step = jit(inner, **options)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for i, (args, kwargs) in enumerate(calls):
      if i:
        between()
      step(*args, **kwargs)
  own = [w for w in caught if issubclass(w.category, nnx.RetraceWarning)]
  see = "\n  see: python -m refax.explain RetraceWarning"
  assert [str(w.message).partition(" time: ")[2] for w in own] == [r + see for r in inner.reasons]
  assert all(w.filename == __file__ for w in own)
  return inner


def call(*args, **kwargs):
  return args, kwargs


@pytest.mark.parametrize("jit", [nnx.jit, jax.jit], ids=["nnx", "jax"])
def test_equal_calls_say_nothing(jit):
  inner = explained(lambda net, x: net(x), *[call(Net(), X)] * 3, jit=jit)
  assert (inner.traces, inner.reasons) == (1, [])


CASES = {
  "shape": (call(X), call(X[:2]), "x: float32[3,2] -> float32[2,2]"),
  "dtype": (call(X), call(X.astype(jnp.bfloat16)), "x: float32[3,2] -> bfloat16[3,2]"),
  "weak type": (call(jnp.float32(1)), call(1.0),
                "x: float32[] -> float32[] (weak type: of a Python number)"),
  "container": (call([X, X]), call([X, X, X]), "x[2]: new, float32[3,2]"),
  "key": (call({"a": X}), call({"b": X}), "x.b: new, float32[3,2]; x.a: gone, was float32[3,2]"),
  "none": (call(None), call(X), "x: None -> float32[3,2]"),
}  # fmt: skip


@pytest.mark.parametrize("jit", [nnx.jit, jax.jit], ids=["nnx", "jax"])
@pytest.mark.parametrize("name", CASES)
def test_an_argument_is_named_with_what_it_was_and_is(name, jit):
  first, second, want = CASES[name]
  inner = explained(lambda x: x, first, second, jit=jit)
  assert inner.traces == 2
  assert want in inner.reasons[0]


@pytest.mark.parametrize("jit", [nnx.jit, jax.jit], ids=["nnx", "jax"])
def test_attributes_of_objects_are_named_by_their_path(jit):
  net = Net()
  kernel = "net.layers[2].kernel: Param float32[2,2]"
  changes = {
    "net.layers[1].deterministic: False -> True": lambda: net.eval(),
    "net.scale: 1.0 -> 2.0": lambda: setattr(net, "scale", 2.0),
    "net.layers[2]: new, Linear": lambda: net.layers.append(nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
    f"{kernel} -> Param float32[2,2] (the same as net.layers[0].kernel)": lambda: setattr(
      net.layers[2], "kernel", net.layers[0].kernel
    ),
  }
  for want, change in changes.items():
    inner = explained(lambda net, x: net(x), *[call(net, X)] * 2, jit=jit, between=change)
    assert want in inner.reasons[0], inner.reasons


def test_static_arguments_settings_and_closures():
  f = lambda x, n: x * n
  inner = explained(f, call(X, 2), call(X, 3), static_argnums=1)
  assert inner.reasons == ["n: 2 -> 3"]
  inner = nnx.explain_retrace(lambda x: x)
  step = nnx.jit(inner)
  step(X)
  with warnings.catch_warnings(), jax.default_matmul_precision("float32"):
    warnings.simplefilter("ignore")
    step(X)
  assert inner.reasons == ["jax.config.jax_default_matmul_precision: None -> float32"]
  inner = nnx.explain_retrace(lambda x: x)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _ in range(2):
      nnx.jit(lambda x: inner(x))(X)
  assert "made anew" in inner.reasons[0]


def test_the_difference_is_to_the_trace_that_is_most_alike():
  sizes = [X, jnp.ones((3, 3)), X.astype(jnp.float16)]
  inner = explained(lambda x: x, *[call(x) for x in sizes])
  assert len(inner.reasons[1].split(";")) == 1


def test_a_number_of_traces_may_be_expected():
  inner = nnx.explain_retrace(lambda x: x, after=2)
  step = nnx.jit(inner)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for n in range(1, 4):
      step(jnp.ones(n))
  (one,) = [w for w in caught if issubclass(w.category, nnx.RetraceWarning)]
  assert re.match(
    r"<lambda> is traced for the 3rd time: x: float32\[\d\] -> float32\[3\]", str(one.message)
  )


def test_it_decorates_and_keeps_the_function():
  @nnx.jit
  @nnx.explain_retrace(after=3)
  def step(x):
    """Doubles."""
    return 2 * x

  np.testing.assert_array_equal(step(X), 2 * X)
  assert (step.__name__, step.__doc__) == ("step", "Doubles.")


def test_eager_calls_and_odd_arguments():
  f = nnx.explain_retrace(functools.partial(lambda a, b: b, 1))
  f(X)
  assert f.traces == 0
  odd = explained(
    lambda *args, **kwargs: args[0], call(X, k={"a": (X, None)}), call(X, k={"a": (X, X)})
  )
  assert odd.traces == 2
