"""SmolLM2-135M by transformers on torch. It does not import JAX: memory is measured beside it."""

import os
import time
from collections.abc import Callable
from pathlib import Path


def run(path: Path) -> Callable[[list[int], int], list[float]]:
  """Load the weights of a GGUF file; a function `(prompt, count)` to when each token was there.

  Raises:
    ImportError: torch or transformers is not installed.
  """
  import torch
  from transformers import AutoModelForCausalLM

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  model = AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  ).eval()

  def run(prompt: list[int], count: int) -> list[float]:
    times, ids, cache = [], torch.tensor([prompt]), None
    with torch.inference_mode():
      for _ in range(count):
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        int(ids[0, 0])
        times.append(time.perf_counter())
    return times

  return run
