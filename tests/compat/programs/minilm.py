"""The encoder all-MiniLM-L6-v2 with its published weights, as one writes it with Flax NNX."""

import json
import sys

import jax.numpy as jnp
from flax import nnx
from safetensors.numpy import load_file

FEATURES, HEADS, LAYERS = 384, 12, 6


class Block(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.attention = nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=rngs)
    self.attention_norm = nnx.LayerNorm(FEATURES, epsilon=1e-12, rngs=rngs)
    self.up = nnx.Linear(FEATURES, 4 * FEATURES, rngs=rngs)
    self.down = nnx.Linear(4 * FEATURES, FEATURES, rngs=rngs)
    self.norm = nnx.LayerNorm(FEATURES, epsilon=1e-12, rngs=rngs)

  def __call__(self, x, mask):
    x = self.attention_norm(x + self.attention(x, mask=mask))
    return self.norm(x + self.down(nnx.gelu(self.up(x), approximate=False)))


class MiniLM(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.words = nnx.Embed(30522, FEATURES, rngs=rngs)
    self.positions = nnx.Embed(512, FEATURES, rngs=rngs)
    self.segments = nnx.Embed(2, FEATURES, rngs=rngs)
    self.norm = nnx.LayerNorm(FEATURES, epsilon=1e-12, rngs=rngs)
    self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])

  def __call__(self, ids, mask):
    x = self.words(ids) + self.positions(jnp.arange(ids.shape[1]))
    x = self.norm(x + self.segments(jnp.zeros_like(ids)))
    for block in self.blocks:
      x = block(x, mask[:, None, None, :])
    weight = mask[..., None]
    x = (x * weight).sum(1) / weight.sum(1)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def heads(x):
  return x.T.reshape(FEATURES, HEADS, -1)


def put(variable, x):
  variable.value = jnp.asarray(x)


def fill(model, tensors):
  """Write the published weights, whose names and layouts are torch's."""

  def norm(layer, name):
    put(layer.scale, tensors[f"{name}.weight"])
    put(layer.bias, tensors[f"{name}.bias"])

  def linear(layer, name):
    put(layer.kernel, tensors[f"{name}.weight"].T)
    put(layer.bias, tensors[f"{name}.bias"])

  put(model.words.embedding, tensors["embeddings.word_embeddings.weight"])
  put(model.positions.embedding, tensors["embeddings.position_embeddings.weight"])
  put(model.segments.embedding, tensors["embeddings.token_type_embeddings.weight"])
  norm(model.norm, "embeddings.LayerNorm")
  for i, block in enumerate(model.blocks):
    at = f"encoder.layer.{i}"
    for name in ("query", "key", "value"):
      layer = getattr(block.attention, name)
      put(layer.kernel, heads(tensors[f"{at}.attention.self.{name}.weight"]))
      put(layer.bias, tensors[f"{at}.attention.self.{name}.bias"].reshape(HEADS, -1))
    out = tensors[f"{at}.attention.output.dense.weight"]
    put(block.attention.out.kernel, out.T.reshape(HEADS, -1, FEATURES))
    put(block.attention.out.bias, tensors[f"{at}.attention.output.dense.bias"])
    norm(block.attention_norm, f"{at}.attention.output.LayerNorm")
    linear(block.up, f"{at}.intermediate.dense")
    linear(block.down, f"{at}.output.dense")
    norm(block.norm, f"{at}.output.LayerNorm")


def main():
  model = MiniLM(nnx.Rngs(0))
  fill(model, load_file(sys.argv[1]))
  model.eval()
  ids = jnp.array([[101, 7592, 2088, 102, 0, 0], [101, 2129, 2000, 2681, 1037, 102]])
  vectors = nnx.jit(lambda model, ids, mask: model(ids, mask))(model, ids, (ids > 0) * 1.0)
  print(json.dumps({"vectors": vectors[:, :16].tolist(), "cosine": float(vectors[0] @ vectors[1])}))


if __name__ == "__main__":
  main()
