"""load_gguf: what llama.cpp's files hold, in the layouts of torch, or an error and no write."""

import builtins
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refax import nnx
from refax.errors import (
  CheckpointFormatError,
  CheckpointMismatchError,
  InvalidArgumentError,
  MissingPackageError,
)
from refax.io import gguf as gguf_module
from refax.io import gguf_file

gguf = pytest.importorskip("gguf", reason="files of llama.cpp are read by gguf")
QUANTISED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


@pytest.fixture
def path(tmp_path):
  return tmp_path / "model.gguf"


def write(path, tensors, facts=(), kinds=()):
  """A file by the package itself; `kinds` says how a tensor is stored, if not as it is."""
  kinds = dict(kinds)
  writer = gguf.GGUFWriter(path, "llama")
  for key, value in dict(facts).items():
    writer.add_key_value(key, *value)
  for name, x in tensors.items():
    if name in kinds:
      raw = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kinds[name]])
      writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kinds[name]])
    else:
      writer.add_tensor(name, x)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# what is read


@pytest.mark.parametrize("kind", QUANTISED)
def test_blocks_become_the_floats_of_the_package(path, kind, monkeypatch):
  x = draw(70, 96)  # more than 64 blocks, and no multiple of them
  write(path, {"x": x}, kinds={"x": kind})
  (tensor,) = gguf.GGUFReader(path).tensors
  want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
  assert want.shape == (70, 96) and abs(want - x).max() < 0.5
  for chunk in (gguf_file.CHUNK, 1000):
    monkeypatch.setattr(gguf_file, "CHUNK", chunk)
    model = nnx.Dict(x=nnx.Param(jnp.zeros((70, 96))))
    nnx.load_gguf(model, path)
    assert np.asarray(model.x[...]).tobytes() == want.tobytes()


STORED = [np.float32, np.float16, np.int8, np.int16, np.int32]


@pytest.mark.parametrize("dtype", STORED)
def test_other_tensors_come_as_they_are_stored(path, dtype):
  x = (10 * draw(3, 5)).astype(dtype)
  write(path, {"x": x})
  into = {"x": np.zeros_like(x)}
  nnx.load_gguf(into, path)
  assert into["x"].tobytes() == x.tobytes() and into["x"].dtype == dtype


