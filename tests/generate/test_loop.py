"""generate and stream: what a compiled loop with a memory gives is what the slow way gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import (
  InvalidArgumentError,
  MissingRngError,
  NonFiniteError,
  ShapeMismatchError,
)
from tests.generate.models import VOCABULARY, Model, naive, prompts

s = nnx.samplers
KINDS = {
  "list": {},
  "stack": {"scan_layers": True},
  "window": {"sliding_window": 4},
  "window in a stack": {"sliding_window": 3, "scan_layers": True},
}
PROMPTS = prompts(0, 1, 2, 9, 21)


SLOW = {"window in a stack": pytest.mark.slow}  # the slow way compiles each length of a stack


@pytest.fixture(scope="module", params=[pytest.param(k, marks=SLOW.get(k, ())) for k in KINDS])
def model(request):
  return Model(**KINDS[request.param])


@pytest.fixture(scope="module")
def plain():
  return Model()


def test_greedy_text_is_that_of_the_slow_way_alone_and_in_a_batch(model):
  want = [naive(model, prompt, 9) for prompt in PROMPTS]
  assert nnx.generate(model, PROMPTS, 9).tolist() == want
  for prompt, tokens in zip(PROMPTS, want, strict=True):
    assert nnx.generate(model, prompt, 9).tolist() == tokens
    assert nnx.cache_length(model) == len(prompt) + 8  # all but the last
    assert list(nnx.stream(model, prompt, 9)) == tokens
  out = nnx.generate(model, jnp.array([PROMPTS[2], PROMPTS[2][::-1]]), 9)
  assert out.tolist() == [want[2], naive(model, PROMPTS[2][::-1], 9)]


@pytest.mark.parametrize("hijax", [True, False], ids=["hijax", "lojax"])
def test_both_kinds_of_storage(hijax):
  with nnx.use_hijax(hijax):
    model = Model()
    want = [naive(model, prompt, 5) for prompt in PROMPTS[:3]]
    assert nnx.generate(model, PROMPTS[:3], 5).tolist() == want
    assert list(nnx.stream(model, PROMPTS[2], 5)) == want[2]


@pytest.mark.parametrize("scan_layers", [True, False], ids=["stack", "list"])
def test_a_model_with_quantized_weights_and_lora_beside(scan_layers):
  model = nnx.quantize(Model(scan_layers=scan_layers), 8)
  want = [naive(model, prompt, 5) for prompt in PROMPTS[:3]]
  nnx.add_lora(model, 2, rngs=nnx.Rngs(1))  # at first, it changes nothing
  assert nnx.generate(model, PROMPTS[:3], 5).tolist() == want


def test_stop_tokens_end_a_sequence_and_its_memory(plain):
  free = [naive(plain, prompt, 12) for prompt in PROMPTS]
  stop = [free[0][3], free[2][6]]
  want = [naive(plain, prompt, 12, stop=stop) for prompt in PROMPTS]
  assert len({len(tokens) for tokens in want}) > 1
  out = nnx.generate(plain, PROMPTS, 12, stop_tokens=stop)
  assert out.tolist() == want
  assert out.lengths.tolist() == [len(tokens) for tokens in want]
  assert bool((out.tokens[0, len(want[0]) :] == -1).all())
  held = [len(p) + len(t) - 1 for p, t in zip(PROMPTS, want, strict=True)]
  assert nnx.cache_length(plain).tolist() == held
  streamed = np.stack(list(nnx.stream(plain, PROMPTS, 12, stop_tokens=stop)), 1)
  width = streamed.shape[1]
  np.testing.assert_array_equal(streamed, np.asarray(out.tokens)[:, :width])
  assert list(nnx.stream(plain, PROMPTS[0], 12, stop_tokens=stop[0])) == want[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_goes_on_where_the_memory_ends(kind):
  model = Model(**KINDS[kind])
  said = list(PROMPTS[2])
  nnx.init_cache(model, 1, 64)
  first = nnx.generate(model, said, 5, resume=True).tolist()
  said += [*first, 3, 1, 4]
  assert first == naive(model, PROMPTS[2], 5)
  held = nnx.cache_length(model)
  second = list(nnx.stream(model, said[held:], 6, resume=True))
  assert second == naive(model, said, 6)
  nnx.truncate_cache(model, 0)
  assert nnx.generate(model, said, 6, resume=True).tolist() == second


def test_a_batch_resumes_each_where_it_stopped(plain):
  out = nnx.generate(plain, PROMPTS, 4).tolist()
  more = [[tokens[-1], 5, 7][: 1 + i % 3] for i, tokens in enumerate(out)]
  got = nnx.generate(plain, more, 3, resume=True, max_length=8).tolist()
  said = [p + t[:-1] + m for p, t, m in zip(PROMPTS, out, more, strict=True)]
  assert got == [naive(plain, tokens, 3) for tokens in said]


@pytest.mark.parametrize("change", ["another block", "one block more", "a memory less"])
def test_a_model_that_was_changed_gets_a_memory_for_all_of_it(change):
  model = Model()
  nnx.generate(model, [1, 2], 3)
  if change == "another block":
    model.decoder.blocks[1] = Model(5).decoder.blocks[1]
  elif change == "one block more":
    model.decoder.blocks.append(Model(5).decoder.blocks[0])
  else:
    attention = model.decoder.blocks[1].attention
    attention.cached_key = attention.cached_value = attention.cache_index = None
  assert nnx.generate(model, [3, 1, 4], 5).tolist() == naive(model, [3, 1, 4], 5)


def test_keys_are_of_the_sequence_and_not_of_its_neighbours(plain):
  sampler = s.sample(s.temperature(1.5), s.top_k(9))
  draw = lambda prompt, rngs: nnx.generate(plain, prompt, 8, sampler=sampler, rngs=rngs).tolist()
  many = draw(PROMPTS, 3)
  assert draw(PROMPTS[:2], 3) == many[:2] and draw(PROMPTS[0], 3) == many[0]
  assert draw(PROMPTS, jax.random.key(3)) == many
  keys = jax.random.split(jax.random.key(5), len(PROMPTS))
  each = draw(PROMPTS, keys)
  assert draw(PROMPTS[2:4], keys[2:4]) == each[2:4]
  assert draw(PROMPTS, 4) != many
  rngs = nnx.Rngs(0)
  assert draw(PROMPTS, rngs) != draw(PROMPTS, rngs)  # a stream goes on
  twin = lambda logits, tokens, i: sampler(
    logits, jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 0), i)
  )
  assert naive(plain, PROMPTS[0], 8, pick=twin) == many[0]
  streamed = nnx.stream(plain, PROMPTS[0], 8, sampler=sampler, rngs=3)
  assert list(streamed) == many[0]


def test_a_function_of_the_user_is_a_sampler(plain):
  second = lambda logits, key: jnp.argsort(logits)[-2]
  want = naive(plain, PROMPTS[2], 6, pick=lambda logits, *_: jnp.argsort(logits)[-2])
  assert nnx.generate(plain, PROMPTS[2], 6, sampler=second, rngs=0).tolist() == want


def test_repetition_penalty(plain):
  def pick(logits, tokens, _):
    seen = jnp.isin(jnp.arange(VOCABULARY), jnp.array(tokens))
    return jnp.where(seen, jnp.where(logits > 0, logits / 1.7, logits * 1.7), logits).argmax()

  few = PROMPTS[1:4]
  want = [naive(plain, prompt, 6, pick=pick) for prompt in few]
  assert want != [naive(plain, prompt, 6) for prompt in few]
  assert nnx.generate(plain, few, 6, repetition_penalty=1.7).tolist() == want
  assert list(nnx.stream(plain, few[1], 6, repetition_penalty=1.7)) == want[1]


def test_another_length_temperature_or_prompt_compiles_nothing_new():
  model, traces = Model(), []
  call = type(model).__call__

  class Counted(Model):
    def __call__(self, tokens, *, decode=False):
      traces.append(tokens.shape)
      return call(self, tokens, decode=decode)

  model = Counted()
  run = lambda prompt, t: nnx.generate(
    model, prompt, 6, sampler=s.sample(s.temperature(t), s.top_p(0.9)), rngs=0, max_length=64
  )
  for n in (2, 9, 20, 40):
    run([i % VOCABULARY for i in range(n)], 0.7)
  known = len(traces)
  for n in (3, 8, 17, 33, 50):
    run([1] * n, 0.3 + n / 100)
  assert len(traces) == known


def test_inside_a_transform(plain):
  nnx.init_cache(plain, 1, 32)

  @jax.jit
  def run(model, prompt):
    nnx.truncate_cache(model, 0)
    return nnx.generate(model, prompt, 5, resume=True).tokens

  for prompt in PROMPTS[2:4]:
    assert run(plain, jnp.array(prompt)).tolist() == naive(plain, prompt, 5)


def test_a_model_with_a_state_of_its_own_is_given_whole_pieces():
  class Sum(nnx.Module):
    """Predicts the sum of all tokens so far."""

    def __init__(self):
      self.total = nnx.Variable(jnp.zeros((1,), jnp.int32))

    def __call__(self, tokens, *, decode=False):
      sums = self.total[...][:, None] + jnp.cumsum(tokens, 1)
      self.total[...] = sums[:, -1]
      return jax.nn.one_hot(sums % 10, 10)

  for length in (1, 2, 7, 30, 85):
    model = Sum()
    prompt = [3] * length
    assert nnx.generate(model, prompt, 3).tolist() == [
      3 * length % 10,
      6 * length % 10,
      2 * 6 * length % 10,
    ]
  with pytest.raises(InvalidArgumentError, match="only memory"):
    nnx.generate(Sum(), [[1, 2], [3]], 2)
  with pytest.raises(InvalidArgumentError, match="only memory"):
    nnx.generate(Sum(), [1, 2], 2, draft=Sum())


KEYS = jax.random.split(jax.random.key(0), 3)
BAD = {
  "text": ({"prompt": "hello"}, InvalidArgumentError, "a tokenizer makes them"),
  "empty": ({"prompt": []}, InvalidArgumentError, "at least one token|integers"),
  "an empty row": ({"prompt": [[1], []]}, InvalidArgumentError, "ints from 1|integers"),
  "floats": ({"prompt": [1.0, 2.0]}, InvalidArgumentError, "integers"),
  "negative": ({"prompt": [1, -1]}, InvalidArgumentError, "from 0 on"),
  "count": ({"max_new_tokens": 0}, InvalidArgumentError, "max_new_tokens"),
  "no key": ({"sampler": s.sample()}, MissingRngError, "rngs=nnx.Rngs"),
  "a class": ({"sampler": s.top_k}, InvalidArgumentError, "sampler"),
  "keys": ({"sampler": s.sample(), "rngs": KEYS}, InvalidArgumentError, "one key"),
  "rngs": ({"sampler": s.sample(), "rngs": "0"}, InvalidArgumentError, "nnx.Rngs"),
  "stop": ({"stop_tokens": [1.5]}, InvalidArgumentError, "a list of tokens"),
  "penalty": ({"repetition_penalty": 0.0}, InvalidArgumentError, "above 0"),
  "short": ({"max_length": 5}, InvalidArgumentError, "at least 6"),
  "lengths": ({"prompt": np.ones((2, 3), int), "lengths": [1, 4]}, InvalidArgumentError, "1 to 3"),
  "no memory": ({"resume": True}, InvalidArgumentError, "no memory yet"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_changes_nothing(name):
  change, error, text = BAD[name]
  model, rngs = Model(), nnx.Rngs(0)
  options = {"prompt": [1, 2, 3], "max_new_tokens": 4} | change
  before = nnx.to_pure_dict(nnx.state(model))
  with pytest.raises(error, match=text):
    nnx.generate(model, **options)
  assert jax.tree.structure(before) == jax.tree.structure(nnx.to_pure_dict(nnx.state(model)))
  with pytest.raises(error, match=text):
    nnx.stream(model, **options)
  assert int(rngs["sample"].count[...]) == 0


def test_a_memory_without_room_is_refused_before_anything_is_decoded(plain):
  nnx.init_cache(plain, 1, 16)
  nnx.generate(plain, [1, 2, 3], 4, resume=True)
  held = nnx.cache_length(plain)
  with pytest.raises(InvalidArgumentError, match="at most 10 positions"):
    nnx.generate(plain, [1, 2, 3], 9, resume=True)
  with pytest.raises(InvalidArgumentError, match="as many as the memory"):
    nnx.generate(plain, [[1, 2], [3, 4]], 2, resume=True)
  assert nnx.cache_length(plain) == held
  nnx.init_cache(plain, 2, 16)
  with pytest.raises(InvalidArgumentError, match="per_sequence"):
    nnx.generate(plain, [[1, 2], [3, 4]], 2, resume=True)


def test_nan_is_an_error_and_no_token():
  model = Model()
  model.embed.embedding[5] = jnp.nan
  with pytest.raises(NonFiniteError, match="sequences \\[0\\]"):
    nnx.generate(model, [1, 5], 3)
  with pytest.raises(NonFiniteError, match="find_nonfinite"):
    list(nnx.stream(model, [1, 5], 3))


def test_a_model_that_returns_no_logits_is_told_so():
  class Last(Model):
    def __call__(self, tokens, *, decode=False):
      return super().__call__(tokens, decode=decode)[:, -1]

  with pytest.raises(ShapeMismatchError, match="logits of shape"):
    nnx.generate(Last(), [1, 2], 3)
