import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import (
  InvalidArgumentError,
  MissingArgumentError,
  MissingRngError,
  ShapeMismatchError,
)
from tests.numerics.twin import normal


def attention(heads=4, features=8, *, rngs=None, **options):
  return nnx.MultiHeadAttention(heads, features, rngs=rngs or nnx.Rngs(0), **options)


def assert_close(got, want):
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


def test_it_is_attention_between_projections():
  layer, x = attention(num_kv_heads=2, bias_init=nnx.initializers.normal()), normal(0, (2, 5, 8))
  query, key, value = layer.query(x), layer.key(x), layer.value(x)
  assert (query.shape, key.shape, value.shape) == ((2, 5, 4, 2), (2, 5, 2, 2), (2, 5, 2, 2))
  out = nnx.dot_product_attention(query, key, value, is_causal=True)
  want = jnp.einsum("bqhd,hdo->bqo", out, layer.out.kernel[...]) + layer.out.bias[...]
  assert_close(layer(x, is_causal=True), want)


def test_parameters_have_the_shapes_of_flax():
  layer = attention(2, 8, qkv_features=12, out_features=10, in_kv_features=5, normalize_qk=True)
  shapes = {".".join(path): p.shape for path, p in nnx.to_flat_state(nnx.state(layer))}
  assert shapes == {
    "query.kernel": (8, 2, 6), "query.bias": (2, 6), "query_ln.scale": (6,),
    "key.kernel": (5, 2, 6), "key.bias": (2, 6), "key_ln.scale": (6,),
    "value.kernel": (5, 2, 6), "value.bias": (2, 6), "out.kernel": (2, 6, 10), "out.bias": (10,),
  }  # fmt: skip


def test_inputs_that_are_left_out_follow_those_before():
  layer, q, k = attention(), normal(0, (2, 5, 8)), normal(1, (2, 3, 8))
  np.testing.assert_array_equal(layer(q), layer(q, q, q))
  np.testing.assert_array_equal(layer(q, k), layer(q, k, k))
  np.testing.assert_array_equal(layer(nnx.Variable(q)), layer(q))


def test_initializers_and_metadata_of_the_output_follow_the_others():
  ones, zeros = nnx.initializers.ones, nnx.initializers.zeros
  layer = attention(kernel_init=ones, bias_init=ones, kernel_metadata={"tag": "k"})
  assert (layer.out.kernel[...] == 1).all()
  assert (layer.out.bias[...] == 1).all()
  assert layer.out.kernel.tag == layer.query.kernel.tag == "k"
  layer = attention(
    kernel_init=ones, out_kernel_init=zeros, bias_init=ones, out_bias_init=zeros,
    bias_metadata={"tag": "b"}, out_bias_metadata={"tag": "o"}, out_kernel_metadata={"tag": "p"},
    normalize_qk=True, query_ln_scale_metadata={"tag": "q"}, key_ln_scale_metadata={"tag": "l"},
  )  # fmt: skip
  assert not layer.out.kernel[...].any()
  assert not layer.out.bias[...].any()
  tags = (
    layer.query.bias,
    layer.out.bias,
    layer.out.kernel,
    layer.query_ln.scale,
    layer.key_ln.scale,
  )
  assert "".join(p.tag for p in tags) == "bopql"


def test_the_function_gets_what_it_needs_and_no_more():
  seen = {}

  def attend(query, key, value, **kwargs):
    seen.update(kwargs)
    return query

  layer, x = attention(attention_fn=attend, precision="highest"), jnp.ones((2, 5, 8))
  layer(x)
  assert seen == {
    "mask": None, "dropout_rng": None, "dropout_rate": 0.0, "broadcast_dropout": True,
    "deterministic": True, "dtype": None, "precision": "highest", "module": None,
  }  # fmt: skip
  layer(x, is_causal=True, input_positions=jnp.arange(5))
  assert seen["is_causal"] is True
  assert seen["input_positions"].shape == (5,)


def test_the_implementation_is_passed_on():
  layer, x = attention(implementation="xla"), normal(0, (2, 5, 8))
  assert_close(layer(x), attention()(x))
  with pytest.raises(InvalidArgumentError, match=r"implementation='cudnn'\n  fix: pass None"):
    attention(implementation="cudnn")(x, sow_weights=True)


