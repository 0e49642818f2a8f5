"""Prompts as arrays, and what of them goes into the memory before the first token is drawn."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refax import _jax
from refax.errors import InvalidArgumentError
from refax.generate.memory import Held, cut, length_in
from refax.nn.attention.kv_cache import Memory
from refax.transforms.jit import jit
from refax.typing import describe

CHUNKS = (256, 64, 16, 4, 1)
"""Sizes that a prompt is cut into: so few programs serve prompts of all lengths."""


class Prompt(NamedTuple):
  """Prompts of a batch.

  Attributes:
    tokens: `[batch, length]`, filled up with 0 on the right.
    lengths: how many tokens each has, `[batch]`; None where all have as many.
  """

  tokens: jax.Array | np.ndarray
  lengths: jax.Array | np.ndarray | None

  @property
  def last(self) -> Any:
    """The last token of each, `[batch]`."""
    if self.lengths is None:
      return self.tokens[:, -1]
    rows = np.arange(self.tokens.shape[0])
    return self.tokens[rows, self.lengths - 1]


def prompt_of(function: str, prompt: Any, lengths: Any) -> Prompt:
  """The prompts that a user passed: an array, a list of tokens, or lists of different lengths.

  Raises:
    InvalidArgumentError: they are no integers, or one has no token.
  """
  want = "tokens (integers): an array [batch, length] or [length], or a list of lists"
  if isinstance(prompt, str):
    raise InvalidArgumentError.value(function, "prompt", prompt, want + "; a tokenizer makes them")
  ragged = isinstance(prompt, Sequence) and len(prompt) > 0 and np.ndim(prompt[0]) == 1
  if ragged:
    rows = [np.asarray(row) for row in prompt]
    sizes = np.array([row.size for row in rows])
    lengths = sizes if lengths is None and len(set(sizes.tolist())) > 1 else lengths
    rows = [np.pad(row, (0, int(sizes.max()) - row.size)) for row in rows]
    prompt = np.stack(rows) if all(row.ndim == 1 for row in rows) else prompt
  tokens = prompt if isinstance(prompt, jax.Array) else np.asarray(prompt)
  if tokens.ndim not in (1, 2) or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise InvalidArgumentError.value(function, "prompt", describe(tokens), want)
  batch = tokens if tokens.ndim == 2 else tokens[None]
  if 0 in batch.shape:
    want = "at least one token in each prompt, such as the one that begins every text"
    raise InvalidArgumentError.value(function, "prompt", describe(tokens), want)
  if not _jax.is_tracer(batch) and batch.min() < 0:
    want = "tokens from 0 on: a negative one would be looked up from the end of the table"
    raise InvalidArgumentError.value(function, "prompt", int(batch.min()), want)
  return Prompt(batch.astype(np.int32), _lengths(function, lengths, batch))


def is_single(prompt: Any) -> bool:
  """Whether a user passed one sequence, without an axis for the batch."""
  return np.ndim(prompt[0] if isinstance(prompt, Sequence) else prompt) == (
    0 if isinstance(prompt, Sequence) else 1
  )


def _lengths(function: str, lengths: Any, tokens: Any) -> Any:
  if lengths is None:
    return None
  lengths = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths)
  want = f"ints from 1 to {tokens.shape[1]}, one for each of {tokens.shape[0]} prompts"
  good = lengths.shape == tokens.shape[:1] and jnp.issubdtype(lengths.dtype, jnp.integer)
  if good and not _jax.is_tracer(lengths):
    good = bool((lengths >= 1).all() and (lengths <= tokens.shape[1]).all())
  if not good:
    raise InvalidArgumentError.value(function, "lengths", lengths, want)
  return lengths


def prefill(model: Any, held: Held, prompt: Prompt) -> None:
  """Decode all tokens of the prompts but the last of each, in a few chunks.

  Where the memory can be cut back, the last chunk is filled up, and sequences that are shorter than
  others are cut to what they have.

  Args:
    model: called as `model(tokens, decode=True)`.
    held: what it remembers.
    prompt: of `[batch, length]`.
  """
  tokens, count = prompt.tokens[:, :-1], prompt.tokens.shape[1] - 1
  if not count and prompt.lengths is None:
    return
  layers = held.layers if held.can_be_cut else []
  before = length_in(layers[0]) if layers else 0
  room = min((_room(layer.memory, before) for layer in layers), default=count)
  start = 0
  while start < count:
    size, left = _chunk(count - start, room - start if layers else 0), count - start
    part = tokens[:, start : start + size]
    if size > left:
      part = jnp.pad(part, ((0, 0), (0, size - left)))
    decode(model, part)
    start += size
  if prompt.lengths is not None:
    cut(model, before + prompt.lengths - 1)
  elif start > count:
    cut(model, before + count)


def _room(memory: Memory, before: Any) -> int:
  """How many positions a chunk can add; a ring can take back as many as it has to spare."""
  return 0 if memory.is_ring or _jax.is_tracer(before) else memory.slots - int(np.max(before))


def _chunk(left: int, room: int) -> int:
  """The next size: the smallest that holds all that is left, or the largest that it fills."""
  whole = [size for size in CHUNKS if left <= size <= room]
  full = [size for size in CHUNKS if size <= left]
  if whole and 2 * left > whole[-1]:
    return whole[-1]
  return full[0]


@jit
def decode(model: Any, tokens: jax.Array) -> None:
  """Let a model add tokens to its memory; what it predicts after them is not computed."""
  model(tokens, decode=True)
