"""nnx.display: the tree and the page show what an object holds, and leave it as it is."""

import builtins
import os
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx
from refax.core.variable import Variable
from refax.display import tree
from refax.display.page import page
from refax.errors import MissingPackageError
from tests.display.browser import browser, missing

treescope = pytest.importorskip("treescope")


class Block(nnx.Module):
  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


def net():
  rngs = nnx.Rngs(0)
  shared = nnx.Linear(4, 4, rngs=rngs)
  return Block(
    first=shared,
    blocks=[shared, nnx.BatchNorm(4, rngs=rngs)],
    drop=nnx.Dropout(0.5, rngs=rngs),
    half=nnx.Linear(4, 3, param_dtype=jnp.bfloat16, rngs=rngs),
    tied=shared.kernel,
    table={"a": nnx.Variable(jnp.arange(12).reshape(3, 4))},
    name="net",
  )


def text(obj):
  """What treescope prints of an object, without colours."""
  return treescope.render_to_text(obj)


def bits(model):
  read = lambda x: x if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jax.random.key_data(x)
  return [np.asarray(read(x[...])).tobytes() for x in jax.tree.leaves(model, is_leaf=is_variable)]


def is_variable(x):
  return isinstance(x, Variable)


def test_the_tree_has_layers_with_what_differs_from_the_defaults_and_statistics():
  printed = text(net())
  assert "in_features=4" in printed and "dot_general" not in printed
  assert "param_dtype=bfloat16" in printed and "name='net'" in printed
  assert "<float32[4,4]  mean " in printed and ", std " in printed
  assert "<int32[3,4]  mean 5.5, std 3.45, min 0, max 11, 1 zeros>" in printed
  assert "key<fry>[]" in printed and "# Param: 15 (30 B)" in printed


def test_what_was_shown_is_a_reference_to_its_first_path():
  model = net()
  model.me = model
  printed = text(model)
  assert "Linear(...) shared with blocks[0]" in printed  # `blocks` comes first
  assert "Param(...) shared with blocks[0].kernel" in printed
  assert "me=Block(...) shared with the whole" in printed
  assert "Repeated python obj" not in printed and "cyclic" not in printed


def test_a_deep_object_is_cut():
  node = Block(end=nnx.Param(1.0))
  for _ in range(200):
    node = Block(child=node)
  assert "Block(...)" in text(node)
  assert len(page(node)) > 1000


def test_nothing_is_written_and_the_buffers_stay_those_of_the_model():
  model = net()
  optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
  before, graphdef = bits([model, optimizer]), nnx.graphdef(model)
  shown = page(model, optimizer)
  assert bits([model, optimizer]) == before and nnx.graphdef(model) == graphdef
  assert "ScaleByAdamState" in shown

  @nnx.jit
  def step(model, optimizer):
    grads = nnx.grad(lambda model: (model.first(jnp.ones(4)) ** 2).sum())(model)
    optimizer.update(model, grads)

  step(model, optimizer)
  assert bits(model) != before[: len(bits(model))] and page(model, optimizer) != shown


@pytest.mark.parametrize(
  "make",
  [
    lambda: nnx.to_lojax(net()),
    lambda: nnx.as_abstract(net()),
    lambda: nnx.eval_shape(net),
    lambda: nnx.state(net()),
    lambda: nnx.state(net(), nnx.Param),
    lambda: nnx.split(net())[0],
    lambda: nnx.Rngs(0, noise=jax.random.key(1, impl="rbg")),
    lambda: nnx.Variable({"a": jnp.ones(2), "b": (jnp.ones(3), None)}),
    lambda: nnx.Variable(None),
    lambda: nnx.List([]),
    lambda: {"model": net(), "loss": 0.5, "steps": [1, jnp.ones(2)]},
    lambda: jnp.ones((3, 4)),
    lambda: np.ones((3, 4)),
    lambda: nnx.Param(jnp.ones((2, 2), jnp.complex64)),
    lambda: nnx.Param(jnp.ones((2, 3), jnp.float8_e4m3fn)),
    lambda: nnx.Param(jnp.ones((2, 3), jnp.int4)),
    lambda: nnx.Param(jnp.ones((0, 3))),
    lambda: nnx.Param(jnp.full((2, 2), jnp.nan)),
    lambda: nnx.Param(np.array([[True, False]])),
    lambda: nnx.metrics.Average(),
  ],
)
def test_everything_has_a_page(make, tmp_path):
  nnx.display(make(), save=tmp_path / "new" / "page.html")
  content = (tmp_path / "new" / "page.html").read_text()
  assert content.startswith("<!doctype html>") and "treescope-container" in content
  assert "Traceback" not in content


