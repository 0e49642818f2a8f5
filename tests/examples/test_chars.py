"""The example that writes characters: it learns, and its memory changes nothing but the speed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from examples.chars import text
from examples.chars.__main__ import parse_options, run
from examples.chars.sample import by_hand
from examples.chars.train import bits_of_counts
from refax import nnx

for package in ("matplotlib", "safetensors", "tqdm"):
  pytest.importorskip(package, reason=f"the example needs {package}: make test installs it")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
  out = tmp_path_factory.mktemp("chars")
  return run(parse_options(["--quick", "--count", "200", "--out", str(out)]), []) | {"out": out}


def test_it_learns_more_than_how_often_each_character_comes(ran):
  measured = [p.held_out for p in ran["history"] if p.held_out is not None]
  assert measured[0] > 6  # 96 characters that are equally likely take 6.6 bits
  assert measured[-1] < bits_of_counts(ran["corpus"]) - 0.3
  assert (ran["out"] / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_scan_in_plain_jax_writes_what_generate_and_stream_write(ran):
  model, prompt, count = ran["model"], "The value ", 150  # more than the memory holds
  written = by_hand(model, prompt, count)
  assert written == text.decode(nnx.generate(model, text.encode(prompt), count).tolist())
  assert written == text.decode(list(nnx.stream(model, text.encode(prompt), count)))


def test_a_text_that_is_written_with_the_memory_is_that_of_the_whole_model(ran):
  model, prompt = ran["model"], "The value "
  numbers = text.encode(prompt + by_hand(model, prompt, 100))
  most_likely = model(jnp.asarray(numbers)[None])[0].argmax(-1)
  np.testing.assert_array_equal(most_likely[len(prompt) - 1 : -1], numbers[len(prompt) :])


def test_what_is_held_out_is_not_in_the_text_to_train_on():
  corpus = text.load(seed=3)
  assert 0.05 < len(corpus.held_out) / len(corpus.train) < 0.3
  paragraphs = lambda numbers: {p.strip() for p in text.decode(numbers).split("\n\n") if p.strip()}
  assert not paragraphs(corpus.held_out) & paragraphs(corpus.train)
  line = "def f(x):\n  return x\n"
  assert text.decode(text.encode(line)) == line


def test_weights_that_were_saved_write_the_same_text(ran):
  options = ["--quick", "--write", "--count", "200", "--out", str(ran["out"])]
  assert run(parse_options(options), [])["text"] == ran["text"]


def test_ctrl_c_ends_it_with_one_line(tmp_path):
  command = [sys.executable, "-m", "examples.chars", "--quick", "--out", str(tmp_path)]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  process = subprocess.Popen(command, cwd=ROOT, env=os.environ, **pipes)
  assert "Loading JAX" in process.stdout.readline()
  time.sleep(0.5)
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 130 and out.strip() == "Interrupted: nothing was saved.", (out, err)
  assert "Traceback" not in err
