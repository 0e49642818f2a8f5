"""Linen has no LoRA: the oracles are products written out, and Linen's Dense."""

import jax
import jax.numpy as jnp
import pytest

from refax import nnx
from tests.numerics.twin import GRADIENT_TOLERANCE, QUICK, assert_close, linen, normal, project

FLOATS = (jnp.float32, jnp.bfloat16)


def assert_gradients_close(model, oracle, weights, x):
  """Compare outputs and gradients of `model` with `oracle(weights, x)`."""
  for name, value in weights.items():
    part = model.lora if isinstance(model, nnx.LoRALinear) and name.startswith("lora") else model
    getattr(part, name)[...] = value
  graphdef, params = nnx.split(model)
  of = (type(model).__name__, "JAX by hand")

  def own_loss(params, x):
    y = nnx.merge(graphdef, params)(x)
    return project(y), y

  def loss(weights, x):
    y = oracle(weights, x)
    return project(y), y

  grad = lambda f: jax.jit(jax.grad(f, (0, 1), has_aux=True), compiler_options=QUICK)
  (got, got_x), own_y = grad(own_loss)(nnx.to_lojax(params), x)
  (want, want_x), y = grad(loss)(weights, x)
  assert_close(own_y, y, of=of)
  assert_close(got_x, want_x, GRADIENT_TOLERANCE, of=of)
  flat = {path[-1]: leaf for path, leaf in nnx.to_flat_state(got)}
  for name, gradient in want.items():
    assert_close(flat[name][...], gradient, GRADIENT_TOLERANCE, of=of)


@pytest.mark.parametrize("input_dtype", FLOATS)
@pytest.mark.parametrize("dtype", [None, *FLOATS])
@pytest.mark.parametrize("param_dtype", FLOATS)
def test_lora_equals_two_products(input_dtype, dtype, param_dtype):
  model = nnx.LoRA(3, 2, 4, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
  weights = {"lora_a": normal(1, (3, 2), param_dtype), "lora_b": normal(2, (2, 4), param_dtype)}
  common = dtype or jnp.promote_types(input_dtype, param_dtype)
  cast = lambda v: v.astype(common)
  oracle = lambda w, x: cast(x) @ cast(w["lora_a"]) @ cast(w["lora_b"])
  assert_gradients_close(model, oracle, weights, normal(3, (5, 3), input_dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lora_dtype", [None, jnp.bfloat16])
def test_lora_linear_equals_linen_and_two_products(dtype, lora_dtype):
  options = {"dtype": dtype, "param_dtype": dtype}
  model = nnx.LoRALinear(
    3, 4, lora_rank=2, lora_dtype=lora_dtype, lora_param_dtype=dtype, rngs=nnx.Rngs(0), **options
  )
  shapes = {"kernel": (3, 4), "bias": (4,), "lora_a": (3, 2), "lora_b": (2, 4)}
  weights = {name: normal(i, shape, dtype) for i, (name, shape) in enumerate(shapes.items())}
  layer = linen.Dense(4, **options)

  def oracle(w, x):
    cast = lambda v: v.astype(lora_dtype or dtype)
    base = layer.apply({"params": {"kernel": w["kernel"], "bias": w["bias"]}}, x)
    return base + cast(x) @ cast(w["lora_a"]) @ cast(w["lora_b"])

  assert_gradients_close(model, oracle, weights, normal(9, (5, 3), dtype))
