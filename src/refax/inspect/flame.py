"""A flame graph: a box for each layer, as wide as its part, above the layers inside it."""

import html
from collections.abc import Callable, Sequence
from typing import NamedTuple

WIDTH, ROW, TOP, SIDE = 1000, 30, 58, 10
LETTER = 7.3  # the width of one, in the font below
THINNEST = 0.4  # boxes that are thinner cannot be seen
COLOURS = ("#cfe3f7", "#d8efd3", "#fbe3c0", "#e5daf2", "#f8d5d5", "#d3eeee")


class Box(NamedTuple):
  """What a layer takes itself, without the layers inside it."""

  path: str
  size: float
  backward: float | None = None
  """Which part of it is backward; None if that is not known."""


class _Node:
  def __init__(self, name: str, path: str):
    self.name, self.path = name, path
    self.size = self.backward = 0.0
    self.children: list[_Node] = []

  def total(self) -> None:
    """Adds what is inside."""
    for child in self.children:
      child.total()
      self.size += child.size
      self.backward += child.backward


def _tree(boxes: Sequence[Box]) -> _Node:
  """The layers in the layers that they are in, with all that is inside them."""
  nodes = {"": _Node("the whole", "")}
  for box in boxes:
    node = nodes.setdefault(box.path, _Node(box.path, box.path))
    node.size += max(box.size, 0.0)
    node.backward += box.backward or 0.0
  rest = _Node("(no layer)", "(no layer)")
  rest.size, rest.backward = nodes[""].size, nodes[""].backward
  nodes[""].size = nodes[""].backward = 0.0
  for path, node in nodes.items():
    if not path:
      continue
    ends = [i for i, c in enumerate(path) if c == "/" and path[:i] in nodes]
    node.name = path[ends[-1] + 1 :] if ends else path
    nodes[path[: ends[-1]] if ends else ""].children.append(node)
  nodes[""].children.append(rest)
  nodes[""].total()
  return nodes[""]


def draw(boxes: Sequence[Box], what: str, text: Callable[[float], str]) -> str:
  """The picture, an SVG that stands alone.

  Args:
    boxes: the layers, in the order from left to right.
    what: what the widths mean.
    text: how a size is written.
  """
  root = _tree(boxes)
  knows_backward = any(x.backward for x in boxes)
  shown: list[str] = []
  levels = _place(root, float(SIDE), WIDTH - 2.0 * SIDE, 0, 0, root.size or 1.0, text, shown)
  height = TOP + ROW * levels + SIDE
  key = "the dark line below a box is the part of the backward pass" if knows_backward else ""
  title = f"{what}: {text(root.size)}"
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
    f'style="max-width: 100%; height: auto" role="img" aria-label="{html.escape(title, True)}">\n'
    f"{_STYLE}\n"
    f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n'
    f'<text x="{SIDE}" y="24" class="title">{html.escape(title)}</text>\n'
    f'<text x="{SIDE}" y="44" class="key">{key}</text>\n' + "\n".join(shown) + "\n</svg>\n"
  )


def _place(
  node: _Node,
  left: float,
  width: float,
  level: int,
  colour: int,
  whole: float,
  text: Callable[[float], str],
  shown: list[str],
) -> int:
  """Draws a layer and those inside it; returns how many rows there are."""
  y = TOP + ROW * level
  share = f"{100 * node.size / whole:.1f}%"
  part = f", backward {100 * node.backward / node.size:.0f}% of it" if node.backward else ""
  title = html.escape(f"{node.path or node.name}: {text(node.size)}, {share}{part}")
  is_grey = level == 0 or node.path == "(no layer)"
  fill = "#eceff3" if is_grey else COLOURS[colour % len(COLOURS)]
  shown.append(
    f'<g><title>{title}</title><rect x="{left:.2f}" y="{y}" width="{width:.2f}" '
    f'height="{ROW - 2}" fill="{fill}" class="box"/>'
  )
  if node.backward:
    part_width = width * node.backward / node.size
    shown.append(
      f'<rect x="{left:.2f}" y="{y + ROW - 6}" width="{part_width:.2f}" height="4" fill="#5b6b7f"/>'
    )
  label = _label(node.name, share, width - 10)
  if label:
    shown.append(f'<text x="{left + 5:.2f}" y="{y + 17}">{html.escape(label)}</text>')
  shown.append("</g>")
  rows = level + 1
  for i, child in enumerate(node.children):
    inner = width * child.size / node.size if node.size else 0.0
    if inner >= THINNEST:
      mine = i if level == 0 else colour
      rows = max(rows, _place(child, left, inner, level + 1, mine, whole, text, shown))
    left += inner
  return rows


def _label(name: str, share: str, width: float) -> str:
  """As much of the name and the share as there is room for."""
  room = int(width / LETTER)
  if len(name) + 1 + len(share) <= room:
    return f"{name} {share}"
  if len(name) <= room:
    return name
  return f"…{name[1 - room :]}" if room >= 4 else ""


_STYLE = """<style>
text { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #1f2328; }
.title { font-size: 15px; font-weight: 600; }
.key { fill: #59636e; }
.box { stroke: #ffffff; stroke-width: 1; }
</style>"""
