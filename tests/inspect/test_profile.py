"""A profile's rows sum to the whole, known layers have known parts, times lie within the run."""

import threading
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import optax
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError
from refax.inspect import flame, timing
from refax.inspect.program import Program, layer_of_name
from tests.display.browser import browser, missing

X = jnp.ones((64, 16))


class Net(nnx.Module):
  def __init__(self, rngs):
    self.small = nnx.Linear(16, 32, rngs=rngs)
    self.heavy = nnx.Stack(nnx.Linear, 3, 32, 32, rngs=rngs)
    self.norm = nnx.BatchNorm(32, rngs=rngs)
    self.heads = [nnx.Linear(32, 4, rngs=rngs) for _ in range(2)]
    self.steps = nnx.Variable(0)

  def __call__(self, x):
    self.steps += 1
    x = nnx.relu(self.norm(self.heavy(self.small(x))))
    return sum(head(x) for head in self.heads)


def net():
  return Net(nnx.Rngs(0))


def loss(model, x):
  return (model(x) ** 2).mean()


def train(model, x):
  return nnx.grad(loss)(model, x)


def flops(*shape):
  n, i, o = shape
  return 2 * n * i * o + n * o


@pytest.fixture(params=[True, False], ids=["hijax", "lojax"])
def storage(request):
  with nnx.use_hijax(request.param):
    yield


