"""Imports go to the same layer of the code or a lower one, and never in a circle."""

import ast
import importlib.util
from pathlib import Path

import pytest

import refax

ROOT = Path(refax.__file__).parent
LAYERS = [
  {"_jax", "errors", "typing", "config", "names", "explain"},
  {"core"},
  {"graph", "rngs"},
  {"transforms"},
  {"nn"},
  {"sharding", "generate"},
  {"train", "io", "inspect", "display", "testing"},
  {"nnx", "", "compat", "migrate"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PRIVATE = ("jax._src", "jaxlib._jax", "_refs", "_buf")


def module_name(path):
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(("refax", *(p for p in parts if p != "__init__")))


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(name):
  """The modules of refax that one imports, anywhere in its text."""
  package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
  found = set()
  for node in ast.walk(ast.parse(MODULES[name].read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
      for alias in node.names:
        full = f"{base}.{alias.name}"
        found.add(full if full in MODULES else base)
  return {f for f in found if f in MODULES} - {name}


def level(name):
  return LEVEL[name.partition(".")[2].partition(".")[0]]


def test_every_module_has_a_layer():
  assert {n for n in MODULES if n.partition(".")[2].partition(".")[0] not in LEVEL} == set()
  assert len(MODULES) > 30


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_to_the_same_layer_or_a_lower_one(name):
  upwards = {other for other in imports(name) if level(other) > level(name)}
  assert not upwards, f"{name} imports {upwards} from a higher layer"


def test_no_modules_import_each_other_in_a_circle():
  graph = {name: imports(name) for name in MODULES}
  done, path = set(), []

  def visit(name):
    assert name not in path, " -> ".join([*path[path.index(name) :], name])
    if name not in done:
      path.append(name)
      for other in graph[name]:
        visit(other)
      done.add(path.pop())

  for name in graph:
    visit(name)
  assert done == set(MODULES)


@pytest.mark.parametrize("name", [n for n in MODULES if n != "refax._jax"])
def test_private_jax_is_used_in_one_file_only(name):
  tree = ast.parse(MODULES[name].read_text())
  used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
  used |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value in PRIVATE}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      used |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      used |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
  private = {u for u in used if u in PRIVATE or u.startswith(("jax._src", "jaxlib"))}
  assert not private, f"{name} uses {private}: move it to _jax.py, with a public fallback"


def test_the_check_sees_what_it_looks_for():
  assert "refax.core.flatten" in imports("refax.graph.split")
  assert "_buf" in MODULES["refax._jax"].read_text()
  assert level("refax.core.variable") < level("refax.graph.split") < level("refax.nn.linear.linear")
