"""nnx.display: a model in a notebook, and as an HTML page that needs no server and no network."""

import contextlib
import html
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from refax import _jax
from refax.core import text
from refax.display import tree
from refax.errors import MissingPackageError


def display(*objects: Any, save: str | Path | None = None) -> None:
  """Show objects: as a tree in a notebook, as text elsewhere, and with `save` as an HTML page.

  In the tree, arrays are heat maps with statistics, Variables have the colour of their type, an
  object that was shown before is a link to its first place, and the shards of an array that lies
  on several devices are drawn. Nothing is written to the objects. The tree is treescope's: without
  that package, and while JAX traces, the text is printed.

  Args:
    *objects: Modules, Variables, States, arrays, and whatever treescope can show.
    save: the file to write the page to; its folder is made.

  Raises:
    MissingPackageError: a page is to be written, and treescope is not installed.

  >>> from refax import nnx
  >>> nnx.display(nnx.Dict(drop=nnx.Dropout(0.5)))
  Dict({
    'drop': Dropout(0.5)
  })
  """
  if save is not None:
    path = Path(save)
    content = page(*objects)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return
  is_drawn = _in_notebook() and _is_concrete(objects)
  if is_drawn and not _has_treescope():
    print(MissingPackageError.extra("nnx.display in a notebook", "treescope", "display"))
    is_drawn = False
  for x in objects:
    if not is_drawn:
      print(x)
      continue
    import treescope

    with _drawing(x):
      treescope.display(x)


def page(*objects: Any) -> str:
  """The page that `display(*objects, save=...)` writes.

  Raises:
    MissingPackageError: treescope is not installed.
  """
  if not _has_treescope():
    raise MissingPackageError.extra("nnx.display(save=...)", "treescope", "display")
  title = ", ".join(type(x).__name__ for x in objects) or "nothing"
  sections = "\n".join(_section(x) for x in objects)
  return _PAGE.format(title=html.escape(title), style=_STYLE, sections=sections, script=_SCRIPT)


def _section(obj: Any) -> str:
  import treescope

  if not _is_concrete(obj):
    return f"<section><pre>{html.escape(text.render_to_text(obj, full=False))}</pre></section>"
  with _drawing(obj):
    shown = treescope.render_to_html(obj, ignore_exceptions=True, compressed=False)
  chips = "".join(
    f'<li><i style="background:{tree.colour_of(name)}"></i>{html.escape(name)}'
    f" <b>{html.escape(text.count(*sizes))}</b></li>"
    for name, sizes in tree.totals(obj).items()
  )
  head = f"<h1>{html.escape(type(obj).__name__)}</h1>"
  legend = f'<ul class="legend">{chips}</ul>' if chips else ""
  return f'<section>{head}{legend}<div class="tree">{shown}</div></section>'


@contextlib.contextmanager
def _drawing(obj: Any) -> Iterator[None]:
  """What is drawn inside knows how many arrays there are, and opens as much as fits on a screen."""
  import treescope

  token = tree.drawing(tree.count_arrays(obj))
  try:
    with treescope.using_expansion_strategy(max_height=30, target_width=70):
      yield
  finally:
    tree.end(token)


def _is_concrete(obj: Any) -> bool:
  """Whether values can be looked at: JAX is not tracing, and none is a tracer of a trace before."""
  return _jax.no_trace_active() and not any(map(_jax.is_tracer, jax.tree.leaves(obj)))


def _has_treescope() -> bool:
  try:
    import treescope  # noqa: F401
  except ImportError:
    return False
  return True


def _in_notebook() -> bool:
  """Whether there is a notebook that shows HTML; IPython in a terminal does not."""
  ipython = sys.modules.get("IPython")
  shell = ipython.get_ipython() if ipython is not None else None
  return getattr(shell, "kernel", None) is not None


_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; padding: 1.25rem clamp(0.75rem, 3vw, 2.5rem); background: #fff; color: #1f2328;
  font: 15px/1.5 system-ui, sans-serif; }
section + section { margin-top: 2.5rem; border-top: 1px solid #d8dee4; padding-top: 1rem; }
h1 { margin: 0; font-size: 1.4rem; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin: 0.4rem 0 0.9rem;
  padding: 0; list-style: none; }
.legend i { display: inline-block; width: 0.9em; height: 0.9em; margin-right: 0.4em;
  border: 1px solid #0002; border-radius: 3px; vertical-align: -0.1em; }
.legend b { font-weight: 600; font-variant-numeric: tabular-nums; }
.tree { overflow-x: auto; padding: 0.5rem 0 1rem; }
pre { overflow-x: auto; }
.help { margin: 1.5rem 0 0; color: #59636e; font-size: 0.85rem; }
@media (max-width: 600px) { body { font-size: 14px; } }
"""

# The tree lies in a shadow root. A node's path is in its button that copies the path; a node is
# open when its checkbox is checked.
_SCRIPT = """
const opened = event => {
  const link = event.composedPath()[0];
  const wanted = /^shared with (.*)$/.exec(link.textContent || "");
  if (!wanted || link.children.length) return;
  event.preventDefault();
  const root = link.getRootNode();
  const paths = [wanted[1], "." + wanted[1]];
  const target = wanted[1] === "the whole" ? root.querySelector(".foldable_node > label")
    : [...root.querySelectorAll(".copybutton")].find(x => paths.includes(x.dataset.copy));
  if (!target) return;
  for (let node = target; node; node = node.parentElement) {
    const box = node.matches(".foldable_node") && node.querySelector(":scope > label > input");
    if (box && !box.checked) box.click();
  }
  const shown = target.parentElement;
  shown.scrollIntoView({block: "center", inline: "nearest"});
  shown.animate([{background: "#fde68a"}, {background: "transparent"}], 1600);
};
document.addEventListener("click", opened);
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{sections}
<p class="help">Click a line to open or close it. Hover or tap a heat map for its values.</p>
<script>{script}</script>
</body>
</html>
"""
