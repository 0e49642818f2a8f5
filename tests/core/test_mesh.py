"""Objects made before `jax.set_mesh`, used inside it: on four devices, in a process of its own."""

import os
import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import copy, os, pickle, sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from refax import nnx
from refax.core.epoch import epoch

assert jax.device_count() == 4
kind = AxisType.Explicit if sys.argv[1] == "explicit" else AxisType.Auto
mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
first = jax.devices()[0]
before = jnp.ones((8, 4))

def made():
  model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
  return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

def loss(model, x):
  return (model(x) ** 2).mean()

def step(model, optimizer, x):
  value, grads = nnx.value_and_grad(loss)(model, x)
  optimizer.update(model, grads)
  return value

def batches():
  return jnp.ones((8, 4)), jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("data"))), before

def close(a, b):
  np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)

def is_everywhere(v):
  return v.sharding.is_fully_replicated and len(v.sharding.device_set) == 4

def arrays(*objects):
  return jax.tree.leaves(nnx.to_lojax(objects))
"""


def run(program, axes="auto", **environment):
  env = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join(sys.path),
    **environment,
  }
  text = textwrap.dedent(PRELUDE) + textwrap.dedent(program) + "\nprint('reached the end')\n"
  done = subprocess.run(
    [sys.executable, "-c", text, axes], env=env, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.endswith("reached the end\n")


both = pytest.mark.parametrize("axes", ["auto", "explicit"])


@both
def test_a_model_computes_in_the_mesh_whatever_calls_it(axes):
  run(
    """
    want = np.asarray(made()[0](before))
    ways = [
      lambda m, x: m(x),
      lambda m, x: jax.jit(lambda m, x: m(x))(m, x),
      lambda m, x: nnx.jit(lambda m, x: m(x))(m, x),
      lambda m, x: jax.jit(lambda x: m(x))(x),
      lambda m, x: nnx.jit(lambda x: m(x))(x),
      lambda m, x: jax.jit(lambda s, x: x @ s["kernel"][...] + s["bias"][...])(nnx.state(m), x),
      lambda m, x: jax.jit(lambda ms, x: ms[0](x))([m], x),
      lambda m, x: jax.jit(lambda v, x: x @ v[...] + m.bias)(m.kernel, x),
      lambda m, x: jnp.dot(x, m.kernel) + m.bias,
      lambda m, x: jax.jit(lambda vs, x: x @ vs["k"] + vs["b"])({"k": m.kernel, "b": m.bias}, x),
      lambda m, x: jax.vmap(lambda m, x: m(x), (None, 0))(m, x),
      lambda m, x: jax.vmap(lambda x: m(x))(x),
      lambda m, x: jax.lax.cond(True, lambda m, x: m(x), lambda m, x: m(x) * 2, m, x),
      lambda m, x: nnx.remat(lambda m, x: m(x))(m, x),
      lambda m, x: nnx.merge(*nnx.split(m))(x),
      lambda m, x: nnx.clone(m)(x),
      lambda m, x: copy.deepcopy(m)(x),
      lambda m, x: pickle.loads(pickle.dumps(m))(x),
      lambda m, x: nnx.to_lojax(m)(x),
      lambda m, x: x @ nnx.pure(m).kernel + m.bias,
      lambda m, x: nnx.jit(lambda m, x: m(x)).lower(m, x).compile()(m, x),
      lambda m, x: nnx.jit(lambda m, x: m(x)).lower(m, x).compile()(made()[0], x),
    ]
    with jax.set_mesh(mesh):
      for x in batches():
        for i, way in enumerate(ways):
          close(way(made()[0], x), want)
    """,
    axes,
  )


@both
def test_training_goes_on_inside_and_outside_as_if_there_were_no_mesh(axes):
  run(
    """
    for jit in (nnx.jit, jax.jit, lambda f: f):
      (model, optimizer), twin, traces = made(), made(), []
      count = jit(lambda *args: traces.append(None) or step(*args))
      plain = jit(step)
      want = [float(plain(*twin, before)) for _ in range(9)]
      twin = made()
      losses = [count(model, optimizer, before)]
      with jax.set_mesh(mesh):
        for x in batches():
          losses.append(count(model, optimizer, x))
        losses += [count(model, optimizer, x) for x in batches()]
      if jit(step) is not step or kind is AxisType.Auto:  # eager, JAX asks for the explicit mesh
        losses += [count(model, optimizer, before) for _ in range(2)]  # outside again
      for got, x in zip(losses, want):
        close(got, x)
      assert all(is_everywhere(x) for x in arrays(model, optimizer))
      for _ in losses:
        plain(*twin, before)
      for a, b in zip(arrays(model, optimizer), arrays(*twin), strict=True):
        close(a, b)
      assert jit(step) is step or len(traces) <= 5
    """,
    axes,
  )


@both
def test_what_is_compiled_outside_is_not_used_inside(axes):
  run(
    """
    model = made()[0]
    given, found = nnx.jit(lambda m, x: m(x)), nnx.jit(lambda x: model(x))
    ahead = given.lower(model, before).compile()
    want = [given(model, before), found(before), ahead(model, before)][0]
    with jax.set_mesh(mesh):
      close(ahead(model, before), want)  # this one stays as it is
      for x in batches():
        for _ in range(3):
          close(given(model, x), want)
          close(found(x), want)
    for _ in range(3):
      close(given(model, before), want)
      close(found(before), want)
    """,
    axes,
  )


@both
def test_all_handles_of_a_cell_move_with_it_and_once(axes):
  run(
    """
    model = made()[0]
    state, (_, other), ref = nnx.state(model), nnx.split(model), model.kernel.get_raw_value()
    then = epoch.value
    with jax.set_mesh(mesh):
      nnx.grad(loss)(model, before)
      moved = epoch.value
      assert moved > then
      for _ in range(3):
        nnx.grad(loss)(model, before), model(before), model.kernel[...]
      model.kernel[...] = jnp.ones((4, 2))
      assert epoch.value == moved
    assert is_everywhere(state["kernel"]) and is_everywhere(other["kernel"])
    assert model.kernel.get_raw_value() is ref and state["kernel"].get_raw_value() is ref
    assert state["kernel"][...].tolist() == [[1.0] * 2] * 4
    """,
    axes,
  )


@both
def test_cells_are_read_and_written_eagerly(axes):
  run(
    """
    committed = jax.device_put(jnp.full((3,), 5.0, jnp.float32), first)
    old = jnp.full((3,), 6.0)
    writes = [
      (lambda v: v.set_value(old), [6.0] * 3),
      (lambda v: v.set_value(committed), [5.0] * 3),
      (lambda v: v.set_value(jnp.full((3,), 7.0)), [7.0] * 3),
      (lambda v: v.__setitem__(..., 2.0), [2.0] * 3),
      (lambda v: v.__setitem__(0, 2.0), [2.0, 0.0, 0.0]),
      (lambda v: v.__setitem__(slice(1, None), [2.0, 3.0]), [0.0, 2.0, 3.0]),
      (lambda v: v.__setitem__(..., v + 1), [1.0] * 3),
      (lambda v: nnx.update(nnx.Dict(v=v), {"v": old}), [6.0] * 3),
      (lambda v: nnx.update(nnx.Dict(v=v), nnx.state(nnx.Dict(v=source))), [9.0] * 3),
      (lambda v: None, [0.0] * 3),
    ]
    source = nnx.Variable(jnp.full((3,), 9.0))
    for write, want in writes:
      v = nnx.Variable(jnp.zeros(3))
      with jax.set_mesh(mesh):
        write(v)
        assert v[...].tolist() == want and is_everywhere(v)
        assert (v + jnp.ones(3)).tolist() == [x + 1 for x in want]
    tree = nnx.Variable({"a": jnp.zeros(3), "keys": jax.random.split(jax.random.key(0), 4)})
    with jax.set_mesh(mesh):
      tree.set_value({"a": jnp.ones(3), "keys": jax.random.split(jax.random.key(1), 4)})
      assert tree[...]["a"].tolist() == [1.0] * 3
    """,
    axes,
  )


@both
def test_writes_by_closure_arrive(axes):
  run(
    """
    def write(v):
      def f(x):
        v[...] = x + 1
        return x
      return f

    ways = [
      lambda f, x: jax.jit(f)(x),
      lambda f, x: nnx.jit(f)(x),
      lambda f, x: nnx.cond(True, f, lambda x: x, x),
      lambda f, x: jax.lax.cond(True, f, lambda x: x, x),
      lambda f, x: nnx.scan(lambda c, _: (f(c), None), length=2)(x, None)[0],
    ]
    for way in ways:
      v = nnx.Variable(jnp.zeros(3))
      with jax.set_mesh(mesh):
        way(write(v), jnp.ones(3))
        assert v[...].tolist() == [2.0] * 3 and is_everywhere(v), way
    """,
    axes,
  )


@both
def test_random_streams_draw_the_same_keys(axes):
  run(
    """
    ways = [
      lambda r: r.params(),
      lambda r: jax.jit(lambda r: r.params())(r),
      lambda r: nnx.jit(lambda r: r.params())(r),
      lambda r: r.fork().params(),
    ]
    old, keys = jax.random.key(0), jax.random.split(jax.random.key(3), 4)
    for way in ways:
      want = np.asarray(jax.random.key_data(way(nnx.Rngs(0))))
      rngs = nnx.Rngs(0)
      with jax.set_mesh(mesh):
        assert (jax.random.key_data(way(rngs)) == want).all()
        assert (jax.random.key_data(way(nnx.Rngs(old))) == want).all()
    dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    want = nnx.Dropout(0.5, rngs=nnx.Rngs(0))(before)
    with jax.set_mesh(mesh):
      close(dropout(jnp.ones((8, 4))), want)
      stack = nnx.vmap(lambda key: nnx.Linear(4, 2, rngs=nnx.Rngs(key)))(keys)
      assert stack.kernel.shape == (4, 4, 2)
    """,
    axes,
  )


@both
def test_new_variables_take_arrays_of_before(axes):
  run(
    """
    committed = jax.device_put(before, first)
    with nnx.use_hijax(False):
      lojax = made()[0]
    with jax.set_mesh(mesh):
      for x in (before, committed):
        made_in_jit = nnx.jit(lambda: nnx.Param(x))()
        for v in (nnx.Param(x), jax.jit(lambda: nnx.Param(x)[...])(), made_in_jit):
          close(v[...] + jnp.ones((8, 4)), 2 * np.ones((8, 4)))
        v = nnx.Dict(v=nnx.Param(x))
        double = nnx.jit(lambda v: v["v"].set_value(v["v"] * 2))
        double(v), double(v)
        close(v["v"], 4 * np.ones((8, 4)))
        close(x, np.ones((8, 4)))  # what the user gave is still there
      assert is_everywhere(nnx.to_hijax(lojax).kernel) or kind is AxisType.Auto
      close(nnx.to_hijax(lojax)(jnp.ones((8, 4))), lojax(jnp.ones((8, 4))))
    """,
    axes,
  )


@both
def test_a_call_that_raises_leaves_the_values(axes):
  run(
    """
    class Stop(Exception): pass

    def wrong(model, x):
      model.kernel[...] = model.kernel * 3
      raise Stop

    for jit in (nnx.jit, jax.jit):
      model = made()[0]
      want = np.asarray(model.kernel)
      with jax.set_mesh(mesh):
        try:
          jit(wrong)(model, before)
        except Stop:
          pass
        assert (np.asarray(model.kernel) == want).all()
        assert jit(lambda m, x: m(x))(model, before).shape == (8, 2)
    """,
    axes,
  )


def test_none_has_moved_if_one_cannot():
  run("""
  model = made()[0]
  put = jax.device_put
  calls = []

  def failing(x, *args):
    calls.append(x)
    if len(calls) == 2:
      raise MemoryError
    return put(x, *args)

  then = epoch.value
  jax.device_put = failing
  try:
    with jax.set_mesh(mesh):
      try:
        jax.jit(lambda m, x: m(x))(model, before)
      except MemoryError:
        calls.append("raised")
  finally:
    jax.device_put = put
  assert calls[-1] == "raised" and epoch.value == then
  assert all(v.sharding.device_set == {first} for v in (model.kernel, model.bias))
  model(before)
  """)


def test_a_step_of_another_thread_outside_of_the_mesh_is_not_lost():
  run("""
  import threading
  model = made()[0]
  add = nnx.jit(lambda m: m.bias.set_value(m.bias + 1))
  add(model)

  def outside():
    for _ in range(20):
      add(model)

  put = jax.device_put
  def slow(x, *args):  # a step ends while a cell is being copied
    jax.device_put = put
    thread = threading.Thread(target=outside)
    thread.start()
    thread.join()
    return put(x, *args)

  jax.device_put = slow
  with jax.set_mesh(mesh):
    add(model)
  assert model.bias[...].tolist() == [22.0] * 2 and is_everywhere(model.bias)
  """)


def test_what_has_been_in_the_mesh_and_what_has_not_meet_outside():
  run("""
  for jit in (nnx.jit, lambda f: f):
    (model, optimizer), twin = made(), made()
    elsewhere = nnx.Variable(jnp.ones(2))
    with jax.set_mesh(mesh):
      jnp.dot(before, model.kernel)  # the bias has not been used, nor the optimizer
    for _ in range(3):
      close(jit(step)(model, optimizer, before), step(*twin, before))
    assert all(is_everywhere(x) for x in arrays(model, optimizer))
    assert all(x.sharding.device_set == {first} for x in arrays(*twin, elsewhere))
  """)


def test_cells_that_someone_has_laid_out_stay_and_other_devices_are_refused():
  run("""
  rows = nnx.Variable(jnp.arange(8.0))
  nnx.device_put(rows, NamedSharding(mesh, P("data")))
  small = jax.sharding.Mesh(np.array(jax.devices()[2:]), ("data",))
  one = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
  v = nnx.Variable(jnp.zeros(2))
  with jax.set_mesh(one):
    v[...] = jnp.ones(2)
    assert v.sharding.device_set == {first}
  with jax.set_mesh(mesh):
    rows[...] = rows * 2
    assert rows.sharding == NamedSharding(mesh, P("data"))
  with jax.set_mesh(small):  # none of its devices has the cell
    try:
      v[...]
      raise AssertionError
    except ValueError as error:
      assert "incompatible devices" in str(error)
  assert v.sharding.device_set == {first}
  """)


def test_files_are_written_in_the_mesh():
  run("""
  import tempfile
  model = made()[0]
  with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
    nnx.save_safetensors(model, folder + "/a.safetensors")
    other = made()[0]
    nnx.load_safetensors(other, folder + "/a.safetensors")
    close(other.kernel, model.kernel)
    print(model)
  """)


def test_without_private_jax_the_refusal_is_jaxs_own_and_device_put_before_helps():
  run(
    """
    model = made()[0]
    with jax.set_mesh(mesh):
      try:
        jax.jit(lambda m, x: m(x))(model, before)
        raise AssertionError
      except ValueError as error:
        assert "incompatible devices" in str(error)
    nnx.device_put(model, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
      jax.jit(lambda m, x: m(x))(model, before)
    """,
    REFAX_PUBLIC_JAX="1",
  )


@both
def test_the_cells_of_a_call_follow_a_batch_that_is_divided_up(axes):
  run(
    """
    data = jax.device_put(jnp.arange(32.0).reshape(8, 4), NamedSharding(mesh, P("data")))
    noise = lambda m, r, x: m(x) + jax.random.normal(r.noise(), (8, 2))
    third = lambda f: lambda *args: f(args[2])
    ways = {
      "argument": lambda m, r: nnx.jit(noise),
      "keyword": lambda m, r: lambda m, r, x: nnx.jit(noise)(m, x=x, r=r),
      "closure": lambda m, r: third(nnx.jit(lambda x: noise(m, r, x))),
      "container": lambda m, r: lambda m, r, x: nnx.jit(lambda a: noise(*a))([m, r, x]),
      "compiled": lambda m, r: nnx.jit(noise).lower(m, r, data).compile(),
      "remat": lambda m, r: nnx.jit(nnx.remat(noise)),
    }
    for name, way in ways.items():
      twin, seed = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Rngs(noise=1)
      want = [noise(twin, seed, np.asarray(data)) for _ in range(3)]
      model, rngs = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Rngs(noise=1)
      f = way(model, rngs)
      for w in want:
        y = f(model, rngs, data)
        close(y, w)
        assert y.sharding.spec[:1] == ("data",), (name, y.sharding)
      assert all(is_everywhere(x) for x in arrays(model)), name
      close(model(np.asarray(data)), twin(np.asarray(data)))
    """,
    axes,
  )


def test_a_batch_that_is_divided_up_may_come_after_others():
  run("""
  data = jax.device_put(before, NamedSharding(mesh, P("data")))
  compiled = nnx.jit(step)
  for by_closure in (False, True):
    (model, optimizer), twin = made(), made()
    f = nnx.jit(lambda x: step(model, optimizer, x))
    for x in (before, before, data, data, before, np.asarray(data)):
      close(f(x) if by_closure else compiled(model, optimizer, x), step(*twin, before))
    assert all(is_everywhere(x) for x in arrays(model, optimizer.opt_state))
  """)


def test_an_eager_transform_of_a_model_and_a_batch_that_is_divided_up():
  run("""
  data = jax.device_put(before, NamedSharding(mesh, P("data")))
  (model, _), (twin, _) = made(), made()
  close(nnx.grad(loss)(model, data)["kernel"][...], nnx.grad(loss)(twin, before)["kernel"][...])
  """)


def test_state_beside_a_model_on_a_mesh_follows_it():
  run("""
  model, rngs, count = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Rngs(noise=1), nnx.Variable(0)
  elsewhere = nnx.Variable(jnp.ones(2))
  nnx.device_put(model.kernel, NamedSharding(mesh, P("data")))

  @nnx.jit
  def f(model, rngs, count, x):
    count[...] += 1
    return model(x) + jax.random.normal(rngs.noise(), (8, 2))

  twin, seed = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Rngs(noise=1)
  for i in range(3):
    close(f(model, rngs, count, before), twin(before) + jax.random.normal(seed.noise(), (8, 2)))
    assert int(count) == i + 1
  assert model.kernel.sharding == NamedSharding(mesh, P("data"))
  assert is_everywhere(count) and is_everywhere(model.bias)
  assert elsewhere.sharding.device_set == {first}
  """)


def test_a_batch_on_other_devices_is_refused_and_nothing_moves():
  run("""
  small = jax.sharding.Mesh(np.array(jax.devices()[2:]), ("data",))
  data = jax.device_put(before, NamedSharding(small, P("data")))
  model, optimizer = made()
  try:
    nnx.jit(step)(model, optimizer, data)
    raise AssertionError
  except ValueError as error:
    assert "incompatible devices" in str(error) and "fix: lay all of them out" in str(error)
  assert all(x.sharding.device_set == {first} for x in arrays(model, optimizer))
  nnx.jit(step)(model, optimizer, before)
  """)


def test_a_cell_that_plain_jit_has_read_by_closure_stays_and_is_refused():
  run("""
  data = jax.device_put(before, NamedSharding(mesh, P("data")))
  model, optimizer = made()
  plain = jax.jit(lambda x: model(x))
  want = np.asarray(plain(before))
  try:
    nnx.jit(lambda model, x: model(x))(model, data)
    raise AssertionError
  except ValueError as error:
    assert "fix: lay all of them out" in str(error)
  close(plain(before), want)
  close(model(before), want)
  """)


def test_what_is_compiled_ahead_of_time_moves_a_cell_by_closure_first():
  run("""
  data = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("data")))
  v = nnx.Variable(jnp.zeros(8))

  @nnx.jit
  def add(x):
    v[...] += x
    return v[...]

  for i in (1, 3, 5):
    compiled = add.lower(data).compile()
    close(compiled(data), i * np.arange(8.0))
    close(compiled(data), (i + 1) * np.arange(8.0))
  """)
