"""docs/failures.md is true: each row of its tables is run, and leaves the state that it says."""

import gc
import pathlib
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx
from refax.errors import RefArgumentError, ReturnedRefError

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "failures.md"
NEWEST = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 12)
X = jnp.ones((4, 2))

BEFORE, AFTER, LOST = "as before", "as after the call", "lost"


class Net(nnx.Module):
  """A model that counts its calls."""

  def __init__(self):
    self.linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    self.count = nnx.Variable(jnp.zeros(()))

  def __call__(self, x):
    self.count[...] += 1
    return self.linear(x)


def rows():
  """(situation, what happens, the state, write instead) of each row of the page."""
  lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
  found = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in lines]
  return [row for row in found if row[0] != "situation"]


def state_after(net, before):
  """Which of the three words of the page is true."""
  try:
    now = [np.asarray(v[...]) for v in (net.count, net.linear.kernel, net.linear.bias)]
  except Exception:
    return LOST
  same = all(np.array_equal(a, b) for a, b in zip(now[1:], before[1:], strict=True))
  counted = float(now[0] - before[0])
  assert same and counted in (0, 1), now
  return AFTER if counted else BEFORE


def boom(_):
  raise RuntimeError("boom")


def with_callback(net, x):
  net(x)
  return jax.pure_callback(boom, jax.ShapeDtypeStruct((), jnp.float32), x.sum())


def with_nan(net, x):
  return jnp.log(net(x) * 0 - 1)


def under_flags(jit):
  def call(net):
    with jax.debug_nans(True):
      jit(with_nan)(net, X)

  return call


def moved(net):
  """The devices here may be one: another sharding of it is another place for a Ref."""
  step = jax.jit(lambda: net(X).sum())
  step()
  net.count[...] = 0.0
  mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  with pytest.warns(nnx.StructureWarning):
    nnx.device_put(net, jax.sharding.NamedSharding(mesh, jax.P()))
  step()


def custom_jvp_write(net):
  @jax.custom_jvp
  def f(x):
    net.count[...] += 1
    return x

  f.defjvp(lambda primals, tangents: (f(*primals), tangents[0]))
  jax.jit(f)(1.0)


def reduce_write(net):
  def body(a, b):
    net.count[...] += 1
    return a + b

  jax.lax.reduce(X, 0.0, body, (0,))


