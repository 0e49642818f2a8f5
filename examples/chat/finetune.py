"""Teach the model how the documentation of Python reads, with LoRA.

The text is the docstrings of the standard library, which every Python brings along. What is held
out are whole modules, so that no sentence of them was trained on. The weights of the model stay as
they are, also as integers of 8 or 4 bits (QLoRA, arXiv:2305.14314). For 300 of them one number is
trained; these go into a file of their own.
"""

import ast
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from examples.chat.model import SmolLM
from refax import nnx

LENGTH, BATCH, RATE, WARM_UP = 128, 2, 1e-3, 0.1
RANK, ALPHA = 8, 16
HELD_OUT = 8  # one module of so many
ROWS = 16  # of the text that is held out, for each number that is reported


def docstrings(folder: str | Path | None = None) -> dict[str, list[str]]:
  """The docstrings of each module of the standard library, each after the name of what it is of.

  Args:
    folder: where the modules are; by default those of this Python. They are read, not imported.
  """
  paths = sorted(Path(folder or sysconfig.get_path("stdlib")).glob("*.py"))
  texts = {path.stem: list(_texts(ast.parse(path.read_bytes()), path.stem)) for path in paths}
  return {module: found for module, found in texts.items() if found}


def _texts(node: Any, name: str) -> Iterator[str]:
  """The docstrings of a part of a program and of the parts in it."""
  text = ast.get_docstring(node)
  if text and len(text) >= 40:  # shorter ones say little more than the name
    yield f"{name}\n{text}"
  for part in ast.iter_child_nodes(node):
    if isinstance(part, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
      yield from _texts(part, f"{name}.{part.name}")


def split(texts: dict[str, list[str]], *, seed: int) -> tuple[list[str], list[str]]:
  """Texts to train on, and those of modules that are held out.

  A docstring that several modules have is in none of the texts to train on.
  """
  modules = sorted(texts)
  order = [modules[i] for i in np.random.default_rng(seed).permutation(len(modules))]
  count = -(-len(modules) // HELD_OUT)
  held = [text for module in order[:count] for text in texts[module]]
  body = lambda text: text.partition("\n")[2]
  known = set(map(body, held))
  train = [text for module in order[count:] for text in texts[module]]
  return [text for text in train if body(text) not in known], held


def pack(texts: list[str], tokenizer: Any, *, seed: int, rows: int | None = None) -> np.ndarray:
  """Texts in random order, one after the other, cut into rows `[rows, LENGTH + 1]` of tokens.

  Args:
    texts: the texts.
    tokenizer: an `examples.chat.text.Tokenizer`.
    seed: of the order.
    rows: how many rows at most; by default as many as there are.
  """
  tokens: list[int] = []
  for i in np.random.default_rng(seed).permutation(len(texts)):
    tokens += [*tokenizer.encode(texts[i]), tokenizer.end]
    if rows is not None and len(tokens) >= rows * (LENGTH + 1):
      break
  count = len(tokens) // (LENGTH + 1)
  packed = np.array(tokens[: count * (LENGTH + 1)], np.int32).reshape(count, LENGTH + 1)
  return packed[:rows]


def adapt(model: Any, *, rngs: nnx.Rngs) -> Any:
  """Put LoRA beside the maps to queries and values in all blocks."""
  maps = lambda path, layer: path[-1] in ("query", "value")
  return nnx.add_lora(model, RANK, alpha=ALPHA, only=maps, rngs=rngs)


def load_adapter(model: SmolLM, path: str | Path) -> SmolLM:
  """The model with what was trained, in its weights where these are no integers."""
  adapt(model, rngs=nnx.Rngs(0))
  nnx.load_safetensors(model, path, only=nnx.LoRAParam)
  is_quantized = bool(nnx.to_flat_state(nnx.state(model, nnx.QuantizedParam)))
  return model if is_quantized else nnx.merge_lora(model)


def loss_of(model: Any, rows: jax.Array) -> jax.Array:
  """How surprising each token of some rows is after those before it, on average."""
  logits = model(rows[:, :-1]).astype(jnp.float32)
  return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


def evaluate(model: Any, rows: np.ndarray) -> float:
  """The loss on all rows, a batch at a time."""
  batches = [rows[i : i + BATCH] for i in range(0, len(rows) - BATCH + 1, BATCH)]
  return float(
    np.mean([float(_loss(model, batch)) for batch in tqdm(batches, "loss", leave=False)])
  )


_loss = nnx.jit(loss_of)


def fit(model: Any, rows: np.ndarray, *, steps: int, seed: int) -> Iterator[float]:
  """Train what `adapt` has added; yields the loss of each step."""
  warm_up = max(1, round(WARM_UP * steps))
  rate = optax.warmup_cosine_decay_schedule(0, RATE, warm_up, max(steps, warm_up + 1))
  optimizer = nnx.Optimizer(model, optax.adamw(rate), wrt=nnx.LoRAParam)

  @nnx.jit
  def step(model, optimizer, rows):
    loss, grads = nnx.value_and_grad(loss_of, wrt=nnx.LoRAParam)(model, rows)
    optimizer.update(model, grads)
    return loss

  rng = np.random.default_rng(seed)
  for _ in range(steps):
    yield float(step(model, optimizer, jnp.asarray(rows[rng.choice(len(rows), BATCH)])))


def run(*, steps: int, seed: int, bits: int | None = None, path: str | None = None) -> tuple:
  """Train on real text; returns the loss on what is held out, before and after.

  Args:
    steps: how many batches to train on.
    seed: of the split, the order and the new weights.
    bits: 8 or 4 to quantize the weights first; None to leave them as they are.
    path: the file to write what was trained to; None for none.
  """
  from examples.chat.model import load, weights
  from examples.chat.text import Tokenizer

  tokenizer = Tokenizer(weights())
  train, held = split(docstrings(), seed=seed)
  rows = pack(train, tokenizer, seed=seed, rows=steps * BATCH)
  unseen = pack(held, tokenizer, seed=seed, rows=ROWS)
  model = load()
  if bits is not None:
    nnx.quantize(model, bits)
  losses = [evaluate(model, unseen)]
  print(f"{len(rows)} rows of {LENGTH} tokens to train on, {len(unseen)} of other modules.")
  print(f"before: loss {losses[0]:.3f}, perplexity {math.exp(losses[0]):.2f}", flush=True)
  adapt(model, rngs=nnx.Rngs(seed))
  size = sum(x.size for _, x in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)))
  print(f"Training {size:,} numbers.", flush=True)
  bar = tqdm(fit(model, rows, steps=steps, seed=seed), total=steps, leave=False)
  for loss in bar:
    bar.set_postfix(loss=f"{loss:.3f}")
  losses.append(evaluate(model, unseen))
  print(f"after:  loss {losses[1]:.3f}, perplexity {math.exp(losses[1]):.2f}", flush=True)
  if path is not None:
    nnx.save_safetensors(model, path, only=nnx.LoRAParam)
    print(f"What was trained is in {path}.", flush=True)
  return tuple(losses)
