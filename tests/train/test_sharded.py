"""The state of training is sharded as the parameters are: in a process that has 8 devices."""

import os
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from refax import nnx

assert len(jax.devices()) == 8
mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.%(axis)s,))
if %(set_mesh)s:
  jax.set_mesh(mesh)
rows, whole = NamedSharding(mesh, P("x", None)), NamedSharding(mesh, P())


def build():
  net = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
  net.kernel = nnx.Param(jax.device_put(net.kernel[...], rows))
  net.bias = nnx.Param(jax.device_put(net.bias[...], whole))
  return net


def same(v, sharding):
  return v.sharding.is_equivalent_to(sharding, v.ndim)


def check(net, optimizer, ema):
  adam = optimizer.opt_state[0]
  sharded = [net.kernel, adam.mu["kernel"], adam.nu["kernel"], ema.params["kernel"]]
  copied = [net.bias, adam.mu["bias"], adam.count, optimizer.step, optimizer.skipped, ema.step]
  assert all(same(v, rows) for v in sharded), [v.sharding for v in sharded]
  assert all(same(v, whole) for v in [*copied, ema.params["bias"]])
  assert {s.data.shape for s in adam.mu["kernel"][...].addressable_shards} == {(2, 8)}


def step(net, optimizer, ema, average, loss_scale, x):
  value, grads = loss_scale.value_and_grad(lambda n: (n(x) ** 2).mean())(net)
  optimizer.update(net, grads)
  ema.update(net)
  average.update(values=net(x), loss=value)


x = jax.device_put(jnp.cos(jnp.arange(128.0)).reshape(8, 16), NamedSharding(mesh, P(%(x)s)))
with jax.set_mesh(mesh):
  average, loss_scale = nnx.metrics.Average(), nnx.LossScale()
net = build()
optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param, skip_nonfinite=True)
ema = nnx.EMA(net, 0.9, only=nnx.Param, debias=True)
check(net, optimizer, ema)
for run in (step, jax.jit(step), nnx.jit(step)):
  run(net, optimizer, ema, average, loss_scale, x)
  check(net, optimizer, ema)
before = np.asarray(net.kernel)
with ema.applied(net):
  assert same(net.kernel, rows)
np.testing.assert_array_equal(net.kernel, before)
assert same(net.kernel, rows) and same(ema.apply_to(net).kernel, rows)
assert int(optimizer.step) == 3 and int(average.count) == 3 * 64

# all on one device that is not the first
device = jax.devices()[3]
if not %(set_mesh)s:
  net = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
  for name in ("kernel", "bias"):
    setattr(net, name, nnx.Param(jax.device_put(getattr(net, name)[...], device)))
  optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)
  y = jax.device_put(jnp.ones((8, 16)), device)
  grad = nnx.grad(lambda n, y: n(y).sum())
  jax.jit(lambda n, o, y: o.update(n, grad(n, y)) and None)(net, optimizer, y)
  assert optimizer.opt_state[0].count.devices() == {device}
print("right")
"""


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_state_is_sharded_as_the_parameters_and_stays_so(mode):
  explicit = mode == "explicit"
  names = {"axis": mode.capitalize(), "set_mesh": explicit, "x": "" if explicit else '"x"'}
  env = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join(sys.path),
  }
  program = textwrap.dedent(PROGRAM) % names
  run = subprocess.run(
    [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False
  )
  assert run.stdout.strip() == "right", run.stderr
