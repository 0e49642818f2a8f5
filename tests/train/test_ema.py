"""EMA equals its closed form, and a block with the averages leaves the model as it was."""

import copy
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refax import nnx
from refax.errors import InvalidArgumentError, TreeMismatchError

flax_nnx = pytest.importorskip("flax.nnx", reason="EMA is compared with Flax NNX")


class Net(nnx.Module):
  """A layer, a statistic, an integer Param, a random stream; a tied weight if asked for."""

  def __init__(self, dtype=jnp.float32, tied=False):
    self.a = nnx.Linear(2, 2, rngs=nnx.Rngs(0), param_dtype=dtype)
    self.b = nnx.Linear(2, 2, rngs=nnx.Rngs(1), param_dtype=dtype)
    self.table = nnx.Param(jnp.arange(3))
    self.stat = nnx.BatchStat(0.0)
    self.rngs = nnx.Rngs(0)
    if tied:
      self.b.kernel = self.a.kernel

  def __call__(self, x):
    return self.b(jnp.tanh(self.a(x)))


def arrays(tree):
  return [np.asarray(x) for x in jax.tree.leaves(nnx.to_lojax(tree)) if x.dtype != KEY]


KEY = jax.random.key(0).dtype


def assert_same_bits(got, want):
  for a, b in zip(got, want, strict=True):
    assert a.dtype == b.dtype
    assert a.tobytes() == b.tobytes()


def history(seed, count, shape=(2, 2)):
  return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def debiased(xs, decay):
  """The closed form, in float64."""
  if decay == 1:
    return xs.astype(np.float64).mean(0)
  weights = (1 - decay) * decay ** np.arange(len(xs))[::-1]
  return np.tensordot(weights / (1 - decay ** len(xs)), xs.astype(np.float64), 1)


RUNS = {
  "eager": lambda f: f,
  "jax.jit": jax.jit,
  "nnx.jit": nnx.jit,
  "jax.checkpoint": lambda f: jax.jit(jax.checkpoint(f)),
}


def train(run, model, ema, xs):
  @run
  def step(model, ema, x):
    model.a.kernel[...] = x
    ema.update(model)

  for x in xs:
    step(model, ema, x)


@pytest.mark.parametrize(
  ("run", "hijax"), [*((run, True) for run in RUNS), ("eager", False), ("nnx.jit", False)]
)
@pytest.mark.parametrize("debias", [False, True], ids=["plain", "debias"])
def test_the_average_equals_its_closed_form_in_every_way_to_run_it(run, hijax, debias):
  model, decay, xs = Net(), 0.8, history(0, 6)
  model = model if hijax else nnx.to_lojax(model)
  start = np.asarray(model.a.kernel)
  ema = nnx.EMA(model, decay, only=nnx.Param, debias=debias)
  train(RUNS[run], model, ema, xs)
  weights = (1 - decay) * decay ** np.arange(6)[::-1]
  want = decay**6 * start + np.tensordot(weights, xs, 1)
  want = debiased(xs, decay) if debias else want
  np.testing.assert_allclose(ema.params["a"]["kernel"], want, rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(ema.params["a"]["bias"], 0)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([0.0, 0.3, 0.9, 0.999, 0.99999, 1.0]), st.integers(1, 9))
def test_a_debiased_average_forgets_the_start(decay, count):
  model = {"w": nnx.Param(jnp.full((2, 2), jnp.nan))}
  ema = nnx.EMA(model, decay, debias=True)
  for x in history(count, count):
    model["w"][...] = x
    ema.update(model)
  want = debiased(history(count, count), decay)
  np.testing.assert_allclose(ema.params["w"], want, rtol=2e-5, atol=1e-6)
  assert int(ema.step) == count


def test_a_debiased_average_of_many_updates_equals_its_closed_form():
  xs, model = history(0, 2000) + 1, {"w": nnx.Param(jnp.zeros((2, 2)))}
  ema = nnx.EMA(model, 0.999, debias=True)

  @jax.jit
  def run(model, ema, xs):
    def body(carry, x):
      model["w"][...] = x
      ema.update(model)
      return carry, None

    jax.lax.scan(body, None, xs)

  run(model, ema, xs)
  np.testing.assert_allclose(ema.params["w"], debiased(xs, 0.999), rtol=1e-5)


