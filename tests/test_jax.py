"""The private paths of `_jax` and their public fallbacks behave the same."""

import functools
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import _jax, nnx

SCENARIO = """
import copy, re
import jax, jax.numpy as jnp, optax
from refax import _jax, nnx

def scenario():
  out = []
  v = nnx.Variable(jnp.arange(3.0))
  read = v[...]
  v[...] = read * 2
  v[1] = 7.0
  v += 1
  out += [read, v[...], v.shape, str(v.dtype), v.nbytes]
  jax.jit(lambda v: v.set_value(v * 2))(v)
  given = jnp.ones(3)
  v[...] = given
  nnx.jit(lambda v: v.set_value(v + 1))(v)
  out += [v[...], given, repr(v)]
  d = nnx.Variable({"a": jnp.zeros(2), "k": jax.random.key(0)})
  d["a"] += 1
  d["k"] = jax.random.key(3)
  out += [d["a"], jax.random.key_data(d["k"])]
  try:
    v[...] = jnp.ones(5)
  except ValueError as error:
    out.append(str(error).split("\\n")[2])

  class Net(nnx.Module):
    def __init__(self, rngs):
      self.linear = nnx.Linear(2, 3, rngs=rngs)
      self.norm = nnx.BatchNorm(3, rngs=rngs)
      self.dropout = nnx.Dropout(0.5, rngs=rngs)
      self.tied = self.linear.kernel
    def __call__(self, x):
      return self.dropout(self.norm(self.linear(x)))

  net = Net(nnx.Rngs(0))
  optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)
  x = jnp.arange(8.0).reshape(4, 2)

  def step(net, optimizer):
    loss, grads = nnx.value_and_grad(lambda net: (net(x) ** 2).mean())(net)
    optimizer.update(net, grads)
    return loss

  for run in (step, jax.jit(step), nnx.jit(step)):
    out.append(run(net, optimizer))
  net = copy.deepcopy(net)
  stack = nnx.to_hijax(jax.vmap(lambda r: nnx.to_lojax(Net(r)))(nnx.Rngs(1).split(2)))
  jax.lax.scan(lambda c, n: (c, n.norm.mean.set_value(n.norm.mean + 1)), 0, stack)
  jax.vmap(lambda n: n.linear.bias.set_value(5.0))(stack)
  out += [nnx.state(stack), nnx.split(net)[1], repr(net)]
  return [x[...] if isinstance(x, nnx.Variable) else x
          for x in jax.tree.leaves(out, is_leaf=lambda x: isinstance(x, nnx.Variable))]
"""
PRINTED = """
import numpy as np
def show(x):
  if hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  return str(x) if isinstance(x, (str, int)) else str(np.round(np.asarray(x), 4).tolist())
print(_jax._private() is None)
shown = repr([show(x) for x in scenario()])
print(re.sub("0x[0-9a-f]+", "0x", shown))  # addresses of functions
"""


