"""Built of the same seeds, layers hold what those of Flax NNX hold: paths, types, shapes, bits."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx

flax_nnx = pytest.importorskip("flax.nnx", reason="layers are compared with Flax NNX")

LAYERS = {
  "Linear": lambda lib, o: lib.Linear(3, 4, **o),
  "Linear without bias": lambda lib, o: lib.Linear(3, 4, use_bias=False, **o),
  "LinearGeneral": lambda lib, o: lib.LinearGeneral((2, 3), (4, 5), axis=(0, 1), **o),
  "LinearGeneral with batch": lambda lib, o: lib.LinearGeneral(
    3, 4, axis=-1, batch_axis={0: 2}, **o),
  "Einsum": lambda lib, o: lib.Einsum("abc,cd->abd", (3, 4), (4,), **o),
  "Embed": lambda lib, o: lib.Embed(7, 5, **o),
  "Conv": lambda lib, o: lib.Conv(4, 6, (3, 2), feature_group_count=2, **o),
  "ConvTranspose": lambda lib, o: lib.ConvTranspose(3, 4, (3,), **o),
  "BatchNorm": lambda lib, o: lib.BatchNorm(4, **o),
  "LayerNorm": lambda lib, o: lib.LayerNorm(4, **o),
  "RMSNorm": lambda lib, o: lib.RMSNorm(4, **o),
  "GroupNorm": lambda lib, o: lib.GroupNorm(4, num_groups=2, **o),
  "InstanceNorm": lambda lib, o: lib.InstanceNorm(4, **o),
  "MultiHeadAttention": lambda lib, o: lib.MultiHeadAttention(
    2, 6, 4, 8, normalize_qk=True, dropout_rate=0.5, **o),
  "LSTMCell": lambda lib, o: lib.LSTMCell(3, 4, **o),
  "OptimizedLSTMCell": lambda lib, o: lib.OptimizedLSTMCell(3, 4, **o),
  "GRUCell": lambda lib, o: lib.GRUCell(3, 4, **o),
  "SimpleCell": lambda lib, o: lib.SimpleCell(3, 4, **o),
  "RNN": lambda lib, o: lib.RNN(lib.GRUCell(3, 4, **o), rngs=o["rngs"]),
  "Bidirectional": lambda lib, o: lib.Bidirectional(
    lib.RNN(lib.SimpleCell(3, 4, **o)), lib.RNN(lib.SimpleCell(3, 4, **o)), rngs=o["rngs"]),
  "LoRA": lambda lib, o: lib.LoRA(3, 2, 4, **o),
  "LoRA of a layer": lambda lib, o: lib.LoRA(3, 2, 4, base_module=lib.Linear(3, 4, **o), **o),
  "LoRALinear": lambda lib, o: lib.LoRALinear(3, 4, lora_rank=2, **o),
  "PReLU": lambda lib, o: lib.PReLU(param_dtype=o["param_dtype"]),
  "Dropout": lambda lib, o: lib.Dropout(0.5, rngs=o["rngs"]),
  "WeightNorm": lambda lib, o: lib.WeightNorm(lib.Linear(3, 4, **o), rngs=o["rngs"]),
  "SpectralNorm": lambda lib, o: lib.SpectralNorm(lib.Conv(3, 4, (2,), **o), **o),
  "Sequential": lambda lib, o: lib.Sequential(lib.Linear(3, 4, **o), lib.relu, lib.PReLU()),
}  # fmt: skip
HALF = ["Linear", "Embed", "Conv", "BatchNorm", "MultiHeadAttention", "LoRALinear", "SpectralNorm"]
OTHER_TYPES = {
  ("scales", ("kernel",)): "before 0.12.12, Flax had an array that no optimizer sees",
}


def bits(x):
  x = x.get_value() if hasattr(x, "get_value") else x
  return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


CASES = [(name, jnp.float32, 7) for name in LAYERS] + [(n, jnp.bfloat16, 0) for n in HALF]


@pytest.mark.parametrize(("name", "dtype", "seed"), CASES)
def test_a_layer_holds_what_that_of_flax_holds(name, dtype, seed):
  def build(lib):
    rngs = lib.Rngs(seed, dropout=seed + 1)
    layer = LAYERS[name](lib, {"param_dtype": dtype, "rngs": rngs})
    return list(lib.to_flat_state(lib.state(layer))), rngs

  (own, own_rngs), (other, other_rngs) = build(nnx), build(flax_nnx)
  assert [path for path, _ in own] == [path for path, _ in other]
  for (path, got), (_, want) in zip(own, other, strict=True):
    assert (got.shape, got.dtype) == (want.shape, want.dtype), path
    assert type(got).__name__ == type(want).__name__ or path in OTHER_TYPES
    np.testing.assert_array_equal(bits(got), bits(want), err_msg=str(path))
  for stream in ("params", "dropout"):  # the layers that are built next are the same, too
    assert own_rngs[stream]() == other_rngs[stream]()


def test_every_layer_of_flax_is_compared():
  built = {name.split()[0] for name in LAYERS}
  no_layers = {"Module", "RoPE", "Identity", "Pytree", "Optimizer", "Rngs", "RngStream"}
  layers = {
    name
    for name, x in vars(flax_nnx).items()
    if inspect.isclass(x)
    and issubclass(x, flax_nnx.Module)
    and x.__module__.startswith("flax.nnx.nn")
  }
  assert layers - built - no_layers - {"RNNCellBase"} == set()


@pytest.mark.parametrize("options", [{}, {"broadcast_dims": (0,)}, {"rng_collection": "noise"}])
def test_dropout_masks_are_those_of_flax(options):
  def masks(lib):
    layer = lib.Dropout(0.4, **options, rngs=lib.Rngs(3, noise=4))
    return [layer(jnp.ones((5, 6))) for _ in range(3)]

  np.testing.assert_array_equal(masks(nnx), masks(flax_nnx))


@pytest.mark.parametrize("broadcast", [True, False])
def test_dropout_masks_of_attention_are_those_of_flax(broadcast):
  def outputs(lib):
    layer = lib.MultiHeadAttention(
      2, 4, dropout_rate=0.5, broadcast_dropout=broadcast, decode=False, deterministic=False,
      rngs=lib.Rngs(3, dropout=4))  # fmt: skip
    return [layer(jnp.ones((2, 3, 4)), rngs=lib.Rngs(dropout=9)), layer(jnp.ones((2, 3, 4)))]

  np.testing.assert_allclose(outputs(nnx), outputs(flax_nnx), rtol=1e-5, atol=1e-6)
