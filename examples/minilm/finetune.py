"""Teach the model which chapter of the Python reference a sentence is from.

First a new head alone, with the encoder frozen; then head and LoRA, thin matrices beside the frozen
maps of the feed-forward networks. What is trained is said by a filter, for the gradient and for the
optimizer; everything else stays as it is, bit for bit.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import optax
from tqdm import tqdm

from examples.minilm.model import FEATURES, MiniLM
from examples.minilm.text import CHAPTERS, Tokenizer, Tokens, chapter
from refax import nnx

HEAD = nnx.PathContains("head")
LORA = nnx.Any(HEAD, nnx.LoRAParam)
BATCH, LENGTH = 32, 48


class Classifier(nnx.Module):
  """An encoder, and a head that says which class its vectors belong to."""

  def __init__(self, encoder: MiniLM, classes: int, *, rngs: nnx.Rngs):
    self.encoder = encoder
    self.head = nnx.Linear(FEATURES, classes, rngs=rngs)

  def __call__(self, tokens: Tokens) -> jax.Array:
    return self.head(10 * self.encoder(tokens.ids, tokens.mask))

  def add_lora(self, rank: int, *, rngs: nnx.Rngs) -> None:
    """Put LoRA beside both maps of every feed-forward network."""

    def add(block, rngs):
      mlp = block.feed_forward
      mlp.up = nnx.LoRA(FEATURES, rank, 4 * FEATURES, base_module=mlp.up, rngs=rngs)
      mlp.down = nnx.LoRA(4 * FEATURES, rank, FEATURES, base_module=mlp.down, rngs=rngs)

    blocks = self.encoder.encoder.blocks
    nnx.vmap(add)(blocks.layers, rngs.split(len(blocks)))


class Data(NamedTuple):
  """Sentences as numbers, and their chapters."""

  tokens: Tokens
  labels: np.ndarray

  def batches(self, rng: np.random.Generator) -> Iterator["Data"]:
    """All of it in batches of one size, in random order; the last ones are left for next time."""
    order = rng.permutation(len(self.labels))
    for start in range(0, len(order) - BATCH + 1, BATCH):
      yield self.take(order[start : start + BATCH])

  def take(self, index: np.ndarray) -> "Data":
    return Data(Tokens(*(x[index] for x in self.tokens)), self.labels[index])


def load_data(seed: int) -> tuple[Data, Data]:
  """Three quarters of the sentences to train on, and the others to test on."""
  pairs = [(s, i) for i, name in enumerate(CHAPTERS) for s in dict.fromkeys(chapter(name))]
  tokens = Tokenizer(LENGTH)([s for s, _ in pairs], pad=True)
  data = Data(tokens, np.array([i for _, i in pairs]))
  order = np.random.default_rng(seed).permutation(len(pairs))
  split = 3 * len(pairs) // 4
  return data.take(order[:split]), data.take(order[split:])


@nnx.jit
def accuracy(model: Classifier, tokens: Tokens, labels: jax.Array) -> jax.Array:
  return (model(tokens).argmax(-1) == labels).mean()


def evaluate(model: Classifier, data: Data) -> float:
  """The share of right answers; with dropout off, as the model was loaded."""
  return float(accuracy(model, data.tokens, data.labels))


def fit(model: Classifier, data: Data, wrt: nnx.Filter, *, epochs: int, lr: float, seed: int):
  """Train the Variables that `wrt` selects; yields the mean loss of each epoch."""
  optimizer = nnx.Optimizer(model, optax.adam(lr), wrt=wrt)

  @nnx.jit
  def step(model, optimizer, tokens, labels):
    def loss(model):
      return optax.softmax_cross_entropy_with_integer_labels(model(tokens), labels).mean()

    value, grads = nnx.value_and_grad(loss, wrt=wrt)(model)
    optimizer.update(model, grads)
    return value

  rng = np.random.default_rng(seed)
  for epoch in range(epochs):
    batches = list(data.batches(rng))
    losses = []
    for batch in tqdm(batches, f"epoch {epoch + 1}/{epochs}", leave=False):
      losses.append(float(step(model, optimizer, batch.tokens, batch.labels)))
    yield sum(losses) / len(losses)


def run(model: MiniLM, *, epochs: int, seed: int) -> tuple[float, float]:
  """Both stages; returns the test accuracy after each."""
  train, test = load_data(seed)
  classifier = Classifier(model, len(CHAPTERS), rngs=nnx.Rngs(seed))
  reached = []
  for name, wrt, lr in (("the head", HEAD, 1e-2), ("head and LoRA", LORA, 2e-3)):
    if wrt is LORA:
      classifier.add_lora(8, rngs=nnx.Rngs(seed + 1))
    size = sum(x.size for _, x in nnx.to_flat_state(nnx.state(classifier, wrt)))
    print(f"Training {name}: {size:,} numbers.", flush=True)
    for loss in fit(classifier, train, wrt, epochs=epochs, lr=lr, seed=seed):
      print(f"  loss {loss:.3f}", flush=True)
    reached.append(evaluate(classifier, test))
    print(f"  test accuracy {reached[-1]:.1%} of {len(test.labels)} sentences", flush=True)
  return reached[0], reached[1]
