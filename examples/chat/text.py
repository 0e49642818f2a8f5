"""Text to tokens and back, by the vocabulary and the template that the weights bring along."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Message(NamedTuple):
  """What somebody says: `role` is `system`, `user` or `assistant`."""

  role: str
  content: str


class Tokenizer:
  """Byte-pair encoding, as a GGUF file describes it.

  Args:
    path: the GGUF file.
  """

  def __init__(self, path: Path):
    import tokenizers
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import decoders, models, pre_tokenizers

    facts = _facts(path)
    words = facts["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ")) for line in facts["tokenizer.ggml.merges"]]
    numbers = {word: i for i, word in enumerate(words)}
    self._tokenizer = tokenizers.Tokenizer(models.BPE(vocab=numbers, merges=merges))
    self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
      ]
    )
    self._tokenizer.decoder = decoders.ByteLevel()
    control = [
      w for w, kind in zip(words, facts["tokenizer.ggml.token_type"], strict=True) if kind == 3
    ]
    self._tokenizer.add_special_tokens(
      [tokenizers.AddedToken(w, normalized=False) for w in control]
    )
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    self._template = environment.from_string(facts["tokenizer.chat_template"])
    self.end = facts["tokenizer.ggml.eos_token_id"]

  def encode(self, text: str) -> list[int]:
    """The tokens of a text; names of control tokens in it are these."""
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, tokens: list[int]) -> str:
    """The text of tokens, without control tokens."""
    return self._tokenizer.decode(tokens, skip_special_tokens=True)

  def conversation(self, messages: list[Message]) -> list[int]:
    """The tokens of a conversation, up to where the model has to answer."""
    said = [message._asdict() for message in messages]
    return self.encode(self._template.render(messages=said, add_generation_prompt=True))

  def pieces(self, tokens: Iterator[int]) -> Iterator[str]:
    """The text of tokens as they come; half a character waits for the token that completes it."""
    known: list[int] = []
    shown = ""
    for token in tokens:
      known.append(token)
      text = self.decode(known)
      if not text.endswith("\ufffd"):
        yield text[len(shown) :]
        shown = text
    yield self.decode(known)[len(shown) :]


def _facts(path: Path) -> dict[str, Any]:
  from refax.io.gguf import metadata

  return metadata(path)
