"""How Variables, Modules and States print.

A type says its parts in `__repr_parts__`, and in `__repr_line__` what stands for it inside another
object when one line is enough: `brief` says which lines layers have. Colours appear on a terminal
only, never in a file or a test.
"""

import functools
import itertools
import os
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refax import _jax
from refax.typing import describe

DEPTH = 40  # what is below is left out
INDENT = "  "
LONG = 60  # a value with a longer text is only named in a line
LONGEST = 200  # characters of an attribute's text inside an object
FOLD = 3  # so many equal items in a row, or more, are shown once


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
  folds: bool = False  # whether a run of equal items is shown once, with their number


class Line(NamedTuple):
  """What stands for an object inside another one; the comment comes after the comma."""

  text: str
  comment: str = ""


class Words:
  """Text that prints as it is."""

  def __init__(self, text: str):
    self.text = text

  def __repr__(self) -> str:
    return self.text


class Style(NamedTuple):
  """How deep things are shown: whole arrays in a Variable or State, shapes inside a Module."""

  known: dict[int, tuple[str, Any]]  # the objects that have been shown, with their paths
  shapes: bool = False
  colour: bool = False
  seen: tuple[int, ...] = ()
  full: bool = False  # all attributes, and no object on one line
  short: bool = False  # Variables on one line
  path: str = ""


as_tree: Callable[[Any, str | None, Any], Any] = lambda *_: NotImplemented
"""`__treescope_repr__` of all types: what a notebook shows; filled by `display`."""


def render(obj: Any) -> str:
  """The text of an object with `__repr_parts__`."""
  return _render(obj, Style({}, colour=_colours())).text


def render_to_text(obj: Any, *, full: bool = True) -> str:
  """The text of an object, with everything that is in it: what `repr` leaves out is there.

  `repr` shows a layer of Refax on one line, with the arguments that differ from the defaults. The
  full text has a line for each attribute of each layer.

  Args:
    obj: a Module, Variable or State, or a list, tuple or dict of these.
    full: False gives the text that `repr` gives, without colours.

  Returns:
    The text, without colours.

  >>> from refax import nnx
  >>> net = nnx.Dict(drop=nnx.Dropout(0.5))
  >>> print(net)
  Dict({
    'drop': Dropout(0.5)
  })
  >>> print(nnx.render_to_text(net))
  Dict({
    'drop': Dropout(
      broadcast_dims=(),
      deterministic=False,
      rate=0.5,
      rng_collection='dropout',
      rngs=None
    )
  })
  """
  return _render(obj, Style({}, full=full)).text


def _render(obj: Any, style: Style) -> Line:
  if hasattr(type(obj), "__repr_parts__"):
    return _object(obj, style)
  return Line(_value(obj, style))


def _value(obj: Any, style: Style) -> str:
  if isinstance(obj, jax.Array | np.ndarray):
    return _array(obj, style)
  if isinstance(obj, np.dtype) or (isinstance(obj, type) and issubclass(obj, np.generic)):
    return np.dtype(obj).name
  if isinstance(obj, type):
    return obj.__name__
  if isinstance(obj, types.MethodType):  # its own text would be that of the whole object
    return f"<bound method {obj.__func__.__qualname__}>"
  if isinstance(obj, functools.partial):
    keywords = [f"{name}={_render(x, style).text}" for name, x in obj.keywords.items()]
    parts = [obj.func, *obj.args]
    return f"partial({', '.join([*(_render(x, style).text for x in parts), *keywords])})"
  if _is_container(obj) and obj and _has_parts(obj):
    return _builtin(obj, style)
  try:
    name = getattr(obj, "__name__", None) if callable(obj) and not style.full else None
    shown = name if isinstance(name, str) else repr(obj)
  except Exception as error:  # a user's object may do anything, and printing is for finding out
    return f"<{type(obj).__name__}: its repr raises {type(error).__name__}>"
  is_cut = style.shapes and not style.full and len(shown) > LONGEST
  return f"{shown[:LONGEST]}..." if is_cut else shown


def _object(obj: Any, style: Style) -> Line:
  if id(obj) in style.seen or len(style.seen) >= DEPTH:
    return Line(f"{type(obj).__name__}(...)")
  if hasattr(type(obj), "_entries"):  # an object, not the mapping that is made of a State
    if id(obj) in style.known:
      path = style.known[id(obj)][0].removeprefix(".")
      return Line(f"{type(obj).__name__}(...)", f"shared with {path}")
    style.known[id(obj)] = style.path, obj
  if style.seen and not style.full and hasattr(type(obj), "__repr_line__"):
    line = obj.__repr_line__(style)
    if line is not None:
      name, dot, rest = line.text.partition("(")
      return line._replace(text=_paint(name, style, "name") + dot + rest)
  return Line(_block(obj, style))


