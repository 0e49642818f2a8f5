import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError, MissingArgumentError, ShapeMismatchError


def data(shape=(8, 3), seed=0, dtype=jnp.float32):
  return jnp.asarray(2 + 3 * np.random.default_rng(seed).standard_normal(shape), dtype)


def batch_norm(size=3, **options):
  return nnx.BatchNorm(size, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("fast", [True, False])
def test_batch_norm_gives_each_feature_mean_0_and_variance_1(fast):
  y = batch_norm(use_fast_variance=fast)(data((64, 3)))
  np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
  np.testing.assert_allclose(y.var(0), 1, atol=1e-4)


def test_training_moves_the_running_statistics_and_evaluation_uses_them():
  model, x = batch_norm(momentum=0.5), data()
  model(x)
  mean, var = 0.5 * x.mean(0), 0.5 + 0.5 * x.var(0)
  np.testing.assert_allclose(model.mean, mean, rtol=1e-5)
  np.testing.assert_allclose(model.var, var, rtol=1e-4)
  model.eval()
  y = model(x)
  np.testing.assert_allclose(y, (x - mean) / jnp.sqrt(var + 1e-5), rtol=1e-4)
  np.testing.assert_allclose(model.mean, mean, rtol=1e-5)  # left as it was
  model.train()
  model(x)
  assert not np.allclose(model.mean, mean)


def test_the_argument_of_the_call_goes_before_the_attribute():
  model, x = batch_norm(), data()
  model(x, use_running_average=True)
  assert not model.mean[...].any()
  model.eval()
  model(x, use_running_average=False)
  assert model.mean[...].any()


@pytest.mark.parametrize("hijax", [True, False])
def test_running_statistics_under_plain_jax_transforms(hijax):
  with nnx.use_hijax(hijax):
    model, twin = batch_norm(), batch_norm()
  x = data()
  want = twin(x)

  def step(model, x):
    return model(x), model.mean[...]

  for transform in (jax.jit, lambda f: jax.jit(jax.checkpoint(f))):
    y, mean = transform(step)(model, x)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    if hijax:
      np.testing.assert_allclose(model.mean, twin.mean, rtol=1e-5)
      twin(x)
    else:  # what is assigned inside is local to the trace
      np.testing.assert_allclose(mean, twin.mean, rtol=1e-5)
      assert not model.mean[...].any()


def test_under_grad_of_checkpoint_the_statistics_move_once_and_the_gradient_is_right():
  model, x = batch_norm(), data()
  loss = lambda model, x: (model(x) ** 3).sum()
  by_hand = lambda x: (((x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)) ** 3).sum()
  want = jax.grad(by_hand)(x)
  got = jax.jit(jax.grad(jax.checkpoint(loss), argnums=1))(model, x)
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(model.mean, 0.01 * x.mean(0), rtol=1e-4)


def test_stacked_batch_norms_are_mapped():
  models = jax.vmap(lambda rngs: nnx.BatchNorm(3, rngs=rngs))(nnx.Rngs(0).split(2))
  x = data((2, 8, 3))
  y = jax.vmap(lambda model, x: model(x))(models, x)
  assert models.mean.shape == (2, 3)
  for i in range(2):
    one = batch_norm()
    np.testing.assert_allclose(y[i], one(x[i]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(models.mean[i], one.mean, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_statistics_of_half_precision_are_float32(dtype):
  model = batch_norm(1, momentum=0.0, param_dtype=dtype, dtype=dtype)
  x = jnp.ones((4096, 1), dtype).at[0].set(2.0)  # the sum is beyond what the dtype counts
  assert model(x).dtype == dtype
  assert model.mean.dtype == model.var.dtype == jnp.float32
  np.testing.assert_allclose(model.mean, 1 + 1 / 4096, rtol=1e-6)


def test_complex_numbers_are_normalized():
  model = batch_norm(momentum=0.0, param_dtype=jnp.complex64)
  x = data() + 1j * data(seed=1)
  y = model(x)
  np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
  np.testing.assert_allclose((jnp.abs(y) ** 2).mean(0), 1, atol=1e-4)
  assert (model.mean.dtype, model.var.dtype) == (jnp.complex64, jnp.float32)
  with pytest.raises(ShapeMismatchError, match=r"at:  BatchNorm\.mean(.|\n)*complex64"):
    batch_norm()(x)


def test_batch_norm_over_shards_is_that_of_the_whole_batch():
  """Also where a mask leaves more in one shard than in another, and in groups of shards."""
  program = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import PartitionSpec as P
    from refax import nnx

    nnx.use_hijax(False)
    kind = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("i",), axis_types=kind)
    x = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    mask = np.arange(8)[:, None] % 3 > 0

    def run(x, mask, groups):
      def step(x, mask):
        model = nnx.BatchNorm(3, axis_name="i", axis_index_groups=groups, rngs=nnx.Rngs(0))
        return model(x, mask=mask), model.var[...][None]
      specs = dict(in_specs=(P("i"), P("i")), out_specs=(P("i"), P("i")), check_vma=False)
      return jax.jit(jax.shard_map(step, mesh=mesh, **specs))(x, mask)

    def whole(x, mask):
      model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      return model(x, mask=mask), model.var[...]

    for mask in (mask, None):
      got, var = run(x, mask, None)
      want, want_var = whole(x, mask)
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
      np.testing.assert_allclose(var[3], want_var, rtol=1e-5)
      got, var = run(x, mask, [[0, 1], [2, 3]])
      for half in (slice(0, 4), slice(4, 8)):
        want, _ = whole(x[half], None if mask is None else mask[half])
        np.testing.assert_allclose(got[half], want, rtol=1e-4, atol=1e-5)
    print("passed")
  """
  flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
  run = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(program)],
    env={"PYTHONPATH": ":".join(sys.path), **flags},
    capture_output=True,
    text=True,
  )
  assert run.stdout == "passed\n", run.stderr


def test_batch_norm_that_was_not_told_its_mode_is_refused():
  model = batch_norm(use_running_average=None)
  with pytest.raises(MissingArgumentError, match=r"BatchNorm was not told use_running_average"):
    model(data())
  assert model(data(), use_running_average=False).shape == (8, 3)


@pytest.mark.parametrize(("options", "got"), [
  ({"axis": (0, 1)}, r"axis=\(0, 1\)"), ({"momentum": 1.5}, "momentum=1.5"),
  ({"size": 0}, "num_features=0"),
])  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(options, got):
  with pytest.raises(InvalidArgumentError, match=rf"BatchNorm cannot .*\n  got: {got}\n  fix: "):
    batch_norm(**options)
