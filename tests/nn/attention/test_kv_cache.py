"""A memory that is full: an error where one can be raised, else NaN that `checkify` names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from refax import _jax, nnx
from refax.nn.attention.kv_cache import poison
from tests.numerics.twin import normal

SIZE = 4


def attention(hijax=True):
  with nnx.use_hijax(hijax):
    layer = nnx.MultiHeadAttention(2, 8, rope=nnx.RoPE(), rngs=nnx.Rngs(0))
    layer.init_cache((2, SIZE, 8))
  return layer


def scanned(layer, x):
  step = lambda _, token: (None, layer(token[:, None], decode=True)[:, 0])
  return jnp.swapaxes(jax.lax.scan(step, None, jnp.swapaxes(x, 0, 1))[1], 0, 1)


def at_once(layer, x):
  return layer(x, decode=True)


def one_by_one(layer, x):
  return jnp.concatenate([layer(x[:, i : i + 1], decode=True) for i in range(x.shape[1])], 1)


def remat(layer, x):
  return nnx.remat(one_by_one)(layer, x)


def branch(layer, x):
  return nnx.cond(x[0, 0, 0] < jnp.inf, one_by_one, lambda layer, x: x, layer, x)


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit], ids=["jax.jit", "nnx.jit"])
@pytest.mark.parametrize("run", [scanned, at_once, one_by_one, remat, branch])
@pytest.mark.parametrize("before", [0, 3])
def test_what_has_no_room_gives_nan_and_all_else_is_right(jit, run, before):
  layer, x = attention(), normal(0, (2, before + 4 if run is at_once else 6, 8))
  want = layer(x[:, :SIZE], is_causal=True)
  if before:
    layer(x[:, :before], decode=True)
  got = jit(run)(layer, x[:, before:])
  assert bool(jnp.isnan(got[:, SIZE - before :]).all())
  np.testing.assert_allclose(got[:, : SIZE - before], want[:, before:], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(layer.cached_value, layer.value(x[:, :SIZE]), rtol=1e-5, atol=1e-5)
  assert int(layer.cache_index) == SIZE
  assert bool(jnp.isnan(jit(at_once)(layer, x[:, :1])).all())  # it stays full


def test_memories_of_a_batch_are_full_one_by_one():
  layers = nnx.vmap(lambda rngs: nnx.MultiHeadAttention(2, 8, rngs=rngs))(nnx.Rngs(0).split(2))
  nnx.vmap(lambda layer: layer.init_cache((SIZE, 8)))(layers)
  layers.cache_index[...] = jnp.array([3, 1])
  got = nnx.vmap(at_once)(layers, normal(0, (2, 2, 8)))
  assert jnp.isnan(got).all(-1).tolist() == [[False, True], [False, False]]
  assert layers.cache_index.tolist() == [4, 3]


@pytest.mark.parametrize(
  ("run", "hijax"), [(scanned, True), (remat, True), (branch, True), (at_once, False)]
)
def test_checkify_names_the_layer(run, hijax):
  x = normal(0, (2, SIZE, 8))
  for wrap in (lambda f: f, nnx.jit):
    layer, f = attention(hijax), nnx.checkify(wrap(run))
    error, out = f(layer, x[:, 1:])
    error.throw()
    assert bool(jnp.isfinite(out).all())
    error, out = f(layer, x[:, 1:])
    with pytest.raises(checkify.JaxRuntimeError, match="the memory of MultiHeadAttention is full"):
      error.throw()
    assert bool(jnp.isnan(out[:, -1]).all())


def test_gradients_past_the_end_are_nan_and_those_before_are_right():
  layer, x = attention(), normal(0, (2, SIZE, 8))

  def loss(layer, x):
    return (layer(x, decode=True) ** 2).sum()

  step = nnx.jit(nnx.grad(loss, through=nnx.Cache))
  fine = step(layer, x)
  want = nnx.grad(lambda layer: (layer(x, is_causal=True) ** 2).sum())(layer)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    nnx.to_pure_dict(fine),
    nnx.to_pure_dict(want),
  )
  full = step(layer, x)
  assert bool(jnp.isnan(full["out"]["kernel"][...]).all())


@pytest.mark.skipif(_jax._checked is None, reason="debug_check has an effect")
def test_a_compiled_step_stays_on_the_fast_path_of_jax():
  layer, x = attention(), normal(0, (2, 1, 8))
  graphdef, state = nnx.split(nnx.to_lojax(layer))
  step = lambda state, x: nnx.merge(graphdef, state)(x, decode=True)
  assert not jax.make_jaxpr(step)(state, x).effects


def test_an_integer_that_nobody_takes_for_a_result():
  assert [poison(t) for t in (jnp.int8, jnp.uint8, jnp.int32)] == [-128, 255, -(2**31)]
  assert all(np.isnan(poison(t)) for t in (jnp.float32, jnp.bfloat16, jnp.complex64))
