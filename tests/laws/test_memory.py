"""State costs no memory that a hand-written function does not need; measured by the compiler."""

import jax
import jax.numpy as jnp
import pytest

from refax import nnx

LAYERS, SIZE = 8, 256
PARAMETERS = LAYERS * SIZE * SIZE * 4  # bytes
X = jnp.ones((8, SIZE))


class Layer(nnx.Module):
  def __init__(self, rngs):
    self.w = nnx.Param(rngs.normal((SIZE, SIZE)) * 0.02)
    self.mean = nnx.BatchStat(jnp.zeros(SIZE))

  def __call__(self, x):
    self.mean[...] = x.mean(0)
    return jnp.tanh(x @ self.w)


def temporaries(f, *args):
  return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


def by_hand(w, x):
  def body(x, w):
    return jnp.tanh(x @ w), x.mean(0)

  def loss(w):
    y, means = jax.lax.scan(jax.checkpoint(body), x, w)
    return y.sum(), means

  return jax.grad(loss, has_aux=True)(w)


def with_plain_jax(stack, x):
  layer = jax.checkpoint(lambda layer, x: layer(x))
  loss = lambda stack: jax.lax.scan(lambda x, block: (layer(block, x), None), x, stack)[0].sum()
  return nnx.grad(loss)(stack)["w"][...]


def with_nnx(stack, x):
  layer = nnx.remat(lambda layer, x: layer(x))
  loss = lambda stack: nnx.scan(lambda x, block: layer(block, x), out_axes=nnx.Carry)(
    x, stack
  ).sum()
  return nnx.grad(loss)(stack)["w"][...]


@pytest.mark.parametrize("f", [with_plain_jax, with_nnx])
def test_no_copy_of_the_parameters_is_among_the_residuals(f):
  stack = nnx.vmap(Layer)(nnx.Rngs(0).split(LAYERS))
  want = temporaries(by_hand, stack.w[...], X)
  assert want < PARAMETERS / 2
  assert temporaries(f, stack, X) <= 1.05 * want


def test_accumulated_gradients_take_the_activations_of_one_microbatch():
  class Wide(nnx.Module):
    def __init__(self):
      self.w = nnx.Param(jnp.ones((4, 4096)))

    def __call__(self, x):
      return jnp.tanh(jnp.tanh(x @ self.w) @ self.w[...].T)

  model, x = Wide(), jnp.ones((512, 4))
  loss = lambda model, x: (model(x) ** 2).mean()
  whole = temporaries(lambda m, x: nnx.value_and_grad(loss)(m, x), nnx.to_lojax(model), x)
  parts = temporaries(
    lambda m, x: nnx.accumulate_grads(loss, steps=8)(m, x), nnx.to_lojax(model), x
  )
  assert parts < whole / 3