def test_statistics_say_what_is_not_finite():
  printed = text(nnx.Param(jnp.array([1.0, jnp.nan, jnp.inf, 3.0, 0.0])))
  assert "mean 1.33, std 1.25, min 0, max 3, 1 zeros, 1 NaN, 1 infinite" in printed
  assert "<bool[2]  1 of 2 true>" in text(nnx.Variable(jnp.array([True, False])))
  assert "3 NaN" in text(nnx.Param(jnp.full(3, jnp.nan)))


SHARDED = """
import jax, jax.numpy as jnp, treescope
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from refax import nnx

text = treescope.render_to_text
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
assert "Sharded across 4 CPU devices" in text(nnx.Param(place(jnp.arange(32.0).reshape(8, 4), "x")))
nnx.display(nnx.Param(place(jnp.ones((8, 4)))), save=f"{FOLDER}/replicated.html")
assert "Replicated across 4 CPU devices" in open(f"{FOLDER}/replicated.html").read()
assert "devices" not in text(nnx.Param(jnp.ones((8, 4))))
model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
nnx.device_put(model, NamedSharding(mesh, P("x")))
before = model.kernel.get_raw_value()
nnx.display(model, save=f"{FOLDER}/sharded.html")
assert "Sharded across 4 CPU devices" in open(f"{FOLDER}/sharded.html").read()
assert model.kernel.get_raw_value() is before and len(model.kernel[...].sharding.device_set) == 4
spec = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, P("x")))
assert "float32[8,4] sharded by P" in text(nnx.Param(spec))
print("done")
"""


def test_shards_are_drawn(tmp_path):
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
  env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  code = f"FOLDER = {str(tmp_path)!r}\n{SHARDED}"
  done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
  assert done.stdout == "done\n", done.stderr


def test_while_jax_traces_the_text_is_shown(capsys, tmp_path):
  model = net()

  @jax.jit
  def f(model, x):
    nnx.display(model, save=tmp_path / "page.html")
    nnx.display(model)
    text(model)
    return x

  jaxpr = jax.make_jaxpr(f)(model, 1.0)
  assert "Block( # " in capsys.readouterr().out
  assert "<pre>Block( # " in (tmp_path / "page.html").read_text()
  assert jaxpr.in_avals[-1].shape == () and "get" not in str(jaxpr)


def test_elsewhere_than_in_a_notebook_the_text_is_printed(capsys):
  model = net()
  nnx.display(model, nnx.Variable(1))
  assert capsys.readouterr().out == f"{model}\n{nnx.Variable(1)}\n"


class Kernel:
  kernel = object()


def test_in_a_notebook_treescope_shows_it(monkeypatch, capsys):
  shown = []
  monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: Kernel()))
  monkeypatch.setattr(treescope, "display", lambda x: shown.append(text(x)))
  nnx.display(net(), 3)
  assert len(shown) == 2 and "Block(" in shown[0]
  jax.jit(lambda v: nnx.display(v))(nnx.Variable(1))
  assert len(shown) == 2 and "Tracer" in capsys.readouterr().out


def without_treescope(monkeypatch):
  real = builtins.__import__

  def importing(name, *args, **kwargs):
    if name.partition(".")[0] == "treescope":
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", importing)