def test_positions_reach_the_rope():
  rope, x = nnx.RoPE(), normal(0, (2, 5, 8))
  layer, plain = attention(rope=rope), attention()
  attend = functools.partial(nnx.dot_product_attention_with_rope, rope=rope)
  as_in_flax = attention(attention_fn=attend)
  for positions in (None, jnp.arange(5) * 3, jnp.arange(10).reshape(2, 5) ** 2):
    got = layer(x, is_causal=True, input_positions=positions)
    assert_close(got, as_in_flax(x, is_causal=True, input_positions=positions))
  assert_close(layer(x, input_positions=jnp.arange(5) + 6), layer(x))
  assert abs(layer(x) - plain(x)).max() > 1e-4
  moved = x[:, ::-1]
  assert abs(layer(x) - layer(moved)[:, ::-1]).max() > 1e-4
  assert_close(plain(x), plain(moved)[:, ::-1])


# Dropout


def test_dropout_draws_from_a_stream_of_its_own():
  layer, x = attention(dropout_rate=0.5), jnp.ones((2, 5, 8))
  assert layer.rngs.tag == "default"
  layer.train()
  first, second = layer(x), layer(x)
  assert (first != second).any()
  assert int(layer.rngs.count) == 2
  np.testing.assert_array_equal(layer(x, deterministic=True), layer(x, deterministic=True))
  layer.eval()
  np.testing.assert_array_equal(layer(x), attention()(x))
  assert int(layer.rngs.count) == 2
  rngs = lambda: nnx.Rngs(dropout=3)
  got = layer(x, deterministic=False, rngs=rngs())
  np.testing.assert_array_equal(got, layer(x, deterministic=False, rngs=rngs().dropout))
  assert attention().rngs is None
  assert attention(dropout_rate=0.5, keep_rngs=False).rngs is None


def test_dropout_must_be_told_and_needs_random_numbers():
  layer, x = attention(dropout_rate=0.5, keep_rngs=False), jnp.ones((2, 5, 8))
  with pytest.raises(MissingArgumentError, match="MultiHeadAttention was not told deterministic"):
    layer(x)
  with pytest.raises(MissingRngError, match=r"HeadAttention needs(.|\n)*nnx.Rngs\(dropout=0\)"):
    layer(x, deterministic=False)
  with pytest.raises(InvalidArgumentError, match=r"got: rngs=7\n  fix: pass rngs=nnx.Rngs"):
    layer(x, deterministic=False, rngs=7)


# Decoding

VARIANTS = pytest.mark.parametrize("options", [
  {}, {"num_kv_heads": 2}, {"rope": nnx.RoPE()},
  {"num_kv_heads": 1, "rope": nnx.RoPE(100.0), "normalize_qk": True},
], ids=["plain", "GQA", "RoPE", "all"])  # fmt: skip


def eager(layer, x):
  return jnp.concatenate([layer(x[:, i : i + 1], decode=True) for i in range(x.shape[1])], 1)


def compiled(jit):
  def run(layer, x):
    step = jit(lambda layer, token: layer(token, decode=True))
    return jnp.concatenate([step(layer, x[:, i : i + 1]) for i in range(x.shape[1])], 1)

  return run


def scanned(layer, x):
  step = lambda _, token: (None, layer(token[:, None], decode=True)[:, 0])
  return jnp.swapaxes(jax.lax.scan(step, None, jnp.swapaxes(x, 0, 1))[1], 0, 1)


def scanned_by_nnx(layer, x):
  step = nnx.scan(
    lambda layer, token: layer(token[:, None], decode=True)[:, 0], in_axes=(None, 1), out_axes=1
  )
  return step(layer, x)


def all_at_once(layer, x):
  return layer(x, decode=True)


def in_pieces(layer, x):
  pieces = x[:, :3], x[:, 3:4], x[:, 4:]
  return jnp.concatenate([layer(piece, decode=True) for piece in pieces], 1)


@VARIANTS
@pytest.mark.parametrize("run", [
  eager, compiled(jax.jit), compiled(nnx.jit), scanned, scanned_by_nnx, all_at_once, in_pieces,
], ids=["eager", "jax.jit", "nnx.jit", "lax.scan", "nnx.scan", "at once", "pieces"])  # fmt: skip
def test_decoding_is_causal_attention(options, run):
  layer, x = attention(**options), normal(0, (2, 6, 8))
  want = layer(x, is_causal=True)
  layer.init_cache((2, 7, 8))
  assert_close(run(layer, x), want)
  assert int(layer.cache_index) == 6
  assert layer.cached_key.shape == (2, 7, layer.num_kv_heads, 2)
  assert not layer.cached_key[:, 6].any()
  assert_close(layer.cached_value[:, :6], layer.value(x))


def test_the_layer_may_be_built_to_decode():
  layer, x = attention(decode=True), normal(0, (2, 6, 8))
  layer.init_cache(x.shape)
  want = layer(x, decode=False, is_causal=True)
  assert int(layer.cache_index) == 0
  assert_close(eager(layer, x), want)


