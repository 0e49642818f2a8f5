"""Norms by layer are those that NumPy computes, in both storages, compiled or not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx
from refax.errors import (
  FilterError,
  InvalidArgumentError,
  MissingArgumentError,
  ShapeMismatchError,
  TreeMismatchError,
)

X = jnp.linspace(-1, 1, 24).reshape(8, 3)


class Net(nnx.Module):
  def __init__(self, rngs):
    self.encoder = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs))
    self.stack = nnx.Stack(nnx.Linear, 3, 4, 4, rngs=rngs)
    self.scale = nnx.Param(jnp.ones(4))
    self.weights = [nnx.Param(jnp.ones(2)), nnx.Param(jnp.ones(3))]
    self.norm = nnx.BatchNorm(4, rngs=rngs)

  def __call__(self, x):
    extra = sum(w.sum() for w in self.weights)
    return self.norm(self.stack(self.encoder(x))) * self.scale + extra


@pytest.fixture(params=[True, False], ids=["hijax", "lojax"])
def net(request):
  with nnx.use_hijax(request.param):
    yield Net(nnx.Rngs(0))


def norm(*arrays):
  return np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in arrays))


def loss(model, x):
  return (model(x) ** 2).mean()


def test_norms_are_those_of_numpy_by_layer(net):
  norms = nnx.metrics.Norms(net, of=("parameters",))
  norms.update(model=net)
  got = norms.compute()
  first = net.encoder.layers[0]
  want = {
    "parameters": norm(*(x[...] for _, x in nnx.to_flat_state(nnx.variables(net, nnx.Param)))),
    "parameters/encoder/layers/0": norm(first.kernel[...], first.bias[...]),
    "parameters/stack/layers/2": norm(net.stack.layers.kernel[2], net.stack.layers.bias[2]),
    "parameters/.": norm(np.ones(4), np.ones(2), np.ones(3)),
    "parameters/norm": norm(net.norm.scale[...], net.norm.bias[...]),
  }
  assert {k: float(got[k]) for k in want} == pytest.approx(want, rel=1e-5)
  layers = ["encoder/layers/0", "encoder/layers/1", *(f"stack/layers/{i}" for i in range(3))]
  assert set(got) == {"parameters", *(f"parameters/{n}" for n in [*layers, ".", "norm"])}


def test_a_step_compiled_by_nnx_jit_keeps_the_means_of_all_steps(net):
  optimizer = nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)
  norms = nnx.metrics.Norms(net)
  kept = []

  @nnx.jit
  def step(model, optimizer, norms, x):
    grads = nnx.grad(loss)(model, x)
    updates = optimizer.update(model, grads)
    norms.update(model=model, grads=grads, updates=updates)
    return grads, updates

  for i in range(3):
    kept.append(jax.device_get(jax.tree.leaves(step(net, optimizer, norms, X + i)[0])))
  got = norms.compute()
  want = np.mean([norm(*leaves) for leaves in kept])
  assert float(got["gradients"]) == pytest.approx(want, rel=1e-5)
  assert float(got["updates"]) == pytest.approx(0.1 * want, rel=1e-4)
  assert float(got["updates/stack/layers/1"]) == pytest.approx(
    0.1 * float(got["gradients/stack/layers/1"]), rel=1e-4
  )
  norms.reset()
  assert all(np.isnan(float(x)) for x in norms.compute().values())


def test_under_jax_jit_hijax_norms_are_updated_in_place():
  model = Net(nnx.Rngs(0))
  norms = nnx.metrics.Norms(model, of="gradients")

  @jax.jit
  def step(model, norms, x):
    norms.update(grads=nnx.grad(loss)(model, x))
    return norms.compute()["gradients"]

  first = step(model, norms, X)
  assert float(norms.compute()["gradients"]) == pytest.approx(float(first))


def test_under_jax_jit_lojax_norms_are_returned():
  with nnx.use_hijax(False):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    norms = nnx.metrics.Norms(model, of="parameters")

  @jax.jit
  def step(model, norms):
    norms.update(model=model)
    return norms

  norms = step(model, norms)
  want = norm(model.kernel[...], model.bias[...])
  assert float(norms.compute()["parameters/."]) == pytest.approx(want)


def test_activations_are_root_mean_squares_of_what_was_captured(net):
  norms = nnx.metrics.Norms(net, of=(), activations=nnx.Linear)

  @nnx.jit
  def step(model, norms, x):
    y, kept = nnx.capture(model, nnx.Linear)(x)
    norms.update(activations=kept)
    return y

  step(net, norms, X)
  got = {k: float(x) for k, x in norms.compute().items()}
  _, kept = nnx.capture(net, nnx.Linear)(X)
  first = np.asarray(kept["encoder"]["layers"][0]["__call__"][0])
  stacked = np.asarray(kept["stack"]["layers"]["__call__"][0])
  assert got["activations/encoder/layers/0"] == pytest.approx(np.sqrt((first**2).mean()), rel=1e-5)
  for i in range(3):
    want = np.sqrt((stacked[i] ** 2).mean())
    assert got[f"activations/stack/layers/{i}"] == pytest.approx(want, rel=1e-5)
  assert len(got) == 5


def test_activations_from_inside_of_the_loss(net):
  norms = nnx.metrics.Norms(net, of="gradients", activations="encoder/layers/*")

  @nnx.jit
  def step(model, norms, x):
    def with_kept(model, x):
      y, kept = nnx.capture(model, "encoder/layers/*")(x)
      return (y**2).mean(), kept

    grads, kept = nnx.grad(with_kept, has_aux=True)(model, x)
    norms.update(grads=grads, activations=kept)

  step(net, norms, X)
  got = norms.compute()
  assert float(got["activations/encoder/layers/1"]) > 0 and float(got["gradients"]) > 0


def test_a_layer_that_was_not_called_has_no_number():
  class Two(nnx.Module):
    def __init__(self):
      self.a, self.b = (nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(2))

    def __call__(self, x):
      return self.a(x)

  model = Two()
  norms = nnx.metrics.Norms(model, of=(), activations=nnx.Linear)
  norms.update(activations=nnx.capture(model, nnx.Linear)(X)[1])
  got = norms.compute()
  assert np.isnan(float(got["activations/b"])) and float(got["activations/a"]) > 0


def test_half_precision_is_summed_in_float32_and_nan_stays_until_reset():
  model = nnx.Linear(300, 300, rngs=nnx.Rngs(0), param_dtype=jnp.float16)
  model.kernel[...] = jnp.full((300, 300), 300, jnp.float16)
  norms = nnx.metrics.Norms(model, of="parameters")
  norms.update(model=model)
  assert float(norms.compute()["parameters"]) == pytest.approx(300 * 300, rel=1e-4)
  model.bias[...] = jnp.full(300, jnp.nan, jnp.float16)
  norms.update(model=model)
  model.bias[...] = jnp.zeros(300, jnp.float16)
  norms.update(model=model)
  assert np.isnan(float(norms.compute()["parameters/."]))
  norms.reset()
  norms.update(model=model)
  assert float(norms.compute()["parameters/."]) == pytest.approx(300 * 300, rel=1e-4)


def test_models_without_parameters_and_complex_ones():
  empty = nnx.Sequential()
  norms = nnx.metrics.Norms(empty)
  norms.update(model=empty, grads=nnx.state(empty, nnx.Param), updates={})
  assert {k: float(x) for k, x in norms.compute().items()} == dict.fromkeys(
    ("parameters", "gradients", "updates"), 0.0
  )
  model = nnx.Module()
  model.w = nnx.Param(jnp.array([3 + 4j, 0]))
  norms = nnx.metrics.Norms(model, of="parameters")
  norms.update(model=model)
  assert float(norms.compute()["parameters/."]) == 5


def test_variables_of_several_arrays_of_integers_and_shared_ones():
  model = nnx.Module()
  model.several = nnx.Param({"a": jnp.ones(4), "b": jnp.ones(5)})
  model.again = model.several
  model.integers = nnx.Param(jnp.array([3, 1]))
  model.empty = nnx.Param(jnp.zeros(0))
  norms = nnx.metrics.Norms(model, of="parameters")
  norms.update(model=model)
  assert float(norms.compute()["parameters/."]) == pytest.approx(np.sqrt(4 + 5 + 10))


def test_in_a_loop_over_steps_inside_of_one_compiled_function(net):
  optimizer = nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param)
  norms = nnx.metrics.Norms(net)

  @nnx.jit
  def run(carry, xs):
    def step(carry, x):
      model, optimizer, norms = carry
      grads = nnx.grad(loss)(model, x)
      norms.update(model=model, grads=grads, updates=optimizer.update(model, grads))
      return carry, None

    return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(carry, xs)[1]

  run((net, optimizer, norms), jnp.stack([X, X, X]))
  assert set(norms.counts["gradients"][...].tolist()) == {3}
  got = norms.compute()
  assert float(got["updates"]) == pytest.approx(0.1 * float(got["gradients"]), rel=1e-4)


def test_in_a_multi_metric_and_split_and_merged(net):
  norms = nnx.metrics.Norms(net, of="parameters")
  metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"), norms=norms)
  metrics.update(loss=1.0, model=net)
  values = metrics.compute()
  graphdef, state = nnx.split(metrics)
  again = nnx.merge(graphdef, state).compute()
  assert float(again["norms"]["parameters"]) == float(values["norms"]["parameters"]) > 0


def test_a_part_of_the_parameters():
  model = Net(nnx.Rngs(0))
  wrt = nnx.All(nnx.Param, nnx.PathContains("encoder"))
  norms = nnx.metrics.Norms(model, of="gradients", wrt=wrt)
  norms.update(grads=nnx.grad(loss, wrt=wrt)(model, X))
  assert set(norms.compute()) == {"gradients", *(f"gradients/encoder/layers/{i}" for i in (0, 1))}


def test_what_does_not_fit_is_refused_and_nothing_is_written(net):
  norms = nnx.metrics.Norms(net, activations=nnx.BatchNorm)
  message = r"not given grads(.|\n)*got: .*model(.|\n)*fix: .*grads="
  with pytest.raises(MissingArgumentError, match=message) as error:
    norms.update(model=net)
  assert "without gradients" in str(error.value)
  grads = nnx.grad(loss)(net, X)
  other = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
  with pytest.raises(TreeMismatchError, match=r"at: +.encoder(.|\n)*no array in updates"):
    norms.update(model=net, grads=grads, updates=nnx.state(other, nnx.Param))
  assert all(float(x.sum()) == 0 for x in jax.tree.leaves(nnx.to_lojax(norms)))
  with pytest.raises(InvalidArgumentError, match="some of parameters"):
    nnx.metrics.Norms(net, of="moments")
  with pytest.raises(FilterError, match="nothing"):
    nnx.metrics.Norms(net, activations="nothing")
  stacked = nnx.metrics.Norms(net, of=(), activations="stack/layers")
  kept = nnx.capture(net, "stack/layers")(X)[1]
  batched = jax.tree.map(lambda x: jnp.stack([x, x]), kept)
  with pytest.raises(ShapeMismatchError, match=r"3 layers of a Stack(.|\n)*fix: capture"):
    stacked.update(activations=batched)
