"""Module: modes and attributes of all Modules below, sow, perturb."""

import jax
import jax.numpy as jnp
import pytest

from refax import nnx
from refax.errors import FilterError, TreeMismatchError


class Node(nnx.Module):
  """An object with any attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


def model():
  shared = nnx.Dropout(0.5)
  return Node(
    drop=shared,
    norm=nnx.BatchNorm(2, rngs=nnx.Rngs(0)),
    layers=[nnx.Dropout(0.1), Node(deep=nnx.Dropout(0.2), again=shared)],
    table={"k": nnx.Dropout(0.3)},
    plain=nnx.data({"m": nnx.Dropout(0.4)}),
    rngs=nnx.Rngs(0),
    deterministic=None,
  )


def modes(m):
  return [x.deterministic for _, x in nnx.iter_modules(m) if isinstance(x, nnx.Dropout)]


# train, eval, set_attributes
def test_train_and_eval_set_the_mode_of_all_modules_below():
  m = model()
  assert modes(m) == [False] * 5
  m.eval()
  assert modes(m) == [True] * 5 and m.norm.use_running_average and m.deterministic is True
  m.train()
  assert modes(m) == [False] * 5 and m.norm.use_running_average is False
  m.layers[1].eval()
  assert modes(m).count(True) == 2 and m.drop.deterministic is True


def test_more_attributes_may_be_set_with_the_mode():
  m = model()
  m.eval(rate=0.0)
  assert {x.rate for _, x in nnx.iter_modules(m) if isinstance(x, nnx.Dropout)} == {0.0}
  m.train(deterministic=True)
  assert modes(m) == [True] * 5
  Node(n=1).eval()  # it is no error that nothing has a mode


def test_a_change_of_mode_is_a_new_trace_and_back_is_not():
  m, traces = model(), []

  @jax.jit
  def f(m):
    traces.append(m.drop.deterministic)

  for change in (m.train, m.eval, m.train, m.eval):
    change()
    f(m)
  assert traces == [False, True]


def test_set_attributes_by_filter():
  m = model()
  m.set_attributes(nnx.BatchNorm, use_running_average=True)
  assert m.norm.use_running_average is True
  m.set_attributes(nnx.PathContains("layers"), deterministic=True)
  assert m.layers[0].deterministic and m.layers[1].deep.deterministic
  assert m.table["k"].deterministic is False
  m.set_attributes(lambda path, x: getattr(x, "rate", None) == 0.3, rate=0.9)
  assert m.table["k"].rate == 0.9
  m.set_attributes(nnx.BatchNorm, lambda path, x: path == ("drop",), epsilon=1.0, rate=0.7)
  assert m.norm.epsilon == 1.0 and m.drop.rate == 0.7 and m.layers[0].rate == 0.1


def test_attributes_that_no_module_has_are_refused_and_nothing_is_set():
  m = model()
  with pytest.raises(FilterError) as error:
    m.set_attributes(deterministic=True, nope=1, zzz=2)
  assert error.value.args[0] == (
    "no Module in Node has these attributes\n"
    "  got: nope, zzz\n"
    "  fix: check the names, or pass raise_if_not_found=False"
  )
  assert modes(m) == [False] * 5
  with pytest.raises(FilterError):
    m.set_attributes(nnx.Linear, deterministic=True)
  m.set_attributes(nope=1, deterministic=True, raise_if_not_found=False)
  assert modes(m) == [True] * 5 and not hasattr(m, "nope")


# sow
class Net(nnx.Module):
  """Keeps what it computes."""

  def __init__(self):
    self.w = nnx.Param(jnp.full(2, 3.0))
    self.inner = Node()

  def __call__(self, x):
    y = self.w * x
    self.sow(nnx.Intermediate, "y", y)
    self.inner.sow(nnx.Intermediate, "y", y * 2)
    return y


def test_sown_values_are_kept_in_order_and_popped():
  net = Net()
  net(1.0), net(2.0)
  got = nnx.pop(net, nnx.Intermediate)
  assert [v.tolist() for v in got["y"][...]] == [[3.0, 3.0], [6.0, 6.0]]
  assert [v.tolist() for v in got["inner"]["y"][...]] == [[6.0, 6.0], [12.0, 12.0]]
  assert not hasattr(net, "y") and len(nnx.pop(net, nnx.Intermediate)) == 0


def test_sow_with_a_reduction():
  net = Node()
  for x in (1.0, 5.0, 2.0):
    assert net.sow(nnx.Intermediate, "top", x, init_fn=lambda: 0.0, reduce_fn=jnp.maximum) is True
  assert float(net.top) == 5.0


@pytest.mark.parametrize("value", [{"a": jnp.ones(1)}, (jnp.ones(1), 2.0)], ids=["dict", "tuple"])
def test_a_pytree_may_be_sown(value):
  net = Node()
  net.sow(nnx.Intermediate, "h", value)
  net.sow(nnx.Intermediate, "h", value)
  assert len(net.h[...]) == 2
  assert jax.tree.structure(net.h[0]) == jax.tree.structure(value)


def test_sowing_onto_something_else_is_refused():
  net = Node(h=3, w=nnx.Param(1.0))
  for name, got in (("h", "int"), ("w", "Param")):
    with pytest.raises(TreeMismatchError) as error:
      net.sow(nnx.Intermediate, name, 1.0)
    assert error.value.args[0] == (
      "the attribute is no Intermediate that could take the value\n"
      f"  at:  Node.{name}\n"
      f"  got: {got}\n"
      "  fix: sow under another name, or remove the attribute (nnx.pop)"
    )
  assert net.h == 3 and float(net.w) == 1.0


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit], ids=["jax.jit", "nnx.jit"])
def test_sown_values_inside_jit(jit):
  net = Net()

  @jit
  def f(net, x):
    net(x)
    return nnx.to_lojax(nnx.pop(net, nnx.Intermediate))

  out = f(net, 2.0)
  assert out["y"][0].tolist() == [6.0, 6.0] and not hasattr(net, "y")


# perturb
def test_a_perturbation_gives_the_gradient_of_an_intermediate():
  class Squares(nnx.Module):
    def __init__(self):
      self.w = nnx.Param(3.0)

    def __call__(self, x):
      h = self.perturb("h", self.w * x)
      return (h**2).sum()

  net = Squares()
  assert float(net(jnp.ones(2))) == 18.0
  assert net.h[...].tolist() == [0.0, 0.0] and type(net.h) is nnx.Perturbation
  grads = nnx.grad(lambda net: net(jnp.ones(2)), wrt=(nnx.Param, nnx.Perturbation))(net)
  assert grads.h[...].tolist() == [6.0, 6.0] and float(grads.w) == 12.0
  net.h = net.h + 1.0
  assert float(net(jnp.ones(2))) == 32.0


def test_a_perturbation_of_a_pytree_and_of_another_type():
  class Mine(nnx.Variable):
    pass

  net = Node()
  out = net.perturb("h", {"a": jnp.ones(2), "b": 1.0}, Mine)
  assert out["a"].tolist() == [1.0, 1.0] and type(net.h) is Mine
  assert net.h["a"].tolist() == [0.0, 0.0]
  with pytest.raises(TreeMismatchError, match=r"at:  Node\.h\n  got: Mine"):
    net.perturb("h", 1.0)


def test_a_perturbation_made_under_jit_reaches_the_caller_of_nnx_jit():
  net = Node()
  out = nnx.jit(lambda net, x: net.perturb("h", x))(net, jnp.ones(2))
  assert out.tolist() == [1.0, 1.0] and net.h[...].tolist() == [0.0, 0.0] and net.h.is_hijax
