import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError, ShapeMismatchError
from tests.numerics.twin import normal


def rotated(x, positions, theta=10000.0):
  """RoFormer's equation 34, in complex numbers and float64; `positions` broadcast to `[..., L]`."""
  x = np.asarray(x, np.float64)
  half = x.shape[-1] // 2
  turns = np.exp(1j * np.asarray(positions)[..., None] * theta ** (-np.arange(half) / half))
  z = (x[..., :half] + 1j * x[..., half:]) * turns
  return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize("shape", [(5, 2), (3, 5, 8), (2, 3, 5, 16)])
@pytest.mark.parametrize("theta", [10000.0, 100.0])
def test_pairs_turn_with_the_position(shape, theta):
  x = normal(0, shape)
  np.testing.assert_allclose(nnx.RoPE(theta)(x), rotated(x, np.arange(5), theta), atol=2e-6)


@pytest.mark.parametrize("positions", [
  np.arange(5) + 7, np.array([3, 1, 4, 1, 5]), np.arange(10).reshape(2, 5), np.ones((1, 5)) / 2,
], ids=["offset", "any order", "for each of the batch", "between"])  # fmt: skip
def test_positions_are_the_callers(positions):
  x = normal(0, (2, 5, 8))
  np.testing.assert_allclose(nnx.RoPE()(x, positions), rotated(x, positions), atol=5e-6)
  heads = normal(0, (2, 5, 3, 8))
  want = rotated(heads, np.broadcast_to(positions, (2, 5))[..., None])
  np.testing.assert_allclose(nnx.RoPE().rotate_heads(heads, positions), want, atol=5e-6)


def test_the_product_of_two_depends_on_how_far_apart_they_are_only():
  rope, (q, k) = nnx.RoPE(), (normal(i, (1, 32)) for i in range(2))
  at = lambda i, j: (rope(q, jnp.array([i])) * rope(k, jnp.array([j]))).sum()
  for offset in (1, 50, 400):
    np.testing.assert_allclose(at(3 + offset, 7 + offset), at(3, 7), rtol=1e-4)
  assert abs(at(3, 7) - at(7, 3)) > 1e-2
  assert abs(at(3, 7) - at(3, 8)) > 1e-2


def test_attention_with_rope_does_not_change_when_all_positions_move():
  rope, (q, k, v) = nnx.RoPE(), (normal(i, (2, 5, 4, 8)) for i in range(3))
  attend = lambda positions: nnx.dot_product_attention_with_rope(
    q, k, v, rope=rope, input_positions=positions, is_causal=True
  )
  want = nnx.dot_product_attention(rope.rotate_heads(q), rope.rotate_heads(k), v, is_causal=True)
  np.testing.assert_allclose(attend(None), want, rtol=1e-6)
  np.testing.assert_allclose(attend(jnp.arange(5) + 9), want, rtol=1e-4, atol=1e-5)
  assert abs(attend(jnp.arange(5) * 2) - want).max() > 1e-2
  assert abs(nnx.dot_product_attention(q, k, v, is_causal=True) - want).max() > 1e-2


def test_numbers_keep_their_dtype_and_integers_become_floats():
  assert nnx.RoPE()(jnp.ones((3, 4), jnp.bfloat16)).dtype == jnp.bfloat16
  np.testing.assert_allclose(nnx.RoPE()(jnp.ones((3, 4), int)), nnx.RoPE()(jnp.ones((3, 4))))


def test_it_equals_flax_nnx():
  flax_nnx = pytest.importorskip("flax.nnx", reason="compared with Flax NNX")
  if not hasattr(flax_nnx, "RoPE"):
    pytest.skip("this Flax has no RoPE")
  x = normal(0, (2, 3, 5, 8))
  np.testing.assert_allclose(nnx.RoPE(500.0)(x), flax_nnx.RoPE(500.0)(x), atol=2e-6)


def test_a_module_with_rope_has_no_state_for_it_and_is_compiled():
  rope, x = nnx.RoPE(), normal(0, (5, 8))
  assert not nnx.to_flat_state(nnx.state(rope))
  np.testing.assert_allclose(jax.jit(lambda rope, x: rope(x))(rope, x), rope(x), atol=1e-6)


@pytest.mark.parametrize(("sizes", "got", "fix"), [
  ((8, None), "max_seq_len=None", "both sizes, or neither"),
  ((None, 8), "embedding_size=None", "both sizes, or neither"),
  ((7, 8), "embedding_size=7", "an even number"),
  ((8, 0), "max_seq_len=0", "an int of at least 1"),
])  # fmt: skip
def test_sizes_that_make_no_sense_are_refused(sizes, got, fix):
  with pytest.raises(InvalidArgumentError, match=f"got: {got}\n  fix: pass {fix}"):
    nnx.RoPE(embedding_size=sizes[0], max_seq_len=sizes[1])


@pytest.mark.parametrize(("options", "shape", "want"), [
  ({}, (5, 7), "an even size"), ({}, (8,), "an even size"),
  ({"embedding_size": 6, "max_seq_len": 9}, (5, 8), "size 6"),
])  # fmt: skip
def test_vectors_of_another_size_are_named(options, shape, want):
  with pytest.raises(ShapeMismatchError) as error:
    nnx.RoPE(**options)(jnp.ones(shape))
  assert error.value.args[0] == (
    f"RoPE rotates pairs of features, in vectors of {want}\n"
    f"  got: an input of shape {shape}\n"
    f"  fix: pass an input of shape (..., length, {options.get('embedding_size', 'even size')})"
  )


def test_a_sequence_that_is_too_long_is_named():
  with pytest.raises(ShapeMismatchError) as error:
    nnx.RoPE(embedding_size=8, max_seq_len=4)(jnp.ones((5, 8)))
  assert error.value.args[0] == (
    "RoPE was built for at most 4 positions\n"
    "  got: an input with 5\n"
    "  fix: build it with max_seq_len=5, or without sizes"
  )


@pytest.mark.parametrize("positions", [jnp.ones(4), jnp.ones(()), jnp.ones((3, 5))])
def test_positions_that_do_not_fit_are_named(positions):
  with pytest.raises(ShapeMismatchError) as error:
    nnx.RoPE()(jnp.ones((2, 5, 8)), positions)
  got = f"float32[{','.join(map(str, positions.shape))}]"
  assert error.value.args[0] == (
    "RoPE needs one position for each vector\n"
    f"  got: input_positions of {got}\n"
    "  fix: pass an array that broadcasts to the shape (2, 5)"
  )


def test_theta_may_be_an_int_that_no_int32_holds():
  x = normal(0, (5, 8))
  np.testing.assert_allclose(nnx.RoPE(10**10)(x), rotated(x, np.arange(5), 1e10), atol=2e-6)
