import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError, ShapeMismatchError, UnwantedWriteError

WRAPPERS = [nnx.WeightNorm, nnx.SpectralNorm]


def normal(shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def linear(*sizes):
  return nnx.Linear(*(sizes or (3, 4)), rngs=nnx.Rngs(0))


def wrap(wrapper, layer=None, **options):
  return wrapper(linear() if layer is None else layer, rngs=nnx.Rngs(1), **options)


def values(model, *filters):
  """A copy of the state that no later write changes."""
  return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(nnx.to_lojax(model), *filters)))


def assert_equal(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


def close(got, want):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


class Net(nnx.Module):
  """A layer with all that a layer can have: parts, state, randomness, something sown."""

  def __init__(self, rngs):
    self.layers = [nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)]
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x, *, scale=1.0):
    h = self.layers[1](self.layers[0](x))
    self.sow(nnx.Intermediate, "h", h)
    return scale * self.dropout(h), {"hidden": h, "name": "net"}


# what is computed
def test_weight_norm_gives_each_feature_a_direction_times_its_scale():
  model, x = wrap(nnx.WeightNorm), normal((2, 3))
  model.scales[("kernel",)][...] = jnp.array([1.0, 2.0, 3.0, 4.0])
  kernel = model.layer_instance.kernel[...]
  close(model(x), x @ (kernel / jnp.linalg.norm(kernel, axis=0)) * jnp.array([1.0, 2, 3, 4]))


@pytest.mark.parametrize(("feature_axes", "others", "shape"), [
  (-1, (0, 1), (4,)), (0, (1, 2), (2,)), ((0, -1), (1,), (2, 4)), (None, (0, 1, 2), ()),
])  # fmt: skip
def test_weight_norm_over_other_axes(feature_axes, others, shape):
  model = wrap(nnx.WeightNorm, nnx.Conv(3, 4, 2, rngs=nnx.Rngs(0)), feature_axes=feature_axes)
  assert model.scales[("kernel",)].shape == shape
  twin = nnx.clone(model.layer_instance)
  length = jnp.sqrt((twin.kernel[...] ** 2).sum(others, keepdims=True))
  twin.kernel[...] = twin.kernel[...] / length
  close(model(normal((2, 5, 3))), twin(normal((2, 5, 3))))


def test_weight_norm_without_scales():
  model = wrap(nnx.WeightNorm, use_scale=False)
  assert model.scales is None
  assert set(values(model, nnx.Param)) == {"layer_instance"}
  close(model(normal((2, 3))), wrap(nnx.WeightNorm)(normal((2, 3))))


def test_weight_norm_of_what_the_filter_selects():
  layer = nnx.Sequential(linear(3, 4), linear(4, 2))
  model = wrap(nnx.WeightNorm, layer)
  assert sorted(model.scales) == [("layers", 0, "kernel"), ("layers", 1, "kernel")]
  second = nnx.All(nnx.PathContains(1), nnx.PathContains("kernel"))
  model = wrap(nnx.WeightNorm, layer, variable_filter=second)
  assert sorted(model.scales) == [("layers", 1, "kernel")]
  model = wrap(nnx.WeightNorm, Net(nnx.Rngs(0)), variable_filter=..., feature_axes=None)
  names = (0, "bias"), (0, "kernel"), (1, "bias"), (1, "scale")
  assert sorted(model.scales) == [("layers", *name) for name in names]


def test_scales_that_are_drawn_differ():
  layer, rngs = nnx.Sequential(linear(3, 4), linear(4, 4)), nnx.Rngs(1)
  model = nnx.WeightNorm(layer, scale_init=nnx.initializers.normal(), rngs=rngs)
  first, second = model.scales.values()
  assert (first[...] != second[...]).all()


@pytest.mark.parametrize(("wrapper", "names"), [
  (nnx.WeightNorm, {"scales.kernel"}),
  (nnx.SpectralNorm, {"batch_stats.kernel.u", "batch_stats.kernel.sigma"}),
])  # fmt: skip
def test_a_path_that_is_a_key_is_named_by_its_steps_in_a_file(wrapper, names, tmp_path):
  other = wrap(wrapper, nnx.Linear(3, 4, rngs=nnx.Rngs(2)))
  model, path = wrap(wrapper), tmp_path / "x.safetensors"
  model(normal((2, 3)))
  nnx.save_safetensors(model, path)
  report = nnx.load_safetensors(other, path)
  assert set(report.loaded) == names | {"layer_instance.bias", "layer_instance.kernel"}
  assert_equal(values(other), values(model))


