import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx
from refax.errors import AliasError, InvalidArgumentError, ShapeMismatchError, TreeMismatchError

X = jax.random.normal(jax.random.key(0), (4, 3))
N = 5


class Block(nnx.Module):
  """A layer with state of every sort: parameters, statistics, a random stream."""

  def __init__(self, size, *, rngs):
    self.linear = nnx.Linear(size, size, rngs=rngs)
    self.norm = nnx.BatchNorm(size, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x, shift=0.0):
    return self.dropout(jnp.tanh(self.norm(self.linear(x))) + shift)


def one_after_the_other(layers, x, **kwargs):
  for layer in layers:
    x = layer(x, **kwargs)
  return x


def assert_same_state(stack, layers):
  got = nnx.to_pure_dict(nnx.state(stack))
  want = nnx.to_pure_dict(nnx.state(nnx.Stack.of(layers)))
  as_data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(as_data(a), as_data(b), rtol=1e-5, atol=1e-6), got, want
  )


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, nnx.jit], ids=["eager", "jit", "nnx.jit"])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("unroll", [1, 2])
def test_a_stack_equals_its_layers_one_after_the_other(wrap, remat, unroll):
  stack = nnx.Stack(Block, N, 3, rngs=nnx.Rngs(0), remat=remat, unroll=unroll)
  layers = list(stack)
  step = wrap(lambda stack, x: stack(x, shift=0.5))
  for _ in range(2):
    want = one_after_the_other(layers, X, shift=0.5)
    np.testing.assert_allclose(step(stack, X), want, rtol=1e-5, atol=1e-6)
  assert_same_state(stack, layers)


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_equal_those_of_the_layers(remat):
  stack = nnx.Stack(Block, N, 3, rngs=nnx.Rngs(0), remat=remat)
  layers = nnx.List(stack)
  grad = lambda f, model: jax.jit(nnx.grad(lambda model: (f(model) ** 2).sum()))(model)
  got = grad(lambda stack: stack(X), stack)
  want = grad(lambda layers: one_after_the_other(layers, X), layers)
  for i in range(N):
    for name in ("kernel", "bias"):
      np.testing.assert_allclose(
        got["layers"]["linear"][name][i], want[i]["linear"][name][...], rtol=1e-4, atol=1e-5
      )
  assert_same_state(stack, list(layers))  # written once, also where it was recomputed


def test_layers_have_streams_and_weights_of_their_own():
  stack = nnx.Stack(Block, N, 3, rngs=nnx.Rngs(0))
  keys = jax.random.key_data(stack.layers.dropout.rngs.key[...])
  for leaf in (stack.layers.linear.kernel[...], keys):
    assert len(np.unique(np.asarray(leaf), axis=0)) == N


def test_what_is_compiled_does_not_grow_with_the_number_of_layers():
  def equations(n):
    stack = nnx.Stack(Block, n, 3, rngs=nnx.Rngs(0))
    step = nnx.grad(lambda stack: stack(X).sum())
    return str(jax.make_jaxpr(lambda stack: nnx.to_pure_dict(step(stack)))(stack)).count("\n")

  assert equations(3) == equations(30)


def test_it_is_a_sequence_of_copies_of_its_layers():
  stack = nnx.Stack(nnx.Linear, N, 3, 3, rngs=nnx.Rngs(0))
  assert len(stack) == N and len(list(stack)) == N
  np.testing.assert_array_equal(stack[-1].kernel[...], stack.layers.kernel[N - 1])
  np.testing.assert_array_equal(stack[1:3].layers.kernel[...], stack.layers.kernel[1:3])
  with pytest.raises(IndexError):
    stack[N]
  layer = stack[0]
  layer.kernel[...] = 0.0
  assert float(jnp.abs(stack.layers.kernel[0]).sum()) > 0
  stack[0] = layer
  assert float(jnp.abs(stack.layers.kernel[0]).sum()) == 0
  assert float(jnp.abs(stack.layers.kernel[1]).sum()) > 0


@pytest.mark.parametrize("hijax", [True, False])
def test_to_layers_and_back(hijax):
  with nnx.use_hijax(hijax):
    stack = nnx.Stack(Block, N, 3, rngs=nnx.Rngs(0))
  layers = list(stack)
  assert layers[0].linear.kernel.is_hijax == hijax
  assert isinstance(layers[0].norm.mean, nnx.BatchStat)
  again = nnx.Stack.of(layers)
  assert again.layers.linear.kernel.is_hijax == hijax
  assert_same_state(again, layers)
  assert nnx.graphdef(again) == nnx.graphdef(stack)


def test_modes_reach_the_layers():
  stack = nnx.Stack(Block, N, 3, rngs=nnx.Rngs(0))
  stack.eval()
  np.testing.assert_array_equal(stack(X), stack(X))
  assert not stack[0].dropout.rngs.count[...].any()


