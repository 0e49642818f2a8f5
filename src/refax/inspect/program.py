"""A compiled program, read from its text: what each instruction is, and what is alive when.

XLA prints what it compiled as a list of instructions in the order in which they run. Each carries
in `op_name` the named scopes that it comes from; a fusion carries those of its root.
"""

import itertools
import re
from collections.abc import Iterable
from typing import NamedTuple


class Instruction(NamedTuple):
  """An instruction of a compiled program."""

  name: str
  opcode: str
  nbytes: int
  """Of its result."""
  operands: tuple[str, ...]
  called: tuple[str, ...]
  """The computations that it runs: the body of a loop, the inside of a fusion."""
  op_name: str
  """The scopes and the primitive that it comes from; empty if XLA does not say."""
  is_root: bool
  type: str = ""
  """Of the result, as XLA writes it: `f32[4,8]{1,0}`."""
  attributes: str = ""
  """All that stands behind the opcode."""

  @property
  def trip_count(self) -> int:
    """How often a loop runs, if XLA knows; else 1."""
    found = re.search(r"known_trip_count\W+n\W+(\d+)", self.attributes)
    return int(found[1]) if found else 1


class Program(NamedTuple):
  """A compiled program: its computations, and the name of the one that runs first."""

  computations: dict[str, list[Instruction]]
  entry: str

  @classmethod
  def of(cls, text: str) -> "Program":
    """Read the text of a compiled program."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
      if (head := _HEAD.match(line)) is not None:
        current = computations.setdefault(head[2], [])
        entry = head[2] if head[1] else entry
      elif current is not None and (match := _INSTRUCTION.match(line)) is not None:
        current.append(_instruction(match))
    return cls(computations, entry)

  def op_names(self) -> dict[str, str]:
    """The scopes that each instruction comes from.

    An instruction of which XLA says nothing, such as a copy in the body of a loop, belongs to what
    runs it.
    """
    names: dict[str, str] = {}
    callers = {c: x for lot in self.computations.values() for x in lot for c in x.called}
    home = {x.name: c for c, lot in self.computations.items() for x in lot}

    def find(x: Instruction) -> str:
      if x.op_name:
        return x.op_name
      roots = [y for c in x.called if x.opcode == "fusion" for y in self.computations.get(c, ())]
      inside = next((y.op_name for y in roots if y.is_root), "")
      caller = callers.get(home[x.name])
      return inside or (find(caller) if caller is not None else "")

    for x in itertools.chain(*self.computations.values()):
      names[x.name] = find(x)
    return names

  def containers(self) -> set[str]:
    """The instructions that run others one by one: loops, branches, calls."""
    every = itertools.chain(*self.computations.values())
    return {x.name for x in every if x.opcode in _CONTAINERS}

  def alive_at_peak(self) -> list[Instruction]:
    """The temporary results that are alive where these take most memory.

    It follows the order of the program, and takes what loops carry and what is updated in place
    for one buffer. XLA's own assignment may differ.
    """
    return self._peak(self.entry)[1] if self.entry else []

  def _peak(self, name: str) -> tuple[int, list[Instruction]]:
    code = self.computations.get(name, [])
    buffers = _buffers(code)
    kept = set().union(*(buffers[x.name] for x in code if x.is_root))
    last = {b: i for i, x in enumerate(code) for used in x.operands for b in buffers.get(used, ())}
    index = {x.name: i for i, x in enumerate(code)}
    ends: dict[int, list[int]] = {}
    live: set[int] = set()
    best: tuple[int, int, list[Instruction]] = (0, -1, [])
    total = 0
    for i, x in enumerate(code):
      if i in buffers[x.name] and index[x.name] not in kept:
        live.add(i)
        total += x.nbytes
        ends.setdefault(last.get(i, i), []).append(i)
      inner = [self._peak(c) for c in x.called] if x.opcode in _CONTAINERS else []
      most = max(inner, key=lambda lot: lot[0], default=(0, []))
      if total + most[0] > best[0]:
        best = (total + most[0], i, [*(code[j] for j in sorted(live)), *most[1]])
      for j in ends.pop(i, ()):
        live.discard(j)
        total -= code[j].nbytes
    return best[0], best[2]


_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_CALLED = re.compile(
  r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
  r"|branch_computations=\{([^}]*)\}"
)
_CONTAINERS = {"while", "conditional", "call"}
# What these return is what they were given.
_TRANSPARENT = {"bitcast", "get-tuple-element", "tuple", "while", "optimization-barrier"}
_GIVEN = {"parameter", "constant"}


def _instruction(match: re.Match[str]) -> Instruction:
  root, name, type_, opcode, rest = match.groups()
  operands = re.findall(r"%([\w.\-]+)", _inside_parentheses(rest))
  found = _CALLED.findall(rest)
  called = [c.strip().lstrip("%") for one, many in found for c in (one or many).split(",")]
  op_name = re.search(r'op_name="([^"]*)"', rest)
  size = sum(nbytes_of(type_))
  named = op_name[1] if op_name else ""
  used, of = tuple(operands), tuple(called)
  return Instruction(name, opcode, size, used, of, named, bool(root), type_, rest)


def _inside_parentheses(text: str) -> str:
  """What stands before the parenthesis that closes the one before the text."""
  depth = 1
  for i, c in enumerate(text):
    depth += (c == "(") - (c == ")")
    if depth == 0:
      return text[:i]
  return text


def nbytes_of(type_: str) -> list[int]:
  """The bytes of each array in a type.

  >>> nbytes_of("(f32[4,8]{1,0}, pred[3])")
  [128, 3]
  """
  found = []
  for kind, dims in re.findall(r"([a-z]+\d*\w*)\[([\d,<=]*)\]", type_):
    width = 8 if kind == "pred" else int((re.search(r"\d+", kind) or ["0"])[0])
    size = 1
    for n in dims.replace("<=", "").split(","):
      size *= int(n) if n else 1
    found.append(int(size * width / 8))
  return found


def _buffers(code: list[Instruction]) -> dict[str, set[int]]:
  """The buffers in which the result of each instruction lies, each by the index of who made it."""
  found: dict[str, set[int]] = {}
  sizes = {x.name: x.nbytes for x in code}
  for i, x in enumerate(code):
    if x.opcode in _GIVEN:
      found[x.name] = set()
    elif x.opcode in _TRANSPARENT:
      found[x.name] = _union(found.get(name, set()) for name in x.operands)
    elif "dynamic-update-slice" in f"{x.opcode} {x.name}" and any(
      sizes.get(name) == x.nbytes for name in x.operands
    ):
      whole = next(name for name in x.operands if sizes.get(name) == x.nbytes)
      found[x.name] = found.get(whole, set())
    else:
      found[x.name] = {i}
  return found


def _union(sets: Iterable[set[int]]) -> set[int]:
  return set().union(*sets)


# What JAX writes around a scope that was transformed: `transpose(jvp(encoder))/layers`.
_TRANSFORMED = re.compile(r"(?:^|(?<=[/(]))(?:jvp|transpose|vmap|pmap|linearize)\(")
_COMPILED = re.compile(r"(?:^|(?<=[/(]))p?jit\(")
# What JAX names between the scopes of a program.
_BETWEEN = re.compile(
  r"while|body|cond|closed_call|eval_jaxpr|core_call|checkpoint|rematted_computation|remat\d?"
  r"|custom_jvp_call|custom_vjp_call|shard_map|branch_\d+_fun|pjit|jit|scan|body_fun|cond_fun"
)


def layer_of_name(op_name: str, paths: set[str]) -> str:
  """The longest path of a layer in the scopes of an instruction; empty if there is none.

  >>> layer_of_name("jit(f)/transpose(jvp(net))/while/body/layers/dot_general", {"net/layers"})
  'net/layers'
  """
  text = _without(_COMPILED, op_name, keeps_inside=False)
  text = _without(_TRANSFORMED, text, keeps_inside=True)
  beginnings = {path[:i] for path in paths for i, c in enumerate(path + "/") if c == "/"}
  path = longest = ""
  for step in filter(None, text.split("/")[:-1]):
    further = f"{path}/{step}" if path else step
    if further in beginnings or not _BETWEEN.fullmatch(step):
      path = further
    longest = path if path in paths else longest
  return longest


def scopes(op_name: str) -> str:
  """The named scopes of an instruction, without what JAX writes around and between them.

  >>> scopes("jit(f)/transpose(jvp(net))/while/body/layers/dot_general")
  'net/layers'
  """
  text = _without(_COMPILED, op_name, keeps_inside=False)
  text = _without(_TRANSFORMED, text, keeps_inside=True)
  merged = "/(" in f"/{text}"  # of several operations: `layers/(key/dot_general:out/reduce_sum)`
  steps = text.partition("(")[0].split("/")[:-1]
  path = "/".join(s for s in steps if s and not _BETWEEN.fullmatch(s) and s != "refax_call")
  return f"{path}/..." if merged else path


def _without(opening: re.Pattern[str], text: str, *, keeps_inside: bool) -> str:
  """A name without such words and the parentheses after them."""
  while (match := opening.search(text)) is not None:
    inside = _inside_parentheses(text[match.end() :])
    after = text[match.end() + len(inside) + 1 :]
    text = text[: match.start()] + (inside if keeps_inside else "") + after
  return text
