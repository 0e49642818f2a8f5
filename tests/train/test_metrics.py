"""Metrics equal Flax NNX's and NumPy's, stay exact for long, and write all or nothing."""

import copy
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refax import _jax, nnx
from refax.errors import InvalidArgumentError, MissingArgumentError, ShapeMismatchError
from refax.train import accumulator

flax_nnx = pytest.importorskip("flax.nnx", reason="metrics are compared with Flax NNX")
metrics = nnx.metrics


def numbers(seed, shape=(), dtype=np.float32):
  return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def classes(seed, shape=(6,), n=4):
  rng = np.random.default_rng(seed)
  return {
    "logits": rng.standard_normal((*shape, n)).astype(np.float32),
    "labels": rng.integers(0, n, shape).astype(np.int32),
    "mask": rng.integers(0, 2, shape).astype(bool),
    "values": rng.standard_normal(shape).astype(np.float32) + 3,
    "loss": rng.standard_normal(shape).astype(np.float32),
  }


def of(batch, *names):
  return {name: batch[name] for name in names}


def arrays(metric):
  return [np.asarray(x) for x in jax.tree.leaves(nnx.to_lojax(metric))]


def assert_same(got, want):
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)


def leaves(value):
  if isinstance(value, dict):
    return [x for name in sorted(value) for x in leaves(value[name])]
  if isinstance(value, flax_nnx.metrics.Statistics | metrics.Statistics):
    return [value.mean, value.standard_error_of_mean, value.standard_deviation]
  return jax.tree.leaves(value)