def run(**environment):
  env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
  result = subprocess.run(
    [sys.executable, "-c", SCENARIO + PRINTED], env=env, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr[-3000:]
  public, values = result.stdout.strip().split("\n")
  return public == "True", values


def test_the_public_fallback_does_the_same_in_a_process_of_its_own():
  private, public = run(), run(REFAX_PUBLIC_JAX="1")
  assert (private[0], public[0]) == (False, True)
  assert private[1] == public[1]


def test_the_private_path_works_on_this_jax():
  assert _jax._private() is not None
  assert _jax.no_trace_active()
  assert not jax.jit(lambda x: x * _jax.no_trace_active())(1.0)


@pytest.fixture(params=["private", "public"])
def either(request, monkeypatch):
  """Both paths."""
  if request.param == "public":
    monkeypatch.setattr(_jax, "_private", lambda: None)
  return request.param


def test_cells_are_made_read_and_written(either):
  ref = _jax.new_cell(jnp.arange(3.0))
  assert _jax.is_ref(ref) and not _jax.is_tracer(ref) and not _jax.is_ref(jnp.ones(1))
  first = _jax.read_cell(ref)
  _jax.write_cell(ref, jnp.full(3, 5.0, jnp.float32))
  assert first.tolist() == [0.0, 1.0, 2.0]
  assert _jax.read_cell(ref).tolist() == ref[...].tolist() == [5.0] * 3
  jax.jit(lambda ref: ref.__setitem__(..., ref[...] * 2))(ref)
  assert _jax.read_cell(ref).tolist() == [10.0] * 3
  assert first.tolist() == [0.0, 1.0, 2.0]
  assert _jax.peek_cell(ref).tolist() == [10.0] * 3


@pytest.mark.parametrize("dtype", ["bool", "int8", "bfloat16", "float32", "complex64", "key"])
def test_cells_of_any_dtype(either, dtype):
  x = jax.random.split(jax.random.key(0), 2) if dtype == "key" else jnp.ones(2, dtype)
  ref = _jax.new_cell(x.copy())
  for _ in range(2):
    _jax.write_cell(ref, _jax.read_cell(ref))
    jax.jit(lambda ref: ref.__setitem__(..., ref[...]))(ref)
  got = _jax.read_cell(ref)
  assert got.dtype == x.dtype
  if dtype == "key":
    got, x = jax.random.key_data(got), jax.random.key_data(x)
  np.testing.assert_array_equal(got, x)


def test_cells_made_in_both_ways_are_one_type_to_jit(monkeypatch):
  traces = []

  @jax.jit
  def f(ref):
    traces.append(1)
    ref[...] += 1

  f(_jax.new_cell(jnp.ones(2)))
  with monkeypatch.context() as m:
    m.setattr(_jax, "_private", lambda: None)
    ref = _jax.new_cell(jnp.ones(2))
    f(ref)
  assert len(traces) == 1 and ref[...].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("via", ["jit", "grad", "vmap", "eval_shape"])
def test_cells_inside_a_trace(either, via):
  def f(x):
    ref = _jax.new_cell(jnp.float32(2.0))
    _jax.write_cell(ref, _jax.read_cell(ref) * 3)
    return x * _jax.read_cell(ref)

  got = {
    "jit": lambda: jax.jit(f)(2.0),
    "grad": lambda: 2 * jax.grad(f)(2.0),
    "vmap": lambda: jax.vmap(f)(jnp.full(1, 2.0))[0],
    "eval_shape": lambda: jax.eval_shape(f, 2.0),
  }[via]()
  assert got.shape == () and (via == "eval_shape" or float(got) == 12.0)


def test_a_concrete_cell_written_under_a_trace_is_written_when_it_runs(either):
  v = nnx.Variable(jnp.zeros(2))

  @jax.jit
  def f(x):
    v[...] += x
    return v[...]

  assert f(1.0).tolist() == [1.0, 1.0] and f(2.0).tolist() == [3.0, 3.0]
  assert v[...].tolist() == [3.0, 3.0]


def test_training_is_the_same_on_both_paths(either):
  net = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)
  x = jnp.arange(4.0).reshape(2, 2)
  for jit in (lambda f: f, jax.jit, nnx.jit):
    step = jit(lambda n, o: o.update(n, nnx.grad(lambda n: n(x).sum())(n)) and None)
    step(net, optimizer)
  want = nnx.Linear(2, 1, rngs=nnx.Rngs(0)).kernel - 0.3 * x.sum(0)[:, None]
  np.testing.assert_allclose(net.kernel, want, rtol=1e-5)
  assert int(optimizer.step) == 3


def test_printing_shows_the_value_and_is_no_traced_read(either):
  v = nnx.Variable(jnp.arange(2))
  assert "value=Array([0, 1], dtype=int32)" in repr(v)
  seen = []

  @jax.jit
  def f(x):
    seen.append(repr(v))
    return x

  assert not jax.make_jaxpr(f)(1.0).effects
  assert "value=Array([0, 1], dtype=int32)" in seen[0]
  assert "Linear( # Param: 9 (36 B)" in repr(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))