def test_it_equals_flax_nnx():
  xs = history(0, 5)
  own, other = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), flax_nnx.Linear(2, 2, rngs=flax_nnx.Rngs(0))
  own.kernel[...] = np.asarray(other.kernel[...])
  emas = nnx.EMA(own, 0.7), flax_nnx.EMA(other, 0.7)
  for x in xs:
    for model, ema in zip((own, other), emas, strict=True):
      model.kernel[...] = jnp.asarray(x)
      ema.update(model)
  for name in ("kernel", "bias"):
    np.testing.assert_allclose(emas[0].params[name], emas[1].params[name][...], rtol=1e-6)
  views = emas[0].apply_to(own), emas[1].apply_to(other)
  assert isinstance(views[0].kernel, nnx.Param)
  np.testing.assert_allclose(views[0](xs[0]), views[1](xs[0]), rtol=1e-5)
  signatures = [
    list(inspect.signature(lib.EMA.__init__).parameters.values()) for lib in (nnx, flax_nnx)
  ]
  pairs = zip(*signatures, strict=False)
  assert all((a.name, a.kind, a.default) == (b.name, b.kind, b.default) for a, b in [*pairs][:4])


def test_a_value_that_stays_is_its_own_average():
  model = {"w": nnx.Param(jnp.zeros(()))}
  ema = nnx.EMA(model, 0.9999)
  ema.params["w"][...] = 3.0
  model["w"][...] = 3.0
  scan = lambda m, e: jax.lax.scan(lambda c, _: (c, e.update(m)), None, None, length=20_000)[1]
  jax.jit(scan)(model, ema)
  assert float(ema.params["w"]) == 3.0


# what is averaged
def test_everything_but_integers_and_keys_is_averaged_by_default():
  ema = nnx.EMA(Net(), 0.5)
  paths = {path for path, _ in nnx.to_flat_state(ema.params)}
  layers = {(layer, name) for layer in "ab" for name in ("kernel", "bias")}
  assert paths == layers | {("stat",)}
  assert all(isinstance(v, nnx.EMAState) for _, v in nnx.to_flat_state(ema.params))
  assert ema.step is None and ema.decay == 0.5


@pytest.mark.parametrize("only", [nnx.Param, nnx.PathContains("a"), ["stat", nnx.BatchStat]])
def test_only_selects_what_is_averaged(only):
  model = Net()
  ema = nnx.EMA(model, 0.5, only=only)
  before = arrays(ema)
  for v in (model.a.kernel, model.stat):
    v[...] += 1.0
  jax.jit(lambda e, m: e.update(m))(ema, model)
  changed = [bool((a != b).any()) for a, b in zip(arrays(ema), before, strict=True)]
  assert sum(changed) == 1


