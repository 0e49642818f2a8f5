"""install_as_flax: `flax.nnx` is Refax in this process."""

import importlib
import importlib.util
import sys
import types


def install_as_flax() -> None:
  """Let `from flax import nnx` and `import flax.nnx.…` give Refax, in this process.

  The rest of `flax` stays what it is where it is installed; where it is not, `flax` is a package
  with `nnx` only. Call it before the first import of code that uses Flax NNX.

  Raises:
    RuntimeError: Flax's own NNX has been imported already; what holds it would not change.

  >>> import refax.compat
  >>> refax.compat.install_as_flax()                                  # doctest: +SKIP
  >>> from flax import nnx; nnx.Linear.__module__                     # doctest: +SKIP
  'refax.nn.linear.linear'
  """
  nnx = importlib.import_module("refax.compat.nnx")
  loaded = sys.modules.get("flax.nnx")
  if loaded is nnx:
    return
  if loaded is not None:
    raise RuntimeError(
      "flax.nnx has been imported already, and who has it would keep it\n"
      "  fix: call refax.compat.install_as_flax() first, or run python -m refax.compat script.py"
    )
  for name, module in list(sys.modules.items()):
    if name.startswith("refax.compat.nnx"):
      sys.modules[name.replace("refax.compat.nnx", "flax.nnx", 1)] = module
  if importlib.util.find_spec("flax") is None:
    flax = types.ModuleType("flax")
    flax.__path__ = []
    sys.modules["flax"] = flax
  else:
    flax = importlib.import_module("flax")
  flax.nnx = nnx  # pyright: ignore[reportAttributeAccessIssue]
