import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from tests.numerics.twin import GRADIENT_TOLERANCE, assert_close, linen, normal, project


def rotated(x, positions, theta=10000.0):
  """RoPE by complex numbers, in NumPy."""
  half = x.shape[-1] // 2
  angles = positions[:, None] * theta ** (-np.arange(half) / half)
  z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
  return np.concatenate([z.real, z.imag], -1).astype(np.float32)


@pytest.mark.parametrize("shape", [(5, 8), (2, 7, 4), (2, 3, 6, 2)])
def test_rope_equals_complex_numbers(shape):
  x = np.asarray(normal(0, shape))
  want = jnp.asarray(rotated(x, np.arange(shape[-2])))
  assert_close(nnx.RoPE()(x), want, of=("RoPE", "complex numbers in NumPy"))


def block_of_linen(block, x):
  """The weights of a Refax block in layers of Linen."""
  params = nnx.to_pure_dict(nnx.to_lojax(nnx.state(block, nnx.Param)))
  attention = linen.MultiHeadDotProductAttention(num_heads=2)
  norm, up, down = linen.LayerNorm(), linen.Dense(32), linen.Dense(8)

  def run(params, x):
    def add(x, f, name):
      norm_params = {"params": params[f"{name}_norm"]}
      return (
        x + f(norm.apply(norm_params, x)) if block.pre_norm else norm.apply(norm_params, x + f(x))
      )

    mask = linen.make_causal_mask(jnp.ones(x.shape[:2])) if block.is_causal else None
    attend = lambda y: attention.apply({"params": params["attention"]}, y, mask=mask)
    mlp = params["feed_forward"]
    feed = lambda y: down.apply(
      {"params": mlp["down"]}, nnx.gelu(up.apply({"params": mlp["up"]}, y))
    )
    return add(add(x, attend, "attention"), feed, "feed_forward")

  return params, run


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_transformer_block_equals_the_parts_of_linen(pre_norm, is_causal):
  block = nnx.TransformerBlock(8, 2, pre_norm=pre_norm, is_causal=is_causal, rngs=nnx.Rngs(0))
  for i, (_, p) in enumerate(nnx.to_flat_state(nnx.state(block, nnx.Param))):
    p[...] = normal(i, p.shape) / 2
  x = normal(99, (2, 5, 8))
  params, run = block_of_linen(block, x)
  of = ("TransformerBlock", "Flax Linen's parts")
  assert_close(block(x), run(params, x), of=of)
  want = jax.grad(lambda params: project(run(params, x)))(params)
  got = nnx.to_pure_dict(nnx.grad(lambda block: project(block(x)))(block))
  jax.tree.map(lambda a, b: assert_close(a, b, GRADIENT_TOLERANCE, of=of), got, want)


@pytest.mark.parametrize("remat", [False, True])
def test_a_stack_equals_its_layers(remat):
  stack = nnx.Stack(nnx.TransformerBlock, 3, 8, 2, rngs=nnx.Rngs(0), remat=remat)
  x, layers = normal(0, (2, 5, 8)), nnx.List(stack)

  def one_by_one(layers):
    y = x
    for layer in layers:
      y = layer(y)
    return y

  of = ("Stack", "its layers one by one")
  assert_close(stack(x), one_by_one(layers), of=of)
  got = nnx.grad(lambda stack: project(stack(x)))(stack)["layers"]
  want = nnx.grad(lambda layers: project(one_by_one(layers)))(layers)
  for i in range(3):
    for path, g in nnx.to_flat_state(want[i]):
      stacked = dict(nnx.to_flat_state(got))[path]
      assert_close(stacked[...][i], g[...], GRADIENT_TOLERANCE, of=of)
