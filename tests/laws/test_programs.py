"""A stateful program equals its functional twin under any nest of plain JAX transforms."""

import contextlib
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from refax import nnx
from tests.laws.programs import (
  SIZE,
  TWO_BODIES,
  Net,
  Step,
  covered,
  initial_state,
  is_dropped,
  jax_drops_writes,
  programs,
  run_functional,
  run_stateful,
  uses,
)

X = jnp.linspace(-1.0, 1.5, SIZE)
KEY = jax.random.key(7)
LAYERS = 2


def assert_close(got, want):
  got, want = jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(want)
  assert [p for p, _ in got] == [p for p, _ in want]
  for (path, a), (_, b) in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=str(path))


def check_values(program):
  state = initial_state(KEY)
  net = Net(state)
  want_state, want = jax.jit(lambda s, x: run_functional(program, s, x))(state, X)
  got = jax.jit(lambda net, x: run_stateful(program, net, x))(net, X)
  assert_close((got, net.values()), (want, want_state))


def check_eager(program):
  state = initial_state(KEY)
  net = Net(state)
  want_state, want = run_functional(program, state, X)
  got = run_stateful(program, net, X)
  assert_close((got, net.values()), (want, want_state))


def functional_loss(program):
  def loss(w, x, state):
    s, y = run_functional(program, state | {"w": w}, x)
    return jnp.sin(y).sum(), s

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def check_parameter_gradients(program):
  state = initial_state(KEY)
  (want, want_state), (dw, _) = functional_loss(program)(state["w"], X, state)
  net = Net(state)

  @jax.jit
  def step(net, x):
    return nnx.value_and_grad(lambda net: jnp.sin(run_stateful(program, net, x)).sum())(net)

  got, grads = step(net, X)
  assert_close((got, grads["w"][...], net.values()), (want, dw, want_state))


def check_input_gradients(program):
  """jax.grad with respect to the input, the model by closure."""
  state = initial_state(KEY)
  (want, want_state), (_, dx) = functional_loss(program)(state["w"], X, state)
  net = Net(state)
  loss = lambda x: jnp.sin(run_stateful(program, net, x)).sum()
  got, got_dx = jax.jit(jax.value_and_grad(loss))(X)
  assert_close((got, got_dx, net.values()), (want, dx, want_state))


def check_layers(program):
  """A scan over stacked layers as `xs`, differentiated, with each layer recomputed."""
  state = initial_state(KEY, (LAYERS,))

  def functional(w, x):
    def body(x, s):
      s, x = jax.checkpoint(lambda s, x: run_functional(program, s, x))(s, x)
      return x, s

    y, s = jax.lax.scan(body, x, state | {"w": w})
    return jnp.sin(y).sum(), s

  (want, want_state), dw = jax.value_and_grad(functional, has_aux=True)(state["w"], X)
  net = Net(state)

  @jax.jit
  def step(net, x):
    layer_call = jax.checkpoint(lambda layer, x: run_stateful(program, layer, x))

    def loss(net):
      y, _ = jax.lax.scan(lambda x, layer: (layer_call(layer, x), None), x, net)
      return jnp.sin(y).sum()

    return nnx.value_and_grad(loss)(net)

  got, grads = step(net, X)
  assert_close((got, grads["w"][...], net.values()), (want, dw, want_state))


def check_ensemble(program):
  """A stack of models under jax.vmap, each with its own state and input."""
  state, xs = initial_state(KEY, (LAYERS,)), jnp.stack([X, X[::-1]])

  def functional(w, xs):
    s, y = jax.vmap(lambda s, x: run_functional(program, s, x))(state | {"w": w}, xs)
    return jnp.sin(y).sum(), s

  (want, want_state), dw = jax.value_and_grad(functional, has_aux=True)(state["w"], xs)
  net = Net(state)

  @jax.jit
  def step(net, xs):
    def loss(net):
      return jnp.sin(jax.vmap(lambda net, x: run_stateful(program, net, x))(net, xs)).sum()

    return nnx.value_and_grad(loss)(net)

  got, grads = step(net, xs)
  assert_close((got, grads["w"][...], net.values()), (want, dw, want_state))


def check_two_steps(step, functional, state, x):
  """Two calls of an `nnx.jit` step, the second by its fast path, and two of the functional twin."""
  net, twin = Net(state), jax.jit(jax.value_and_grad(functional, has_aux=True))
  step = nnx.jit(step)
  for _ in range(2):
    (want, state), dw = twin(state["w"], state, x)
    assert_close((*step(net, x), net.values()), (want, dw, state))
  assert step._fast.find((net, x)) is not None


