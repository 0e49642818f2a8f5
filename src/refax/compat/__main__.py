"""`python -m refax.compat script.py`: a program that imports `flax.nnx` gets Refax."""

import pathlib
import runpy
import sys

from refax.compat.install import install_as_flax


def main() -> None:
  """Run a script, or with `-m` a module, with `flax.nnx` being Refax."""
  arguments = sys.argv[1:]
  as_module = arguments[:1] == ["-m"]
  if as_module:
    arguments = arguments[1:]
  if not arguments or arguments[0].startswith("-"):
    print("usage: python -m refax.compat script.py [argument ...]", file=sys.stderr)
    print("       python -m refax.compat -m module [argument ...]", file=sys.stderr)
    raise SystemExit(2)
  install_as_flax()
  sys.argv = arguments
  if as_module:
    sys.path[0] = ""
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    return
  script = pathlib.Path(arguments[0])
  if not script.exists():
    print(f"python -m refax.compat: no file {str(script)!r}", file=sys.stderr)
    raise SystemExit(2)
  sys.path[0] = str(script.parent.absolute())
  runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
  main()
