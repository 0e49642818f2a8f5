"""Views: the same Variables in an object with other static attributes."""

import jax.numpy as jnp
import pytest

from refax import nnx
from refax.errors import FilterError, MissingArgumentError


class Net(nnx.Module):
  def __init__(self, rngs):
    self.norm = nnx.BatchNorm(2, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(2, 4, rngs=rngs)


class Odd(nnx.Module):
  """What any user may write: it takes every option."""

  def set_view(self, **options):
    self.options = tuple(sorted(options.items()))


@pytest.fixture(params=[True, False], ids=["hijax", "lojax"])
def net(request):
  with nnx.use_hijax(request.param):
    yield Net(nnx.Rngs(0))


def test_a_view_has_other_modes_and_the_same_state(net):
  view = nnx.view(net, deterministic=True, use_running_average=True)
  assert (view.dropout.deterministic, view.norm.use_running_average) == (True, True)
  assert view.attention.deterministic is True
  assert (net.dropout.deterministic, net.norm.use_running_average) == (False, False)
  view.norm.mean[...] = jnp.ones(2)
  assert net.norm.mean[...].tolist() == [1.0, 1.0]


def test_a_filter_chooses_the_modules(net):
  view = nnx.view(net, only=nnx.Dropout, deterministic=True)
  assert view.dropout.deterministic is True and view.attention.deterministic is not True


def test_an_option_that_nobody_takes_is_named_and_nothing_changes(net):
  with pytest.raises(FilterError, match=r"got: nope\n  fix: nnx.view_info"):
    nnx.view(net, deterministic=True, nope=1)
  assert nnx.view(net, raise_if_not_found=False, nope=1).dropout.deterministic is False


def test_a_module_that_takes_every_option_gets_all():
  view = nnx.view(nnx.List([Odd()]), a=1, b=2)
  assert view[0].options == (("a", 1), ("b", 2))


def test_decoding_gets_its_memory(net):
  with pytest.raises(MissingArgumentError, match="decode without batch_size"):
    nnx.view(net, decode=True)
  view = nnx.view(net, decode=True, batch_size=3, max_length=5)
  assert view.attention.cached_key.shape == (3, 5, 2, 2)
  assert net.attention.cached_key is None


def test_view_info_lists_the_options_and_what_they_mean(net):
  info = nnx.view_info(net)
  assert info.index("BatchNorm:") < info.index("Dropout:") < info.index("MultiHeadAttention:")
  assert "  max_length: int | None = None\n    the positions of a memory that is made." in info
  assert nnx.view_info(Odd()) == "Odd:\n  set_view(self, **options)"


def test_attributes_change_in_a_copy_on_the_same_variables(net):
  other = nnx.with_attributes(net, rate=0.1, only=nnx.Dropout)
  assert (other.dropout.rate, net.dropout.rate) == (0.1, 0.5)
  other.norm.var[...] = jnp.zeros(2)
  assert net.norm.var[...].tolist() == [0.0, 0.0]
  with pytest.raises(FilterError, match="nope"):
    nnx.with_attributes(net, nope=1)
  assert not hasattr(nnx.with_attributes(net, nope=1, raise_if_not_found=False), "nope")


def test_a_shared_module_is_one_in_the_view():
  shared = nnx.Dropout(0.5)
  view = nnx.view(nnx.Sequential(shared, shared), deterministic=True)
  assert view.layers[0] is view.layers[1]
