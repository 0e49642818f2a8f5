import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refax import nnx
from tests.numerics.twin import (
  GRADIENT_TOLERANCE,
  QUICK,
  TOLERANCE,
  assert_close,
  linen,
  normal,
  project,
)

OF = ("MultiHeadAttention", "Flax Linen")
# Linen's logits and softmax are bfloat16 where ours are float32, and its gradient of the keys' bias
# has noise of 0.08 where it is 0: so what is computed in bfloat16 is compared with its float32.
ROUGH = dict.fromkeys(map(jnp.dtype, (jnp.float32, jnp.bfloat16)), 4e-2)


def twins(heads, sizes, *, dtype=None, param_dtype=jnp.float32, **options):
  """A layer of Refax with random parameters, and that of Linen with the same."""
  features, inner, outer, kv_features = sizes
  common = {"dtype": dtype, "param_dtype": param_dtype, **options}
  ours = common | {"in_kv_features": kv_features, "kernel_init": nnx.initializers.zeros}
  model = nnx.MultiHeadAttention(heads, features, inner, outer, **ours, rngs=nnx.Rngs(0))
  layer = linen.MultiHeadDotProductAttention(
    heads, qkv_features=inner, out_features=outer, **common
  )
  params = {}
  for i, (path, p) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.Param))):
    p[...] = normal(i, p.shape, p.dtype) / 2
    params.setdefault(path[0], {})[path[1]] = p[...]
  return model, layer, params


def assert_equal(model, layer, params, inputs, ours=None, theirs=None, rough=False):
  """Compare outputs, and gradients of parameters and inputs.

  With `rough`, what is computed in bfloat16 is compared with Linen's float32, and may be half as
  far again from it as Linen's bfloat16: gradients of the norm of a small head are all rounding.
  """
  where = tuple(range(len(inputs) + 1))
  run = lambda f: jax.jit(jax.grad(f, where, has_aux=True), compiler_options=QUICK)

  def of_linen(layer, params, inputs):
    def loss(params, *inputs):
      y = layer.apply({"params": params}, *inputs, deterministic=True, **theirs or {})
      return project(y), y

    return run(loss)(params, *inputs)

  graphdef, own, rest = nnx.split(model, nnx.Param, ...)

  def refax_loss(params, *inputs):
    y = nnx.merge(graphdef, params, rest)(*inputs, **ours or {})
    return project(y), y

  like = wanted = of_linen(layer, params, inputs)
  if rough:
    exact = layer.clone(dtype=jnp.float32, param_dtype=jnp.float32)
    wanted = of_linen(exact, *jax.tree.map(lambda x: x.astype(jnp.float32), (params, inputs)))
  (got, *got_inputs), y = run(refax_loss)(nnx.to_lojax(own), *inputs)
  assert y.dtype == like[1].dtype
  close, close_gradient = (ROUGH, ROUGH) if rough else (TOLERANCE, GRADIENT_TOLERANCE)
  of = (OF[0], "Flax Linen in float32") if rough else OF

  def compare(x, pick, tolerance):
    want, noise = pick(wanted).astype(x.dtype), relative_difference(pick(like), pick(wanted))
    assert_close(x, want, tolerance | {x.dtype: max(tolerance[x.dtype], 1.5 * noise)}, of=of)

  compare(y, lambda found: found[1], close)
  for path, gradient in nnx.to_flat_state(got):
    compare(gradient[...], lambda found, path=path: found[0][0][path[0]][path[1]], close_gradient)
  for i, x in enumerate(got_inputs):
    compare(x, lambda found, i=i: found[0][1 + i], close_gradient)


def relative_difference(a, b):
  """The largest difference, relative to the largest element of `b`, if that is above 1."""
  a, b = (np.asarray(x, np.float32) for x in (a, b))
  return float(np.abs(a - b).max(initial=0.0)) / max(1.0, float(np.abs(b).max(initial=0.0)))


