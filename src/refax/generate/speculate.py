"""Speculative decoding: a small model proposes tokens, a large one checks several at once.

A proposal drawn from `q` is accepted with probability `min(1, p / q)`; the first that is refused is
drawn again, from what `p` has more than `q`. So each token is distributed as the large model says
(Y. Leviathan et al., "Fast Inference from Transformers via Speculative Decoding",
arXiv:2211.17192).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refax.errors import ShapeMismatchError
from refax.generate.memory import cache_length, truncate_cache
from refax.generate.samplers import Sampler
from refax.transforms.jit import jit
from refax.transforms.loops import while_loop
from refax.typing import describe


class Draft(NamedTuple):
  """What a generation with a draft model starts from; the memories hold all but `last`."""

  last: jax.Array
  sampler: Sampler
  keys: jax.Array
  stop: Any


class _State(NamedTuple):
  """Where it is: how many tokens each sequence has, and which."""

  last: jax.Array
  round: jax.Array
  drawn: jax.Array
  tokens: jax.Array
  done: jax.Array
  broken: jax.Array


def logits_of(model: Any, tokens: jax.Array) -> jax.Array:
  """The logits `[batch, length, vocabulary]` after tokens `[batch, length]`, which it remembers.

  Raises:
    ShapeMismatchError: the model returns something else.
  """
  logits = model(tokens, decode=True)
  shape = getattr(logits, "shape", ())
  fits = len(shape) == 3 and shape[:2] == tokens.shape
  if not fits or not jnp.issubdtype(logits.dtype, jnp.floating):
    raise ShapeMismatchError(
      "a model that generates returns logits of shape (batch, length, vocabulary)",
      got=f"{describe(logits)} for tokens of shape {tokens.shape}",
      fix="let model(tokens, decode=True) return the logits of each position",
    )
  return logits


@partial(jit, static_argnames=("size", "ahead"))
def speculate(
  model: Any, draft: Any, given: Draft, *, size: int, ahead: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Rounds of proposals and checks until all sequences have ended, or have `size` tokens.

  Args:
    model: the model whose distribution is wanted.
    draft: the model that proposes.
    given: what to start from.
    size: how many tokens to generate.
    ahead: how many tokens are proposed in a round.

  Returns:
    Tokens `[batch, size]`, -1 where there is none; how many; where logits were NaN.
  """
  batch = given.last.shape[0]
  none = jnp.zeros(batch, bool)
  tokens = jnp.full((batch, size), -1, jnp.int32)
  start = _State(given.last, jnp.int32(0), jnp.zeros(batch, jnp.int32), tokens, none, none)

  def more(state: Any) -> jax.Array:
    return ~state[2].done.all()

  def step(state: Any) -> Any:
    model, draft, now = state
    return model, draft, _round(model, draft, now, given, ahead)

  _, _, now = while_loop(more, step, (model, draft, start))
  return now.tokens, now.drawn, now.broken


def _round(model: Any, draft: Any, now: _State, given: Draft, ahead: int) -> _State:
  """Propose, check, and keep what is accepted and one token more."""
  draw = jax.vmap(jax.random.fold_in, (0, None))(given.keys, now.round)
  key = lambda i: jax.vmap(jax.random.fold_in, (0, None))(draw, i)
  held = cache_length(model)
  proposed, q = _propose(draft, now.last, given.sampler, [key(i) for i in range(ahead)])
  inputs = jnp.concatenate([now.last[:, None], proposed], axis=1)
  raw = logits_of(model, inputs)
  p = jax.nn.softmax(given.sampler.filtered(raw))  # [batch, ahead + 1, vocabulary]
  accepted = _accepted(proposed, p, q, key(ahead))
  extra = _extra(accepted, p, q, key(ahead + 1))
  places = jnp.arange(ahead + 1)
  new = jnp.where(places < accepted[:, None], jnp.pad(proposed, ((0, 0), (0, 1))), -1)
  new = new.at[jnp.arange(len(extra)), accepted].set(extra)
  broken = now.broken | (jnp.isnan(raw).any((-1, -2)) & ~now.done)
  kept, ends = _kept(new, now, given.stop)
  kept = jnp.where(now.done | broken, 0, kept)
  places = jnp.where(places < kept[:, None], now.drawn[:, None] + places, now.tokens.shape[1])
  rows = jnp.arange(len(extra))[:, None]
  tokens = now.tokens.at[rows, places].set(new, mode="drop")
  length = held + (kept if jnp.ndim(held) else kept[0])  # all but the newest token
  for m in (model, draft):
    truncate_cache(m, length)
  newest = new[jnp.arange(len(extra)), jnp.maximum(kept - 1, 0)]
  last = jnp.where(kept > 0, newest, now.last)
  done = now.done | ends | broken
  return _State(last, now.round + 1, now.drawn + kept, tokens, done, broken)


def _propose(
  draft: Any, last: jax.Array, sampler: Sampler, keys: list[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Tokens `[batch, ahead]` of the draft model, and the distributions that they are drawn from."""
  tokens, drawn_from = [], []
  for key in keys:
    logits = sampler.filtered(logits_of(draft, last[:, None])[:, -1])
    last = jax.vmap(jax.random.categorical)(key, logits).astype(jnp.int32)
    tokens.append(last)
    drawn_from.append(jax.nn.softmax(logits))
  draft(last[:, None], decode=True)  # so that both models remember as much
  return jnp.stack(tokens, 1), jnp.stack(drawn_from, 1)


def _accepted(proposed: jax.Array, p: jax.Array, q: jax.Array, key: jax.Array) -> jax.Array:
  """How many of the proposals are accepted, one after the other, `[batch]`."""
  take = lambda x: jnp.take_along_axis(x, proposed[..., None], axis=-1)[..., 0]
  draws = jax.vmap(lambda key: jax.random.uniform(key, proposed.shape[1:]))(key)
  good = draws * take(q) < take(p[:, :-1])
  return jnp.cumprod(good, axis=1).sum(1)


def _extra(accepted: jax.Array, p: jax.Array, q: jax.Array, key: jax.Array) -> jax.Array:
  """The token after those accepted: from what `p` has more than `q`; after all, from `p`."""
  q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))
  at = lambda x: jnp.take_along_axis(x, accepted[:, None, None], axis=1)[:, 0]
  p, rest = at(p), jnp.maximum(at(p) - at(q), 0)
  rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, p)  # equal up to rounding
  return jax.vmap(jax.random.categorical)(key, jnp.log(rest)).astype(jnp.int32)


def _kept(new: jax.Array, now: _State, stop: Any) -> tuple[jax.Array, jax.Array]:
  """How many of the new tokens are kept, up to a stop token and the size; which sequences end."""
  places = jnp.arange(new.shape[1])
  stops = (new[..., None] == stop).any(-1) & (new >= 0)
  first = jnp.where(stops, places, new.shape[1]).min(1)
  room = now.tokens.shape[1] - now.drawn
  kept = jnp.minimum(jnp.minimum((new >= 0).sum(1), first + 1), room)
  return kept, (first < kept) | (now.drawn + kept >= now.tokens.shape[1])
