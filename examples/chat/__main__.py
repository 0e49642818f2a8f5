"""Talk to SmolLM2-135M: one reply to a prompt, or a conversation; or fine-tune it."""

import argparse
import sys
import time
from collections.abc import Iterator


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m examples.chat",
    description=__doc__,
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument("prompt", nargs="?", help="what to say; without it, a conversation begins")
  parser.add_argument("--greedy", action="store_true", help="always take the most likely token")
  parser.add_argument("--temperature", type=float, default=0.7, help="lower is more sober")
  parser.add_argument("--top-p", type=float, default=0.9, help="how much of the likely to keep")
  parser.add_argument("--max-tokens", type=int, default=400, help="the longest reply")
  parser.add_argument("--seed", type=int, default=0, help="another seed, another reply")
  parser.add_argument("--finetune", action="store_true", help="train on the docstrings of Python")
  parser.add_argument("--steps", type=int, default=60, help="how many batches to train on")
  parser.add_argument("--bits", type=int, choices=(4, 8), help="train beside integers: QLoRA")
  parser.add_argument("--adapter", help="the file of what was trained, to write or to talk with")
  options = parser.parse_args(argv)
  if options.finetune:
    from examples.chat import finetune

    chosen = {"bits": options.bits, "path": options.adapter}
    finetune.run(steps=options.steps, seed=options.seed, **chosen)
    return 0
  keep_programs()
  chat = Chat(options, options.adapter)
  if options.prompt is not None:
    for piece in chat.reply(options.prompt):
      print(piece, end="", flush=True)
    print(flush=True)
    say(chat.speed)
    return 0
  return converse(chat)


def keep_programs() -> None:
  """Let a later start read what XLA has compiled: half a minute less to the first word."""
  import jax

  from examples.chat.model import kept_weights, weights

  if jax.config.jax_compilation_cache_dir is None:
    folder = kept_weights(weights()).parent / "programs"
    jax.config.update("jax_compilation_cache_dir", str(folder))


class Chat:
  """A conversation: what was said, and a model whose memory holds most of it."""

  CONTEXT = 2048

  def __init__(self, options: argparse.Namespace, adapter: str | None = None):
    from tqdm import tqdm

    from examples.chat.model import load, weights
    from examples.chat.text import Tokenizer
    from refax import nnx

    bar = lambda steps: tqdm(steps, "Reading the weights", leave=False, file=sys.stderr)
    self.model = load(progress=bar)
    if adapter is not None:
      from examples.chat.finetune import load_adapter

      load_adapter(self.model, adapter)
    self.tokenizer = Tokenizer(weights())
    self.options = options
    self.rngs = nnx.Rngs(options.seed)
    s = nnx.samplers
    drawn = s.sample(s.temperature(options.temperature), s.top_p(options.top_p))
    self.sampler = s.greedy if options.greedy else drawn
    self.speed = ""
    self.reset()

  def reset(self) -> None:
    """Forget what was said."""
    from refax import nnx

    nnx.init_cache(self.model, 1, self.CONTEXT)
    self.messages: list = []
    self.held: list[int] = []

  def reply(self, text: str) -> Iterator[str]:
    """Pieces of the model's answer as they come; Ctrl-C ends it, and what was said stays."""
    from examples.chat.text import Message
    from refax import nnx

    self.messages.append(Message("user", text))
    tokens = self.tokenizer.conversation(self.messages)
    room = self.CONTEXT - len(tokens) - 1
    if room < 1:
      self.messages.pop()
      raise ValueError("the conversation is longer than the model can remember: /reset")
    known = self._remembered(tokens)
    nnx.truncate_cache(self.model, known)
    self.held, said = tokens[:known], []
    start = time.perf_counter()
    times = [start]

    def watched() -> Iterator[int]:
      options = {"sampler": self.sampler, "rngs": self.rngs, "stop_tokens": self.tokenizer.end}
      count = min(self.options.max_tokens, room)
      for token in nnx.stream(self.model, tokens[known:], count, resume=True, **options):
        said.append(token)
        times.append(time.perf_counter())
        yield token

    try:
      yield from self.tokenizer.pieces(watched())
    finally:
      self.messages.append(Message("assistant", self.tokenizer.decode(said)))
      self.held = (tokens + said)[: nnx.cache_length(self.model)]
      self.speed = speed(len(tokens) - known, times)

  def _remembered(self, tokens: list[int]) -> int:
    """How many tokens of a conversation the memory holds: all but one of them at most."""
    same = 0
    for a, b in zip(self.held, tokens[:-1], strict=False):
      if a != b:
        break
      same += 1
    return same


def speed(prompt: int, times: list[float]) -> str:
  """How fast a reply was."""
  if len(times) < 2:
    return ""
  first, rest = times[1] - times[0], times[-1] - times[1]
  text = f"{prompt} tokens read in {first:.2f} s ({prompt / first:.0f} tokens/s)"
  if len(times) > 2:
    text += f", {len(times) - 1} written ({(len(times) - 2) / rest:.1f} tokens/s)"
  return text


def converse(chat: Chat) -> int:
  """Read what the user says until there is no more."""
  say("Say something. /reset begins anew, Ctrl-C stops a reply, Ctrl-D ends.")
  while True:
    try:
      text = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
      print(flush=True)
      return 0
    if text == "/reset":
      chat.reset()
      say("Forgotten.")
    elif text:
      try:
        for piece in chat.reply(text):
          print(piece, end="", flush=True)
      except KeyboardInterrupt:
        print(" ...", end="")
      except ValueError as error:
        say(str(error))
      print(flush=True)
      say(chat.speed)


def say(text: str) -> None:
  """What is no reply goes to stderr."""
  print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
  sys.exit(main())
