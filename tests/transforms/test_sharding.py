"""nnx.shard_map on four devices, in a process of its own: JAX fixes their number when it starts."""

import os
import subprocess
import sys
import textwrap

PRELUDE = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from refax import nnx
from refax.errors import TreeMismatchError

assert jax.device_count() == 4
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
x = jnp.arange(16.0).reshape(8, 2)

def place(tree):
  # Variables live where they were made: under jit, they must be on the mesh before.
  return nnx.to_hijax(jax.device_put(nnx.to_lojax(tree), NamedSharding(mesh, P())))

class Node(nnx.Module):
  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)
"""


def run(code):
  """Run code after the prelude with four CPU devices; its last line must be reached."""
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
  code = PRELUDE + textwrap.dedent(code) + "\nprint('reached the end')"
  env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.endswith("reached the end\n")


def test_state_is_replicated_sharded_written_and_created():
  run("""
  for jit in (lambda f: f, nnx.jit):
    # replicated parameters, a sharded batch, a statistic that all devices agree on
    norm = place(nnx.BatchNorm(2, momentum=0.5, axis_name="data", rngs=nnx.Rngs(0)))
    whole = nnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
    f = nnx.shard_map(
      lambda norm, x: norm(x), mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
    )
    y = jit(f)(norm, x)
    np.testing.assert_allclose(y, whole(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], whole.mean[...], rtol=1e-5)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2)

    # sharded state by filter, seen as a shard inside, written back in its layout
    m = place(Node(w=nnx.Param(jnp.arange(8.0)), n=nnx.Variable(0)))
    shapes = []
    def step(m, x):
      shapes.append(m.w.shape)
      m.w[...] += jax.lax.axis_index("data")
      m.n += 1
      return m.w * x[:, 0]
    specs = nnx.StateAxes({nnx.Param: P("data"), ...: P()})
    f = nnx.shard_map(step, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"))
    y = jit(f)(m, x)
    w = np.arange(8.0) + np.repeat(np.arange(4), 2)
    np.testing.assert_allclose(m.w[...], w)
    np.testing.assert_allclose(y, w * x[:, 0])
    assert int(m.n) == 1 and shapes[0] == (2,)
    m.w[...] = 0.0  # and it stays writable
    assert float(m.w.sum()) == 0.0

    # objects created inside
    make = nnx.shard_map(
      lambda x: Node(v=nnx.Variable(x * 2)), mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    made = jit(make)(x)
    np.testing.assert_allclose(made.v[...], 2 * x)
    assert made.v.is_hijax
  """)


def test_closures_collectives_gradients_and_errors():
  run("""
  # state by closure is replicated, and written with what all devices agree on
  total = nnx.Variable(jnp.zeros(2))
  def add(x):
    total[...] += jax.lax.psum(x.sum(0), "data")
    return x
  nnx.shard_map(add, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(x)
  np.testing.assert_allclose(total[...], x.sum(0))

  # the gradient of replicated parameters is the sum over shards
  m, twin = (nnx.Linear(2, 1, rngs=nnx.Rngs(0)) for _ in range(2))
  forward = nnx.shard_map(
    lambda m, x: jnp.tanh(m(x)), mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
  )
  got = nnx.jit(nnx.grad(lambda m: forward(m, x).sum()))(place(m))
  want = nnx.grad(lambda m: jnp.tanh(m(x)).sum())(twin)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)

  # each shard draws from a stream of its own
  noise = nnx.shard_map(
    lambda rngs, x: x * 0 + jax.vmap(lambda r: r.normal((2,)))(rngs),
    mesh=mesh, in_specs=P("data"), out_specs=P("data"),
  )(nnx.Rngs(0).split(8), x)
  assert len(set(np.asarray(noise).ravel().tolist())) == 16

  # errors leave everything as it was
  v = nnx.Variable(jnp.zeros(8))
  def broken(v):
    v[...] = 1.0
    raise RuntimeError("boom")
  for f, error in ((broken, RuntimeError), (lambda v: v.set_value(jnp.ones(8)), ValueError)):
    try:
      nnx.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P())(v)
    except error as e:
      assert error is RuntimeError or "float32[8], the Variable holds float32[2]" in str(e), e
    else:
      raise AssertionError("no error")
    assert v[...].tolist() == [0.0] * 8
  try:
    nnx.shard_map(broken, mesh=mesh, in_specs=(P(), P()), out_specs=P())(v)
  except TreeMismatchError as e:
    assert "2 axes for 1 positional arguments" in str(e)
  else:
    raise AssertionError("no error")
  """)


def test_sharded_state_takes_the_steady_way_of_nnx_jit_and_stays_where_it_is():
  run("""
  import optax
  from jax.sharding import SingleDeviceSharding

  grid = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  sharded = lambda *spec: NamedSharding(grid, P(*spec))

  def made():
    model = nnx.Sequential(
      nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1))
    )
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

  def spread(tree):
    spec = lambda x: sharded(None, "model") if x.ndim == 2 and x.shape[1] % 2 == 0 else sharded()
    lojax = nnx.to_lojax(tree)
    return nnx.to_hijax(jax.device_put(lojax, jax.tree.map(spec, lojax)))

  def step(model, optimizer, x):
    loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
    optimizer.update(model, grads)
    return loss

  def places(tree):
    return [x.sharding for x in jax.tree.leaves(nnx.to_lojax(tree))]

  traces = []
  def counted(*args):
    traces.append(None)
    return step(*args)

  x = jax.random.normal(jax.random.key(0), (8, 4))
  one, many = made(), spread(made())
  before = places(many)
  fast, plain = nnx.jit(counted), jax.jit(step)
  for i in range(4):
    loss = fast(*many, jax.device_put(x, sharded("data")))
    np.testing.assert_allclose(loss, plain(*one, x), rtol=1e-5)
  assert fast._fast.find((*many, jax.device_put(x, sharded("data")))) is not None
  assert len(traces) == 1
  assert all(a.is_equivalent_to(b, 2) for a, b in zip(places(many), before))
  assert not all(place.is_fully_replicated for place in before)
  for a, b in zip(jax.tree.leaves(nnx.to_lojax(one)), jax.tree.leaves(nnx.to_lojax(many))):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

  # the same structure elsewhere is a compilation of its own; neither moves
  three = made()
  for _ in range(2):
    fast(*three, x), fast(*many, x)
  assert all(isinstance(s, SingleDeviceSharding) for s in places(three))
  assert all(a.is_equivalent_to(b, 2) for a, b in zip(places(many), before))

  # what was computed from replicated data is stored where the Variable is
  v = nnx.to_hijax(jax.device_put(nnx.to_lojax(nnx.Variable(jnp.zeros((4, 4)))), sharded("data")))
  write = nnx.jit(lambda v, x: v.set_value(x))
  for i in range(3):
    write(v, jax.device_put(jnp.full((4, 4), float(i)), sharded()))
    assert v[...].sharding.is_equivalent_to(sharded("data"), 2)
    np.testing.assert_array_equal(v, np.full((4, 4), i))

  with jax.set_mesh(grid):  # another context
    fast(*many, x)
    write(v, jnp.ones((4, 4)))
  fast(*many, x)
  assert all(a.is_equivalent_to(b, 2) for a, b in zip(places(many), before))
  """)
