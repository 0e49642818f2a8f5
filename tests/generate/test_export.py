"""The step of decoding with its memory in a file: a process without the model's code generates."""

import subprocess
import sys

import jax.numpy as jnp
import pytest

from refax import nnx
from tests.generate.models import Model, naive

pytest.importorskip("orbax.checkpoint", reason="exported functions need the extra `io`")

PROMPT, COUNT = [3, 1, 4, 1, 5], 7
ELSEWHERE = """
import sys
import jax.numpy as jnp
from refax import nnx
step = nnx.load_exported(sys.argv[1])
text = []
for token in {prompt}:
  last = step(jnp.array([token]))
for _ in range({count}):
  text.append(int(last[0]))
  last = step(last)
print(text, "tests" in sys.modules)
"""


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3, "scan_layers": True}])
def test_a_process_without_the_code_generates_the_same_text(options, tmp_path):
  model = Model(**options)
  nnx.init_cache(model, 1, 32)
  step = lambda model, token: model(token[:, None], decode=True)[:, -1].argmax(-1)
  nnx.export(step, model, jnp.zeros(1, jnp.int32)).save(tmp_path / "step")
  code = ELSEWHERE.format(prompt=PROMPT, count=COUNT)
  command = [sys.executable, "-c", code, str(tmp_path / "step")]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.strip() == f"{naive(model, PROMPT, COUNT)} False"
  assert nnx.cache_length(model) == 0  # the file has a memory of its own