@settings(max_examples=5, deadline=None)
@given(
  batch=st.sampled_from(((), (2, 3))),
  heads=st.sampled_from((1, 2, 4)),
  sizes=st.sampled_from(((8, None, None, None), (6, 8, 5, 3))),
  options=st.fixed_dictionaries(
    {
      "use_bias": st.booleans(),
      "normalize_qk": st.booleans(),
      "dtype": st.sampled_from((None, None, jnp.bfloat16)),
      "param_dtype": st.sampled_from((jnp.float32, jnp.float32, jnp.bfloat16)),
    }
  ),
  inputs=st.integers(1, 3),
  masked=st.booleans(),
)
def test_attention_equals_linen(batch, heads, sizes, options, inputs, masked):
  sizes = sizes if inputs > 1 else (*sizes[:3], None)
  if options["normalize_qk"]:  # the norm of heads of size 2 is +-1, and its gradient is rounding
    heads = min(heads, 2)
  model, layer, params = twins(heads, sizes, **options)
  dtype = options["param_dtype"]
  keys = 3 if inputs == 1 else 4
  xs = [normal(0, (*batch, 3, sizes[0]), dtype)]
  xs += [normal(i, (*batch, keys, sizes[3] or sizes[0]), dtype) for i in range(1, inputs)]
  mask = normal(9, (*batch, 1, 3, keys)) > -0.5 if masked else None
  rough = jnp.bfloat16 in (options["dtype"], dtype)
  assert_equal(model, layer, params, xs, {"mask": mask}, {"mask": mask}, rough)


def test_causal_attention_equals_linen():
  model, layer, params = twins(2, (8, None, None, None))
  x = normal(0, (2, 5, 8))
  theirs = {"mask": linen.make_causal_mask(jnp.ones((2, 5)))}
  assert_equal(model, layer, params, [x], {"is_causal": True}, theirs)


@pytest.mark.parametrize("broadcast", [True, False])
def test_attention_with_dropout_equals_linen(broadcast):
  options = {"dropout_rate": 0.4, "broadcast_dropout": broadcast}
  model, layer, params = twins(2, (8, None, None, None), **options)
  x = normal(0, (3, 5, 8))
  key = nnx.Rngs(dropout=3).dropout()
  want = layer.apply({"params": params}, x, deterministic=False, dropout_rng=key)
  assert_close(model(x, deterministic=False, rngs=nnx.Rngs(dropout=3)), want, of=OF)


def test_weights_that_are_kept_equal_those_of_linen():
  model, layer, params = twins(2, (8, None, None, None))
  x = normal(0, (3, 5, 8))
  _, kept = layer.apply({"params": params}, x, sow_weights=True, mutable=["intermediates"])
  model(x, sow_weights=True)
  (got,) = nnx.pop(model, nnx.Intermediate)["attention_weights"]
  assert_close(got, kept["intermediates"]["attention_weights"][0], of=OF)


def test_decoding_equals_linen():
  model, layer, params = twins(2, (8, None, None, None))
  x = normal(0, (2, 4, 8))
  layer = layer.clone(decode=True)
  cache = layer.init(jax.random.key(0), x)["cache"]
  model.init_cache(x.shape)
  for i in range(4):
    token = x[:, i : i + 1]
    want, new = layer.apply({"params": params, "cache": cache}, token, mutable=["cache"])
    cache = new["cache"]
    assert_close(model(token, decode=True), want, of=OF)
  assert_close(model.cached_key[...], cache["cached_key"], of=OF)
  assert_close(model.cached_value[...], cache["cached_value"], of=OF)
  assert int(model.cache_index) == int(cache["cache_index"])


def test_initial_weights_are_those_of_flax_nnx():
  flax_nnx = pytest.importorskip("flax.nnx", reason="initial weights are compared with Flax NNX")
  options = {"dropout_rate": 0.5, "num_kv_heads": 2, "normalize_qk": True, "decode": False}
  own = nnx.MultiHeadAttention(4, 8, **options, rngs=nnx.Rngs(7))
  other = flax_nnx.MultiHeadAttention(4, 8, **options, rngs=flax_nnx.Rngs(7))
  x = normal(0, (2, 5, 8))
  for call in ({"deterministic": True}, {"deterministic": False}):
    np.testing.assert_allclose(own(x, **call), other(x, **call), rtol=1e-5, atol=1e-6)