def test_the_trace_state_tells_traces_apart():
  outside = _jax.trace_state()
  assert outside == _jax.trace_state()
  inside = []
  jax.jit(lambda x: inside.append((_jax.trace_state(), _jax.trace_state())) or x)(1.0)
  assert inside[0][0] == inside[0][1] != outside
  assert _jax.trace_state() == outside


def test_reads_and_writes_of_a_jaxpr_are_found():
  def f(a, b, c, d):
    a[...] = b[...] * 2
    c[...] += 1

  jaxpr = jax.make_jaxpr(f)(*(_jax.new_cell(jnp.float32(1)) for _ in range(4))).jaxpr
  reads, writes = _jax.ref_effects(jaxpr)
  a, b, c, _ = jaxpr.invars
  assert reads & set(jaxpr.invars) >= {b, c} and writes & set(jaxpr.invars) == {a, c}


def test_the_quick_look_at_the_trace_is_used_only_where_it_is_right():
  core, in_a_trace = _jax._private().core, []
  quick = _jax._trace_check(core)
  assert quick is not core.trace_state_clean and quick()
  jax.eval_shape(lambda: in_a_trace.append(quick()))
  assert in_a_trace == [False]

  class Without:  # a JAX that keeps its state elsewhere
    trace_state_clean = staticmethod(core.trace_state_clean)

  class Other(Without):  # and one in which it means something else
    trace_state_strong_ref, axis_env_state = core.trace_state_strong_ref, core.axis_env_state
    eval_trace, top_axis_env = core.eval_trace, object()

  for changed in (Without, Other):
    assert _jax._trace_check(changed) is Without.trace_state_clean


def test_a_snapshot_waits_for_a_buffer_that_another_call_is_taking(monkeypatch):
  """XLA refuses such a buffer some time before it says that it is deleted; a soak met that."""
  refused = iter(["Buffer has been deleted or donated.", None])
  together = _jax._copied_together

  def refusing(xs):
    if message := next(refused):
      raise ValueError(message)
    return together(xs)

  monkeypatch.setattr(_jax, "_copied_together", refusing)
  refs = [nnx.Variable(2.0).get_raw_value()]
  assert [float(x) for x in _jax.snapshot(refs) or []] == [2.0]


TRACED = {
  "arrays": (lambda xs: {"a": xs[0] @ xs[1], "b": None}, [jnp.ones((2, 3)), jnp.ones(3)]),
  "numbers": (lambda xs: (xs[0] + xs[1], 2.0), [1.0, np.ones(2, np.int8)]),
  "keys": (lambda xs: jax.random.split(xs[0]), [jax.random.key(0)]),
  "a closure": (lambda xs: xs[0] + jnp.arange(3) + TRACED["arrays"][1][1], [jnp.ones(3)]),
  "types": (lambda xs: xs[0].sum(), [jax.ShapeDtypeStruct((4,), jnp.bfloat16)]),
}


@pytest.mark.parametrize("name", TRACED)
def test_a_trace_is_that_of_make_jaxpr(name):
  f, values = TRACED[name]
  assert _jax._tracer() is not None
  got, want = _jax.traced(f, values), jax.make_jaxpr(f, return_shape=True)(values)
  assert str(got[0]) == str(want[0])
  assert got[0].in_avals == want[0].in_avals and got[0].out_avals == want[0].out_avals
  assert jax.tree.structure(got[1]) == jax.tree.structure(want[1])
  types = lambda shapes: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(shapes)]
  assert types(got[1]) == types(want[1])


def test_a_trace_of_what_returns_no_array_says_what_jax_says():
  f = lambda xs: {"a": [xs[0], "text"]}
  texts = []
  for way in (_jax._tracer(), _jax._make_jaxpr):
    with pytest.raises(TypeError, match="returned a value of type <class 'str'>") as caught:
      way(f, [jnp.ones(2)])
    texts.append(str(caught.value))
  assert texts[0] == texts[1]