def storm(scenario):
  command = [sys.executable, str(ROOT / "tests" / "interrupts" / "storm.py"), scenario, "4", "0"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
  return re.search(r"(\d+) of (\d+) lost", done.stdout)


def interrupted(_):
  assert storm("steady").groups() == ("0", "4")


def interrupted_plain(_):
  assert storm("plain")[2] == "4"  # any of these may be lost


def new_attribute(net):
  def add(net, x):
    net.sow(nnx.Intermediate, "kept", x)
    net(x)

  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    jax.jit(add)(net, X)
    gc.collect()  # it is told when the object that was traced is gone
  assert [w.category for w in caught] == [nnx.StructureWarning] and not hasattr(net, "kept")


def eval_after_closure(net):
  net.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
  step = jax.jit(lambda: net.drop(net(X)))
  net.count[...] = -1.0
  step()
  with pytest.warns(nnx.StructureWarning):
    net.eval()
  net.count[...] = 0.0
  assert (step() == 0).any()  # still in training mode


def solved(layer):
  square = lambda v: (layer.kernel[...].T @ layer.kernel[...]) @ v + v
  return jax.scipy.sparse.linalg.cg(square, jnp.ones(3), maxiter=3)[0]


GLOBAL_NORM = lambda net: optax.global_norm(nnx.state(net))
ZEROS = lambda net: jax.tree.map(lambda x: x * 0, net)
FIRST = jax.devices()[0]
DELETED = (RuntimeError, ValueError, "deleted")
REPLACE = (Exception, "Unable to replace an Array")
NO_HANDLER = (TypeError, "No pxla_result_handler")
NO_RULE = (NotImplementedError, "No state discharge rule")
TYPE = jax.ShapeDtypeStruct((), jnp.float32)

# The beginning of a row, what it runs, (types of the error, its words) or None, and the state.
CASES = [
  ("Ctrl-C in `nnx.jit`", interrupted, None, BEFORE),
  ("Ctrl-C in plain `jax.jit`", interrupted_plain, None, BEFORE),
  ("an error in a callback in `nnx.jit`", lambda net: nnx.jit(with_callback)(net, X),
   (Exception, "boom"), BEFORE),
  ("an error in a callback in plain `jax.jit`",
   lambda net: jax.block_until_ready(jax.jit(with_callback)(net, X)), (Exception, "boom"), LOST),
  ("`jax_debug_nans` or `jax_debug_infs` finds a value in `nnx.jit`", under_flags(nnx.jit),
   (FloatingPointError, "nan"), BEFORE),
  ("`jax_debug_nans` or `jax_debug_infs` finds a value in plain", under_flags(jax.jit),
   DELETED, LOST),
  ("`jax.pmap` of a model", lambda net: jax.pmap(Net.__call__, in_axes=(None, 0))(net, X[None]),
   REPLACE if NEWEST else None, LOST if NEWEST else AFTER),
  ("`nnx.device_put` of a model that plain", moved, REPLACE if NEWEST else None,
   LOST if NEWEST else AFTER),
  ("`jax.grad`, `jax.vjp` or `jax.jvp` of a model", lambda net: jax.grad(lambda m: m(X).sum())(net),
   (RefArgumentError, "nnx.grad"), BEFORE),
  ("`jax.grad` of a bare", lambda net: jax.grad(lambda v: v[...] ** 2)(net.count),
   (TypeError, "Ref-typed argument" if NEWEST else "nnx.grad"), BEFORE),
  ("`jax.jit(f, donate_argnums=0)`",
   lambda net: jax.jit(lambda m: m(X) is m or m.linear.kernel * 2, donate_argnums=0)(net),
   (Exception, "already aliased"), BEFORE),
  ("a write in a function with `jax.custom_jvp`", custom_jvp_write, NO_RULE, BEFORE),
  ("a write in the body of `jax.lax.reduce`", reduce_write,
   (NotImplementedError, "Cannot lower effectful"), BEFORE),
  ("a Variable read in the function of `jax.scipy", lambda net: jax.jit(solved)(net.linear),
   (ValueError, "does not have a corresponding jaxpr input"), BEFORE),
  ("`jax.debug.print", lambda net: jax.debug.print("{}", net.count), NO_HANDLER, BEFORE),
  ("`jax.pure_callback", lambda net: jax.pure_callback(lambda x: x, TYPE, net.count), NO_RULE,
   BEFORE),
  ("a Variable twice", lambda net: jax.jit(lambda m, v: m(X))(net, net.count),
   (ValueError, "only one reference to a mutable array"), BEFORE),
  ("a Variable as an argument", lambda net: jax.jit(lambda v: v + net.count)(net.count),
   (ValueError, "both closed over and passed"), BEFORE),
  ("a Module or State returned", lambda net: jax.jit(lambda m: (m(X), nnx.state(m)))(net),
   (ReturnedRefError, "nnx.pure"), BEFORE),
  ("a bare hijax Variable returned", lambda net: jax.jit(lambda v: v)(net.count),
   (ValueError, "returned a mutable array reference"), BEFORE),
  ("`optax.global_norm", GLOBAL_NORM, (AttributeError, "'Ref' object has no attribute"), BEFORE),
  ("`jax.tree.map", ZEROS, (TypeError, "unsupported operand type(s) for *: 'Ref' and 'int'"),
   BEFORE),
  ("`jax.device_put(model", lambda net: jax.device_put(net, FIRST),
   (RefArgumentError, "nnx.device_put"), BEFORE),
  ("`jax.device_put(variable", lambda net: jax.device_put(net.count, FIRST), NO_HANDLER, BEFORE),
  ("`jax.export.export`", lambda net: jax.export.export(jax.jit(lambda m: m(X)))(net),
   (NotImplementedError, ""), BEFORE),
  ("a new attribute, or `sow`", new_attribute, None, AFTER),
  ("`model.eval()` after plain", eval_after_closure, None, AFTER),
]  # fmt: skip


def test_every_row_has_a_case_and_every_case_a_row():
  found = [sum(row[0].startswith(case[0]) for case in CASES) for row in rows()]
  assert found == [1] * len(CASES)
  assert all(len(row) == 4 for row in rows())


@pytest.mark.parametrize(("start", "run", "error", "state"), CASES, ids=[c[0] for c in CASES])
def test_a_row_is_true(start, run, error, state):
  _, happens, said, _ = next(row for row in rows() if row[0].startswith(start))
  net = Net()
  before = [np.asarray(v[...]) for v in (net.count, net.linear.kernel, net.linear.bias)]
  if error is None:
    run(net)
  else:
    *types, words = error
    with pytest.raises(tuple(types), match=re.escape(words)) as info:
      run(net)
    named = re.findall(r"`(\w+(?:Error|Interrupt))", happens)
    assert not named or info.type.__name__ in named
  assert state_after(net, before) == state
  assert state in said


def test_what_the_page_says_to_write_instead_works():
  net = Net()
  assert optax.global_norm(nnx.pure(nnx.state(net))) > 0
  assert not jax.tree.map(lambda x: x * 0, nnx.pure(net)).linear.kernel.any()
  assert nnx.device_put(net, FIRST) is net and nnx.device_put(net.count, FIRST) is net.count
  assert (
    float(nnx.grad(lambda v: (v[...] ** 2).sum(), wrt=nnx.Variable)(net.linear.bias).sum()) == 0
  )
  assert jax.jit(nnx.pure)(net).count == 0
  nnx.jit(lambda m, v: m(X))(net, net.count)
  nnx.jit(lambda m: m(X), donate_argnums=0)(net)
  assert float(net.count) == 2
  assert jax.pure_callback(lambda x: x, TYPE, net.count[...]) == 2
  jax.debug.print("{}", net.count[...])
  np.testing.assert_allclose(
    nnx.jit(lambda m: solved(nnx.to_lojax(m)))(net.linear), solved(net.linear), rtol=1e-5
  )

  @jax.custom_vjp
  def f(x):
    net.count[...] += 1
    return x

  f.defvjp(lambda x: (f(x), None), lambda _, g: (g,))
  jax.jit(f)(1.0)
  assert float(net.count) == 3