def check_nnx_layers(program):
  """nnx.scan over stacked layers, with nnx.remat, differentiated by nnx.value_and_grad."""

  def functional(w, state, x):
    def body(x, s):
      s, x = jax.checkpoint(lambda s, x: run_functional(program, s, x))(s, x)
      return x, s

    y, s = jax.lax.scan(body, x, state | {"w": w})
    return jnp.sin(y).sum(), s

  def step(net, x):
    layer = nnx.remat(lambda layer, x: run_stateful(program, layer, x))
    stack = nnx.scan(lambda x, net: layer(net, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    value, grads = nnx.value_and_grad(lambda net: jnp.sin(stack(x, net)).sum())(net)
    return value, grads["w"][...]

  check_two_steps(step, functional, initial_state(KEY, (LAYERS,)), X)


def check_nnx_ensemble(program):
  """nnx.vmap over models, each with a state and an input of its own."""

  def functional(w, state, xs):
    s, y = jax.vmap(lambda s, x: run_functional(program, s, x))(state | {"w": w}, xs)
    return jnp.sin(y).sum(), s

  def step(net, xs):
    mapped = nnx.vmap(lambda net, x: run_stateful(program, net, x))
    value, grads = nnx.value_and_grad(lambda net: jnp.sin(mapped(net, xs)).sum())(net)
    return value, grads["w"][...]

  check_two_steps(step, functional, initial_state(KEY, (LAYERS,)), jnp.stack([X, X[::-1]]))


CHECKS = {
  "values": (check_values, programs(depth=3)),
  "eager": (check_eager, programs(depth=1)),
  "parameter gradients": (check_parameter_gradients, programs(depth=3)),
  "input gradients": (check_input_gradients, programs(depth=3)),
  "layers": (check_layers, programs(depth=2, transforms="straight")),
  "ensemble": (check_ensemble, programs(depth=2, transforms="straight")),
  "nnx values": (check_values, programs(depth=4, transforms="nnx")),
  "nnx eager": (check_eager, programs(depth=1, transforms="mixed")),
  "nnx parameter gradients": (check_parameter_gradients, programs(depth=3, transforms="nnx")),
  "mixed parameter gradients": (check_parameter_gradients, programs(depth=4, transforms="mixed")),
  "mixed input gradients": (check_input_gradients, programs(depth=3, transforms="mixed")),
  "nnx layers": (check_nnx_layers, programs(depth=2, transforms="mixed")),
  "nnx ensemble": (check_nnx_ensemble, programs(depth=2, transforms="mixed")),
  "mixed ensemble": (check_ensemble, programs(depth=2, transforms="mixed")),
}
DROPS = jax_drops_writes()
REFUSALS = (
  "State effect not supported in cond partial-eval",
  "State effect not supported in vmap-of-cond",
)


def run(name, examples, record_property):
  """Check programs. What JAX refuses aloud (a plain branch with state, under grad or vmap) counts
  as refused; `nnx` transforms are never refused."""
  check, strategy = CHECKS[name]
  outcomes = Counter()

  @settings(
    max_examples=examples,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking costs minutes of compilation
    suppress_health_check=list(HealthCheck),
  )
  @given(program=strategy)
  def law(program):
    if DROPS and is_dropped(program, ("loop", "checkpoint") if "layers" in name else ()):
      outcomes["dropped by JAX"] += 1
      return
    try:
      check(program)
    except NotImplementedError as error:
      assert any(r in str(error) for r in REFUSALS) and uses(program, TWO_BODIES)
      outcomes["refused"] += 1
    else:
      outcomes["equal"] += 1

  law()
  steps = ", ".join(f"{step} {n}" for step, n in sorted(covered.items()))
  programs_run = f"{sum(outcomes.values())} programs {dict(outcomes)} of {name}"
  record_property("programs", f"{programs_run}; steps: {steps}")  # conftest prints it
  covered.clear()
  assert outcomes["equal"] >= examples // 3


@pytest.mark.parametrize("name", CHECKS)
def test_a_stateful_program_equals_its_functional_twin(name, record_property):
  run(name, 6, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_many_stateful_programs_equal_their_functional_twins(name, record_property):
  run(name, 15, record_property)


@pytest.mark.parametrize("name", ["cond", "switch"])
def test_state_written_in_a_plain_branch_under_vmap_is_refused_aloud(name):
  body = (Step("write_count"),)
  with pytest.raises(NotImplementedError, match="vmap-of-cond"):
    check_ensemble((Step(name, (body, body)),))


@pytest.mark.parametrize("name", ["nnx_cond", "nnx_cond_closure", "nnx_switch"])
def test_state_written_in_an_nnx_branch_is_right_under_vmap_and_grad(name):
  bodies = (Step("write_count"), Step("write_stat")), (Step("linear"), Step("write_memory"))
  for check in (check_ensemble, check_nnx_ensemble, check_layers, check_parameter_gradients):
    check((Step("linear"), Step(name, bodies), Step("read_stat")))


@pytest.mark.parametrize("name", ["cond", "switch"])
def test_a_plain_branch_inside_an_nnx_transform_is_right_or_refused_aloud(name):
  plain = (Step("write_count"), Step("linear")), (Step("linear"), Step("write_stat"))
  custom = (Step("write_count"), Step("custom_vjp")), (Step("custom_jvp"), Step("write_memory"))
  program = lambda bodies: (
    Step("nnx_checkpoint", ((Step("linear"), Step(name, bodies), Step("read_stat")),)),
  )
  for check in (check_ensemble, check_nnx_ensemble, check_layers, check_parameter_gradients):
    check(program(plain))
    # Custom derivatives in the branch keep it from being made pure: JAX may refuse it.
    with contextlib.suppress(NotImplementedError):
      check(program(custom))