def _whole(x):
  a, b = jax.new_ref(x), jax.new_ref(jnp.zeros(2))
  a[...] = jax.nn.relu(a[...]) * 2
  b[...] = a[...] + b[...]
  return a[...], jax.freeze(b), x, 1.0


def _part(x):
  a = jax.new_ref(x)
  a[0] = 5.0
  return (a[...],)


def _inside(x):
  def inner(x):
    a = jax.new_ref(x)
    a[...] *= 3
    return a[...]

  return (jax.jit(inner)(x),)


@pytest.mark.parametrize("f, is_renamed", [(_whole, True), (_part, False), (_inside, False)])
def test_refs_made_inside_become_values_without_another_trace(f, is_renamed, monkeypatch):
  x = jnp.array([-1.0, 2.0])
  closed = jax.make_jaxpr(f)(x)
  assert (_jax._renamed(closed) is not None) is is_renamed
  pure = _jax.discharge(closed)
  monkeypatch.setattr(_jax, "_renamed", lambda closed: None)
  for jaxpr in (pure, _jax.discharge(closed)):
    assert "Ref" not in str(jaxpr)
    run = _jax.jaxpr_as_fun(jaxpr)
    for got, want in zip(run(x), f(x), strict=True):
      np.testing.assert_array_equal(got, want)
    gradient = jax.grad(lambda x, run=run: run(x)[0].sum())(x)
    np.testing.assert_array_equal(gradient, {_whole: [0, 2], _part: [0, 1], _inside: [3, 3]}[f])


CLOSED = nnx.Variable(10.0)


def _of_refs(values, *, inside):
  """Writes a Ref that it is given, and one by closure, wholly or in part."""
  ref, x = values
  if inside:
    jax.lax.fori_loop(0, 2, lambda i, _: ref.__setitem__(i, ref[i] * x), None)
  else:
    ref[...] = ref[...] * x
  CLOSED[...] = CLOSED[...] + x
  return {"x": x + 1, "sum": ref[...].sum()}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("value", [jnp.ones(3), jax.ShapeDtypeStruct((3,), jnp.float32)])
def test_a_trace_with_refs_as_inputs_becomes_one_of_values(either, inside, value):
  f = functools.partial(_of_refs, inside=inside)
  closed, shapes = _jax.traced(f, [_jax.AsRef(value), jnp.float32(2.0)])
  assert [_jax.is_ref_var(v) for v in closed.jaxpr.invars] == [True, False]
  assert jax.tree.structure(shapes) == jax.tree.structure({"x": 0, "sum": 0})
  reads, writes = _jax.ref_effects(closed.jaxpr)
  assert closed.jaxpr.invars[0] in reads & writes
  pure = _jax.discharge(_jax.refs_as_inputs(closed))
  assert not any(map(_jax.is_ref, pure.consts))
  got = _jax.jaxpr_as_fun(pure)(jnp.ones(3), jnp.float32(2.0), jnp.float32(10.0))
  after = [2.0, 2.0, 1.0] if inside else [2.0] * 3
  want = [sum(after), 3.0, after, 12.0]  # the results, the Ref among the inputs, that by closure
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)
  assert float(CLOSED) == 10.0


@pytest.mark.parametrize("value", [jax.random.key(3), jnp.zeros((0, 2), jnp.bfloat16), True])
def test_a_ref_of_any_dtype_may_be_the_input_of_a_trace(either, value):
  closed, _ = _jax.traced(lambda values: values[0][...], [_jax.AsRef(jnp.asarray(value))])
  (x, final) = _jax.jaxpr_as_fun(_jax.discharge(closed))(jnp.asarray(value))
  assert x.dtype == final.dtype == jnp.asarray(value).dtype and (x == final).all()


def test_what_else_a_jaxpr_does_is_not_lost():
  def f(x):
    a = jax.new_ref(x)
    jax.debug.print("{}", a[...])
    return (a[...],)

  closed = jax.make_jaxpr(f)(1.0)
  assert _jax._renamed(closed) is None
  assert "debug" in str(_jax.discharge(closed))


