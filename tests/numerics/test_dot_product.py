import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from refax import nnx
from tests.numerics.twin import GRADIENT_TOLERANCE, QUICK, assert_close, linen, normal, project

OF = ("dot_product_attention", "Flax Linen")


def value_and_gradients(attend, inputs):
  fn = lambda *inputs: ((y := attend(*inputs)), project(y))[::-1]
  fn = jax.jit(
    jax.value_and_grad(fn, argnums=tuple(range(len(inputs))), has_aux=True), compiler_options=QUICK
  )
  (_, y), gradients = fn(*inputs)
  return y, gradients


@settings(max_examples=5, deadline=None)
@given(
  batch=st.sampled_from(((), (2,), (2, 3))),
  sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
  heads=st.sampled_from(((1, 1), (3, 3), (4, 2), (3, 1))),
  causal=st.booleans(),
  extras=st.tuples(st.booleans(), st.booleans()),
  shared=st.lists(st.booleans(), min_size=3, max_size=3),
  dropout=st.sampled_from((None, True, False)),
)
def test_both_ways_and_linen_are_equal(batch, sizes, heads, causal, extras, shared, dropout):
  (queries, keys), (many, few) = sizes, heads
  inputs = [normal(0, (*batch, queries, many, 4))]
  inputs += [normal(i, (*batch, keys, few, 4)) for i in (1, 2)]
  full = (*batch[1:], many, queries, keys)
  single = [*shared[:1] * len(batch[1:]), *shared]
  shape = tuple(1 if one else n for one, n in zip(single, full, strict=True))
  if extras[0]:
    inputs.append(normal(3, (1,) * bool(batch) + shape))
  mask = normal(4, shape) > -0.3 if extras[1] else None
  options = {"broadcast_dropout": bool(dropout)}
  if dropout is not None:
    options |= {"dropout_rate": 0.4, "dropout_rng": jax.random.key(5)}

  def ours(q, k, v, bias=None, **more):
    return nnx.dot_product_attention(q, k, v, bias, mask, is_causal=causal, **options, **more)

  def theirs(q, k, v, bias=None):
    k, v = (jnp.repeat(x, many // few, axis=-2) for x in (k, v))
    tri = jnp.tri(queries, keys, dtype=bool)
    both = tri if mask is None else mask & tri
    return linen.dot_product_attention(q, k, v, bias, both if causal else mask, **options)

  want = value_and_gradients(theirs, inputs)
  for more in ({}, {"precision": "default"}):
    got = value_and_gradients(lambda *xs, more=more: ours(*xs, **more), inputs)
    assert_close(got[0], want[0], of=OF)
    for own, other in zip(got[1], want[1], strict=True):
      assert_close(own, other, GRADIENT_TOLERANCE, of=OF)


def test_both_ways_are_equal_in_bfloat16():
  inputs = [normal(i, (2, 5, 4, 8), jnp.bfloat16) for i in range(3)]
  fused = value_and_gradients(nnx.dot_product_attention, inputs)
  here = value_and_gradients(
    lambda *xs: nnx.dot_product_attention(*xs, precision="default"), inputs
  )
  wanted = value_and_gradients(linen.dot_product_attention, inputs)
  for got, want, linens in zip(*map(jax.tree.leaves, (fused, here, wanted)), strict=True):
    assert_close(got, want)
    assert_close(got, linens, {jnp.dtype(jnp.bfloat16): 3e-2}, of=OF)  # its softmax is bfloat16


def test_masks_equal_those_of_linen():
  q, k = np.arange(6).reshape(2, 3) % 2, np.arange(8).reshape(2, 4) % 3
  args = (q, k, jnp.greater_equal, 1, jnp.int32)
  mask, want = nnx.make_attention_mask(*args), linen.make_attention_mask(*args)
  np.testing.assert_array_equal(mask, want)
  np.testing.assert_array_equal(nnx.make_causal_mask(q, 2), linen.make_causal_mask(q, 2))
  combined = nnx.combine_masks(mask, None, mask[:, :1] == 0)
  np.testing.assert_array_equal(combined, linen.combine_masks(want, None, want[:, :1] == 0))
