"""A watch holds exactly as long as what a walk saw is still there."""

import gc
import threading
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.core.flatten import Walk, flatten
from refax.core.watch import Watch, any_array


class Net(nnx.Module):
  def __init__(self):
    self.layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    self.mode = "a"
    self.rate = 0.5
    self.table = jnp.ones(2)
    self.items = [1, nnx.Param(jnp.ones(1))]


def watched(net, **kwargs):
  watch = Watch(**kwargs)
  Walk(watch).entry(net)
  return watch


def test_a_change_is_seen_and_so_is_that_it_was_taken_back():
  net = Net()
  watch = watched(net)
  for _ in range(3):
    net.mode = "b"
    assert not watch.holds()
    net.mode = "a"
    assert watch.holds()
  net.layer.extra = 1
  assert not watch.holds()
  del net.layer.extra
  assert watch.holds()
  layer = net.layer
  net.layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  assert not watch.holds()
  net.layer = layer
  assert watch.holds()


def test_several_changes_hold_again_only_when_all_are_taken_back():
  net = Net()
  watch = watched(net)
  net.mode, net.rate = "b", 2
  net.mode = "a"
  assert not watch.holds()
  net.rate = 0.5
  assert watch.holds()


@pytest.mark.parametrize("value", [1, 1.0, True, np.float32(1)])
def test_equal_values_of_other_types_are_other_values(value):
  net = Net()
  net.mode = "1"
  watch = watched(net)
  net.mode = value
  assert not watch.holds()


def test_what_was_data_and_is_static_now_is_another_thing():
  net, value = Net(), (1, 2)
  net.sizes = nnx.data(value)
  watch = watched(net)
  net.sizes = nnx.static(value)
  assert not watch.holds()
  net.sizes = nnx.data(value)
  assert flatten(net) is not None


def test_another_array_is_another_structure_or_a_value_as_the_watch_says():
  net = Net()
  exact, values = watched(net), watched(net, seen_as=any_array)
  net.table = net.table + 1
  assert not exact.holds() and values.holds()
  net.table = np.ones(5)
  assert values.holds()
  net.table = "no array"
  assert not values.holds()


def test_containers_that_changed_are_looked_at_anew():
  net = Net()
  watch = watched(net)
  net.items.append(2)
  assert not watch.holds()
  net.items.pop()
  assert not watch.holds()  # it does not say what was there
  assert watched(net).holds()


def test_a_write_to_a_variable_is_no_change_and_other_objects_are_none_of_its_business():
  net, other = Net(), Net()
  watch = watched(net)
  net.layer.kernel[...] = 0.0
  net.layer.kernel = jnp.ones((2, 2))
  other.mode = "b"
  other.layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  assert watch.holds()


def test_a_watch_keeps_nothing_alive_and_is_forgotten_with_its_owner():
  net = Net()
  watch = watched(net)
  old = weakref.ref(net.layer)
  net.layer = nnx.Linear(2, 2, rngs=nnx.Rngs(1))
  array = weakref.ref(net.table)
  net.table = None
  gc.collect()
  assert old() is None and array() is None and not watch.holds()
  del watch
  for _ in range(100):
    watched(net)
  assert len(net._pytree.watches) < 20


def test_no_change_of_another_thread_is_lost():
  net = Net()
  watch = watched(net)
  stop = threading.Event()

  def look():
    while not stop.is_set():
      watch.holds()

  threads = [threading.Thread(target=look) for _ in range(2)]
  for thread in threads:
    thread.start()
  try:
    for _ in range(2000):
      net.mode = "b"
      assert not watch.holds()
      net.mode = "a"
      assert watch.holds()
  finally:
    stop.set()
    for thread in threads:
      thread.join()
