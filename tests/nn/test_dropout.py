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


def dropout(rate=0.5, seed=0, **options):
  return nnx.Dropout(rate, rngs=nnx.Rngs(seed), **options)


def test_what_is_kept_is_scaled_and_as_many_are_dropped_as_the_rate_says():
  y = np.asarray(dropout(0.25)(jnp.ones((200, 200))))
  assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
  assert abs((y == 0).mean() - 0.25) < 0.01


def test_each_call_drops_others():
  model, x = dropout(), jnp.ones(100)
  assert (model(x) != model(x)).any()
  assert int(model.rngs.count) == 2


def test_rate_0_is_the_identity_and_rate_1_gives_zeros_with_finite_gradients():
  x = jnp.arange(1.0, 4.0)
  assert dropout(0)(x).tolist() == [1, 2, 3]
  assert dropout(1)(x).tolist() == [0, 0, 0]
  assert jax.grad(lambda x: dropout(1)(x).sum())(x).tolist() == [0, 0, 0]


def test_eval_passes_the_input_through_and_train_drops_again():
  model, x = nnx.Sequential(dropout()), jnp.ones(100)
  model.eval()
  assert (model(x) == x).all()
  assert (model(x, deterministic=False) != x).any()
  model.train()
  assert (model(x) != x).any()
  assert (model(x, deterministic=True) == x).all()


def test_broadcast_axes_share_their_fate():
  y = dropout(broadcast_dims=[0, -1])(jnp.ones((5, 40, 6)))
  assert (y == y[:1, :, :1]).all()
  assert len(jnp.unique(y)) == 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_dtype_stays(dtype):
  assert dropout()(jnp.ones(3, dtype)).dtype == dtype


def test_a_variable_is_an_input():
  x = nnx.Variable(jnp.ones(3))
  assert isinstance(dropout()(x), jax.Array)
  assert isinstance(dropout(deterministic=True)(x), jax.Array)


def test_the_layer_has_a_stream_of_its_own():
  rngs = nnx.Rngs(default=0, dropout=1)
  first, second = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
  assert int(rngs.dropout.count) == 2
  assert int(rngs.default.count) == 0
  assert (first(jnp.ones(100)) != second(jnp.ones(100))).any()
  assert int(rngs.dropout.count) == 2
  named = nnx.Dropout(0.5, rng_collection="noise", rngs=nnx.Rngs(noise=0))
  assert named.rngs.tag == "noise"


@pytest.mark.parametrize("source", [
  nnx.Rngs(default=1, dropout=3),
  nnx.RngStream(3, tag="any"),
  jax.random.fold_in(jax.random.key(3), 0),
], ids=["Rngs", "RngStream", "key"])  # fmt: skip
def test_rngs_of_the_call_go_before_those_of_the_layer(source):
  x = jnp.ones(100)
  key = jax.random.fold_in(jax.random.key(3), 0)
  model = dropout()
  np.testing.assert_array_equal(model(x, rngs=source), 2.0 * jax.random.bernoulli(key, 0.5, (100,)))
  assert int(model.rngs.count) == 0


def test_a_stream_given_to_the_layer_is_forked():
  stream = nnx.RngStream(0, tag="mine")
  assert nnx.Dropout(0.5, rngs=stream).rngs is not stream
  assert int(stream.count) == 1


def test_under_jit_and_checkpoint_forward_and_backward_use_one_mask():
  model, x = dropout(), jnp.ones(100)

  def loss(model, x):
    y = model(x)
    return (y * y).sum(), y

  for step in (jax.jit(loss), jax.checkpoint(loss)):
    gradient, y = jax.grad(step, argnums=1, has_aux=True)(model, x)
    np.testing.assert_array_equal(gradient, 2 * y * 2)  # y = 2 x where it is kept
  assert int(model.rngs.count) == 2


def test_streams_split_over_a_mapped_axis():
  model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
  model.rngs = model.rngs.split(4)
  y = jax.vmap(lambda model, x: model(x))(model, jnp.ones((4, 100)))
  assert (y[0] != y[1]).any()
  assert model.rngs.count[...].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), "half", None, jnp.array(0.5)])
def test_a_rate_that_is_no_probability_is_refused(rate):
  with pytest.raises(InvalidArgumentError) as error:
    nnx.Dropout(rate)
  assert str(error.value).startswith("Dropout cannot work with this rate\n  got: rate=")
  assert error.value.args[0].endswith("\n  fix: pass a number from 0 to 1")


def test_without_random_numbers_the_error_says_how_to_give_them():
  with pytest.raises(MissingRngError) as error:
    nnx.Dropout(0.5)(jnp.ones(3))
  assert error.value.args[0] == (
    "Dropout needs random numbers\n"
    "  got: no rngs, neither when it was built nor when it was called\n"
    "  fix: build it with rngs=nnx.Rngs(dropout=0), call it with rngs=, or model.eval()"
  )


def test_without_a_stream_of_that_name_the_error_names_it():
  with pytest.raises(MissingRngError, match="no random stream 'dropout'"):
    nnx.Dropout(0.5, rngs=nnx.Rngs(params=0))


def test_a_layer_that_was_not_told_its_mode_is_refused():
  with pytest.raises(MissingArgumentError, match="Dropout was not told deterministic"):
    dropout(deterministic=None)(jnp.ones(3))


def test_what_gives_no_keys_is_refused():
  with pytest.raises(InvalidArgumentError, match=r"got: rngs=0\n  fix: pass rngs=nnx.Rngs"):
    nnx.Dropout(0.5, rngs=0)
  with pytest.raises(InvalidArgumentError, match=r"got: rngs=0\n  fix: pass nnx.Rngs\(0\) or jax"):
    dropout()(jnp.ones(3), rngs=0)


def test_an_axis_that_the_input_lacks_is_refused():
  with pytest.raises(ShapeMismatchError, match=r"Dropout works on axis 1\n  got: .*\(3,\)"):
    dropout(broadcast_dims=(1,))(jnp.ones(3))


@pytest.mark.parametrize("rate", [np.float16(0.5), np.float32(0.5), np.float64(0.5)])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_a_rate_from_numpy_does_not_change_the_dtype(rate, dtype):
  y = dropout(rate)(jnp.ones(100, dtype))
  assert (y.dtype, sorted(set(y.tolist()))) == (dtype, [0.0, 2.0])


def test_a_rate_near_1_scales_half_precision_by_a_finite_number():
  y = dropout(1 - 2**-20)(jnp.full(2**22, 2.0**-20, jnp.float16))  # 2^20 is inf in float16
  assert set(np.unique(y).tolist()) == {0.0, 1.0}
