import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

from refax import nnx
from refax.errors import ExportError

pytest.importorskip("flatbuffers", reason="jax.export writes with flatbuffers")
BATCH = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 3"), jnp.float32)


class Net(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(3, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.scale = jnp.full(4, 2.0)  # an array that is no Variable
    self.tied = self.linear.kernel

  def __call__(self, x):
    return self.dropout(self.norm(self.linear(x))) * self.scale


def forward(model, x):
  return model(x)


def saved(exported, tmp_path):
  path = tmp_path / "artifact"
  exported.save(path)
  return path


def x_of(n, seed=0):
  return jax.random.normal(jax.random.key(seed), (n, 3))


@pytest.mark.parametrize("reload", [False, True])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, nnx.jit], ids=["eager", "jit", "nnx.jit"])
def test_it_computes_and_writes_what_the_model_does(reload, wrap, tmp_path):
  model, twin = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
  function = nnx.export(forward, model, BATCH)
  if reload:
    function = nnx.load_exported(saved(function, tmp_path))
  call = wrap(lambda function, x: function(x))
  for n in (2, 5, 5):
    np.testing.assert_allclose(call(function, x_of(n, n)), twin(x_of(n, n)), rtol=1e-5, atol=1e-5)
  state = function.state
  np.testing.assert_allclose(state["model.norm.mean"][...], twin.norm.mean[...], rtol=1e-5)
  assert int(state["model.dropout.rngs.count"]) == 3
  assert isinstance(state["model.norm.mean"], nnx.BatchStat)
  assert isinstance(state["model.linear.kernel"], nnx.Param)
  assert "model.tied" not in state  # one Variable, one place
  assert int(model.dropout.rngs.count) == 0  # the state is a copy


def test_a_train_step_with_its_optimizer(tmp_path):
  def make():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.adam(1e-1), wrt=nnx.Param)

  def step(model, optimizer, batch):
    loss, grads = nnx.value_and_grad(lambda m: ((m(batch["x"]) - batch["y"]) ** 2).mean())(model)
    optimizer.update(model, grads)
    return {"loss": loss}

  batch = {"x": x_of(4), "y": jnp.ones((4, 1))}
  twin = make()
  function = nnx.load_exported(saved(nnx.export(step, *make(), batch), tmp_path))
  for _ in range(5):
    np.testing.assert_allclose(function(batch)["loss"], step(*twin, batch)["loss"], rtol=1e-4)
  assert int(function.state["optimizer.step"]) == 5


CONSUMER = """
import sys
import jax, jax.numpy as jnp, numpy as np
from refax import nnx
decoder = nnx.load_exported(sys.argv[1])
x = jnp.asarray(np.load(sys.argv[2]))
steps = [decoder(x[:, i:i + 1]) for i in range(x.shape[1])]
np.save(sys.argv[3], np.concatenate(steps, 1))
assert "tests" not in sys.modules and not hasattr(sys.modules["__main__"], "Generator")
print(sorted(decoder.state)[:1], [int(v[0]) for k, v in decoder.state.items() if "index" in k])
"""


class Generator(nnx.Module):
  """A model whose class the consumer does not have."""

  def __init__(self, rngs):
    self.decoder = nnx.TransformerDecoder(2, 8, 2, rope=nnx.RoPE(), rngs=rngs)

  def __call__(self, x, **kwargs):
    return self.decoder(x, **kwargs)


