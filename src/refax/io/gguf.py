"""load_gguf: the weights of a file of llama.cpp, into a live model.

The format is the business of `gguf_file.py`. Everything else is as for safetensors: `load.py`.
"""

import os
from typing import Any

from refax.core.filters import Filter
from refax.io.gguf_file import reading
from refax.io.load import LoadReport, Progress, load
from refax.io.rename import Rename


def load_gguf(
  tree: Any,
  path: str | os.PathLike[str],
  *,
  rename: Rename | None = None,
  only: Filter = ...,
  strict: bool = True,
  cast: bool = False,
  sep: str = ".",
  progress: Progress | None = None,
) -> LoadReport:
  r"""Read a GGUF file, as llama.cpp has them, into a live model: Variables are written, in place.

  Quantised tensors become float32, one after the other; others come as they are stored. Shapes are
  those of torch, `[out, in]`, so that `nnx.torch_layout` is what renames. Everything else is as in
  `nnx.load_safetensors`: what does not fit is one table, and nothing has been written.

  The conversion to GGUF reorders the rows of queries and keys of a model of the architecture
  `llama` (`metadata["general.architecture"]` of the report); `nnx.rope_halves` puts them back.

  Args:
    tree: a Module, State, or any pytree of Variables, arrays and numbers.
    path: the file.
    rename: from names in the file to names in the model, as in `nnx.load_safetensors`.
    only: which Variables to load; what the file has for others is passed over.
    strict: whether missing and unexpected names are errors.
    cast: whether floats become the floats of the Variable: float32 to bfloat16, for example.
    sep: what stands between the steps of a path.
    progress: what goes through the list of what is read and shows how far it is: `tqdm.tqdm`.

  Returns:
    A report with `loaded`, `missing`, `unexpected`, `aliases` and `metadata`: what the file says
    of itself, as text, without arrays such as the words of a tokenizer.

  Raises:
    CheckpointMismatchError: names, shapes or dtypes differ; a table says which.
    CheckpointFormatError: the file is damaged, or quantised in a way that `gguf` does not know.
    InvalidArgumentError: `rename` makes no sense, or two Variables have one name.
    MissingPackageError: the package `gguf` is not installed.

  >>> from refax import nnx; import gguf, numpy as np, os, tempfile
  >>> path = os.path.join(tempfile.mkdtemp(), "model.gguf")
  >>> writer = gguf.GGUFWriter(path, "llama")
  >>> writer.add_tensor("output.weight", np.ones((5, 3), np.float32))
  >>> writer.write_header_to_file(); writer.write_kv_data_to_file()
  >>> writer.write_tensors_to_file(); writer.close()
  >>> model = nnx.Dict(head=nnx.Linear(3, 5, use_bias=False, rngs=nnx.Rngs(0)))
  >>> report = nnx.load_gguf(model, path, rename=nnx.torch_layout(model, {"output": "head"}))
  >>> report, report.metadata["general.architecture"]
  (LoadReport(1 loaded), 'llama')
  """
  options: dict[str, Any] = {"rename": rename, "only": only, "strict": strict}
  with reading(path) as reader:
    return load("load_gguf", tree, reader, cast=cast, sep=sep, progress=progress, **options)


def metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
  """What a GGUF file says of itself: numbers, texts, and lists of them, by their keys.

  Args:
    path: the file; its tensors are checked, and not read.

  Raises:
    CheckpointFormatError: the file is damaged.
    MissingPackageError: the package `gguf` is not installed.
  """
  with reading(path) as reader:
    return reader.values
