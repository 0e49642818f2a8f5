"""Safetensors in one file or in several: an index says which file has which tensor.

Hugging Face writes a large model as `model-00001-of-00003.safetensors` and so on, with
`model.safetensors.index.json` beside them. All headers are read and compared with the index before
any tensor is; the files stay open, so that what was checked is what is read.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from refax.errors import CheckpointFormatError
from refax.io.plan import Reader
from refax.io.tensor_file import Entry, Scratch, quoted, reading

FILE = "model.safetensors"
INDEX = FILE + ".index.json"
MAX_INDEX = 100_000_000
"""Bytes, as many as a header may have."""


class Shards(NamedTuple):
  """Several open files, as one; `path` is that of their index."""

  path: str
  metadata: dict[str, str]
  entries: dict[str, Entry]
  readers: dict[str, Reader]
  """The file of each tensor."""

  def read(self, name: str, scratch: Scratch | None = None) -> np.ndarray:
    """One tensor."""
    return self.readers[name].read(name, scratch)

  def refusal(self, problem: str) -> CheckpointFormatError:
    """The error for the index."""
    return CheckpointFormatError.file(self.path, problem, "index of safetensors files")


@contextlib.contextmanager
def reading_all(path: str | os.PathLike[str]) -> Iterator[Reader]:
  """Open a file, the files that an index names, or what is in a folder; check all headers.

  Raises:
    CheckpointFormatError: a file or the index breaks the rules, or they contradict each other.
    OSError: there is no such file.
  """
  path = os.fsdecode(path)
  if os.path.isdir(path):
    path = _in_folder(path)
  if not path.endswith(".index.json"):
    with reading(path) as reader:
      yield reader
    return
  index = Shards(path, {}, {}, {})
  files = _parse(index)
  with contextlib.ExitStack() as stack:
    for file, names in files.items():
      _add(index, file, names, stack)
    yield index


def _in_folder(folder: str) -> str:
  """The file or the index in a folder; a file goes first, as in `transformers`."""
  for name in (FILE, INDEX):
    path = os.path.join(folder, name)
    if os.path.exists(path):
      return path
  raise FileNotFoundError(
    errno.ENOENT, f"There is neither {FILE} nor {INDEX} in the folder", folder
  )


def _add(index: Shards, file: str, names: list[str], stack: contextlib.ExitStack) -> None:
  """Open a file, and compare what it has with what the index says of it."""
  path = os.path.join(os.path.dirname(index.path), file)
  try:
    reader = stack.enter_context(reading(path))
  except FileNotFoundError:
    raise index.refusal(f"the file {quoted(file)}, which is not there") from None
  expected = set(names)
  for name in names:
    if name not in reader.entries:
      raise index.refusal(f"the tensor {quoted(name)}, which {quoted(file)} does not have")
  for name in reader.entries:
    if name not in expected:
      raise index.refusal(f"no tensor {quoted(name)} for {quoted(file)}, which has one")
  index.entries.update(reader.entries)
  index.readers.update(dict.fromkeys(names, reader))
  index.metadata.update(reader.metadata)


def _parse(index: Shards) -> dict[str, list[str]]:
  """The names of the tensors of each file; the metadata of the index goes to `index`."""
  with open(index.path, "rb") as file:
    text = file.read(MAX_INDEX + 1)
  if len(text) > MAX_INDEX:
    raise index.refusal(f"more than the {MAX_INDEX} bytes that may be")
  try:
    content = json.loads(text.decode(), object_pairs_hook=_distinct)
    json.dumps(content, ensure_ascii=False).encode()
  except (ValueError, RecursionError) as error:
    raise index.refusal(f"no JSON: {str(error)[:80]}") from None
  files = content.get("weight_map") if isinstance(content, dict) else None
  if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
    raise index.refusal("no weight_map from names of tensors to names of files")
  found: dict[str, list[str]] = {}
  for name, file in files.items():
    if file in ("", ".", "..") or any(char in file for char in "/\\\0"):
      raise index.refusal(f"the file {quoted(file)}, which is no name of a file in this folder")
    found.setdefault(file, []).append(name)
  metadata = content.get("metadata")
  if isinstance(metadata, Mapping):
    simple = {k: v for k, v in metadata.items() if isinstance(v, str | int | float)}
    index.metadata.update({name: str(value) for name, value in simple.items()})
  return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found: dict[str, Any] = {}
  for name, value in pairs:
    if name in found:
      raise ValueError(f"the name {quoted(name)} twice")
    found[name] = value
  return found