def assert_close(got, want, rtol=1e-5):
  for a, b in zip(leaves(got), leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


# Flax NNX as the oracle: the same constructor, the same calls
def multi(library):
  return library.MultiMetric(
    loss=library.metrics.Average("loss"),
    accuracy=library.metrics.Accuracy(),
    statistics=library.metrics.Welford("loss"),
  )


BUILD = {
  "Average": (lambda lib: lib.metrics.Average(), ("values",)),
  "Average of an argument": (lambda lib: lib.metrics.Average("loss"), ("loss", "values")),
  "Average with a mask": (lambda lib: lib.metrics.Average(), ("values", "mask")),
  "Accuracy": (lambda lib: lib.metrics.Accuracy(), ("logits", "labels", "values")),
  "Accuracy with a mask": (lambda lib: lib.metrics.Accuracy(), ("logits", "labels", "mask")),
  "Welford": (lambda lib: lib.metrics.Welford(), ("values",)),
  "MultiMetric": (multi, ("loss", "logits", "labels")),
}
RUNS = {
  "eager": lambda metric, batches: [metric.update(**b) for b in batches],
  "jax.jit": lambda metric, batches: _each(jax.jit(lambda m, b: m.update(**b)), metric, batches),
  "nnx.jit": lambda metric, batches: _each(nnx.jit(lambda m, b: m.update(**b)), metric, batches),
  "jax.lax.scan": lambda metric, batches: _scan(metric, batches),
  "nnx.scan": lambda metric, batches: nnx.scan(
    lambda m, b: m.update(**b), in_axes=(nnx.StateAxes({...: None}), 0), out_axes=0
  )(metric, stacked(batches)),
  "split and merge": lambda metric, batches: _split(metric, batches),
}


def stacked(batches):
  return jax.tree.map(lambda *x: jnp.stack(x), *batches)


def _each(update, metric, batches):
  for batch in batches:
    update(metric, batch)


def _scan(metric, batches):
  @jax.jit
  def run(metric, batches):
    jax.lax.scan(lambda c, b: (c, metric.update(**b)), None, batches)

  run(metric, stacked(batches))


def _split(metric, batches):
  for batch in batches:
    nnx.merge(*metric.split()).update(**batch)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", BUILD)
def test_a_metric_equals_flax_nnx_in_every_way_to_run_it(name, run):
  build, arguments = BUILD[name]
  batches = [of(classes(i), *arguments) for i in range(4)]
  other, own = build(flax_nnx), build(nnx)
  for batch in batches:
    other.update(**jax.tree.map(jnp.asarray, batch))
  RUNS[run](own, batches)
  assert_close(own.compute(), other.compute())
  assert_close(jax.jit(lambda m: m.compute())(own), other.compute())
  own.reset()
  assert all(not x.any() for x in arrays(own))


@settings(max_examples=15, deadline=None)
@given(
  st.sampled_from([(), (1,), (5,), (2, 3)]),
  st.one_of(st.none(), st.floats(-1, 1, width=32)),
  st.booleans(),
  st.integers(1, 3),
)
def test_accuracy_equals_flax_nnx_over_its_options(shape, threshold, masked, count):
  own, other = metrics.Accuracy(threshold), flax_nnx.metrics.Accuracy(threshold)
  for i in range(count):
    batch = of(classes(i, shape), "logits", "labels", *(["mask"] if masked and shape else []))
    if threshold is not None:
      batch["logits"] = batch["logits"][..., 0]
    own.update(**batch)
    other.update(**jax.tree.map(jnp.asarray, batch))
  np.testing.assert_allclose(own.compute(), other.compute(), rtol=1e-6)


@pytest.mark.parametrize("name", ["Average", "Accuracy", "Welford", "MultiMetric"])
@pytest.mark.parametrize("method", ["__init__", "update", "compute", "reset"])
def test_the_parameters_are_those_of_flax_nnx(name, method):
  own, other = (getattr(getattr(lib.metrics, name), method) for lib in (nnx, flax_nnx))
  own, other = (
    {p.name: p.default for p in inspect.signature(f).parameters.values()} for f in (own, other)
  )
  assert other.items() <= own.items()
  assert own.keys() - other.keys() <= {"mask"}


def test_every_name_of_flax_nnx_metrics_is_there():
  names = [n for n, v in vars(flax_nnx.metrics).items() if getattr(v, "__module__", "") ==
           flax_nnx.metrics.Average.__module__]  # fmt: skip
  assert len(names) > 5 and set(names) <= set(metrics.__all__)
  assert nnx.Metric is metrics.Metric and nnx.MultiMetric is metrics.MultiMetric


@pytest.mark.parametrize("value", [2, 2.5, True, np.float32(2), jnp.float32(2), np.arange(3)])
def test_numbers_of_all_sorts_are_averaged(value):
  average, welford = metrics.Average(), metrics.Welford()
  for x in (value, 4.0):
    average.update(values=x)
    welford.update(values=x)
  everything = np.append(np.asarray(value, np.float64), 4.0)
  assert float(average.compute()) == pytest.approx(everything.mean())
  assert float(welford.compute().mean) == pytest.approx(everything.mean())
  assert float(welford.compute().standard_deviation) == pytest.approx(everything.std())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", "uint32", "bool"])
def test_sums_are_in_float32_whatever_the_dtype(dtype):
  x = jnp.asarray(np.arange(1000) % 7 > 2 if dtype == "bool" else np.arange(1000) % 101, dtype)
  average, welford = metrics.Average(), metrics.Welford()
  average.update(values=x)
  welford.update(values=x)
  want = np.asarray(x.astype(jnp.float32), np.float64)
  assert average.compute().dtype == welford.compute().mean.dtype == jnp.float32
  np.testing.assert_allclose(average.compute(), want.mean(), rtol=2e-7)
  np.testing.assert_allclose(welford.compute().standard_deviation, want.std(), rtol=5e-7)


@pytest.mark.parametrize("value", [
  2**40, -(2**40), np.int64(2**40), np.array([2**40]), np.array([2**40], np.uint64),
], ids=repr)  # fmt: skip
@pytest.mark.parametrize("kind", [metrics.Average, metrics.Welford])
def test_an_integer_of_64_bits_does_not_wrap_around(kind, value):
  metric = kind()
  metric.update(values=value)
  got = metric.compute()
  mean = got if kind is metrics.Average else got.mean
  assert float(mean) == float(np.asarray(value, np.float64).item())


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_threshold_is_not_rounded_to_the_dtype_of_the_logits(dtype):
  below = np.float64(jnp.asarray(0.7, dtype))  # what 0.7 is in the dtype
  threshold = below + 1e-5
  accuracy = metrics.Accuracy(threshold)
  accuracy.update(logits=jnp.array([below], dtype), labels=jnp.array([0]))
  assert float(accuracy.compute()) == 1.0


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32])
def test_there_may_be_more_classes_than_labels_can_count(dtype):
  matrix, labels = metrics.ConfusionMatrix(256), jnp.array([0, 3, 127, 3], dtype)
  matrix.update(logits=jnp.eye(256)[labels.astype(int)], labels=labels)
  counts = np.asarray(matrix.compute().counts)
  assert counts.sum() == 4
  assert counts.diagonal()[[0, 3, 127]].tolist() == [1, 2, 1]


