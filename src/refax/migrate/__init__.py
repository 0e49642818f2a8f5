"""Code that was written for Flax NNX, moved to `from refax import nnx`.

`python -m refax.migrate PATH...` lists what to write; `--write` writes what is certain. A file is
read into pieces of code (`document.py`), which are one module with scopes (`source.py`); rules look
at its imports, names, calls and Variables, and return findings (`edit.py`).
"""
