import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refax import nnx
from tests.numerics.twin import (
  GRADIENT_TOLERANCE,
  QUICK,
  assert_close,
  linen,
  normal,
  project,
)

linen_pooling = pytest.importorskip("flax.linen.pooling", reason="compared with Flax Linen")


def compare(name, x, *args, **kwargs):
  """Values, and gradients with respect to the input."""

  def run(fn):
    def loss(x):
      y = fn(x, *args, **kwargs)
      return project(y), y

    return jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)(x)

  got_gradient, got = run(getattr(nnx, name))
  want_gradient, want = run(getattr(linen_pooling, name))
  of = (name, "Flax Linen")
  assert_close(got.astype(want.dtype), want, of=of)
  assert_close(got_gradient, want_gradient, GRADIENT_TOLERANCE, of=of)


@st.composite
def windows(draw):
  rank = draw(st.integers(1, 3))
  per_axis = lambda entry: st.lists(entry, min_size=rank, max_size=rank).map(tuple)
  shape = (*draw(st.sampled_from(((), (2,)))), *(5, 4, 3)[:rank], 2)
  return shape, {
    "window_shape": draw(per_axis(st.integers(2, 3))),
    "strides": draw(st.none() | per_axis(st.integers(1, 3))),
    "padding": draw(
      st.sampled_from(("SAME", "VALID")) | per_axis(st.tuples(st.integers(0, 1), st.integers(0, 1)))
    ),
  }


@settings(max_examples=8, deadline=None)
@given(case=windows(), name=st.sampled_from(("avg_pool", "max_pool", "min_pool")))
def test_pooling_equals_linen(case, name):
  shape, options = case
  compare(name, normal(1, shape), **options)


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 0), (0, 1))])
@pytest.mark.parametrize("shape", [(5, 4, 2), (2, 5, 4, 2)])
def test_avg_pool_without_counting_padding_equals_linen(padding, shape):
  options = {"strides": (2, 1), "padding": padding, "count_include_pad": False}
  compare("avg_pool", normal(1, shape), (2, 3), **options)


@pytest.mark.parametrize("name", ["avg_pool", "max_pool", "min_pool"])
def test_pooling_of_bfloat16_equals_linen(name):
  x = normal(1, (2, 6, 6, 2), jnp.bfloat16)
  assert getattr(nnx, name)(x, (2, 2)).dtype == jnp.bfloat16
  compare(name, x, (2, 2), (2, 2))


def test_pool_with_a_function_equals_linen():
  x = 1 + jnp.abs(normal(1, (2, 4, 4, 1)))
  args = (1.0, jax.lax.mul, (2, 2), (1, 1), "SAME")
  assert_close(nnx.pool(x, *args), linen.pool(x, *args), of=("pool", "Flax Linen"))