# a trace of Refs as one of values
def whole(a, b, x):
  a[...] = a[...] + x
  old = a[...]
  b[...], a[...] = old * 2, b[...]
  return old, a[...]


def twice(a, b, x):
  a[...] = x
  a[...] = a[...] + a[...]
  return a[...], x


def parts(a, b, x):
  a[0] = x[1]
  b[1:] += x[1:]
  a.at[2][...] = 7.0
  return a[0] + b[...][1], a[1:]


def loop(a, b, x):
  def body(i, c):
    a[...] += b[...] * c
    b[i] = a[i]
    return c + 1.0

  return jax.lax.fori_loop(0, 3, body, x), a[...]


def branch(a, b, x):
  jax.lax.cond(x[0] > 0, lambda: a.__setitem__(..., x), lambda: b.__setitem__(..., x))
  return a[...], jax.lax.switch(1, [lambda: a[...], lambda: b[...] + a[...]])


def nested(a, b, x):
  inner = jax.jit(lambda a, x: (a.__setitem__(..., a[...] * x), a[...].sum())[1])
  return inner(a, x), jax.checkpoint(lambda x: b[...] * x)(x), inner(b, a[...])


def local(a, b, x):
  ref = jax.new_ref(x)
  jax.lax.fori_loop(0, 2, lambda i, _: ref.__setitem__(i, a[...][i]), None)
  a[...] = ref[...] + 1
  return ref[...], jax.freeze(ref)


def unused(a, b, x):
  return x + 1, a.shape[0] * jnp.ones(())


def constants(a, b, x):
  table = np.arange(3.0, dtype=np.float32)
  a[...] = table * x
  return jax.nn.relu(a[...] - jnp.asarray(table)), jnp.zeros(3) + 2


STATEFUL = [whole, twice, parts, loop, branch, nested, local, unused, constants]


def traced(f):
  refs = [jax.new_ref(jnp.arange(3.0)), jax.new_ref(jnp.ones(3))]
  return jax.jit(f).trace(*refs, jnp.array([0.5, -1.0, 2.0])).jaxpr


