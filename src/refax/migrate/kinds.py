"""What is known of an expression's value: a Variable, a layer of NNX, an object of a class here.

`.value` is an attribute of enums, futures and syntax trees too, so a Variable is one only where the
code says so: by a constructor, an annotation or an `isinstance`.
"""

from dataclasses import dataclass, field
from typing import Any, TypeGuard

import libcst as cst
from libcst.metadata import Assignment

from refax.migrate.source import Source, dotted

VARIABLE = "Variable"  # the kind of every Variable
UNKNOWN = None

VARIABLES = frozenset(
  [
    *("Variable", "Param", "BatchStat", "Cache", "Intermediate", "Perturbation", "LoRAParam"),
    *("RngState", "RngKey", "RngCount", "OptState", "OptArray", "OptVariable"),
    *("metrics.MetricState", "MetricState"),
  ]
)

_KERNEL_BIAS = dict.fromkeys(["kernel", "bias"], VARIABLE)
_SCALE_BIAS = dict.fromkeys(["scale", "bias"], VARIABLE)
_LORA = dict.fromkeys(["lora_a", "lora_b"], VARIABLE)
_STREAM = dict.fromkeys(["key", "count"], VARIABLE)

# The attributes of NNX's own classes, and the kind of each.
ATTRIBUTES: dict[str, dict[str, str]] = {
  "Linear": _KERNEL_BIAS,
  "LinearGeneral": _KERNEL_BIAS,
  "Einsum": _KERNEL_BIAS,
  "Conv": _KERNEL_BIAS,
  "ConvTranspose": _KERNEL_BIAS,
  "Embed": {"embedding": VARIABLE},
  "BatchNorm": {**_SCALE_BIAS, "mean": VARIABLE, "var": VARIABLE},
  "LayerNorm": _SCALE_BIAS,
  "RMSNorm": {"scale": VARIABLE},
  "GroupNorm": _SCALE_BIAS,
  "InstanceNorm": _SCALE_BIAS,
  "LoRA": _LORA,
  "LoRALinear": {**_KERNEL_BIAS, "lora": "LoRA"},
  "PReLU": {"negative_slope": VARIABLE},
  "MultiHeadAttention": dict.fromkeys(["query", "key", "value", "out"], "LinearGeneral"),
  "Optimizer": {"step": VARIABLE},
  "RngStream": _STREAM,
  "Rngs": dict.fromkeys(["default", "params", "dropout", "carry"], "RngStream"),
  "metrics.Average": {"total": VARIABLE, "count": VARIABLE},
}


@dataclass
class Class:
  """A class of this code: its bases and what its methods assign to `self.`."""

  node: cst.ClassDef
  bases: list[cst.BaseExpression]
  assigned: dict[str, list[Any]] = field(default_factory=dict)  # expressions, or None: unknown
  declared: dict[str, cst.BaseExpression] = field(default_factory=dict)
  defined: set[str] = field(default_factory=set)