def test_a_variable_is_a_value():
  average = metrics.Average()
  average.update(values=nnx.Variable(jnp.arange(3.0)), mask=nnx.Variable(jnp.arange(3) > 0))
  assert float(average.compute()) == 1.5


# nothing, and not a number
@pytest.mark.parametrize("kind", ["Average", "Accuracy", "Welford"])
def test_an_empty_metric_is_nan(kind):
  metric = getattr(metrics, kind)()
  assert all(np.isnan(x) for x in leaves(metric.compute()))
  batch = of(classes(0), "values", "logits", "labels") | {"mask": np.zeros(6, bool)}
  metric.update(**batch)
  assert all(np.isnan(x) for x in leaves(metric.compute()))
  metric.update(**batch | {"mask": None})
  assert all(np.isfinite(x) for x in leaves(metric.compute()))


def test_infinite_numbers_stay_infinite_and_nan_stays_nan():
  average = metrics.Average()
  average.update(values=jnp.array([1.0, jnp.inf]))
  average.update(values=2.0)
  assert float(average.compute()) == float("inf")
  average.update(values=jnp.nan)
  assert np.isnan(average.compute())
  average.reset()
  average.update(values=3.0)
  assert float(average.compute()) == 3.0


@pytest.mark.parametrize("kind", ["Average", "Welford"])
def test_what_the_mask_leaves_out_may_be_nan(kind):
  metric = getattr(metrics, kind)()
  metric.update(values=jnp.array([1.0, jnp.nan, 3.0]), mask=jnp.array([True, False, True]))
  assert float(leaves(metric.compute())[0]) == 2.0
  assert np.isfinite(leaves(metric.compute())).all()


@pytest.mark.parametrize("kind", ["Average", "Welford"])
def test_a_mask_broadcasts_and_counts_each_element(kind):
  x, mask = numbers(0, (4, 3)), np.array([[True], [False], [True], [True]])
  metric = getattr(metrics, kind)()
  metric.update(values=x, mask=mask)
  kept = x[[0, 2, 3]]
  assert int(metric.count) == 9
  np.testing.assert_allclose(leaves(metric.compute())[0], kept.mean(), rtol=1e-6)
  if kind == "Welford":
    np.testing.assert_allclose(metric.compute().standard_deviation, kept.std(), rtol=1e-6)


# precision
def scan_updates(metric, xs):
  jax.jit(lambda m, xs: jax.lax.scan(lambda c, x: (c, m.update(values=x)), None, xs))(metric, xs)


def test_ones_are_counted_beyond_what_a_float32_holds():
  average = metrics.Average()
  average.total[...] = 2.0**24
  average.count[...] = 2**24
  scan_updates(average, jnp.ones(1000))
  assert float(average.total) + float(average.total_low) == 2**24 + 1000
  scan_updates(average, jnp.zeros(2**24 + 1000 - 8, jnp.bool_).reshape(1, -1))
  assert float(average.compute()) == pytest.approx(0.5, rel=5e-7)


