"""generate and stream: tokens from a model, one after the other, by a compiled step.

Between two steps, the memory of the model holds all tokens but the last, which the next step is
given. So a prompt is decoded without its last token, and nothing has to be predicted before the
first step. `generate` is one compiled loop over the step, `stream` calls the step from Python.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refax import _jax
from refax.core.module import Module
from refax.core.variable import Variable
from refax.errors import (
  InvalidArgumentError,
  MissingRngError,
  NonFiniteError,
)
from refax.generate import memory, samplers
from refax.generate.memory import Held, Wanted
from refax.generate.prompt import Prompt, is_single, prefill, prompt_of
from refax.generate.samplers import Sampler
from refax.generate.speculate import Draft, logits_of, speculate
from refax.nn import check
from refax.rngs import Rngs, RngStream
from refax.transforms.jit import jit
from refax.transforms.loops import while_loop
from refax.typing import ArrayLike, Dtype


class Generated(NamedTuple):
  """What `nnx.generate` returns.

  Attributes:
    tokens: `[batch, max_new_tokens]`, and -1 after the end of a sequence; without the axis of the
      batch, if the prompt had none.
    lengths: how many tokens each sequence has, a stop token included, `[batch]` or a number.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> nnx.Generated(jnp.array([[5, 2, -1], [1, 1, 3]]), jnp.array([2, 3])).tolist()
  [[5, 2], [1, 1, 3]]
  """

  tokens: jax.Array
  lengths: jax.Array

  def tolist(self) -> list[Any]:
    """The tokens as lists of ints, each as long as its sequence."""
    tokens, lengths = np.asarray(self.tokens), np.asarray(self.lengths)
    if tokens.ndim == 1:
      return tokens[: int(lengths)].tolist()
    return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]


class _Options(NamedTuple):
  """What a step has to know, beside the model."""

  sampler: Any
  keys: jax.Array
  stop: jax.Array | np.ndarray
  penalty: Any


class _Start(NamedTuple):
  """Where a generation begins.

  Attributes:
    last: the newest token of each sequence, which the memory does not hold yet.
    lengths: how many tokens of each are the prompt's.
    history: the tokens of each, -1 where there is none, `[batch, any]`; None if nobody asks.
  """

  last: jax.Array
  lengths: jax.Array
  history: jax.Array | None


class _Now(Module):
  """Where a generation is, in Variables: so that each step finds it where the last has left it.

  Attributes:
    last, lengths, history: as in `_Start`.
    count: how many tokens have been generated.
    done: which sequences have ended.
    broken: for which sequences logits were NaN.
  """

  def __init__(self, start: _Start):
    batch = start.last.shape[0]
    self.last = Variable(start.last)
    self.lengths = Variable(start.lengths)
    self.history = None if start.history is None else Variable(start.history)
    self.count = Variable(jnp.zeros((), jnp.int32))
    self.done = Variable(jnp.zeros(batch, bool))
    self.broken = Variable(jnp.zeros(batch, bool))


def generate(
  model: Any,
  prompt: Any,
  max_new_tokens: int,
  *,
  sampler: Any = samplers.greedy,
  rngs: Rngs | RngStream | ArrayLike | None = None,
  stop_tokens: int | Sequence[int] = (),
  repetition_penalty: float | None = None,
  lengths: ArrayLike | None = None,
  max_length: int | None = None,
  cache_dtype: Dtype | None = None,
  resume: bool = False,
  draft: Any = None,
  draft_tokens: int = 4,
) -> Generated:
  """Continue prompts, in one compiled loop.

  The model is called as `model(tokens, decode=True)`, with integers `[batch, length]`, and returns
  logits `[batch, length, vocabulary]`. What it remembers is in its Variables: the memory of its
  `nnx.MultiHeadAttention` layers, which is made here if there is none that fits, stays in the
  model, and holds all tokens but the last.

  Args:
    model: a Module. Dropout is off only after `model.eval()`.
    prompt: tokens `[batch, length]`, or `[length]` for one sequence; or a list of lists, which may
      differ in length.
    max_new_tokens: how many tokens to generate for each, if no stop token ends it before.
    sampler: a function `(logits [vocabulary], key) -> token`, one of `nnx.samplers`; by default it
      takes the most likely one.
    rngs: where keys come from: an `nnx.Rngs` (its stream `sample`), a stream, a key or a seed. Each
      sequence has a key of its own, that depends on its place in the batch and not on the others.
    stop_tokens: a token, or several, that end a sequence.
    repetition_penalty: above 1 makes tokens of the prompt, and those generated, less likely.
    lengths: how many tokens of each row of an array are prompt, `[batch]`; the rest is ignored.
    max_length: how many positions the memory has; by default enough for this call.
    cache_dtype: the dtype of keys and values in the memory, if one is made.
    resume: whether the prompt continues what the memory holds. It begins with the token that was
      generated last, which the memory does not hold.
    draft: a smaller model of the same vocabulary that proposes tokens, several of which the model
      checks at once (speculative decoding). What is generated has the same distribution.
    draft_tokens: how many tokens it proposes at a time.

  Returns:
    `Generated` with `tokens` and `lengths`; `.tolist()` gives lists of ints.

  Raises:
    InvalidArgumentError: the prompt is empty or no integers; the memory is too short, or cannot
      hold what is asked for; options contradict each other.
    MissingRngError: the sampler draws, and there are no `rngs`.
    NonFiniteError: the model gave NaN.

  Source of speculative decoding: Y. Leviathan et al., arXiv:2211.17192.

  >>> from refax import nnx; import jax
  >>> class Model(nnx.Module):
  ...   def __init__(self, rngs):
  ...     self.embed = nnx.Embed(10, 8, rngs=rngs)
  ...     self.decoder = nnx.TransformerDecoder(2, 8, 2, rope=nnx.RoPE(), rngs=rngs)
  ...   def __call__(self, tokens, *, decode=False):
  ...     return self.embed.attend(self.decoder(self.embed(tokens), decode=decode))
  >>> model = Model(nnx.Rngs(0))
  >>> out = nnx.generate(model, [[1, 2, 3], [4]], max_new_tokens=5)
  >>> out.tokens.shape, out.lengths.tolist()
  ((2, 5), [5, 5])
  >>> s = nnx.samplers
  >>> sampler = s.sample(s.temperature(0.8), s.top_k(3))
  >>> out = nnx.generate(model, [1, 2], 5, sampler=sampler, rngs=nnx.Rngs(0), stop_tokens=7)
  """
  max_new_tokens = check.size("generate", "max_new_tokens", max_new_tokens)
  spare = 0 if draft is None else check.size("generate", "draft_tokens", draft_tokens) + 1
  if draft is not None and not (isinstance(sampler, Sampler) and repetition_penalty is None):
    want = "one of nnx.samplers, whose distribution is known, and no repetition_penalty"
    raise InvalidArgumentError.value("generate", "sampler with a draft model", sampler, want)
  start, options = _begin(
    "generate",
    [model] if draft is None else [model, draft],
    prompt,
    max_new_tokens,
    sampler=sampler,
    rngs=rngs,
    stop_tokens=stop_tokens,
    repetition_penalty=repetition_penalty,
    lengths=lengths,
    max_length=max_length,
    cache_dtype=cache_dtype,
    resume=resume,
    spare=spare,
  )
  if draft is None:
    tokens, count, broken = _loop(model, start, options, size=max_new_tokens)
  else:
    given = Draft(start.last, options.sampler, options.keys, options.stop)
    tokens, count, broken = speculate(model, draft, given, size=max_new_tokens, ahead=draft_tokens)
  _check_finite(broken)
  return Generated(tokens[0], count[0]) if is_single(prompt) else Generated(tokens, count)


def stream(
  model: Any,
  prompt: Any,
  max_new_tokens: int,
  *,
  sampler: Any = samplers.greedy,
  rngs: Rngs | RngStream | ArrayLike | None = None,
  stop_tokens: int | Sequence[int] = (),
  repetition_penalty: float | None = None,
  lengths: ArrayLike | None = None,
  max_length: int | None = None,
  cache_dtype: Dtype | None = None,
  resume: bool = False,
) -> Iterator[Any]:
  """Continue prompts as `nnx.generate`, and yield each token as soon as it is there.

  The tokens are those of `nnx.generate`. Between two of them, and after Ctrl-C, the memory holds
  `nnx.cache_length(model)` tokens: all but the one that was yielded last.

  Args:
    model: as in `nnx.generate`, like all that follow.
    prompt: tokens `[batch, length]` or `[length]`, or a list of lists.
    max_new_tokens: how many to yield at most.
    sampler: a function `(logits, key) -> token`.
    rngs: where keys come from.
    stop_tokens: what ends a sequence; it is yielded too.
    repetition_penalty: above 1 makes tokens that were there less likely.
    lengths: how many tokens of each row are prompt.
    max_length: how many positions the memory has.
    cache_dtype: the dtype of the memory, if one is made.
    resume: whether the prompt continues what the memory holds.

  Yields:
    An int for one sequence, or int32 `[batch]` with -1 for sequences that have ended.

  Raises:
    InvalidArgumentError, MissingRngError: as `nnx.generate`, when it is called.
    NonFiniteError: the model gave NaN.

  >>> from refax import nnx
  >>> class Count(nnx.Module):
  ...   def __call__(self, tokens, *, decode=False):
  ...     import jax
  ...     return jax.nn.one_hot(tokens + 1, 10)
  >>> list(nnx.stream(Count(), [1, 2], max_new_tokens=5, stop_tokens=6))
  [3, 4, 5, 6]
  """
  max_new_tokens = check.size("stream", "max_new_tokens", max_new_tokens)
  start, options = _begin(
    "stream",
    [model],
    prompt,
    max_new_tokens,
    sampler=sampler,
    rngs=rngs,
    stop_tokens=stop_tokens,
    repetition_penalty=repetition_penalty,
    lengths=lengths,
    max_length=max_length,
    cache_dtype=cache_dtype,
    resume=resume,
  )
  return _tokens(model, _Now(start), options, max_new_tokens, is_single(prompt))


def _tokens(model: Any, now: Any, options: Any, count: int, single: bool) -> Iterator[Any]:
  for _ in range(count):
    drawn = np.asarray(_step(model, now, options))
    _check_finite(now.broken[...])
    yield int(drawn[0]) if single else drawn
    if bool(np.asarray(now.done[...]).all()):
      return


def _begin(
  function: str,
  models: list[Any],
  prompt: Any,
  new: int,
  *,
  sampler: Any,
  rngs: Any,
  stop_tokens: Any,
  repetition_penalty: Any,
  lengths: Any,
  max_length: int | None,
  cache_dtype: Any,
  resume: bool,
  spare: int = 0,
) -> tuple[_Start, _Options]:
  """Check everything, make the memories ready, and decode all of the prompts but their last tokens.

  Raises:
    InvalidArgumentError, MissingRngError: before anything has changed.
  """
  parts = prompt_of(function, prompt, lengths)
  stop = _checked_stop(function, stop_tokens)
  if not callable(sampler) or isinstance(sampler, type):
    want = "a function (logits, key) -> token, such as nnx.samplers.greedy"
    raise InvalidArgumentError.value(function, "sampler", sampler, want)
  penalty = repetition_penalty
  if penalty is not None and not _jax.is_tracer(penalty) and not float(penalty) > 0:
    raise InvalidArgumentError.value(function, "repetition_penalty", penalty, "a number above 0")
  batch = parts.tokens.shape[0]
  key = _checked_key(function, batch, sampler, rngs)
  wanted = Wanted(
    batch=batch,
    length=_need(function, parts, new + spare, max_length),
    exact=max_length is not None,
    spare=max(spare, 0 if parts.lengths is None else parts.tokens.shape[1]),
    dtype=cache_dtype,
  )
  held = [memory.look(model) for model in models]  # once: a walk takes as long as half a step
  for model, has in zip(models, held, strict=True):
    memory.check(function, model, has, wanted, resume=resume, ragged=parts.lengths is not None)
  if len(models) > 1:
    _check_pair(*held, resume=resume)
  if not resume:
    held = [memory.begin(*both, wanted) for both in zip(models, held, strict=True)]
  keys = _keys_of(key, batch)
  for model, has in zip(models, held, strict=True):
    prefill(model, has, parts)
  if not isinstance(sampler, Sampler):
    sampler = jax.tree_util.Partial(sampler)
  return _start(parts, new, penalty is not None), _Options(sampler, keys, stop, penalty)


def _start(prompt: Prompt, new: int, remembers: bool) -> _Start:
  batch, length = prompt.tokens.shape
  lengths = np.full(batch, length) if prompt.lengths is None else prompt.lengths
  lengths = jnp.asarray(lengths, jnp.int32)
  history = None
  if remembers:
    size = -(-(length + new) // 128) * 128
    known = jnp.where(jnp.arange(length) < lengths[:, None], prompt.tokens, -1)
    history = jnp.pad(known, ((0, 0), (0, size - length)), constant_values=-1)
  return _Start(jnp.asarray(prompt.last, jnp.int32), lengths, history)


def _check_pair(model: Held, draft: Held, *, resume: bool) -> None:
  """Raise InvalidArgumentError if a model and its draft would be in each other's way."""
  if not {id(m) for m in model.attentions}.isdisjoint(map(id, draft.attentions)):
    want = "a model with attention of its own, which remembers by itself: nnx.clone makes one"
    got = "one that has attention in common with the model"
    raise InvalidArgumentError.value("generate", "draft", got, want)
  if not resume:
    return
  lengths = [memory.length_in(held.layers[0]) for held in (model, draft)]
  if not any(map(_jax.is_tracer, lengths)) and np.any(lengths[0] != lengths[1]):
    want = f"a draft model that remembers {lengths[0]} positions as the model does, or resume=False"
    got = f"one that remembers {lengths[1]}"
    raise InvalidArgumentError.value("generate", "draft", got, want)


