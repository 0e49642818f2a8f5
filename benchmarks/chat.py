"""SmolLM2-135M, decoding: `python -m benchmarks.chat` (needs the extra `chat`, and the weights).

Rows take turns in one process, with the same weights (float32), prompt and threads: Refax
(`nnx.stream` a token at a time, `nnx.generate` in one loop), JAX by hand with a donated cache, and
transformers on torch where these are installed. The limit is what the memory allows: the bytes of
the weights, that each token has to read, over the measured bandwidth.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import chat_torch
from benchmarks.measure import refuse_flags
from examples.chat.model import EPSILON, KV_HEADS, LAYERS, THETA, load, weights
from examples.chat.text import Message, Tokenizer
from refax import nnx

OUT = Path("out/benchmarks")
PROMPT = "Write a long story about a lighthouse and the people who live in it."
LENGTH = 512


def by_hand(model: Any) -> Any:
  """A decoder as functions of arrays: a step `(params, cache, token, place) -> (cache, token)`."""
  names = ("query", "key", "value", "out")
  read = lambda v: jnp.array(v[...])
  params = {"table": read(model.tokens.embedding), "norm": read(model.decoder.norm.scale)}
  params["layers"] = [
    {name: read(getattr(b.attention, name).kernel) for name in names}
    | {name: read(getattr(b.feed_forward, name).kernel) for name in ("up", "gate", "down")}
    | {"norm1": read(b.attention_norm.scale), "norm2": read(b.feed_forward_norm.scale)}
    for b in model.decoder.blocks
  ]

  def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + EPSILON) * scale

  def turned(x: jax.Array, positions: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * THETA ** (-jnp.arange(half) / half)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  def forward(params: dict, cache: list, tokens: jax.Array, place: jax.Array) -> tuple:
    x = params["table"][tokens]
    positions = place + jnp.arange(tokens.shape[1])
    mask = jnp.arange(LENGTH) <= positions[:, None]
    new = []
    for p, (keys, values) in zip(params["layers"], cache, strict=True):
      h = norm(x, p["norm1"])
      q, k, v = (jnp.einsum("bld,dhs->blhs", h, p[n]) for n in names[:3])
      q, k = turned(q, positions), turned(k, positions)
      keys = jax.lax.dynamic_update_slice_in_dim(keys, k, place, 1)
      values = jax.lax.dynamic_update_slice_in_dim(values, v, place, 1)
      new.append((keys, values))
      h = jax.nn.dot_product_attention(q, keys, values, mask=mask[None, None])
      x = x + jnp.einsum("blhs,hsd->bld", h, p["out"])
      h = norm(x, p["norm2"])
      x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
    return new, norm(x[:, -1], params["norm"]) @ params["table"].T

  @functools.partial(jax.jit, donate_argnums=1)
  def step(params: dict, cache: list, token: jax.Array, place: jax.Array) -> tuple:
    cache, logits = forward(params, cache, token[:, None], place)
    return cache, logits.argmax(-1).astype(jnp.int32), place + 1

  @functools.partial(jax.jit, donate_argnums=1)
  def prefill(params: dict, cache: list, tokens: jax.Array) -> list:
    return forward(params, cache, tokens, jnp.int32(0))[0]

  size = params["layers"][0]["key"].shape[-1]

  def run(prompt: list[int], count: int) -> list[float]:
    empty = lambda: jnp.zeros((1, LENGTH, KV_HEADS, size))
    cache = prefill(params, [(empty(), empty()) for _ in range(LAYERS)], jnp.array([prompt[:-1]]))
    token, place = jnp.array(prompt[-1:], jnp.int32), jnp.int32(len(prompt) - 1)
    times = []
    for _ in range(count):
      cache, token, place = step(params, cache, token, place)
      int(token[0])
      times.append(time.perf_counter())
    return times

  return run


def refax_stream(model: Any) -> Any:
  def run(prompt: list[int], count: int) -> list[float]:
    stream = nnx.stream(model, prompt, count, max_length=LENGTH)
    return [time.perf_counter() for _ in stream]

  return run


def refax_loop(model: Any) -> Any:
  def run(prompt: list[int], count: int) -> list[float]:
    nnx.generate(model, prompt, 1, max_length=LENGTH)
    start = time.perf_counter()
    nnx.generate(model, prompt[-1:], count, resume=True).tokens.block_until_ready()
    spent = (time.perf_counter() - start) / count
    return [start + spent * i for i in range(count)]

  return run


def torch_run() -> Any:
  """transformers on torch, or None where they are not installed."""
  try:
    return chat_torch.run(weights())
  except ImportError:
    return None


def bandwidth() -> float:
  """Bytes a second that all cores read together: the sum of 512 MiB."""
  x = jnp.ones(2**27)
  total = jax.jit(lambda x: x.reshape(64, -1).sum(1).sum())
  total(x).block_until_ready()
  times = []
  for _ in range(7):
    start = time.perf_counter()
    total(x).block_until_ready()
    times.append(time.perf_counter() - start)
  return x.nbytes / min(times)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--tokens", type=int, default=32)
  options = parser.parse_args()
  refuse_flags()
  model = load()
  tokenizer = Tokenizer(weights())
  prompt = tokenizer.conversation([Message("user", PROMPT)])
  size = sum(v[...].nbytes for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param)))
  rows = {
    "JAX by hand": by_hand(model),
    "Refax, nnx.stream": refax_stream(model),
    "Refax, nnx.generate": refax_loop(model),
    "transformers on torch": torch_run(),
  }
  found: dict[str, list[float]] = {name: [] for name, run in rows.items() if run is not None}
  for name in found:
    rows[name](prompt, 2)  # compile
  for _ in range(options.rounds):
    for name in found:
      times = rows[name](prompt, options.tokens)
      found[name].append(statistics.median(np.diff(times)))
  limit = bandwidth() / size
  print(f"weights {size / 2**20:.0f} MiB; the memory allows {limit:.1f} tokens a second")
  base = found["JAX by hand"]
  result = {}
  for name, spent in found.items():
    ratio = statistics.median(a / b for a, b in zip(base, spent, strict=True))
    speed = 1 / statistics.median(spent)
    result[name] = {"tokens/s": speed, "of JAX by hand": ratio, "of the limit": speed / limit}
    shares = f"{ratio:.2f} of JAX by hand  {speed / limit:.2f} of the limit"
    print(f"{name:24} {speed:6.1f} tokens/s  {shares}")
  OUT.mkdir(parents=True, exist_ok=True)
  (OUT / "chat.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
  main()