def test_an_ensemble_of_stacks():
  build = nnx.vmap(lambda rngs: nnx.Stack(Block, N, 3, rngs=rngs))
  stacks = build(nnx.Rngs(0).split(2))
  out = nnx.vmap(lambda stack, x: stack(x), in_axes=(0, None))(stacks, X)
  assert out.shape == (2, 4, 3)
  assert stacks.layers.norm.mean.shape == (2, N, 3)
  assert bool((stacks.layers.dropout.rngs.count[...] == 1).all())


def test_a_stack_of_stacks():
  inner = lambda *, rngs: nnx.Stack(nnx.Linear, 2, 3, 3, rngs=rngs)
  stack = nnx.Stack(inner, 3, rngs=nnx.Rngs(0))
  layers = [layer for inner in stack for layer in inner]
  assert len(layers) == 6
  np.testing.assert_allclose(stack(X), one_after_the_other(layers, X), rtol=1e-5)


def test_what_layers_sow_is_stacked():
  class Sows(Block):
    def __call__(self, x):
      self.sow(nnx.Intermediate, "mean", x.mean())
      return super().__call__(x)

  stack = nnx.Stack(Sows, N, 3, rngs=nnx.Rngs(0))
  stack(X)
  (means,) = nnx.pop(stack, nnx.Intermediate)["layers"]["mean"]
  assert means.shape == (N,)
  assert float(means[0]) == pytest.approx(float(X.mean()))


def test_it_trains():
  stack = nnx.Stack(Block, 3, 3, rngs=nnx.Rngs(0), remat=True)
  stack.set_attributes(nnx.Dropout, rate=0.0)
  optimizer = nnx.Optimizer(stack, optax.adam(3e-2), wrt=nnx.Param)

  @jax.jit
  def step(stack, optimizer):
    loss, grads = nnx.value_and_grad(lambda stack: ((stack(X) - 0.3) ** 2).mean())(stack)
    optimizer.update(stack, grads)
    return loss

  losses = [float(step(stack, optimizer)) for _ in range(40)]
  assert losses[-1] < losses[0] / 2


def test_remat_keeps_what_the_policy_says():
  policy = jax.checkpoint_policies.everything_saveable
  texts = {}
  for name, options in {
    "none": {},
    "remat": {"remat": True},
    "policy": {"remat": True, "policy": policy},
  }.items():
    stack = nnx.Stack(nnx.Linear, N, 3, 3, rngs=nnx.Rngs(0), **options)
    texts[name] = str(jax.make_jaxpr(lambda s: nnx.to_pure_dict(nnx.grad(_loss)(s)))(stack))
  assert "everything_saveable" in texts["policy"]
  assert "policy=None" in texts["remat"]
  assert "policy" not in texts["none"]


def _loss(stack):
  return stack(X).sum()


def message(error, run):
  with pytest.raises(error) as info:
    run()
  return info.value.args[0]


def test_errors_say_what_a_stack_takes():
  rngs = nnx.Rngs(0)
  assert message(InvalidArgumentError, lambda: nnx.Stack(nnx.Linear, 0, 3, 3, rngs=rngs)) == (
    "Stack cannot work with this length\n  got: length=0\n  fix: pass an int of at least 1"
  )
  layer = nnx.Linear(3, 3, rngs=rngs)
  text = message(InvalidArgumentError, lambda: nnx.Stack(layer, 3, rngs=rngs))
  assert "fix: pass the class of the layers, or a function that builds one" in text
  assert "rngs=nnx.Rngs(0)" in message(
    InvalidArgumentError, lambda: nnx.Stack(nnx.Linear, 2, 3, 3, rngs=0)
  )
  assert "at least one layer" in message(InvalidArgumentError, lambda: nnx.Stack.of([]))


def test_a_layer_that_changes_the_shape_is_refused_and_nothing_is_written():
  class Grows(nnx.Module):
    def __init__(self, *, rngs):
      self.calls = nnx.Variable(0)
      self.linear = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x):
      self.calls += 1
      return self.linear(x)

  stack = nnx.Stack(Grows, 2, rngs=nnx.Rngs(0))
  assert message(ShapeMismatchError, lambda: stack(X)) == (
    "each layer of a Stack gets what the one before has returned\n"
    "  got: float32[4,4] from a layer that was given float32[4,3]\n"
    "  fix: let the layer return the shape and dtype of its input, or cast what the Stack is given"
  )
  assert stack.layers.calls[...].tolist() == [0, 0]