def _checked_stop(function: str, stop: Any) -> np.ndarray:
  stop = np.asarray(stop if np.ndim(stop) else [stop])
  if stop.ndim != 1 or (stop.size and not np.issubdtype(stop.dtype, np.integer)):
    raise InvalidArgumentError.value(function, "stop_tokens", stop, "a token, or a list of tokens")
  return stop.astype(np.int32)


def _checked_key(function: str, batch: int, sampler: Any, rngs: Any) -> Any:
  """A function that gives the key or keys: a stream counts when it is called."""
  if isinstance(rngs, Rngs):
    return rngs["sample"]
  if isinstance(rngs, RngStream):
    return rngs
  if rngs is None and sampler is not samplers.greedy:
    raise MissingRngError(
      f"nnx.{function} draws tokens with {sampler!r}",
      got="rngs=None",
      fix="pass rngs=nnx.Rngs(0), or sampler=nnx.samplers.greedy for the most likely token",
    )
  if rngs is None or (isinstance(rngs, int) and not isinstance(rngs, bool)):
    return lambda: jax.random.key(rngs or 0)
  dtype = getattr(rngs, "dtype", None)
  typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
  if not typed and dtype != jnp.uint32:
    want = "an nnx.Rngs, a stream of one, a key of JAX or an int"
    raise InvalidArgumentError.value(function, "rngs", rngs, want)
  key: Any = rngs if typed else jax.random.wrap_key_data(jnp.asarray(rngs))
  if key.shape not in ((), (batch,)):
    want = f"one key, or one for each of {batch} sequences"
    raise InvalidArgumentError.value(function, "rngs", f"keys of shape {key.shape}", want)
  return lambda: key


