"""Layers, pooling, activations and initializers have the parameters and defaults of Flax NNX."""

import inspect

import jax
import pytest

from refax import nnx

flax_nnx = pytest.importorskip("flax.nnx", reason="signatures are compared with Flax NNX")

LAYERS = [
  "BatchNorm", "Conv", "ConvTranspose", "Dropout", "Einsum", "Embed", "GroupNorm", "InstanceNorm",
  "LayerNorm", "Linear", "LinearGeneral", "LoRA", "LoRALinear", "PReLU", "RMSNorm", "WeightNorm",
]  # fmt: skip
POOLING = ["avg_pool", "max_pool", "min_pool", "pool"]


def parameters(function):
  """Names, kinds and those defaults that can be compared."""
  plain = (int, float, str, bool, tuple, type(None))
  return [
    (p.name, p.kind, p.default if isinstance(p.default, plain) else None)
    for p in inspect.signature(function).parameters.values()
  ]


# Here 1 stands where Flax has None, which means 1.
ONES = {"strides": (1, None), "kernel_dilation": (1, None), "input_dilation": (1, None)}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_built_as_in_flax_nnx(name):
  own, other = (parameters(getattr(lib, name).__init__) for lib in (nnx, flax_nnx))
  assert [p[:2] for p in own] == [p[:2] for p in other]
  for (key, _, default), (_, _, want) in zip(own, other, strict=True):
    assert default == want or {default, want} <= set(ONES.get(key, ())), key


@pytest.mark.parametrize("name", [*LAYERS, "SpectralNorm"])
def test_a_layer_is_called_as_in_flax_nnx(name):
  own, other = (parameters(getattr(lib, name).__call__) for lib in (nnx, flax_nnx))
  assert [p[0] for p in own][: len(other)] == [p[0] for p in other]


@pytest.mark.parametrize("name", POOLING)
def test_pooling_has_the_parameters_of_flax_nnx(name):
  assert parameters(getattr(nnx, name)) == parameters(getattr(flax_nnx, name))


def test_every_activation_and_initializer_of_flax_nnx_is_there():
  functions = [n for n in dir(jax.nn) if n in dir(flax_nnx) and callable(getattr(jax.nn, n))]
  assert len(functions) > 25
  assert not [name for name in functions if not hasattr(nnx, name)]
  makers = [n for n in dir(flax_nnx.initializers) if n[0].islower() and n != "tp"]
  assert len(makers) > 15
  assert not [name for name in makers if not hasattr(nnx.initializers, name)]
