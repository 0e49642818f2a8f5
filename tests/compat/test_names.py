"""Every public name of the installed Flax NNX is there, of the same sort, and takes its flags."""

import inspect
import types

import flax.nnx
import pytest

import refax
from refax import names
from refax.compat import nnx

NAMES = [name for name in dir(flax.nnx) if not name.startswith("_")]


@pytest.mark.parametrize("name", NAMES)
def test_the_name_is_there_and_of_the_same_sort(name):
  theirs, ours = getattr(flax.nnx, name), getattr(nnx, name)
  if isinstance(theirs, types.ModuleType):
    assert isinstance(ours, types.ModuleType)
  elif inspect.isclass(theirs) and not issubclass(theirs, dict):
    assert inspect.isclass(ours) or callable(ours)
  else:
    assert callable(ours) == callable(theirs)


@pytest.mark.parametrize(
  "name",
  [
    name
    for name in NAMES
    if inspect.isfunction(getattr(flax.nnx, name))
    and {"graph", "graph_updates"} & set(inspect.signature(getattr(flax.nnx, name)).parameters)
  ],
)
def test_the_flags_of_modes_are_taken(name):
  """A call with a flag fails, if at all, for want of other arguments."""
  wanted = set(inspect.signature(getattr(flax.nnx, name)).parameters)
  flags = {flag: True for flag in ("graph", "graph_updates") if flag in wanted}
  try:
    getattr(nnx, name)(**flags)
  except Exception as error:
    assert "unexpected keyword argument 'graph" not in str(error)


@pytest.mark.parametrize(
  "path",
  [
    "nn.linear.default_embed_init",
    "nn.linear.default_kernel_init",
    "nn.normalization.BatchNorm",
    "nn.initializers.lecun_normal",
    "nn.dtypes.promote_dtype",
    "statelib.State",
    "statelib.diff",
    "graphlib.split",
    "graph.Key",
    "filterlib.to_predicate",
    "variablelib.VariableMetadata",
    "rnglib.Rngs",
    "spmd.add_axis",
    "training.metrics.Average",
    "training.optimizer.Optimizer",
    "transforms.autodiff.DiffState",
    "transforms.iteration.StateAxes",
    "traversals.flatten_mapping",
    "bridge.ToNNX",
    "helpers.Sequential",
    "pytreelib.Pytree",
    "module.first_from",
  ],
)
def test_the_modules_have_their_names(path):
  theirs, ours = flax.nnx, nnx
  for step in path.split("."):
    theirs, ours = getattr(theirs, step), getattr(ours, step)
  assert callable(ours) == callable(theirs)


def test_modules_are_found_by_import():
  import refax.compat.nnx.nn.linear
  from refax.compat.nnx.training import metrics

  assert refax.compat.nnx.nn.linear.Linear is nnx.Linear is refax.nnx.Linear
  assert metrics.Average is nnx.metrics.Average


def test_a_name_that_nobody_has_says_what_there_is():
  with pytest.raises(AttributeError, match="nnx has no 'Foo'"):
    nnx.Foo


def test_the_clean_namespace_says_what_replaces_a_name():
  with pytest.raises(AttributeError, match=r"fix: write a Module that holds the model") as error:
    refax.nnx.TrainState
  assert "Did you mean" not in str(error.value)
  assert names.find("TrainState") is not None