def _keys_of(key: Any, batch: int) -> jax.Array:
  """A key for each sequence, that does not depend on how many there are."""
  key = key()
  if key.shape:
    return key
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


def _need(function: str, prompt: Prompt, new: int, max_length: int | None) -> int:
  """How many positions a memory must have: all tokens but the last are in it."""
  need = max(prompt.tokens.shape[1] + new - 1, 1)
  if max_length is None:
    return need
  max_length = check.size(function, "max_length", max_length)
  if max_length < need:
    want = f"at least {need}: {prompt.tokens.shape[1]} tokens of the prompt, and the new ones"
    raise InvalidArgumentError.value(function, "max_length", max_length, want)
  return max_length


def _next(model: Any, now: _Now, options: _Options) -> jax.Array:
  """One step; returns the token of each sequence, -1 where it has ended."""
  last, done, count = now.last[...], now.done[...], now.count[...]
  frozen = memory.freeze(model, done) if last.shape[0] > 1 else None
  logits = logits_of(model, last[:, None])[:, -1]
  if frozen is not None:
    frozen.restore()
  broken = now.broken[...] | (jnp.isnan(logits).any(-1) & ~done)
  if now.history is not None:
    logits = _penalized(logits, now.history[...], options.penalty)
  keys = jax.vmap(jax.random.fold_in, (0, None))(options.keys, count)
  token = jax.vmap(options.sampler)(logits, keys).astype(jnp.int32)
  if now.history is not None:
    place = (jnp.arange(last.shape[0]), now.lengths[...] + count)
    now.history[place] = jnp.where(done, -1, token)
  now.last[...] = jnp.where(done, last, token)
  now.count[...] = count + 1
  now.broken[...] = broken
  now.done[...] = done | jnp.equal(token[:, None], options.stop).any(-1) | broken
  return jnp.where(done | broken, -1, token)


