"""Names of NNX where they are used, and the arguments of calls to them."""

from collections.abc import Iterator
from typing import Any

import libcst as cst
from libcst.metadata import ImportAssignment

from refax.migrate import arguments
from refax.migrate.edit import Edit, Finding, remove
from refax.migrate.kinds import VARIABLES, Kinds
from refax.migrate.source import Source, Use

WRT = (
  "`nnx.Optimizer` without `wrt`: write `nnx.Optimizer(model, tx, wrt=nnx.Param)`, and "
  "`optimizer.update(model, grads)`"
)
UPDATE = "`{old}`: write `{owner}.update(model, {grads})`"
JAX = (
  "`{old}`: if it differentiates a model, write `nnx.{name}`; jax's own refuses Variables that "
  "are references"
)
CURRIED = "`nnx.{name}` without a function: write `functools.partial(nnx.{name}, ...)`"
MODES = ("set_graph_mode", "set_graph_updates")


def all_uses(source: Source) -> list[Use]:
  """Every name of NNX that the code reads, and every other use of `flax`, with the path `("",)`."""
  uses = []
  for node in source.nodes:
    above = source.parent(node)
    if not isinstance(node, cst.Name | cst.Attribute) or not source.loaded(node):
      continue
    if isinstance(above, cst.Attribute) or (isinstance(above, cst.Arg) and above.keyword is node):
      continue
    chain: Any = node
    while isinstance(chain, cst.Attribute):
      chain = chain.value
    if not isinstance(chain, cst.Name) or not source.assignments(chain):
      continue
    if use := source.use(node):
      uses.append(use)
    elif (found := source.imported(chain)) and found[0].split(".")[0] == "flax":
      uses.append(Use("flax", (chain,), ("",), flax=True, imports=found[1]))
  return uses


def name_findings(source: Source, use: Use, refax: frozenset[str]) -> Iterator[Finding]:
  """What to say of one use: a new root for `flax.nnx`, a new name, or a sentence."""
  whole, at = use.chain[-1], source.span(use.chain[0])[0]
  if use.path == ("",):
    return
  base = len(use.chain) - len(use.path) - 1  # the node of `nnx` in the chain
  if base < 0:
    return  # `from flax.nnx import Linear`: the import says it
  edits, known = [], use.known()
  if use.root == "flax" and base == 1:
    if _taken(source, use.chain[0]):
      text = (
        f"`{source.text(whole)}`: write it with `refax`, which is a name of this code's own here"
      )
      yield Finding("write", at, text)
      return
    edits.append(Edit(at, source.span(use.chain[0])[1], "refax"))
  if (
    known and known[1].kind == "renamed" and use.root in ("flax", "flax.nnx", "refax", "refax.nnx")
  ):
    start = source.span(use.chain[base])[1]
    edits.append(Edit(start, source.span(use.chain[base + known[0]])[1], f".{known[1].text}"))
  elif known and known[1].kind == "instead" and not _dropped_mode(source, use):
    yield Finding("write", at, f"`{source.text(whole)}`: {known[1].text}")
  elif not known and use.path and use.path[0] not in refax:
    old = source.text(use.chain[base + 1])
    yield Finding("write", at, f"`{old}`: Flax NNX 0.12 has no such name, nor has Refax")
  if edits:
    last = use.chain[base + known[0]] if known else whole
    old, end = source.text(last), source.span(last)[1]
    shifted = [Edit(e.start - at, e.end - at, e.text) for e in edits]
    new = _applied(source.data[at:end], shifted)
    yield Finding("change", at, f"`{old}` -> `{new}`", tuple(edits))


def _taken(source: Source, node: cst.CSTNode) -> bool:
  """Whether the name `refax` means something of the code's own where a node stands."""
  return any(not isinstance(a, ImportAssignment) for a in source.scope(node)["refax"])


def _applied(data: bytes, edits: list[Edit]) -> str:
  text = data
  for edit in sorted(edits, key=lambda e: -e.start):
    text = text[: edit.start] + edit.text.encode() + text[edit.end :]
  return text.decode()


def _dropped_mode(source: Source, use: Use) -> bool:
  """Whether a use is the statement `nnx.set_graph_mode(...)`, which is dropped as a whole."""
  return bool(use.path) and use.path[-1] in MODES and _mode_statement(source, use.chain[-1])


def _mode_statement(source: Source, func: cst.CSTNode) -> bool:
  call = source.parent(func)
  return isinstance(call, cst.Call) and isinstance(source.parent(call), cst.Expr)


def call_findings(source: Source, kinds: Kinds, node: cst.Call) -> Iterator[Finding]:
  """What to say of the arguments of one call."""
  name, args, direct = source.name(node.func), list(node.args), True
  if name is None and _is_partial(source, node.func) and args:
    name, args, direct = source.name(args[0].value), args[1:], False
  if name is None:
    yield from _method(source, kinds, node)
    return
  if name.rpartition(".")[2] in MODES:
    yield from _mode_switch(source, node)
  elif name in VARIABLES:
    yield from _storage(source, node)
  else:
    yield from _arguments(source, node, args, name)
    if direct and name in arguments.UNCURRIED and all(a.keyword for a in args):
      yield Finding("write", source.span(node)[0], CURRIED.format(name=name))


def _is_partial(source: Source, func: cst.CSTNode) -> bool:
  return source.external(func) == "functools.partial"