FUNCTIONS = {
  "model": lambda: (net(), (X,)),
  "method": lambda: (net().__call__, (X,)),
  "function": lambda: (loss, (net(), X)),
  "nnx.jit": lambda: (nnx.jit(loss), (net(), X)),
  "jax.jit": lambda: (jax.jit(loss), (net(), X)),
  "gradient": lambda: (train, (net(), X)),
  "jit of gradient": lambda: (nnx.jit(train), (net(), X)),
  "closure": lambda: ((lambda m: lambda x: loss(m, x))(nnx.Linear(16, 4, rngs=nnx.Rngs(0))), (X,)),
  "vmap": lambda: (jax.vmap(nnx.Linear(16, 4, rngs=nnx.Rngs(0))), (X,)),
  "no Modules": lambda: (lambda x: jnp.tanh(x @ x.T).sum(), (X,)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_rows_sum_to_the_whole(name, storage):
  fn, args = FUNCTIONS[name]()
  profile = nnx.profile(fn)(*args)
  assert profile.total.flops == sum(x.flops for x in profile.parts) > 0
  assert profile.total.nbytes == sum(x.nbytes for x in profile.parts) > 0
  last = next(line for line in str(profile).splitlines() if line.startswith("total"))
  assert last.split()[1] == f"{profile.total.flops:,.0f}"
  assert profile.wall is None and profile.notes == ()


def test_known_layers_have_known_parts():
  profile = nnx.profile(net())(X)
  assert profile["small"].flops == flops(64, 16, 32)
  assert profile["heavy"].flops == profile["heavy/layers"].flops == 3 * flops(64, 32, 32)
  assert profile["heads"].flops == 2 * flops(64, 32, 4) == 2 * profile["heads/0"].flops
  assert profile.total.backward.flops == 0
  assert [x.path for x in profile.parts][:4] == ["", "small", "heavy", "heavy/layers"]
  with pytest.raises(KeyError, match="nothing"):
    profile["nothing"]


def test_forward_and_backward_are_apart():
  profile = nnx.profile(train)(net(), X)
  assert profile["heavy"].forward.flops == pytest.approx(3 * flops(64, 32, 32))
  twice = 2 * 3 * flops(64, 32, 32)  # the gradients of the kernel and of the input
  assert profile["heavy"].backward.flops == pytest.approx(twice, rel=0.1)
  assert profile["small"].backward.flops == pytest.approx(flops(64, 16, 32), rel=0.1)


def test_state_stays_as_it_is(storage):
  model = net()
  before = jax.device_get(jax.tree.leaves(nnx.to_lojax(model)))
  nnx.profile(nnx.jit(train), measure=True)(model, X)
  after = jax.device_get(jax.tree.leaves(nnx.to_lojax(model)))
  assert all((a == b).all() for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
  "wrap", [lambda f: f, nnx.jit, jax.jit], ids=["plain", "nnx.jit", "jax.jit"]
)
def test_times_lie_within_the_run_and_the_heavy_layer_dominates(wrap):
  class Pair(nnx.Module):
    def __init__(self, rngs):
      self.light = nnx.Linear(8, 384, rngs=rngs)
      self.heavy = nnx.Stack(nnx.Linear, 4, 384, 384, rngs=rngs)

    def __call__(self, x):
      return self.heavy(self.light(x))

  profile = nnx.profile(wrap(train), measure=True)(Pair(nnx.Rngs(0)), jnp.ones((384, 8)))
  assert profile.notes == ()
  assert all(x.seconds >= 0 for x in profile.parts)
  assert 0 < profile.total.seconds <= profile.wall
  assert profile["heavy"].seconds > 0.5 * profile.total.seconds
  assert profile["heavy"].seconds > profile["light"].seconds > 0
  text = str(profile)
  assert "time" in text.splitlines()[0] and " a run, " in text


def test_a_training_step_with_an_optimizer_is_measured(storage):
  model = net()
  optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, x):
    optimizer.update(model, nnx.grad(loss)(model, x))

  profile = nnx.profile(step, measure=True, runs=2)(model, optimizer, X)
  assert profile["small"].seconds > 0 and int(optimizer.step) == 0
  names = [x.name for x in profile.memory.state]
  assert "model.heavy.layers.kernel" in names
  assert "optimizer.opt_state[0].mu.heavy.layers.kernel" in names


def test_memory_is_that_of_state_written_in_place_once(storage):
  state = nnx.Variable(jnp.zeros((256, 256)))

  def add(state, x):
    state[...] = state[...] @ x

  with_state = nnx.profile(add)(state, jnp.ones((256, 256))).memory
  size = 256 * 256 * 4
  assert (with_state.arguments, with_state.in_place) == (2 * size, size)
  assert with_state.outputs - size < 64
  assert 2 * size <= with_state.total <= 3.2 * size
  assert [(x.name, x.nbytes) for x in with_state.state] == [("state", size), ("x", size)]
  assert with_state.state[0].what == "Variable" and with_state.state[1].what == "argument"


@pytest.mark.parametrize("name", ["model", "gradient", "jit of gradient"])
def test_the_temporaries_alive_at_the_peak_are_about_those_that_xla_reports(name):
  fn, args = FUNCTIONS[name]()
  memory = nnx.profile(fn)(*args).memory
  assert sum(x.nbytes for x in memory.at_peak) == pytest.approx(memory.temporaries, rel=0.6)
  assert any(x.name for x in memory.at_peak)


def test_types_are_enough_where_nothing_is_measured():
  model = nnx.eval_shape(net)
  x = jax.ShapeDtypeStruct((64, 16), jnp.float32)
  profile = nnx.profile(loss)(model, x)
  assert profile.total.flops == nnx.profile(loss)(net(), X).total.flops
  assert profile.memory.arguments > 0
  with pytest.raises(InvalidArgumentError, match=r"measure(.|\n)*fix: pass measure=False"):
    nnx.profile(loss, measure=True)(model, x)


def test_odd_arguments():
  def f(model, x, n, name, *, flag):
    return {"y": model(x) * n if flag else x, "n": jnp.int32(len(name))}

  model = nnx.Linear(16, 4, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
  profile = nnx.profile(f, measure=True)(model, X, 2, "name", flag=True)
  assert profile.total.flops > 0
  assert nnx.profile(lambda: None, measure=True)().total.flops == 0
  assert nnx.profile(lambda x: x, measure=True)(X).total.flops == 0
  assert "total" in str(nnx.profile(nnx.Sequential())(X))
  keys = nnx.profile(lambda rngs: jax.random.normal(rngs(), (8,)), measure=True)(nnx.Rngs(0))
  assert keys.memory.state
  for runs in (0, -1, 1.5, True):
    with pytest.raises(InvalidArgumentError, match="runs"):
      nnx.profile(f, runs=runs)


def test_state_by_closure_is_read_named_and_not_written():
  model = nnx.BatchNorm(16, rngs=nnx.Rngs(0))
  before = model.mean[...].tolist()
  profile = nnx.profile(lambda x: model(x), measure=True)(X)
  assert model.mean[...].tolist() == before and profile.wall > 0
  found = {(x.name, x.what) for x in profile.memory.state}
  assert ("BatchNorm.mean", "BatchStat, by closure") in found
  assert "BatchNorm.mean (BatchStat, by closure)" in str(profile)


def test_names_that_look_like_those_of_jax_are_found():
  model = nnx.Module()
  names = ("conv(1)", "a b", "while", "body", "jvp(x)")
  model.layers = {name: nnx.Linear(32, 32, rngs=nnx.Rngs(0)) for name in names}

  def apply(model, x):
    for name in names:
      x = model.layers[name](x)
    return x.sum()

  fn = nnx.grad(apply, argnums=0)
  profile = nnx.profile(lambda model, x: fn(model, x), measure=True)(model, jnp.ones((512, 32)))
  for name in names[:-1]:
    assert profile[f"layers/{name}"].flops >= 1.9 * flops(512, 32, 32)
    assert profile[f"layers/{name}"].seconds > 0


def test_through_loops_branches_and_recomputation():
  model = Net(nnx.Rngs(0))
  model.heavy = nnx.Stack(nnx.Linear, 3, 32, 32, rngs=nnx.Rngs(0), remat=True)

  def apply(model, x, p):
    x = nnx.cond(p, lambda model, x: model.small(x), lambda model, x: jnp.tile(x, 2), model, x)
    x = jax.lax.fori_loop(0, 5, lambda i, x: nnx.relu(x), x)
    return jax.vmap(model.heads[0])(model.heavy(x)).sum()

  fn = nnx.jit(lambda model, x, p: nnx.grad(apply)(model, x, p))
  profile = nnx.profile(fn, measure=True)(model, X, jnp.array(True))
  assert profile["heavy/layers"].seconds > 0 and profile.total.seconds <= profile.wall
  assert profile["heavy"].forward.flops == 3 * flops(64, 32, 32)
  assert profile["heavy"].backward.flops == pytest.approx(6 * flops(64, 32, 32), rel=0.05)


def test_inside_of_a_compiled_function_operations_are_counted():
  found = []

  @jax.jit
  def f(x):
    found.append(nnx.profile(lambda x: (x @ x.T).sum())(x))
    return x

  f(X)
  assert found[0].total.flops == 2 * 64 * 64 * 16 + 64 * 64 - 1


def test_integer_results_and_several_measurements_in_a_row():
  count = nnx.profile(lambda model, x: model(x).argmax(-1), measure=True)
  model = net()
  first, second = count(model, X), count(model, X)
  assert first.total.flops == second.total.flops and second.wall > 0 and not second.notes


def test_an_exception_leaves_no_profiler_running():
  def fail(x):
    jax.debug.callback(lambda: 1 / 0)
    return x + 1

  with pytest.raises(Exception, match=r"ZeroDivision|division"):
    nnx.profile(fail, measure=True)(X)
    jax.effects_barrier()
  with pytest.raises(ValueError, match="mine"):
    nnx.profile(lambda x: (_ for _ in ()).throw(ValueError("mine")), measure=True)(X)
  assert nnx.profile(loss, measure=True)(net(), X).wall > 0


def test_a_profiler_of_the_user_that_runs_is_left_alone(tmp_path):
  with jax.profiler.trace(str(tmp_path)):
    profile = nnx.profile(loss, measure=True)(net(), X)
  assert profile.wall is None and profile.total.seconds is None
  assert "did not start" in profile.notes[0] and "note: no times" in str(profile)
  with pytest.raises(InvalidArgumentError, match="by='time'"):
    profile.save(tmp_path / "x.svg", by="time")


def test_threads_take_turns():
  hijax, found = nnx.using_hijax(), []

  def work(n):
    with nnx.use_hijax(hijax):
      model = nnx.Linear(16, n, rngs=nnx.Rngs(0))
      found.append(nnx.profile(lambda m, x: m(x), measure=True)(nnx.List([model])[0], X))

  threads = [threading.Thread(target=work, args=(n,)) for n in (4, 8, 16, 32)]
  [t.start() for t in threads]
  [t.join() for t in threads]
  assert len(found) == 4 and all(x.wall > 0 and not x.notes for x in found)


def test_a_program_of_the_cache_on_disk_does_not_bring_the_names_of_another_model(tmp_path):
  class One(nnx.Module):
    def __init__(self):
      self.one = nnx.Linear(64, 64, rngs=nnx.Rngs(0))

    def __call__(self, x):
      return self.one(x)

  class Two(nnx.Module):
    def __init__(self):
      self.two = nnx.Linear(64, 64, rngs=nnx.Rngs(0))

    def __call__(self, x):
      return self.two(x)

  assert nnx.profile(One(), measure=True)(jnp.ones((512, 64)))["one"].seconds > 0
  assert nnx.profile(Two(), measure=True)(jnp.ones((512, 64)))["two"].seconds > 0


def test_where_the_profiler_names_nothing_times_are_absent(monkeypatch):
  monkeypatch.setattr(timing, "_spans", lambda *_: [])
  profile = nnx.profile(loss, measure=True)(net(), X)
  assert profile.wall is None and "names no operations" in profile.notes[0]
  monkeypatch.setattr(timing, "_spans", lambda *_: [timing.Span(0, 9, "kernel_of_another")])
  profile = nnx.profile(loss, measure=True)(net(), X)
  assert profile.wall is None and "no instruction of the program" in profile.notes[0]


def test_moments_in_which_several_run_are_shared():
  spans = [timing.Span(0, 4e9, "loop"), timing.Span(0, 2e9, "a"), timing.Span(1e9, 3e9, "b")]
  assert timing.shared(spans, {"loop"}) == {"a": 1.5, "b": 1.5, "loop": 1.0}
  twice = [timing.Span(0, 1e9, "a"), timing.Span(0, 1e9, "a"), timing.Span(0, 1e9, "b")]
  assert timing.shared(twice, set()) == pytest.approx({"a": 2 / 3, "b": 1 / 3})


def test_the_fastest_run_counts_and_runs_that_cannot_be_told_apart_are_averaged():
  slow, fast = timing.Span(0, 3e9, "a", 1), timing.Span(5e9, 6e9, "a", 2)
  assert timing._fastest([slow, fast], set(), 2) == {"a": 1.0}
  assert timing._fastest([slow._replace(run=None), fast._replace(run=None)], set(), 2) == {"a": 2.0}


def test_the_layer_of_an_instruction():
  paths = {"enc", "enc/layers/2", "stack/layers", "body", "odd/conv(1)"}
  cases = {
    "jit(step)/jvp(enc)/layers/2/dot_general": "enc/layers/2",
    "jit(step)/transpose(jvp(enc/layers/2))/dot_general": "enc/layers/2",
    "jit(f)/transpose(jvp(stack))/while/body/eval_jaxpr/layers/dot": "stack/layers",
    "jit(f)/stack/while/body/closed_call/checkpoint/rematted_computation/layers/mul": (
      "stack/layers"
    ),
    "jit(f)/vmap(enc)/jit(relu)/max": "enc",
    "jit(f)/body/add": "body",
    "jit(f)/transpose(jvp(odd/conv(1)))/add": "odd/conv(1)",
    "jit(f)/jvp(odd)/jit(g(x))/conv(1)/add": "odd/conv(1)",
    "jit(f)/enc/mine/layers/2/add": "enc",
    "jit(f)/add": "",
    "": "",
  }
  assert {name: layer_of_name(name, paths) for name in cases} == cases


def test_an_unknown_text_is_an_empty_program():
  empty = "HloModule x\n\nENTRY %m (a: f32[]) -> f32[] {\n}"
  for text in ("", "LLVM something\n  %a = f32[2] {", empty):
    program = Program.of(text)
    assert program.alive_at_peak() == [] and program.op_names() == {}


def test_the_picture_has_a_box_for_each_layer(tmp_path):
  file = tmp_path / "profile.svg"
  profile = nnx.profile(train)(net(), X)
  profile.save(file)
  root = ET.parse(file).getroot()
  titles = [x.text for x in root.iter("{http://www.w3.org/2000/svg}title")]
  assert any(t.startswith("heavy/layers: ") and "backward" in t for t in titles)
  whole = next(x for x in root.iter("{http://www.w3.org/2000/svg}rect") if x.get("class") == "box")
  assert float(whole.get("width")) == flame.WIDTH - 2 * flame.SIDE
  assert "onload" not in file.read_text() and "<script" not in file.read_text()
  with pytest.raises(InvalidArgumentError, match="by"):
    profile.save(file, by="colour")
  nnx.profile(lambda: None)().save(file)  # nothing at all
  ET.parse(file)


def test_names_in_a_picture_are_escaped():
  picture = flame.draw([flame.Box("a<b>&c", 1.0), flame.Box("", 1.0)], "x<y", str)
  assert ET.fromstring(picture) is not None


@pytest.mark.skipif(bool(missing()), reason=missing() or "-")
def test_the_picture_in_a_browser(tmp_path):
  file = tmp_path / "profile.svg"
  nnx.profile(train, measure=True)(net(), X).save(file)
  with browser() as window:
    window.open(file, 1000, 300)
    inside = window.run(
      "return [...document.querySelectorAll('g')].every(g => {const t = g.querySelector('text');"
      "if (!t) return true; const b = g.querySelector('rect').getBoundingClientRect(),"
      "c = t.getBoundingClientRect(); return c.left >= b.left && c.right <= b.right + 1})"
    )
    assert inside and window.run("return document.querySelectorAll('text').length") > 3


def test_deep_models_show_the_largest_rows():
  model = nnx.Sequential(*(nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(80)))
  text = str(nnx.profile(model)(jnp.ones((2, 4))))
  assert "smaller ones)" in text and len(text.splitlines()) < 100


@pytest.mark.parametrize("wrap", [jax.jit, nnx.jit])
def test_a_second_profile_of_a_compiled_function_knows_its_layers_too(wrap):
  model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
  step = wrap(lambda model, x: model(x))
  for _ in range(2):
    profile = nnx.profile(step)(model, jnp.ones((2, 4)))
    assert [part.path for part in profile.parts] == ["", "layers/0", "layers/1"]
