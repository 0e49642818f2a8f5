import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx
from refax.errors import InvalidArgumentError

X = jnp.linspace(-1, 1, 12).reshape(4, 3)
MIXED = nnx.Precision(param=jnp.float32, compute=jnp.bfloat16, output=jnp.float32)


class Net(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(3, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs)
    self.blocks = nnx.Stack(nnx.Linear, 2, 8, 8, rngs=rngs)
    self.ids = nnx.Param(jnp.arange(3))
    self.tied = self.linear.kernel

  def __call__(self, x):
    y = self.norm(self.linear(x))
    return self.blocks(self.attention(y[None])[0])


def test_a_policy_reaches_every_layer_and_every_param():
  net = Net(nnx.Rngs(0))
  half = nnx.Precision(param=jnp.bfloat16, compute=jnp.float16, matmul="highest")
  half.apply(net)
  floats = {
    str(v.dtype) for path, v in nnx.to_flat_state(nnx.state(net, nnx.Param)) if path != ("ids",)
  }
  assert floats == {"bfloat16"}
  assert net.ids.dtype == jnp.int32 and net.norm.mean.dtype == jnp.float32
  assert net.tied is net.linear.kernel
  for layer in (net.linear, net.norm, net.attention.query, net.blocks.layers):
    assert layer.dtype == jnp.float16 and layer.param_dtype == jnp.bfloat16
  assert net.linear.precision == net.attention.out.precision == "highest"
  assert net(X.astype(jnp.float16)).dtype == jnp.float16


def test_what_is_none_stays():
  net = Net(nnx.Rngs(0))
  before = nnx.graphdef(net)
  nnx.Precision().apply(net)
  assert nnx.graphdef(net) == before
  tree = {"x": X}
  assert nnx.Precision().cast_output(tree) is tree


def test_mixed_precision_computes_small_and_keeps_parameters_large():
  net, twin = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
  MIXED.apply(net)
  y, want = net(X.astype(jnp.bfloat16)), twin(X)
  assert y.dtype == jnp.bfloat16
  assert MIXED.cast_output(y).dtype == jnp.float32
  np.testing.assert_allclose(MIXED.cast_output(y), want, atol=0.1)
  assert float(jnp.abs(y.astype(jnp.float32) - want).max()) > 0
  text = str(jax.make_jaxpr(lambda net, x: net.linear(x))(net, X))
  (product,) = [line for line in text.splitlines() if "dot_general[" in line]
  assert "bf16[4,8]" in product


def test_training_in_mixed_precision_moves_float32_parameters():
  net = nnx.Sequential(
    nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 1, rngs=nnx.Rngs(1))
  )
  MIXED.apply(net)
  optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)

  @nnx.jit
  def step(net, optimizer):
    loss = lambda net: ((MIXED.cast_output(net(X)) - 0.5) ** 2).mean()
    value, grads = nnx.value_and_grad(loss)(net)
    optimizer.update(net, grads)
    return value, grads

  losses = []
  for _ in range(30):
    value, grads = step(net, optimizer)
    losses.append(float(value))
  assert losses[-1] < losses[0] / 2
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
  assert net[0].kernel.dtype == jnp.float32


def test_accumulation_in_another_dtype():
  linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  nnx.Precision(compute=jnp.bfloat16, accumulate=jnp.float32).apply(linear)
  text = str(jax.make_jaxpr(lambda m, x: m(x))(linear, X))
  assert "preferred_element_type=float32" in text


@pytest.mark.parametrize("hijax", [True, False])
def test_params_keep_their_identity_and_kind(hijax):
  with nnx.use_hijax(hijax):
    linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  kernel = linear.kernel
  nnx.Precision(param=jnp.bfloat16).apply(linear)
  assert linear.kernel is kernel and kernel.is_hijax == hijax and kernel.dtype == jnp.bfloat16
  call = nnx.jit(lambda m, x: m(x))
  assert call(linear, X).dtype == jnp.float32
  nnx.Precision(compute=jnp.bfloat16).apply(linear)
  assert call(linear, X).dtype == jnp.bfloat16


def test_casts_of_trees_leave_what_is_no_float():
  tree = {"x": X, "n": jnp.arange(3), "key": jax.random.key(0), "v": nnx.Variable(1.0)}
  got = MIXED.cast_compute(tree)
  assert got["x"].dtype == got["v"].dtype == jnp.bfloat16
  assert got["n"].dtype == jnp.int32 and got["key"].dtype == tree["key"].dtype
  assert MIXED.cast_param({"x": got["x"]})["x"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.int32, "no dtype", bool])
def test_only_floating_point_dtypes_are_taken(dtype):
  with pytest.raises(
    InvalidArgumentError, match=r"compute=(.|\n)*fix: pass a floating-point dtype"
  ):
    nnx.Precision(compute=dtype)
