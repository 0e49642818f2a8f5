"""Whatever the code: what is written is Python, keeps its comments, and needs nothing twice."""

import io
import tokenize

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.migrate.programs import migrated

IMPORTS = [
  "from flax import nnx",
  "import flax.nnx as nnx",
  "import flax, flax.nnx",
  "import flax",
  "from flax import linen as nn, nnx",
  "from flax import (linen,  # {c}\n  nnx)",
  "from flax import nnx, \\\n  struct",
  "from flax.nnx import (\n  # {c}\n  Linear, flatten,  # {c}\n  State)",
  "from flax.nnx.nn import linear, initializers",
  "from refax import nnx",
  "from flax.nnx import *",
]
LINES = [
  "p = nnx.Param(x, hijax=True)",
  "p.value = p.value + 1",
  "q.value += p.value.at[0].set(q.value)",
  "def f(p: nnx.Param, nnx=nnx): return p.value, nnx.compat",
  "class A(nnx.Module):\n  def __init__(self): self.w = nnx.Param(1)  # {c}\n"
  "  def g(self): return self.w.value  # {c}",
  "nnx.split(nnx.graphlib.merge(a), graph=p.value, graph_updates=nnx.compat)",
  "nnx.jit(f, graph=True,  # {c}\n  static_argnums=0, graph_updates=False  # {c}\n)",
  "nnx.jit(\n  # {c}\n  graph=True,\n  # {c}\n)(x)",
  "nnx.set_graph_mode(True)  # {c}",
  "nnx.set_graph_updates(False)",
  "flax.nnx.statelib.State; flax.linen.Dense(flax.nnx.Param(1).value)",
  "y = [p.value for p in nnx.List([nnx.Param(1)])]; p.hijax",
  'print(f"{p.value} {p.value=} {nnx.split(p, graph=True)}")',
  "x = (p\n  # {c}\n  .value)",
  "async def h(): await nnx.compat.jit(p.value)",
  "global nnx",
  "del p, nnx",
  "match p.value:\n  case nnx.Param(value=1): p.value",
  "x = lambda p, *a, **k: p.value",
  "Linear(1, 2).kernel.value, linear.Linear, State.value",
  "assert (p := nnx.Param(1)).value == 1",
  "import jax; jax.grad(f)(p)",
]


def comments(code):
  tokens = tokenize.generate_tokens(io.StringIO(code).readline)
  return sorted(t.string for t in tokens if t.type == tokenize.COMMENT)


@st.composite
def programs(draw):
  lines = draw(st.lists(st.sampled_from(IMPORTS), min_size=1, max_size=3))
  lines += draw(st.lists(st.sampled_from(LINES), max_size=6))
  blocks = []
  for i, line in enumerate(lines):
    text = line.replace("{c}", f"comment {i}")
    if draw(st.booleans()) and "global" not in text:
      inner = text.replace("\n", "\n  ")
      if "*" not in inner.partition("import")[2]:
        text = draw(st.sampled_from(["if x:", "try:", "def g():"])) + f"  # in {i}\n  {inner}"
        text += "\nfinally: pass" if text.startswith("try") else ""
    blocks.append(text)
  end = draw(st.sampled_from(["\n", "\r\n"]))
  return ("\n".join(b for b in blocks if b != "global nnx") + "\n").replace("\n", end)


@settings(max_examples=60, deadline=None)
@given(programs())
def test_what_is_written_is_python_keeps_comments_and_is_done_once(code):
  new = migrated(code)
  assert comments(new) == comments(code)
  assert ("\r\n" in new) == ("\r\n" in code)
  assert new.count("\r\n") in (0, new.count("\n"))