def _block(obj: Any, style: Style) -> str:
  inner = style._replace(seen=(*style.seen, id(obj)))
  parts, inner = obj.__repr_parts__(inner)
  comment = f" # {parts.comment}" if parts.comment else ""
  found = [
    (_paint(label, style, "attribute"), _render(value, inner._replace(path=style.path + at)))
    for label, value, at in _located(parts.items)
  ]
  open_, close = _paint(parts.open, style, "name"), parts.close
  if not found:
    return open_ + close + comment
  lines = _lines(_folded(found) if parts.folds and not style.full else found, style)
  return f"{open_}{_paint(comment, style, 'comment')}\n{_indented(lines)}\n{close}"


def _located(items: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any, str]]:
  """Each item with its place in the object: `.name`, `[0]` or `['key']`."""
  for index, (label, value) in enumerate(items):
    key = label.rstrip("=: ")
    at = f"[{index}]" if not label else f".{key}" if label.endswith("=") else f"[{key}]"
    yield label, value, at


def _folded(found: list[tuple[str, Line]]) -> list[tuple[str, Line]]:
  """A run of equal lines as one: `12 x Linear(4, 4)`."""
  runs = [(item, len(list(run))) for item, run in itertools.groupby(found)]
  few = all(n < FOLD for _, n in runs)
  return found if few else [_times(*item, n) for item, n in runs]


def _times(label: str, line: Line, n: int) -> tuple[str, Line]:
  if n == 1:
    return label, line
  return label, Line(f"{n} x {line.text}", f"{line.comment} each" if line.comment else "")


def _lines(found: list[tuple[str, Line]], style: Style) -> list[str]:
  """Each item on a line, or on several; a comment comes after the comma."""
  lines = []
  for index, (label, line) in enumerate(found):
    comma = "," if index < len(found) - 1 else ""
    comment = _paint(f" # {line.comment}", style, "comment") if line.comment else ""
    lines.append(f"{label}{line.text}{comma}{comment}")
  return lines


def _indented(lines: list[str]) -> str:
  return INDENT + "\n".join(lines).replace("\n", "\n" + INDENT)


def _is_container(obj: Any) -> bool:
  return type(obj) in (list, tuple, dict) or _is_named_tuple(obj)


def _is_named_tuple(obj: Any) -> bool:
  return isinstance(obj, tuple) and isinstance(getattr(type(obj), "_fields", None), tuple)


def _builtin(obj: Any, style: Style) -> str:
  open_, close, labels, values = "(", ")", [""] * len(obj), list(obj)
  if isinstance(obj, dict):
    open_, close, labels, values = "{", "}", [f"{k!r}: " for k in obj], list(obj.values())
  elif isinstance(obj, list):
    open_, close = "[", "]"
  elif _is_named_tuple(obj):
    open_, labels = f"{type(obj).__name__}(", [f"{name}=" for name in type(obj)._fields]
  items = _located(zip(labels, values, strict=True))
  style = style._replace(short=style.shapes)
  found = [(k, _render(v, style._replace(path=style.path + at))) for k, v, at in items]
  is_long = any("\n" in line.text or line.comment for _, line in found)
  if is_long and style.shapes and not style.full:
    return f"{open_}\n{_indented(_lines(found, style))}\n{close}"
  last = "," if open_ == "(" and len(found) == 1 else ""
  return open_ + ", ".join(label + line.text for label, line in found) + last + close


def _has_parts(obj: Any) -> bool:
  values = obj.values() if isinstance(obj, dict) else obj
  return any(
    isinstance(v, jax.Array | np.ndarray)
    or hasattr(type(v), "__repr_parts__")
    or (_is_container(v) and _has_parts(v))
    for v in values
  )


def short(value: Any) -> str:
  """The text of a value within a line: a function's name, and the type where it would be long."""
  shown = _render(value, Style({})).text
  is_long = len(shown) > LONG or "\n" in shown or " at 0x" in shown
  return f"{type(value).__name__}(...)" if is_long else shown


def variable_line(name: str, cell: Any, metadata: Mapping[str, Any], style: Style) -> Line | None:
  """`Param(float32[2,3])`: a Variable inside a layer of Refax that is part of a model."""
  if not style.short or style.full:
    return None
  leaves = jax.tree.leaves(cell)
  is_one = len(leaves) == 1 and leaves[0] is cell
  kind = describe(cell) if is_one or not leaves else f"{len(leaves)} arrays"
  return Line(f"{name}({', '.join([kind, *(f'{k}={short(v)}' for k, v in metadata.items())])})")


def _array(x: Any, style: Style) -> str:
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
  return f"{n:,} ({scaled(nbytes)}B)"


def scaled(n: float) -> str:
  """A number with three or four figures, before its unit: `1.2 M`, or `12 `.

  >>> f"{scaled(1_234_567)}B", f"{scaled(12)}B"
  ('1.2 MB', '12 B')
  """
  unit = ""
  for unit in ("", "K", "M", "G", "T"):
    if n < 1000 or unit == "T":
      break
    n /= 1000
  return f"{n:.1f} {unit}" if unit else f"{n:.0f} "


_COLOURS = {"name": "38;5;79", "attribute": "38;5;117", "comment": "38;5;244"}


def _paint(text: str, style: Style, role: str) -> str:
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