@pytest.mark.parametrize("f", STATEFUL, ids=lambda f: f.__name__)
def test_a_trace_of_refs_computes_the_same_as_one_of_values(f):
  start = [jnp.arange(3.0), jnp.ones(3), jnp.array([0.5, -1.0, 2.0])]
  closed = traced(f)
  found = _jax.without_refs(closed, closed.jaxpr.invars[:2])
  assert found is not None
  pure, kept = found
  given = [x for var, x in zip(closed.jaxpr.invars, start, strict=True) if var in kept]
  assert _jax.fits(pure, given) and not _jax.fits(pure, [jnp.ones((2, 2)) for _ in given])
  out = jax.jit(lambda *xs: _jax.call_jaxpr(pure, list(xs), "f"))(*given)
  refs = [jax.new_ref(x) for x in start[:2]]
  want = jax.jit(f)(*refs, start[2])
  for a, b in zip(out, [*(ref[...] for ref in refs), *jax.tree.leaves(want)], strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("f", STATEFUL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("way", ["as values", "as Refs"])
def test_nnx_jit_is_right_with_and_without_a_trace_of_values(f, way, monkeypatch):
  found = []
  real = _jax.without_refs
  monkeypatch.setattr(
    _jax,
    "without_refs",
    lambda *args: found.append(real(*args) if way == "as values" else None) or found[-1],
  )
  x = jnp.array([0.5, -1.0, 2.0])
  ours, theirs = ([jax.new_ref(jnp.arange(3.0)), jax.new_ref(jnp.ones(3))] for _ in range(2))
  step, plain = nnx.jit(f), jax.jit(f)
  step.clear_cache()  # what was compiled belongs to the function
  for _ in range(3):
    for a, b in zip(
      jax.tree.leaves(step(*ours, x)), jax.tree.leaves(plain(*theirs, x)), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=1e-6)
    for a, b in zip(ours, theirs, strict=True):
      np.testing.assert_allclose(a[...], b[...], rtol=1e-6)
  assert [x is not None for x in found] == [way == "as values"]


def test_operations_that_are_not_known_and_a_missing_private_api_leave_the_trace_as_it_is(
  monkeypatch,
):
  closed = traced(whole)
  with monkeypatch.context() as m:
    m.setattr(_jax, "_private", lambda: None)
    assert _jax.without_refs(closed, []) is None
  renamed = closed.jaxpr.eqns[0].primitive
  monkeypatch.setattr(renamed, "name", "read_in_another_way", raising=False)
  found = _jax.without_refs(closed, closed.jaxpr.invars[:1])
  assert found is None or len(found[0].jaxpr.outvars) == 3  # JAX discharges it by itself


def test_cells_like_one_are_cells_of_their_own(either):
  make = _jax.cells_like([jnp.ones(3), jnp.ones(3)])
  a, b = make([jnp.zeros(3), jax.device_put(jnp.full(3, 2.0, jnp.float32), jax.devices()[0])])
  jax.jit(lambda ref: ref.__setitem__(..., ref[...] + 1))(a)
  assert a[...].tolist() == [1.0] * 3 and b[...].tolist() == [2.0] * 3
  assert jax.typeof(a) == jax.typeof(_jax.new_cell(jnp.ones(3)))


def test_copied_cells_have_the_types_and_values_of_theirs_and_share_nothing(either):
  values = [jnp.arange(3.0), jnp.ones((2, 2), jnp.int8), jax.random.key(0)]
  refs = [_jax.new_cell(jnp.copy(x)) for x in values]
  for _ in range(3):
    copies = _jax.copied_cells(refs)
    assert list(map(jax.typeof, copies)) == list(map(jax.typeof, refs))
    assert all((_jax.read_cell(c) == x).all() for c, x in zip(copies, values, strict=True))
    _jax.write_cell(copies[0], jnp.zeros(3))
    assert (_jax.read_cell(refs[0]) == values[0]).all()


@pytest.mark.parametrize("is_known", [True, False])
def test_a_ref_is_made_past_its_constructor_only_where_that_does_nothing_else(is_known):
  class Cell:
    def __init__(self, aval, refs):
      self._aval, self._refs = aval, refs
      if not is_known:
        self.more = 1

  class Buffer:
    def __init__(self, aval, buf):
      self._aval, self._buf = aval, buf

  core = types.SimpleNamespace(Ref=Cell, ArrayRefImpl=Buffer)
  make = _jax._ref_maker(core, Cell("type", Buffer("type", "buffer")))
  made = make("another type", "another")
  assert vars(made._refs) == {"_aval": "another type", "_buf": "another"}
  assert made._aval == "another type" and hasattr(made, "more") is not is_known
  assert make.__name__ == ("make" if is_known else "<lambda>")


@pytest.mark.parametrize("way", ["private", "public"])
def test_a_steady_call_asks_for_all_that_makes_a_call_another_one(way, monkeypatch):
  if _jax._private() is None:
    pytest.skip("nothing is steady without the private path")
  with monkeypatch.context() as m:
    if way == "public":
      m.setattr(_jax, "flag", lambda name: None)  # as if the private flags meant something else
    may_run = _jax.steady_check.__wrapped__()
  assert may_run()
  for context in (jax.disable_jit(), jax.debug_nans(True), jax.debug_infs(True)):
    with context:
      assert not may_run()
  assert may_run()
  seen = []
  jax.jit(lambda x: seen.append(may_run()) or x)(1.0)
  assert seen == [False]


def test_types_of_many_arrays_by_private_names_and_without():
  class Public:
    def __init__(self, x):
      self.aval, self.committed, self.sharding = x.aval, x.committed, x.sharding

  arrays = [jnp.ones(3), jax.device_put(jnp.ones(2), jax.devices()[0])]
  assert _jax.types_of(arrays) == _jax.types_of([Public(x) for x in arrays])
  assert _jax.types_of(arrays)[1] == [False, True]
  assert _jax.types_of(arrays) != _jax.types_of(arrays[::-1])
