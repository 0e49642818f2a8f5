"""Memories that are rings, of a sliding window, or have a length for each sequence; cut back."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError
from tests.numerics.twin import normal

BATCH, LENGTH, SIZE = 2, 17, 8
X = normal(0, (BATCH, LENGTH, SIZE))
PIECES = {"one by one": [1] * 17, "mixed": [3, 1, 6, 1, 1, 5], "at once": [17], "long": [2, 9, 6]}
same = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def attention(window=None, **options):
  layer = nnx.MultiHeadAttention(
    2, SIZE, num_kv_heads=1, rope=nnx.RoPE(), sliding_window=window, rngs=nnx.Rngs(0)
  )
  layer.init_cache((BATCH, LENGTH, SIZE), **options)
  return layer


def decoded(layer, x, pieces, jit=jax.jit):
  call = (
    jit(lambda layer, x: layer(x, decode=True)) if jit else lambda layer, x: layer(x, decode=True)
  )
  ends = list(itertools.accumulate(pieces))
  return jnp.concatenate(
    [call(layer, x[:, e - n : e]) for n, e in zip(pieces, ends, strict=True)], 1
  )


@pytest.mark.parametrize("window, pieces, per_sequence, jit", [
  (None, "mixed", False, nnx.jit), (None, "mixed", True, jax.jit), (None, "long", True, nnx.jit),
  (1, "mixed", False, jax.jit), (1, "at once", True, jax.jit), (4, "one by one", False, nnx.jit),
  (4, "one by one", True, None), (4, "mixed", False, jax.jit), (4, "mixed", True, nnx.jit),
  (4, "at once", False, nnx.jit), (4, "long", True, jax.jit), (16, "mixed", False, jax.jit),
  (16, "long", True, nnx.jit), (17, "mixed", True, jax.jit), (40, "mixed", False, jax.jit),
])  # fmt: skip
def test_decoding_is_attention_of_the_window(window, pieces, per_sequence, jit):
  layer = attention(window, per_sequence=per_sequence)
  want = layer(X, is_causal=True)
  if window is not None:
    seen = jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH) < window
    layer.sliding_window = None
    same(want, layer(X, is_causal=True, mask=seen[None, None]))
    layer.sliding_window = window
    assert layer.cached_key.shape[1] == min(window, LENGTH)
  same(decoded(layer, X, PIECES[pieces], jit), want)
  assert layer.cache_index.shape == ((BATCH,) if per_sequence else ())
  assert np.all(layer.cache_index[...] == LENGTH)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("pieces", [[1] * 6, [2, 4], [6]])
def test_sequences_of_different_lengths(window, pieces):
  layer = attention(window, per_sequence=True, spare=5)
  want = layer(X, is_causal=True)
  decoded(layer, X[:, :8], [8])
  layer.truncate_cache(jnp.array([8, 3]))
  rest = jnp.stack([X[0, 8:14], X[1, 3:9]])
  got = decoded(layer, rest, pieces)
  same(got, jnp.stack([want[0, 8:14], want[1, 3:9]]))
  assert layer.cache_index[...].tolist() == [14, 9]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("window, spare, back, holds", [
  (None, 0, 9, True), (4, 0, 1, True), (4, 0, 2, False), (4, 3, 4, True), (4, 3, 5, False),
  (4, 0, 12, True), (16, 0, 11, True), (None, 0, 13, False), (None, 0, -1, False), (4, 3, 0, True),
])  # fmt: skip
def test_a_memory_is_cut_to_what_it_holds_or_not_at_all(window, spare, back, holds, jit):
  layer = attention(window, spare=spare)
  want = layer(X, is_causal=True)
  decoded(layer, X[:, :12], [12])
  cut = lambda layer: layer.truncate_cache(12 - back)
  if holds:
    (jax.jit(cut) if jit else cut)(layer)
    if back == 12:
      same(decoded(layer, X, [1] * 8 + [9]), want)
    else:
      same(decoded(layer, X[:, 12 - back :], [1] * (5 + back)), want[:, 12 - back :])
  elif jit:
    jax.jit(cut)(layer)
    for _ in range(3):  # it stays lost
      assert bool(jnp.isnan(decoded(layer, X[:, :1], [1])).all())
  else:
    with pytest.raises(InvalidArgumentError, match=r"truncate_cache(.|\n)*lengths that the memory"):
      cut(layer)
    assert int(layer.cache_index) == 12


def test_a_mask_does_not_go_with_a_ring():
  layer = attention(4)
  with pytest.raises(InvalidArgumentError, match="sliding window"):
    layer(X[:, :1], decode=True, mask=jnp.ones((1, 1, 1, 4)))
  assert int(layer.cache_index) == 0


def test_without_batch_axes_and_with_two():
  for batch in [(), (2, 3)]:
    layer = nnx.MultiHeadAttention(2, SIZE, rope=nnx.RoPE(), sliding_window=4, rngs=nnx.Rngs(0))
    x = normal(1, (*batch, 9, SIZE))
    want = layer(x, is_causal=True)
    for per_sequence in (False, True):
      layer.init_cache((*batch, 9, SIZE), per_sequence=per_sequence)
      call = nnx.jit(lambda layer, x: layer(x, decode=True))
      pieces = [call(layer, x[..., a:b, :]) for a, b in [(0, 2), (2, 3), (3, 9)]]
      same(jnp.concatenate(pieces, -2), want)


def test_in_a_scan_under_vmap_and_in_a_stack():
  layer = attention(4)
  want = layer(X, is_causal=True)
  step = lambda _, x: (None, layer(x[:, None], decode=True)[:, 0])
  got = jax.jit(lambda x: jax.lax.scan(step, None, jnp.swapaxes(x, 0, 1))[1])(X)
  same(jnp.swapaxes(got, 0, 1), want)
  for scan_layers in (True, False):
    options = {"scan_layers": scan_layers, "sliding_window": 4, "rope": nnx.RoPE()}
    decoder = nnx.TransformerDecoder(3, SIZE, 2, rngs=nnx.Rngs(1), **options)
    want = decoder(X)
    nnx.init_cache(decoder, BATCH, LENGTH, per_sequence=True, spare=9)
    nnx.jit(lambda d, x: d(x, decode=True))(decoder, X[:, :12])
    assert nnx.cache_length(decoder).tolist() == [12, 12]
    nnx.truncate_cache(decoder, jnp.array([3, 7]))
    got = decoded(decoder, jnp.stack([X[0, 3:9], X[1, 7:13]]), [1, 5], nnx.jit)
    same(got, jnp.stack([want[0, 3:9], want[1, 7:13]]))
