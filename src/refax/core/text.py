"""How Variables, Modules and States print. A type says its parts in `__repr_parts__`.

Colours appear on a terminal only, never in a file or a test.
"""

import functools
import os
import sys
import types
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refax import _jax

DEPTH = 40  # what is below is left out
INDENT = "  "


class Tracer:
  """Prints as the type of a value that is not known while JAX traces."""

  def __init__(self, x: Any):
    self.text = f"Tracer(shape={x.shape}, dtype={x.dtype})"

  def __repr__(self) -> str:
    return self.text


class Parts(NamedTuple):
  """What an object prints: `open` comment, a line an item, `close`."""

  open: str
  comment: str
  items: Iterable[tuple[str, Any]]
  close: str


class _Style(NamedTuple):
  """How deep things are shown: whole arrays in a Variable or State, shapes inside a Module."""

  shapes: bool = False
  colour: bool = False
  seen: tuple[int, ...] = ()


def render(obj: Any) -> str:
  """The text of an object with `__repr_parts__`."""
  return _render(obj, _Style(colour=_colours()))


def _render(obj: Any, style: _Style) -> str:
  if hasattr(type(obj), "__repr_parts__"):
    return _block(obj, style)
  if isinstance(obj, jax.Array | np.ndarray):
    return _array(obj, style)
  if isinstance(obj, np.dtype) or (isinstance(obj, type) and issubclass(obj, np.generic)):
    return np.dtype(obj).name
  if isinstance(obj, type):
    return obj.__name__
  if isinstance(obj, types.MethodType):  # its own text would be that of the whole object
    return f"<bound method {obj.__func__.__qualname__}>"
  if isinstance(obj, functools.partial):
    parts = [obj.func, *obj.args, *obj.keywords.values()]
    return f"partial({', '.join(_render(x, style) for x in parts)})"
  if type(obj) in (list, tuple, dict) and obj and _has_parts(obj):
    return _builtin(obj, style)
  return repr(obj)


def _block(obj: Any, style: _Style) -> str:
  if id(obj) in style.seen or len(style.seen) >= DEPTH:
    return f"{type(obj).__name__}(...)"
  inner = style._replace(seen=(*style.seen, id(obj)))
  parts, inner = obj.__repr_parts__(inner)
  comment = f" # {parts.comment}" if parts.comment else ""
  lines = [_item(name, _render(value, inner), style) for name, value in parts.items]
  open_, close = _paint(parts.open, style, "name"), parts.close
  if not lines:
    return open_ + close + comment
  body = ",\n".join(lines).replace("\n", "\n" + INDENT)
  return f"{open_}{_paint(comment, style, 'comment')}\n{INDENT}{body}\n{close}"


def _item(name: str, value: str, style: _Style) -> str:
  return _paint(name, style, "attribute") + value


def _builtin(obj: Any, style: _Style) -> str:
  if isinstance(obj, dict):
    items = [f"{k!r}: {_render(v, style)}" for k, v in obj.items()]
    return "{" + ", ".join(items) + "}"
  items = [_render(v, style) for v in obj]
  if isinstance(obj, list):
    return "[" + ", ".join(items) + "]"
  return "(" + ", ".join(items) + ("," if len(items) == 1 else "") + ")"


def _has_parts(obj: Any) -> bool:
  values = obj.values() if isinstance(obj, dict) else obj
  return any(
    isinstance(v, jax.Array | np.ndarray)
    or hasattr(type(v), "__repr_parts__")
    or (type(v) in (list, tuple, dict) and _has_parts(v))
    for v in values
  )


def _array(x: Any, style: _Style) -> str:
  if _jax.is_tracer(x):
    return repr(Tracer(x))
  is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  if is_key:
    return f"Array(shape={x.shape}, dtype={x.dtype})"
  if style.shapes:
    return f"Array(shape={x.shape}, dtype={x.dtype!r})"
  return repr(x)


def count(n: int, nbytes: int) -> str:
  """`3 (12 B)`: a number of elements and their bytes, with three figures.

  >>> count(1_500_000, 6_000_000)
  '1,500,000 (6.0 MB)'
  """
  size, unit = float(nbytes), "B"
  for unit in ("B", "KB", "MB", "GB", "TB"):
    if size < 1000 or unit == "TB":
      break
    size /= 1000
  return f"{n:,} ({nbytes} B)" if unit == "B" else f"{n:,} ({size:.1f} {unit})"


_COLOURS = {"name": "38;5;79", "attribute": "38;5;117", "comment": "38;5;244"}


def _paint(text: str, style: _Style, role: str) -> str:
  return f"\x1b[{_COLOURS[role]}m{text}\x1b[0m" if style.colour and text else text


def _colours() -> bool:
  if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
    return False
  notebook = type(sys.displayhook).__name__ == "ZMQShellDisplayHook"
  return notebook or bool(getattr(sys.stdout, "isatty", lambda: False)())


def size(tree: Any) -> tuple[int, int]:
  """The number of elements and of bytes of the arrays in a pytree."""
  arrays = [x for x in jax.tree.leaves(tree) if hasattr(x, "shape") and hasattr(x, "dtype")]
  return sum(int(x.size) for x in arrays), sum(int(x.size) * x.dtype.itemsize for x in arrays)
