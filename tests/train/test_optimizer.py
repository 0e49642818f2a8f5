"""Optimizer equals optax by hand, and writes all or nothing."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx
from refax.errors import ShapeMismatchError, TreeMismatchError


class Net(nnx.Module):
  """Two layers, a statistic, and a tied weight if asked for."""

  def __init__(self, tied=False, dtype=jnp.float32):
    self.a = nnx.Linear(3, 3, rngs=nnx.Rngs(0), param_dtype=dtype)
    self.b = nnx.Linear(3, 3, rngs=nnx.Rngs(1), param_dtype=dtype)
    self.scale = nnx.Param(jnp.ones((), dtype), tag="scale")
    self.stat = nnx.BatchStat(0.0)
    if tied:
      self.b.kernel = self.a.kernel

  def __call__(self, x):
    self.stat[...] = x.mean()
    return self.scale * self.b(jnp.tanh(self.a(x)))


X = jnp.linspace(-1, 2, 12).reshape(4, 3)
Y = jnp.cos(X)


def loss(net, scale=1.0):
  return scale * ((net(X) - Y) ** 2).mean()


def arrays(net, wrt=nnx.Param):
  return nnx.to_pure_dict(nnx.state(net, wrt))


def by_hand(net, tx, steps, wrt=nnx.Param, params=None, extra=lambda value: {}):
  """The same training with optax alone, on a dict of arrays."""
  graphdef, selected, rest = nnx.split(nnx.to_lojax(net), wrt, ...)
  params = nnx.to_pure_dict(selected)
  state = tx.init(params)

  def value(params):
    twin = nnx.merge(graphdef, selected.map(lambda path, v: v.copy(_at(params, path))), rest)
    return loss(twin)

  @jax.jit
  def step(params, state):
    current, grads = jax.value_and_grad(value)(params)
    updates, state = tx.update(grads, state, params, **extra(current))
    return optax.apply_updates(params, updates), state

  for _ in range(steps):
    params, state = step(params, state)
  return params, state


def _at(tree, path):
  for key in path:
    tree = tree[key]
  return tree


def kernels_only(params):
  return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in str(path), params)


SCHEDULE = optax.cosine_decay_schedule(0.1, 5)
TRANSFORMATIONS = {
  "sgd": lambda: optax.sgd(0.1),
  "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
  "adam": lambda: optax.adam(1e-2),
  "adamw with schedule": lambda: optax.adamw(SCHEDULE, weight_decay=0.1),
  "adamw with mask": lambda: optax.adamw(1e-2, weight_decay=0.1, mask=kernels_only),
  "masked": lambda: optax.masked(optax.adam(1e-2), kernels_only),
  "chain": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.rmsprop(1e-2)),
  "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2),
  "MultiSteps transformation": lambda: optax.MultiSteps(
    optax.adam(1e-2), every_k_schedule=2
  ).gradient_transformation(),
  "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=SCHEDULE),
  "partition": lambda: optax.partition(
    {True: optax.adam(1e-2), False: optax.sgd(1e-2)}, kernels_only
  ),
  "lion": lambda: optax.lion(1e-3),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_training_under_plain_jit_equals_optax_by_hand(name):
  tx = TRANSFORMATIONS[name]()
  net = Net()
  want, want_state = by_hand(net, tx, 5)
  optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)

  @jax.jit
  def step(net, optimizer):
    value, grads = nnx.value_and_grad(loss)(net)
    optimizer.update(net, grads)
    return value

  for _ in range(5):
    step(net, optimizer)
  assert_close(arrays(net), want)
  got = jax.tree.leaves(nnx.to_lojax(optimizer.opt_state))
  for a, b in zip(got, jax.tree.leaves(want_state), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert a.dtype == b.dtype
  assert int(optimizer.step) == 5 and float(net.stat) == pytest.approx(float(X.mean()))


def assert_close(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


RUNS = {
  "eager": lambda f: f,
  "jax.jit": jax.jit,
  "nnx.jit": nnx.jit,
  "checkpoint": lambda f: jax.jit(jax.checkpoint(f)),
}


@pytest.mark.parametrize(
  ("name", "hijax"), [*((name, True) for name in RUNS), ("eager", False), ("nnx.jit", False)]
)
def test_every_way_to_run_a_step_gives_the_same(name, hijax):
  net = Net()
  want, _ = by_hand(net, optax.adam(1e-2), 3)
  optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)
  if not hijax:
    net, optimizer = nnx.to_lojax((net, optimizer))
  step = RUNS[name](lambda net, optimizer: optimizer.update(net, nnx.grad(loss)(net)) and None)
  for _ in range(3):
    step(net, optimizer)
  assert_close(arrays(net), want)


def test_a_scan_over_steps_equals_a_loop():
  net = Net()
  want, _ = by_hand(net, optax.adam(1e-2), 4)
  optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)

  @jax.jit
  def train(net, optimizer):
    def body(carry, _):
      optimizer.update(net, nnx.grad(loss)(net))
      return carry, None

    jax.lax.scan(body, None, None, length=4)

  train(net, optimizer)
  assert_close(arrays(net), want)
  assert int(optimizer.step) == 4


def test_tied_weights_are_one_parameter():
  net = Net(tied=True)
  assert [p for p, _ in nnx.to_flat_state(nnx.state(net, nnx.Param))].count(("a", "kernel")) == 1
  want, _ = by_hand(net, optax.adam(1e-2), 3)
  optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)
  step = jax.jit(lambda net, optimizer: optimizer.update(net, nnx.grad(loss)(net)) and None)
  for _ in range(3):
    step(net, optimizer)
  assert net.a.kernel is net.b.kernel
  assert_close(arrays(net), want)


WRT = {
  "type": nnx.Param,
  "tag": "scale",
  "path": nnx.PathContains("a"),
  "tuple": ("scale", nnx.PathContains("b")),
  "list": ["scale", nnx.PathContains("b")],
  "all": nnx.All(nnx.Param, nnx.Not("scale")),
}


@pytest.mark.parametrize("name", WRT)
def test_wrt_selects_what_is_updated(name):
  wrt = WRT[name]
  net = Net()
  before = arrays(net, ...)
  want, _ = by_hand(net, optax.sgd(0.1), 2, wrt)
  optimizer = nnx.Optimizer(net, optax.sgd(0.1), wrt=wrt)
  step = jax.jit(lambda n, o: o.update(n, nnx.grad(loss, wrt=wrt)(n)) and None)
  for _ in range(2):
    step(net, optimizer)
  assert_close(arrays(net, wrt), want)
  selected = set(nnx.to_flat_state(nnx.state(net, wrt)).paths)
  for path, v in nnx.to_flat_state(nnx.state(net)):
    if path != ("stat",):
      changed = bool((v[...] != _at(before, path)).any())
      assert changed is (path in selected), path


def test_gradients_of_more_than_the_parameters_are_refused_and_may_be_filtered():
  net = Net()
  optimizer = nnx.Optimizer(net, optax.sgd(0.1), wrt="scale")
  kernel, grads = net.a.kernel[...], nnx.grad(loss)(net)
  with pytest.raises(TreeMismatchError, match=r"a gradient without a parameter(.|\n)*filter_state"):
    optimizer.update(net, grads)
  assert float(net.scale) == 1.0 and int(optimizer.step) == 0
  optimizer.update(net, nnx.filter_state(grads, "scale"))
  assert float(net.scale) != 1.0
  np.testing.assert_array_equal(net.a.kernel, kernel)


@pytest.mark.parametrize(
  "form",
  [
    lambda g: g,
    nnx.to_pure_dict,
    lambda g: jax.tree.map(lambda x: x, g),
    lambda g: g.map(lambda _, v: v[...]),
    lambda g: g.map(lambda _, v: np.asarray(v[...])),
  ],
  ids=["state", "pure dict", "mapped", "arrays", "numpy"],
)
def test_gradients_may_be_a_state_or_dicts_of_variables_or_arrays(form):
  net = Net()
  want, _ = by_hand(net, optax.sgd(0.1), 1)
  optimizer = nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)
  updates = optimizer.update(net, form(nnx.grad(loss)(net)))
  assert_close(arrays(net), want)
  assert isinstance(updates, nnx.State) and updates["a"]["kernel"].shape == (3, 3)


def test_gradients_of_a_plain_jax_grad_over_a_functional_model_are_taken():
  net = Net()
  want, _ = by_hand(net, optax.sgd(0.1), 1)
  optimizer = nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)
  grads = jax.grad(loss)(nnx.to_lojax(net))
  optimizer.update(net, grads)
  assert_close(arrays(net), want)


# errors
def without(grads, *path):
  """The gradients without one path."""
  return nnx.from_flat_state([(p, g) for p, g in nnx.to_flat_state(grads) if p != path])


WRONG = {
  "missing": (
    lambda g: without(g, "a", "bias"), TreeMismatchError,
    "the gradients do not have the structure of the parameters\n"
    "  at:  .a.bias\n"
    "  got: no gradient for float32[3]\n"
    "  fix: compute them with nnx.grad(..., wrt=) and the filter the Optimizer was built with; for "
    "one of several optimizers: update(model, nnx.filter_state(grads, filter))",
  ),
  "shape": (
    lambda g: nnx.merge_state(g, nnx.State({"a": {"bias": jnp.ones(7)}})), TreeMismatchError,
    "the gradients do not have the structure of the parameters\n"
    "  at:  .a.bias\n"
    "  got: a gradient float32[7] for a parameter float32[3]\n"
    "  fix: compute them with nnx.grad(..., wrt=) and the filter the Optimizer was built with; for "
    "one of several optimizers: update(model, nnx.filter_state(grads, filter))",
  ),
  "more": (
    lambda g: nnx.merge_state(g, nnx.State({"new": jnp.ones(7)})), TreeMismatchError,
    "the gradients do not have the structure of the parameters\n"
    "  at:  .new\n"
    "  got: a gradient without a parameter\n"
    "  fix: compute them with nnx.grad(..., wrt=) and the filter the Optimizer was built with; for "
    "one of several optimizers: update(model, nnx.filter_state(grads, filter))",
  ),
}  # fmt: skip


def everything(net, optimizer):
  return [np.asarray(x) for x in jax.tree.leaves(nnx.to_lojax((net, optimizer)))]


def per_example(net):
  """The gradients of three examples."""
  return nnx.vmap(lambda net, s: nnx.grad(lambda n: s * loss(n))(net), in_axes=(None, 0))(
    net, jnp.arange(1.0, 4.0)
  )


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_a_transformation_may_take_a_gradient_for_each_example(jit):
  private = optax.contrib.differentially_private_aggregate(0.5, 0.0, 0)
  tx = optax.chain(private, optax.sgd(0.1, momentum=0.9))
  net = Net()
  optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
  params = nnx.pure(nnx.state(net, nnx.Param))
  state = tx.init(params)
  update = lambda net, optimizer: optimizer.update(net, per_example(net)) and None
  for _ in range(3):
    updates, state = tx.update(nnx.pure(per_example(net)), state, params)
    params = optax.apply_updates(params, updates)
    (nnx.jit(update) if jit else update)(net, optimizer)
    got = nnx.pure(nnx.state(net, nnx.Param))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, params)


def test_gradients_of_batches_of_several_sizes_are_refused():
  net = Net()
  mean = optax.stateless(lambda grads, _: jax.tree.map(lambda g: g.mean(0), grads))
  optimizer = nnx.Optimizer(net, optax.chain(mean, optax.sgd(0.1)), wrt=nnx.Param)
  grads = per_example(net)
  optimizer.update(net, grads)
  before = everything(net, optimizer)
  grads["a"]["bias"] = nnx.pure(grads)["a"]["bias"][:2]
  with pytest.raises(TreeMismatchError, match="structure of the parameters"):
    optimizer.update(net, grads)
  for a, b in zip(everything(net, optimizer), before, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("tx", [optax.sgd(0.1), optax.adam(0.1)], ids=["sgd", "adam"])
def test_gradients_of_examples_are_refused_if_nothing_sums_them_up(tx):
  net = Net()
  optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
  grads = per_example(net)
  before = everything(net, optimizer)
  with pytest.raises(TreeMismatchError, match=r"a gradient float32\[3,3\] for a parameter float32"):
    optimizer.update(net, grads)
  for a, b in zip(everything(net, optimizer), before, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_gradients_are_refused_and_nothing_is_written(name, jit):
  spoil, kind, message = WRONG[name]
  net = Net()
  optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)
  grads = spoil(nnx.grad(loss)(net))
  before = everything(net, optimizer)
  update = lambda net, optimizer, grads: optimizer.update(net, grads) and None
  with pytest.raises(kind) as error:
    (jax.jit(update) if jit else update)(net, optimizer, grads)
  assert error.value.args[0] == message
  for a, b in zip(everything(net, optimizer), before, strict=True):
    np.testing.assert_array_equal(a, b)


def test_an_update_that_changes_a_dtype_is_refused_and_nothing_is_written():
  def update(updates, state, params=None):
    return updates, {"n": state["n"] + 0.5}

  tx = optax.GradientTransformation(lambda params: {"n": jnp.zeros((), jnp.int32)}, update)
  net = Net()
  optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
  grads = nnx.grad(loss)(net)
  before = everything(net, optimizer)
  with pytest.raises(ShapeMismatchError, match=r"float32\[\], the Variable holds int32\[\]"):
    optimizer.update(net, grads)
  for a, b in zip(everything(net, optimizer), before, strict=True):
    np.testing.assert_array_equal(a, b)


# state
def test_the_state_is_variables_that_may_be_read_and_set():
  net = Net()
  tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
  optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
  rate = optimizer.opt_state.hyperparams["learning_rate"]
  assert isinstance(rate, nnx.OptState) and float(rate) == pytest.approx(0.1)
  rate[...] = 0.0
  before = arrays(net)
  step = jax.jit(lambda net, optimizer: optimizer.update(net, nnx.grad(loss)(net)) and None)
  step(net, optimizer)
  assert_close(arrays(net), before)
  rate[...] = 0.5
  step(net, optimizer)
  assert bool((net.scale != 1.0).any()) and int(optimizer.step) == 2
  assert optimizer.step.dtype == jnp.uint32


def test_values_for_transformations_that_take_more_are_passed():
  seen = []

  def update(updates, state, params=None, *, value, **_):
    seen.append(value)
    return jax.tree.map(lambda g: -value * g, updates), state

  tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
  net = Net()
  want, _ = by_hand(net, tx, 1, extra=lambda value: {"value": value})
  optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
  value, grads = nnx.value_and_grad(loss)(net)
  optimizer.update(net, grads, value=nnx.Variable(value))
  assert isinstance(seen[-1], jax.Array)
  assert_close(arrays(net), want)


def test_bfloat16_parameters_stay_bfloat16():
  net = Net(dtype=jnp.bfloat16)
  optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)
  step = jax.jit(lambda net, optimizer: optimizer.update(net, nnx.grad(loss)(net)) and None)
  step(net, optimizer)
  step(net, optimizer)
  assert net.a.kernel.dtype == jnp.bfloat16 and int(optimizer.step) == 2


def test_an_optimizer_is_traced_once():
  net, traces = Net(), []
  optimizer = nnx.Optimizer(net, optax.adamw(SCHEDULE), wrt=nnx.Param)

  @jax.jit
  def step(net, optimizer):
    traces.append(1)
    optimizer.update(net, nnx.grad(loss)(net))

  for _ in range(3):
    step(net, optimizer)
  assert len(traces) == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, nnx.clone], ids=["deepcopy", "clone"])
def test_a_copy_trains_on_its_own(duplicate):
  net = Net()
  optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)
  update = lambda net, optimizer: optimizer.update(net, nnx.grad(loss)(net)) and None
  update(net, optimizer)
  twin, twin_optimizer = duplicate((net, optimizer))
  before = everything(net, optimizer)
  assert jax.tree.structure(twin_optimizer) == jax.tree.structure(optimizer)
  update(twin, twin_optimizer)
  for a, b in zip(everything(net, optimizer), before, strict=True):
    np.testing.assert_array_equal(a, b)
  update(net, optimizer)
  assert_close(arrays(twin), arrays(net))


def test_the_state_of_an_optimizer_is_saved_and_restored():
  net = Net()
  optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)
  update = lambda net, optimizer: optimizer.update(net, nnx.grad(loss)(net)) and None
  update(net, optimizer)
  saved = pickle.loads(pickle.dumps(nnx.to_pure_dict(nnx.state((net, optimizer)))))
  other = Net()
  resumed = nnx.Optimizer(other, optax.adam(1e-2), wrt=nnx.Param)
  nnx.update((other, resumed), saved)
  update(net, optimizer)
  update(other, resumed)
  assert_close(arrays(other), arrays(net))
  assert int(resumed.step) == 2


@pytest.mark.parametrize("jit", [None, jax.jit, nnx.jit], ids=["eager", "jax.jit", "nnx.jit"])
def test_swapped_arguments_are_refused(jit):
  net = Net()
  optimizer = nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)
  before = arrays(net)

  def swapped(net, optimizer):
    optimizer.update(nnx.grad(loss)(net), net)

  def of_states(net, optimizer):
    optimizer.update(nnx.grad(loss)(net), nnx.state(net, nnx.Param))

  def mapped(net, optimizer):
    optimizer.update(jax.tree.map(jnp.negative, nnx.grad(loss)(net)), nnx.state(net, nnx.Param))

  for f in (swapped, of_states, mapped):
    with pytest.raises(
      TreeMismatchError, match=r"model first(.|\n)*fix: write optimizer\.update\(model"
    ):
      (jit(f) if jit else f)(net, optimizer)
  assert_close(arrays(net), before)
  assert int(optimizer.step) == 0


def test_swapped_states_of_a_functional_program_are_refused():
  with nnx.use_hijax(False):
    net = Net()
    optimizer = nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)
    params = nnx.state(net, nnx.Param)
    with pytest.raises(TreeMismatchError, match="model first"):
      optimizer.update(nnx.grad(loss)(net), params)
    optimizer.update(params, nnx.grad(loss)(net))
    assert int(optimizer.step) == 1


@pytest.mark.parametrize("tx", [1e-3, "adam", optax.adam, None])
def test_what_is_no_transformation_is_refused(tx):
  with pytest.raises(
    ValueError, match=r"Optimizer cannot work with this tx(.|\n)*optax\.adam\(1e-3\)"
  ):
    nnx.Optimizer(Net(), tx, wrt=nnx.Param)