def test_a_mask_hides_parts_of_the_memory():
  layer, x = attention(), normal(0, (2, 4, 8))
  padding = jnp.array([[1, 1, 1, 1], [0, 0, 1, 1]])[:, None, None]
  causal = nnx.make_causal_mask(jnp.ones((2, 4)))
  want = layer(x, mask=nnx.combine_masks(causal, padding))
  layer.init_cache(x.shape)
  steps = [layer(x[:, i : i + 1], decode=True, mask=padding) for i in range(4)]
  assert_close(jnp.concatenate(steps, 1)[:, 2:], want[:, 2:])
  layer.init_cache(x.shape)
  assert_close(layer(x, decode=True, mask=padding)[:, 2:], want[:, 2:])


def test_decoding_starts_again_with_a_new_memory_of_any_dtype():
  layer, x = attention(), normal(0, (2, 3, 8))
  layer.init_cache(x.shape)
  first = eager(layer, x)
  layer.init_cache(x.shape, jnp.bfloat16)
  assert layer.cached_key.dtype == layer.cached_value.dtype == jnp.bfloat16
  second = eager(layer, x)
  assert second.dtype == jnp.float32
  np.testing.assert_allclose(second, first, atol=2e-2)
  nnx.jit(lambda layer: layer.init_cache((2, 9, 8)))(layer)
  assert layer.cached_key.shape == (2, 9, 4, 2)
  assert int(layer.cache_index) == 0


def test_memories_are_mapped():
  layers = nnx.vmap(lambda rngs: attention(rngs=rngs))(nnx.Rngs(0).split(2))
  x = normal(0, (2, 3, 8))
  want = nnx.vmap(lambda layer, x: layer(x, is_causal=True))(layers, x)
  nnx.vmap(lambda layer: layer.init_cache((3, 8)))(layers)
  step = nnx.vmap(lambda layer, token: layer(token, decode=True))
  assert_close(jnp.concatenate([step(layers, x[:, i : i + 1]) for i in range(3)], 1), want)
  assert layers.cache_index.tolist() == [3, 3]


@pytest.mark.parametrize(("before", "more"), [(0, 4), (2, 2), (3, 1)])
def test_a_full_memory_is_refused_and_stays_as_it_is(before, more):
  layer, x = attention(dropout_rate=0.5, deterministic=False), normal(0, (2, 8, 8))
  layer.init_cache((2, 3, 8))
  if before:
    layer(x[:, :before], decode=True)
  keys, draws = layer.cached_key[...], int(layer.rngs.count)
  with pytest.raises(ShapeMismatchError) as error:
    layer(x[:, :more], decode=True)
  lines = error.value.args[0].split("\n")
  assert lines[0] == "the memory of MultiHeadAttention is full"
  assert lines[1].startswith("  at:  MultiHeadAttention.cached_key  (Cache, created at ")
  assert lines[2] == f"  got: {more} more positions, after {before} of 3"
  assert lines[3] == "  fix: call init_cache for a longer memory, or to start again"
  np.testing.assert_array_equal(layer.cached_key, keys)
  assert (int(layer.cache_index), int(layer.rngs.count)) == (before, draws)


def test_decoding_without_a_memory_is_refused():
  with pytest.raises(MissingArgumentError) as error:
    attention()(jnp.ones((2, 1, 8)), decode=True)
  assert error.value.args[0] == (
    "MultiHeadAttention has no memory to decode with\n"
    "  got: decode=True, before init_cache\n"
    "  fix: call layer.init_cache((batch, max_length, features)) first"
  )
  with pytest.raises(ShapeMismatchError, match=r"has positions\n  got: input_shape=\(8,\)\n"):
    attention().init_cache((8,))


@pytest.mark.parametrize("shapes", [((3, 1, 8),), ((1, 8),), ((2, 1, 8), (2, 2, 8))])
def test_what_does_not_fit_the_memory_is_named(shapes):
  layer = attention()
  layer.init_cache((2, 4, 8))
  with pytest.raises(ShapeMismatchError) as error:
    layer(*map(jnp.ones, shapes), decode=True)
  heads = lambda shape: (*shape[:-1], 4, 2)
  query, key = heads(shapes[0]), heads(shapes[-1])
  lines = error.value.args[0].split("\n")
  assert lines[0] == (
    "MultiHeadAttention decodes queries, keys and values of the same positions, for a batch of "
    "shape (2,)"
  )
  assert lines[2] == f"  got: query {query}, key {key}, value {key}"
  assert lines[3] == "  fix: call init_cache with the shape of the inputs, with the largest length"


