"""What a plain JAX transform loses or does not see is said once; what it keeps is silent."""

import functools
import gc
import warnings

import jax
import jax.numpy as jnp
import pytest

from refax import _jax, nnx

pytestmark = pytest.mark.skipif(
  not _jax.no_trace_active(), reason="whether JAX traces is not known without the private API"
)

X = jnp.ones((2, 3))


class Net(nnx.Module):
  def __init__(self):
    self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    self.layers = [nnx.Param(1.0)]
    self.mode = "a"

  def __call__(self, x):
    return self.dropout(self.linear(x))


def told(f):
  """The texts of the warnings about structure that a program gives."""
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    f()
    gc.collect()
  return [str(w.message) for w in caught if issubclass(w.category, nnx.StructureWarning)]


def sow(net, x):
  net.sow(nnx.Intermediate, "h", x)
  return net(x)


def attribute(net, x):
  net.memory = x
  return net(x)


def layer(net, x):
  net.layers.append(nnx.Param(1.0))
  return net(x)


def below(net, x):
  net.linear.extra = nnx.Param(x)
  return net(x)


def inside_nnx(net, x):
  loss = lambda net: (net.sow(nnx.Intermediate, "g", x), net(x).sum())[1]
  return nnx.grad(loss)(net)["linear"]["bias"]


LOST = {
  "sow": (sow, "Net.h is lost"),
  "attribute": (attribute, "Net.memory is lost"),
  "layer": (layer, "List[...] is lost"),
  "below": (below, "Linear.extra is lost"),
  "inside nnx.grad": (inside_nnx, "Net.g is lost"),
}
PLAIN = {
  "jit": jax.jit,
  "checkpoint": jax.checkpoint,
  "vmap": lambda f: jax.vmap(f, in_axes=(None, 0)),
}


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
def test_what_a_plain_transform_loses_is_said_once_a_place(name, hijax):
  f, text = LOST[name]
  net = Net() if hijax else nnx.to_lojax(Net())
  net.eval()
  # a function compiled anew each time: the place is warned about once for all
  first = told(lambda: [jax.jit(functools.partial(f))(net, X) for _ in range(3)])
  assert len(first) <= 1 and all(text in t and "fix: use nnx.jit" in t for t in first)
  assert told(lambda: jax.jit(functools.partial(f))(net, X)) == []
  if hijax:
    assert len(first) == 1


@pytest.mark.parametrize("name", PLAIN)
def test_every_plain_transform_says_it(name):
  net = Net()
  net.eval()
  namespace = {}
  code = "def lose(net, x):\n  net.memory = x\n  return net(x)"
  exec(compile(code, f"<{name}>", "exec"), namespace)  # a place of its own for each transform
  (text,) = told(lambda: PLAIN[name](namespace["lose"])(net, X))
  assert text.startswith("Net.memory is lost")


def returned(net, x):
  net.memory = x
  return net


def removed(net, x):
  net.sow(nnx.Intermediate, "h", x)
  return nnx.pop(net, nnx.Intermediate)["h"]


def mode(net, x):
  net.eval()
  net.mode = "b"
  return net(x)


def own(net, x):
  other = Net()
  other.memory = x
  return other(x)


SILENT = {
  "returned": (returned, lambda f: lambda net, x: jax.jit(f)(nnx.to_lojax(net), x)),
  "removed": (removed, jax.jit),
  "a mode": (mode, jax.jit),
  "an object of its own": (own, jax.jit),
  "nnx.jit": (sow, nnx.jit),
  "nnx.grad": (lambda net, x: sow(net, x).sum(), nnx.grad),
  "nnx.remat": (sow, nnx.remat),
  "eager": (sow, lambda f: f),
  "a write": (lambda net, x: net.linear.kernel.set_value(net.linear.kernel * 2), jax.jit),
}


@pytest.mark.parametrize("name", SILENT)
def test_what_is_not_lost_is_silent(name):
  f, transform = SILENT[name]
  assert told(lambda: transform(f)(Net(), X)) == []


CHANGES = {
  "mode": "net.train(); net.eval()",
  "static attribute": "net.mode = net.mode + 'b'",
  "a layer": "net.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(1))",
  "an attribute below": "net.dropout.rate /= 2",
  "append": "net.layers.append(nnx.Param(2.0))",
}


@pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_a_compiled_function_does_not_see_is_said_once(name, hijax):
  net = Net() if hijax else nnx.to_lojax(Net())
  if not hijax:
    net.eval()
  f = jax.jit(lambda x: net(x))
  f(X)
  namespace = {"nnx": nnx, "net": net}
  code = compile(CHANGES[name], f"<{name} {hijax}>", "exec")  # a place of its own for each case
  texts = told(lambda: exec(code, namespace))
  assert len(texts) == 1
  assert "test_structure.py:" in texts[0] and "goes on with the old structure" in texts[0]
  assert told(lambda: exec(code, namespace)) == []


@pytest.mark.parametrize(
  "transform",
  [nnx.jit, lambda f: lambda x: jax.vjp(f, x), lambda f: f, lambda f: nnx.vmap(f)],
  ids=["nnx.jit", "vjp", "eager", "nnx.vmap"],
)
def test_a_change_that_is_seen_is_silent(transform):
  net = Net()
  net.eval()
  transform(lambda x: net(x))(X)
  assert told(lambda: net.train()) == []


def test_a_changed_argument_of_a_compiled_function_is_silent():
  net = Net()
  f = jax.jit(lambda net, x: net(x))
  f(net, X)
  assert told(lambda: net.eval()) == []
  f(net, X)
