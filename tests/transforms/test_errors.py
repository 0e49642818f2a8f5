"""After an error in any transform all is as before; what is compiled when; the messages."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import (
  AliasError,
  DifferentiatedWriteError,
  FilterError,
  MissingRngError,
  ShapeMismatchError,
  SharedWriteError,
  TraceContextError,
  TreeMismatchError,
)

X = jnp.array([1.0, 2.0])


class Model(nnx.Module):
  """A Variable of each sort, an array, a list, and a static attribute; or a stack of them."""

  def __init__(self, *lead):
    self.w = nnx.Param(jnp.zeros((*lead, 2)) + jnp.array([3.0, 4.0]))
    self.stat = nnx.BatchStat(jnp.zeros((*lead, 2)))
    self.memory = nnx.Variable(jnp.full(lead, 0.5))
    self.count = nnx.Variable(jnp.zeros(lead, jnp.int32))
    self.local = nnx.Variable(jnp.full(lead, 0.25), is_hijax=False)
    self.array = jnp.zeros((*lead, 2)) + jnp.array([7.0, 8.0])
    self.layers = [nnx.Dropout(0.5)]
    self.rngs = nnx.Rngs(0).split(lead) if lead else nnx.Rngs(0)
    self.mode = "train"


def snapshot(model):
  """Everything in a model: Variables bit by bit, attributes by identity or value."""
  found = {}
  for path, value in nnx.iter_graph(model):
    if isinstance(value, nnx.Variable):
      x = value[...]
      x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
      found[path] = (type(value), np.asarray(x).tobytes(), value.get_metadata())
    elif isinstance(value, nnx.Pytree):
      found[path] = (type(value), id(value), sorted(vars(value)))
    else:
      found[path] = value if isinstance(value, str | int | float | bool | None) else id(value)
  return found


def tracers(model):
  """The paths at which a tracer is left: in a Variable, or as an attribute."""
  found = []
  for path, value in nnx.iter_graph(model):
    inside = value.get_raw_value() if isinstance(value, nnx.Variable) else value
    leaves = [] if isinstance(value, nnx.Pytree) else jax.tree.leaves(inside)
    found += [path for x in leaves if isinstance(x, jax.core.Tracer)]
  return found


def test_the_walk_finds_a_tracer():
  model = Model()
  assert tracers(model) == []

  def leak(x):
    model.local.set_raw_value(x.sum())
    object.__setattr__(model, "array", x)  # past every assignment
    return x

  jax.make_jaxpr(leak)(X)
  assert tracers(model) == [("array",), ("local",)]


# what each transform does with a function of a model that returns a scalar
def _nnx_while(f, m):
  def body(carry):
    i, _, m = carry
    return i + 1, f(m), m

  return nnx.while_loop(lambda carry: carry[0] < 1, body, (0, jnp.array(0.0), m))


def _vjp(f, m):
  return nnx.vjp(f, m)[1](1.0)


def _jvp(f, m):
  return nnx.jvp(f, (m,), (nnx.state(m, nnx.Param),))


NNX = {
  "nnx.jit": lambda f, m: nnx.jit(f)(m),
  "nnx.jit, closure": lambda f, m: nnx.jit(lambda: f(m))(),
  "nnx.vmap": lambda f, m: nnx.vmap(lambda m, x: f(m) + x, in_axes=(None, 0))(m, X),
  "nnx.vmap, closure": lambda f, m: nnx.vmap(lambda x: f(m) + x)(X),
  "nnx.scan": lambda f, m: nnx.scan(
    lambda c, m: c + f(m), in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=1
  )(0.0, m),
  "nnx.scan, closure": lambda f, m: nnx.scan(lambda c, x: (c + f(m), x))(0.0, X[:1]),
  "nnx.scan, carry": lambda f, m: nnx.scan(
    lambda m: (m, f(m)), in_axes=(nnx.Carry,), out_axes=(nnx.Carry, 0), length=1
  )(m),
  "nnx.while_loop": _nnx_while,
  "nnx.fori_loop": lambda f, m: nnx.fori_loop(0, 1, lambda i, c: (c[0] + f(c[1]), c[1]), (0.0, m)),
  "nnx.cond": lambda f, m: nnx.cond(True, f, f, m),
  "nnx.cond, closure": lambda f, m: nnx.cond(True, lambda: f(m), lambda: jnp.array(0.0)),
  "nnx.switch": lambda f, m: nnx.switch(1, [lambda m: jnp.array(0.0), f], m),
  "nnx.remat": lambda f, m: nnx.remat(f)(m),
  "nnx.remat, closure": lambda f, m: nnx.remat(lambda: f(m))(),
  "nnx.eval_shape": lambda f, m: nnx.eval_shape(f, m),
  "nnx.make_jaxpr": lambda f, m: nnx.make_jaxpr(f)(m),
  "nnx.effects": lambda f, m: nnx.effects(f)(m),
  "nnx.no_update": lambda f, m: nnx.no_update(f)(m),
  "nnx.checkify": lambda f, m: nnx.checkify(f)(m),
  "nnx.jit of nnx.grad": lambda f, m: nnx.jit(nnx.grad(f))(m),
  "nnx.jit of nnx.vjp": lambda f, m: nnx.jit(lambda m: _vjp(f, m))(m),
  "nnx.jit of nnx.jvp": lambda f, m: nnx.jit(lambda m: _jvp(f, m))(m),
  "nnx.jit of nnx.split_rngs": lambda f, m: nnx.jit(nnx.split_rngs(splits=2)(f))(m),
  "nnx.jit of nnx.fork_rngs": lambda f, m: nnx.jit(nnx.fork_rngs()(f))(m),
  "nnx.grad of nnx.remat of nnx.cond": lambda f, m: nnx.grad(
    nnx.remat(lambda m: nnx.cond(m.count < 9, f, f, m))
  )(m),
  "nnx.vmap of nnx.grad": lambda f, m: nnx.vmap(
    lambda m, x: nnx.grad(lambda m: f(m) * x)(m), in_axes=(None, 0)
  )(m, X),
  "nnx.accumulate_grads": lambda f, m: nnx.jit(
    nnx.accumulate_grads(lambda m, x: f(m) * x.mean(), steps=1)
  )(m, X),
  "nnx.transaction": lambda f, m: _in_transaction(f, m),
}


def _in_transaction(f, m):
  with nnx.transaction(m):
    return f(m)


PLAIN = {
  "jax.jit": lambda f, m: jax.jit(f)(m),
  "jax.jit, closure": lambda f, m: jax.jit(lambda: f(m))(),
  "jax.jit of jax.grad": lambda f, m: jax.jit(lambda m, x: jax.grad(lambda x: f(m) * x)(x))(m, 1.0),
  "jax.jit of jax.vmap": lambda f, m: jax.jit(jax.vmap(f))(m),
  "jax.lax.scan": lambda f, m: jax.lax.scan(lambda c, _: (c + f(m), None), 0.0, length=1),
  "jax.checkpoint": lambda f, m: jax.checkpoint(f)(m),
  "jax.lax.cond": lambda f, m: jax.lax.cond(m.count[...] < 9, lambda: f(m), lambda: 0.0),
  "jax.eval_shape": lambda f, m: jax.eval_shape(f, m),
}


# functions that write, then fail
def write(m):
  """What every function does first; lojax Variables only where the transform hands them out."""
  m.count[...] += 1
  m.stat[...] += 1.0
  m.memory[...] *= 2


def python_exception(m):
  write(m)
  raise RuntimeError("boom")


def shape_error(m):
  write(m)
  return (m.w[...] + jnp.ones(3)).sum()


def misfit(m):
  write(m)
  m.memory[...] = jnp.ones(3)
  return m.w.sum()


def not_exhaustive(m):
  write(m)
  nnx.split(m, nnx.Param)
  return m.w.sum()


def differentiated_write(m):
  write(m)

  def inner(x):
    m.memory[...] = x * 2
    return x

  return jax.grad(inner)(1.0)


ERRORS = {
  "python exception": (python_exception, RuntimeError),
  "shape error": (shape_error, TypeError),
  "misfit": (misfit, ShapeMismatchError),
  "filter": (not_exhaustive, FilterError),
  "differentiated write": (differentiated_write, DifferentiatedWriteError),
}


def right(m):
  write(m)
  return m.w.sum() + m.memory


def check_unharmed(run, error):
  function, exception = ERRORS[error]
  lead = (3,) if run is PLAIN["jax.jit of jax.vmap"] else ()
  model, twin = Model(*lead), Model(*lead)
  before = snapshot(model)
  with pytest.raises(exception):
    run(function, model)
  assert snapshot(model) == before
  assert tracers(model) == []
  got, want = run(right, model), run(right, twin)  # the next call works, as if nothing had been
  assert variables(model) == variables(twin)
  assert str(got) == str(want)
  assert tracers(model) == []


def variables(model):
  """What the Variables of a model hold."""
  found = snapshot(model)
  return {path: found[path] for path, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable)}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", NNX)
def test_an_error_inside_an_nnx_transform_leaves_everything_as_it_was(name, error):
  check_unharmed(NNX[name], error)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", PLAIN)
def test_an_error_inside_a_plain_transform_leaves_everything_as_it_was(name, error):
  check_unharmed(PLAIN[name], error)


def test_an_error_before_any_write_leaves_everything_as_it_was_also_in_eager_gradients():
  model = Model()
  before = snapshot(model)

  def loss(m):
    m.w[...] = X
    return m.w.sum()

  for transform in (nnx.grad, nnx.value_and_grad, lambda f: lambda m: nnx.vjp(f, m)):
    with pytest.raises(DifferentiatedWriteError):
      transform(loss)(model)
    assert snapshot(model) == before
  assert nnx.grad(lambda m: (m.w**2).sum())(model)["w"][...].tolist() == [6.0, 8.0]


@pytest.mark.parametrize("name", ["nnx.jit", "nnx.remat", "nnx.cond", "nnx.fori_loop"])
def test_structural_changes_before_an_error_are_not_seen(name):
  model = Model()
  before = snapshot(model)

  def f(m):
    m.cache = nnx.Cache(jnp.zeros(3))
    m.layers.append(nnx.Variable(1.0))
    m.mode = "changed"
    m.array = m.array * 2
    m.local[...] = 9.0
    m.w.set_metadata(tag="changed")
    del m.stat
    raise RuntimeError("boom")

  with pytest.raises(RuntimeError, match="boom"):
    NNX[name](f, model)
  assert snapshot(model) == before
  assert tracers(model) == []


# trace counts
JITS = pytest.mark.parametrize("jit", [jax.jit, nnx.jit], ids=["jax.jit", "nnx.jit"])


def counted(jit):
  """A compiled step that writes state, and the list of modes that it was traced in."""
  traces = []

  @jit
  def step(model, x):
    traces.append(model.layers[0].deterministic)
    model.count[...] += 1
    model.stat[...] = x
    return model.layers[0](model.w * x, rngs=model.rngs)

  return step, traces


@JITS
def test_a_second_call_with_equal_shapes_does_not_retrace(jit):
  step, traces = counted(jit)
  model, other = Model(), Model()
  for m in (model, model, other, model):
    step(m, X)
  step(nnx.clone(model), 2 * X)
  assert len(traces) == 1
  assert int(model.count) == 3 and int(other.count) == 1
  step(model, jnp.ones((1, 2))[0])
  assert len(traces) == 1


@JITS
def test_other_shapes_and_dtypes_retrace(jit):
  traces = []
  step = jit(lambda model, x: traces.append(0) or model.w.sum() * x)
  model = Model()
  for x in (X, X[:1], X.astype(jnp.int32), X, X[:1]):
    step(model, x)
  assert len(traces) == 3


@JITS
def test_a_changed_static_attribute_retraces_and_the_old_one_is_remembered(jit):
  step, traces = counted(jit)
  model = Model()
  step(model, X)
  model.mode = "other"
  step(model, X)
  assert len(traces) == 2
  model.mode = "train"
  step(model, X)
  assert len(traces) == 2


@JITS
def test_toggling_between_train_and_eval_compiles_twice_in_all(jit):
  step, traces = counted(jit)
  model = Model()
  for _ in range(3):
    model.train()
    step(model, X)
    model.eval()
    step(model, X)
  assert traces == [False, True]
  assert int(model.count) == 6


@JITS
def test_writing_values_from_outside_does_not_retrace(jit):
  step, traces = counted(jit)
  model = Model()
  step(model, X)
  model.w[...] = 5.0
  nnx.update(model, {"stat": jnp.ones(2)})
  model.count += 1
  step(model, X)
  assert len(traces) == 1


@JITS
def test_an_error_while_tracing_does_not_count_as_compiled(jit):
  traces, fail = [], [True]

  @jit
  def step(model):
    traces.append(0)
    model.count[...] += 1
    if fail[0]:
      raise RuntimeError("boom")

  model = Model()
  with pytest.raises(RuntimeError, match="boom"):
    step(model)
  fail[0] = False
  step(model)
  step(model)
  assert len(traces) == 2 and int(model.count) == 2


# the messages
def message(exception, f):
  """The whole text of an error, without line numbers."""
  with pytest.raises(exception) as caught:
    f()
  return re.sub(r"\.py:\d+", ".py:N", caught.value.args[0])


class Net(nnx.Module):
  """A small model with a place for what the tests need."""

  def __init__(self, **attributes):
    self.linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    self.count = nnx.Variable(0)
    for name, value in attributes.items():
      setattr(self, name, value)


def test_message_of_a_mutable_output_of_jax_jit():
  text = message(ValueError, lambda: jax.jit(lambda v: v)(nnx.Variable(1.0)))
  assert "returned a mutable array reference of type Ref{float32[]}" in text


def test_message_of_one_variable_in_two_arguments_of_jax_jit():
  net = Net()
  text = message(ValueError, lambda: jax.jit(lambda a, b: None)(net, net.linear.kernel))
  assert text.startswith("only one reference to a mutable array may be passed as an argument")
  assert "appeared at both a.linear.kernel and b" in text


def test_message_of_an_argument_of_jax_jit_that_comes_by_closure_too():
  net = Net()
  f = lambda v: v + net.count
  text = message(ValueError, lambda: jax.jit(f)(net.count))
  assert "closed over" in text and "and passed as the argument v" in text


def test_message_of_an_argument_that_comes_by_closure_too():
  net = Net()
  f = lambda v: v + net.count
  assert message(AliasError, lambda: nnx.grad(lambda x: nnx.remat(f)(net.count) * x)(1.0)) == (
    "one Variable came as an argument and by closure\n"
    "  at:  Net.count  (Variable, created at test_errors.py:N)\n"
    "  got: a function that uses both\n"
    "  fix: use the argument inside the function"
  )


def test_message_of_one_variable_in_two_differentiated_arguments():
  net = Net()
  f = lambda a, b: (a.linear.kernel + b.kernel).sum()
  assert message(AliasError, lambda: nnx.grad(f, argnums=(0, 1))(net, net.linear)) == (
    "one Variable is in two differentiated arguments\n"
    "  at:  Net.linear.bias  (Param, created at test_errors.py:N)\n"
    "  got: the same Variable in argument 0 and in argument 1\n"
    "  fix: differentiate one argument that holds both"
  )


def test_message_of_a_write_to_a_variable_that_jax_vmap_shares():
  net = Net(last=nnx.Variable(0.0))
  assert message(SharedWriteError, lambda: jax.vmap(net.last.set_value)(X)) == (
    "jax.vmap cannot write one Variable for all elements of the batch\n"
    "  at:  Net.last  (Variable, created at test_errors.py:N)\n"
    "  got: a write to a Variable that came by closure or with in_axes=None\n"
    "  fix: pass the model as a mapped argument, with an axis on this Variable "
    "(for Rngs: rngs.split(n)); or drop the write, as for jax.hessian, by nnx.no_update(f)"
  )


@pytest.mark.parametrize("how", ["closure", "argument", "lojax argument"])
def test_message_of_a_write_to_a_variable_that_nnx_vmap_shares(how):
  net = Net(last=nnx.Variable(0.0, is_hijax=how != "lojax argument"))
  f = lambda net, x: net.last.set_value(x)
  if how == "closure":
    run = lambda: nnx.vmap(lambda x: f(net, x))(X)
  else:
    run = lambda: nnx.vmap(f, in_axes=(None, 0))(net, X)
  assert message(SharedWriteError, run) == (
    "a Variable that all elements of nnx.vmap share is written with values that differ\n"
    "  at:  Net.last  (Variable, created at test_errors.py:N)\n"
    "  got: a write to a Variable that came by closure or with the axis None\n"
    "  fix: give it an axis (nnx.StateAxes; for Rngs: rngs.split(n)), or say how the values "
    'become one: reduce={nnx.BatchStat: "mean"}'
  )
  assert float(net.last) == 0.0


@pytest.mark.parametrize("where", ["plain", "jit", "remat", "scan", "cond"])
def test_message_of_a_differentiated_write(where):
  net = Net(last=nnx.Variable(0.0))

  def f(net, x):
    net.last[...] = x * 2
    return x

  wrapped = {
    "plain": lambda x: f(net, x),
    "jit": lambda x: nnx.jit(f)(net, x),
    "remat": lambda x: nnx.remat(f)(net, x),
    "scan": lambda x: nnx.scan(
      lambda c, net: f(net, c), in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=2
    )(x, net),
    "cond": lambda x: nnx.cond(x > 0, f, f, net, x),
  }[where]
  assert message(DifferentiatedWriteError, lambda: jax.grad(wrapped)(1.0)) == (
    "a value that is being differentiated was written to a Variable, its gradient would be lost\n"
    "  at:  Net.last  (Variable, created at test_errors.py:N)\n"
    "  got: a value that depends on what jax.grad differentiates\n"
    "  fix: to keep the gradient, return the value from the function, hand it out by "
    "self.sow(...), name the Variable in nnx.grad(..., through=...), or make it in the function "
    "with is_hijax=False; to drop the gradient on purpose, write jax.lax.stop_gradient(x)"
  )


@pytest.mark.parametrize("where", ["plain", "jit", "remat", "scan"])
def test_message_of_a_write_of_a_variable_that_is_differentiated(where):
  net = Net()

  def f(net):
    net.linear.kernel[...] = 0.0
    return net.linear.bias.sum()

  wrapped = {
    "plain": f,
    "jit": nnx.jit(f),
    "remat": nnx.remat(f),
    "scan": lambda net: nnx.scan(
      lambda c, net: c + f(net), in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=2
    )(0.0, net),
  }[where]
  assert message(DifferentiatedWriteError, lambda: nnx.grad(wrapped)(net)) == (
    "a Variable cannot be written while it is differentiated\n"
    "  at:  Net.linear.kernel  (Param, created at test_errors.py:N)\n"
    "  got: a write inside a function whose gradient is taken with respect to it\n"
    "  fix: write it after the gradient, or leave it out with wrt=: it has no gradient then"
  )


def test_message_of_scan_lengths_that_differ():
  f = lambda c, x, y: (c, x)
  run = lambda: nnx.scan(f, in_axes=(nnx.Carry, 0, 0))(0.0, jnp.ones(2), {"y": jnp.ones(3)})
  assert message(TreeMismatchError, run) == (
    "nnx.scan maps over axes of one size\n"
    "  got: 2 at [1], 3 at [2].y\n"
    "  fix: check the axes, or pass None for what is not mapped"
  )
  assert message(TreeMismatchError, lambda: nnx.scan(lambda c, x: (c, x), length=4)(0.0, X)) == (
    "nnx.scan maps over axes of one size\n"
    "  got: 4 at length, 2 at the arguments\n"
    "  fix: check the axes, or pass None for what is not mapped"
  )
  run = nnx.scan(lambda c: c, in_axes=(nnx.Carry,), out_axes=nnx.Carry)
  assert message(TreeMismatchError, lambda: run(0.0)) == (
    "nnx.scan does not know how often to run\n"
    "  got: in_axes=(nnx.Carry,), and no length\n"
    "  fix: map an argument over an axis, or pass length="
  )


def test_message_of_filters():
  assert message(FilterError, lambda: nnx.jit(lambda m: nnx.split(m, nnx.Param)[0])(Net())) == (
    "the filters do not cover everything\n"
    "  got: nothing matches .count\n"
    "  fix: add a filter, or `...` as the last one for all the rest"
  )
  assert message(FilterError, lambda: nnx.grad(lambda m: 0.0, wrt=3)(Net())) == (
    "this is not a filter\n"
    "  got: int (3)\n"
    "  fix: use a Variable type, a tag as a string, `...`, a predicate(path, value), a tuple of "
    "filters, or nnx.OfType/PathContains/PathIn/WithTag/Any/All/Not"
  )
  axes = nnx.StateAxes({nnx.Param: 0})
  assert message(FilterError, lambda: nnx.vmap(lambda m: None, in_axes=(axes,))(Net())) == (
    "the filters do not cover everything\n"
    "  got: nothing matches .count\n"
    "  fix: add a filter, or `...` as the last one for all the rest"
  )


def test_message_of_a_missing_random_stream():
  assert message(MissingRngError, lambda: nnx.jit(lambda r: r.dropout())(nnx.Rngs(params=0))) == (
    "no random stream 'dropout'\n"
    "  got: Rngs with the streams params\n"
    "  fix: nnx.Rngs(0) for a default stream, or nnx.Rngs(dropout=0)"
  )
  assert message(MissingRngError, lambda: nnx.jit(nnx.Dropout(0.5))(X)) == (
    "Dropout needs random numbers\n"
    "  got: no rngs, neither when it was built nor when it was called\n"
    "  fix: build it with rngs=nnx.Rngs(dropout=0), call it with rngs=, or model.eval()"
  )


def grown(net):
  net.extra = nnx.Variable(1.0)
  return net


def replaced(net):
  net.count = nnx.Variable(jnp.zeros(3, jnp.int32))
  return net


def counting(net):
  net.steps += 1
  return net


def swapped(net):
  net.count, net.other = net.other, net.count
  return net


CARRIES = {
  "structure": (lambda x: (x, x), 1.0, "", "PyTreeDef((*, *))", "one value"),
  "shape": (lambda x: x[None], X, "", "float32[1,2]", "float32[2]"),
  "dtype": (lambda x: x > 0, X, "", "bool[2]", "float32[2]"),
  "attribute": (grown, Net, "", ".extra", "nothing at .extra"),
  "variable": (replaced, Net, ".count", "int32[3]", "int32[]"),
  "static": (counting, lambda: Net(steps=0), "", ".steps 1", ".steps 0"),
  "swap": (
    swapped,
    lambda: Net(other=nnx.Variable(1)),
    "",
    "another Variable in its place",
    "Net.count  (Variable, created at test_errors.py:N)",
  ),
}


@pytest.mark.parametrize("name", CARRIES)
def test_message_of_a_carry_that_changes(name):
  f, start, at, got, had = CARRIES[name]
  start = start() if callable(start) else start
  run = lambda: nnx.fori_loop(0, 2, lambda i, x: f(x), start)
  assert message(TreeMismatchError, run) == (
    "the body of nnx.fori_loop must return a carry like the one that it got\n"
    + (f"  at:  {at}\n" if at else "")
    + f"  got: {got}, the carry that it got has {had}\n"
    "  fix: return the same structure, shapes and dtypes; change state through its Variables"
  )


def void(_):
  return None


BRANCHES = {
  "structure": (lambda n: (X, X), lambda n: X, "the result", "one value", "PyTreeDef((*, *))"),
  "shape": (lambda n: X, lambda n: X[:1], "the result", "(float32[1])", "(float32[2])"),
  "none": (lambda n: X, lambda n: None, "the result", "(None)", "(float32[2])"),
  "attribute": (lambda n: void(grown(n)), void, "operand 0", "nothing at .extra", ".extra"),
  "static": (lambda n: void(counting(n)), void, "operand 0", ".steps 0", ".steps 1"),
  "new": (
    lambda n: n.count,
    lambda n: nnx.Variable(0),
    "the result",
    "1 new arrays or Variables",
    "0 new arrays or Variables",
  ),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_message_of_branches_that_differ(name):
  f, g, at, got, first = BRANCHES[name]
  assert message(TreeMismatchError, lambda: nnx.cond(True, f, g, Net(steps=0))) == (
    "all branches must return the same structure, and change their arguments in the same way\n"
    f"  at:  {at} of branch 1\n"
    f"  got: {got}, and {first} from branch 0\n"
    "  fix: return values of the same structure, shapes and dtypes from each branch; "
    "add attributes in all branches or before"
  )


def test_message_of_a_condition_that_writes_or_returns_no_boolean():
  def count(net):
    net.count[...] += 1
    return net.count < 3

  assert message(TreeMismatchError, lambda: nnx.while_loop(count, lambda n: n, Net())) == (
    "the condition of nnx.while_loop must not write state\n"
    "  got: a condition that writes a Variable\n"
    "  fix: write it in the body"
  )
  assert message(TreeMismatchError, lambda: nnx.while_loop(lambda x: (x, x), lambda x: x, 1)) == (
    "the condition of nnx.while_loop must return one boolean\n"
    "  got: PyTreeDef((*, *))\n"
    "  fix: return a scalar such as x < 3"
  )


def traced_remat(f):
  return lambda: nnx.grad(lambda x: (nnx.remat(f)(), x)[1])(1.0)


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit, traced_remat, jax.checkpoint, nnx.eval_shape])
def test_message_of_a_write_to_a_lojax_variable_by_closure(jit):
  net = Net(last=nnx.Variable(0.0, is_hijax=False))
  f = lambda: net.last.set_value(1.0)
  run = (lambda: jit(f)) if jit is nnx.eval_shape else jit(f)
  assert message(TraceContextError, run) == (
    "a lojax Variable from outside a transform cannot be written inside it\n"
    "  at:  Net.last  (Variable, created at test_errors.py:N)\n"
    "  got: a write from another trace than the one where the Variable was made\n"
    "  fix: pass it as an argument and return it, or use a hijax Variable (nnx.to_hijax)"
  )
  assert float(net.last) == 0.0


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit, traced_remat, jax.checkpoint, nnx.eval_shape])
def test_message_of_an_attribute_set_by_closure(jit):
  net = Net()

  def f():
    net.linear.cache = jnp.zeros(2) * 1

  run = (lambda: jit(f)) if jit is nnx.eval_shape else jit(f)
  assert message(TraceContextError, run) == (
    "an object from outside a transform cannot change its structure inside it\n"
    "  at:  Linear.cache\n"
    "  got: an attribute set from another trace than the one where the object was made\n"
    "  fix: keep what changes in a Variable and write that (self.count[...] = x), or pass the "
    "object as an argument, by a transform of Refax (nnx.jit, nnx.grad, nnx.scan, ...)"
  )
  assert not hasattr(net.linear, "cache")


def test_message_of_a_result_that_differs_and_has_no_axis():
  run = lambda: nnx.vmap(lambda x: {"a": (1.0, x)}, out_axes=None)(X)
  assert message(TreeMismatchError, run) == (
    "a result differs along the mapped axis, and out_axes has no axis for it\n"
    "  at:  .a[1]\n"
    "  got: out_axes=None\n"
    "  fix: give it an axis in out_axes, or reduce it inside the function"
  )


def test_message_of_an_unknown_reduction():
  run = lambda: nnx.vmap(lambda x: x, reduce={...: "median"})(X)
  assert message(ValueError, run) == (
    "nnx.vmap cannot work with this reduce\n"
    "  got: reduce='median'\n"
    '  fix: pass one of "mean", "sum", "first", "split"'
  )


def test_message_of_axes_that_do_not_fit():
  fix = "  fix: give an int, None, nnx.StateAxes, or a tuple with one of these for each argument"
  vmap = lambda axes, *args: message(
    TreeMismatchError, lambda: nnx.vmap(lambda *a: a[0], in_axes=axes)(*args)
  )
  assert vmap((0, 0), X) == f"in_axes do not fit\n  got: 2 axes for 1 positional arguments\n{fix}"
  assert vmap((nnx.Carry,), X) == f"in_axes of nnx.vmap do not fit\n  got: (nnx.Carry,)\n{fix}"
  assert vmap(1, X) == (
    f"in_axes of nnx.vmap do not fit\n  at:  [0]\n  got: axis 1 of an array (2,)\n{fix}"
  )
  v = nnx.Variable(X)
  assert vmap((0, None), v, v) == (
    "in_axes do not fit\n"
    "  at:  (a Variable outside any Module)  (Variable, created at test_errors.py:N)\n"
    f"  got: the same Variable with axis 0 and with axis None\n{fix}"
  )
  assert vmap(None, X) == (
    "nnx.vmap does not know how often to run\n"
    "  got: in_axes=None, and no axis_size\n"
    "  fix: map an argument over an axis, or pass axis_size="
  )
