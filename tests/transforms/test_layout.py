"""in_shardings and out_shardings of nnx.jit, on one device and on four."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from refax import nnx
from refax.errors import TreeMismatchError

MESH = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("hijax", [True, False])
def test_arguments_state_and_results_lie_where_they_are_to_be(hijax):
  with nnx.use_hijax(hijax):
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    rows = NamedSharding(MESH, P("data"))
    state = nnx.StateAxes({nnx.PathContains("kernel"): rows, ...: NamedSharding(MESH, P())})
    f = nnx.jit(lambda m, x: m(x), in_shardings=(state, rows), out_shardings=rows)
    for _ in range(3):
      y = f(model, jnp.ones((4, 2)))
    assert model.kernel.sharding == rows and y.sharding.spec == P("data")


def test_static_arguments_have_no_place_and_a_spec_takes_the_mesh_that_is_set():
  f = nnx.jit(lambda x, n: x * n, static_argnums=1, in_shardings=(P("data"),))
  with pytest.raises(TreeMismatchError, match="without a mesh"):
    f(jnp.ones(2), 2)
  with jax.set_mesh(MESH):
    assert f(jnp.ones(2), 2).tolist() == [2.0, 2.0]
  with pytest.raises(TreeMismatchError, match="2 shardings for 1 positional"):
    nnx.jit(lambda x: x, in_shardings=(None, None))(jnp.ones(2))


def test_prefixes_of_objects_are_axes_and_shardings():
  model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  axes = nnx.prefix(model, {nnx.PathContains("kernel"): 0, ...: None})
  assert (axes.kernel, axes.bias) == (0, None)
  stacked = nnx.vmap(lambda m: m, in_axes=(axes,), out_axes=axes)(model)
  assert stacked.kernel.shape == (2, 2)
  shardings = nnx.prefix(model, lambda path, x: NamedSharding(MESH, P()))
  assert nnx.jit(lambda m: m.kernel[...], in_shardings=(shardings,))(model).shape == (2, 2)


def test_what_an_argument_gains_has_the_axis_that_its_filters_say():
  class Net(nnx.Module):
    @nnx.vmap(in_axes=(nnx.StateAxes({nnx.Param: 0, ...: None}), 0))
    def __init__(self, key):
      self.w = nnx.Param(jax.random.normal(key, (3,)))
      self.count = nnx.BatchStat(jnp.zeros(2))

  net = Net(jax.random.split(jax.random.key(0), 4))
  assert net.w.shape == (4, 3) and net.count.shape == (2,)


@pytest.mark.slow
def test_four_devices():
  program = textwrap.dedent("""
    import jax, jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec as P, AxisType
    from refax import nnx
    for kind in (AxisType.Auto, AxisType.Explicit):
      mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
      rows, all_ = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
      for hijax in (True, False):
        with nnx.use_hijax(hijax):
          model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
          want = model(jnp.ones((8, 8)))
          f = nnx.jit(lambda m, x: m(x), in_shardings=(all_, rows), out_shardings=rows)
          for _ in range(3):
            y = f(model, jnp.ones((8, 8)))
          assert y.sharding.spec == P("data") or y.sharding.spec == P("data", None), y.sharding
          assert jnp.allclose(jax.device_get(y), want)
          assert model.kernel.sharding == all_
    print("done")
  """)
  flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
  done = subprocess.run(
    [sys.executable, "-c", program],
    env=os.environ | flags,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.stdout == "done\n", done.stderr
