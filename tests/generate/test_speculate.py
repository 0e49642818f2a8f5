"""Speculative decoding: a draft model changes how long it takes, never what is generated."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError
from tests.generate.models import Model, naive, prompts

s = nnx.samplers
PROMPTS = prompts(1, 3, 1, 12)
KINDS = {"list": {}, "stack": {"scan_layers": True}, "window": {"sliding_window": 4}}


@pytest.mark.parametrize("kind, ahead", [("list", 4), ("stack", 1), ("window", 4)])
def test_greedy_text_is_that_of_the_model_whatever_the_draft_says(kind, ahead):
  model, other = Model(**KINDS[kind]), Model(7, **KINDS[kind])
  want = [naive(model, prompt, 11) for prompt in PROMPTS]
  stop = want[0][5]
  for draft in (other, nnx.clone(model)):
    options = {"draft": draft, "draft_tokens": ahead}
    assert nnx.generate(model, PROMPTS, 11, **options).tolist() == want
    assert nnx.generate(model, PROMPTS[2], 11, **options).tolist() == want[2]
    out = nnx.generate(model, PROMPTS[0], 11, stop_tokens=stop, **options)
    assert out.tolist() == want[0][: want[0].index(stop) + 1]
    held = len(PROMPTS[0]) + int(out.lengths) - 1
    assert nnx.cache_length(model) == held == nnx.cache_length(draft)
    # both memories hold what was said: the text goes on from there, with a draft or without
    more = out.tolist()[-1:]
    said = PROMPTS[0] + out.tolist()
    if kind != "window":
      assert nnx.generate(model, more, 4, resume=True, **options).tolist() == naive(model, said, 4)


def test_a_good_draft_takes_fewer_calls_of_the_model():
  calls = []

  class Counted(Model):
    def __call__(self, tokens, *, decode=False):
      jax.debug.callback(lambda: calls.append(1))
      return super().__call__(tokens, decode=decode)

  model = Counted()
  draft = Model()  # of the same seed: it proposes what the model wants
  nnx.generate(model, PROMPTS[0], 20, draft=draft, draft_tokens=4)
  jax.effects_barrier()
  assert len(calls) <= 2 + 20 // 5


@pytest.mark.parametrize(
  "filters", [(), (s.temperature(0.6), s.top_k(3))], ids=["plain", "filtered"]
)
def test_what_is_drawn_has_the_distribution_of_the_model(filters):
  """Chi-square of 8,000 texts of three tokens against the exact probability of each text."""
  vocabulary, count, length = 4, 8000, 3
  model = Model(3, vocabulary=vocabulary, size=4)
  draft = Model(9, vocabulary=vocabulary, size=4)
  sampler = s.sample(*filters)
  texts = jnp.array(list(itertools.product(range(vocabulary), repeat=length)))
  inputs = jnp.concatenate([jnp.full((len(texts), 1), 2), texts[:, :-1]], 1)
  steps = jax.nn.log_softmax(sampler.filtered(model(inputs)))
  likely = jnp.exp(jnp.take_along_axis(steps, texts[..., None], 2).sum((1, 2)))
  np.testing.assert_allclose(likely.sum(), 1, rtol=1e-5)
  prompt = jnp.full((count, 1), 2)
  options = {"sampler": sampler, "rngs": 0}
  drawn = nnx.generate(model, prompt, length, draft=draft, draft_tokens=2, **options).tokens
  assert statistic(drawn, likely, vocabulary) < 120  # 63 degrees of freedom: 1 in 40,000
  q = jax.nn.log_softmax(sampler.filtered(draft(inputs)))
  wrong = jnp.exp(jnp.take_along_axis(q, texts[..., None], 2).sum((1, 2)))
  assert statistic(drawn, jnp.maximum(wrong, 1e-9), vocabulary) > 500  # the test can fail


def statistic(drawn, likely, vocabulary):
  weights = vocabulary ** np.arange(drawn.shape[1])[::-1]
  found = np.bincount(np.asarray(drawn) @ weights, minlength=len(likely))
  want = np.asarray(likely, np.float64) * len(drawn)
  assert found[want < 1e-6].sum() == 0 or want.min() > 0
  want = np.maximum(want, 1e-9)
  return float(((found - want) ** 2 / np.maximum(want, 1.0)).sum())


def test_what_a_draft_cannot_do():
  model, draft = Model(), Model(1)
  with pytest.raises(InvalidArgumentError, match="repetition_penalty"):
    nnx.generate(model, [1], 3, draft=draft, repetition_penalty=1.2)
  with pytest.raises(InvalidArgumentError, match="distribution is known"):
    nnx.generate(model, [1], 3, draft=draft, sampler=lambda logits, key: 0, rngs=0)
  nnx.generate(model, [1, 2], 3)
  nnx.generate(draft, [1], 3)
  with pytest.raises(InvalidArgumentError, match="remembers 4 positions"):
    nnx.generate(model, [1], 3, draft=draft, resume=True)
  with pytest.raises(InvalidArgumentError, match="draft_tokens"):
    nnx.generate(model, [1], 3, draft=draft, draft_tokens=0)


def test_a_draft_that_has_attention_in_common_with_the_model_is_refused():
  """Both would write to one memory, in turns."""
  model = Model()
  early = Model(1)
  early.decoder.blocks[0] = model.decoder.blocks[0]  # as in early exit
  nnx.generate(model, [1, 2], 3)
  for draft in (model, early):
    for resume in (False, True):
      with pytest.raises(InvalidArgumentError, match=r"in common(.|\n)*nnx.clone"):
        nnx.generate(model, [1], 3, draft=draft, resume=resume)
  assert nnx.cache_length(model) == 4
  want = naive(model, PROMPTS[0], 5)
  assert nnx.generate(model, PROMPTS[0], 5, draft=nnx.clone(model)).tolist() == want
