"""How treescope shows Modules, Variables and States: `__treescope_repr__` of all of them is here.

An object that was shown is a line that names its first path. What a layer of Refax has by default
is left out, as in its `repr`.
"""

import contextvars
import zlib
from typing import Any

import jax
import numpy as np

from refax import _jax
from refax.core import brief, text
from refax.core.containers import Dict, List
from refax.core.node import Node
from refax.core.variable import Variable, identity
from refax.display.picture import Picture
from refax.graph.state import State
from refax.typing import describe

CELLS = 4000  # elements in the drawing of one array
ALL_CELLS = 400_000  # and in all drawings of a page
FEWEST_CELLS = 64
DEPTH = 30  # what is below is left out: treescope takes 20 Python frames a level
SHARED = "shared with "

COLOURS = {
  "Param": "#cfe3fb",
  "BatchStat": "#d3efd6",
  "RngKey": "#e6e6e6",
  "RngCount": "#e6e6e6",
  "OptState": "#fbe3c6",
  "Cache": "#e9dcfa",
  "Intermediate": "#fad7e4",
  "MetricState": "#f6efbb",
  "LoRAParam": "#c5edef",
  "Variable": "#dde3ec",
  "Array": "#f0ece4",
}


class Drawing:
  """What is known while one object is drawn: the paths of what was shown, and the room there is."""

  def __init__(self, cells: int = CELLS):
    self.cells = cells
    self.depth = 0
    self.known: dict[Any, tuple[str | None, Any]] = {}

  def first_path(self, key: Any, obj: Any, path: str | None) -> str | None:
    """Where an object with this key was shown; None if this is the first time."""
    if key in self.known:
      return (self.known[key][0] or "the whole").removeprefix(".")
    self.known[key] = path, obj  # which also keeps its id from being given to another object
    return None


_drawing: contextvars.ContextVar[Drawing | None] = contextvars.ContextVar("drawing", default=None)


def drawing(arrays: int) -> Any:
  """Begin the drawing of an object with so many arrays; the token ends it: `end(token)`."""
  from treescope import type_registries

  for kind in (Node, Variable):  # what is shared is marked here, and not as a mistake
    type_registries.IMMUTABLE_TYPES_REGISTRY[kind] = True
  cells = ALL_CELLS // max(arrays, 1)
  return _drawing.set(Drawing(min(CELLS, max(FEWEST_CELLS, cells))))


def end(token: Any) -> None:
  """The drawing is done."""
  _drawing.reset(token)


def rendered(obj: Any, path: str | None, render: Any) -> Any:
  """`obj.__treescope_repr__(path, render)` of a Pytree, Variable or State."""
  current = _drawing.get()
  if current is None:
    token = drawing(sum(1 for _ in _arrays(obj)))
    try:
      return rendered(obj, path, render)
    finally:
      end(token)
  if current.depth >= DEPTH:
    return _line(f"{type(obj).__name__}(...)", path)
  first = None if isinstance(obj, State) else current.first_path(_key(obj), obj, path)
  if first is not None:
    return _Reference(type(obj).__name__, first).__treescope_repr__(path, render)
  current.depth += 1
  try:
    return _shown(obj, path, render, current)
  finally:
    current.depth -= 1


def _key(obj: Any) -> Any:
  return identity(obj) if isinstance(obj, Variable) else id(obj)


def _shown(obj: Any, path: str | None, render: Any, current: Drawing) -> Any:
  from treescope import repr_lib

  if isinstance(obj, State):
    items = {key: _child(obj[key], current) for key in obj}
    return repr_lib.render_dictionary_wrapper(type(obj), items, path, render)
  if isinstance(obj, List):
    items = [_child(x, current) for x in obj]
    found = repr_lib.render_list_wrapper(type(obj), items, path, render)
  elif isinstance(obj, Dict):
    items = {key: _child(value, current) for key, value, _ in obj._entries()}
    found = repr_lib.render_dictionary_wrapper(type(obj), items, path, render)
  else:
    is_variable = isinstance(obj, Variable)
    attributes = _variable(obj, current) if is_variable else _attributes(obj, current)
    colour = colour_of(type(obj).__name__) if is_variable else None
    found = repr_lib.render_object_constructor(type(obj), attributes, path, render, color=colour)
  return _commented(found, _size(obj))


