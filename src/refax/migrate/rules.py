"""All rules over one piece of code."""

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import libcst as cst

from refax.migrate import calls, imports, values
from refax.migrate.edit import Finding
from refax.migrate.kinds import Kinds
from refax.migrate.source import Source, Use


@cache
def refax_names() -> frozenset[str]:
  """`refax.nnx.__all__`, read from its text: importing it would bring JAX along."""
  spec = find_spec("refax.nnx")
  if spec is None or spec.origin is None:
    return frozenset()
  for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
      return frozenset(ast.literal_eval(node.value))
  return frozenset()


def uses_nnx(source: Source, uses: list[Use]) -> bool:
  """Whether the code imports NNX, or has it by `import flax`."""
  imported = (n for n in source.nodes if isinstance(n, cst.Import | cst.ImportFrom))
  return any(use.path != ("",) for use in uses) or any(map(imports.is_nnx, imported))


def findings(source: Source) -> list[Finding]:
  """What to say of the code, from its beginning to its end; nothing where it has no NNX."""
  uses = calls.all_uses(source)
  found = list(imports.findings(source, uses))
  if not found and not uses_nnx(source, uses):
    return []
  kinds = Kinds(source)
  for use in uses:
    found += calls.name_findings(source, use, refax_names())
  for node in source.nodes:
    if isinstance(node, cst.Call):
      found += calls.call_findings(source, kinds, node)
    elif isinstance(node, cst.Attribute):
      found += calls.attribute_findings(source, node)
  found += values.findings(source, kinds)
  return sorted(found, key=lambda f: (f.at, f.kind, f.text))
