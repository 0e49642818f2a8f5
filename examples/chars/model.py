"""The model: characters in, and for each position the logits of the character that comes next."""

import jax

from examples.chars.text import KNOWN
from refax import nnx

LENGTH = 128  # how many characters a position sees


class CharModel(nnx.Module):
  """A decoder with the parts of a Llama: `[batch, length]` to `[batch, length, characters]`."""

  def __init__(self, features: int, blocks: int, *, rngs: nnx.Rngs):
    self.characters = nnx.Embed(len(KNOWN), features, rngs=rngs)
    self.decoder = nnx.TransformerDecoder(
      blocks,
      features,
      num_heads=features // 32,
      norm=nnx.RMSNorm,
      use_bias=False,
      rope=nnx.RoPE(),
      sliding_window=LENGTH,  # the memory is a ring of this size: text may be of any length
      scan_layers=False,  # a list of blocks: faster than a stack when one character is written
      rngs=rngs,
    )
    self.out = nnx.Linear(features, len(KNOWN), rngs=rngs)

  def __call__(self, numbers: jax.Array, *, decode: bool = False) -> jax.Array:
    """With `decode`, `numbers` continue what is in the memory, which is updated in place."""
    return self.out(self.decoder(self.characters(numbers), decode=decode))
