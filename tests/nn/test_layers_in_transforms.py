"""Every layer that keeps a shape computes the same, with the same state, in every transform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx

X = jax.random.normal(jax.random.key(0), (4, 6, 8))

LAYERS = {
  "Linear": lambda rngs: nnx.Linear(8, 8, rngs=rngs),
  "LinearGeneral": lambda rngs: nnx.LinearGeneral(8, 8, rngs=rngs),
  "Einsum": lambda rngs: nnx.Einsum("...i,ij->...j", (8, 8), (8,), rngs=rngs),
  "Conv": lambda rngs: nnx.Conv(8, 8, (3,), rngs=rngs),
  "ConvTranspose": lambda rngs: nnx.ConvTranspose(8, 8, (3,), rngs=rngs),
  "BatchNorm": lambda rngs: nnx.BatchNorm(8, rngs=rngs),
  "LayerNorm": lambda rngs: nnx.LayerNorm(8, rngs=rngs),
  "RMSNorm": lambda rngs: nnx.RMSNorm(8, rngs=rngs),
  "GroupNorm": lambda rngs: nnx.GroupNorm(8, 2, rngs=rngs),
  "InstanceNorm": lambda rngs: nnx.InstanceNorm(8, rngs=rngs),
  "SpectralNorm": lambda rngs: nnx.SpectralNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs),
  "WeightNorm": lambda rngs: nnx.WeightNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs),
  "Dropout": lambda rngs: nnx.Dropout(0.5, rngs=rngs),
  "LoRALinear": lambda rngs: nnx.LoRALinear(8, 8, lora_rank=2, rngs=rngs),
  "PReLU": lambda rngs: nnx.PReLU(),
  "RNN of LSTMCell": lambda rngs: nnx.RNN(nnx.LSTMCell(8, 8, rngs=rngs)),
  "RNN of GRUCell": lambda rngs: nnx.RNN(nnx.GRUCell(8, 8, rngs=rngs)),
  "MultiHeadAttention": lambda rngs: nnx.MultiHeadAttention(
    2, 8, dropout_rate=0.2, deterministic=False, rngs=rngs
  ),
  "TransformerBlock": lambda rngs: nnx.TransformerBlock(8, 2, dropout_rate=0.2, rngs=rngs),
  "Residual": lambda rngs: nnx.Residual(nnx.Linear(8, 8, rngs=rngs)),
}


def build(name, seed=0):
  return LAYERS[name](nnx.Rngs(seed))


def assert_close(a, b):
  np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def assert_same_state(a, b):
  plain = lambda m: nnx.to_flat_state(nnx.state(m))
  for (path, x), (_, y) in zip(plain(a), plain(b), strict=True):
    x, y = x[...], y[...]
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5, err_msg=str(path))


CALLS = {
  "jax.jit": lambda: jax.jit(lambda m, x: m(x)),
  "nnx.jit": lambda: nnx.jit(lambda m, x: m(x)),
  "nnx.remat": lambda: jax.jit(nnx.remat(lambda m, x: m(x))),
  "jax.checkpoint": lambda: jax.jit(jax.checkpoint(lambda m, x: m(x))),
}


SLOW = ("nnx.remat", "jax.checkpoint")


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
  "call", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CALLS]
)
def test_a_compiled_or_recomputed_layer_is_the_layer(name, call):
  model, twin, run = build(name), build(name), CALLS[call]()
  for _ in range(2):
    assert_close(run(model, X), twin(X))
  assert_same_state(model, twin)


@pytest.mark.parametrize("name", LAYERS)
def test_an_ensemble_is_its_members(name):
  members = [build(name, seed) for seed in range(3)]
  ensemble = nnx.Stack.of(members).layers
  got = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(ensemble, X)
  for i, member in enumerate(members):
    assert_close(got[i], member(X))
  assert_same_state(ensemble, nnx.Stack.of(members).layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_in_a_stack_with_remat_are_those_of_the_layers(name):
  stack = nnx.Stack(lambda *, rngs: LAYERS[name](rngs), 3, rngs=nnx.Rngs(0), remat=True)
  layers = nnx.List(stack)

  def one_by_one(layers):
    y = X
    for layer in layers:
      y = layer(y)
    return y

  loss = lambda forward: jax.jit(
    lambda m: nnx.value_and_grad(lambda m: (forward(m) ** 2).mean(), wrt=nnx.Param)(m)
  )
  value, got = loss(lambda stack: stack(X))(stack)
  want_value, want = loss(one_by_one)(layers)
  assert_close(value, want_value)
  for path, g in nnx.to_flat_state(want):
    stacked = dict(nnx.to_flat_state(got))[("layers", *path[1:])]
    assert_close(stacked[...][path[0]], g[...])
  assert_same_state(stack, nnx.Stack.of(list(layers)))
