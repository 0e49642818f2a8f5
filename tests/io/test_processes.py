"""Two processes with one program: what is laid out over both, compared, saved and restored."""

import json
from pathlib import Path

import pytest

from examples.multihost.launch import launch

pytest.importorskip("orbax.checkpoint")
ROOT = Path(__file__).parents[2]

PROGRAM = '''
import json, sys, traceback
sys.path.insert(0, sys.argv[2])
from examples.multihost.launch import join
join()
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec as P
from refax import nnx

ME, FOLDER = jax.process_index(), sys.argv[1]
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
WHOLE, ROWS = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
found = {}


def ask(f):
  """The answer of a function, or its error, under its name."""
  try:
    found[f.__name__] = f()
  except Exception as error:
    found[f.__name__] = f"{type(error).__name__}: {error}"


class Net(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(4, 2, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.dropout(self.linear(x))


def build(seed=0):
  net = nnx.device_put(Net(nnx.Rngs(seed)), WHOLE)
  nnx.device_put(net.linear.kernel, ROWS)
  return net, nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)


def step(net, optimizer, x):
  loss, grads = nnx.value_and_grad(lambda net: (net(x) ** 2).mean())(net)
  optimizer.update(net, grads)
  return loss


def all_of(x):
  x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return jax.experimental.multihost_utils.process_allgather(x, tiled=True).tolist()


def state(*objects):
  return {str(path): all_of(v[...]) for path, v in nnx.to_flat_state(nnx.state(objects))}


import jax.experimental.multihost_utils
x = jax.make_array_from_process_local_data(ROWS, np.full((2, 4), 1.0 + ME, np.float32))
net, optimizer = build()


@ask
def places():
  moments = optimizer.opt_state[0].mu["linear"]
  return [str(v.sharding.spec) for v in (net.linear.kernel, net.dropout.rngs.key,
                                         moments["kernel"], moments["bias"], optimizer.step)]


@ask
def steps():
  ways = step, nnx.jit(step), jax.jit(step)
  return [bool(np.isfinite(float(run(net, optimizer, x)))) for run in ways]


@ask
def other_seeds():
  nnx.device_put(Net(nnx.Rngs(ME)), WHOLE)


@ask
def other_objects():
  nnx.device_put([nnx.Variable(1.0)] * (1 + ME) + [nnx.Variable(ME)], WHOLE)


@ask
def to_numpy():
  np.asarray(net.linear.kernel)


@ask
def written():
  v, w = nnx.Variable(jnp.zeros(4)), nnx.Variable(jnp.zeros(4))
  nnx.device_put([v, w], ROWS)
  v[...] = jnp.arange(4.0)
  w[...] = 2
  w[0] = 7
  v += 1
  return [all_of(v[...]), all_of(w[...]), str(v.sharding.spec), str(net)[:4]]


@ask
def of_the_first_only():
  return [float(net.linear.bias[0]), str(net.linear)[:6]] if ME == 0 else None


@ask
def back_to_one_device():
  v = nnx.device_put(nnx.Variable(jnp.arange(2.0)), WHOLE)
  return nnx.device_put(v, jax.local_devices()[0])[...].tolist()


@ask
def a_metric():
  metric = nnx.device_put(nnx.metrics.Average(), WHOLE)
  nnx.jit(lambda metric, x: metric.update(values=x))(metric, x)
  return float(metric.compute())


@ask
def entering_a_mesh():
  model = Net(nnx.Rngs(0))
  with jax.set_mesh(mesh):
    nnx.jit(step)(model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param), x)
  return str(model.linear.kernel.sharding.spec)


class Place:
  """An iterator that is at another place in each process."""

  def __init__(self, n):
    self.n = n

  def get_state(self):
    return {"n": self.n}

  def set_state(self, state):
    self.n = state["n"]


@ask
def saved_and_restored():
  own, same = Place(5 + ME), Place(3)
  local, numbers = nnx.Variable(jnp.arange(3.0)), np.arange(3)
  parts = lambda *values: dict(zip(("net", "optimizer", "local", "numbers", "own", "same"), values))
  with nnx.Checkpointer(FOLDER + "/a") as checkpoints:
    for n in (1, 2, 3, 4):
      checkpoints.save(n, parts(net, optimizer, local, numbers, own, same), user={"n": n})
    checkpoints.wait()
    steps = checkpoints.steps
  fresh = parts(*build(3), nnx.Variable(jnp.zeros(3)), np.zeros(3, int), Place(0), Place(0))
  with nnx.Checkpointer(FOLDER + "/a") as checkpoints:
    restored = checkpoints.restore(fresh)
  assert state(fresh["net"], fresh["optimizer"]) == state(net, optimizer)
  return [steps, restored.user["n"], str(fresh["net"].linear.kernel.sharding.spec),
          fresh["local"][...].tolist(), fresh["numbers"].tolist(), fresh["own"].n, fresh["same"].n]


@ask
def replicas_that_differ():
  bad = jax.make_array_from_callback((2,), WHOLE, lambda _: np.full(2, ME, np.float32))
  with nnx.Checkpointer(FOLDER + "/b") as checkpoints:
    checkpoints.save(1, {"good": nnx.Variable(jnp.ones(2)), "bad": nnx.Variable(bad)})


@ask
def a_folder_that_is_taken():
  import os
  os.makedirs(FOLDER + "/c", exist_ok=True)
  held = open(FOLDER + "/c/.lock", "a+")
  if ME == 0:
    import fcntl
    fcntl.flock(held, fcntl.LOCK_EX)
  jax.experimental.multihost_utils.sync_global_devices("held")
  with nnx.Checkpointer(FOLDER + "/c") as checkpoints:
    checkpoints.save(1, {"v": nnx.Variable(1)})


open(f"{FOLDER}/found_{ME}.json", "w").write(json.dumps(found))
'''


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  """What both processes found: a pair for each question."""
  folder = tmp_path_factory.mktemp("processes")
  program = folder / "program.py"
  program.write_text(PROGRAM)
  outcome = launch(2, [str(program), str(folder), str(ROOT)], logs=folder, limit=240)
  logs = "".join((folder / f"process_{i}.log").read_text()[-2000:] for i in range(2))
  assert outcome.failed is None, logs
  first, second = (json.loads((folder / f"found_{i}.json").read_text()) for i in range(2))
  return {name: (first[name], second[name]) for name in first}


