"""load_safetensors of a folder or an index: one model in several files, all checked before any."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy as oracle

from refax import nnx
from refax.errors import CheckpointFormatError, CheckpointMismatchError
from refax.io import shards

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
PLACES = {"fc.weight": A, "fc.bias": B, "norm.weight": B}


def make():
  rngs = nnx.Rngs(0)
  return nnx.Dict(fc=nnx.Linear(2, 3, rngs=rngs), norm=nnx.RMSNorm(3, rngs=rngs))


def write(folder, index=None, **changes):
  """Two files and their index; `changes` are those of the index."""
  tensors = {
    "fc.weight": np.arange(6, dtype="f").reshape(3, 2),
    "fc.bias": np.ones(3, "f"),
    "norm.weight": np.full(3, 2, "f"),
  }
  for file in (A, B):
    mine = {name: x for name, x in tensors.items() if PLACES[name] == file}
    oracle.save_file(mine, folder / file, metadata={"format": "pt"})
  whole = {"metadata": {"total_size": 48, "nested": {}}, "weight_map": PLACES | changes}
  (folder / INDEX).write_text(json.dumps(whole if index is None else index))


def load(model, path, **kwargs):
  return nnx.load_safetensors(model, path, rename=nnx.torch_layout(model, {}), **kwargs)


@pytest.mark.parametrize("name", ["", INDEX])
def test_a_folder_and_an_index_load_all_files(tmp_path, name):
  write(tmp_path)
  model = make()
  report = load(model, tmp_path / name)
  assert model.fc.kernel[...].tolist() == [[0, 2, 4], [1, 3, 5]]
  assert model.fc.bias[...].tolist() == [1] * 3 and model.norm.scale[...].tolist() == [2] * 3
  assert report.loaded["fc.kernel"] == "fc.weight"
  assert report.metadata == {"total_size": "48", "format": "pt"}


def test_a_folder_with_one_file_needs_no_index(tmp_path):
  saved, model = make(), make()
  saved.fc.bias[...] = 5.0
  nnx.save_safetensors(saved, tmp_path / "model.safetensors")
  nnx.load_safetensors(model, str(tmp_path))
  assert model.fc.bias[...].tolist() == [5] * 3
  write(tmp_path)  # whose index is not looked at then
  nnx.load_safetensors(model, tmp_path)


def test_links_to_files_elsewhere_are_followed(tmp_path):
  (tmp_path / "blobs").mkdir()
  (tmp_path / "snapshot").mkdir()
  write(tmp_path / "blobs")
  for name in (A, B, INDEX):  # as in the cache of Hugging Face
    (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{name}")
  assert len(load(make(), tmp_path / "snapshot").loaded) == 3


def test_an_empty_folder_is_an_oserror_that_says_what_it_lacks(tmp_path):
  with pytest.raises(
    FileNotFoundError, match=r"neither model\.safetensors nor model\.safeten.*json"
  ):
    load(make(), tmp_path)


def cut(folder):
  write(folder)
  (folder / B).write_bytes((folder / B).read_bytes()[:-4])


def second_tensor(folder):
  write(folder)
  extra = {"fc.bias": np.ones(3, "f"), "norm.weight": np.ones(3, "f"), "extra": np.ones(1, "f")}
  oracle.save_file(extra, folder / B)


def in_both(folder):
  write(folder)
  oracle.save_file({"fc.weight": np.ones((3, 2), "f"), "fc.bias": np.ones(3, "f")}, folder / A)


def text(content):
  return lambda folder: (write(folder), (folder / INDEX).write_bytes(content))


BROKEN = {
  f"the file {B!r}, which is not there": lambda f: (write(f), (f / B).unlink()),
  f"the tensor 'fc.scale', which {B!r} does not have": lambda f: write(f, **{"fc.scale": B}),
  f"the tensor 'fc.weight', which {B!r} does not have": lambda f: write(f, **{"fc.weight": B}),
  f"no tensor 'extra' for {B!r}, which has one": second_tensor,
  f"no tensor 'fc.bias' for {A!r}, which has one": in_both,
  "the file '../x.safetensors', which is no name": lambda f: write(f, a="../x.safetensors"),
  "the file '/etc/x.safetensors', which is no name": lambda f: write(f, a="/etc/x.safetensors"),
  r"the file 'a\\\\b', which is no name": lambda f: write(f, a=r"a\b"),
  "the file '..', which is no name": lambda f: write(f, a=".."),
  "the file '', which is no name": lambda f: write(f, a=""),
  r"the file 'a\\x00', which is no name": lambda f: write(f, a="a\0"),
  "a file of .* bytes whose header describes": cut,
  "no JSON: Expecting": text(b"{nonsense}"),
  "no JSON: .*utf-8": text(b'{"\xff":1}'),
  "no JSON: .*recursion": text(b'{"x":' * 100_000),
  "no JSON: the name 'a' twice": text(b'{"weight_map": {"a": "x", "a": "y"}}'),
  "no weight_map from names": text(b"[1]"),
  "no weight_map from names of tensors": text(b"{}"),
  "no weight_map from names of tensors to names": text(b'{"weight_map": {"a": 1}}'),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_folder_that_contradicts_itself_is_refused_before_any_write(tmp_path, problem):
  BROKEN[problem](tmp_path)
  model = make()
  before = model.fc.kernel[...]
  kind = "safetensors file" if "header" in problem else "index of safetensors files"
  with pytest.raises(CheckpointFormatError, match=rf"no {kind}(.|\n)*at:  .*(.|\n)*got: {problem}"):
    load(model, tmp_path, strict=False)
  assert (model.fc.kernel[...] == before).all()


def test_an_index_has_a_limit(tmp_path, monkeypatch):
  write(tmp_path)
  monkeypatch.setattr(shards, "MAX_INDEX", 10)
  with pytest.raises(CheckpointFormatError, match="more than the 10 bytes"):
    load(make(), tmp_path)


def test_what_does_not_fit_is_one_table_over_all_files(tmp_path):
  write(tmp_path)
  model = make()
  model.fc = nnx.Linear(2, 4, rngs=nnx.Rngs(0))
  before = model.norm.scale[...]
  with pytest.raises(CheckpointMismatchError) as error:
    load(model, tmp_path)
  message = error.value.args[0]
  assert "2 mismatches" in message and str(tmp_path / INDEX) in message
  assert "fc.weight" in message and "fc.bias" in message
  assert (model.norm.scale[...] == before).all()


def test_files_are_closed(tmp_path):
  write(tmp_path)
  with shards.reading_all(tmp_path) as reader:
    files = [reader.readers[name].file for name in PLACES]
    assert not any(file.closed for file in files)
  assert all(file.closed for file in files)


def test_a_stack_takes_its_layers_from_several_files(tmp_path):
  for i, file in enumerate((A, B)):
    oracle.save_file({f"h.{i}.weight": np.full((2, 2), i, "f")}, tmp_path / file)
  weight_map = {"h.0.weight": A, "h.1.weight": B}
  (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
  model = nnx.Dict(h=nnx.Stack(nnx.Linear, 2, 2, 2, use_bias=False, rngs=nnx.Rngs(0)))
  load(model, tmp_path)
  assert jnp.array_equal(
    model.h.layers.kernel[...], jnp.arange(2.0)[:, None, None] * jnp.ones((2, 2))
  )