def test_a_mask_that_does_not_fit_changes_no_state():
  layer, x = attention(dropout_rate=0.5, deterministic=False), jnp.ones((2, 3, 8))
  layer.init_cache(x.shape)
  for decode in (True, False):
    with pytest.raises(ShapeMismatchError, match=r"for weights of shape \(2, 4, 3, 3\)"):
      layer(x, mask=jnp.ones((3, 2)), decode=decode)
  assert (int(layer.cache_index), int(layer.rngs.count)) == (0, 0)


# Arguments


@pytest.mark.parametrize(("index", "name"), list(enumerate(("inputs_q", "inputs_k", "inputs_v"))))
@pytest.mark.parametrize("shape", [(2, 3, 7), (8,), (5,)])
def test_a_wrong_input_is_named(index, name, shape):
  layer = attention(in_kv_features=5)
  inputs = [jnp.ones((2, 3, 8)), jnp.ones((2, 3, 5)), jnp.ones((2, 3, 5))]
  inputs[index] = jnp.ones(shape)
  size = (8, 5, 5)[index]
  with pytest.raises(ShapeMismatchError) as error:
    layer(*inputs)
  lines = error.value.args[0].split("\n")
  assert lines[0] == f"MultiHeadAttention maps {name} of shape (..., length, {size})"
  part = ("query", "key", "value")[index]
  assert lines[1].startswith(f"  at:  MultiHeadAttention.{part}.kernel  (Param, created at ")
  assert lines[2] == f"  got: {name} of shape {shape}"
  assert lines[3] == (
    f"  fix: make the last axis {size}, or build MultiHeadAttention with the input's size"
  )


def test_values_without_keys_are_refused():
  x = jnp.ones((2, 3, 8))
  with pytest.raises(InvalidArgumentError) as error:
    attention()(x, None, x)
  assert error.value.args[0] == (
    "MultiHeadAttention cannot work with this inputs_v\n"
    "  got: inputs_v='float32[2,3,8]'\n"
    "  fix: pass them as inputs_k, which inputs_v follows, or pass both"
  )


@pytest.mark.parametrize(("options", "got", "fix"), [
  ({"heads": 0}, "num_heads=0", "an int of at least 1"),
  ({"heads": 3}, "qkv_features=8", "a multiple of num_heads=3"),
  ({"num_kv_heads": 3}, "num_kv_heads=3", "a divisor of num_heads=4"),
  ({"in_kv_features": 0}, "in_kv_features=0", "an int of at least 1"),
  ({"dropout_rate": 2}, "dropout_rate=2", "a number from 0 to 1"),
  ({"rope": 10000.0}, "rope=10000.0", "an nnx.RoPE"),
  ({"rngs": 5}, "rngs=5", r"rngs=nnx.Rngs\(0\)"),
])  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(options, got, fix):
  with pytest.raises(InvalidArgumentError, match=f"MultiHead(.|\n)*got: {got}\n  fix: pass {fix}"):
    attention(**options)


# Transforms


@pytest.mark.parametrize("hijax", [True, False])
def test_it_is_a_pytree_for_transforms(hijax):
  with nnx.use_hijax(hijax):
    layer, x = attention(rope=nnx.RoPE()), normal(0, (2, 5, 8))
  want, apply = layer(x), lambda layer, x: layer(x)
  for got in (
    jax.jit(apply)(layer, x), nnx.jit(apply)(layer, x), nnx.remat(apply)(layer, x),
    jax.vmap(apply, (None, 0))(layer, x), nnx.merge(*nnx.split(layer))(x),
  ):  # fmt: skip
    assert_close(got, want)


def test_gradients_reach_all_parameters():
  layer, x = attention(rope=nnx.RoPE(), num_kv_heads=2, normalize_qk=True), normal(0, (2, 5, 8))
  for path, gradient in nnx.to_flat_state(nnx.grad(lambda layer: (layer(x) ** 2).sum())(layer)):
    if path != ("key", "bias"):
      assert abs(gradient[...]).max() > 1e-6, path


def test_layers_built_alike_have_equal_graphdefs():
  assert nnx.graphdef(attention()) == nnx.graphdef(attention())
  assert nnx.graphdef(attention()) != nnx.graphdef(attention(num_kv_heads=2))


def test_heads_of_keys_and_values_have_two_names():
  build = lambda **options: nnx.MultiHeadAttention(4, 8, **options, rngs=nnx.Rngs(0))
  assert build(num_key_value_heads=2).key.kernel.shape == build(num_kv_heads=2).key.kernel.shape
  assert build(num_kv_heads=2, num_key_value_heads=2).num_kv_heads == 2
  with pytest.raises(InvalidArgumentError) as error:
    build(num_kv_heads=1, num_key_value_heads=2)
  assert error.value.args[0].split("\n")[1:] == [
    "  got: num_key_value_heads=2",
    "  fix: pass one of num_key_value_heads and num_kv_heads=1, which are the same",
  ]
