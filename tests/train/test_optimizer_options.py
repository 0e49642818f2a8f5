"""Optimizer's options: hyper-parameters that are set, steps that are skipped, parts of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import _jax, nnx
from refax.errors import (
  InvalidArgumentError,
  MissingArgumentError,
  MissingHyperparamError,
  ShapeMismatchError,
  TreeMismatchError,
)


class Net(nnx.Module):
  """Two layers and a scale."""

  def __init__(self, dtype=jnp.float32):
    self.a = nnx.Linear(3, 3, rngs=nnx.Rngs(0), param_dtype=dtype)
    self.b = nnx.Linear(3, 3, rngs=nnx.Rngs(1), param_dtype=dtype)
    self.scale = nnx.Param(jnp.ones((), dtype), tag="scale")

  def __call__(self, x):
    return self.scale * self.b(jnp.tanh(self.a(x)))


X = jnp.linspace(-1, 2, 12).reshape(4, 3)
Y = jnp.cos(X)


def loss(net, factor=1.0):
  return factor * ((net(X) - Y) ** 2).mean()


def arrays(tree):
  bits = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return [np.asarray(bits(x)) for x in jax.tree.leaves(nnx.to_lojax(tree))]


def assert_same(got, want):
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)
    assert a.dtype == b.dtype


def assert_close(got, want, rtol=1e-5):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


def step(net, optimizer, factor=1.0):
  optimizer.update(net, nnx.grad(loss)(net, factor))


RUNS = {"eager": lambda f: f, "jax.jit": jax.jit, "nnx.jit": nnx.jit}


# hyper-parameters
@pytest.mark.parametrize("run", RUNS)
def test_hyperparams_are_read_and_set_between_steps(run):
  rates, net, traces = [0.1, 0.1, 0.01], Net(), []
  optimizer = nnx.Optimizer(net, optax.inject_hyperparams(optax.sgd)(rates[0]), wrt=nnx.Param)
  twin = Net()
  assert list(optimizer.hyperparams) == ["learning_rate"]

  def traced(net, optimizer):
    traces.append(1)
    step(net, optimizer)

  compiled = RUNS[run](traced)
  for rate in rates:
    optimizer.hyperparams["learning_rate"] = rate
    compiled(net, optimizer)
    step(twin, nnx.Optimizer(twin, optax.sgd(rate), wrt=nnx.Param))
  assert float(optimizer.hyperparams["learning_rate"]) == pytest.approx(0.01)
  assert optimizer.hyperparams["learning_rate"] is optimizer.opt_state.hyperparams["learning_rate"]
  assert_close(arrays(net), arrays(twin))
  assert len(traces) == (3 if run == "eager" else 1)


def test_a_hyperparam_is_set_inside_jit():
  net = Net()
  tx = optax.inject_hyperparams(optax.sgd)(0.1)
  optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
  before = arrays(net)

  @jax.jit
  def warm(net, optimizer, rate):
    optimizer.hyperparams["learning_rate"] = rate
    step(net, optimizer)

  warm(net, optimizer, 0.0)
  assert_same(arrays(net), before)
  warm(net, optimizer, 0.5)
  assert float(optimizer.hyperparams["learning_rate"]) == 0.5
  assert not np.array_equal(arrays(net)[0], before[0])


def test_hyperparams_are_found_in_chains_and_parts():
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.inject_hyperparams(optax.scale_by_adam)(b1=0.8, b2=0.9),
    optax.masked(
      optax.inject_hyperparams(optax.add_decayed_weights)(weight_decay=0.1),
      lambda params: jax.tree.map(lambda p: p.ndim == 2, params),
    ),
    optax.scale_by_learning_rate(0.1),
  )
  optimizer = nnx.Optimizer(Net(), tx, wrt=nnx.Param)
  assert {"b1", "b2", "weight_decay"} <= set(optimizer.hyperparams)
  assert float(optimizer.hyperparams["b2"]) == pytest.approx(0.9)
  assert "Hyperparams(" in repr(optimizer.hyperparams)
  optimizer.hyperparams.update(b1=0.5, weight_decay=0.0)
  assert float(optimizer.opt_state[1].hyperparams["b1"]) == 0.5
  assert float(optimizer.hyperparams["weight_decay"]) == 0.0
  parts = optax.partition(
    {"a": optax.inject_hyperparams(optax.sgd)(0.1), "b": optax.inject_hyperparams(optax.sgd)(0.2)},
    lambda params: jax.tree.map(lambda p: "ab"[p.ndim == 2], params),
  )
  optimizer = nnx.Optimizer(Net(), parts, wrt=nnx.Param)
  with pytest.raises(MissingHyperparamError) as error:
    optimizer.hyperparams["learning_rate"] = 0.1
  assert error.value.args[0] == (
    "several transformations have a hyper-parameter 'learning_rate'\n"
    "  got: optimizer.hyperparams['learning_rate'] with 2 of that name\n"
    "  fix: read and write their Variables in optimizer.opt_state"
  )


def test_hyperparams_in_MultiSteps_are_found():
  inner = optax.inject_hyperparams(optax.sgd)(0.1)
  optimizer = nnx.Optimizer(Net(), optax.MultiSteps(inner, 2), wrt=nnx.Param)
  assert list(optimizer.hyperparams) == ["learning_rate"]


def test_a_hyperparam_that_does_not_exist_is_named():
  optimizer = nnx.Optimizer(Net(), optax.inject_hyperparams(optax.adam)(0.1), wrt=nnx.Param)
  with pytest.raises(MissingHyperparamError) as error:
    optimizer.hyperparams["rate"]
  assert "no hyper-parameter 'rate'\n  got: an Optimizer with " in str(error.value)
  assert "learning_rate" in str(error.value)
  assert "rate" not in optimizer.hyperparams and optimizer.hyperparams.get("rate") is None
  with pytest.raises(MissingHyperparamError, match="an Optimizer with none in its state"):
    nnx.Optimizer(Net(), optax.adam(0.1), wrt=nnx.Param).hyperparams["learning_rate"] = 0.1
  with pytest.raises(TypeError, match="cannot be deleted"):
    del optimizer.hyperparams["learning_rate"]


def test_a_hyperparam_of_a_schedule_is_read_and_not_set():
  schedule = optax.linear_schedule(0.4, 0.0, 4)
  net = Net()
  optimizer = nnx.Optimizer(net, optax.inject_hyperparams(optax.sgd)(schedule), wrt=nnx.Param)
  rates = []
  for _ in range(3):
    jax.jit(step)(net, optimizer)
    rates.append(float(optimizer.hyperparams["learning_rate"]))
  np.testing.assert_allclose(rates, [0.4, 0.3, 0.2], rtol=1e-6)
  with pytest.raises(InvalidArgumentError, match="a schedule sets it anew at each update"):
    optimizer.hyperparams["learning_rate"] = 0.1


def test_a_hyperparam_keeps_its_shape_and_dtype():
  optimizer = nnx.Optimizer(Net(), optax.inject_hyperparams(optax.sgd)(0.1), wrt=nnx.Param)
  with pytest.raises(ShapeMismatchError, match="keeps its shape and dtype"):
    optimizer.hyperparams["learning_rate"] = jnp.ones(3)
  assert float(optimizer.hyperparams["learning_rate"]) == pytest.approx(0.1)


# gradients that are not finite
TRANSFORMATIONS = {
  "adam": lambda: optax.adam(1e-2),
  "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
  "noise": lambda: optax.chain(optax.add_noise(0.01, 0.5, 0), optax.sgd(0.1)),
  "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(
    optax.linear_schedule(0.1, 0.0, 9)
  ),
}


@pytest.mark.parametrize(
  ("name", "run"),
  [*((name, "jax.jit") for name in TRANSFORMATIONS), ("adam", "eager"), ("adam", "nnx.jit")],
)
def test_a_step_with_gradients_that_are_not_finite_changes_nothing(name, run):
  net, twin = Net(), Net()
  optimizer = nnx.Optimizer(net, TRANSFORMATIONS[name](), wrt=nnx.Param, skip_nonfinite=True)
  plain = nnx.Optimizer(twin, TRANSFORMATIONS[name](), wrt=nnx.Param)
  compiled = RUNS[run](step)
  for factor in (1.0, jnp.nan, 1.0, jnp.inf, -jnp.inf, 1.0):
    before = arrays((net, optimizer.opt_state, optimizer.step))
    compiled(net, optimizer, factor)
    if factor == 1.0:
      compiled(twin, plain, factor)
    else:
      assert_same(arrays((net, optimizer.opt_state, optimizer.step)), before)
  assert int(optimizer.skipped) == 3 and int(optimizer.step) == 3
  assert_close(arrays((net, optimizer.opt_state)), arrays((twin, plain.opt_state)))


@pytest.mark.parametrize("place", range(5))
def test_one_number_that_is_not_finite_is_enough(place):
  net = Net()
  optimizer = nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param, skip_nonfinite=True)
  grads = nnx.grad(loss)(net)
  path, v = nnx.to_flat_state(grads)[place]
  v[...] = v[...].at[(-1,) * v.ndim].set(-jnp.inf)
  before = arrays(net)
  updates = optimizer.update(net, grads)
  assert_same(arrays(net), before)
  assert all(not x.any() for x in jax.tree.leaves(updates)), path


def test_without_the_option_they_are_used():
  net = Net()
  optimizer = nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)
  assert optimizer.skipped is None
  assert len(jax.tree.leaves(optimizer)) == 1
  step(net, optimizer, jnp.nan)
  assert np.isnan(net.scale) and int(optimizer.step) == 1


def test_gradients_that_are_not_of_the_parameters_do_not_count():
  net = Net()
  optimizer = nnx.Optimizer(net, optax.sgd(0.1), wrt="scale", skip_nonfinite=True)
  grads = nnx.grad(loss)(net)
  grads["a"]["kernel"][...] = jnp.nan
  optimizer.update(net, nnx.filter_state(grads, "scale"))
  assert int(optimizer.step) == 1 and int(optimizer.skipped) == 0


def test_skipping_refuses_a_state_of_another_dtype():
  def update(updates, state, params=None):
    return updates, {"n": state["n"] + 0.5}

  tx = optax.GradientTransformation(lambda params: {"n": jnp.zeros((), jnp.int32)}, update)
  net = Net()
  optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param, skip_nonfinite=True)
  before = arrays((net, optimizer))
  with pytest.raises(ShapeMismatchError, match=r"float32\[\], the Variable holds int32\[\]"):
    step(net, optimizer)
  assert_same(arrays((net, optimizer)), before)


@pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
def test_skipping_in_a_scan_and_with_lojax_variables(hijax):
  net = Net()
  optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param, skip_nonfinite=True)
  factors = jnp.array([1.0, jnp.nan, 1.0])
  if hijax:
    run = lambda n, o: jax.lax.scan(lambda c, f: (c, step(n, o, f)), None, factors)[1]
    jax.jit(run)(net, optimizer)
  else:
    net, optimizer = nnx.to_lojax((net, optimizer))
    for factor in factors:
      nnx.jit(step)(net, optimizer, factor)
  twin = Net()
  plain = nnx.Optimizer(twin, optax.adam(1e-2), wrt=nnx.Param)
  for _ in range(2):
    step(twin, plain)
  assert_close(arrays(net), arrays(twin))
  assert int(optimizer.skipped) == 1


def test_all_finite_looks_at_every_number():
  assert bool(nnx.all_finite({}))
  assert bool(nnx.all_finite((jnp.arange(3), nnx.Param(jnp.ones(2)), 1.0)))
  assert not bool(jax.jit(nnx.all_finite)(nnx.State({"a": nnx.Param(jnp.array([1, jnp.inf]))})))
  assert not bool(nnx.all_finite(jnp.array([1.0, jnp.nan], jnp.float16)))


# several optimizers
def test_several_optimizers_on_parts_of_one_model():
  net, twin = Net(), Net()
  parts = {"a": nnx.PathContains("a"), "rest": nnx.Not(nnx.PathContains("a"))}
  transformations = {"a": optax.adam(1e-2), "rest": optax.sgd(0.1, momentum=0.9)}
  optimizers = nnx.Dict(
    {name: nnx.Optimizer(net, transformations[name], wrt=parts[name]) for name in parts}
  )

  @jax.jit
  def train(net, optimizers):
    grads = nnx.grad(loss)(net)
    for optimizer in optimizers.values():
      optimizer.update(net, nnx.filter_state(grads, optimizer.wrt))

  label = lambda path, _: "a" if path[0].key == "a" else "rest"
  labels = lambda params: jax.tree_util.tree_map_with_path(label, params)
  whole = nnx.Optimizer(twin, optax.partition(transformations, labels), wrt=nnx.Param)
  for _ in range(4):
    train(net, optimizers)
    jax.jit(step)(twin, whole)
  assert_close(arrays(net), arrays(twin))


# transformations that take or keep more
def test_reduce_on_plateau_sees_the_loss():
  net = Net()
  tx = optax.chain(optax.sgd(0.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=2))
  optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)

  @jax.jit
  def train(net, optimizer):
    value, grads = nnx.value_and_grad(loss)(net)
    optimizer.update(net, grads, value=value)

  scales = []
  for _ in range(6):
    train(net, optimizer)
    scales.append(float(optimizer.opt_state[1].scale))
  assert scales[0] == 1.0 and scales[-1] < 1.0 and scales == sorted(scales, reverse=True)


KEEPS_PARAMS = {
  "schedule_free": lambda: optax.contrib.schedule_free_adamw(0.05),
  "dog": lambda: optax.contrib.dog(0.5),
  "prodigy": lambda: optax.contrib.prodigy(0.1),
  "ema": lambda: optax.chain(optax.sgd(0.1), optax.ema(0.9)),
}


@pytest.mark.parametrize("name", KEEPS_PARAMS)
def test_a_state_that_holds_parameters_has_cells_of_its_own(name):
  net, tx = Net(), KEEPS_PARAMS[name]()
  params = nnx.to_pure_dict(nnx.state(net, nnx.Param))
  state = tx.init(params)
  graphdef = nnx.graphdef(nnx.to_lojax(net))

  @jax.jit
  def by_hand(params, state):
    value = lambda p: loss(nnx.merge(graphdef, nnx.State(p)))
    updates, state = tx.update(jax.grad(value)(params), state, params)
    return optax.apply_updates(params, updates), state

  optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
  for _ in range(4):
    params, state = by_hand(params, state)
    jax.jit(step)(net, optimizer)
  assert_close(nnx.to_pure_dict(nnx.state(net, nnx.Param)), params, rtol=1e-4)
  assert_close(arrays(optimizer.opt_state), jax.tree.leaves(state), rtol=1e-4)


@pytest.mark.parametrize("name", ["adam", "MultiSteps"])
def test_bfloat16_parameters_with_every_option(name):
  net = Net(jnp.bfloat16)
  tx = TRANSFORMATIONS[name]()
  optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param, skip_nonfinite=True)
  dtypes = [x.dtype for x in arrays((net, optimizer))]
  before = float(loss(net))
  for factor in (1.0, jnp.inf, 1.0, 1.0, 1.0, 1.0):
    jax.jit(step)(net, optimizer, factor)
  assert [x.dtype for x in arrays((net, optimizer))] == dtypes
  assert float(loss(net)) < before and int(optimizer.skipped) == 1


# gradients of another structure: the first difference, in the order of the paths, is named
def without(grads, *paths):
  return nnx.from_flat_state([(p, g) for p, g in nnx.to_flat_state(grads) if p not in paths])


DIFFERENCES = {
  "two missing": (
    lambda g: without(g, ("a", "kernel"), ("b", "bias")),
    ".a.kernel",
    "no gradient for float32[3,3]",
  ),
  "missing and another shape": (
    lambda g: nnx.merge_state(without(g, ("b", "bias")), nnx.State({"a": {"bias": jnp.ones(2)}})),
    ".a.bias",
    "a gradient float32[2] for a parameter float32[3]",
  ),
  "another rank": (
    lambda g: nnx.merge_state(g, nnx.State({"scale": jnp.ones(1)})),
    ".scale",
    "a gradient float32[1] for a parameter float32[]",
  ),
  "another model": (
    lambda g: nnx.grad(lambda m: m(X).sum())(nnx.Linear(3, 3, rngs=nnx.Rngs(0))),
    ".a.bias",
    "no gradient for float32[3]",
  ),
  "a list": (
    lambda g: nnx.merge_state(g, nnx.State({"layers": {0: {"kernel": jnp.ones((3, 3))}}})),
    ".layers[0].kernel",
    "a gradient without a parameter",
  ),
  "none at all": (lambda g: nnx.State({}), ".a.bias", "no gradient for float32[3]"),
}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_the_first_difference_of_gradients_is_named(name, skip):
  spoil, at, got = DIFFERENCES[name]
  net = Net()
  optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param, skip_nonfinite=skip)
  grads = spoil(nnx.grad(loss)(net))
  before = arrays((net, optimizer))
  with pytest.raises(TreeMismatchError) as error:
    optimizer.update(net, grads)
  assert f"\n  at:  {at}\n  got: {got}\n" in str(error.value)
  assert_same(arrays((net, optimizer)), before)


# what `tx.init` returns goes into the cells as it is only if nobody else has it
def keeping():
  """A transformation that keeps arrays, and returns one twice, aliases, and what it was given."""
  kept = {"constant": jnp.full(5, 2.0)}

  def init(params):
    leaves = jax.tree.leaves(params)
    alias = [jax.device_put(x, x.sharding) for x in leaves]
    twice = jnp.zeros(5)
    kept["fresh"] = jnp.ones(5)
    return {
      "constant": kept["constant"],
      "fresh": kept["fresh"],
      "alias": alias,
      "given": leaves,
      "twice": [twice, twice],
      "mine": jnp.full(5, 3.0),
      "number": 1.0,
      "weak": jnp.asarray(1.0),
    }

  def update(grads, state, params=None):
    return grads, jax.tree.map(lambda x: x + 1, state)

  return optax.GradientTransformation(init, update), kept


@pytest.mark.parametrize("hijax", [True, False])
def test_an_array_that_somebody_else_has_is_copied(hijax):
  tx, kept = keeping()
  with nnx.use_hijax(hijax):
    net = Net()
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
  before = np.asarray(net.a.kernel)
  zeros = jax.tree.map(lambda v: jnp.zeros(v.shape), nnx.pure(nnx.state(net, nnx.Param)))
  step = nnx.jit(lambda net, optimizer: optimizer.update(net, zeros) and None)
  for _ in range(2):
    step(net, optimizer)
  assert kept["constant"].tolist() == [2] * 5 and kept["fresh"].tolist() == [1] * 5
  np.testing.assert_array_equal(net.a.kernel, before)
  state = optimizer.opt_state
  assert state["constant"][...].tolist() == [4] * 5 and state["mine"][...].tolist() == [5] * 5
  assert [v[...].tolist() for v in state["twice"]] == [[2] * 5] * 2
  assert float(state["number"]) == float(state["weak"]) == 3.0
  assert not state["weak"][...].weak_type
  for part in ("alias", "given"):
    for v, x in zip(state[part], jax.tree.leaves(nnx.pure(nnx.state(net, nnx.Param))), strict=True):
      np.testing.assert_allclose(v[...], x + 2, rtol=1e-6)


@pytest.mark.skipif(_jax._private() is None, reason="counts copies of buffers of Refs")
def test_a_state_that_nobody_else_has_is_not_copied(monkeypatch):
  net, sizes = nnx.Linear(30, 30, rngs=nnx.Rngs(0)), []
  tx = optax.adam(1e-3)
  note = lambda x: sizes.append(x.size)
  for name in ("copied", "copied_for_cell", "_copy"):
    copy = getattr(_jax, name)
    monkeypatch.setattr(_jax, name, lambda x, copy=copy: (note(x), copy(x))[1])
  optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
  assert max(sizes, default=1) == 1
  assert optimizer.opt_state[0].mu["kernel"].shape == (30, 30)


def test_an_optimizer_without_wrt_says_what_to_write():
  with pytest.raises(MissingArgumentError) as error:
    nnx.Optimizer(Net(), optax.sgd(0.1))
  assert isinstance(error.value, TypeError)
  assert error.value.args[0] == (
    "Optimizer was not told which Variables it trains\n"
    "  got: no argument wrt\n"
    "  fix: Optimizer(model, tx, wrt=nnx.Param); code written for releases of Flax NNX before 0.11 "
    "runs with ModelAndOptimizer(model, tx) of refax.compat"
  )


@pytest.mark.parametrize(
  "wrap", [lambda f: f, nnx.jit, jax.jit], ids=["eager", "nnx.jit", "jax.jit"]
)
def test_a_number_in_the_place_of_a_hyper_parameters_variable_is_refused(wrap):
  model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  tx = optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.sgd)(learning_rate=1e-3))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  grads = nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(model)
  step = wrap(lambda model, optimizer: (optimizer.update(model, grads), None)[1])
  step(model, optimizer)
  before = model.kernel[...]
  optimizer.opt_state[1].hyperparams["learning_rate"] = 0.5
  place = r"at:  Optimizer.opt_state\[1\]\.hyperparams\['learning_rate'\]"
  with pytest.raises(TreeMismatchError, match=rf"{place}\n.*\n  fix: .*nnx.OptState\(x\)"):
    step(model, optimizer)
  assert (model.kernel[...] == before).all() and int(optimizer.step) == 1
  optimizer.opt_state[1].hyperparams["learning_rate"] = nnx.OptState(0.5)
  step(model, optimizer)
  optimizer.hyperparams["learning_rate"] = 0.25
  step(model, optimizer)
  assert np.allclose(model.kernel[...], before - 0.75)
