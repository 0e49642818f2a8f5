"""Linen keeps the state of its wrappers under paths: `layer_instance/kernel/u`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from refax import nnx
from tests.numerics.twin import (
  GRADIENT_TOLERANCE,
  QUICK,
  TOLERANCE,
  assert_close,
  linen,
  normal,
  project,
)

ZEROS = {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}
FLOATS = st.sampled_from((jnp.float32, jnp.bfloat16))
DTYPES = st.sampled_from((None, jnp.float32, jnp.bfloat16))
LAYERS = {
  "dense": ((2, 3), lambda d: nnx.Linear(3, 4, param_dtype=d, **ZEROS),
            lambda d: linen.Dense(4, param_dtype=d)),
  "conv": ((2, 5, 3), lambda d: nnx.Conv(3, 4, (2,), param_dtype=d, **ZEROS),
           lambda d: linen.Conv(4, (2,), param_dtype=d)),
}  # fmt: skip


def shared(model, layer, x, **kwargs):
  """Random weights and state for both; the twins start alike."""
  shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, **kwargs))
  leaves, treedef = jax.tree.flatten(shapes)
  variables = treedef.unflatten([normal(i, s.shape, s.dtype) for i, s in enumerate(leaves)])
  for name, value in list(variables["params"]["layer_instance"].items()):
    # The weights that Linen initialises have the dtype of normalized ones.
    own = getattr(model.layer_instance, name)
    variables["params"]["layer_instance"][name] = value.astype(own.dtype)
    own[...] = value.astype(own.dtype)
  for name, value in variables["params"].items():
    if name != "layer_instance":  # .../kernel/scale
      model.scales[name.split("/")[1],][...] = value
  for name, value in variables.get("batch_stats", {}).items():
    model.batch_stats[tuple(name.split("/")[1:])][...] = value
  return variables


ROUNDED = {jnp.dtype(jnp.float32): 2e-2, jnp.dtype(jnp.bfloat16): 2e-2}
"""Linen normalizes weights of bfloat16 in bfloat16, Refax in float32. Where a gradient is 0, that
of Linen is a difference of numbers near 2, whose last bit is 0.0156."""


def assert_wrappers_equal(model, layer, variables, x, tolerance=None, **kwargs):
  """Compare output, gradients and state of one call; returns Linen's variables after it."""
  of = (type(model).__name__, "Flax Linen") if tolerance is None else None
  values, gradients = tolerance or TOLERANCE, tolerance or GRADIENT_TOLERANCE

  def linen_loss(params, x):
    rest = {k: v for k, v in variables.items() if k != "params"}
    y, new = layer.apply({"params": params, **rest}, x, mutable=["batch_stats"], **kwargs)
    return project(y), (y, new)

  graphdef, params, rest = nnx.split(model, nnx.Param, ...)

  def refax_loss(params, x):
    y = nnx.merge(graphdef, params, rest)(x, **kwargs)
    return project(y), y

  grad = lambda loss: jax.jit(jax.grad(loss, (0, 1), has_aux=True), compiler_options=QUICK)
  (want, want_x), (y, new) = grad(linen_loss)(variables["params"], x)
  (got, got_x), own_y = grad(refax_loss)(nnx.to_lojax(params), x)
  assert_close(own_y, y, values, of=of)
  assert_close(got_x, want_x, gradients, of=of)
  for name, gradient in want["layer_instance"].items():
    assert_close(got["layer_instance"][name][...], gradient, gradients, of=of)
  for name, gradient in want.items():
    if name != "layer_instance":
      assert_close(got["scales"][name.split("/")[1],][...], gradient, gradients, of=of)
  for name, value in new.get("batch_stats", {}).items():
    assert_close(model.batch_stats[tuple(name.split("/")[1:])][...], value, of=of)
  return {**variables, **new}


