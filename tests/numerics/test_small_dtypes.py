"""Small dtypes: integers of 4 to 32 bits mean the same number, and half precision loses no sum.

Each program runs on every dtype of a grid. What it gives for small integers is what it gives for
int32; what it gives in half precision is what NumPy gives in float64, up to the last digit.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.nn.recurrent.rnn import flip_sequences

INTEGERS = [jnp.int4, jnp.uint4, jnp.int8, jnp.uint8, jnp.int16, jnp.uint16, jnp.uint32]
HALVES = [jnp.float16, jnp.bfloat16]
N = 300
"""More classes, rows and steps than 8 bits can count."""


def rngs():
  return nnx.Rngs(0)


# Integers that are indices, lengths or labels: an array of the dtype, from 0 up
class Sum(nnx.RNNCellBase):
  def initialize_carry(self, input_shape, rngs=None, carry_init=None):
    return jnp.zeros(input_shape)

  def __call__(self, carry, inputs):
    return carry + inputs, carry + inputs


def steps_for(n):
  return jnp.ones((n.shape[0], N, 1)).cumsum(1)


def confusion(n):
  matrix = nnx.metrics.ConfusionMatrix(N)
  matrix.update(logits=jnp.eye(N)[: n.shape[0]], labels=n)
  return matrix.compute().counts


def accuracy(n):
  metric = nnx.metrics.Accuracy()
  metric.update(logits=jnp.eye(N)[: n.shape[0]], labels=n)
  return metric.compute()


def last_carry(n, **kwargs):
  return nnx.RNN(Sum())(steps_for(n), seq_lengths=n, return_carry=True, **kwargs)


def both_ways(n):
  rnn = nnx.Bidirectional(nnx.RNN(Sum()), nnx.RNN(Sum()))
  return rnn(steps_for(n), seq_lengths=n, return_carry=True, reverse=True)


def at_most_3_before(query, key):
  return key + 3 >= query


WITH_INTEGERS = {
  "Embed": lambda n: nnx.Embed(N, 2, rngs=rngs())(n),
  "one_hot": lambda n: nnx.one_hot(n, N),
  "ConfusionMatrix": confusion,
  "Accuracy": accuracy,
  "RNN": last_carry,
  "RNN reversed": lambda n: last_carry(n, reverse=True, keep_order=True),
  "RNN time first": lambda n: nnx.RNN(Sum(), time_major=True)(
    steps_for(n).swapaxes(0, 1), seq_lengths=n, return_carry=True
  ),
  "Bidirectional": both_ways,
  "flip_sequences": lambda n: flip_sequences(steps_for(n), n, 1, False),
  "RoPE": lambda n: nnx.RoPE()(jnp.ones((n.shape[0], 4)), n),
  "make_attention_mask": lambda n: nnx.make_attention_mask(n, n) != 0,
  "make_attention_mask with a function": lambda n: nnx.make_attention_mask(n, n, at_most_3_before),
  "combine_masks": lambda n: nnx.combine_masks(n[None], n[:, None]),
}


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("name", WITH_INTEGERS)
def test_small_integers_are_the_numbers_that_they_are(name, dtype):
  n = jnp.arange(min(int(jnp.iinfo(dtype).max), 130) + 1, dtype=jnp.int32)
  got = jax.tree.leaves(WITH_INTEGERS[name](n.astype(dtype)))
  want = jax.tree.leaves(WITH_INTEGERS[name](n))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [jnp.int4, jnp.int8, jnp.int16])
@pytest.mark.parametrize("name", ["Embed", "one_hot", "ConfusionMatrix", "Accuracy"])
def test_a_negative_integer_stays_one(name, dtype):
  n = jnp.array([-1, -2, -8], jnp.int32)
  got, want = WITH_INTEGERS[name](n.astype(dtype)), WITH_INTEGERS[name](n)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["Embed", "one_hot", "ConfusionMatrix", "Accuracy"])
def test_the_largest_unsigned_integer_is_none_from_the_end(name):
  n = jnp.array([2**32 - 1], jnp.uint32)
  got, want = WITH_INTEGERS[name](n), WITH_INTEGERS[name](jnp.array([2**31 - 1], jnp.int32))
  np.testing.assert_array_equal(got, want)


# Integers that are numbers: they are computed with as float32
def average(x, kind=nnx.metrics.Average):
  metric = kind()
  metric.update(values=x)
  return metric.compute()


LOGS = {"log1mexp": 1}  # the least number that it takes
FLOAT_ACTIVATIONS = [
  "celu", "elu", "gelu", "glu", "hard_sigmoid", "hard_silu", "leaky_relu", "log1mexp",
  "log_sigmoid", "log_softmax", "logmeanexp", "logsumexp", "mish", "relu6", "selu", "sigmoid",
  "silu", "soft_sign", "softmax", "softplus", "sparse_plus", "sparse_sigmoid", "squareplus",
  "standardize", "tanh",
]  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint16, jnp.uint32])
@pytest.mark.parametrize("name", FLOAT_ACTIVATIONS)
def test_an_activation_of_integers_is_that_of_floats(name, dtype):
  x = np.arange(max(int(jnp.iinfo(dtype).min), -128), 256)
  x = x[(x >= LOGS.get(name, -128)) & (x <= jnp.iinfo(dtype).max)]
  x = x[: len(x) // 2 * 2]  # glu halves them
  fn = getattr(nnx, name)
  got, want = fn(jnp.asarray(x, dtype)), fn(jnp.asarray(x, jnp.float32))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32, jnp.uint32])
@pytest.mark.parametrize("name", ["relu", "hard_tanh", "identity"])
def test_an_activation_that_gives_integers_keeps_the_dtype(name, dtype):
  x = np.arange(max(int(jnp.iinfo(dtype).min), -128), 128)
  fn = getattr(nnx, name)
  got, want = fn(jnp.asarray(x, dtype)), fn(jnp.asarray(x, jnp.float32))
  assert got.dtype == dtype
  np.testing.assert_array_equal(got.astype(jnp.float32), want)


OF_INTEGERS = {
  "LayerNorm": lambda x: nnx.LayerNorm(8, rngs=rngs())(x),
  "RMSNorm": lambda x: nnx.RMSNorm(8, rngs=rngs())(x),
  "GroupNorm": lambda x: nnx.GroupNorm(8, 2, rngs=rngs())(x),
  "InstanceNorm": lambda x: nnx.InstanceNorm(8, rngs=rngs())(x[None]),
  "BatchNorm": lambda x: nnx.BatchNorm(8, rngs=rngs())(x),
  "avg_pool": lambda x: nnx.avg_pool(x, (2,), padding="SAME"),
  "avg_pool without padding": lambda x: nnx.avg_pool(x, (2,), None, "SAME", False),
  "max_pool": lambda x: nnx.max_pool(x, (2,), padding="SAME").astype(jnp.float32),
  "min_pool": lambda x: nnx.min_pool(x, (2,), padding="SAME").astype(jnp.float32),
  "Dropout": lambda x: nnx.Dropout(0.5, rngs=rngs())(x),
  "Linear": lambda x: nnx.Linear(8, 3, rngs=rngs())(x),
  "PReLU": lambda x: nnx.PReLU()(x),
  "RoPE": lambda x: nnx.RoPE()(x),
  "Average": average,
  "Welford": lambda x: average(x, nnx.metrics.Welford),
  "Accuracy": lambda x: _accuracy(x, jnp.arange(x.shape[0])),
  "Accuracy with a threshold": lambda x: _accuracy(x, jnp.ones(x.shape, int), 99.5),
}


def _accuracy(logits, labels, threshold=None):
  metric = nnx.metrics.Accuracy(threshold)
  metric.update(logits=logits, labels=labels)
  return metric.compute()


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint16, jnp.uint32])
@pytest.mark.parametrize("name", OF_INTEGERS)
def test_small_integers_are_computed_with_as_floats(name, dtype):
  low, high = max(int(jnp.iinfo(dtype).min), -1000), min(int(jnp.iinfo(dtype).max), 1000)
  x = np.random.default_rng(0).integers(low, high, (6, 8), endpoint=True)
  got = jax.tree.leaves(OF_INTEGERS[name](jnp.asarray(x, dtype)))
  want = jax.tree.leaves(OF_INTEGERS[name](jnp.asarray(x, jnp.float32)))
  for a, b in zip(got, want, strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int4, jnp.uint4, jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("name", ["Average", "Welford", "avg_pool", "max_pool", "min_pool"])
def test_numbers_that_jax_promotes_to_nothing_are_counted(name, dtype):
  x = np.random.default_rng(0).integers(0, 7, (6, 8), endpoint=True)
  got = jax.tree.leaves(OF_INTEGERS[name](jnp.asarray(x, dtype)))
  want = jax.tree.leaves(OF_INTEGERS[name](jnp.asarray(x, jnp.float32)))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a.astype(jnp.float32), b.astype(a.dtype).astype(jnp.float32))


# Half precision: float64 by NumPy is the oracle
def one_digit(dtype):
  """One unit in the last place, relative."""
  return float(jnp.finfo(dtype).eps)


def assert_digits(got, want, count=1.0):
  """Equal but for `count` units in the last place of the largest element."""
  dtype, least = got.dtype, float(jnp.finfo(got.dtype).smallest_subnormal)
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert np.isfinite(got).all()
  assert np.abs(got - want).max() <= count * one_digit(dtype) * np.abs(want).max() + least


def drawn(shape, dtype, scale=1.0, shift=0.0):
  x = np.random.default_rng(0).standard_normal(shape) * scale + shift
  half = jnp.asarray(x, dtype)
  return half, np.asarray(half, np.float64)


SCALES = [(1.0, 0.0), (1.0, 5.0), (300.0, 1000.0), (1e-4, 0.0)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("scale", "shift"), SCALES)
@pytest.mark.parametrize("count_include_pad", [True, False])
def test_the_mean_of_a_large_window(dtype, scale, shift, count_include_pad):
  x, exact = drawn((64, 64, 2), dtype, scale, shift)
  got = nnx.avg_pool(x, (32, 32), (32, 32), count_include_pad=count_include_pad)
  assert got.dtype == dtype
  assert_digits(got, exact.reshape(2, 32, 2, 32, 2).mean((1, 3)))


def standard(x, axis):
  return (x - x.mean(axis, keepdims=True)) / x.std(axis, keepdims=True)


NORMS = {
  "LayerNorm": (lambda d: nnx.LayerNorm(4096, epsilon=0, param_dtype=d, rngs=rngs()), 1),
  "GroupNorm": (
    lambda d: nnx.GroupNorm(4096, 1, epsilon=0, param_dtype=d, rngs=rngs(), reduction_axes=-1), 1
  ),
  "BatchNorm": (lambda d: nnx.BatchNorm(4096, epsilon=0, param_dtype=d, rngs=rngs()), 0),
  "LayerNorm, slow variance": (
    lambda d: nnx.LayerNorm(
      4096, epsilon=0, param_dtype=d, use_fast_variance=False, rngs=rngs()
    ), 1,
  ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("scale", "shift"), SCALES)
@pytest.mark.parametrize("name", NORMS)
def test_a_normalization_of_many_features(name, dtype, scale, shift):
  build, axis = NORMS[name]
  x, exact = drawn((64, 4096), dtype, scale, shift)
  got = build(dtype)(x)
  assert got.dtype == dtype
  assert_digits(got, standard(exact, axis))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("scale", "shift"), SCALES)
def test_rms_norm_of_many_features(dtype, scale, shift):
  x, exact = drawn((2, 4096), dtype, scale, shift)
  got = nnx.RMSNorm(4096, epsilon=0, param_dtype=dtype, rngs=rngs())(x)
  assert got.dtype == dtype
  assert_digits(got, exact / np.sqrt((exact**2).mean(1, keepdims=True)))


def exact_softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


LONG = {
  "softmax": exact_softmax,
  "log_softmax": lambda x: np.log(exact_softmax(x)),
  "logsumexp": lambda x: np.log(np.exp(x - x.max()).sum()) + x.max(),
  "logmeanexp": lambda x: np.log(np.exp(x - x.max()).mean()) + x.max(),
  "standardize": lambda x: standard(x, 0),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shift", [0.0, 100.0])
@pytest.mark.parametrize("name", LONG)
def test_an_activation_over_many_elements(name, dtype, shift):
  x, exact = drawn((70_000,), dtype, 0.1 if shift == 0 else 3.0, shift)
  got = getattr(nnx, name)(x)
  assert got.dtype == dtype
  # exp in bfloat16 loses a digit of its own, as in jax.nn
  assert_digits(got, LONG[name](exact), 1 if dtype == jnp.float16 or name == "standardize" else 4)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("options", [{}, {"precision": "highest"}], ids=["fused", "weights"])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_attention_over_many_keys(dtype, options, scale):
  (q, q64), (k, k64) = drawn((1, 2, 1, 8), dtype, scale), drawn((1, 4096, 1, 8), dtype, scale)
  v, v64 = drawn((1, 4096, 1, 8), dtype, 1.0, 1.0)
  got = nnx.dot_product_attention(q, k, v, **options)
  assert got.dtype == dtype
  logits = q64[0, :, 0] @ k64[0, :, 0].T / np.sqrt(8)
  want = np.stack([exact_softmax(row) @ v64[0, :, 0] for row in logits])
  assert_digits(got[0, :, 0], want, 2)  # weights are rounded, and then what they sum


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [300.0, 1.0, 1e-4, 0.0])
def test_weight_norm(dtype, scale):
  init = lambda key, shape, dtype: (jax.random.normal(key, shape) * scale).astype(dtype)
  layer = nnx.Linear(64, 3, use_bias=False, param_dtype=dtype, kernel_init=init, rngs=rngs())
  model = nnx.WeightNorm(layer, param_dtype=dtype, rngs=rngs())
  exact = np.asarray(layer.kernel[...], np.float64)
  got = model(jnp.eye(64, dtype=dtype))
  assert got.dtype == dtype
  assert_digits(got, exact / np.sqrt((exact**2).sum(0, keepdims=True) + 1e-12))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [300.0, 1.0, 1e-4, 0.0])
def test_spectral_norm(dtype, scale):
  init = lambda key, shape, dtype: (jax.random.normal(key, shape) * scale).astype(dtype)
  layer = nnx.Linear(64, 3, use_bias=False, param_dtype=dtype, kernel_init=init, rngs=rngs())
  model = nnx.SpectralNorm(layer, n_steps=100, param_dtype=dtype, rngs=rngs())
  exact = np.asarray(layer.kernel[...], np.float64)
  got = model(jnp.eye(64, dtype=dtype))
  assert got.dtype == dtype
  assert_digits(got, exact / (np.linalg.norm(exact, 2) or 1.0), 1)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 1 - 1e-5])
def test_what_dropout_keeps_is_scaled_as_exactly_as_the_dtype_can(dtype, rate):
  x, exact = drawn((2048,), dtype, 1e-3)
  got = nnx.Dropout(rate, rngs=rngs())(x)
  kept = np.asarray(got != 0)
  assert got.dtype == dtype
  if kept.any():
    np.testing.assert_array_equal(got[kept], jnp.asarray(exact[kept] / (1 - rate), dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("scale", "shift"), SCALES)
def test_means_of_many_numbers(dtype, scale, shift):
  metric, welford = nnx.metrics.Average(), nnx.metrics.Welford()
  x, exact = drawn((4, 50_000), dtype, scale, shift)
  for row in x:
    metric.update(values=row)
    welford.update(values=row)
  np.testing.assert_allclose(metric.compute(), exact.mean(), rtol=1e-6, atol=1e-6 * scale)
  np.testing.assert_allclose(welford.compute().mean, exact.mean(), rtol=1e-6, atol=1e-6 * scale)
  np.testing.assert_allclose(welford.compute().standard_deviation, exact.std(), rtol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_moving_average_of_half_precision(dtype):
  model = nnx.Linear(1, 1, param_dtype=dtype, rngs=rngs())
  ema, want = nnx.EMA(model, decay=0.999), np.asarray(model.kernel[...], np.float64)
  update = jax.jit(lambda ema, model: ema.update(model))
  for i in range(300):
    model.kernel[...] = jnp.full((1, 1), i / 100, dtype)
    update(ema, model)
    want = want + 0.001 * (np.asarray(model.kernel[...], np.float64) - want)
  np.testing.assert_allclose(ema.params["kernel"][...], want, rtol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_products_with_many_terms(dtype, scale):
  x, exact = drawn((2, 4096), dtype, scale / 64, 0.01)
  init = nnx.initializers.constant(1.0)
  options = {"use_bias": False, "param_dtype": dtype, "kernel_init": init, "rngs": rngs()}
  want = exact.sum(1, keepdims=True)
  assert_digits(nnx.Linear(4096, 1, **options)(x), want)
  image = x.reshape(2, 64, 64, 1)
  conv = nnx.Conv(1, 1, (64, 64), padding="VALID", **options)
  assert_digits(conv(image).reshape(2, 1), want)
  conv = nnx.ConvTranspose(4096, 1, (1,), **options)
  assert_digits(conv(x[:, None]).reshape(2, 1), want)
