"""A layer of Refax and its twin in Flax Linen: same weights, then outputs, gradients and state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx

linen = pytest.importorskip("flax.linen", reason="numerics are compared with Flax Linen")

TOLERANCE = {jnp.dtype(jnp.float32): 2e-6, jnp.dtype(jnp.bfloat16): 1e-2}
QUICK = {"xla_backend_optimization_level": 0}
"""Compile fast: what is computed here is small and runs once."""

GRADIENT_TOLERANCE = {jnp.dtype(jnp.float32): 1e-5, jnp.dtype(jnp.bfloat16): 1e-2}


def normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
  """Normal numbers, drawn by NumPy: JAX would compile a program for each shape."""
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def share_weights(model: nnx.Module, layer: Any, *inputs: Any, **kwargs: Any) -> Any:
  """Random values for all variables of the Linen layer, also written into the Refax one."""
  shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), *inputs, **kwargs))
  leaves, treedef = jax.tree.flatten(shapes)
  values = [jnp.asarray(_positive(i, s)) for i, s in enumerate(leaves)]
  variables = treedef.unflatten(values)
  for collection in variables.values():
    for name, value in collection.items():
      own = getattr(model, name)
      assert own.dtype == value.dtype
      own[...] = np.reshape(value, own.shape)
  return variables


def _positive(seed: int, like: Any) -> np.ndarray:
  """Away from 0: also good for a variance."""
  values = np.random.default_rng(seed).standard_normal(like.shape)
  return (0.5 + np.abs(values)).astype(like.dtype)


LARGEST: dict[tuple[str, str, str], float] = {}
"""The largest relative difference seen, by layer, oracle and dtype; `conftest.py` writes it out."""


def assert_close(
  got: Any,
  want: Any,
  tolerance: dict = TOLERANCE,
  *,
  of: tuple[str, str] | None = None,
) -> None:
  """Compare relatively to the largest element, if that is above 1.

  Args:
    got: what Refax computes.
    want: what the oracle computes, in the same dtype.
    tolerance: by dtype.
    of: the names of the layer and of its oracle, for the table in the docs.
  """
  got, want = np.asarray(got), np.asarray(want)
  assert got.dtype == want.dtype
  assert got.shape == want.shape
  dtype, limit = got.dtype, tolerance[got.dtype]
  got, want = got.astype(np.float32), want.astype(np.float32)
  scale = max(1.0, float(np.abs(want).max(initial=0.0)))
  np.testing.assert_allclose(got / scale, want / scale, rtol=limit, atol=limit)
  if of is not None:
    difference = float(np.nanmax(np.abs(got - want), initial=0.0)) / scale
    key = (*of, str(dtype))
    LARGEST[key] = max(LARGEST.get(key, 0.0), difference)


def assert_twins(
  model: nnx.Module,
  layer: Any,
  variables: Any,
  x: Any,
  *,
  ours: Callable = lambda model, x: model(x),
  kwargs: dict[str, Any] | None = None,
) -> Any:
  """Compare outputs, gradients of parameters and input, and state after one call.

  Args:
    model: the Refax layer; its state moves on by one call.
    layer: the Linen layer.
    variables: the weights and state of `layer`, the same as those of `model`.
    x: the input.
    ours: how `model` is called.
    kwargs: keyword arguments of the call of `layer`.

  Returns:
    The variables of `layer` after the call.
  """
  params = variables.get("params", {})
  state = {k: v for k, v in variables.items() if k != "params"}

  def linen_loss(params, x):
    y, new = layer.apply({"params": params, **state}, x, mutable=list(state), **kwargs or {})
    return project(y), (y, new)

  graphdef, own_params, own_rest = nnx.split(model, nnx.Param, ...)

  def refax_loss(params, x):
    y = ours(nnx.merge(graphdef, params, own_rest), x)
    return project(y), y

  where = (0, 1) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.inexact) else 0
  want, (y, new) = jax.jit(jax.grad(linen_loss, where, has_aux=True), compiler_options=QUICK)(
    params, x
  )
  got, own_y = jax.jit(jax.grad(refax_loss, where, has_aux=True), compiler_options=QUICK)(
    nnx.to_lojax(own_params), x
  )
  of = (type(model).__name__, "Flax Linen")
  assert_close(own_y, y, of=of)
  if where == 0:
    want, got = (want,), (got,)
  for name, gradient in want[0].items():
    own = got[0][name][...]
    assert_close(own, np.reshape(gradient, own.shape), GRADIENT_TOLERANCE, of=of)
  if len(want) > 1:
    assert_close(got[1], want[1], GRADIENT_TOLERANCE, of=of)
  for name, value in new.get("batch_stats", {}).items():
    assert_close(getattr(model, name)[...], value, of=of)
  return {"params": params, **new}


def project(y: jax.Array) -> jax.Array:
  """A number to which each element of `y` contributes in its own way."""
  weights = np.cos(np.arange(y.size, dtype=np.float32)).reshape(y.shape)
  return (y.astype(jnp.float32) * weights).sum()