def test_bfloat16_is_bfloat16(path):
  x = draw(3, 32)
  write(path, {"x": x}, kinds={"x": "BF16"})
  model = nnx.Dict(x=nnx.Param(jnp.zeros((3, 32), jnp.bfloat16)))
  nnx.load_gguf(model, path)
  assert (model.x[...] == x.astype(jnp.bfloat16)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("hijax", [True, False])
def test_floats_become_other_floats_only_when_asked(path, dtype, hijax):
  write(path, {"x": draw(4, 32)}, kinds={"x": "Q8_0"})
  model = nnx.Dict(x=nnx.Param(jnp.zeros((4, 32), dtype), is_hijax=hijax))
  with pytest.raises(CheckpointMismatchError, match="pass cast=True"):
    nnx.load_gguf(model, path)
  nnx.load_gguf(model, path, cast=True)
  assert model.x.dtype == dtype and abs(model.x[...].astype("f") - draw(4, 32)).max() < 0.05


FACTS = {
  "llama.block_count": (2, gguf.GGUFValueType.UINT32),
  "llama.eps": (0.5, gguf.GGUFValueType.FLOAT32),
  "tokenizer.add": (True, gguf.GGUFValueType.BOOL),
  "tokenizer.words": (["a", "größe", ""], gguf.GGUFValueType.ARRAY),
  "tokenizer.types": ([1, -2], gguf.GGUFValueType.ARRAY),
}


def test_metadata_is_text_and_has_no_arrays(path):
  write(path, {"x": draw(2)}, FACTS)
  report = nnx.load_gguf({"x": np.zeros(2, "f")}, path)
  want = {
    "general.architecture": "llama",
    "llama.block_count": "2",
    "llama.eps": "0.5",
    "tokenizer.add": "True",
  }
  assert report.metadata == want
  values = gguf_module.metadata(path)
  assert values["tokenizer.words"] == ["a", "größe", ""] and values["tokenizer.types"] == [1, -2]
  assert values["llama.block_count"] == 2 and values["tokenizer.add"] is True
  theirs = gguf.GGUFReader(path).fields
  assert values == {key: theirs[key].contents() for key in values}


def test_every_type_of_number_is_read(path):
  kinds = [kind for kind in gguf.GGUFValueType if kind.name not in ("STRING", "ARRAY", "BOOL")]
  write(path, {}, {kind.name: (7, kind) for kind in kinds})
  values = gguf_module.metadata(path)
  assert {kind.name: values[kind.name] for kind in kinds} == {kind.name: 7 for kind in kinds}
  assert len(kinds) == 10


def llama_rules(heads, kv_heads):
  blocks = r"blocks.\1"
  return {
    "token_embd": "embed",
    r"blk\.(\d+)\.attn_norm": blocks + ".attention_norm",
    r"blk\.(\d+)\.ffn_norm": blocks + ".feed_forward_norm",
    r"blk\.(\d+)\.attn_q": (blocks + ".attention.query", nnx.rope_halves(heads)),
    r"blk\.(\d+)\.attn_k": (blocks + ".attention.key", nnx.rope_halves(kv_heads)),
    r"blk\.(\d+)\.attn_v": blocks + ".attention.value",
    r"blk\.(\d+)\.attn_output": blocks + ".attention.out",
    r"blk\.(\d+)\.ffn_(up|gate|down)": blocks + r".feed_forward.\2",
  }


def test_a_llama_of_llama_cpp_is_the_one_of_hugging_face(path):
  size, heads, kv_heads, layers = 32, 4, 2, 2
  make = lambda: nnx.Dict(
    embed=nnx.Embed(7, size, rngs=nnx.Rngs(0)),
    blocks=nnx.Stack(
      nnx.TransformerBlock,
      layers,
      size,
      heads,
      num_kv_heads=kv_heads,
      gated=True,
      norm=nnx.RMSNorm,
      use_bias=False,
      rope=nnx.RoPE(),
      rngs=nnx.Rngs(0),
    ),
  )
  sizes = {"attn_q": size, "attn_k": 16, "attn_v": 16, "attn_output": size}
  sizes |= {"ffn_up": 128, "ffn_gate": 128}
  tensors = {"token_embd.weight": draw(7, size)}
  for i in range(layers):
    for j, (name, rows) in enumerate(sizes.items()):
      tensors[f"blk.{i}.{name}.weight"] = draw(rows, size, seed=10 * i + j) / 6
    tensors[f"blk.{i}.ffn_down.weight"] = draw(size, 128, seed=10 * i + 7) / 6
    tensors[f"blk.{i}.attn_norm.weight"] = 1 + draw(size, seed=10 * i + 8) / 6
    tensors[f"blk.{i}.ffn_norm.weight"] = 1 + draw(size, seed=10 * i + 9) / 6

  def there(name, x):  # what the conversion does to queries and keys
    n = {"attn_q": heads, "attn_k": kv_heads}.get(name.split(".")[-2])
    if n is None:
      return x
    return np.stack([x.reshape(n, 2, -1, size)[:, i] for i in (0, 1)], 2).reshape(x.shape)

  plain, reordered = make(), nnx.eval_shape(make)
  write(path, tensors)
  rules = {key: to[0] if isinstance(to, tuple) else to for key, to in llama_rules(4, 2).items()}
  nnx.load_gguf(plain, path, rename=nnx.torch_layout(plain, rules))
  write(path, {name: there(name, x) for name, x in tensors.items()})
  rename = nnx.torch_layout(reordered, llama_rules(heads, kv_heads))
  report = nnx.load_gguf(reordered, path, rename=rename)
  assert len(report.loaded) == len(tensors) and not report.missing
  x = plain.embed(jnp.arange(6))
  np.testing.assert_allclose(reordered.blocks(x), plain.blocks(x), rtol=1e-5, atol=1e-5)
  query = plain.blocks.layers.attention.query.kernel[1]
  want = tensors["blk.1.attn_q.weight"].T.reshape(size, heads, -1)
  assert (query == want).all()


# what is refused


def test_what_does_not_fit_is_one_table_and_nothing_is_written(path):
  write(path, {"a.weight": draw(3, 32), "extra": draw(2)}, kinds={"a.weight": "Q8_0"})
  model = nnx.Dict(a=nnx.Linear(32, 4, rngs=nnx.Rngs(0)))
  before = model.a.kernel[...]
  with pytest.raises(CheckpointMismatchError) as error:
    nnx.load_gguf(model, path, rename=nnx.torch_layout(model, {}))
  text = error.value.args[0]
  assert "3 mismatches" in text and "float32[3,32]" in text and str(path) in text
  assert "build the model with this size: Linear here takes [4, 32] of torch" in text
  assert (model.a.kernel[...] == before).all()
  with pytest.raises(InvalidArgumentError, match=r"load_gguf cannot.*rename"):
    nnx.load_gguf(model, path, rename=3)
  with pytest.raises(InvalidArgumentError, match=r"load_gguf cannot.*sep"):
    nnx.load_gguf(model, path, sep="")


def test_without_the_package_the_error_says_how_to_install_it(path, monkeypatch):
  real = builtins.__import__

  def without(name, *args, **kwargs):
    if name == "gguf":
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", without)
  with pytest.raises(MissingPackageError, match=r"load_gguf needs gguf(.|\n)*'refax\[gguf\]'"):
    nnx.load_gguf({}, path)


def test_a_file_that_is_not_there_is_an_oserror(path):
  with pytest.raises(FileNotFoundError):
    nnx.load_gguf({}, path)


def text(value):
  return struct.pack("<Q", len(value)) + value


def header(facts=(), tensors=(), magic=b"GGUF", version=3, data=bytes(64), counts=None):
  """The bytes of a file, whatever they say."""
  n = counts or (len(tensors), len(facts))
  raw = magic + struct.pack("<IQQ", version, *n) + b"".join((*facts, *tensors))
  return raw + bytes(-len(raw) % 32) + data


def tensor(name=b"x", shape=(4,), kind=0, offset=0):
  axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
  return text(name) + axes + struct.pack("<IQ", kind, offset)


def fact(key=b"k", kind=4, value=b"\1\0\0\0"):
  return text(key) + struct.pack("<I", kind) + value


def array(inner, count, items=b""):
  return struct.pack("<IQ", inner, count) + items


DEEP = array(9, 1) * 9 + array(0, 0)
BROKEN = {
  "0 bytes, too short": b"",
  "7 bytes, too short": b"GGUF\3\0\0",
  "begins with b'GGML'": header(magic=b"GGML"),
  "version 1; versions 2 and 3": header(version=1),
  "numbers with the large byte first": header(version=3 << 24),
  "a header that goes on behind the end": header(counts=(0, 2**62), data=b""),
  "a header that goes on behind the end, at byte": header(counts=(2**62, 0), data=b""),
  "header that goes on behind the end": header([text(b"key")[:6]], data=b""),
  "goes on behind the end": header([struct.pack("<Q", 2**63)]),
  "goes on behind the end, at byte": header([fact(kind=9, value=array(4, 2**62))]),
  "that goes on behind the end": header([fact(kind=9, value=array(8, 2**62))]),
  "that goes on behind the end, at": header([fact(kind=9, value=array(9, 2**40))]),
  "unknown type 99": header([fact(kind=99)]),
  "unknown type 77": header([fact(kind=9, value=array(77, 1))]),
  "arrays in arrays in arrays": header([fact(kind=9, value=DEEP)]),
  "no UTF-8": header([fact(key=b"\xff")]),
  "the key 'k' twice": header([fact(), fact()]),
  "the alignment 3, which": header([fact(b"general.alignment", value=struct.pack("<I", 3))]),
  "the alignment 0, which": header([fact(b"general.alignment", value=struct.pack("<I", 0))]),
  "the alignment 'ab', which": header([fact(b"general.alignment", 8, text(b"ab"))]),
  "the name 'x' twice": header(tensors=[tensor(), tensor(offset=32)]),
  "'x' with 5 axes, more than 4": header(tensors=[tensor(shape=(1,) * 5)]),
  "'x' with 4294967295 axes": header(tensors=[text(b"x") + b"\xff" * 4]),
  "'x' of the unknown type 999": header(tensors=[tensor(kind=999)]),
  "rows of 4, no multiple of the 32 of Q4_0": header(tensors=[tensor(kind=2)]),
  "rows of 1, no multiple of the 32 of Q8_0": header(tensors=[tensor(shape=(), kind=8)]),
  "'x' ends at byte .* in a file": header(tensors=[tensor(shape=(17,))]),
  "'x' of F32.*: it": header(tensors=[tensor(shape=(2**62, 2**62))]),
  "'x' of F32.*: ": header(tensors=[tensor(shape=(0, 2**62, 9))]),
  "'x' leaves a gap": header(tensors=[tensor(offset=32)]),
  "'x' leaves a gap before it": header(tensors=[tensor(offset=2**63)]),
  "'y' overlaps another": header(tensors=[tensor(), tensor(b"y")]),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_damaged_file_is_refused_with_its_path_and_the_problem(path, problem):
  path.write_bytes(BROKEN[problem])
  model = nnx.Dict(x=nnx.Param(jnp.zeros(4)))
  at = r"no GGUF file, or it is damaged\n  at:  .*(.|\n)*got: .*"
  with pytest.raises(CheckpointFormatError, match=at + problem) as error:
    nnx.load_gguf(model, path, strict=False)
  assert str(path) in str(error.value)
  assert model.x[...].tolist() == [0] * 4


def test_the_same_bytes_without_a_mistake_are_read(path):
  data = np.arange(16, dtype="<f4").tobytes()
  path.write_bytes(header([fact()], [tensor(), tensor(b"y", offset=32)], data=data))
  into = {"x": np.zeros(4, "f"), "y": np.zeros(4, "f")}
  nnx.load_gguf(into, path)
  assert into["x"].tolist() == [0, 1, 2, 3] and into["y"].tolist() == [8, 9, 10, 11]


def small(path):
  write(path, {"x": draw(4), "y": draw(2, 32)}, {"k": FACTS["tokenizer.words"]}, {"y": "Q4_1"})
  return nnx.Dict(x=nnx.Param(jnp.zeros(4)), y=nnx.Param(jnp.zeros((2, 32))))


def test_a_file_cut_at_any_byte_is_refused(path):
  model = small(path)
  whole = path.read_bytes()
  with gguf_file.reading(path) as reader:
    end = max(entry.end for entry in reader.entries.values())
  for n in range(end):  # behind it, there is nothing that is read
    path.write_bytes(whole[:n])
    with pytest.raises(CheckpointFormatError):
      nnx.load_gguf(model, path)
  assert model.x[...].tolist() == [0] * 4


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_bytes_are_loaded_whole_or_refused(tmp_path_factory, data):
  path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
  model = small(path)
  whole = path.read_bytes()
  at, bit = data.draw(st.integers(0, len(whole) - 65)), data.draw(st.integers(0, 7))
  path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
  try:
    nnx.load_gguf(model, path)
  except (CheckpointFormatError, CheckpointMismatchError):
    assert model.x[...].tolist() == [0] * 4 and not np.asarray(model.y[...]).any()


def test_a_file_that_shrinks_while_it_is_read_is_an_error(path):
  write(path, {"y": draw(256, 256)}, kinds={"y": "Q8_0"})
  with gguf_file.reading(path) as reader:
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(CheckpointFormatError, match="'y' ends early"):
      reader.read("y")
