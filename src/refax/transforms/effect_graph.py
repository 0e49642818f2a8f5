"""effect_graph: the effects of a function as a text and as a picture, layer by layer."""

import html
import re
from collections.abc import Sequence

ROW, PAD, WIDTH, LEFT, BOX = 20, 12, 700, 150, 360
READ, WRITE, INK = "#2563a8", "#c0392b", "#1f2328"


class Graph(str):
  """The text of an SVG, which a notebook draws."""

  __slots__ = ()

  def _repr_svg_(self) -> str:
    return str(self)


def by_layer(reads: Sequence[str], writes: Sequence[str]) -> dict[str, dict[str, str]]:
  """The layers in order; in each the names of its state, and what happens to it.

  >>> by_layer(["0.a.kernel", "0.n"], ["0.n", "0.s[0]"])
  {'0': {'n': 'updates'}, '0.a': {'kernel': 'reads'}, '0.s': {'[0]': 'writes'}}
  """
  found: dict[str, dict[str, str]] = {}
  for path in sorted({*reads, *writes}):
    layer, name = _split(path)
    verb = "updates" if path in reads and path in writes else "reads"
    found.setdefault(layer, {})[name] = verb if path in reads else "writes"
  return dict(sorted(found.items()))


def _split(path: str) -> tuple[str, str]:
  """`0.a.kernel` -> `0.a`, `kernel`; `0.s[0]` -> `0.s`, `[0]`; `v` alone is its own layer."""
  match = re.fullmatch(r"(.+?)(?:\.(\w+)|(\[[^\[\]]*\]))", path)
  if match is None:
    return path, ""
  layer, attribute, item = match.groups()
  return layer, attribute or item


def signature(reads: Sequence[str], writes: Sequence[str]) -> str:
  """A line for each layer; `updates` is what is read and written.

  >>> print(signature(["0.a.bias", "0.a.kernel", "0.n"], ["0.n", "0.s[0]"]))
  0: updates n
  0.a: reads bias, kernel
  0.s: writes [0]
  """
  lines = []
  for layer, names in by_layer(reads, writes).items():
    parts = []
    for verb in ("reads", "updates", "writes"):
      mine = [name for name, does in names.items() if does == verb]
      if mine:
        parts.append(f"{verb} {', '.join(mine)}".strip())
    lines.append(f"{layer}: {'; '.join(parts)}")
  return "\n".join(lines) or "no state is read or written"


def draw(reads: Sequence[str], writes: Sequence[str]) -> Graph:
  """The function on the left, and on the right a box for each layer, with arrows between."""
  layers = by_layer(reads, writes)
  boxes, arrows, y = [], [], 44
  left = WIDTH - BOX - 10
  for layer, names in layers.items():
    height = ROW * (len(names) + 1) + PAD
    boxes.append(
      f'<rect x="{left}" y="{y}" width="{BOX}" height="{height}" rx="6" class="layer"/>'
      f'<text x="{left + PAD}" y="{y + ROW}" class="title">{_cut(layer)}</text>'
    )
    for row, (name, verb) in enumerate(names.items(), 2):
      at = y + row * ROW
      boxes.append(f'<text x="{left + 2 * PAD}" y="{at}">{_cut(name)}</text>')
      boxes.append(f'<text x="{left + BOX - PAD}" y="{at}" class="{verb}">{verb}</text>')
      arrows.append((at - 5, verb, left))
    y += height + PAD
  bottom = max(y, 110)
  middle = bottom / 2 + 16
  lines = "\n".join(_arrow(at, verb, end, middle) for at, verb, end in arrows)
  shown = "\n".join(boxes) or f'<text x="{left}" y="{middle + 5}">no state</text>'
  return Graph(
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom}" width="{WIDTH}" '
    f'style="max-width: 100%; height: auto" role="img" aria-label="{_alt(reads, writes)}">\n'
    f"{_STYLE}\n{_KEY}\n{lines}\n"
    f'<rect x="10" y="{middle - 22}" width="{LEFT - 20}" height="44" rx="22" class="function"/>\n'
    f'<text x="{LEFT / 2}" y="{middle + 5}" class="call">the function</text>\n'
    f"{shown}\n</svg>\n"
  )


def _arrow(at: float, verb: str, end: float, middle: float) -> str:
  """A curve from a row to the function (read), from there to the row (write), or both."""
  start, bend = LEFT - 10, (LEFT + end) / 2
  curve = f"M {start} {middle} C {bend} {middle}, {bend} {at}, {end - 2} {at}"
  colour = READ if verb == "reads" else WRITE
  marks = {
    "reads": 'marker-start="url(#read)"',
    "writes": 'marker-end="url(#write)"',
    "updates": 'marker-start="url(#write)" marker-end="url(#write)"',
  }
  return f'<path d="{curve}" stroke="{colour}" {marks[verb]}/>'


def _cut(name: str, length: int = 34) -> str:
  return html.escape(name if len(name) <= length else f"…{name[1 - length :]}")


def _alt(reads: Sequence[str], writes: Sequence[str]) -> str:
  return html.escape(signature(reads, writes).replace("\n", "; "), quote=True)


_STYLE = f"""<style>
svg {{ background: #fff; }}
text {{ font: 13px ui-monospace, monospace; fill: {INK}; }}
path {{ fill: none; stroke-width: 1.4; }}
.layer {{ fill: #f6f8fa; stroke: #d0d7de; }}
.function {{ fill: #fff7e0; stroke: #d4a72c; }}
.title {{ font-weight: 600; }}
.call {{ text-anchor: middle; }}
.reads, .writes, .updates {{ text-anchor: end; }}
.reads {{ fill: {READ}; }}
.writes, .updates {{ fill: {WRITE}; }}
</style>
<defs>
<marker id="read" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"
  orient="auto-start-reverse"><path d="M 0 0 L 8 4 L 0 8 z" style="fill: {READ}"/></marker>
<marker id="write" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"
  orient="auto-start-reverse"><path d="M 0 0 L 8 4 L 0 8 z" style="fill: {WRITE}"/></marker>
</defs>"""

_KEY = (
  f'<text x="10" y="22"><tspan style="fill: {READ}">reads</tspan>, '
  f'<tspan style="fill: {WRITE}">writes</tspan>, '
  f'<tspan style="fill: {WRITE}">updates</tspan> (reads and writes)</text>'
)
