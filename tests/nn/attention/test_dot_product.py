import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError, MissingRngError, ShapeMismatchError
from tests.numerics.twin import normal


def inputs(queries=5, keys=3, heads=4, key_heads=4, batch=(2,)):
  shapes = [(queries, heads), (keys, key_heads), (keys, key_heads)]
  return [normal(i, (*batch, *shape, 8)) for i, shape in enumerate(shapes)]


def calls_of_jax_nn(monkeypatch):
  seen, original = [], jax.nn.dot_product_attention

  def spy(*args, **kwargs):
    seen.append(kwargs)
    return original(*args, **kwargs)

  monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
  return seen


def test_what_jax_nn_can_express_goes_to_it(monkeypatch):
  seen, (q, k, v) = calls_of_jax_nn(monkeypatch), inputs()
  nnx.dot_product_attention(q, k, v, bias=jnp.ones((5, 1)), mask=jnp.ones((2, 1, 1, 3)))
  nnx.dot_product_attention(q, k, v, dropout_rate=0.5, deterministic=True)
  nnx.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
  assert seen == [
    {"is_causal": False, "implementation": None},
    {"is_causal": False, "implementation": None},
    {"is_causal": True, "implementation": "xla"},
  ]


@pytest.mark.parametrize("options", [
  {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)},
  {"precision": "highest"},
  {"module": nnx.Module()},
], ids=["dropout", "precision", "weights"])  # fmt: skip
def test_what_jax_nn_cannot_express_is_computed_here(monkeypatch, options):
  seen, (q, k, v) = calls_of_jax_nn(monkeypatch), inputs()
  assert nnx.dot_product_attention(q, k, v, **options).shape == q.shape
  assert seen == []


def test_values_may_have_another_size():
  q, k, v = inputs(key_heads=2)
  full = nnx.dot_product_attention(q, k, v)
  part = nnx.dot_product_attention(q, k, v[..., :5])
  np.testing.assert_allclose(part, full[..., :5], rtol=1e-5, atol=1e-6)


def test_fewer_heads_of_keys_serve_neighbouring_heads_of_queries():
  q, k, v = inputs(heads=6, key_heads=2)
  repeated = [jnp.repeat(x, 3, axis=-2) for x in (k, v)]
  for options in ({}, {"precision": "default"}):
    got = nnx.dot_product_attention(q, k, v, **options)
    want = nnx.dot_product_attention(q, *repeated, **options)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", [None, "highest"])
def test_a_query_that_may_look_nowhere_gets_the_mean_of_all_values(precision):
  q, k, v = inputs()
  out = nnx.dot_product_attention(q, k, v, mask=jnp.zeros(3), precision=precision)
  np.testing.assert_allclose(out, jnp.broadcast_to(v.mean(1, keepdims=True), q.shape), atol=1e-6)


def test_weights_are_those_of_the_mean():
  q, k, v = inputs(key_heads=2)
  weights = nnx.dot_product_attention_weights(q, k, is_causal=True)
  assert weights.shape == (2, 4, 5, 3)
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
  assert (weights[:, :, 0, 1:] == 0).all()
  want = jnp.einsum("bhqk,bkhd->bqhd", weights, jnp.repeat(v, 2, axis=2))
  got = nnx.dot_product_attention(q, k, v, is_causal=True)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("broadcast", "alike"), [(True, True), (False, False)])
def test_dropout_drops_weights_and_scales_the_others(broadcast, alike):
  q, k, _ = inputs(queries=20, keys=30)
  options = {"dropout_rate": 0.25, "broadcast_dropout": broadcast}
  weights = nnx.dot_product_attention_weights(q, k)
  dropped = nnx.dot_product_attention_weights(q, k, dropout_rng=jax.random.key(0), **options)
  kept = np.asarray(dropped != 0)
  np.testing.assert_allclose(dropped, np.where(kept, weights / 0.75, 0), rtol=1e-6)
  assert 0.7 < kept.mean() < 0.8
  assert (kept == kept[0, 0]).all() == alike


def test_all_weights_may_be_dropped():
  q, k, v = inputs()
  out = nnx.dot_product_attention(q, k, v, dropout_rate=1.0, dropout_rng=jax.random.key(0))
  assert (out == 0).all()


def test_weights_are_kept_in_a_module():
  module, (q, k, v) = nnx.Module(), inputs()
  nnx.dot_product_attention(q, k, v, module=module)
  (weights,) = nnx.pop(module, nnx.Intermediate)["attention_weights"]
  np.testing.assert_allclose(weights, nnx.dot_product_attention_weights(q, k))


def test_low_precision_takes_its_softmax_in_float32():
  q, k, v = (x.astype(jnp.bfloat16) for x in inputs())
  fused = nnx.dot_product_attention(q, k, v)
  here = nnx.dot_product_attention(q, k, v, precision="default")
  assert fused.dtype == here.dtype == jnp.bfloat16
  np.testing.assert_array_equal(fused, here)
  assert nnx.dot_product_attention(q, k, v, dtype=jnp.float32).dtype == jnp.float32


