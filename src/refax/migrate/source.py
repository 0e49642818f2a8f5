"""A module of code with its scopes, and what its names mean in `flax.nnx` and `refax.nnx`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import libcst as cst
from libcst.metadata import (
  Assignment,
  ByteSpanPositionProvider,
  ExpressionContext,
  ExpressionContextProvider,
  ImportAssignment,
  MetadataWrapper,
  ParentNodeProvider,
  ScopeProvider,
)

from refax import names

ROOTS = ("flax.nnx", "refax.nnx")


@dataclass(frozen=True)
class Use:
  """A name of NNX in the code: `nnx.Linear`, `Linear`, `flax.nnx.Linear`.

  Attributes:
    root: what the first name was imported as, `flax`, `flax.nnx` or `flax.nnx.Linear`.
    chain: the nodes of the dotted name, from the first name to the whole.
    path: the name behind `nnx.`, empty for `nnx` itself.
    flax: whether it comes from Flax.
    imports: the import statements that the first name comes from.
  """

  root: str
  chain: tuple[cst.CSTNode, ...]
  path: tuple[str, ...]
  flax: bool
  imports: tuple[cst.CSTNode, ...]

  def known(self) -> tuple[int, names.Answer] | None:
    """The longest beginning of the path that is a name of Flax NNX, and what to write for it."""
    for size in range(len(self.path), 0, -1):
      if answer := names.find(".".join(self.path[:size])):
        return size, answer
    return None


class Source:
  """Parsed code, with the positions, parents and scopes of its nodes."""

  def __init__(self, text: str):
    self.data = text.encode()
    self.module = cst.parse_module(text)
    if self.module.code != text:
      raise ValueError("the parser does not give back the text that it read")
    wrapper = MetadataWrapper(self.module, unsafe_skip_copy=True)
    found = wrapper.resolve_many(
      [ScopeProvider, ParentNodeProvider, ByteSpanPositionProvider, ExpressionContextProvider]
    )
    self._scopes: Any = found[ScopeProvider]
    self._parents: Any = found[ParentNodeProvider]
    self._spans: Any = found[ByteSpanPositionProvider]
    self._contexts: Any = found[ExpressionContextProvider]
    self.nodes = list(_walk(self.module))

  def parent(self, node: cst.CSTNode) -> cst.CSTNode | None:
    return self._parents.get(node)

  def parents(self, node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    while (above := self.parent(node)) is not None:
      yield above
      node = above

  def span(self, node: cst.CSTNode) -> tuple[int, int]:
    span = self._spans[node]
    return span.start, span.start + span.length

  def text(self, node: cst.CSTNode) -> str:
    start, end = self.span(node)
    return self.data[start:end].decode()

  def loaded(self, node: cst.CSTNode) -> bool:
    return self._contexts.get(node) is ExpressionContext.LOAD

  def scope(self, node: cst.CSTNode) -> Any:
    return self._scopes.get(node)

  def assignments(self, name: cst.Name) -> list[Any]:
    """What gives the name its value, wherever it may be read."""
    scope = self.scope(name)
    return [] if scope is None else list(scope[name.value])

  def imported(self, name: cst.Name) -> tuple[str, tuple[cst.CSTNode, ...]] | None:
    """The dotted name that a name was imported as, and the statements, if nothing else binds it."""
    found: dict[str, list[cst.CSTNode]] = {}
    for assignment in self.assignments(name):
      if isinstance(assignment, ImportAssignment):
        node: Any = assignment.node
        found.setdefault(import_of(node, name.value), []).append(node)
      elif not self._is_none(assignment):
        return None
    if len({_below_root(path) for path in found}) != 1:
      return None
    path = sorted(found)[0]  # `flax` before `refax` where both are tried
    return path, tuple(node for nodes in found.values() for node in nodes)

  def use(self, node: cst.CSTNode) -> Use | None:
    """What a name or a dotted name means in NNX, or None."""
    chain = dotted(node)
    if not chain or (found := self.imported(chain[0])) is None:
      return None
    root, statements = found
    parts = [*root.split("."), *(part.attr.value for part in chain[1:])]
    full = ".".join(parts)
    if not any(full == r or full.startswith(f"{r}.") for r in ROOTS):
      return None
    return Use(root, chain, tuple(parts[2:]), parts[0] == "flax", statements)

  def name(self, node: cst.CSTNode) -> str | None:
    """The name in Refax of what a node means as a whole: `Param` for `nnx.variablelib.Param`."""
    use = self.use(node)
    known = use and use.known()
    if not use or not known or known[0] != len(use.path):
      return None
    return known[1].text if known[1].kind != "instead" else ".".join(use.path)

  def external(self, node: cst.CSTNode) -> str | None:
    """The full dotted name of something that was imported from anywhere."""
    chain = dotted(node)
    if not chain or (found := self.imported(chain[0])) is None:
      return None
    return ".".join([found[0], *(part.attr.value for part in chain[1:])])

  def _is_none(self, assignment: Any) -> bool:
    """Whether a name is set to None, as in `except ImportError: nnx = None`."""
    if not isinstance(assignment, Assignment):
      return False
    target = self.parent(assignment.node)
    above = self.parent(target) if isinstance(target, cst.AssignTarget) else None
    value = above.value if isinstance(above, cst.Assign) else None
    return isinstance(value, cst.Name) and value.value == "None"


def dotted(node: cst.CSTNode) -> tuple[Any, ...]:
  """The nodes of `a.b.c` as `a`, `a.b`, `a.b.c`; empty for other expressions."""
  chain: list[cst.CSTNode] = []
  while isinstance(node, cst.Attribute):
    chain.append(node)
    node = node.value
  return (node, *reversed(chain)) if isinstance(node, cst.Name) else ()


def dotted_text(node: cst.CSTNode) -> str:
  """`a.b.c` of nodes, without what the author put between."""
  chain = dotted(node)
  return ".".join([chain[0].value, *(part.attr.value for part in chain[1:])])


def bound_name(alias: cst.ImportAlias) -> str:
  """The name that an alias of an import binds."""
  if alias.asname:
    return cst.ensure_type(alias.asname.name, cst.Name).value
  return dotted_text(alias.name)


def import_of(node: cst.Import | cst.ImportFrom, name: str) -> str:
  """The dotted name that an import statement binds to `name`, with dots before a relative one."""
  if isinstance(node, cst.Import):
    for alias in node.names:
      if alias.asname and bound_name(alias) == name:
        return dotted_text(alias.name)
    return name
  base = "." * len(node.relative) + (dotted_text(node.module) if node.module else "")
  if isinstance(node.names, cst.ImportStar):
    return f"{base}.*"
  for alias in node.names:
    if bound_name(alias) == name:
      return f"{base}.{dotted_text(alias.name)}"
  return f"{base}.*"


def _below_root(path: str) -> str:
  for root in ROOTS:
    if path == root or path.startswith(f"{root}."):
      return "nnx" + path[len(root) :]
  return path


def _walk(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
  stack = [node]
  while stack:
    node = stack.pop()
    yield node
    stack.extend(reversed(node.children))
