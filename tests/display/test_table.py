"""nnx.tabulate says of every model what its layers are given, return, hold and take."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.errors import MissingPackageError


class Block(nnx.Module):
  def __init__(self, size, rngs):
    self.linear = nnx.Linear(size, size, rngs=rngs)
    self.norm = nnx.BatchNorm(size, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.dropout(self.norm(self.linear(x)))


class Net(nnx.Module):
  def __init__(self, rngs):
    self.layers = [Block(4, rngs), Block(4, rngs)]
    self.head = nnx.Linear(4, 2, rngs=rngs)
    self.unused = nnx.Linear(7, 7, rngs=rngs)
    self.tied = self.head

  def __call__(self, x, *, scale=1.0):
    for layer in self.layers:
      x = layer(x)
    return {"logits": self.head(x * scale), "extra": (x, None)}

  def encode(self, x):
    return self.layers[0](x)


X = jnp.ones((3, 4))


def rows(table):
  """The cells of each row, by path."""
  found, current = {}, None
  for line in table.replace("\xa0", " ").splitlines():
    if line.startswith("│"):
      cells = [cell.strip() for cell in line.strip("│").split("│")]
      if current is None:
        current = cells
      else:
        current = [f"{a} {b}".strip() for a, b in zip(current, cells, strict=True)]
    elif current is not None:
      found[current[0].replace(" ", "")] = current
      current = None
  return found


def test_a_row_says_what_a_layer_is_given_returns_holds_and_takes():
  table = nnx.tabulate(Net(nnx.Rngs(0)), X, width=200)
  found = rows(table)
  assert table.splitlines()[0].strip() == "Net Summary"
  assert list(found) == [
    "path", "", "layers/0", "layers/0/linear", "layers/0/norm", "layers/0/dropout", "layers/1",
    "layers/1/linear", "layers/1/norm", "layers/1/dropout", "head", "tied", "unused", "Total",
  ]  # fmt: skip
  header = found["path"]
  assert header[:4] == ["path", "type", "inputs → outputs", "Param"]
  assert header[-2:] == ["flops", "vjp_flops"]
  linear = found["layers/0/linear"]
  assert linear[1:3] == ["Linear", "float32[3,4] → float32[3,4]"]
  assert linear[3] == "bias: float32[4] kernel: float32[4,4] 20 (80 B)"
  assert linear[-2] == f"{2 * 3 * 4 * 4 + 12}"
  assert found[""][2] == "float32[3,4] → {extra: (float32[3,4], None), logits: float32[3,2]}"
  assert "the same as head" in found["tied"][1]
  assert found["unused"][2] == ""
  assert found["Total"][3] == "122 (488 B)"
  assert found["Total"][header.index("BatchStat")] == "16 (64 B)"
  forward, both = (float(x.removesuffix(" K")) for x in found["Total"][-2:])
  assert forward < 1000 if "K" not in found["Total"][-2] else forward > 0
  assert both > 0


def test_nothing_is_computed_and_nothing_changes():
  def boom(x):
    raise AssertionError("computed")

  class Calls(nnx.Module):
    def __init__(self):
      self.count = nnx.Variable(0)
      self.inner = Net(nnx.Rngs(0))

    def __call__(self, x):
      self.count += 1
      self.sow(nnx.Intermediate, "h", x)
      jax.debug.callback(boom, x)
      return self.inner(x)["logits"]

  model = Calls()
  before = nnx.graphdef(model)
  nnx.tabulate(model, X)
  assert nnx.graphdef(model) == before
  assert int(model.count) == 0
  np.testing.assert_array_equal(model.inner.layers[0].norm.mean, jnp.zeros(4))


def test_depth_counts_layers_and_a_row_stands_for_what_is_not_shown():
  found = rows(nnx.tabulate(Net(nnx.Rngs(0)), X, depth=1, width=200))
  assert "layers/0" in found and "layers/0/linear" not in found
  assert found["layers/0"][3] == "28 (112 B)"
  assert list(rows(nnx.tabulate(Net(nnx.Rngs(0)), X, depth=0, width=200))) == ["path", "", "Total"]


@pytest.mark.parametrize("width", [40, 80, 120, 300])
def test_lines_are_as_long_as_asked(width):
  table = nnx.tabulate(Net(nnx.Rngs(0)), X, width=width)
  assert max(map(len, table.splitlines())) <= width
  assert "\x1b" not in table
  if width > 80:
    assert "vjp_flops" in table  # no column is lost


def test_abstract_models_and_inputs():
  model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
  abstract = nnx.tabulate(model, jax.ShapeDtypeStruct((3, 4), jnp.float32), width=200)
  assert abstract == nnx.tabulate(Net(nnx.Rngs(0)), X, width=200)


@pytest.mark.parametrize("is_hijax", [True, False])
def test_both_storages_and_inside_a_trace(is_hijax):
  with nnx.use_hijax(is_hijax):
    model = Net(nnx.Rngs(0))
  table = nnx.tabulate(model, X, width=200)
  assert "122 (488 B)" in table
  kept = []

  @nnx.jit
  def f(model, x):
    kept.append(nnx.tabulate(model, x, width=200))
    return x

  f(model, X)
  assert kept == [table]


def test_several_inputs_keywords_flags_methods_and_none():
  class Two(nnx.Module):
    def __init__(self):
      self.a = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x, y=None, *, train=False, mode="sum"):
      assert isinstance(train, bool) and mode in ("sum", "mean")
      return getattr(self.a(x), mode)() + (0 if y is None else y["k"].sum())

  found = rows(nnx.tabulate(Two(), X, {"k": X}, train=True, mode="mean", width=250))
  assert found[""][2].startswith("(float32[3,4], {k: float32[3,4]}")
  assert rows(nnx.tabulate(Two(), X, None, width=200))["a"][2] == "float32[3,4] → float32[3,4]"
  assert "layers/0" in rows(nnx.tabulate(Net(nnx.Rngs(0)), X, method="encode", width=200))


def test_without_inputs_it_shows_what_the_layers_hold():
  found = rows(nnx.tabulate(Net(nnx.Rngs(0)), width=200))
  assert found["path"][-1] != "vjp_flops"
  assert found["Total"][3] == "122 (488 B)"


def test_integers_keys_generators_objects_and_what_cannot_be_differentiated():
  class Odd(nnx.Module):
    def __init__(self):
      self.rngs = nnx.Rngs(0)
      self.embed = nnx.Embed(5, 4, rngs=self.rngs)
      self.parts = nnx.Dict(a=nnx.Linear(4, 4, rngs=self.rngs))

    def outputs(self, x):
      yield x
      yield {"b": (self.parts["a"](x), self.embed.embedding, "text")}

    def __call__(self, tokens):
      x = self.embed(tokens) + self.rngs.normal((4,))
      return self.outputs(x), tokens

  found = rows(nnx.tabulate(Odd(), jnp.zeros((2, 3), jnp.int32), width=250))
  assert found["embed"][2] == "int32[2,3] → float32[2,3,4]"
  assert found["parts/a"][2].endswith("→ float32[2,3,4]")
  argmax = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), lambda x: jnp.argmax(x, -1))
  assert "layers/0" in rows(nnx.tabulate(argmax, X, width=200))


def test_a_layer_that_is_called_twice_and_one_in_loops():
  class Repeats(nnx.Module):
    def __init__(self):
      self.a = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
      self.cell = nnx.RNN(nnx.GRUCell(4, 4, rngs=nnx.Rngs(0)))
      self.stack = nnx.Stack(nnx.Linear, 5, 4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
      return self.stack(self.cell(self.a(self.a(x))[None])[0])

  found = rows(nnx.tabulate(Repeats(), X, width=250))
  assert "× 2" in found["a"][1]
  assert found["a"][-2] == f"{2 * (2 * 3 * 4 * 4 + 12)}"
  assert found["stack/layers"][-2] == f"{5 * (2 * 3 * 4 * 4 + 12)}"
  assert "cell/cell" in found


def test_a_stack_of_a_thousand_layers():
  decoder = nnx.Stack(Block, 1000, 4, rngs=nnx.Rngs(0))
  found = rows(nnx.tabulate(decoder, X, width=250))
  assert found["layers/linear"][3].endswith("20,000 (80.0 KB)")
  assert found["layers/linear"][-2] == "108.0 K"


def test_an_error_of_the_model_is_the_models_own():
  with pytest.raises(Exception, match=r"size 4|last axis"):
    nnx.tabulate(Net(nnx.Rngs(0)), jnp.ones((3, 5)))
  from refax.core import calls

  assert calls._local.observers == ()


def test_without_rich_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "rich.table", None)
  with pytest.raises(MissingPackageError, match=r"refax\[display\]"):
    nnx.tabulate(Net(nnx.Rngs(0)), X)


def test_a_module_without_a_call_has_the_row_of_its_method_and_all_parameters_are_added_up():
  class Block(nnx.Module):
    def __init__(self):
      self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def forward(self, x):
      return self.linear(x)

  class Outer(nnx.Module):
    def __init__(self):
      self.block = Block()

    def __call__(self, x, options):
      return self.block.forward(x)

  table = nnx.tabulate(Outer(), X, {}, width=200)
  found = rows(table)
  assert found["block/forward"][1:3] == ["Block", "float32[3,4] → float32[3,4]"]
  assert found[""][2] == "(float32[3,4], {}) → float32[3,4]"
  assert table.splitlines()[-1].strip() == "Total Parameters: 20 (80 B)"


def test_the_passes_are_counted_as_asked():
  traces = []

  class Layer(nnx.Module):
    def __call__(self, x):
      traces.append(None)
      return x * 2

  table = nnx.tabulate(Layer(), X, compute_vjp_flops=False)
  assert len(traces) == 1
  assert " flops" in table and "vjp_flops" not in table
  assert "flops" not in nnx.tabulate(Layer(), X, compute_flops=False, compute_vjp_flops=False)
