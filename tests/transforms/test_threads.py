"""Threads that read a model while another one trains it by `nnx.jit`."""

import copy
import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import _jax, nnx
from tests.training_thread import Training

pytestmark = pytest.mark.skipif(
  not _jax.no_trace_active(), reason="public JAX has no way to look at Refs of another thread"
)
X = jnp.ones((2, 4))


class Net(nnx.Module):
  """All weights are equal between two steps."""

  def __init__(self, n):
    self.parts = nnx.List([nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(n)])
    for part in self.parts:
      part.kernel[...], part.bias[...] = jnp.zeros((4, 4)), jnp.zeros(4)

  def __call__(self, x):
    return sum(part(x) for part in self.parts)


@nnx.jit
def step(net):
  for part in net.parts:
    part.kernel += 1
    part.bias += 1


def values(arrays):
  return {float(x) for leaf in jax.tree.leaves(arrays) for x in np.unique(np.asarray(leaf))}


predict = nnx.jit(lambda net: [(part.kernel[...], part.bias[...]) for part in net.parts])
AT_ONE_MOMENT = {
  "clone": lambda net: nnx.pure(nnx.state(nnx.clone(net))),
  "pure": lambda net: nnx.pure(nnx.state(net)),
  "to_lojax": lambda net: nnx.pure(nnx.state(nnx.to_lojax(net))),
  "nnx.jit": predict,
  "nnx.jit by closure": lambda net: nnx.jit(lambda: [part.kernel[...] for part in net.parts])(),
}
ONE_BY_ONE = {
  "read": lambda net: net.parts[0].kernel[...],
  "numpy": lambda net: np.asarray(net.parts[0].bias),
  "call": lambda net: net(X),
  "grad": lambda net: nnx.pure(nnx.grad(lambda net: net(X).sum())(net)),
  "vmap": lambda net: nnx.vmap(lambda net, x: net(x), in_axes=(None, 0))(net, X),
  "deepcopy": lambda net: nnx.pure(nnx.state(copy.deepcopy(net))),
  "repr": lambda net: repr(net) and net.parts[0].bias[...],
}


@pytest.mark.parametrize("n", [1, 3, 10])
@pytest.mark.parametrize("way", AT_ONE_MOMENT.values(), ids=AT_ONE_MOMENT)
def test_all_variables_are_those_of_one_moment(way, n):
  net = Net(n)
  with Training(step, net):
    for _ in range(30):
      assert len(values(way(net))) == 1


@pytest.mark.parametrize("way", ONE_BY_ONE.values(), ids=ONE_BY_ONE)
def test_each_variable_is_what_a_step_has_left(way):
  net = Net(3)
  with Training(step, net):
    for _ in range(100_000):
      if _jax.taken.is_seen:  # from then on, layers copy what they read, too
        break
      net.parts[0].kernel[...]
    for _ in range(20):
      assert all(x == int(x) for x in values(way(net)))


def test_a_copy_of_the_state_goes_to_a_model_of_this_thread():
  net, mine = Net(4), Net(4)
  with Training(step, net):
    for _ in range(30):
      nnx.update(mine, nnx.pure(nnx.state(net)))
      assert len(values(nnx.pure(nnx.state(mine)))) == 1
      assert np.isfinite(mine(X)).all()


def test_a_step_may_be_the_last_one():
  for _ in range(10):
    net = Net(3)
    step(net)
    thread = threading.Thread(target=lambda net=net: [step(net) for _ in range(100)])
    thread.start()
    while thread.is_alive():
      assert len(values(nnx.pure(nnx.state(net)))) == 1
    thread.join()
    assert values(nnx.pure(nnx.state(net))) == {101.0}


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_buffer_that_nobody_gives_back_is_an_error_at_once(is_alone, request):
  if not is_alone:
    done = threading.Event()
    threading.Thread(target=done.wait).start()
    request.addfinalizer(done.set)
  v = nnx.Variable(jnp.ones(2))
  _jax.peek_cell(v.get_raw_value()).delete()
  slept = []
  request.getfixturevalue("monkeypatch").setattr(_jax, "wait", slept.append)
  with pytest.raises((RuntimeError, ValueError), match="deleted"):
    v[...]
  with pytest.raises((RuntimeError, ValueError), match="deleted"):
    nnx.clone(v)
  with pytest.raises((RuntimeError, ValueError), match="deleted"):
    nnx.jit(lambda v: v[...] + 1)(v)
  assert len(slept) < 500


def test_a_look_at_other_threads_keeps_nothing_alive(request):
  done = threading.Event()
  threading.Thread(target=done.wait).start()
  request.addfinalizer(done.set)
  request.addfinalizer(gc.enable)
  gc.disable()
  net = Net(1)
  net(X)
  gone = [weakref.ref(x) for x in (net, net.parts[0], net.parts[0].kernel, net.parts[0].bias)]
  del net
  assert [ref() for ref in gone] == [None] * 4