class Kinds:
  """Answers what kind of value an expression has: a name, a `Class`, or `UNKNOWN`."""

  def __init__(self, source: Source):
    self.source = source
    self.classes: dict[cst.CSTNode, Class] = {
      n: self._read(n) for n in source.nodes if isinstance(n, cst.ClassDef)
    }
    self._fill()
    self._asked: set[int] = set()

  def of(self, node: cst.CSTNode) -> Any:
    """The kind of an expression's value."""
    if id(node) in self._asked or len(self._asked) > 50:
      return UNKNOWN  # a circle, as in `x = x.next`
    self._asked.add(id(node))
    try:
      return self._of(node)
    finally:
      self._asked.discard(id(node))

  def is_variable(self, node: cst.CSTNode) -> bool:
    return self.of(node) == VARIABLE or self._narrowed(node)

  def _of(self, node: cst.CSTNode) -> Any:
    if isinstance(node, cst.Name):
      return self._of_name(node)
    if isinstance(node, cst.Attribute):
      return self.attribute(self.of(node.value), node.attr.value)
    if isinstance(node, cst.Call):
      return self._of_call(node)
    if isinstance(node, cst.NamedExpr):
      return self.of(node.value)
    if isinstance(node, cst.IfExp):
      return self._all([node.body, node.orelse])
    return UNKNOWN

  def _of_call(self, node: cst.Call) -> Any:
    if self.source.name(node.func) == "data" and len(node.args) == 1:
      return self.of(node.args[0].value)
    return self.made_by(node.func)

  def made_by(self, node: cst.CSTNode) -> Any:
    """The kind of an instance of the class that an expression means."""
    if isinstance(node, cst.Subscript):
      return self.made_by(node.value)
    name = self.source.name(node)
    if name is not None:
      return VARIABLE if name in VARIABLES else name if name in ATTRIBUTES else UNKNOWN
    known = self._class_named(node)
    return VARIABLE if known and self._is_variable_class(known) else known

  def attribute(self, owner: Any, name: str) -> Any:
    """The kind of `owner.name`."""
    if isinstance(owner, str):
      return ATTRIBUTES.get(owner, {}).get(name, UNKNOWN)
    if not isinstance(owner, Class):
      return UNKNOWN
    family = self._family(owner)
    if any(name in c.defined for c in family):
      return UNKNOWN
    values = [v for c in family for v in c.assigned.get(name, [])]
    types = [c.declared[name] for c in family if name in c.declared]
    kinds = [self.annotated(t) for t in types]
    kinds += [k for v in values if (k := self._unless_none(v)) != "None"]
    return kinds[0] if kinds and all(k == kinds[0] for k in kinds) else UNKNOWN

  def annotated(self, node: cst.CSTNode) -> Any:
    """The kind that an annotation promises: `nnx.Param`, `nnx.Param[Array]`, `nnx.Param | None`."""
    if isinstance(node, cst.BinaryOperation) and isinstance(node.operator, cst.BitOr):
      kinds = [self.annotated(side) for side in (node.left, node.right) if not _is_none(side)]
      return kinds[0] if kinds and all(k == kinds[0] for k in kinds) else UNKNOWN
    if isinstance(node, cst.Subscript) and self.source.external(node.value) == "typing.Optional":
      index = node.slice[0].slice
      return self.annotated(index.value) if isinstance(index, cst.Index) else UNKNOWN
    return self.made_by(node)

  def _all(self, nodes: list[Any]) -> Any:
    """The one kind of several values, None aside."""
    kinds = [k for n in nodes if (k := self._unless_none(n)) != "None"]
    return kinds[0] if kinds and all(k == kinds[0] for k in kinds) else UNKNOWN

  def _unless_none(self, node: Any) -> Any:
    return UNKNOWN if node is None else "None" if _is_none(node) else self.of(node)

  def _of_name(self, node: cst.Name) -> Any:
    found = self.source.assignments(node)
    kinds = [self._of_assignment(a) for a in found]
    kinds = [k for k in kinds if k != "None"]
    return kinds[0] if kinds and all(k == kinds[0] for k in kinds) else UNKNOWN

  def _of_assignment(self, assignment: Any) -> Any:
    """The kind of what one assignment puts into a name."""
    node = assignment.node if isinstance(assignment, Assignment) else None
    above = self.source.parent(node) if node is not None else None
    if isinstance(node, cst.Name) and isinstance(above, cst.Param):
      return self._of_parameter(above)
    if isinstance(node, cst.Param):
      return self._of_parameter(node)
    if isinstance(above, cst.AnnAssign) and above.target is node:
      return self.annotated(above.annotation.annotation)
    if isinstance(above, cst.AssignTarget) and above.target is node:
      statement = cst.ensure_type(self.source.parent(above), cst.Assign)
      return self._unless_none(statement.value)
    if isinstance(above, cst.NamedExpr) and above.target is node:
      return self.of(above.value)
    return UNKNOWN

  def _of_parameter(self, node: cst.Param) -> Any:
    if node.star:  # `*params: nnx.Param` is a tuple of them
      return UNKNOWN
    if node.annotation:
      return self.annotated(node.annotation.annotation)
    function = next(
      p for p in self.source.parents(node) if isinstance(p, cst.FunctionDef | cst.Lambda)
    )
    owner = self._method_of(function)
    first = isinstance(function, cst.FunctionDef) and _first_parameter(function) is node
    return owner if owner and first else UNKNOWN

  def _method_of(self, function: cst.CSTNode) -> Class | None:
    """The class that a function is a plain method of."""
    if not isinstance(function, cst.FunctionDef):
      return None
    static = {"staticmethod", "classmethod"}
    if any(self.source.text(d.decorator) in static for d in function.decorators):
      return None
    block = self.source.parent(function)
    above = self.source.parent(block) if block is not None else None
    return self.classes.get(above) if isinstance(above, cst.ClassDef) else None

  def _class_named(self, node: cst.CSTNode) -> Class | None:
    found = self.source.assignments(node) if isinstance(node, cst.Name) else []
    nodes = [a.node for a in found if isinstance(a, Assignment)]
    return self.classes.get(nodes[0]) if len(found) == len(nodes) == 1 else None

  def _is_variable_class(self, known: Class, depth: int = 0) -> bool:
    """Whether a class is a Variable by its bases, and keeps `value` and `[...]` as they are."""
    if known.defined & {"value", "__getitem__", "__setitem__"} or depth > 20:
      return False
    for base in known.bases:
      plain = base.value if isinstance(base, cst.Subscript) else base
      if self.source.name(plain) in VARIABLES:
        return True
      above = self._class_named(plain)
      if above and self._is_variable_class(above, depth + 1):
        return True
    return False

  def _family(self, known: Class) -> list[Class]:
    """A class, those that it inherits from and those that inherit from it, in this code."""
    family = [known]
    for member in family:
      above = [self._class_named(b) for b in member.bases]
      below = [c for c in self.classes.values() if member in map(self._class_named, c.bases)]
      family += [c for c in [*above, *below] if c is not None and c not in family]
    return family

  def _read(self, node: cst.ClassDef) -> Class:
    """A class with what its body declares and defines."""
    known = Class(node, [arg.value for arg in node.bases])
    body = node.body.body
    for statement in body:
      if isinstance(statement, cst.FunctionDef | cst.ClassDef):
        known.defined.add(statement.name.value)
      small = statement.body if isinstance(statement, cst.SimpleStatementLine) else [statement]
      for part in small:
        if isinstance(part, cst.AnnAssign) and isinstance(part.target, cst.Name):
          known.declared[part.target.value] = part.annotation.annotation
        if isinstance(part, cst.Assign):
          for target in part.targets:
            if isinstance(target.target, cst.Name):
              known.defined.add(target.target.value)
    return known

  def _fill(self) -> None:
    """Note every `self.x = ...` with its class."""
    for node in self.source.nodes:
      if not isinstance(node, cst.Attribute) or self.source.loaded(node):
        continue
      chain = dotted(node)
      owner = self._self_class(chain[0]) if len(chain) == 2 else None
      if owner:
        above = self.source.parent(node)
        statement = self.source.parent(above) if isinstance(above, cst.AssignTarget) else above
        name = node.attr.value
        if isinstance(statement, cst.Assign):
          owner.assigned.setdefault(name, []).append(statement.value)
        elif isinstance(statement, cst.AnnAssign):
          owner.declared.setdefault(name, statement.annotation.annotation)
        elif not isinstance(statement, cst.AugAssign | cst.Del):
          owner.assigned.setdefault(name, []).append(None)

  def _self_class(self, name: cst.Name) -> Class | None:
    """The class whose instance a name is as the first parameter of a method."""
    found = self.source.assignments(name)
    node = found[0].node if len(found) == 1 and isinstance(found[0], Assignment) else None
    param = node if isinstance(node, cst.Param) else self.source.parent(node) if node else None
    if not isinstance(param, cst.Param) or param.annotation:
      return None
    function = next(
      p for p in self.source.parents(param) if isinstance(p, cst.FunctionDef | cst.Lambda)
    )
    if not isinstance(function, cst.FunctionDef) or _first_parameter(function) is not param:
      return None
    return self._method_of(function)

  def _narrowed(self, node: cst.CSTNode) -> bool:
    """Whether `isinstance(node, nnx.Variable)` holds where an expression stands."""
    text, below = self.source.text(node), node
    if not dotted(node):
      return False
    for above in self.source.parents(node):
      if isinstance(above, cst.FunctionDef | cst.Lambda | cst.ClassDef):
        return False
      holds = isinstance(above, cst.IfExp) and below is above.body
      holds |= isinstance(above, cst.If) and below is above.body and self._kept(above, text, node)
      if holds and self._says(above.test, text):  # pyright: ignore[reportAttributeAccessIssue]
        return True
      if _is_and(above) and below is above.right and self._says(above.left, text):
        return True
      below = above
    return False

  def _says(self, test: cst.CSTNode, text: str) -> bool:
    """Whether a test is, or has as a part that must hold, `isinstance(text, a Variable type)`."""
    if _is_and(test):
      return self._says(test.left, text) or self._says(test.right, text)
    if not isinstance(test, cst.Call) or self.source.text(test.func) != "isinstance":
      return False
    if len(test.args) != 2 or self.source.text(test.args[0].value) != text:
      return False
    types: Any = test.args[1].value
    listed = [e.value for e in types.elements] if isinstance(types, cst.Tuple) else [types]
    return bool(listed) and all(self.made_by(t) == VARIABLE for t in listed)

  def _kept(self, block: cst.If, text: str, use: cst.CSTNode) -> bool:
    """Whether nothing in a block gives the expression a new value, but the use's own statement."""
    line = next(
      p
      for p in self.source.parents(use)
      if isinstance(p, cst.BaseStatement | cst.BaseSmallStatement)
    )
    inside = [n for n in self.source.nodes if isinstance(n, cst.Name | cst.Attribute)]
    start, end = self.source.span(block.body)
    first, last = self.source.span(line)
    loops = any(isinstance(p, cst.For | cst.While) for p in _up_to(self.source, use, block))
    for node in inside:
      at = self.source.span(node)[0]
      if start <= at < end and not self.source.loaded(node):
        target = self.source.text(node)
        named = text == target or text.startswith(f"{target}.")
        if named and self._binds(node) and (loops or not first <= at < last):
          return False
    return True

  def _binds(self, node: cst.CSTNode) -> bool:
    """Whether a name or attribute is what an assignment, loop, `with` or `del` binds."""
    return not isinstance(self.source.parent(node), cst.Attribute | cst.Arg)


def _up_to(source: Source, node: cst.CSTNode, end: cst.CSTNode) -> list[cst.CSTNode]:
  out = []
  for above in source.parents(node):
    if above is end:
      break
    out.append(above)
  return out


def _is_and(node: cst.CSTNode) -> TypeGuard[cst.BooleanOperation]:
  return isinstance(node, cst.BooleanOperation) and isinstance(node.operator, cst.And)


def _is_none(node: cst.CSTNode) -> bool:
  return isinstance(node, cst.Name) and node.value == "None"


def _first_parameter(function: cst.FunctionDef) -> cst.Param | None:
  found = [*function.params.posonly_params, *function.params.params]
  return found[0] if found else None