def test_a_tied_weight_has_one_average():
  model = Net(tied=True)
  ema = nnx.EMA(model, 0.5, only=nnx.Param)
  assert ("b", "kernel") not in {path for path, _ in nnx.to_flat_state(ema.params)}
  kernel = np.asarray(model.a.kernel)
  model.a.kernel[...] = kernel + 1
  ema.update(model)
  view = ema.apply_to(model)
  assert view.a.kernel is view.b.kernel
  np.testing.assert_allclose(view.b.kernel, kernel + 0.5, rtol=1e-6)
  with ema.applied(model):
    np.testing.assert_allclose(model.b.kernel, kernel + 0.5, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_averages_of_short_floats_are_float32(dtype):
  model = Net(dtype)
  ema = nnx.EMA(model, 0.999, only=nnx.Param)
  model.a.kernel[...] = jnp.ones((2, 2), dtype)
  ema.params["a"]["kernel"][...] = 0.0
  for _ in range(3):
    jax.jit(lambda e, m: e.update(m))(ema, model)
  assert ema.params["a"]["kernel"].dtype == jnp.float32
  np.testing.assert_allclose(ema.params["a"]["kernel"], 1 - 0.999**3, rtol=1e-4)
  with ema.applied(model):
    assert model.a.kernel.dtype == dtype
    want = ema.params["a"]["kernel"][...].astype(dtype)
    np.testing.assert_array_equal(model.a.kernel, want)
  np.testing.assert_array_equal(model.a.kernel, 1)


@pytest.mark.parametrize(
  "form",
  [lambda m: m, nnx.state, lambda m: nnx.state(m, nnx.Param), lambda m: _pure(m)],
  ids=["model", "state", "params", "pure dict"],
)
def test_an_update_takes_a_model_a_state_or_dicts(form):
  model = Net()
  ema = nnx.EMA(model, 0.5, only=nnx.Param)
  kernel = np.asarray(model.a.kernel)
  model.a.kernel[...] = kernel + 1
  ema.update(form(model))
  np.testing.assert_allclose(ema.params["a"]["kernel"], kernel + 0.5, rtol=1e-6)


def _pure(model):
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def test_a_state_of_arrays_can_be_averaged():
  ema = nnx.EMA(nnx.State({"a": {"w": jnp.ones(2)}}), 0.5)
  ema.update({"a": {"w": jnp.zeros(2)}})
  assert ema.params["a"]["w"][...].tolist() == [0.5, 0.5]


def test_metadata_is_kept_and_no_gradient_flows():
  model = {"w": nnx.Param(jnp.ones(2), tag=("x",))}
  ema = nnx.EMA(model, 0.5)
  assert ema.params["w"].get_metadata("tag") == ("x",)

  def loss(w):
    ema.update({"w": w})
    return (w**2).sum()

  np.testing.assert_array_equal(jax.jit(jax.grad(loss))(jnp.ones(2)), [2.0, 2.0])


# the model with the averages
def test_a_model_with_the_averages_follows_the_updates():
  model = Net()
  ema = nnx.EMA(model, 0.5, only=nnx.Param)
  view = ema.apply_to(model)
  before = arrays(model)
  model.a.kernel[...] += 1.0
  ema.update(model)
  np.testing.assert_array_equal(view.a.kernel, ema.params["a"]["kernel"])
  view.stat[...] = 5.0
  assert float(model.stat) == 5.0, "what is not averaged is shared with the model"
  model.a.kernel[...] -= 1.0
  model.stat[...] = 0.0
  for a, b in zip(arrays(model), before, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  assert isinstance(view, Net) and jax.jit(lambda m, x: m(x))(view, jnp.ones(2)).shape == (2,)


def test_copy_to_writes_the_averages_for_good():
  model, other = Net(), Net(jnp.bfloat16)
  ema = nnx.EMA(model, 0.5, only=nnx.Param)
  model.a.kernel[...] += 1.0
  ema.update(model)
  jax.jit(lambda e, m: e.copy_to(m))(ema, other)
  want = ema.params["a"]["kernel"][...].astype(jnp.bfloat16)
  np.testing.assert_array_equal(other.a.kernel, want)


@pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
@pytest.mark.parametrize("raises", [False, True], ids=["ends", "raises"])
def test_a_block_with_the_averages_restores_every_bit(hijax, raises):
  model = Net() if hijax else nnx.to_lojax(Net())
  ema = nnx.EMA(model, 0.5)
  bits = np.array([0x7FC12345, 0x80000000, 0x00000001, 0xFF800000], np.uint32)  # nan, -0, tiny
  model.a.kernel[...] = bits.view(np.float32).reshape(2, 2)
  model.stat[...] = 7.0
  before, averages = arrays(model), arrays(ema)

  def block():
    with ema.applied(model):
      assert float(model.stat) == 0.0
      assert np.isfinite(model.a.kernel).all()
      model.a.bias[...] = 9.0
      if raises:
        raise KeyError("stop")

  if raises:
    with pytest.raises(KeyError, match="stop"):
      block()
  else:
    block()
  assert_same_bits(arrays(model), before)
  assert_same_bits(arrays(ema), averages)


def test_a_block_with_the_averages_inside_jit():
  model = Net()
  ema = nnx.EMA(model, 0.5, only=nnx.Param, debias=True)
  for _ in range(2):
    model.a.kernel[...] += 1.0
    ema.update(model)
  before = arrays((model, ema))

  @jax.jit
  def evaluate(model, ema, x):
    with ema.applied(model):
      return model(x)

  want = ema.apply_to(model)(jnp.ones(2))
  np.testing.assert_allclose(evaluate(model, ema, jnp.ones(2)), want, rtol=1e-6)
  assert_same_bits(arrays((model, ema)), before)


def test_training_goes_on_after_a_block():
  model = Net()
  ema = nnx.EMA(model, 0.5, only=nnx.Param)

  @nnx.jit
  def step(model, ema):
    model.a.kernel[...] += 1.0
    ema.update(model)

  kernel = np.asarray(model.a.kernel)
  for _ in range(3):
    step(model, ema)
    with ema.applied(model):
      nnx.jit(lambda m, x: m(x))(model, jnp.ones(2))
  np.testing.assert_allclose(model.a.kernel, kernel + 3, rtol=1e-6)
  want = kernel + 1 * 0.125 + 2 * 0.25 + 3 * 0.5
  np.testing.assert_allclose(ema.params["a"]["kernel"], want, rtol=1e-6)


def test_it_is_split_copied_and_updated_as_any_object():
  model = Net()
  ema = nnx.EMA(model, 0.5, only=nnx.Param, debias=True)
  twin = nnx.merge(*nnx.split(ema))
  apart = copy.deepcopy(ema)
  model.a.kernel[...] = 1.0
  twin.update(model)
  assert int(ema.step) == 1 and int(apart.step) == 0
  np.testing.assert_array_equal(ema.params["a"]["kernel"], 1.0)
  nnx.update(apart, nnx.to_pure_dict(nnx.state(ema)))
  assert_same_bits(arrays(apart), arrays(ema))


def test_many_averages_under_nnx_vmap():
  models = nnx.vmap(lambda seed: nnx.Linear(2, 2, rngs=nnx.Rngs(seed)))(jnp.arange(3))
  emas = nnx.vmap(lambda m: nnx.EMA(m, 0.5))(models)
  kernels = np.asarray(models.kernel)
  models.kernel[...] = kernels + 1
  nnx.vmap(lambda e, m: e.update(m))(emas, models)
  np.testing.assert_allclose(emas.params["kernel"], kernels + 0.5, rtol=1e-6)


# errors
class Other(Net):
  """A Net whose second layer has another size, is missing, or is not alone."""

  def __init__(self, how):
    super().__init__()
    if how == "shape":
      self.b = nnx.Linear(2, 5, rngs=nnx.Rngs(0))
    elif how == "missing":
      del self.b
    elif how == "integer":
      self.b.bias = nnx.Param(jnp.zeros(2, int))
    else:
      self.c = nnx.Param(jnp.ones(3))


WRONG = {
  "shape": (".b.bias", "float32[5] for the average float32[2]"),
  "missing": (".b.bias", "nothing for float32[2]"),
  "integer": (".b.bias", "nothing for float32[2]"),
  "more": (".c", "float32[3], which has no average"),
}


@pytest.mark.parametrize("method", ["update", "apply_to", "copy_to", "applied"])
@pytest.mark.parametrize("how", WRONG)
def test_another_structure_is_refused_and_nothing_is_written(how, method):
  at, got = WRONG[how]
  ema, other = nnx.EMA(Net(), 0.5, only=nnx.Param, debias=True), Other(how)
  before = arrays((ema, other))

  def call(ema, other):
    if method != "applied":
      return getattr(ema, method)(other)
    with ema.applied(other):
      raise AssertionError("the block ran")

  for run in (call, jax.jit(lambda e, o: call(e, o) and None)):
    with pytest.raises(TreeMismatchError) as error:
      run(ema, other)
    assert error.value.args[0] == (
      "the model does not have the structure of the averages\n"
      f"  at:  {at}\n"
      f"  got: {got}\n"
      "  fix: pass the model that the EMA was built for, or build an EMA for this one"
    )
  assert_same_bits(arrays((ema, other)), before)


@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan"), "high", None])
def test_a_decay_is_a_number_from_0_to_1(decay):
  with pytest.raises(InvalidArgumentError, match=r"this decay\n(.|\n)*fix: pass a number from 0 t"):
    nnx.EMA(Net(), decay)


def test_a_single_variable_is_refused():
  with pytest.raises(InvalidArgumentError, match=r"this params(.|\n)*a Module, or a dict of Var"):
    nnx.EMA(nnx.Param(1.0), 0.9)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float16, jnp.bfloat16])
def test_averages_of_small_floats_are_float32(dtype):
  model = nnx.Dict(w=nnx.Param(jnp.ones(2, dtype)))
  ema = nnx.EMA(model, decay=0.999)
  model.w[...] = jnp.full(2, 2.0, dtype)
  ema.update(model)
  assert ema.params["w"].dtype == jnp.float32
  np.testing.assert_allclose(ema.params["w"][...], 1.001, rtol=1e-6)
