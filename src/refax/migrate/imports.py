"""Imports of `flax.nnx`: the names that Refax has move, the others stay and are listed."""

from collections.abc import Iterator
from typing import Any

import libcst as cst

from refax import names
from refax.migrate.edit import Edit, Finding, remove
from refax.migrate.source import ROOTS, Source, Use, bound_name, dotted_text, import_of

NNX = "flax.nnx"
STAR = "`{line}`: write the names that you use, `from refax.nnx import Linear, Param`, or `nnx.`"
UNKNOWN = "`{path}`: Flax NNX 0.12 has no such name, nor has Refax"


def is_nnx(node: cst.Import | cst.ImportFrom) -> bool:
  """Whether a statement imports NNX, Flax's or Refax's, or something in it."""
  if isinstance(node.names, cst.ImportStar):
    return isinstance(node, cst.ImportFrom) and import_of(node, "").startswith(ROOTS)
  paths = [import_of(node, bound_name(alias)) for alias in node.names]
  return any(f"{path}.".startswith(tuple(f"{r}." for r in ROOTS)) for path in paths)


def findings(source: Source, uses: list[Use]) -> Iterator[Finding]:
  """What to say of every import of Flax NNX."""
  needed = _needed(uses)
  for node in source.nodes:
    if isinstance(node, cst.Import):
      yield from _import(source, node, needed)
    elif isinstance(node, cst.ImportFrom) and not node.relative and node.module:
      yield from _import_from(source, node, dotted_text(node.module))


def _import_from(source: Source, node: cst.ImportFrom, module: str) -> Iterator[Finding]:
  if module == "flax":
    yield from _from_flax(source, node)
    return
  root = next((r for r in (NNX, "refax.nnx") if module == r or module.startswith(f"{r}.")), None)
  if root is None:
    return
  line = " ".join(source.text(node).split())
  if isinstance(node.names, cst.ImportStar):
    if root == NNX:
      yield Finding("write", source.span(node)[0], STAR.format(line=line))
    return
  inside = module[len(root) + 1 :]
  moved: dict[int, str] = {}
  for i, alias in enumerate(node.names):
    path = f"{inside}.{dotted_text(alias.name)}" if inside else dotted_text(alias.name)
    answer = names.find(path)
    if answer and answer.kind != "instead" and answer.text.isidentifier():
      moved[i] = answer.text
    elif root == NNX or answer:
      yield Finding("write", source.span(alias)[0], _left(path, answer))
  if root == NNX or inside:
    yield from _move(source, node, moved, "refax.nnx")


def _left(path: str, answer: names.Answer | None) -> str:
  """The sentence for a name that stays where it is."""
  if answer is None:
    return UNKNOWN.format(path=path)
  if answer.kind == "instead":
    return f"`{path}`: {answer.text}"
  name = path.rpartition(".")[2]
  return f"`{path}`: write `from refax import nnx`, and `nnx.{answer.text}` for `{name}`"


def _from_flax(source: Source, node: cst.ImportFrom) -> Iterator[Finding]:
  if not isinstance(node.names, cst.ImportStar):
    moved = {i: "nnx" for i, a in enumerate(node.names) if dotted_text(a.name) == "nnx"}
    yield from _move(source, node, moved, "refax")


def _move(
  source: Source, node: cst.ImportFrom, moved: dict[int, str], module: str
) -> Iterator[Finding]:
  """Let some names of a `from` import come from another module."""
  aliases: Any = node.names
  if not moved or any(_also_refax(source, aliases[i]) for i in moved):
    return
  parts = [_alias(source, aliases[i], name) for i, name in moved.items()]
  new = f"from {module} import {', '.join(parts)}"
  if len(moved) == len(aliases):
    edits = [Edit(*source.span(node.module), module)]  # pyright: ignore[reportArgumentType]
    for i, name in moved.items():
      if (part := _alias(source, aliases[i], name)) != source.text(aliases[i]).rstrip(", \t"):
        edits.append(Edit(*_alias_span(source, aliases[i]), part))
  else:
    spans = [_alias_span(source, a) for a in aliases]
    edits = [*remove(source.data, spans, set(moved)), _line_after(source, node, new)]
  old = " ".join(source.text(node).split())
  kept = "" if len(moved) == len(aliases) else ", and the rest as it is"
  yield Finding("change", source.span(node)[0], f"`{old}` -> `{new}`{kept}", tuple(edits))


def _alias(source: Source, alias: cst.ImportAlias, name: str) -> str:
  """`name as bound`, so that the code below may use the name that it knows."""
  bound = bound_name(alias)
  if alias.asname and dotted_text(alias.name) == name:
    start, end = _alias_span(source, alias)
    return source.data[start:end].decode()
  return name if bound == name else f"{name} as {bound}"