def _penalized(logits: jax.Array, history: jax.Array, penalty: Any) -> jax.Array:
  rows = jnp.arange(logits.shape[0])[:, None]
  places = jnp.where(history < 0, logits.shape[-1], history)
  seen = jnp.zeros(logits.shape, bool).at[rows, places].set(True, mode="drop")
  return samplers.penalized(logits, seen, penalty)


_step = jit(_next)


@partial(jit, static_argnames="size")
def _loop(
  model: Any, start: _Start, options: _Options, *, size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Steps until all sequences have ended, or have `size` tokens."""

  def more(state: Any) -> jax.Array:
    _, now, _ = state
    return (now.count[...] < size) & ~now.done[...].all()

  def step(state: Any) -> Any:
    model, now, tokens = state
    place = now.count[...]
    return model, now, tokens.at[:, place].set(_next(model, now, options))

  now = _Now(start)
  tokens = jnp.full((now.last.shape[0], size), -1, jnp.int32)
  _, _, tokens = while_loop(more, step, (model, now, tokens))
  return tokens, (tokens >= 0).sum(-1), now.broken[...]


def _check_finite(broken: jax.Array) -> None:
  if not _jax.is_tracer(broken) and bool(np.asarray(broken).any()):
    raise NonFiniteError(
      "the model gave NaN instead of logits",
      got=f"NaN in sequences {np.flatnonzero(np.asarray(broken)).tolist()} of the batch",
      fix="nnx.find_nonfinite(lambda m, x: m(x), model, tokens) names the layer",
    )