def _arguments(source: Source, node: cst.Call, args: list[cst.Arg], name: str) -> Iterator[Finding]:
  gone: set[int] = set()
  edits: list[Edit] = []
  for arg in args:
    key = arg.keyword.value if arg.keyword else None
    if key is None:
      continue
    at = source.span(arg)[0]
    dropped = key in arguments.DROPPED and name in arguments.WITH_MODES
    if dropped and _simple(arg.value):
      gone.add(node.args.index(arg))
    elif dropped:
      yield Finding("write", at, f"`{key}=` of `nnx.{name}`: leave it out")
    elif (name, key) in arguments.RENAMED and arg.keyword:
      edits.append(Edit(*source.span(arg.keyword), arguments.RENAMED[name, key]))
    elif (name, key) in arguments.LISTED:
      if arguments.DEFAULTS.get(key) == source.module.code_for_node(arg.value):
        gone.add(node.args.index(arg))
      else:
        yield Finding(
          "write", at, f"`{key}=` of `nnx.{name}`: {_write(arguments.LISTED[name, key])}"
        )
  yield from _changed(source, node, gone, edits)
  if name == "Optimizer" and len(args) == 2 and not any(a.keyword or a.star for a in args):
    yield Finding("write", source.span(node)[0], WRT)


def _write(text: str) -> str:
  return f"write {text}" if text.startswith("`") and " " not in text.partition("`")[0] else text


def _simple(node: cst.CSTNode) -> bool:
  """Whether nothing happens when an expression is left out."""
  return isinstance(node, cst.Name) or (isinstance(node, cst.Attribute) and _simple(node.value))


def _changed(
  source: Source, node: cst.Call, gone: set[int], edits: list[Edit]
) -> Iterator[Finding]:
  """One change for the arguments of a call that go or get another name."""
  if gone:
    spans = [_arg_span(source, a) for a in node.args]
    edits = [*edits, *remove(source.data, spans, gone)]
  if edits:
    start, end = source.span(node)
    shifted = [Edit(e.start - start, e.end - start, e.text) for e in edits]
    new = " ".join(_applied(source.data[start:end], shifted).split())
    old = " ".join(source.text(node).split())
    yield Finding("change", edits[0].start, f"`{old}` -> `{new}`", tuple(edits))


def _arg_span(source: Source, arg: cst.Arg) -> tuple[int, int]:
  """Where an argument stands, with its parentheses, without its comma."""
  start, end = source.span(arg)
  if isinstance(arg.comma, cst.Comma):
    end = source.span(arg.comma)[0]
  return start, end


def _storage(source: Source, node: cst.Call) -> Iterator[Finding]:
  """`hijax=`, `ref=` of a Variable become `is_hijax=`."""
  found = [a for a in node.args if a.keyword and a.keyword.value in arguments.STORAGE]
  if len(found) > 1:
    text = "`hijax=` and `ref=` of a Variable: write one `is_hijax=`, True for a `jax.Ref` cell"
    yield Finding("write", source.span(found[0])[0], text)
  elif found and found[0].keyword:
    yield from _changed(source, node, set(), [Edit(*source.span(found[0].keyword), "is_hijax")])


def _mode_switch(source: Source, node: cst.Call) -> Iterator[Finding]:
  """The statement `nnx.set_graph_mode(True)` goes; in other places `name_findings` lists it."""
  if not _mode_statement(source, node.func):
    return
  expr: Any = source.parent(node)
  line: Any = source.parent(expr)
  block: Any = source.parent(line)
  start, end = source.span(line)
  text = f"`{source.text(node)}` -> nothing: Refax has one mode"
  alone = isinstance(line, cst.SimpleStatementLine) and len(line.body) == 1
  whole = _whole_line(source.data, start, end)
  if alone and len(block.body) > 1 and whole:
    yield Finding("change", start, text, (Edit(*whole, ""),))
  else:
    yield Finding("change", source.span(node)[0], text, (Edit(*source.span(expr), "pass"),))


def _whole_line(data: bytes, start: int, end: int) -> tuple[int, int] | None:
  first, newline = data.rfind(b"\n", 0, start) + 1, data.find(b"\n", end)
  last = len(data) if newline < 0 else newline + 1
  return None if data[first:start].strip() or data[end:last].strip() else (first, last)


def _method(source: Source, kinds: Kinds, node: cst.Call) -> Iterator[Finding]:
  """Methods of NNX's objects, and jax's own derivatives."""
  at, old = source.span(node)[0], source.text(node.func)
  external = source.external(node.func)
  if external in ("jax.grad", "jax.value_and_grad"):
    yield Finding("look", at, JAX.format(old=old, name=external.partition(".")[2]))
  func = node.func
  if not isinstance(func, cst.Attribute) or func.attr.value != "update" or len(node.args) != 1:
    return
  if kinds.of(func.value) == "Optimizer":
    owner, grads = source.text(func.value), source.text(node.args[0].value)
    yield Finding("write", at, UPDATE.format(old=source.text(node), owner=owner, grads=grads))


def attribute_findings(source: Source, node: cst.Attribute) -> Iterator[Finding]:
  """Hints for attributes that Refax's objects do not have."""
  name = node.attr.value
  if name in arguments.METHODS and source.external(node) is None:
    at = source.span(node.attr)[0]
    yield Finding("look", at, f"`.{name}`: if it is NNX's, write {arguments.METHODS[name]}")
