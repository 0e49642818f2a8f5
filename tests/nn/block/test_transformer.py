import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError, ShapeMismatchError

X = jax.random.normal(jax.random.key(0), (2, 5, 8))
CONTEXT = jax.random.normal(jax.random.key(1), (2, 7, 6))


def by_hand(block, x, context=None, mask=None, context_mask=None):
  """The block from its parts, written out."""
  steps = [
    (lambda y: block.attention(y, mask=mask, is_causal=block.is_causal), block.attention_norm)
  ]
  if context is not None:
    cross = lambda y: block.cross_attention(y, context, mask=context_mask)
    steps.append((cross, block.cross_norm))
  up, down = block.feed_forward.up, block.feed_forward.down
  steps.append((lambda y: down(nnx.gelu(up(y))), block.feed_forward_norm))
  for f, norm in steps:
    x = x + f(norm(x)) if block.pre_norm else norm(x + f(x))
  return x


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("cross", [True, False])
def test_a_block_is_its_parts(pre_norm, is_causal, cross):
  block = nnx.TransformerBlock(
    8,
    2,
    pre_norm=pre_norm,
    is_causal=is_causal,
    context_features=6 if cross else None,
    rngs=nnx.Rngs(0),
  )
  context = CONTEXT if cross else None
  mask = jnp.ones((2, 1, 5, 5), bool).at[0, :, :, 3:].set(False).at[:, :, :, 0].set(True)
  context_mask = jnp.ones((2, 1, 5, 7), bool).at[1, :, :, 2:].set(False) if cross else None
  kwargs = {"mask": mask, "context_mask": context_mask}
  np.testing.assert_allclose(
    block(X, context, **kwargs), by_hand(block, X, context, **kwargs), rtol=1e-5, atol=1e-6
  )


def test_a_gated_feed_forward_network():
  layer = nnx.FeedForward(8, 12, activation=nnx.silu, gated=True, use_bias=False, rngs=nnx.Rngs(0))
  gate, up, down = (getattr(layer, n).kernel[...] for n in ("gate", "up", "down"))
  want = (jax.nn.silu(X @ gate) * (X @ up)) @ down
  np.testing.assert_allclose(layer(X), want, rtol=1e-5, atol=1e-6)
  assert up.shape == (8, 12) and layer.up.bias is None


def test_an_encoder_is_its_blocks_and_a_norm():
  encoder = nnx.TransformerEncoder(3, 8, 2, rngs=nnx.Rngs(0))
  x = X
  for block in encoder.blocks:
    x = block(x)
  np.testing.assert_allclose(encoder(X), encoder.norm(x), rtol=1e-5, atol=1e-6)
  post = nnx.TransformerEncoder(3, 8, 2, pre_norm=False, rngs=nnx.Rngs(0))
  assert post.norm is None
  assert nnx.TransformerEncoder(1, 8, 2, final_norm=False, rngs=nnx.Rngs(0)).norm is None