def test_layers_that_are_not_alike_are_refused():
  rngs = nnx.Rngs(0)
  linear, plain = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, use_bias=False, rngs=rngs)
  assert message(TreeMismatchError, lambda: nnx.Stack.of([linear, plain])) == (
    "the layers of a Stack have one structure\n"
    "  got: layer 1: lacks bias\n"
    "  fix: pass layers that were built alike, in the same mode (train, eval)"
  )
  stack = nnx.Stack(nnx.Linear, 2, 3, 3, rngs=rngs)
  wide = nnx.Linear(3, 3, param_dtype=jnp.bfloat16, rngs=rngs)
  before = stack.layers.kernel[...]
  assert "static attributes" in message(TreeMismatchError, lambda: stack.__setitem__(0, wide))
  wide.param_dtype = jnp.float32
  assert message(TreeMismatchError, lambda: stack.__setitem__(0, wide)) == (
    "the layers of a Stack have Variables of one shape and dtype\n"
    "  at:  bias\n"
    "  got: bfloat16[3] in layer 0, float32[3] in the others\n"
    "  fix: pass layers that were built alike"
  )
  np.testing.assert_array_equal(stack.layers.kernel[...], before)


class Tied(nnx.Module):
  """A layer with a Variable of its own, and one that may be shared, held or passed."""

  def __init__(self, scale=None, *, rngs):
    self.linear = nnx.Linear(3, 3, rngs=rngs)
    if scale is not None:
      self.scale = scale

  def __call__(self, x, scale):
    return self.linear(x) * (self.scale if scale is None else scale)


@pytest.mark.parametrize("hijax", [True, False])
@pytest.mark.parametrize("jit", [lambda f: f, nnx.jit], ids=["eager", "nnx.jit"])
def test_a_variable_that_all_layers_would_share_is_refused(jit, hijax):
  with nnx.use_hijax(hijax):
    scale, linear = nnx.Param(jnp.ones(3)), nnx.Linear(3, 3, rngs=nnx.Rngs(0))
  for build in (
    lambda shared, _: nnx.Stack(Tied, N, shared, rngs=nnx.Rngs(0)),
    lambda shared, _: nnx.Stack(Tied, N, scale=shared, rngs=nnx.Rngs(0)),
    lambda shared, _: nnx.Stack(lambda *, rngs: Tied(shared, rngs=rngs), N, rngs=nnx.Rngs(0)),
    lambda _, linear: nnx.Stack(Tied, N, linear, rngs=nnx.Rngs(0)),
    lambda _, linear: nnx.Stack(lambda *, rngs: linear, N, rngs=nnx.Rngs(0)),
  ):
    text = message(AliasError, lambda build=build: jit(build)(scale, linear))
    assert text.startswith("the layers of a Stack share no Variable: each would get a copy")
    assert "fix: pass what is shared when you call it, stack(x, shared)" in text


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, nnx.jit], ids=["eager", "jit", "nnx.jit"])
def test_what_is_shared_is_passed_to_the_call_and_gradients_add_up(wrap):
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.scale = nnx.Param(jnp.full(3, 1.5))
      self.stack = nnx.Stack(Tied, N, rngs=rngs)

    def __call__(self, x):
      return self.stack(x, self.scale)

  net = Net(nnx.Rngs(0))
  assert net.scale.shape == (3,)
  layers, kernels = list(net.stack), net.stack.layers.linear.kernel[...]
  got = wrap(nnx.grad(lambda net: (net(X) ** 2).sum()))(net)

  def plain(scale):
    x = X
    for layer, kernel in zip(layers, kernels, strict=True):
      x = (x @ kernel + layer.linear.bias[...]) * scale
    return (x**2).sum()

  want = jax.grad(plain)(net.scale[...])
  np.testing.assert_allclose(got["scale"][...], want, rtol=1e-4, atol=1e-5)


def test_layers_that_share_are_not_stacked():
  layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
  other = nnx.Linear(3, 3, rngs=nnx.Rngs(1))
  other.bias = layer.bias
  text = message(AliasError, lambda: nnx.Stack.of([layer, other]))
  assert "got: one Variable in layer 0 and in layer 1" in text and "nnx.clone(layer)" in text
  assert "in layer 0 and in layer 1" in message(AliasError, lambda: nnx.Stack.of([layer] * 3))
  assert len(nnx.Stack.of([layer, nnx.clone(layer)])) == 2


def test_values_of_variables_and_what_is_tied_within_a_layer_are_no_sharing():
  class Within(nnx.Module):
    def __init__(self, start, *, rngs):
      self.linear = nnx.Linear(3, 3, rngs=rngs)
      self.tied = self.linear.kernel
      self.own = nnx.Param(start)
      self.rngs = rngs

  stack = nnx.Stack(Within, N, nnx.Param(jnp.ones(2)), rngs=nnx.Rngs(0))
  assert stack.layers.tied is stack.layers.linear.kernel and stack.layers.own.shape == (N, 2)
