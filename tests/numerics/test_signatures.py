"""Layers, pooling, activations and initializers have the parameters and defaults of Flax NNX."""

import inspect

import jax
import pytest

from refax import nnx

flax_nnx = pytest.importorskip("flax.nnx", reason="signatures are compared with Flax NNX")

LAYERS = [
  "BatchNorm", "Bidirectional", "Conv", "ConvTranspose", "Dropout", "Einsum", "Embed", "GRUCell",
  "GroupNorm", "InstanceNorm", "LSTMCell", "LayerNorm", "Linear", "LinearGeneral", "LoRA",
  "LoRALinear", "MultiHeadAttention", "OptimizedLSTMCell", "PReLU", "RMSNorm", "RNN", "SimpleCell",
  "SpectralNorm", "WeightNorm",
]  # fmt: skip
MORE = {
  ("LoRA", "alpha"): "the scale that published adapters are trained with",
  ("MultiHeadAttention", "sliding_window"): "how far a position sees",
  ("MultiHeadAttention", "rope"): "positions, rotated inside",
  ("MultiHeadAttention", "implementation"): "which kernel of JAX computes it",
  ("MultiHeadAttention", "num_key_value_heads"): "another name, that of published configurations",
}
"""Parameters that Flax has not, and why; they come last, by keyword."""

POOLING = ["avg_pool", "max_pool", "min_pool", "pool"]


def parameters(function):
  """Names, kinds and those defaults that can be compared."""
  plain = (int, float, str, bool, tuple, type(None))
  return [
    (p.name, p.kind, p.default if isinstance(p.default, plain) else None)
    for p in inspect.signature(function).parameters.values()
  ]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_built_as_in_flax_nnx(name):
  own, other = (parameters(getattr(lib, name).__init__) for lib in (nnx, flax_nnx))
  assert own[: len(other)] == other
  more = own[len(other) :]
  assert all((name, p[0]) in MORE and p[1] == inspect.Parameter.KEYWORD_ONLY for p in more)


@pytest.mark.parametrize("name", LAYERS)
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