def test_without_treescope_the_text_is_printed_and_a_page_is_refused(monkeypatch, capsys, tmp_path):
  without_treescope(monkeypatch)
  monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: Kernel()))
  nnx.display(nnx.Variable(1, is_hijax=False))
  out = capsys.readouterr().out
  assert "pip install 'refax[display]'" in out and "Variable( # 1 (4 B)" in out
  with pytest.raises(MissingPackageError) as caught:
    nnx.display(net(), save=tmp_path / "page.html")
  assert caught.value.args[0] == (
    "nnx.display(save=...) needs treescope\n"
    "  got: an environment without that package\n"
    "  fix: pip install 'refax[display]'"
  )
  assert not list(tmp_path.iterdir())


def test_importing_refax_does_not_import_treescope():
  script = (
    "import sys; from refax import nnx; repr(nnx.Variable(1)); print('treescope' in sys.modules)"
  )
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "False"


def test_a_page_with_many_arrays_stays_small_and_fast():
  model = nnx.List([nnx.Linear(100, 100, rngs=nnx.Rngs(0)) for _ in range(100)])
  start = time.perf_counter()
  content = page(model)
  assert len(content) < 12e6 and time.perf_counter() - start < 30


@pytest.mark.slow
def test_a_model_of_a_hundred_million_parameters():
  model = Block(
    table=nnx.Param(jnp.ones((50_000, 1000))), half=nnx.Param(jnp.ones((50_000_000,), jnp.bfloat16))
  )
  start = time.perf_counter()
  content = page(model)
  assert time.perf_counter() - start < 15 and len(content) < 1e6
  assert "mean 1, std 0, min 1, max 1" in content


class Raises:
  def __repr__(self):
    raise RuntimeError("no")


def test_attributes_that_raise_do_no_harm():
  class Odd(nnx.Module):
    def __init__(self):
      self.odd, self.nan = Raises(), float("nan")
      self.objects = nnx.data(np.array([object(), None], dtype=object))

    @property
    def broken(self):
      raise RuntimeError

  assert "<h1>Odd</h1>" in page(Odd())


SHADOW = "document.querySelector('treescope-container').shadowRoot"


@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser_nodes_open_and_references_lead_to_their_first_place(tmp_path, width):
  model = net()
  nnx.display(model, save=tmp_path / "model.html")
  with browser() as window:
    window.open(tmp_path / "model.html", width)
    window.wait(f"return {SHADOW} && {SHADOW}.querySelectorAll('.foldable_node').length")
    assert window.run("return document.title") == "Block"
    assert window.run("return document.documentElement.scrollWidth <= innerWidth")
    figures = f"return {SHADOW}.querySelectorAll('canvas').length"
    drawn = window.run(figures)
    closed = f"[...{SHADOW}.querySelectorAll('.foldable_node_toggle')].filter(x => !x.checked)"
    assert window.run(f"const x = {closed}; x.forEach(x => x.click()); return x.length") > 0
    window.wait(f"{figures} > {drawn}")
    window.screenshot(tmp_path / "open.png")
    assert (tmp_path / "open.png").read_bytes()[:4] == b"\x89PNG"
    window.open(tmp_path / "model.html", width)
    window.wait(f"return {SHADOW} && {SHADOW}.querySelectorAll('.foldable_node').length")
    follow = """
      const links = [...ROOT.querySelectorAll("span")].filter(
        x => !x.children.length && x.textContent === "shared with blocks[0].kernel");
      const target = [...ROOT.querySelectorAll(".copybutton")].find(
        x => x.dataset.copy === ".blocks[0].kernel");
      const visible = () => target.getClientRects().length > 0;
      const before = visible();
      links[0].click();
      return [links.length, before, visible()];
    """
    count, _, after = window.run(follow.replace("ROOT", SHADOW))
    assert count == 1 and after


def test_colours_are_by_type_and_pale():
  class Mine(nnx.Variable):
    pass

  assert tree.colour_of("Param") != tree.colour_of("BatchStat")
  assert tree.colour_of("Mine") == tree.colour_of("Mine") and "hsl(" in tree.colour_of("Mine")
  content = page(Block(a=nnx.Param(1.0), b=Mine(2.0)))
  assert content.count(tree.colour_of("Param")) >= 2 and tree.colour_of("Mine") in content
