"""nnx.capture hands out what the layers compute, whatever transform they are in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from refax import nnx
from refax.errors import CaptureError, FilterError


class Block(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(4, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return jnp.sin(self.dropout(self.norm(self.linear(x))))


class Net(nnx.Module):
  def __init__(self, seed=0):
    rngs = nnx.Rngs(seed)
    self.layers = [Block(rngs), Block(rngs)]
    self.stack = nnx.Stack(Block, 3, rngs=rngs, remat=True)
    self.head = nnx.Linear(4, 2, rngs=rngs)

  def encode(self, x, *, scale=1.0):
    for layer in self.layers:
      x = layer(x)
    return x * scale

  def __call__(self, x):
    return self.head(self.stack(self.encode(x)))


X = jax.random.normal(jax.random.key(0), (5, 4))


def by_hand(net, x):
  """What each block of a model returns, by path."""
  kept = {}
  for i, layer in enumerate(net.layers):
    x = kept["layers", i] = layer(x)
  stacked = []
  for layer in net.stack:
    x = layer(x)
    stacked.append(x)
  kept["stack", "layers"] = jnp.stack(stacked)
  kept["head",] = net.head(x)
  return kept


def value(state, *path):
  """The one value that a State has for the calls of a method."""
  for step in path:
    state = state[step]
  (x,) = state.get_value() if isinstance(state, nnx.Variable) else state
  return x


def assert_kept(state, want, *, like=lambda x: x):
  for path, x in want.items():
    np.testing.assert_allclose(value(state, *path, "__call__"), like(x), rtol=1e-5, atol=1e-5)


CALLS = {
  "the model": lambda net, x: nnx.capture(net)(x),
  "a function": lambda net, x: nnx.capture(lambda net, x: net(x))(net, x),
  "jax.jit": lambda net, x: nnx.capture(jax.jit(lambda net, x: net(x)))(net, x),
  "nnx.jit": lambda net, x: nnx.capture(nnx.jit(lambda net, x: net(x)))(net, x),
  "inside nnx.jit": lambda net, x: nnx.jit(lambda net, x: nnx.capture(net)(x))(net, x),
  "inside jax.jit": lambda net, x: _pure(jax.jit(lambda n, x: _bare(nnx.capture(n)(x))), net, x),
  "remat": lambda net, x: nnx.capture(nnx.remat(lambda net, x: net(x)))(net, x),
  "checkpoint": lambda net, x: nnx.capture(jax.checkpoint(lambda net, x: net(x)))(net, x),
  "closure": lambda net, x: nnx.capture(lambda x: net(x))(x),
  "keyword": lambda net, x: nnx.capture(lambda *, net, x: net(x))(net=net, x=x),
  "cond": lambda net, x: nnx.capture(
    lambda net, x: nnx.cond(x.sum() < 1e9, lambda n, x: n(x), lambda n, x: n.head(x), net, x)
  )(net, x),
}


def _bare(pair):
  return pair[0], nnx.to_pure_dict(pair[1])


def _pure(f, *args):
  y, kept = f(*args)
  return y, kept


@pytest.mark.parametrize(
  ("name", "is_hijax"),
  [
    *((name, True) for name in CALLS),
    *((name, False) for name in ("the model", "nnx.jit", "cond")),
  ],
)
def test_all_ways_to_call_give_what_the_layers_compute(name, is_hijax):
  with nnx.use_hijax(is_hijax):
    net, twin = Net(), Net()
  want = by_hand(nnx.clone(twin), X)
  twin(X)
  y, kept = CALLS[name](net, X)
  np.testing.assert_allclose(y, want["head",], rtol=1e-5, atol=1e-6)
  if name == "cond":
    want.pop(("head",))  # called in both branches
  assert_kept(kept, want)
  for a, b in zip(jax.tree.leaves(nnx.pure(net)), jax.tree.leaves(nnx.pure(twin)), strict=True):
    if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_model_stays_as_it_is():
  net = Net()
  before = nnx.graphdef(net)
  nnx.capture(net)(X)
  assert nnx.graphdef(net) == before


def test_the_layers_of_interest_are_chosen_by_type_path_and_predicate():
  net = Net()
  paths = lambda *which: {
    ".".join(map(str, p[:-1])) for p, _ in nnx.to_flat_state(nnx.capture(net, *which)(X)[1])
  }
  assert paths("layers/*") == {"layers.0", "layers.1"}
  assert paths("layers/1/**") == {f"layers.1{x}" for x in ("", ".linear", ".norm", ".dropout")}
  assert paths("**/norm") == {"layers.0.norm", "layers.1.norm", "stack.layers.norm"}
  assert paths(("layers", 1)) == {"layers.1"}
  assert paths(nnx.Stack) == {"stack"}
  assert paths(lambda path, module: isinstance(module, nnx.Linear) and "head" in path) == {"head"}
  assert paths(nnx.Stack, "head") == {"stack", "head"}
  with pytest.raises(FilterError, match="this is not a filter"):
    nnx.capture(net, net.head)


def test_a_path_that_leads_nowhere_is_refused_before_anything_is_written():
  net = Net()
  before = jax.tree.map(jnp.copy, nnx.pure(net))
  with pytest.raises(FilterError, match=r"(?s)no Module is at this path.*'layers/7'.*'layers/"):
    nnx.capture(net, "layers/7")(X)
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.pure(net)), strict=True):
    if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      np.testing.assert_array_equal(a, b)


def test_methods_inputs_and_several_calls():
  net = Net()
  net.eval()
  y, kept = nnx.capture(net.encode, methods=("encode", "__call__"), inputs=True)(X, scale=2.0)
  np.testing.assert_allclose(value(kept, "encode"), y)
  ((args, kwargs),) = kept["encode.inputs"].get_value()
  np.testing.assert_array_equal(args[0], X)
  assert kwargs == {"scale": None}  # a number is no array
  np.testing.assert_allclose(value(kept, "layers", 0, "__call__.inputs")[0][0], X)
  _, kept = nnx.capture(lambda head, x: head(x) + head(2 * x), nnx.Linear)(net.head, X)
  first, second = kept["head"]["__call__"].get_value()
  np.testing.assert_allclose(first, net.head(X), rtol=1e-6)
  np.testing.assert_allclose(second, net.head(2 * X), rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, nnx.jit], ids=["eager", "jax", "nnx"])
def test_a_training_step_hands_out_values_and_gradients_and_trains_as_without(wrap):
  def step(net, optimizer, x):
    loss, grads = nnx.value_and_grad(lambda net: (net(x) ** 2).mean())(net)
    optimizer.update(net, grads)
    return loss

  net, twin = Net(), Net()
  optimizers = [nnx.Optimizer(n, optax.sgd(0.1), wrt=nnx.Param) for n in (net, twin)]
  blocks = nnx.clone(twin)
  want = by_hand(blocks, X)
  loss, kept = nnx.capture(wrap(step), Block, nnx.Linear, gradients=True)(net, optimizers[0], X)
  np.testing.assert_allclose(loss, step(twin, optimizers[1], X), rtol=1e-5)
  assert_kept(kept, want)
  np.testing.assert_allclose(net.head.kernel, twin.head.kernel, rtol=1e-5, atol=1e-7)
  grad = 2 * want["head",] / want["head",].size
  np.testing.assert_allclose(value(kept, "head", "__call__.gradient"), grad, rtol=1e-4, atol=1e-7)


def test_gradients_of_intermediates_equal_those_of_perturbations():
  net = Net()
  net.eval()

  def tail(h, start):
    layers = [*net.layers, *net.stack]
    for layer in layers[start:]:
      h = layer(h)
    return (net.head(h) ** 2).sum()

  _, kept = nnx.capture(nnx.grad(lambda net, x: (net(x) ** 2).sum()), Block, gradients=True)(net, X)
  h, found = X, []
  for i, layer in enumerate([*net.layers, *net.stack]):
    h = layer(h)
    found.append(jax.grad(lambda h, i=i: tail(h, i + 1))(h))
  for i in range(2):
    got = value(kept, "layers", i, "__call__.gradient")
    np.testing.assert_allclose(got, found[i], rtol=1e-4, atol=1e-6)
  stacked = value(kept, "stack", "layers", "__call__.gradient")
  np.testing.assert_allclose(stacked, jnp.stack(found[2:]), rtol=1e-4, atol=1e-6)


def test_a_flag_among_the_arguments_decides_as_without_capture():
  class Layer(nnx.Module):
    def __call__(self, x, train, activation=None):
      x = 2 * x if train else x
      return activation(x) if activation else x

  for train in (True, False):
    y, kept = nnx.capture(Layer())(X, train, activation=jnp.sin)
    np.testing.assert_allclose(y, jnp.sin(2 * X if train else X), rtol=1e-6)
    np.testing.assert_array_equal(value(kept, "__call__"), y)


def test_vmap_and_scan_stack_what_they_map():
  net = Net()
  net.eval()
  want = jax.vmap(net.head)(X)
  for vmap in (jax.vmap, nnx.vmap):
    _, kept = nnx.capture(lambda n, x, v=vmap: v(n.head, in_axes=0)(x), nnx.Linear)(net, X)
    np.testing.assert_allclose(value(kept, "head", "__call__"), want, rtol=1e-6)

  def loop(net, x):
    return jax.lax.scan(lambda c, x: (c, net.head(x)), None, x)[1]

  _, kept = nnx.capture(loop, nnx.Linear)(net, X)
  np.testing.assert_allclose(value(kept, "head", "__call__"), want, rtol=1e-6)


def test_an_ensemble_has_its_members_first():
  ensemble = nnx.vmap(lambda rngs: nnx.Linear(4, 2, rngs=rngs))(nnx.Rngs(0).fork(split=3))
  call = lambda model, x: nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(model, x)
  y, kept = nnx.capture(call)(ensemble, X)
  np.testing.assert_allclose(value(kept, "__call__"), y)


def test_a_while_loop_gives_its_last_step_and_a_branch_that_was_not_taken_zeros():
  net = Net()
  net.eval()
  block = net.layers[0]

  def repeat(net, x, n):
    return jax.lax.while_loop(
      lambda c: c[0] < n, lambda c: (c[0] + 1, net.layers[0](c[1])), (0, x)
    )[1]

  y, kept = nnx.capture(repeat, Block)(net, X, jnp.array(3))
  np.testing.assert_allclose(value(kept, "layers", 0, "__call__"), y, rtol=1e-6)
  np.testing.assert_allclose(y, block(block(block(X))), rtol=1e-5)
  choose = lambda net, x, p: jax.lax.cond(p, lambda x: net.head(x), lambda x: x[:, :2], x)
  _, kept = nnx.capture(choose, nnx.Linear)(net, X, jnp.array(False))
  assert not value(kept, "head", "__call__").any()


def test_what_is_sown_is_handed_out_and_not_stored():
  class Sower(nnx.Module):
    def __call__(self, x):
      self.sow(nnx.Intermediate, "squares", x * x)
      self.sow(nnx.Cache, "others", x)
      return x

  class Two(nnx.Module):
    def __init__(self):
      self.a, self.b = Sower(), Sower()

    def __call__(self, x):
      return self.b(self.a(x) + 1)

  model = Two()
  _, kept = nnx.capture(nnx.jit(model), nnx.Intermediate)(X)
  np.testing.assert_allclose(value(kept, "a", "squares"), X * X)
  np.testing.assert_allclose(value(kept, "b", "squares"), (X + 1) ** 2, rtol=1e-6)
  assert not hasattr(model.a, "squares")


def test_a_second_capture_is_not_traced_again_and_another_is():
  traces = []

  class Counted(nnx.Module):
    def __call__(self, x):
      traces.append(None)
      return x + 1

  model, jitted = Counted(), jax.jit(lambda m, x: m(x))
  seen = nnx.capture(jitted)
  for _ in range(3):
    seen(model, X)
  assert len(traces) == 1
  jitted(model, X)
  assert len(traces) == 2
  nnx.capture(jitted, inputs=True)(model, X)
  assert len(traces) == 3
  jitted(model, X)
  seen(model, X)
  assert len(traces) == 3


def test_results_that_are_trees_or_hold_no_arrays():
  class Layer(nnx.Module):
    def __call__(self, x):
      return {"a": x, "b": (x + 1, None, "text")}

  result, kept = nnx.capture(lambda m, x: m(x)["a"])(Layer(), X)
  np.testing.assert_array_equal(result, X)
  tree = value(kept, "Layer", "__call__") if "Layer" in kept else value(kept, "__call__")
  np.testing.assert_array_equal(tree["b"][0], X + 1)
  assert tree["b"][1:] == (None, None)


def test_an_error_in_the_function_leaves_state_as_it_was():
  net = Net()
  mean = net.layers[0].norm.mean[...]

  def bad(net, x):
    net(x)
    raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    nnx.capture(bad)(net, X)
  np.testing.assert_array_equal(net.layers[0].norm.mean, mean)
  jitted = nnx.jit(lambda net, x: net(x))
  jitted(net, X)  # and no observer is left behind
  assert nnx.capture(net)(X)[1]


class Perturbed(nnx.Module):
  def __init__(self):
    self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

  def __call__(self, x):
    h = self.perturb("h", self.linear(x))
    self.sow(nnx.Intermediate, "squares", h * h)
    return jnp.sin(h)


def test_what_is_perturbed_is_handed_out_with_its_gradient_and_no_attribute_is_made():
  model = Perturbed()
  before = nnx.graphdef(model)
  loss = lambda model, x: model(x).sum()
  _, kept = nnx.capture(nnx.grad(loss), nnx.Perturbation, gradients=True)(model, X)
  h = model.linear(X)
  np.testing.assert_allclose(value(kept, "h"), h, rtol=1e-6)
  np.testing.assert_allclose(value(kept, "h.gradient"), jnp.cos(h), rtol=1e-5, atol=1e-6)
  assert nnx.graphdef(model) == before


def test_perturbations_may_be_given_and_differentiated():
  model = Perturbed()
  given = nnx.State({"h": nnx.Perturbation(jnp.full((5, 4), 0.5), is_hijax=False)})
  y, kept = nnx.capture(model, nnx.Intermediate, init=given)(X)
  h = model.linear(X) + 0.5
  np.testing.assert_allclose(y, jnp.sin(h), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(value(kept, "squares"), h * h, rtol=1e-5)

  def loss(given):
    y, _ = nnx.capture(model, nnx.Intermediate, init=given)(X)
    return y.sum()

  grads = jax.grad(loss)(given)
  np.testing.assert_allclose(grads["h"].get_value(), jnp.cos(h), rtol=1e-5, atol=1e-6)


def test_several_types_of_variables_give_a_state_each():
  _, sown, perturbed = nnx.capture(Perturbed(), nnx.Intermediate, nnx.Perturbation)(X)
  assert list(sown) == ["squares"]
  assert list(perturbed) == ["h"]
  assert isinstance(perturbed["h"], nnx.Perturbation)


def test_the_outputs_of_all_methods():
  class Two(nnx.Module):
    def __init__(self):
      self.inner = Perturbed()

    def encode(self, x):
      return self.inner(x)

    def __call__(self, x):
      return self.encode(x) + 1

  y, kept = nnx.capture(Two(), method_outputs=nnx.Cache)(X)
  np.testing.assert_array_equal(value(kept, "__call__"), y)
  np.testing.assert_allclose(value(kept, "encode"), y - 1, rtol=1e-5, atol=1e-6)
  assert isinstance(kept["inner"]["linear"]["__call__"], nnx.Cache)


def test_what_is_in_a_shard_map_is_refused_by_name():

  mesh = jax.make_mesh((1,), ("data",))
  spec = jax.sharding.PartitionSpec()
  f = nnx.shard_map(lambda net, x: net.head(x), mesh=mesh, in_specs=(spec, spec), out_specs=spec)
  with pytest.raises(CaptureError, match="shard_map"):
    nnx.capture(f)(Net(), X)


class Blocks(nnx.Module):
  def __init__(self, call):
    self.blocks = [nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(3)]
    self._call = nnx.static(call)

  def __call__(self, x):
    for block in self.blocks:
      x = self._call(block, x)
    return x


@pytest.mark.parametrize("wrap", [jax.jit, nnx.jit, jax.checkpoint, nnx.remat])
def test_one_compiled_function_for_several_layers_tells_them_apart(wrap):
  model = Blocks(wrap(lambda layer, x: layer(x)))
  model(X)  # it is compiled before anybody looks
  _, kept = nnx.capture(model, "blocks/*")(X)
  x = X
  for i, block in enumerate(model.blocks):
    x = block(x)
    np.testing.assert_allclose(value(kept, "blocks", i, "__call__"), x, rtol=1e-5)
  y = nnx.intervene(model, {"blocks/1": jnp.zeros_like})(X)
  np.testing.assert_allclose(y, model.blocks[2](jnp.zeros_like(X)), rtol=1e-6)
  found = nnx.find_nonfinite(nnx.intervene(model, {"blocks/1": lambda y: y / 0}))(X)
  assert found.module == "blocks/1"


@pytest.mark.parametrize("wrap", [jax.jit, nnx.jit])
def test_a_function_that_ran_with_another_layer_has_the_path_of_this_one(wrap):
  model, call = Blocks(jnp.add), wrap(lambda layer, x: layer(x))
  call(model.blocks[0], X)
  silent = nnx.intervene(call, {(lambda path, _: path == ("blocks", 1)): jnp.zeros_like})
  for _ in range(2):
    assert not silent(model.blocks[1], X).any()
    assert silent(model.blocks[0], X).any()
    assert call(model.blocks[1], X).any()


class Waves(nnx.Module):
  def __call__(self, x):
    return jnp.sin(x), jnp.cos(x)


class Holder(nnx.Module):
  def __init__(self):
    self.waves = Waves()


def test_the_values_of_one_call_stay_together_where_some_are_used_by_nobody():
  call = jax.jit(lambda model, x: model.waves(x))

  def f(model, x):
    _, b = call(model, x)
    d, e = call(model, b)
    return d * e

  _, kept = nnx.capture(jax.grad(jax.jit(f), argnums=1), "waves")(Holder(), 1.0 * X[0, 0])
  first, second = kept["waves"]["__call__"].get_value()
  x = X[0, 0]
  np.testing.assert_allclose(first, (jnp.sin(x), jnp.cos(x)), rtol=1e-5)
  np.testing.assert_allclose(second, (jnp.sin(jnp.cos(x)), jnp.cos(jnp.cos(x))), rtol=1e-5)


def test_gradients_are_in_the_order_of_the_calls():
  layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
  loss = lambda layer, x: layer(layer(x)).sum()
  _, kept = nnx.capture(nnx.grad(loss), nnx.Linear, gradients=True)(layer, X)
  first, second = kept["__call__.gradient"].get_value()
  np.testing.assert_array_equal(second, jnp.ones_like(X))
  np.testing.assert_allclose(first, jnp.ones_like(X) @ layer.kernel[...].T, rtol=1e-5)


def test_values_that_jax_leaves_out_are_an_error_and_never_missing():
  class Probed(nnx.Module):
    def __init__(self):
      self.a, self.probe = (nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2))

    def __call__(self, x):
      h = self.a(x)
      self.probe(h)
      return h

  loss = lambda model, x: model(x).sum()
  grads = nnx.grad(nnx.jit(loss))
  with pytest.raises(CaptureError, match=r"(?s)lost values.*probe/__call__"):
    nnx.capture(grads, "probe")(Probed(), X)
  inside = nnx.grad(nnx.capture(nnx.jit(loss), "probe"), has_aux=True)
  _, kept = inside(Probed(), X)
  assert value(kept, "probe", "__call__").shape == X.shape


def test_derivatives_of_ones_own_are_kept_or_the_capture_is_refused():
  class Round(nnx.Module):
    def __call__(self, x):
      return jnp.round(x)

  class Straight(nnx.Module):
    def __init__(self):
      self.round = Round()

    def __call__(self, x):
      @jax.custom_vjp
      def through(x):
        return self.round(x)

      through.defvjp(lambda x: (through(x), None), lambda _, g: (g,))
      return through(x)

  loss = lambda model, x: (3 * model(x)).sum()
  grad, _ = nnx.capture(jax.grad(loss, argnums=1))(Straight(), X)
  np.testing.assert_array_equal(grad, jnp.full_like(X, 3))
  inner = lambda model, x: nnx.capture(loss, "round")(model, x)
  with pytest.raises(CaptureError, match="custom_vjp"):
    jax.grad(inner, argnums=1, has_aux=True)(Straight(), X)
  outer = lambda model, x: nnx.capture(loss, Straight)(model, x)
  grad, _ = jax.grad(outer, argnums=1, has_aux=True)(Straight(), X)
  np.testing.assert_array_equal(grad, jnp.full_like(X, 3))


def test_equal_numbers_of_other_types_are_other_constants():
  f, x = nnx.capture(lambda x, k: x * k), jnp.arange(3)
  assert [f(x, k)[0].dtype for k in (1, 1.0, True)] == [jnp.int32, jnp.float32, jnp.int32]
  g = nnx.debug.check(lambda x, flag: x * 3 if flag is True else x)
  assert [int(g(x, k)[1]) for k in (1, True)] == [1, 3]


def test_a_capture_inside_another_has_its_own_values():
  model = Blocks(nnx.remat(lambda layer, x: layer(x)))
  inner = lambda model, x: nnx.capture(model, "blocks/1")(x)
  (_, kept), outer = nnx.capture(inner, "blocks/0", "blocks/1")(model, X)
  assert list(kept["blocks"]) == [1] and len(kept["blocks"][1]["__call__"].get_value()) == 1
  assert list(outer["blocks"]) == [0, 1]


def test_vmap_of_results_of_which_some_are_not_mapped():
  class Pair(nnx.Module):
    def __call__(self, x):
      return x + 1, jnp.ones(2)

  _, kept = nnx.capture(lambda m, x: jax.vmap(lambda x: m(x)[0])(x))(Pair(), X)
  mapped, plain = value(kept, "__call__")
  np.testing.assert_array_equal(mapped, X + 1)
  assert plain.shape == (2,)


def test_numpy_arrays_stay_what_they_are():
  class Mask(nnx.Module):
    def __call__(self, x):
      return np.ones(3, bool)

  f = lambda m, x: x if m(x)[0] else 2 * x
  np.testing.assert_array_equal(nnx.capture(f)(Mask(), X)[0], X)


def test_a_type_of_variable_makes_a_decorator():
  class Net(nnx.Module):
    def __call__(self, x):
      self.sow(nnx.Intermediate, "seen", 2 * x)
      return x

  @nnx.capture(nnx.Intermediate)
  def run(net, x):
    return net(x)

  y, kept = run(Net(), jnp.ones(2))
  assert y.tolist() == [1, 1]
  assert kept["seen"][0].tolist() == [2, 2]