def test_a_process_without_the_code_decodes_with_a_cache(tmp_path):
  model, x = Generator(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (2, 5, 8))
  want = model(x)
  model.decoder.init_cache(x.shape)
  function = nnx.export(lambda model, x: model(x, decode=True), model, x[:, :1])
  path, given, got = saved(function, tmp_path), tmp_path / "x.npy", tmp_path / "y.npy"
  np.save(given, x)
  command = [sys.executable, "-c", CONSUMER, *map(str, (path, given, got))]
  done = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=tmp_path)
  assert done.returncode == 0, done.stderr[-3000:]
  assert "[5]" in done.stdout
  np.testing.assert_allclose(np.load(got), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_of_any_implementation(impl, tmp_path):
  stream = nnx.RngStream(jax.random.key(3, impl=impl), tag="noise")
  twin = nnx.clone(stream)
  function = nnx.export(lambda stream: jax.random.normal(stream(), (3,)), stream)
  loaded = nnx.load_exported(saved(function, tmp_path))
  for _ in range(2):
    np.testing.assert_allclose(loaded(), jax.random.normal(twin(), (3,)), rtol=1e-6)
  assert str(jax.random.key_impl(loaded.state["stream.key"][...])) == impl


def test_types_of_users_become_plain_and_storage_stays(tmp_path):
  class Mine(nnx.Variable):
    pass

  a, b = Mine(jnp.ones(2)), nnx.Cache(jnp.ones(2, jnp.bfloat16), is_hijax=False)
  function = nnx.export(lambda a, b: a[...] + b[...], a, b)
  assert type(function.state["a"]) is Mine
  loaded = nnx.load_exported(saved(function, tmp_path))
  assert type(loaded.state["a"]) is nnx.Variable and loaded.state["a"].is_hijax
  assert type(loaded.state["b"]) is nnx.Cache and not loaded.state["b"].is_hijax
  assert loaded().dtype == jnp.float32


def test_what_wrote_it_is_written_beside_it(tmp_path):
  path = saved(nnx.export(forward, Net(nnx.Rngs(0)), BATCH), tmp_path)
  about = json.loads((path / "about.json").read_text())
  assert about["function"] == "forward" and about["format"] == 1
  assert about["written_by"].startswith("refax 0.1.0, jax 0.1")
  assert about["state"]["model.linear.kernel"]["shape"] == [3, 4]
  assert os.listdir(tmp_path) == ["artifact"]  # nothing half-done is left


def message(run):
  with pytest.raises(ExportError) as info:
    run()
  return info.value.args[0]


def test_an_argument_is_state_or_arrays():
  model = Net(nnx.Rngs(0))
  assert message(lambda: nnx.export(lambda d: d["m"](d["x"]), {"m": model, "x": x_of(2)})) == (
    "an argument of nnx.export is an object with state, or arrays\n"
    "  at:  argument 0\n"
    "  got: Net inside dict\n"
    "  fix: pass Modules and Variables as arguments of their own, and arrays in others"
  )


def test_state_by_closure_is_refused():
  model = Net(nnx.Rngs(0))
  text = message(lambda: nnx.export(lambda x: model(x), x_of(2)))
  assert text.startswith("an exported function reaches all state by its arguments\n  at:  Net.")
  assert "fix: pass the object that holds it as an argument" in text
  assert int(model.dropout.rngs.count) == 0


def test_results_are_arrays_and_the_structure_stays():
  model = Net(nnx.Rngs(0))
  assert "got: a Module" in message(lambda: nnx.export(lambda m: m.linear, model))

  def grows(model, x):
    model.extra = nnx.Variable(x)
    return x

  assert "got: another structure" in message(lambda: nnx.export(grows, model, x_of(2)))
  assert not hasattr(model, "extra")


@pytest.mark.parametrize(
  "args", [(), (x_of(2), x_of(2)), (x_of(2)[:, :2],), ({"x": x_of(2)},), (jnp.ones((2, 3), int),)]
)
def test_other_arguments_are_refused_and_nothing_changes(args):
  function = nnx.export(forward, Net(nnx.Rngs(0)), BATCH)
  text = message(lambda: function(*args))
  assert text.startswith("forward was exported for other arguments\n  got: ")
  assert text.endswith(
    "fix: pass arrays of the shapes and dtypes of the export, or export it with others"
  )
  assert int(function.state["model.dropout.rngs.count"]) == 0
  assert function(x_of(2)).shape == (2, 4)


@pytest.mark.parametrize("name", ["function.bin", "state.safetensors", "about.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_damaged_folder_is_refused(name, damage, tmp_path):
  path = saved(nnx.export(forward, Net(nnx.Rngs(0)), BATCH), tmp_path)
  file = path / name
  if damage == "missing":
    file.unlink()
  else:
    file.write_bytes(file.read_bytes()[: 20 if damage == "cut" else 0])
  assert "this folder holds no exported function, or it is damaged" in message(
    lambda: nnx.load_exported(path)
  )


def test_a_newer_format_and_a_full_folder_are_refused(tmp_path):
  function = nnx.export(forward, Net(nnx.Rngs(0)), BATCH)
  path = saved(function, tmp_path)
  with pytest.raises(OSError):
    function.save(path)
  assert os.listdir(tmp_path) == ["artifact"]
  about = json.loads((path / "about.json").read_text())
  (path / "about.json").write_text(json.dumps(about | {"format": 2}))
  assert "format 2, this Refax reads up to 1" in message(lambda: nnx.load_exported(path))


@pytest.mark.parametrize("reload", [False, True])
def test_a_decoder_whose_memory_is_full_gives_no_plausible_number(reload, tmp_path):
  model, x = Generator(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (2, 6, 8))
  want = model(x[:, :4])
  model.decoder.init_cache((2, 4, 8))

  def step(model, x):
    y = model(x, decode=True)
    return {"y": y, "token": jnp.argmax(y, -1), "byte": jnp.argmax(y, -1).astype(jnp.uint8)}

  function = nnx.export(step, model, x[:, :1])
  function = nnx.load_exported(saved(function, tmp_path)) if reload else function
  for i in range(6):
    for call in [function, jax.jit(lambda f, x: f(x))][i % 2 :][:1]:
      out = call(function, x[:, i : i + 1]) if call is not function else call(x[:, i : i + 1])
    if i < 4:
      np.testing.assert_allclose(out["y"], want[:, i : i + 1], rtol=1e-4, atol=1e-5)
      assert out["token"].min() >= 0
    else:
      assert bool(jnp.isnan(out["y"]).all())
      assert (out["token"] == jnp.iinfo(out["token"].dtype).min).all() and (
        out["byte"] == 255
      ).all()


def test_a_check_of_the_user_that_fails_poisons_the_result():
  def root(v, x):
    checkify.check(jnp.all(x >= 0), "negative")
    v[...] += 1
    return jnp.sqrt(jnp.abs(x)), None, jax.random.key(0)

  function = nnx.export(root, nnx.Variable(0), jnp.ones(2))
  assert function(jnp.array([4.0, 9.0]))[0].tolist() == [2, 3]
  out = function(jnp.array([4.0, -9.0]))
  assert bool(jnp.isnan(out[0]).all()) and out[1] is None
  assert int(function.state["v"]) == 2


def test_any_number_of_objects(tmp_path):
  def add(x, *parts):
    return sum((part[...] for part in parts), x)

  parts = nnx.Variable(1.0), nnx.Variable(2.0)
  function = nnx.load_exported(saved(nnx.export(add, jnp.ones(()), *parts), tmp_path))
  assert list(function.state) == ["parts.0", "parts.1"] and float(function(jnp.ones(()))) == 4.0
  assert float(nnx.export(lambda *xs: xs[0] + xs[1], 1.0, jnp.ones(()))(1.0, jnp.ones(()))) == 2.0
  assert nnx.export(lambda: jnp.ones(2))().tolist() == [1, 1]


def test_two_variables_of_one_name_are_refused():
  class Named(nnx.Module):
    def __init__(self):
      self.parts = nnx.Dict({"a.b": nnx.Param(1.0), "a": nnx.Dict({"b": nnx.Param(2.0)})})

  text = message(lambda: nnx.export(lambda m: m.parts["a.b"][...], Named()))
  assert text.startswith("an exported function keeps each Variable under its path as a name")
  assert "at:  m.parts.a.b" in text and "fix: rename one of the keys" in text


@pytest.mark.parametrize("dtype", [
  "bool", "uint4", "int4", "int8", "float8_e4m3", "float8_e5m2", "float4_e2m1fn",
  "bfloat16", "complex64",
])  # fmt: skip
@pytest.mark.parametrize("hijax", [True, False])
def test_state_of_every_dtype_and_shape(dtype, hijax, tmp_path):
  make = lambda n: {
    "vector": nnx.Variable(jnp.full(3, n).astype(dtype), is_hijax=hijax),
    "scalar": nnx.Variable(jnp.asarray(n).astype(dtype), is_hijax=hijax),
    "empty": nnx.Variable(jnp.zeros((0, 2)).astype(dtype), is_hijax=hijax),
  }
  variables = nnx.Dict(make(1))
  function = nnx.export(lambda v: v["vector"][...].astype(jnp.float32), variables)
  loaded = nnx.load_exported(saved(function, tmp_path))
  assert loaded().tolist() == [1, 1, 1]
  for name, v in make(1).items():
    got = loaded.state[f"v.{name}"]
    assert got.dtype == v.dtype and got.shape == v.shape and got.is_hijax == hijax
    np.testing.assert_array_equal(np.asarray(got[...]), np.asarray(v[...]))


def test_what_jax_cannot_write_is_an_error_and_leaves_nothing(tmp_path):
  function = nnx.export(lambda v: v[...].astype(jnp.int8), nnx.Variable(jnp.ones(2, jnp.int2)))
  text = message(lambda: function.save(tmp_path / "artifact"))
  assert "jax.export cannot write <lambda>" in text and "KeyError: dtype(int2)" in text
  assert os.listdir(tmp_path) == []