def _alias_span(source: Source, alias: cst.ImportAlias) -> tuple[int, int]:
  """Where an alias stands, without its comma."""
  start = source.span(alias.name)[0]
  return start, source.span(alias.asname.name if alias.asname else alias.name)[1]


def _also_refax(source: Source, alias: cst.ImportAlias) -> bool:
  """Whether the same name is imported from Refax too, as in `try` and `except ImportError`."""
  scope = source.scope(alias)
  found = list(scope[bound_name(alias)]) if scope is not None else []
  modules = [getattr(a.node, "module", None) for a in found]
  return any(m is not None and dotted_text(m).startswith("refax") for m in modules)


def _needed(uses: list[Use]) -> tuple[set[int], set[int]]:
  """The statements `import flax` that `flax.nnx` is used of, and those that `flax` else is."""
  nnx, other = set(), set()
  for use in uses:
    if use.root == "flax":
      plain = [n for n in use.imports if isinstance(n, cst.Import)]
      better = [n for n in plain if any(dotted_text(a.name).startswith(NNX) for a in n.names)]
      if use.path != ("",):
        nnx.add(id((better or plain)[0]))
      else:
        rest = [n for n in plain if n not in better] or plain
        other |= {id(n) for n in rest}
  return nnx, other


def _import(
  source: Source, node: cst.Import, needed: tuple[set[int], set[int]]
) -> Iterator[Finding]:
  gone: set[int] = set()
  lines: list[str] = []
  for i, alias in enumerate(node.names):
    path = dotted_text(alias.name)
    if path != "flax" and path != NNX and not path.startswith(f"{NNX}."):
      continue
    if alias.asname:
      new = _import_as(path, bound_name(alias)) if path != "flax" else ""
      if new is None:
        text = f"`import {path}`: {_submodule(path)}"
        yield Finding("write", source.span(alias)[0], text)
      elif new and not _also_refax(source, alias):
        gone.add(i)
        lines.append(new)
    elif path != "flax" or id(node) in needed[0]:
      gone.add(i)
      lines += ["import flax"] if id(node) in needed[1] and not _binds_flax(node) else []
      lines.append("import refax.nnx")
  if gone:
    yield _import_change(source, node, gone, list(dict.fromkeys(lines)))


def _binds_flax(node: cst.Import) -> bool:
  """Whether a statement imports another part of Flax, and so the name `flax`, too."""
  paths = [dotted_text(a.name) for a in node.names if not a.asname]
  return any(p.startswith("flax.") and f"{p}.".find(f"{NNX}.") < 0 for p in paths)


def _import_change(source: Source, node: cst.Import, gone: set[int], lines: list[str]) -> Finding:
  kept = len(node.names) - len(gone)
  if kept:
    spans = [_alias_span(source, a) for a in node.names]
    edits = remove(source.data, spans, gone)
  elif "import flax" in lines and source.text(node) == "import flax":
    edits, lines = [], [line for line in lines if line != "import flax"]
  else:
    edits, lines = [Edit(*source.span(node), lines[0])], lines[1:]
  start = source.span(node)[0]
  old, new = " ".join(source.text(node).split()), "; ".join(lines or [edits[0].text])
  edits += [_line_after(source, node, *lines)] if lines else []
  return Finding("change", start, f"`{old}` -> `{new}`", tuple(edits))


def _import_as(path: str, bound: str) -> str | None:
  """The import of a module of Flax NNX under another name, where Refax has the like."""
  inside = path[len(NNX) + 1 :]
  if not inside:
    return "from refax import nnx" if bound == "nnx" else f"from refax import nnx as {bound}"
  answer = names.find(inside)
  if answer is None or answer.kind == "instead" or not answer.text.isidentifier():
    return None
  as_bound = "" if answer.text == bound else f" as {bound}"
  return f"from refax.nnx import {answer.text}{as_bound}"


def _submodule(path: str) -> str:
  answer = names.find(path[len(NNX) + 1 :])
  return answer.text if answer else "Refax has no such module; write the names of `nnx` itself"


def _line_after(source: Source, node: cst.CSTNode, *lines: str) -> Edit:
  """Statements behind another one: on lines of their own, or behind `;` in a line with more."""
  line = source.parent(node)
  block = source.parent(line) if line is not None else None
  start, end = source.span(node)
  alone = isinstance(line, cst.SimpleStatementLine) and len(line.body) == 1
  if not alone or not isinstance(block, cst.Module | cst.IndentedBlock):
    return Edit(end, end, "".join(f"; {text}" for text in lines))
  at = end
  while at < len(source.data) and source.data[at : at + 1] not in (b"\r", b"\n"):
    at += 1
  first = max(source.data.rfind(b"\n", 0, start), source.data.rfind(b"\r", 0, start)) + 1
  indent = source.data[first:start].decode().lstrip("\f\ufeff")
  newline = source.module.default_newline
  return Edit(at, at, "".join(f"{newline}{indent}{text}" for text in lines))
