"""`.value` of a Variable becomes `[...]`; where it is not sure to be a Variable's, a hint."""

from collections.abc import Iterator

import libcst as cst
from libcst.metadata import ImportAssignment

from refax.migrate.edit import Edit, Finding
from refax.migrate.kinds import VARIABLE, Kinds
from refax.migrate.source import Source

LOOK = "`{old}`: if it is a Variable, `{new}` is the usual way; `.value` works too"
FORMAT = "`{old}` in `{{...=}}` prints its own text: write `{new}`"

# Attributes of Variables that Refax has under another name.
RENAMED = {"hijax": "is_hijax"}


def findings(source: Source, kinds: Kinds) -> Iterator[Finding]:
  """What to say of every `.value` in the code."""
  for node in source.nodes:
    if isinstance(node, cst.Attribute) and node.attr.value == "value":
      yield from _value(source, kinds, node)
    elif isinstance(node, cst.Attribute) and node.attr.value in RENAMED:
      yield from _renamed(source, kinds, node)


def _renamed(source: Source, kinds: Kinds, node: cst.Attribute) -> Iterator[Finding]:
  """An attribute of a Variable under its name in Refax."""
  if kinds.is_variable(node.value):
    start, end = source.span(node.attr)
    new = RENAMED[node.attr.value]
    text = f"`{source.text(node)}` -> `{source.text(node.value)}.{new}`"
    yield Finding("change", start, text, (Edit(start, end, new),))


def _value(source: Source, kinds: Kinds, node: cst.Attribute) -> Iterator[Finding]:
  at, end = source.span(node)
  dot = source.span(node.dot)[0]
  old, new = source.text(node), f"{source.data[at:dot].decode().rstrip()}[...]"
  if isinstance(source.parent(node), cst.Del):
    return
  if not kinds.is_variable(node.value):
    if _may_be_variable(source, kinds, node):
      yield Finding("look", at, LOOK.format(old=_line(old), new=_line(new)))
    return
  if _prints_itself(source, node):
    yield Finding("look", at, FORMAT.format(old=_line(old), new=_line(new)))
    return
  yield Finding("change", at, f"`{_line(old)}` -> `{_line(new)}`", (Edit(dot, end, "[...]"),))


def _may_be_variable(source: Source, kinds: Kinds, node: cst.Attribute) -> bool:
  """Whether nothing says that the owner of `.value` is something else."""
  if kinds.of(node.value) is not None:  # a layer, or an object of a class here
    return False
  owner: cst.CSTNode = node.value
  if isinstance(owner, cst.Attribute) and kinds.of(owner.value) == VARIABLE:
    return False
  while isinstance(owner, cst.Attribute | cst.Subscript | cst.Call):
    owner = owner.func if isinstance(owner, cst.Call) else owner.value
  if not isinstance(owner, cst.Name):
    return True
  for assignment in source.assignments(owner):
    if isinstance(assignment, ImportAssignment):
      return False
    above = getattr(assignment, "node", None)
    if isinstance(above, cst.ClassDef):
      return False
    if above is not None and isinstance(
      source.parent(source.parent(above) or above), cst.ExceptHandler
    ):
      return False
  return True


def _prints_itself(source: Source, node: cst.CSTNode) -> bool:
  """Whether an expression stands in `f"{...=}"`."""
  for above in source.parents(node):
    if isinstance(above, cst.FormattedStringExpression):
      return above.equal is not None
    if isinstance(above, cst.BaseStatement):
      return False
  return False


def _line(text: str) -> str:
  return " ".join(text.split())