def test_dropout_without_random_numbers_is_refused_before_anything_is_kept():
  module, (q, k, v) = nnx.Module(), inputs()
  with pytest.raises(MissingRngError) as error:
    nnx.dot_product_attention(q, k, v, dropout_rate=0.5, module=module)
  assert error.value.args[0] == (
    "attention with dropout needs random numbers\n"
    "  got: dropout_rng=None\n"
    "  fix: pass dropout_rng=jax.random.key(0), or deterministic=True"
  )
  assert not hasattr(module, "attention_weights")


@pytest.mark.parametrize(("shapes", "fix"), [
  (((5, 8), (3, 8), (3, 8)), "pass three arrays of shape (batch..., length, heads, size)"),
  (((2, 5, 4, 8), (3, 4, 8), (3, 4, 8)), "pass three arrays of shape (batch..., length, heads,"),
  (((2, 5, 4, 8), (1, 3, 4, 8), (1, 3, 4, 8)), "give them the same axes of the batch"),
  (((5, 4, 8), (3, 4, 8), (6, 4, 8)), "give key and value the same length and the same heads"),
  (((5, 4, 8), (3, 4, 7), (3, 4, 7)), "give query and key the same size"),
  (((5, 4, 8), (3, 3, 8), (3, 3, 8)), "let the number of heads of the key divide that of the"),
], ids=["rank", "ranks", "batch", "length", "size", "heads"])  # fmt: skip
def test_shapes_that_do_not_fit_are_named(shapes, fix):
  with pytest.raises(ShapeMismatchError) as error:
    nnx.dot_product_attention(*map(jnp.ones, shapes))
  lines = error.value.args[0].split("\n")
  assert lines[0] == "attention cannot compare these queries and keys"
  assert lines[1] == f"  got: query {shapes[0]}, key {shapes[1]}, value {shapes[2]}"
  assert lines[2].startswith(f"  fix: {fix}")


@pytest.mark.parametrize("name", ["bias", "mask"])
@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 4, 5, 3), (2, 5, 3)])
def test_a_bias_or_mask_that_does_not_broadcast_is_named(name, shape):
  q, k, v = inputs()
  with pytest.raises(ShapeMismatchError) as error:
    nnx.dot_product_attention(q, k, v, **{name: jnp.ones(shape)})
  assert error.value.args[0] == (
    f"the {name} of attention has to broadcast to (batch..., heads, queries, keys)\n"
    f"  got: a {name} of shape {shape} for weights of shape (2, 4, 5, 3)\n"
    f"  fix: give it axes of size 1 where it is to be repeated: {name}[:, None]"
  )


def test_an_unknown_implementation_is_refused():
  with pytest.raises(InvalidArgumentError, match=r"got: implementation='flash'\n  fix: pass 'xla'"):
    nnx.dot_product_attention(*inputs(), implementation="flash")


def test_what_cudnn_cannot_do_is_refused():
  with pytest.raises(InvalidArgumentError) as error:
    nnx.dot_product_attention(*inputs(), precision="highest", implementation="cudnn")
  assert error.value.args[0] == (
    "dot_product_attention cannot work with this implementation\n"
    "  got: implementation='cudnn'\n"
    "  fix: pass None: jax.nn has cuDNN without dropout, weights, precision, float64 and other "
    "value sizes"
  )


def test_attention_is_mapped_compiled_and_differentiated():
  q, k, v = inputs()
  want = nnx.dot_product_attention(q, k, v)
  for got in (
    jax.jit(nnx.dot_product_attention)(q, k, v),
    jax.vmap(nnx.dot_product_attention)(q, k, v),
    nnx.remat(nnx.dot_product_attention)(q, k, v),
  ):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  gradient = jax.grad(lambda q: nnx.dot_product_attention(q, k, v, mask=jnp.zeros(3)).sum())(q)
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize("rate", [np.float16(0.5), np.float32(0.5)])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_rate_from_numpy_does_not_change_the_dtype(rate, dtype):
  q, k, v = (x.astype(dtype) for x in inputs())
  options = {"dropout_rate": rate, "dropout_rng": jax.random.key(0)}
  want = nnx.dot_product_attention(q, k, v, **options | {"dropout_rate": 0.5})
  got = nnx.dot_product_attention(q, k, v, **options)
  assert got.dtype == dtype
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"implementation": "xla"}])
def test_half_precision_is_compiled_and_differentiated(dtype, options):
  """jax.nn asks XLA for a product of float16 that the CPU refuses, once it is compiled."""
  q, k, v = inputs(queries=3, key_heads=2)
  loss = lambda q, k, v: (nnx.dot_product_attention(q, k, v, **options) ** 2).sum()
  run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
  want, want_grads = run(q, k, v)
  got, grads = run(*(x.astype(dtype) for x in (q, k, v)))
  assert {x.dtype for x in (got, *grads)} == {jnp.dtype(dtype)}
  np.testing.assert_allclose(float(got), float(want), rtol=2e-2)
  for a, b in zip(grads, want_grads, strict=True):
    np.testing.assert_allclose(a.astype(jnp.float32), b, atol=5e-2)
