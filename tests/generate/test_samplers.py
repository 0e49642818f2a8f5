"""Samplers: what each keeps, and how often a token is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refax import nnx
from refax.errors import InvalidArgumentError, MissingRngError
from refax.generate.samplers import penalized

s = nnx.samplers
FLOATS = st.floats(-20, 20, width=32, allow_subnormal=False)  # XLA takes the smallest for 0
LOGITS = st.lists(FLOATS, min_size=1, max_size=9).map(np.float32)


def kept(x, f):
  return np.flatnonzero(np.asarray(f(jnp.asarray(x))) > -np.inf).tolist()


@settings(deadline=None, max_examples=60)
@given(LOGITS, st.integers(1, 12))
def test_top_k_keeps_k_and_what_is_as_likely_as_the_last(x, k):
  least = np.sort(x)[::-1][min(k, len(x)) - 1]
  assert kept(x, s.top_k(k)) == np.flatnonzero(x >= least).tolist()


@settings(deadline=None, max_examples=60)
@given(LOGITS, st.floats(0.01, 1.0))
def test_top_p_keeps_the_fewest_that_are_likely_enough(x, p):
  likely = np.asarray(jax.nn.softmax(jnp.asarray(x)), np.float64)
  found = kept(x, s.top_p(p))
  assert found and likely[found].sum() >= min(p, 1) - 1e-5
  least = min(likely[found])
  fewer = [i for i in found if likely[i] > least * (1 + 1e-6)]
  assert likely[fewer].sum() < p + 1e-5  # without the last ones it is not enough
  assert all(likely[i] <= least * (1 + 1e-6) for i in range(len(x)) if i not in found)


@settings(deadline=None, max_examples=60)
@given(LOGITS, st.floats(0.0, 1.0))
def test_min_p_keeps_what_is_near_the_likeliest(x, p):
  likely = np.asarray(jax.nn.softmax(jnp.asarray(x)), np.float64)
  found = kept(x, s.min_p(p))
  assert set(np.flatnonzero(likely >= 1.001 * p * likely.max())) <= set(found)
  assert not set(np.flatnonzero(likely < 0.999 * p * likely.max())) & set(found)


def test_tokens_are_drawn_as_often_as_the_filters_say():
  logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.07, 0.03]))
  sampler = s.sample(s.temperature(0.5), s.top_k(3))
  want = np.array([0.16, 0.09, 0.04, 0, 0]) / 0.29
  keys = jax.random.split(jax.random.key(0), 20_000)
  drawn = np.bincount(jax.jit(jax.vmap(sampler, (None, 0)))(logits, keys), minlength=5) / len(keys)
  np.testing.assert_allclose(drawn, want, atol=0.012)
  np.testing.assert_allclose(jax.nn.softmax(sampler.filtered(logits)), want, atol=1e-6)


def test_filters_apply_in_their_order_and_a_user_adds_one():
  x = jnp.array([3.0, 2.0, 1.0, 0.0])
  never_first = lambda logits: logits.at[0].set(-jnp.inf)
  assert kept(x, s.sample(never_first, s.top_k(1)).filtered) == [1]
  assert kept(x, s.sample(s.top_k(1), s.temperature(2.0)).filtered) == [0]
  assert "top_k" in repr(s.sample(s.top_k(1), never_first))


def test_greedy_is_the_first_of_the_likeliest():
  assert int(s.greedy(jnp.array([1.0, 3.0, 3.0]))) == 1
  assert s.greedy(jnp.zeros((2, 3, 4))).shape == (2, 3)
  assert kept(jnp.array([1.0, 3.0, 3.0]), s.greedy.filtered) == [1]


def test_numbers_are_data_and_compile_nothing():
  traces = []

  @jax.jit
  def draw(sampler, logits, key):
    traces.append(1)
    return sampler(logits, key)

  for t in (0.1, 0.5, 2.0):
    draw(
      s.sample(s.temperature(t), s.top_p(t / 2), s.min_p(t / 20)), jnp.ones(4), jax.random.key(0)
    )
  assert len(traces) == 1


def test_halves_are_filtered_in_float32():
  x = jnp.array([1.0, 1.001], jnp.bfloat16)
  assert s.sample(s.temperature(0.5)).filtered(x).dtype == jnp.float32


@pytest.mark.parametrize("make", [
  lambda: s.temperature(0.0), lambda: s.temperature(-1), lambda: s.temperature(float("nan")),
  lambda: s.temperature("warm"), lambda: s.top_k(0), lambda: s.top_k(1.5), lambda: s.top_p(0),
  lambda: s.top_p(1.1), lambda: s.min_p(-0.1), lambda: s.sample(0.7), lambda: s.sample(s.top_k),
])  # fmt: skip
def test_numbers_that_make_no_sense(make):
  with pytest.raises(InvalidArgumentError, match="fix: pass"):
    make()


def test_without_a_key():
  with pytest.raises(MissingRngError, match=r"greedy"):
    s.sample()(jnp.ones(3))


def test_a_penalty_makes_all_that_was_seen_less_likely():
  x = jnp.array([2.0, -2.0, 2.0, -2.0])
  got = penalized(x, jnp.array([True, True, False, False]), 2.0)
  assert got.tolist() == [1.0, -4.0, 2.0, -2.0]
