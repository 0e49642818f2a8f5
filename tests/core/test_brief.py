"""What a model prints: a line for each layer, and what differs from the layer's defaults."""

import dataclasses
import functools
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx


def text(s):
  return textwrap.dedent(s).strip()


class Block(nnx.Module):
  """A user's module with any attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


class MLP(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(4, 32, rngs=rngs)
    self.norm = nnx.BatchNorm(32, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.out = nnx.Linear(32, 1, use_bias=False, param_dtype=jnp.bfloat16, rngs=rngs)


PRINTED = """
  MLP( # RngCount: 1 (4 B), RngKey: 1 (8 B), Param: 256 (960 B), BatchStat: 64 (256 B), Total: 322 (1.2 KB)
    drop=Dropout(0.5),
    hidden=Linear(4, 32), # Param: 160 (640 B)
    norm=BatchNorm(32), # Param: 64 (256 B), BatchStat: 64 (256 B), Total: 128 (512 B)
    out=Linear(32, 1, use_bias=False, param_dtype=bfloat16) # Param: 32 (64 B)
  )"""  # noqa: E501


def test_each_layer_is_a_line_with_the_arguments_that_differ_from_the_defaults():
  model = MLP(nnx.Rngs(0))
  assert repr(model) == str(model) == text(PRINTED)
  assert repr(nnx.to_lojax(model)) == text(PRINTED)
  assert repr(nnx.as_abstract(model)) == text(PRINTED)
  assert repr(nnx.clone(model)) == text(PRINTED)
  seen = []
  jax.jit(lambda model: seen.append(repr(model)))(model)
  assert seen == [text(PRINTED)]


def test_the_mode_of_a_layer_is_seen():
  model = MLP(nnx.Rngs(0))
  model.eval()
  assert "drop=Dropout(0.5, deterministic=True)," in repr(model)
  assert "norm=BatchNorm(32, use_running_average=True)," in repr(model)


def test_a_layer_on_its_own_shows_its_variables():
  assert repr(nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))) == text("""
    Linear( # Param: 6 (24 B)
      2, 3, use_bias=False,
      kernel=Param(
        value=Array(shape=(2, 3), dtype=dtype('float32')),
        is_hijax=True
      )
    )""")


def test_a_layer_that_holds_layers_is_a_block():
  attention = nnx.MultiHeadAttention(2, 4, rngs=nnx.Rngs(0))
  attention.init_cache((1, 3, 4))
  printed = repr(Block(attention=attention)).splitlines()
  assert printed[2].strip().startswith("2, 4, qkv_features=4,")
  assert "    cached_key=Cache(float32[1,3,2,2])," in printed
  assert "    query=LinearGeneral((4,), (2, 2)), # Param: 20 (80 B)" in printed


def test_functions_partials_and_sizes_are_short():
  rngs = nnx.Rngs(0)
  model = Block(
    conv=nnx.Conv(1, 2, (3, 3), strides=2, padding="VALID", rngs=rngs),
    ff=nnx.FeedForward(2, activation=functools.partial(nnx.gelu, approximate=False), rngs=rngs),
    act=nnx.relu,
  )
  printed = repr(model)
  assert "act=relu," in printed
  assert "conv=Conv(1, 2, (3, 3), strides=(2, 2), padding='VALID'), # Param: 20 (80 B)" in printed
  assert "2, activation=partial(gelu, approximate=False)," in printed
  assert "0x" not in printed


def test_equal_layers_of_a_list_are_shown_once_with_their_number():
  linear = lambda n: nnx.Linear(4, n, rngs=nnx.Rngs(0))
  assert repr(nnx.List([linear(4) for _ in range(12)] + [linear(1)])) == text("""
    List([ # Param: 245 (980 B)
      12 x Linear(4, 4), # Param: 20 (80 B) each
      Linear(4, 1) # Param: 5 (20 B)
    ])""")
  assert repr(nnx.List([linear(4), linear(4)])).count("Linear(4, 4)") == 2
  assert nnx.render_to_text(nnx.List([linear(4) for _ in range(12)])).count("kernel=") == 12


def test_a_module_that_was_shown_is_referred_to_by_its_first_path():
  shared = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  model = Block(a=Block(inner=shared), b=[shared, shared], c={"k": shared}, z=shared)
  printed = repr(model)
  assert printed.count("Linear(2, 2)") == 1
  assert printed.count("Linear(...), # shared with a.inner") == 1
  assert printed.count("Linear(...) # shared with a.inner") == 3
  assert nnx.render_to_text(model).count("shared with a.inner") == 4
  assert "shared with b[0]" in repr(Block(b=[shared], c=shared))
  assert "shared with a['k']" in repr(Block(a={"k": shared}, c=shared))


def test_many_paths_to_one_module_take_no_time():
  model = Block(v=nnx.Param(1.0))
  for _ in range(30):
    model = Block(left=model, right=model)
  start = time.perf_counter()
  assert repr(model).count("shared with") == 30
  assert nnx.render_to_text(model).count("shared with") == 30
  assert time.perf_counter() - start < 5


def test_rngs_and_metrics_and_the_optimizer():
  rngs = nnx.Rngs(0, dropout=1)
  model = MLP(rngs)
  assert repr(rngs).splitlines()[1:] == [
    "  default=RngStream(tag='default'),",
    "  dropout=RngStream(tag='dropout')",
    ")",
  ]
  assert "rngs=Rngs(default, dropout)" in repr(Block(rngs=rngs))
  optimizer = repr(nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param))
  assert "mu=State(5 leaves), # OptState: 256 (960 B)" in optimizer
  assert "count=OptState(int32[])," in optimizer
  assert len(optimizer.splitlines()) < 20
  assert "loss=Average()" in repr(Block(loss=nnx.metrics.Average()))


def test_the_full_text_has_every_attribute():
  model = MLP(nnx.Rngs(0))
  full = nnx.render_to_text(model)
  assert full == nnx.render_to_text(model, full=True)
  assert "dot_general=<function dot_general at" in full and "promote_dtype=" in full
  assert full.count("is_hijax=True") == len(jax.tree.leaves(nnx.state(model)))
  assert nnx.render_to_text(model, full=False) == repr(model)
  assert nnx.render_to_text([model, {"x": 1}], full=False).startswith("[MLP(")
  assert nnx.render_to_text(3) == "3"


class OddEquality:
  def __init__(self, error):
    self.error = error

  def __eq__(self, other):
    if self.error:
      raise self.error
    return np.ones(3)

  def __hash__(self):
    return 1

  def __repr__(self):
    if self.error:
      raise self.error
    return "odd\nlines"


@pytest.mark.parametrize("error", [None, RuntimeError("no"), ValueError("no")])
def test_attributes_that_compare_or_print_oddly_do_no_harm(error):
  layer = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
  layer.precision = OddEquality(error)
  printed = repr(Block(layer=layer, odd=OddEquality(error)))
  assert "layer=Linear(1, 1, precision=" in printed
  assert "\n  odd=" in printed
  nnx.render_to_text(Block(layer=layer))


def test_missing_attributes_and_arrays_for_arguments_do_no_harm():
  layer = nnx.Linear(1, 2, rngs=nnx.Rngs(0))
  del layer.in_features
  assert "layer=Linear(out_features=2)" in repr(Block(layer=layer))
  layer.precision = np.ones(100)
  layer.dtype = float("nan")
  assert "layer=Linear(out_features=2, dtype=nan)" in repr(Block(layer=layer))
  layer.kernel = None
  layer.extra = [nnx.Param(1.0)]
  assert "extra=List([" in repr(Block(layer=layer))


def test_a_default_that_is_not_a_number_is_the_default():
  class Mine(nnx.Linear):
    pass

  mine = Mine(2, 3, rngs=nnx.Rngs(0))
  assert "Mine(2, 3), # Param" in repr(Block(a=mine, b=1))

  class Own(nnx.Linear):
    def __init__(self, size, scale=float("nan"), *, rngs):
      super().__init__(size, size, rngs=rngs)
      self.scale = scale

  printed = repr(Block(own=Own(2, rngs=nnx.Rngs(0))))
  assert "own=Own( # Param: 6 (24 B)" in printed and "scale=nan" in printed


def test_a_layer_that_a_user_extends_hides_the_defaults_of_the_layer_below():
  class Scaled(nnx.Linear):
    def __init__(self, size, *, rngs, **options):
      super().__init__(size, size, rngs=rngs, **options)
      self.scale, self.gain = 2.0, nnx.Param(1.0)

  printed = repr(Scaled(2, precision="high", rngs=nnx.Rngs(0)))
  assert "dot_general" not in printed and "use_bias" not in printed and "dtype=None" not in printed
  assert "precision='high'," in printed and "scale=2.0" in printed and "gain=Param(" in printed
  assert "dot_general=" in nnx.render_to_text(Scaled(2, rngs=nnx.Rngs(0)))


def test_long_attributes_are_cut_and_whole_in_the_full_text():
  model = Block(table=nnx.static(tuple(range(5000))), text="x" * 1000)
  assert len(repr(model)) < 500 and repr(model).count("...") == 2
  assert "4999" in nnx.render_to_text(model) and "x" * 1000 in nnx.render_to_text(model)


def test_state_in_an_argument_is_shown_once():
  ema = nnx.EMA(nnx.state(MLP(nnx.Rngs(0)), nnx.Param), 0.9)
  assert repr(ema).splitlines()[1:] == [
    "  decay=0.9,",
    "  params=State(5 leaves) # EMAState: 256 (1.0 KB)",
    ")",
  ]


def test_dataclasses_and_properties_that_raise():
  @nnx.dataclass
  class Data(nnx.Module):
    size: int = 3
    weight: jax.Array = dataclasses.field(default_factory=lambda: jnp.ones(2))

    @property
    def broken(self):
      raise RuntimeError

  assert repr(Block(data=Data())) == text("""
    Block( # Array: 2 (8 B)
      data=Data( # Array: 2 (8 B)
        size=3,
        weight=Array(shape=(2,), dtype=dtype('float32'))
      )
    )""")

  class Broken(nnx.Linear):
    @property
    def use_bias(self):
      raise RuntimeError

    @use_bias.setter
    def use_bias(self, value): ...

  assert "Broken(1, 1), # Param" in repr(Block(a=Broken(1, 1, rngs=nnx.Rngs(0)), b=1))


def test_colours_surround_names_and_comments(monkeypatch):
  class Out:
    def isatty(self):
      return True

  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.delenv("NO_COLOR", raising=False)
  with monkeypatch.context() as patch:
    patch.setattr("sys.stdout", Out())
    printed = repr(MLP(nnx.Rngs(0)))
  assert "\x1b[38;5;79mLinear\x1b[0m(4, 32),\x1b[38;5;244m # Param: 160 (640 B)\x1b[0m" in printed


def test_a_long_model_prints_fast():
  model = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(300)])
  start = time.perf_counter()
  assert len(repr(model).splitlines()) == 3
  assert time.perf_counter() - start < 3