def test_options_reach_the_blocks():
  encoder = nnx.TransformerEncoder(
    2,
    8,
    4,
    num_kv_heads=2,
    hidden_features=16,
    norm=nnx.RMSNorm,
    activation=nnx.relu,
    dropout_rate=0.1,
    attention_dropout_rate=0.2,
    use_bias=False,
    param_dtype=jnp.bfloat16,
    rngs=nnx.Rngs(0),
  )
  block = encoder.blocks[0]
  assert isinstance(block.attention_norm, nnx.RMSNorm) and isinstance(encoder.norm, nnx.RMSNorm)
  assert block.feed_forward.up.kernel.shape == (8, 16) and block.feed_forward.up.bias is None
  assert block.attention.key.kernel.shape == (8, 2, 2)
  assert block.attention.dropout_rate == 0.2 and block.dropout.rate == 0.1
  assert {v.dtype for _, v in nnx.to_flat_state(nnx.state(encoder, nnx.Param))} == {
    jnp.dtype(jnp.bfloat16)
  }
  assert encoder(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_dropout_draws_in_training_and_rests_in_evaluation():
  encoder = nnx.TransformerEncoder(2, 8, 2, dropout_rate=0.5, rngs=nnx.Rngs(0))
  assert float(jnp.abs(encoder(X) - encoder(X)).max()) > 0
  encoder.eval()
  np.testing.assert_array_equal(encoder(X), encoder(X))


def test_a_causal_decoder_does_not_see_what_follows():
  decoder = nnx.TransformerDecoder(2, 8, 2, rngs=nnx.Rngs(0))
  changed = X.at[:, 3:].set(7.0)
  np.testing.assert_allclose(decoder(X)[:, :3], decoder(changed)[:, :3], rtol=1e-5, atol=1e-6)
  assert float(jnp.abs(decoder(X)[:, 3:] - decoder(changed)[:, 3:]).max()) > 0.1


OPTIONS = {
  "plain": {},
  "rope": {"rope": nnx.RoPE()},
  "grouped heads, RMSNorm, gated": {
    "num_kv_heads": 2,
    "norm": nnx.RMSNorm,
    "gated": True,
    "activation": nnx.silu,
    "rope": nnx.RoPE(),
  },
  "post norm": {"pre_norm": False},
}


@pytest.mark.parametrize("wrap", [jax.jit, nnx.jit, lambda f: f], ids=["jit", "nnx.jit", "eager"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_decoding_step_by_step_equals_the_whole_sequence(wrap, options):
  decoder = nnx.TransformerDecoder(2, 8, 4, context_features=6, rngs=nnx.Rngs(0), **options)
  want = decoder(X, CONTEXT)
  decoder.init_cache(X.shape)
  step = wrap(lambda decoder, x: decoder(x, CONTEXT, decode=True))
  got = [step(decoder, X[:, :2])]  # a prompt at once
  got += [step(decoder, X[:, i : i + 1]) for i in range(2, 5)]
  np.testing.assert_allclose(jnp.concatenate(got, 1), want, rtol=1e-4, atol=1e-5)
  assert decoder.blocks.layers.attention.cache_index[...].tolist() == [5, 5]


def test_decoding_in_a_scan():
  decoder = nnx.TransformerDecoder(2, 8, 2, rngs=nnx.Rngs(0))
  want = decoder(X)
  decoder.init_cache(X.shape)

  @jax.jit
  def run(decoder, xs):
    step = lambda decoder, x: decoder(x[:, None], decode=True)[:, 0]
    return nnx.scan(step, in_axes=(None, 1), out_axes=1)(decoder, xs)

  np.testing.assert_allclose(run(decoder, X), want, rtol=1e-4, atol=1e-5)


ROOM, WIDE, LAYERS = 512, 32, 3
TOKEN = jnp.ones((1, 1, WIDE))


def decoder_and_its_blocks(hijax=True, dtype=jnp.float32, shape=(1, ROOM, WIDE), **options):
  """A decoder, and a function that calls the same blocks one by one."""
  with nnx.use_hijax(hijax):
    decoder = nnx.TransformerDecoder(LAYERS, WIDE, 2, rngs=nnx.Rngs(0), **options)
    blocks = nnx.Sequential(*decoder.blocks)
    decoder.init_cache(shape, dtype)
    for block in blocks.layers:
      block.init_cache(shape, dtype)
  return decoder, nnx.List([*blocks.layers, decoder.norm])


def one_by_one(parts, x):
  *blocks, norm = parts
  for block in blocks:
    x = block(x, decode=True)
  return norm(x)


def at_once(decoder, x):
  return decoder(x, decode=True)


def looped(step, model, x):
  return jax.lax.fori_loop(0, 4, lambda _, x: step(model, x), x)


def compiled(f, model, hijax):
  """A call that may reuse the memory of the model, and gives a lojax one back."""
  if hijax:
    return nnx.jit(f).lower(model, TOKEN).compile()
  return jax.jit(lambda m, x: (f(m, x), m), donate_argnums=0).lower(model, TOKEN).compile()


@pytest.mark.parametrize("in_a_loop", [False, True])
@pytest.mark.parametrize("options", [{}, {"remat": True}, {"rope": nnx.RoPE()}], ids=str)
def test_decoding_copies_no_memory(options, in_a_loop):
  wrap = (lambda f: functools.partial(looped, f)) if in_a_loop else lambda f: f
  decoder, parts = decoder_and_its_blocks(**options)
  run = compiled(wrap(at_once), decoder, True)
  whole = rf"= f32\[{LAYERS},1,{ROOM},2,{WIDE // 2}\]\S* (\S+?)\("
  kinds = set(re.findall(whole, run.as_text()))
  # A fusion may only be the update in place: what it makes anew would be among the temporaries.
  assert kinds <= {"parameter", "get-tuple-element", "fusion", "dynamic-update-slice", "bitcast"}
  temporaries = lambda run: run.memory_analysis().temp_size_in_bytes
  weights = sum(v.nbytes for v in jax.tree.leaves(nnx.to_pure_dict(nnx.state(parts[0], nnx.Param))))
  cut_out = 2 * parts[0].attention.cached_key.nbytes  # of one layer, where XLA does not fuse it
  want = temporaries(compiled(wrap(one_by_one), parts, True))
  assert temporaries(run) <= 1.05 * want + weights + cut_out


def test_a_lojax_decoder_copies_no_memory():
  decoder, _ = decoder_and_its_blocks(hijax=False)
  text = compiled(at_once, decoder, False).as_text()
  assert re.findall(rf"= f32\[{LAYERS},1,{ROOM},\S* (?:copy|slice|dynamic-slice)\(", text) == []


def test_what_is_traced_to_decode_does_not_grow_with_the_number_of_layers():
  def lines(layers):
    decoder = nnx.TransformerDecoder(layers, 8, 2, rngs=nnx.Rngs(0))
    decoder.init_cache((1, 5, 8))
    return str(jax.make_jaxpr(at_once)(decoder, X[:1, :1])).count("\n")

  assert lines(2) == lines(9)


@pytest.mark.parametrize(
  ("wrap", "dtype"), [(jax.jit, jnp.float32), (nnx.jit, jnp.float32), (nnx.jit, jnp.bfloat16)]
)
@pytest.mark.parametrize("options", [{}, {"remat": True}, {"num_kv_heads": 1}], ids=str)
def test_a_decoder_equals_its_blocks_one_by_one(wrap, dtype, options):
  shape = (2, 3, 6, WIDE)
  decoder, parts = decoder_and_its_blocks(dtype=dtype, shape=shape, **options)
  x = jax.random.normal(jax.random.key(7), (2, 3, 7, WIDE))
  step, plain = wrap(at_once), wrap(one_by_one)
  for start, stop in ((0, 3), (3, 4), (4, 5), (5, 7)):  # the last does not fit
    got, want = step(decoder, x[..., start:stop, :]), plain(parts, x[..., start:stop, :])
    np.testing.assert_allclose(got, want, rtol=2e-2 if dtype == jnp.bfloat16 else 1e-4, atol=1e-3)
  memory = decoder.blocks.layers.attention
  for name in ("cached_key", "cached_value", "cache_index"):
    want = jnp.stack([getattr(block.attention, name)[...] for block in parts[:-1]])
    np.testing.assert_allclose(
      np.asarray(getattr(memory, name), np.float32), np.asarray(want, np.float32), 2e-2, 2e-2
    )


@pytest.mark.slow
def test_gradients_through_the_memory_of_a_decoder():
  decoder, parts = decoder_and_its_blocks(shape=(1, 4, WIDE))
  x = jax.random.normal(jax.random.key(7), (1, 4, WIDE))
  steps = lambda f: lambda m: sum((f(m, x[:, i : i + 1]) ** 3).sum() for i in range(4))
  grad = lambda f, m: nnx.jit(nnx.grad(steps(f), through=nnx.Cache))(m)
  got = grad(at_once, decoder)["blocks"]["layers"]["attention"]["value"]["kernel"]
  want = grad(one_by_one, parts)
  want = jnp.stack([want[i]["attention"]["value"]["kernel"][...] for i in range(LAYERS)])
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_decoders_under_vmap():
  x = jax.random.normal(jax.random.key(7), (2, 3, WIDE))
  build = lambda rngs: nnx.TransformerDecoder(LAYERS, WIDE, 2, rngs=rngs)
  decoders = nnx.vmap(build)(nnx.Rngs(0).split(2))
  want = nnx.vmap(lambda m, x: m(x))(decoders, x)
  nnx.vmap(lambda m: m.init_cache((3, WIDE)))(decoders)
  step = nnx.jit(nnx.vmap(at_once))
  got = [step(decoders, x[:, i : i + 1]) for i in range(3)]
  np.testing.assert_allclose(jnp.concatenate(got, 1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_trains_with_remat_as_without():
  def losses(remat):
    model = nnx.TransformerEncoder(3, 8, 2, dropout_rate=0.1, remat=remat, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=nnx.Param)

    @jax.jit
    def step(model, optimizer):
      loss, grads = nnx.value_and_grad(lambda m: ((m(X) - X[:, ::-1]) ** 2).mean())(model)
      optimizer.update(model, grads)
      return loss

    return [float(step(model, optimizer)) for _ in range(10)]

  plain = losses(False)
  assert plain[-1] < plain[0] / 2
  np.testing.assert_allclose(losses(True), plain, rtol=1e-3)


def message(error, run):
  with pytest.raises(error) as info:
    run()
  return info.value.args[0]


def test_errors_name_the_block():
  block = nnx.TransformerBlock(8, 2, rngs=nnx.Rngs(0))
  text = message(ShapeMismatchError, lambda: block(jnp.ones((2, 5, 9))))
  assert text.startswith("TransformerBlock takes inputs of shape (..., length, 8)\n  at:  ")
  assert text.endswith(
    "\n  got: an input of shape (2, 5, 9)"
    "\n  fix: make the last axis 8, or build the block with the input's size"
  )
  assert message(InvalidArgumentError, lambda: block(X, CONTEXT)) == (
    "TransformerBlock cannot work with this context\n"
    "  got: context=(2, 7, 6)\n"
    "  fix: pass no context"
  )
  cross = nnx.TransformerBlock(8, 2, context_features=6, rngs=nnx.Rngs(0))
  assert "built with context_features" in message(InvalidArgumentError, lambda: cross(X))
  with pytest.raises(InvalidArgumentError, match=r"qkv_features=8(.|\n)*a multiple of num_heads=3"):
    nnx.TransformerEncoder(2, 8, 3, rngs=nnx.Rngs(0))
  feed_forward = nnx.FeedForward(8, rngs=nnx.Rngs(0))
  with pytest.raises(ShapeMismatchError, match="FeedForward maps vectors of size 8"):
    feed_forward(jnp.ones((2, 3)))
