"""Find the sentences of the Python reference that mean what a sentence says; or fine-tune."""

import argparse
import sys

import numpy as np


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m examples.minilm",
    description=__doc__,
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument("sentence", nargs="?", help="what to look for")
  parser.add_argument("--top", type=int, default=5, help="how many sentences to print")
  parser.add_argument("--finetune", action="store_true", help="train a classifier of chapters")
  parser.add_argument("--epochs", type=int, default=4, help="passes over the sentences, with LoRA")
  parser.add_argument("--seeds", type=int, default=1, help="how many runs, from --seed on")
  parser.add_argument("--seed", type=int, default=0, help="of the new weights and the shuffling")
  options = parser.parse_args(argv)
  if options.sentence is None and not options.finetune:
    parser.error('pass a sentence, in quotes: python -m examples.minilm "how to stop a loop"')

  from examples.minilm import text

  if options.sentence is not None:
    chapters = ", ".join(text.CHAPTERS)
    print(
      f"Searching {len(text.sentences())} sentences of the Python reference ({chapters}) "
      f'for what means the same as: "{options.sentence}"',
      flush=True,
    )
  from examples.minilm.model import load

  model = load()
  if options.finetune:
    from examples.minilm import finetune

    seeds = range(options.seed, options.seed + options.seeds)
    finetune.compare(model, epochs=options.epochs, seeds=seeds)
  if options.sentence is not None:
    for score, sentence in search(model, options.sentence)[: options.top]:
      print(f"{score:.3f}  {sentence}")
  return 0


def search(model, sentence: str) -> list[tuple[float, str]]:
  """All sentences with their similarity, the nearest first."""
  from tqdm import trange

  from examples.minilm import text
  from refax import nnx

  embed = nnx.jit(lambda model, tokens: model(*tokens))
  tokenizer, corpus = text.Tokenizer(), text.sentences()
  found = []
  for start in trange(0, len(corpus), 64, desc="Reading the sentences", leave=False):
    part = corpus[start : start + 64]
    padded = part + [""] * (64 - len(part))  # one shape, compiled once
    found.append(np.asarray(embed(model, tokenizer(padded, pad=True)))[: len(part)])
  scores = np.concatenate(found) @ np.asarray(embed(model, tokenizer([sentence], pad=True)))[0]
  order = np.argsort(-scores)
  return [(float(scores[i]), corpus[i]) for i in order]


if __name__ == "__main__":
  sys.exit(main())