def test_state_lies_over_both_and_the_optimizer_beside_it(found):
  for kernel, key, mu_kernel, mu_bias, step in found["places"]:
    assert "data" in kernel and kernel == mu_kernel
    assert key == mu_bias == step and "data" not in key


def test_a_step_runs_eagerly_and_compiled(found):
  assert found["steps"] == ([True] * 3, [True] * 3)


def test_values_that_differ_are_refused_by_both_with_their_names(found):
  for error in found["other_seeds"]:
    assert error.startswith("ProcessMismatchError: nnx.device_put takes a value that each process")
    assert "at:  dropout.rngs.key, linear.kernel\n" in error
    assert "got: other values in process 1 than in process 0" in error
    assert "the same seed" in error


def test_objects_that_differ_are_refused_by_both(found):
  for error in found["other_objects"]:
    assert error.startswith("ProcessMismatchError: nnx.device_put takes objects that are alike")
    assert "process by process" in error


def test_a_part_made_to_numpy_is_the_error_of_jax(found):
  for error in found["to_numpy"]:
    assert "non-addressable" in error and "process_allgather" in error


def test_a_write_from_one_process_stays_laid_out(found):
  for values, others, spec, text in found["written"]:
    assert values == [1.0, 2.0, 3.0, 4.0] and others == [7.0, 2.0, 2.0, 2.0]
    assert "data" in spec and text == "Net("


def test_the_first_process_may_print_alone(found):
  number, text = found["of_the_first_only"][0]
  assert isinstance(number, float) and text == "Linear"


def test_what_both_have_goes_back_to_one_device(found):
  assert found["back_to_one_device"] == ([0.0, 1.0], [0.0, 1.0])


def test_a_metric_averages_over_both(found):
  assert found["a_metric"] == (1.5, 1.5)


def test_a_model_of_one_process_enters_the_mesh_of_both(found):
  assert all(spec.endswith("()") for spec in found["entering_a_mesh"])


def test_a_checkpoint_holds_what_is_of_both_of_one_and_of_each(found):
  for me, answer in enumerate(found["saved_and_restored"]):
    assert not isinstance(answer, str), answer
    steps, user, spec, local, numbers, own, same = answer
    assert steps == [2, 3, 4] and user == 4 and "data" in spec
    assert local == [0.0, 1.0, 2.0] and numbers == [0, 1, 2]
    assert (own, same) == (5 + me, 3)


def test_replicas_that_differ_are_not_saved(found):
  for error in found["replicas_that_differ"]:
    assert error.startswith("ProcessMismatchError: Checkpointer.save takes a value that each")
    assert "at:  bad\n" in error


def test_a_folder_that_is_taken_is_refused_in_both(found):
  for error in found["a_folder_that_is_taken"]:
    assert error.startswith("CheckpointLockedError: one process at a time writes")


def test_an_iterator_of_each_process_needs_as_many_processes():
  from refax.errors import InvalidArgumentError
  from refax.io.parts import state_from

  kept = {"processes": [{"json": {"n": 1}}, {"json": {"n": 2}}]}
  with pytest.raises(InvalidArgumentError, match=r"iterator data(.|\n)*2 processes, as when"):
    state_from("data", kept)
