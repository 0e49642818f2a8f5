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
  parser.add_argument("--epochs", type=int, default=2, help="passes over the sentences, each stage")
  parser.add_argument("--seed", type=int, default=0, help="of the new weights and the shuffling")
  options = parser.parse_args(argv)
  if options.sentence is None and not options.finetune:
    parser.error('pass a sentence, in quotes: python -m examples.minilm "how to stop a loop"')

  from examples.minilm.model import load

  model = load()
  if options.finetune:
    from examples.minilm import finetune

    finetune.run(model, epochs=options.epochs, seed=options.seed)
  if options.sentence is not None:
    for score, sentence in search(model, options.sentence)[: options.top]:
      print(f"{score:.3f}  {sentence}")
  return 0


def search(model, sentence: str) -> list[tuple[float, str]]:
  """All sentences with their similarity, the nearest first."""
  from examples.minilm import text
  from refax import nnx

  embed = nnx.jit(lambda model, tokens: model(*tokens))
  tokenizer, corpus = text.Tokenizer(), text.sentences()
  found = []
  for start in range(0, len(corpus), 64):
    part = corpus[start : start + 64]
    padded = part + [""] * (64 - len(part))  # one shape, compiled once
    found.append(np.asarray(embed(model, tokenizer(padded, pad=True)))[: len(part)])
  scores = np.concatenate(found) @ np.asarray(embed(model, tokenizer([sentence], pad=True)))[0]
  order = np.argsort(-scores)
  return [(float(scores[i]), corpus[i]) for i in order]


if __name__ == "__main__":
  sys.exit(main())
