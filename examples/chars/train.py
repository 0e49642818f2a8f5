"""The training: the loss is counted in bits for each character."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import optax

from examples.chars.model import LENGTH, CharModel
from examples.chars.text import KNOWN, Corpus
from refax import nnx

ROWS = 32  # of the text that is held out, for each number that is reported


class Progress(NamedTuple):
  """How training goes, in bits for each character."""

  step: int
  train: float  # of the batch of this step
  held_out: float | None  # measured after some steps only


def bits(model: CharModel, rows: jax.Array) -> jax.Array:
  """How many bits each character of `rows` takes after those before it, on average."""
  logits = model(rows[:, :-1])
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()
  return loss / math.log(2)


evaluate = nnx.jit(bits)


@nnx.jit
def train_step(model: CharModel, optimizer: nnx.Optimizer, rows: jax.Array) -> jax.Array:
  """The weights and the optimizer's moments change in place."""
  loss, grads = nnx.value_and_grad(bits)(model, rows)
  optimizer.update(model, grads)
  return loss


def cut(text: np.ndarray, starts: np.ndarray) -> np.ndarray:
  """Rows of `LENGTH + 1` characters: each is an input, and its successor is what to say."""
  return text[starts[:, None] + np.arange(LENGTH + 1)]


def held_out_rows(text: np.ndarray) -> np.ndarray:
  """Rows that are spread evenly over the text."""
  return cut(text, np.linspace(0, len(text) - LENGTH - 1, ROWS).astype(int))


def bits_of_counts(corpus: Corpus) -> float:
  """The bits for a held-out character if one knows only how often each comes in the other text."""
  counts = np.bincount(corpus.train, minlength=len(KNOWN)) + 1
  return float(-np.log2(counts / counts.sum())[corpus.held_out].mean())


def fit(
  model: CharModel, corpus: Corpus, *, steps: int, batch_size: int, lr: float, seed: int
) -> Iterator[Progress]:
  """Train `model`, and say after each step how it goes."""
  warm_up = max(1, steps // 20)
  schedule = optax.warmup_cosine_decay_schedule(0.0, lr, warm_up, steps, end_value=lr / 20)
  transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))
  optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
  rng = np.random.default_rng(seed)
  unseen = held_out_rows(corpus.held_out)
  every = max(1, steps // 20)
  for step in range(1, steps + 1):
    starts = rng.integers(0, len(corpus.train) - LENGTH, batch_size)
    loss = float(train_step(model, optimizer, cut(corpus.train, starts)))
    measured = step == 1 or step % every == 0
    yield Progress(step, loss, float(evaluate(model, unseen)) if measured else None)
