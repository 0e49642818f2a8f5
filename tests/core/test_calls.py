"""Each call of a Module runs in a named scope of its path, in every transform."""

import functools
import inspect
import pickle
import re
import threading

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import _jax, nnx
from refax.core import calls


class Block(nnx.Module):
  def __init__(self, rngs):
    self.query = nnx.Linear(4, 4, rngs=rngs)
    self.norm = nnx.LayerNorm(4, rngs=rngs)

  def __call__(self, x):
    return self.norm(self.query(x))


class Net(nnx.Module):
  def __init__(self, rngs=None):
    rngs = rngs or nnx.Rngs(0)
    self.layers = [Block(rngs), Block(rngs)]
    self.by_name = {"a": nnx.Linear(4, 4, rngs=rngs)}
    self.stack = nnx.Stack(Block, 2, rngs=rngs, remat=True)
    self.head = nnx.Linear(4, 4, rngs=rngs)
    self.tied = self.head

  def encode(self, x):
    for layer in self.layers:
      x = layer(x)
    return self.by_name["a"](x)

  def __call__(self, x):
    return self.tied(self.stack(self.encode(x)))


X = jnp.ones((2, 4))
PATHS = {"layers/0/query", "layers/1/norm", "by_name/a", "stack/layers/query", "head"}


def scopes(jaxpr):
  """The scopes of all operations, nested ones with those around them, without transforms."""

  def walk(jaxpr, above):
    for eqn in jaxpr.eqns:
      names = [p.name for p in eqn.source_info.name_stack.stack if "Scope" in type(p).__name__]
      path = (*above, *names)
      yield "/".join(path)
      for inner in _jax.inner_jaxprs(eqn):
        yield from walk(getattr(inner, "jaxpr", inner), path)

  return set(walk(getattr(jaxpr, "jaxpr", jaxpr), ()))


def names_of(f, *args):
  text = f.lower(*args).compile().as_text()
  names = re.findall(r'op_name="([^"]*)"', text)
  inner = lambda name: re.sub(r"\b\w+\(([^()]*)\)", r"\1", name)  # of `transpose(jvp(a))`: `a`
  return "\n".join(inner(inner(name)) for name in names)


def lowered(f, *args):
  """Before it is compiled: JAX's cache of files does not tell functions apart by names."""
  return f.lower(*args).as_text(debug_info=True)


def loss(net, x):
  return (net(x) ** 2).mean()