@settings(max_examples=6, deadline=None)
@given(
  kind=st.sampled_from(sorted(LAYERS)),
  feature_axes=st.sampled_from((-1, 0, (0, -1), None)),
  use_scale=st.booleans(),
  weight_dtype=FLOATS,
  options=st.fixed_dictionaries({"dtype": DTYPES, "param_dtype": FLOATS}),
)
def test_weight_norm_equals_linen(kind, feature_axes, use_scale, weight_dtype, options):
  shape, own, theirs = LAYERS[kind]
  # Elements of length 1 are signs: their gradients are 0, and those of Linen only rounding.
  assume(not (kind == "dense" and feature_axes == (0, -1) and weight_dtype == jnp.bfloat16))
  options = options | {"feature_axes": feature_axes, "use_scale": use_scale}
  model = nnx.WeightNorm(own(weight_dtype), **options, rngs=nnx.Rngs(0))
  layer = linen.WeightNorm(theirs(weight_dtype), **options)
  x, tolerance = normal(9, shape), ROUNDED if weight_dtype == jnp.bfloat16 else None
  assert_wrappers_equal(model, layer, shared(model, layer, x), x, tolerance)


@settings(max_examples=6, deadline=None)
@given(
  kind=st.sampled_from(sorted(LAYERS)),
  n_steps=st.integers(1, 3),
  weight_dtype=FLOATS,
  dtype=DTYPES,
)
def test_spectral_norm_equals_linen(kind, n_steps, weight_dtype, dtype):
  shape, own, theirs = LAYERS[kind]
  options = {"n_steps": n_steps, "dtype": dtype}
  model = nnx.SpectralNorm(own(weight_dtype), **options, rngs=nnx.Rngs(0))
  layer = linen.SpectralNorm(theirs(weight_dtype), **options)
  x = normal(9, shape)
  variables = shared(model, layer, x, update_stats=False)
  assert_wrappers_equal(model, layer, variables, x, update_stats=True)


@pytest.mark.parametrize("name", ["WeightNorm", "SpectralNorm"])
def test_training_and_evaluation_over_several_steps_equal_linen(name):
  model = getattr(nnx, name)(nnx.Linear(3, 4, **ZEROS), rngs=nnx.Rngs(0))
  layer = getattr(linen, name)(linen.Dense(4))
  update = (lambda on: {"update_stats": on}) if name == "SpectralNorm" else lambda on: {}
  variables = shared(model, layer, normal(0, (2, 3)), **update(False))
  for step in range(4):
    variables = assert_wrappers_equal(model, layer, variables, normal(step, (2, 3)), **update(True))
    move = lambda v: v - 0.1 * jnp.sin(v)
    variables["params"] = jax.tree.map(move, variables["params"])
    for _, param in nnx.to_flat_state(nnx.variables(model, nnx.Param)):
      param[...] = move(param[...])
  variables = assert_wrappers_equal(model, layer, variables, normal(9, (2, 3)), **update(False))
  model.eval()
  assert_close(model(normal(9, (2, 3))), layer.apply(variables, normal(9, (2, 3)), **update(False)))


@pytest.mark.parametrize("name", ["WeightNorm", "SpectralNorm"])
def test_the_state_and_the_streams_are_those_of_flax_nnx(name):
  flax_nnx = pytest.importorskip("flax.nnx", reason="the state is compared with Flax NNX")

  def build(lib):
    rngs, init = lib.Rngs(7), lib.initializers.normal()
    layers = [lib.Linear(3, 3, bias_init=init, rngs=rngs) for _ in range(2)]
    model = getattr(lib, name)(lib.Sequential(*layers), rngs=rngs)
    return model, rngs, lib.to_flat_state(lib.state(model))

  (own, own_rngs, ours), (other, other_rngs, theirs) = build(nnx), build(flax_nnx)
  assert [(path, x.shape, x.dtype) for path, x in ours] == [
    (path, x.shape, x.dtype) for path, x in theirs
  ]
  for (path, x), (_, want) in zip(ours, theirs, strict=True):
    # Before Flax 0.12.12 a scale was an array that no optimizer saw.
    assert path[0] == "scales" or type(x).__name__ == type(want).__name__
    np.testing.assert_allclose(x[...], want[...], rtol=1e-6)
  assert own_rngs.params() == other_rngs.params()  # the next layer is the same, too
  for step in range(3):  # Flax writes the weights that it has normalized
    nnx.update(own, flax_nnx.to_pure_dict(flax_nnx.state(other)))
    x = normal(step, (2, 3))
    np.testing.assert_allclose(own(x), other(x), rtol=1e-5, atol=1e-6)