def test_counts_go_beyond_32_bits():
  accuracy = metrics.Accuracy()
  accuracy.count[...] = 2**32 - 2
  accuracy.update(**of(classes(0), "logits", "labels"))
  assert (int(accuracy.count), int(accuracy.count_high)) == (4, 1)
  assert accumulator.add_count(jnp.uint32(7), jnp.uint32(1), 3 * 2**32 + 5) == (12, 4)
  assert float(accumulator.count_as_float(jnp.uint32(4), jnp.uint32(1))) == 2.0**32


def test_an_average_of_many_numbers_equals_float64():
  x = numbers(0, 200_000) * np.float32(1e-4) + np.float32(0.1)
  average = metrics.Average()
  scan_updates(average, jnp.asarray(x))
  want = x.astype(np.float64).mean()
  np.testing.assert_allclose(average.compute(), want, rtol=1.2e-7)
  total = np.cumsum(x, dtype=np.float32)[-1] / np.float32(x.size)
  assert abs(total - want) > 1e-6, "the test would not see a plain float32 sum"


def test_a_sum_has_48_bits():
  rng = np.random.default_rng(0)
  x = (rng.standard_normal(5000) * 10.0 ** rng.integers(-4, 5, 5000)).astype(np.float32)
  state = (jnp.float32(0), jnp.float32(0))
  high, low = jax.jit(
    lambda xs: jax.lax.scan(lambda s, x: (accumulator.add(*s, x), None), state, xs)[0]
  )(x)
  scale = np.abs(x.astype(np.float64)).sum()
  assert abs((float(high) + float(low)) - x.astype(np.float64).sum()) < 1e-12 * scale
  assert abs(float(np.cumsum(x)[-1]) - x.astype(np.float64).sum()) > 1e-10 * scale


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e6])
def test_welford_equals_numpy_in_float64(size, offset):
  x = (np.random.default_rng(size).standard_normal((7000 // size, size)) + offset).astype(
    np.float32
  )
  welford = metrics.Welford()
  scan_updates(welford, jnp.asarray(x))
  want, got = x.astype(np.float64), welford.compute()
  np.testing.assert_allclose(got.standard_deviation, want.std(), rtol=1e-6)
  np.testing.assert_allclose(got.mean, want.mean(), rtol=1e-6, atol=1e-7)
  error = want.std() / np.sqrt(want.size)
  np.testing.assert_allclose(got.standard_error_of_mean, error, rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=5))
def test_welford_does_not_depend_on_how_numbers_come_in_batches(parts):
  welford, kept = metrics.Welford("loss"), []
  for i, (size, masked) in enumerate(parts):
    x, mask = numbers(i, size) + 5, numbers(i + 9, size) > 0
    welford.update(loss=x, mask=mask if masked else None)
    kept.append(x[mask] if masked else x)
  kept = np.concatenate(kept).astype(np.float64)
  assert int(welford.count) == kept.size
  if kept.size:
    np.testing.assert_allclose(welford.compute().mean, kept.mean(), rtol=1e-6)
    np.testing.assert_allclose(welford.compute().standard_deviation, kept.std(), 1e-5, 1e-6)


def test_with_float64_nothing_of_a_batch_is_lost():
  with jax.enable_x64():
    x = np.random.default_rng(0).standard_normal(1000) + 1e7
    average, welford = metrics.Average(), metrics.Welford()
    for part in x.reshape(10, 100):
      average.update(values=part)
      welford.update(values=part)
    assert average.compute().dtype == jnp.float32
    total = np.float64(average.total) + np.float64(average.total_low)
    np.testing.assert_allclose(total, x.sum(), rtol=1e-13)
    np.testing.assert_allclose(welford.compute().standard_deviation, x.std(), rtol=1e-6)


# confusion matrix
def confusion_by_hand(labels, predictions, n):
  counts = np.zeros((n, n), np.int64)
  for row, column in zip(labels.ravel(), predictions.ravel(), strict=True):
    if 0 <= row < n:
      counts[row, column] += 1
  with np.errstate(invalid="ignore"):
    precision = np.diagonal(counts) / counts.sum(0)
    recall = np.diagonal(counts) / counts.sum(1)
    f1 = 2 * np.diagonal(counts) / (counts.sum(0) + counts.sum(1))
  return counts, precision, recall, f1


@pytest.mark.parametrize("run", RUNS)
def test_a_confusion_matrix_equals_counting_by_hand(run):
  batches = [of(classes(i, (5, 3)), "logits", "labels", "mask") for i in range(4)]
  matrix = metrics.ConfusionMatrix(4)
  RUNS[run](matrix, batches)
  labels = np.stack([np.where(b["mask"], b["labels"], -1) for b in batches])
  predictions = np.stack([b["logits"].argmax(-1) for b in batches])
  got = matrix.compute()
  for a, b in zip(jax.tree.leaves(got), confusion_by_hand(labels, predictions, 4), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  accuracy = metrics.Accuracy()
  RUNS["eager"](accuracy, batches)
  share = np.trace(got.counts) / got.counts.sum()
  np.testing.assert_allclose(accuracy.compute(), share, rtol=1e-6)
  matrix.reset()
  assert not matrix.counts.any()


def test_per_class_values_equal_scikit_learn():
  sklearn = pytest.importorskip("sklearn.metrics")
  batch = of(classes(3, (200,)), "logits", "labels")
  matrix = metrics.ConfusionMatrix(4)
  matrix.update(**batch)
  want = sklearn.precision_recall_fscore_support(batch["labels"], batch["logits"].argmax(-1))
  got = matrix.compute()
  for a, b in zip((got.precision, got.recall, got.f1), want[:3], strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  table = sklearn.confusion_matrix(batch["labels"], batch["logits"].argmax(-1))
  np.testing.assert_array_equal(got.counts, table)


def test_labels_that_are_no_class_are_not_counted():
  matrix = metrics.ConfusionMatrix(2)
  matrix.update(logits=jnp.eye(2)[jnp.array([0, 1, 1, 0])], labels=jnp.array([-1, 2, 1, 0]))
  assert matrix.compute().counts.tolist() == [[1, 0], [0, 1]]


def test_a_class_that_never_came_is_nan():
  matrix = metrics.ConfusionMatrix(3)
  matrix.update(logits=jnp.eye(3)[:2], labels=jnp.array([0, 1]))
  got = matrix.compute()
  for x in (got.precision, got.recall, got.f1):
    np.testing.assert_array_equal(x, [1, 1, np.nan])


def test_counts_stop_at_their_largest_number():
  matrix = metrics.ConfusionMatrix(2)
  matrix.counts[0, 0] = np.uint32(2**32 - 2)
  matrix.update(logits=jnp.eye(2)[jnp.zeros(5, int)], labels=jnp.zeros(5, int))
  assert int(matrix.counts[0, 0]) == 2**32 - 1


# transforms
def test_a_metric_per_example_under_nnx_vmap():
  many = nnx.vmap(lambda _: multi(nnx), axis_size=3)(jnp.arange(3))
  batch = of(classes(0, (3, 6)), "loss", "logits", "labels")
  nnx.vmap(lambda m, b: m.update(**b))(many, batch)
  nnx.vmap(lambda m, b: m.update(**b))(many, batch)
  got = nnx.vmap(lambda m: m.compute())(many)
  for i in range(3):
    one = multi(nnx)
    one.update(**jax.tree.map(lambda x, i=i: x[i], batch))
    assert_close(jax.tree.map(lambda x, i=i: x[i], got), _once_more(one, batch, i).compute())


def _once_more(metric, batch, i):
  metric.update(**jax.tree.map(lambda x: x[i], batch))
  return metric


def test_a_metric_inside_a_loss_takes_no_gradient():
  model, average = nnx.Linear(2, 1, rngs=nnx.Rngs(0)), metrics.Average("loss")

  def loss(model, average):
    value = (model(jnp.ones((3, 2))) ** 2).mean()
    average.update(loss=value)
    return value

  want = nnx.grad(lambda m: (m(jnp.ones((3, 2))) ** 2).mean())(model)
  value, grads = jax.jit(lambda m, a: nnx.value_and_grad(loss)(m, a))(model, average)
  np.testing.assert_allclose(grads["kernel"], want["kernel"], rtol=1e-6)
  assert float(average.compute()) == pytest.approx(float(value))


def test_an_update_is_traced_once():
  metric, traces = multi(nnx), []

  @jax.jit
  def update(metric, batch):
    traces.append(1)
    metric.update(**batch)

  for i in range(3):
    update(metric, of(classes(i), "loss", "logits", "labels"))
  metric.reset()
  update(metric, of(classes(4), "loss", "logits", "labels"))
  assert len(traces) == 1


def test_a_lojax_metric_and_a_copy_count_on_their_own():
  batch = of(classes(0), "loss", "logits", "labels")
  metric = nnx.to_lojax(multi(nnx))
  twin = copy.deepcopy(metric)
  metric.update(**batch)
  nnx.jit(lambda m: m.update(**batch))(metric)
  assert int(metric.loss.count) == 12 and int(twin.loss.count) == 0


# several metrics
def test_masks_by_name():
  batch = of(classes(0), "loss", "logits", "labels")
  mask = np.array([True, False, True, False, False, True])
  got, want = multi(nnx), multi(flax_nnx)
  got.update(**batch, mask={"accuracy": mask})
  want.update(**jax.tree.map(jnp.asarray, batch), mask={"accuracy": jnp.asarray(mask)})
  assert_close(got.compute(), want.compute())
  got.reset()
  got.update(**batch, mask=mask)
  assert {int(getattr(got, n).count) for n in ("loss", "accuracy", "statistics")} == {3}


def test_a_metric_of_ones_own_among_others():
  class Largest(nnx.Metric):
    def __init__(self):
      self.value = metrics.MetricState(-jnp.inf)

    def update(self, *, loss, **_):
      self.value[...] = jnp.maximum(self.value[...], loss.max())

    def compute(self):
      return self.value[...]

  both = nnx.MultiMetric(largest=Largest(), accuracy=metrics.Accuracy())
  batch = of(classes(0), "loss", "logits", "labels")
  jax.jit(lambda m, b: m.update(**b))(both, batch)
  assert float(both.compute()["largest"]) == batch["loss"].max()
  before = arrays(both)
  with pytest.raises(ShapeMismatchError, match="Accuracy compares"):
    both.update(**batch | {"labels": batch["labels"][:-1], "loss": batch["loss"] + 100})
  assert_same(arrays(both), before)
  with pytest.raises(NotImplementedError, match="Largest has no method reset"):
    both.reset()


def counted(*metrics_):
  return [float(m.count) for m in metrics_]


def test_one_metric_under_two_names_counts_twice():
  average = metrics.Average()
  other = metrics.Average()
  other.total = average.total  # and one that shares a part of its state
  for both in (nnx.MultiMetric(a=average, b=average), nnx.MultiMetric(a=average, b=other)):
    both.reset()
    both.update(values=jnp.array([1.0, 3.0]))
    assert float(average.total) == 8.0
  assert counted(average, other) == [2, 2]


def test_an_update_of_a_subclass_or_an_attribute_is_what_runs():
  class Twice(metrics.Average):
    def update(self, **kwargs):
      super().update(**kwargs)
      super().update(**kwargs)

  class Same(metrics.Accuracy):
    pass

  batch = classes(0) | {"mask": None}
  many = nnx.MultiMetric(twice=Twice("loss"), same=Same(), inner=nnx.MultiMetric(t=Twice("loss")))
  many.update(**{k: jnp.asarray(v) for k, v in batch.items() if v is not None})
  assert counted(many.twice, many.same, many.inner.t) == [12, 6, 12]


def test_nested_metrics_are_written_together_or_not_at_all():
  both = nnx.MultiMetric(inner=nnx.MultiMetric(loss=metrics.Average("loss")), a=metrics.Accuracy())
  batch = of(classes(0), "loss", "logits", "labels")
  both.update(**batch)
  before = arrays(both)
  with pytest.raises(ShapeMismatchError):
    both.update(**batch | {"labels": batch["labels"][:-1]})
  assert_same(arrays(both), before)
  assert counted(both.inner.loss, both.a) == [6, 6]


@pytest.mark.skipif(_jax._private() is None, reason="counts copies of buffers of Refs")
@pytest.mark.parametrize("kind", [metrics.Average, metrics.Welford])
def test_a_metric_copies_no_state_and_hands_out_none(kind, monkeypatch):
  metric, copies = kind(), []
  with monkeypatch.context() as patch:
    patch.setattr(_jax, "_copy", copies.append)
    metric.update(values=jnp.ones(2))
    value = metric.compute()
    metric.reset()
  assert not copies
  value = jax.tree.map(np.asarray, value)
  nnx.jit(lambda m: m.update(values=jnp.ones(3)))(metric)
  assert float(leaves(value)[0]) == 1.0 and int(metric.count) == 3


@pytest.mark.parametrize("hijax", [True, False])
def test_a_reset_keeps_what_has_been_computed(hijax):
  with nnx.use_hijax(hijax):
    matrix = metrics.ConfusionMatrix(2)
  matrix.update(logits=jnp.eye(2), labels=jnp.array([0, 1]))
  counts = matrix.compute().counts
  matrix.reset()
  matrix.update(logits=jnp.eye(2), labels=jnp.array([1, 1]))
  assert counts.tolist() == [[1, 0], [0, 1]]
  assert matrix.compute().counts.tolist() == [[0, 0], [1, 1]]


# errors
def batch(**changes):
  return of(classes(0), "loss", "logits", "labels") | changes


WRONG = {
  "missing": (
    lambda: metrics.Average("loss"), {"values": 1.0}, MissingArgumentError,
    "Average was not given loss\n"
    "  at:  Average.total  (MetricState, created at ",
    "  got: the keyword arguments values\n"
    "  fix: call update(loss=...), or build Average with another argname",
  ),
  "nothing": (
    metrics.Welford, {}, MissingArgumentError,
    "Welford was not given values\n",
    "  got: no keyword argument\n",
  ),
  "complex": (
    metrics.Average, {"values": np.ones(3, np.complex64)}, ShapeMismatchError,
    "Average takes real numbers\n"
    "  at:  Average.total",
    "  got: values of complex64[3]\n"
    "  fix: pass floats, integers or booleans: abs(x), or x.real",
  ),
  "no number": (
    metrics.Welford, {"values": "high"}, InvalidArgumentError,
    "Welford cannot work with this values\n",
    "  got: values='high'\n"
    "  fix: pass a number or an array of numbers",
  ),
  "mask": (
    metrics.Average, {"values": np.ones((4, 3)), "mask": np.ones(4)}, ShapeMismatchError,
    "the mask of Average has to broadcast to the input\n",
    "  got: a mask of shape (4,) for an input of shape (4, 3)\n",
  ),
  "labels shape": (
    metrics.Accuracy, {"logits": np.ones((4, 3)), "labels": np.zeros(3, int)}, ShapeMismatchError,
    "Accuracy compares a row of logits with a label\n"
    "  at:  Accuracy.total",
    "  got: logits of shape (4, 3) and labels of shape (3,)\n"
    "  fix: pass logits of shape (..., classes) and labels of shape (...)",
  ),
  "labels rank": (
    metrics.Accuracy, {"logits": np.ones((4, 3)), "labels": np.zeros((4, 3), int)},
    ShapeMismatchError, "Accuracy compares a row of logits with a label\n", "(4, 3)",
  ),
  "scalar logits": (
    metrics.Accuracy, {"logits": 1.0, "labels": 1}, ShapeMismatchError,
    "Accuracy compares a row of logits with a label\n", "logits of shape ()",
  ),
  "labels dtype": (
    metrics.Accuracy, {"logits": np.ones((4, 3)), "labels": np.zeros(4, np.float32)},
    ShapeMismatchError, "Accuracy takes labels that are integers\n",
    "  got: labels of float32[4]\n"
    "  fix: pass labels.astype(int), or for one-hot labels labels.argmax(-1)",
  ),
  "threshold": (
    lambda: metrics.Accuracy(0.5), {"logits": np.ones((4, 2)), "labels": np.zeros(4, int)},
    ShapeMismatchError, "Accuracy with a threshold compares one logit with one label\n",
    "  got: logits of shape (4, 2) and labels of shape (4,)\n"
    "  fix: pass both of one shape, or for classes build it without a threshold",
  ),
  "number of classes": (
    lambda: metrics.ConfusionMatrix(4), {"logits": np.ones((4, 3)), "labels": np.zeros(4, int)},
    ShapeMismatchError, "ConfusionMatrix was built for 4 classes\n  at:  ConfusionMatrix.counts",
    "  got: logits of shape (4, 3), with 3 on the last axis\n"
    "  fix: pass logits with 4 on the last axis, or build it with 3",
  ),
  "confusion labels": (
    lambda: metrics.ConfusionMatrix(3), {"logits": np.ones((4, 3)), "labels": np.zeros(4)},
    ShapeMismatchError, "ConfusionMatrix takes labels that are integers\n", "float32[4]",
  ),
  "the last of several": (
    lambda: multi(nnx), batch(mask={"statistics": np.ones((6, 6))}), ShapeMismatchError,
    "the mask of Welford has to broadcast to the input\n", "(6, 6)",
  ),
  "the place among several": (
    lambda: multi(nnx), batch(labels=np.zeros(5, int)), ShapeMismatchError,
    "Accuracy compares a row of logits with a label\n  at:  MultiMetric.accuracy.total", "(5,)",
  ),
  "a mask for no metric": (
    lambda: multi(nnx), batch(mask={"acuracy": np.ones(6)}), InvalidArgumentError,
    "MultiMetric cannot work with this mask\n",
    "  got: mask={'acuracy': Ellipsis}\n"
    "  fix: pass masks for loss, accuracy, statistics",
  ),
}  # fmt: skip


JITTED = [name for name in WRONG if name != "no number"]  # jax.jit takes no str


@pytest.mark.parametrize(
  ("name", "jit"), [*((name, False) for name in WRONG), *((name, True) for name in JITTED)]
)
def test_a_wrong_batch_is_refused_and_nothing_is_written(name, jit):
  build, arguments, kind, *parts = WRONG[name]
  metric = build()
  right = classes(7, n=getattr(metric, "num_classes", 4))
  if getattr(metric, "threshold", None) is not None:
    right["logits"] = right["logits"][..., 0]
  metric.update(**of(right, "loss", "values", "logits", "labels"))
  before = arrays(metric)
  update = lambda metric, arguments: metric.update(**arguments)
  with pytest.raises(kind) as error:
    (jax.jit(update) if jit else update)(metric, arguments)
  for part in parts:
    assert part in str(error.value)
  assert_same(arrays(metric), before)


REFUSED = {
  "threshold": (lambda: metrics.Accuracy("high"), "Accuracy cannot work with this threshold"),
  "boolean": (lambda: metrics.Accuracy(True), "got: threshold=True"),
  "argname": (lambda: metrics.Average(3), "Average cannot work with this argname"),
  "classes": (lambda: metrics.ConfusionMatrix(0), "ConfusionMatrix cannot work with this num_cla"),
  "no metric": (lambda: nnx.MultiMetric(loss=3), r"this loss\n.*got: loss=3\n.*pass an nnx.Metric"),
  "name": (
    lambda: nnx.MultiMetric(update=metrics.Average()),
    r"this update(.|\n)*fix: pass another name, for this one is a method's",
  ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_metric_can_be_built_with_is_refused(name):
  build, message = REFUSED[name]
  with pytest.raises(InvalidArgumentError, match=message):
    build()