def test_spectral_norm_finds_the_largest_singular_value():
  model, eye = wrap(nnx.SpectralNorm), jnp.eye(3)
  for _ in range(60):
    y = model(eye)
  want = jnp.linalg.svd(model.layer_instance.kernel[...])[1][0]
  np.testing.assert_allclose(model.batch_stats[("kernel", "sigma")], want, rtol=1e-4)
  np.testing.assert_allclose(jnp.linalg.norm(y, ord=2), 1, rtol=1e-4)
  several = wrap(nnx.SpectralNorm, n_steps=60)
  close(several(eye), y)


def test_spectral_norm_in_evaluation_keeps_its_estimates():
  model, x = wrap(nnx.SpectralNorm, update_stats=False), normal((2, 3))
  before, want = values(model), model(x)
  assert_equal(values(model), before)
  model.train()
  close(model(x), want)
  close(model(x), x @ (linear().kernel[...] / model.batch_stats[("kernel", "sigma")][...]))
  model.eval()
  before = values(model)
  close(model(x), model(x))
  assert_equal(values(model), before)
  model(x, update_stats=True)
  u = lambda state: state["batch_stats"]["kernel", "u"]
  assert (u(values(model)) != u(before)).any()


def test_spectral_norm_leaves_vectors_and_zeros_as_they_are():
  assert not wrap(nnx.SpectralNorm, nnx.LayerNorm(3, rngs=nnx.Rngs(0))).batch_stats
  layer = linear()
  layer.kernel[...] = jnp.zeros((3, 4))
  assert not wrap(nnx.SpectralNorm, layer)(normal((2, 3))).any()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_normalized_weights_have_the_dtype_that_is_asked_for(wrapper):
  layer = nnx.Linear(3, 4, use_bias=False, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  x = normal((2, 3)).astype(jnp.bfloat16)
  assert wrap(wrapper, layer)(x).dtype == jnp.float32
  assert wrap(wrapper, layer, dtype=jnp.bfloat16)(x).dtype == jnp.bfloat16
  assert layer.kernel.dtype == jnp.bfloat16


# gradients and state
@pytest.mark.parametrize("hijax", [True, False])
def test_gradients_flow_through_the_normalization(hijax):
  with nnx.use_hijax(hijax):
    model = wrap(nnx.WeightNorm)
  x, kernel = normal((2, 3)), model.layer_instance.kernel[...]
  by_hand = lambda w, s: (jnp.sin(x @ (w / jnp.sqrt((w**2).sum(0))) * s)).sum()
  want = jax.grad(by_hand, (0, 1))(kernel, jnp.ones(4))
  loss = lambda model: jnp.sin(model(x)).sum()
  for grads in (nnx.grad(loss)(model), nnx.jit(nnx.grad(loss))(model),
                nnx.grad(nnx.remat(loss))(model), jax.grad(loss)(nnx.to_lojax(model))):  # fmt: skip
    got = nnx.to_pure_dict(nnx.state(grads))
    close((got["layer_instance"]["kernel"], got["scales"][("kernel",)]), want)


def test_the_gradient_of_spectral_norm_is_that_of_the_singular_value():
  model, x = wrap(nnx.SpectralNorm, n_steps=100), normal((2, 3))
  by_hand = lambda w: (x @ (w / jnp.linalg.svd(w, full_matrices=False)[1][0])).sum()
  want = jax.grad(by_hand)(model.layer_instance.kernel[...])
  got = nnx.grad(lambda model: model(x).sum())(model)["layer_instance"]["kernel"][...]
  np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_weights_of_the_layer_stay_its_own(wrapper):
  model = wrap(wrapper)
  before = values(model, nnx.Param)
  for _ in range(3):
    model(normal((2, 3)))
  assert_equal(values(model, nnx.Param), before)


@pytest.mark.parametrize("hijax", [True, False])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_the_layer_changes_is_changed(wrapper, hijax):
  with nnx.use_hijax(hijax):
    net = Net(nnx.Rngs(0))
    model = wrap(wrapper, net)
  x = normal((8, 3))
  y, extra = model(x, scale=2.0)
  assert extra["name"] == "net"
  assert np.isin(np.asarray(y / extra["hidden"]).round(3), [0.0, 4.0]).all()
  close(net.h[0], extra["hidden"])
  assert net.layers[1].mean[...].any()
  mean, count = np.array(net.layers[1].mean), int(net.dropout.rngs.count[...])
  assert count == 1
  model(x)
  assert int(net.dropout.rngs.count[...]) == 2
  assert (net.layers[1].mean[...] != mean).all()
  assert model.layer_instance is net


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_state_under_plain_jit_and_remat_moves_as_without(wrapper):
  plain, jitted, kept = (wrap(wrapper, nnx.Sequential(linear(), nnx.BatchNorm(4, rngs=nnx.Rngs(0))))
                         for _ in range(3))  # fmt: skip
  apply, x = lambda model, x: model(x), normal((8, 3))
  for _ in range(2):
    want = plain(x)
    close(jax.jit(apply)(jitted, x), want)
    close(jax.jit(jax.checkpoint(apply))(kept, x), want)
  close(values(jitted), values(plain))
  close(values(kept), values(plain))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_state_moves_once_under_the_gradient_of_a_recomputation(wrapper):
  layer = lambda: nnx.Sequential(linear(), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
  model, twin = wrap(wrapper, layer()), wrap(wrapper, layer())
  loss = lambda model, x: (model(x) ** 3).sum()
  grads = nnx.jit(nnx.grad(nnx.remat(loss)))(model, normal((8, 3)))
  want = nnx.grad(loss)(twin, normal((8, 3)))
  np.testing.assert_allclose(
    grads["layer_instance"]["layers"][1]["scale"], want["layer_instance"]["layers"][1]["scale"],
    rtol=1e-3, atol=1e-3)  # fmt: skip
  close(values(model), values(twin))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_stacked_wrappers_are_mapped(wrapper):
  build = lambda rngs: wrapper(nnx.Linear(3, 4, rngs=rngs), rngs=rngs)
  models, x = nnx.vmap(build)(nnx.Rngs(0).split(3)), normal((3, 2, 3))
  each = [nnx.clone(jax.tree.map(lambda v, i=i: v[i], nnx.to_lojax(models))) for i in range(3)]
  want = jnp.stack([one(x[i]) for i, one in enumerate(each)])
  apply = lambda model, x: model(x)
  for transform in (jax.vmap, nnx.vmap):
    stacked = nnx.clone(models)
    close(transform(apply)(stacked, x), want)
    close(values(stacked), jax.tree.map(lambda *v: np.stack(v), *map(values, each)))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_is_trained(wrapper):
  model, x = wrap(wrapper), normal((16, 3))
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
  y = jnp.tanh(x @ normal((3, 4), 1))

  @nnx.jit
  def step(model, optimizer):
    loss, grads = nnx.value_and_grad(lambda model: ((model(x) - y) ** 2).mean())(model)
    optimizer.update(model, grads)
    return loss

  before, losses = values(model, nnx.Param), [step(model, optimizer) for _ in range(50)]
  assert losses[-1] < 0.7 * losses[0]
  after = values(model, nnx.Param)
  jax.tree.map(lambda a, b: np.testing.assert_equal((a != b).any(), True), before, after)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_survives_split_and_merge(wrapper):
  model, x = wrap(wrapper), normal((2, 3))
  twin = nnx.merge(*nnx.split(model))
  close(twin(x), wrap(wrapper)(x))
  assert nnx.graphdef(model) == nnx.graphdef(twin) == nnx.graphdef(wrap(wrapper))
  close(nnx.merge(nnx.graphdef(model), nnx.state(wrap(wrapper)))(x), wrap(wrapper)(x))


def test_wrappers_wrap_wrappers():
  model, x = wrap(nnx.SpectralNorm, wrap(nnx.WeightNorm)), normal((2, 3))
  inner = wrap(nnx.WeightNorm)(jnp.eye(3))
  weight = ("layer_instance", "kernel")
  assert sorted(model.batch_stats) == [(*weight, "sigma"), (*weight, "u")]
  # A direction does not depend on the length that the outer wrapper gives the weight.
  close(model(x), x @ inner)


# errors
def test_a_layer_that_fails_leaves_the_estimates_as_they_were():
  model = wrap(nnx.SpectralNorm)
  before = values(model)
  with pytest.raises(ShapeMismatchError, match="Linear maps vectors of size 3"):
    model(jnp.ones((2, 5)))
  assert_equal(values(model), before)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("layer", [jnp.tanh, None, nnx.Dict(a=1)])
def test_what_is_no_layer_is_refused(wrapper, layer):
  with pytest.raises(InvalidArgumentError) as error:
    wrapper(layer, rngs=nnx.Rngs(0))
  lines = error.value.args[0].split("\n")
  assert lines[0] == f"{wrapper.__name__} cannot work with this layer_instance"
  assert lines[1].startswith("  got: layer_instance=")
  assert lines[2] == "  fix: pass a Module that can be called: nnx.Linear(...)"


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_is_not_rngs_is_refused(wrapper):
  with pytest.raises(InvalidArgumentError, match=r"got: rngs=0\n  fix: pass rngs=nnx.Rngs\(0\)"):
    wrapper(linear(), rngs=0)


def test_a_filter_that_matches_nothing_is_refused():
  with pytest.raises(InvalidArgumentError) as error:
    wrap(nnx.WeightNorm, nnx.Embed(3, 4, rngs=nnx.Rngs(0)))
  assert error.value.args[0] == (
    "WeightNorm cannot work with this variable_filter\n"
    "  got: variable_filter=PathContains('kernel', True)\n"
    "  fix: pass a filter that matches Params of the layer: nnx.PathContains('kernel')"
  )


def test_axes_that_a_weight_lacks_are_refused():
  with pytest.raises(InvalidArgumentError) as error:
    wrap(nnx.WeightNorm, feature_axes=(0, 2))
  lines = error.value.args[0].split("\n")
  assert lines[1] == "  got: feature_axes=(0, 2)"
  assert lines[2].startswith("  fix: pass axes of each weight; the shape of WeightNorm.layer_inst")
  assert lines[2].endswith("is (3, 4)")


def test_a_weight_that_is_no_matrix_can_be_refused():
  conv = nnx.Conv(3, 4, 2, rngs=nnx.Rngs(0))
  with pytest.raises(ShapeMismatchError) as error:
    wrap(nnx.SpectralNorm, conv, error_on_non_matrix=True)
  lines = error.value.args[0].split("\n")
  assert lines[0] == "SpectralNorm with error_on_non_matrix=True takes matrices"
  assert lines[1].startswith("  at:  SpectralNorm.layer_instance.kernel  (Param, created")
  assert lines[2] == "  got: a weight of shape (2, 3, 4)"
  assert lines[3] == "  fix: build it with error_on_non_matrix=False, or wrap another layer"
  assert wrap(nnx.SpectralNorm, conv)(normal((5, 3))).shape == (5, 4)


def test_no_steps_are_refused():
  with pytest.raises(InvalidArgumentError, match=r"got: n_steps=0\n  fix: pass an int of at least"):
    wrap(nnx.SpectralNorm, n_steps=0)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_layer_that_writes_its_weight_is_refused(wrapper):
  class Restless(nnx.Linear):
    def __call__(self, x):
      self.kernel[...] = 0 * self.kernel[...]
      return super().__call__(x)

  model = wrap(wrapper, Restless(3, 4, rngs=nnx.Rngs(0)))
  before = values(model)
  with pytest.raises(UnwantedWriteError) as error:
    model(normal((2, 3)))
  lines = error.value.args[0].split("\n")
  assert lines[0] == f"{wrapper.__name__} computes this weight anew in each call"
  assert lines[1].startswith(f"  at:  {wrapper.__name__}.layer_instance.kernel  (Param")
  assert lines[2] == "  got: a write of the layer that it wraps"
  assert_equal(values(model), before)