FUNCTIONS = {
  "plain": lambda net, x: net(x),
  "methods": lambda net, x: net.head(net.stack(net.encode(x))),
  "grad": nnx.grad(loss),
  "remat": lambda net, x: nnx.remat(lambda net, x: net(x))(net, x),
  "plain checkpoint": lambda net, x: jax.checkpoint(lambda net, x: net(x))(net, x),
  "vmap": lambda net, x: nnx.vmap(lambda net, x: net(x), in_axes=(None, 0))(net, x),
  "plain vmap": lambda net, x: jax.vmap(lambda x: net(x))(x),
  "nested jit": lambda net, x: jax.jit(lambda net, x: net(x))(net, x),
  "nested nnx.jit": lambda net, x: nnx.jit(lambda net, x: net(x))(net, x),
  "cond": lambda net, x: nnx.cond(x.sum() > 0, lambda n, x: n(x), lambda n, x: x, net, x),
  "grad of remat": nnx.grad(lambda net, x: nnx.remat(loss)(net, x)),
  "clone": lambda net, x: nnx.clone(net)(x),
  "merge": lambda net, x: nnx.merge(*nnx.split(net))(x),
  "pure": lambda net, x: nnx.to_lojax(net)(x),
}


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit], ids=["jax.jit", "nnx.jit"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("is_hijax", [True, False])
def test_hlo_names_the_path_of_each_layer(name, jit, is_hijax):
  with nnx.use_hijax(is_hijax):
    net = Net()
  found = names_of(jit(FUNCTIONS[name]), net, X)
  loops = r"while/body/|closed_call/|eval_jaxpr/|checkpoint/|rematted_computation/"
  missing = {path for path in PATHS if path not in re.sub(loops, "", found)}
  assert not missing, found


def test_the_backward_pass_has_the_names_too():
  text = jax.jit(nnx.grad(loss)).lower(Net(), X).as_text(debug_info=True)
  assert re.search(r"transpose\(jvp\(layers/0\)\)/query", text)


def test_jaxprs_have_the_names():
  net = Net()
  assert "layers/0/query" in scopes(jax.make_jaxpr(lambda x: net.encode(x))(X))


def test_a_switch_turns_the_names_off_and_what_was_compiled_is_traced_again():
  net, f = Net(), jax.jit(lambda net, x: net(x))
  assert "layers/0" in lowered(f, net, X)
  with nnx.use_named_scopes(False):
    assert "layers/0" not in lowered(f, net, X)
  assert "layers/0" in lowered(f, net, X)
  quiet = jax.jit(nnx.use_named_scopes(False)(lambda net, x: net(x)))
  assert "layers/0" not in lowered(quiet, net, X)


def test_a_step_with_names_compiles_to_what_it_is_without():
  def operations(is_on):
    with nnx.use_named_scopes(is_on):
      text = jax.jit(nnx.grad(loss)).lower(Net(), X).as_text()
    return re.sub(r"#loc.*|loc\(.*", "", text)

  assert operations(True) == operations(False)


def test_methods_keep_their_names_signatures_and_documentation():
  class Layer(nnx.Module):
    def __call__(self, x, *, scale: float = 2.0):
      """Scales."""
      return x * scale

  assert Layer.__call__.__name__ == "__call__"
  assert Layer.__call__.__doc__ == "Scales."
  assert list(inspect.signature(Layer.__call__).parameters) == ["self", "x", "scale"]
  assert inspect.signature(Layer()).parameters["scale"].default == 2.0


def test_what_is_no_plain_method_stays_as_it_is():
  class Layer(nnx.Module):
    @property
    def size(self):
      return 3

    @staticmethod
    def double(x):
      return 2 * x

    @classmethod
    def build(cls):
      return cls()

    @functools.cached_property
    def kept(self):
      return 4

    def steps(self):
      yield from range(3)

    async def wait(self):
      return 1

    def _private(self):
      return 5

  layer = Layer.build()
  assert (layer.size, layer.double(2), layer.kept, list(layer.steps())) == (3, 4, 4, [0, 1, 2])
  assert inspect.iscoroutinefunction(layer.wait)
  assert not hasattr(Layer.steps, "__wrapped__")
  assert not hasattr(Layer._private, "__wrapped__")


def test_an_inherited_call_is_in_one_scope():
  class Child(Block):
    def __call__(self, x):
      return super().__call__(x) + 1

  class Parent(nnx.Module):
    def __init__(self):
      self.child = Child(nnx.Rngs(0))

    def __call__(self, x):
      return self.child(x)

  found = scopes(jax.make_jaxpr(Parent())(X))
  assert "child/query" in found
  assert not any("child/child" in scope for scope in found)


def test_a_layer_of_another_model_has_its_own_path_or_the_name_of_its_type():
  other, alone = Net(), nnx.Linear(4, 4, rngs=nnx.Rngs(1))

  class Borrower(nnx.Module):
    def __call__(self, x):
      return alone(other.layers[1].query(x))

  found = scopes(jax.make_jaxpr(Borrower())(X))
  assert "layers/1/query" in found
  assert "Linear" in found


def test_an_error_in_a_call_leaves_no_scope_open():
  class Bad(nnx.Module):
    def __call__(self, x):
      raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    jax.make_jaxpr(Bad())(X)
  assert calls._local.open == []
  assert "layers/0/query" in scopes(jax.make_jaxpr(Net())(X))


def test_threads_do_not_mix_their_paths():
  nets, found = [Net() for _ in range(4)], {}

  def trace(i):
    for _ in range(5):
      found[i] = scopes(jax.make_jaxpr(nets[i])(X))

  threads = [threading.Thread(target=trace, args=(i,)) for i in range(4)]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  assert all(found[i] == found[0] for i in range(4))


def test_a_list_of_layers_that_is_moved_about_has_the_paths_of_now():
  net = Net()
  net.layers.insert(0, net.layers.pop())
  first = net.layers[0]
  path = calls.path_of(first.query)
  assert path == ("layers", 0, "query")


def test_bound_methods_and_models_pickle():
  net = pickle.loads(pickle.dumps(Net()))
  np.testing.assert_allclose(net(X), Net()(X), rtol=1e-6)
  assert pickle.loads(pickle.dumps(Net.encode)) is Net.encode


def test_an_optimizer_that_holds_the_model_is_no_part_of_its_paths():
  class Trainer(nnx.Pytree):
    def __init__(self):
      self.model = Net()

  trainer = Trainer()
  assert "layers/0/query" in names_of(jax.jit(lambda t, x: t.model(x)), trainer, X)
  assert "model/layers" not in names_of(jax.jit(lambda t, x: t.model(x)), trainer, X)


def test_mixins_keep_their_order_and_what_is_patched_in_them():
  class Mixin:
    def foo(self):
      return 1

  class A(nnx.Module, Mixin):
    pass

  class Other(Mixin):
    def foo(self):
      return 2

  class B(A, Other):
    pass

  assert B().foo() == 2
  Mixin.foo = lambda self: 3
  assert A().foo() == 3


def test_a_class_that_is_pickled_by_value():
  def make():
    class Local(nnx.Module):
      def __call__(self, x):
        return x + 1

    return Local()

  again = cloudpickle.loads(cloudpickle.dumps(make()))
  assert float(jax.jit(lambda m, x: m(x))(again, 1.0)) == 2.0


def test_names_of_attributes_and_keys_may_be_odd():
  class Odd(nnx.Module):
    def __init__(self):
      self.by_name = {"a b/c": nnx.Linear(4, 4, rngs=nnx.Rngs(0)), ("t", 1): nnx.relu}
      self.é = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
      return self.é(self.by_name["a b/c"](x))

  found = scopes(jax.make_jaxpr(Odd())(X))
  assert {"by_name/a b/c", "é"} <= found
  jax.jit(lambda m, x: m(x)).lower(Odd(), X).compile()
