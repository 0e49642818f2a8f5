"""stage: a traced function knows its effects, and runs as a pure function of values."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import _jax, nnx
from refax.errors import AliasError
from refax.transforms.lift import Inputs
from refax.transforms.stage import Staged, read_closures, values_of


class Node(nnx.Module):
  """An object with any attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


def staged(f, *args):
  inputs = Inputs.of(args, {})
  return Staged(f, inputs, values_of(inputs))


def names(stage, indices):
  return sorted(stage.inputs.graphdef.paths[i][-1] for i in indices)


@pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
def test_what_is_read_and_written_is_known_without_running(hijax):
  new = lambda: nnx.Variable(1.0, is_hijax=hijax)
  m = Node(read=new(), written=new(), both=new(), neither=new())

  def f(m):
    m.written[...] = m.read + 1
    m.both[...] += 1

  stage = staged(f, m)
  assert names(stage, stage.read) == ["both", "read"]
  assert names(stage, stage.written) == ["both", "written"]
  assert [float(v) for v in (m.written, m.both)] == [1.0, 1.0]


def test_a_run_is_pure():
  v, closed = nnx.Variable(1.0), nnx.Variable(10.0)

  def f(v, x):
    v[...] += x
    closed[...] += v
    return v * 2

  stage = staged(f, v, 2.0)
  refs, closures = read_closures([stage])
  (key,) = refs
  assert stage.closures_read == stage.closures_written == {key}
  assert stage.closure_variable(key)._cell is closed._cell
  run = jax.jit(lambda values, closures: stage.run(values, closures))
  for _ in range(2):  # the same each time: nothing is kept
    result = run([1.0, 2.0], closures)
    assert float(result.outputs.written[0]) == 3.0 and float(result.outputs.fresh[0]) == 6.0
    assert float(result.closures[key]) == 13.0
  assert float(v) == 1.0 and float(closed) == 10.0
  batched = jax.vmap(lambda x: stage.run([1.0, x], closures).closures[key])(jnp.arange(3.0))
  np.testing.assert_array_equal(batched, [11.0, 12.0, 13.0])


def test_values_that_are_not_written_may_be_asked_for():
  m = Node(a=nnx.Variable(1.0), b=nnx.Variable(2.0))
  stage = staged(lambda m: m.a.set_value(5.0), m)
  outputs = stage.run(values_of(stage.inputs), {}, written=(0, 1)).outputs
  assert [float(x) for x in outputs.written] == [5.0, 2.0] and outputs.spec.written == (0, 1)


def test_an_argument_by_closure_too_is_an_error():
  v = nnx.Variable(1.0)
  with pytest.raises(AliasError, match="as an argument and by closure"):
    staged(lambda w: w + v, v)
  assert float(v) == 1.0


def test_a_closure_that_is_only_mentioned_is_no_closure():
  v = nnx.Variable(jnp.zeros(3))
  stage = staged(lambda w: w * v.ndim, nnx.Variable(1.0))
  assert stage.closures == {}


def test_custom_derivatives_survive():
  @jax.custom_jvp
  def f(x):
    return x * 1.0

  f.defjvp(lambda primals, tangents: (f(*primals), 100.0 * tangents[0]))
  v = nnx.Variable(0)

  def g(x):
    v[...] += 1
    return nnx.cond(x > 0, lambda x: f(x), lambda x: x, x)

  for transform in (
    nnx.remat,
    nnx.jit,
    lambda g: lambda x: nnx.fori_loop(0, 1, lambda i, x: g(x), x),
  ):
    assert float(jax.grad(transform(g))(1.0)) == 100.0
  assert int(v) == 3


def test_variables_of_pytrees():
  v = nnx.Variable({"a": jnp.zeros(2), "b": 1.0})

  def f(v):
    v[...] = {"a": v["a"] + 1, "b": v["b"] * 2}
    return v["b"]

  assert float(nnx.remat(f)(v)) == 2.0
  assert float(nnx.fori_loop(0, 2, lambda i, v: (f(v), v)[1], v)["b"]) == 8.0
  assert v["a"].tolist() == [3.0, 3.0]


# threads
THREADED = {
  "jax.jit, lojax": (jax.jit, False),  # JAX donates Refs to a call that only reads them
  "nnx.jit, lojax": (nnx.jit, False),
  "nnx.jit, hijax": (nnx.jit, True),
  "nnx.remat, hijax": (nnx.remat, True),
}


@pytest.mark.parametrize("name", THREADED)
def test_eight_threads_call_one_function_on_one_model(name):
  jit, hijax = THREADED[name]
  model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
  model = model if hijax else nnx.to_lojax(model)
  x = jnp.arange(8.0).reshape(2, 4)
  want, f = np.asarray(model(x)), jit(lambda m, x: m(x))
  barrier, results, errors = threading.Barrier(8), [], []

  def work():
    try:
      barrier.wait()
      results.extend(np.asarray(f(model, x)) for _ in range(5))
    except Exception as error:
      errors.append(error)

  threads = [threading.Thread(target=work) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert errors == [] and len(results) == 40
  for y in results:
    np.testing.assert_allclose(y, want, rtol=1e-6)


@pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
def test_a_function_is_traced_once_whatever_state_it_reaches(hijax, monkeypatch):
  v, closed = nnx.Variable(1.0, is_hijax=hijax), nnx.Variable(2.0)
  calls, traced = [], _jax.traced
  monkeypatch.setattr(_jax, "traced", lambda *args: calls.append(args) or traced(*args))

  def f(v, x):
    v[...] = v[...] + x
    closed[...] = closed[...] * 2
    return v[...] + closed[...]

  stage = staged(f, v, 3.0)
  assert len(calls) == 1
  _, closures = read_closures([stage])
  result = stage.run(values_of(stage.inputs), closures)
  assert [float(x) for x in (*result.outputs.written, *result.outputs.fresh)] == [4.0, 8.0]
  assert list(map(float, result.closures.values())) == [4.0]
  assert [float(x) for x in (v, closed)] == [1.0, 2.0], "a run is pure"


def test_a_final_value_may_be_asked_for_of_what_is_not_written():
  a, b = nnx.Variable(jnp.ones(2)), nnx.Variable({"x": 3.0, "y": (4.0,)})
  stage = staged(lambda a, b: a.set_value(a[...] + 1), a, b)
  assert stage.written == {0}
  outputs = stage.run(values_of(stage.inputs), {}, written=(0, 1)).outputs
  assert outputs.written[0].tolist() == [2.0, 2.0]
  assert outputs.written[1] == {"x": 3.0, "y": (4.0,)}


def test_variables_that_share_a_cell_are_one_input():
  v = nnx.Variable(1.0)
  _, twin = nnx.split(v)

  def f(a, b):
    a[...] = a[...] + 1
    return b[...]

  stage = staged(f, v, twin)
  assert len(stage.inputs.leaves) == len(stage.jaxpr.jaxpr.invars) == 1
  (x,) = stage.run(values_of(stage.inputs), {}).outputs.fresh
  assert float(x) == 2.0
