"""Every dtype that JAX has, through a checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import nnx
from refax.core.processes import flat_bytes
from refax.errors import InvalidArgumentError
from refax.io.stored import as_bytes, from_bytes

pytest.importorskip("orbax.checkpoint", reason="checkpoints are written by orbax-checkpoint")

NAMES = [
  "bool", "int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32",
  "float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn",
  "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "bfloat16", "float16",
  "float32", "complex64",
]  # fmt: skip


def example(name):
  """All bit patterns of a small dtype, some of a large one."""
  dtype = jnp.dtype(name)
  if dtype == jnp.bool_:
    return np.array([True, False])
  if jnp.issubdtype(dtype, jnp.integer):
    info = jnp.iinfo(dtype)
    return np.array([int(info.min), 0, 1, int(info.max)]).astype(dtype)
  if dtype.itemsize == 1 and dtype.name != "float4_e2m1fn":
    return np.arange(256, dtype=np.uint8).view(dtype)
  return np.array([-2.0, -0.0, 0.5, 6.0]).astype(dtype)


def test_every_dtype_in_every_place(tmp_path):
  arrays = {name: example(name) for name in NAMES}
  wide = {name: np.array([1, 2]).astype(name) for name in ("int64", "float64", "complex128", ">f4")}

  lojax = lambda x: nnx.Variable(x, is_hijax=False)

  def places(of):
    return {
      "variable": {name: nnx.Variable(jnp.asarray(of(x))) for name, x in arrays.items()},
      "lojax": {name: lojax(jnp.asarray(of(x))) for name, x in arrays.items()},
      "jax": {name: jnp.asarray(of(x)) for name, x in arrays.items()},
      "scalar": {name: jnp.asarray(of(x)[1]) for name, x in arrays.items()},
      "numpy": {name: of(x) for name, x in (arrays | wide).items()},
    }  # fmt: skip

  objects, live = places(lambda x: x.copy()), places(np.zeros_like)
  with nnx.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, objects)
    checkpoints.restore(live)
  for place, by_name in objects.items():
    for name, want in by_name.items():
      got, want = (np.asarray(x[...]) for x in (live[place][name], want))
      assert got.dtype == want.dtype, (place, name)
      assert flat_bytes(got).tolist() == flat_bytes(want).tolist(), (place, name)


@pytest.mark.parametrize("name", ["uint2", "uint4", "float8_e4m3"])
def test_bytes_and_back(name):
  x = example(name)
  for y in (x, jnp.asarray(x)):
    again = from_bytes(as_bytes(y), name)
    assert as_bytes(y).dtype == np.uint8 and type(again) is type(y)
    assert flat_bytes(again).tolist() == flat_bytes(x).tolist()


def test_python_and_numpy_numbers_keep_their_kind(tmp_path):
  make = lambda n: {"a": n, "b": float(n), "c": complex(n), "d": bool(n), "e": np.float16(n)}
  live = make(0)
  with nnx.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, make(1))
    checkpoints.restore(live)
  assert live == make(1) and list(map(type, live.values())) == list(map(type, make(1).values()))


@pytest.mark.parametrize("array", [
  np.array(["text"]), np.array([object()], object), np.array([1], "M8[s]"),
  np.zeros(1, [("a", int)]), 2**70,
], ids=["text", "object", "date", "fields", "large"])  # fmt: skip
def test_what_is_no_number_for_jax_is_refused(array, tmp_path):
  with nnx.Checkpointer(tmp_path) as checkpoints:
    with pytest.raises(InvalidArgumentError, match="dtype of a"):
      checkpoints.save(1, {"a": array, "v": nnx.Variable(1)})
    assert checkpoints.steps == []


def test_keys_of_every_implementation_and_shape(tmp_path):
  make = lambda seed: {
    impl: {
      "v": nnx.Variable(jax.random.split(jax.random.key(seed, impl=impl), (2, 3))),
      "a": jax.random.key(seed, impl=impl),
      "empty": nnx.Variable(jax.random.split(jax.random.key(seed, impl=impl), (0, 3))),
      "raw": jax.random.PRNGKey(seed),
    }
    for impl in ("threefry2x32", "rbg", "unsafe_rbg")
  }
  objects, live = make(0), make(1)
  with nnx.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, objects)
    checkpoints.restore(live)
  for impl, keys in objects.items():
    for name, key in keys.items():
      a, b = key[...], live[impl][name][...]
      assert a.dtype == b.dtype and a.shape == b.shape
      np.testing.assert_array_equal(
        *(x if name == "raw" else jax.random.key_data(x) for x in (a, b))
      )