def _attributes(node: Any, current: Drawing) -> dict[str, Any]:
  entries = list(node._entries())
  if not brief.is_ours(type(node)):
    return {key: _child(value, current) for key, value, _ in entries}
  given = {name: _Text(text.short(value)) for name, value, _ in brief.given(node)}
  return given | {key: _child(value, current) for key, value, is_data in entries if is_data}


def _variable(variable: Any, current: Drawing) -> dict[str, Any]:
  value = jax.tree.map(lambda x: _child(x, current), readable(variable))
  return {"value": value, **variable._def.metadata}


def readable(variable: Any) -> Any:
  """The value of a Variable, in arrays of its own; in a trace its types: a read would be traced."""
  cell = variable.get_raw_value()
  if _jax.no_trace_active() and not any(map(_jax.is_tracer, jax.tree.leaves(cell))):
    return variable.get_value()
  return jax.tree.map(lambda x: text.Words(describe(x)), cell)


def _child(value: Any, current: Drawing) -> Any:
  """What treescope is given for a value: arrays draw themselves."""
  if isinstance(value, Node) and _key(value) in current.known:  # above: treescope would warn
    first = current.first_path(_key(value), value, None) or ""
    return _Reference(type(value).__name__, first)
  if _jax.is_tracer(value) or isinstance(value, jax.ShapeDtypeStruct):
    sharding = getattr(value, "sharding", None)
    spec = getattr(sharding, "spec", None)
    return _Text(describe(value) + (f" sharded by {spec}" if spec is not None else ""))
  if isinstance(value, text.Words):
    return _Text(value.text)
  if isinstance(value, jax.Array | np.ndarray) and not _jax.is_ref(value):
    return Picture(value, current.cells)
  if type(value) is list:
    return [_child(x, current) for x in value]
  if type(value) is tuple:
    return tuple(_child(x, current) for x in value)
  if type(value) is dict:
    return {key: _child(x, current) for key, x in value.items()}
  return value


class _Text:
  """A line of text in a tree."""

  def __init__(self, text: str):
    self.text = text

  def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
    return _line(self.text, path)


def _line(line: str, path: str | None) -> Any:
  from treescope import rendering_parts as parts

  return parts.build_one_line_tree_node(parts.abbreviation_color(parts.text(line)), path=path)


class _Reference:
  """`Linear(...) shared with encoder.embed`: the page's script makes a link of it."""

  def __init__(self, name: str, first: str):
    self.name, self.first = name, first

  def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
    from treescope import rendering_parts as parts

    style = "color: #b45309; text-decoration: underline; cursor: pointer;"
    link = parts.custom_style(parts.text(f"{SHARED}{self.first}"), style)
    return parts.build_one_line_tree_node(parts.siblings(f"{self.name}(...) ", link), path=path)


def _commented(found: Any, comment: str) -> Any:
  from treescope import rendering_parts as parts

  if not comment:
    return found
  shown = parts.comment_color(parts.text(f"  # {comment}"))
  return parts.siblings_with_annotations(found, extra_annotations=[shown])


def _size(obj: Any) -> str:
  if isinstance(obj, Variable):
    n, nbytes = text.size(obj.get_raw_value())
    return text.count(n, nbytes) if n > 1 else ""
  return brief.summary(x for x in brief.leaves(obj) if not brief.is_random(x))


def colour_of(name: str) -> str:
  """The colour of a type of Variables: always the same pale one."""
  hue = zlib.crc32(name.encode()) % 360
  return COLOURS.get(name) or f"hsl({hue} 65% 88%)"


def _arrays(obj: Any) -> Any:
  """The arrays that a drawing of an object has."""
  leaves = jax.tree.leaves(obj, is_leaf=lambda x: isinstance(x, Node | Variable))
  for x in leaves:
    if isinstance(x, Node):
      yield from brief.leaves(x)
    else:
      yield x


def count_arrays(obj: Any) -> int:
  """How many arrays a drawing of an object has."""
  return sum(1 for _ in _arrays(obj))


def totals(obj: Any) -> dict[str, tuple[int, int]]:
  """The number of elements and of bytes that an object holds, by type."""
  return brief.totals(_arrays(obj))


text.as_tree = rendered
