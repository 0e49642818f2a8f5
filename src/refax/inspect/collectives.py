"""nnx.collectives: what a compiled function sends between devices, read from its program."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from refax.inspect.program import Instruction, Program, nbytes_of, scopes
from refax.transforms.jit import jit

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
  """One collective operation of a compiled function.

  Attributes:
    kind: `"all-reduce"`, `"all-gather"`, `"reduce-scatter"`, `"all-to-all"` or
      `"collective-permute"`.
    axes: the axes of the mesh whose devices take part; empty if there is no mesh to compare with.
    group: the number of devices that take part together.
    nbytes: the bytes of the array: summed, gathered (as a whole), scattered (as a whole) or sent.
    runs: how often it runs in one call: in a loop, for each step, if XLA knows how many there are
      (else once); in a condition, in all of its branches.
    layer: the scopes that it comes from: the path of the layer.
  """

  kind: str
  axes: tuple[str, ...]
  group: int
  nbytes: int
  runs: int
  layer: str

  @property
  def sent(self) -> float:
    """The bytes that each device sends in one call, if the devices form a ring."""
    part = (self.group - 1) / self.group
    factor = {"all-reduce": 2 * part, "collective-permute": 1.0}.get(self.kind, part)
    return factor * self.nbytes * self.runs


class Collectives(tuple[Collective, ...]):
  """The collective operations of a compiled function; printed, they are a table."""

  __slots__ = ()

  @property
  def sent(self) -> float:
    """The bytes that each device sends in one call."""
    return sum(x.sent for x in self)

  def kinds(self) -> dict[str, int]:
    """How often each kind runs in one call."""
    found: dict[str, int] = {}
    for x in self:
      found[x.kind] = found.get(x.kind, 0) + x.runs
    return found

  def __repr__(self) -> str:
    if not self:
      return "no collectives: no device needs anything of another"
    head = ("operation", "axes", "devices", "runs", "bytes", "sent by a device", "layer")
    numbers = lambda x: [f"{n:,.0f}" for n in (x.group, x.runs, x.nbytes, x.sent)]
    rows = [
      (x.kind, ",".join(x.axes) or "-", *numbers(x), x.layer or "-")
      for x in sorted(self, key=lambda x: -x.sent)
    ]
    rows.append(("in all", "", "", f"{sum(x.runs for x in self)}", "", f"{self.sent:,.0f}", ""))
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    cells = lambda row: enumerate(zip(row, widths, strict=True))
    align = lambda row: [c.rjust(w) if 2 <= i <= 5 else c.ljust(w) for i, (c, w) in cells(row)]
    return "\n".join("  ".join(align(row)).rstrip() for row in (head, *rows))


def collectives(fn: Callable, /, *args: Any, **kwargs: Any) -> Collectives:
  """What a function sends between devices: each collective operation, its bytes, and its layer.

  The function is compiled for these arguments and not run.

  Args:
    fn: a function of `nnx.jit` or `jax.jit`, or a function, which `nnx.jit` compiles.
    *args: its arguments, laid out as they will be.
    **kwargs: its keyword arguments.

  Returns:
    The operations; `print` shows a table, and `.sent` are the bytes that each device sends.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> nnx.collectives(lambda x: x.sum(), jnp.ones(3))
  no collectives: no device needs anything of another
  """
  compiled = fn if hasattr(fn, "lower") else jit(fn)
  text = compiled.lower(*args, **kwargs).compile().as_text()  # pyright: ignore[reportFunctionMemberAccess]
  return Collectives(_found(Program.of(text), _mesh_of((args, kwargs))))


def _mesh_of(tree: Any) -> dict[str, int]:
  """The axes of the mesh that arrays lie on, or of `jax.set_mesh`."""
  for x in jax.tree.leaves(tree):
    mesh = getattr(getattr(x, "sharding", None), "mesh", None)
    if mesh is not None and not mesh.empty:
      return dict(mesh.shape)
  return dict(jax.sharding.get_abstract_mesh().shape)


def _found(program: Program, mesh: dict[str, int]) -> Iterator[Collective]:
  runs = dict.fromkeys(program.computations, 0)
  runs[program.entry] = 1
  names = program.op_names()

  for name in _in_order(program):
    for x in program.computations[name]:
      times = x.trip_count if x.opcode == "while" else 1
      for inner in x.called:
        if inner in runs:
          runs[inner] += runs[name] * times
  for name, code in program.computations.items():
    for x in code:
      kind = x.opcode.removesuffix("-start")
      if kind in KINDS and runs[name]:
        axes, group = _axes(x.attributes, mesh)
        yield Collective(kind, axes, group, _nbytes(x, kind), runs[name], scopes(names[x.name]))


def _in_order(program: Program) -> list[str]:
  """The computations, each before those that it runs."""
  found: list[str] = []
  seen: set[str] = set()

  def visit(name: str) -> None:
    if name in seen or name not in program.computations:
      return
    seen.add(name)
    for x in program.computations[name]:
      for inner in x.called:
        visit(inner)
    found.append(name)

  visit(program.entry)
  return found[::-1]


def _nbytes(x: Instruction, kind: str) -> int:
  """The bytes of the whole array. What starts and ends apart has operand and result in its type."""
  sizes = nbytes_of(x.type)
  if x.opcode.endswith("-start") and len(sizes) > 1:
    sizes = [max(sizes)] if kind in ("all-gather", "reduce-scatter") else sizes[: len(sizes) // 2]
  total = sum(sizes)
  group = _groups(x.attributes)
  return total * len(group[0]) if kind == "reduce-scatter" and group else total


def _axes(attributes: str, mesh: dict[str, int]) -> tuple[tuple[str, ...], int]:
  """The axes of the mesh along which devices take part, and their number."""
  if (pairs := re.search(r"source_target_pairs=\{(.*?\})\}", attributes)) is not None:
    numbers = [tuple(map(int, p.split(","))) for p in re.findall(r"\{([\d,]+)\}", pairs[1])]
    return _moving(numbers, mesh), len(numbers)
  groups = _groups(attributes)
  if not groups:
    total = int(np.prod(list(mesh.values()), initial=1))
    return tuple(mesh), total
  for count in range(1, len(mesh) + 1):
    for axes in itertools.combinations(mesh, count):
      if _groups_along(axes, mesh) == {frozenset(g) for g in groups}:
        return axes, len(groups[0])
  return (), len(groups[0])


def _groups(attributes: str) -> list[list[int]]:
  """The devices that take part together, as XLA writes them."""
  if (found := re.search(r"replica_groups=\{(\{.*?\})\}", attributes)) is not None:
    return [list(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", found[1])]
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
  if iota is not None:
    numbers = lambda text: [int(n) for n in text.split(",")]
    ids = np.arange(np.prod(numbers(iota[2]))).reshape(numbers(iota[2]))
    ids = ids.transpose(numbers(iota[3])) if iota[3] else ids
    return ids.reshape(numbers(iota[1])).tolist()
  named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
  if named is None:
    return []
  mesh = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
  return [sorted(g) for g in _groups_along(re.findall(r"'([^']+)'", named[2]), mesh)]


def _groups_along(axes: Iterable[str], mesh: dict[str, int]) -> set[frozenset[int]]:
  """The devices that differ along these axes of a mesh only."""
  axes = tuple(axes)
  ids = np.arange(int(np.prod(list(mesh.values()), initial=1))).reshape(tuple(mesh.values()))
  last = [i for i, name in enumerate(mesh) if name in axes]
  first = [i for i in range(len(mesh)) if i not in last]
  size = int(np.prod([ids.shape[i] for i in last], initial=1))
  return {frozenset(map(int, g)) for g in ids.transpose([*first, *last]).reshape(-1, size)}


def _moving(pairs: list[tuple[int, ...]], mesh: dict[str, int]) -> tuple[str, ...]:
  """The axes along which something is sent."""
  if not mesh:
    return ()
  shape = tuple(mesh.values())
  names = list(mesh)
  places = [(np.unravel_index(a, shape), np.unravel_index(b, shape)) for a, b in pairs]
  return tuple(n for i, n in enumerate(names) if any(a[i] != b[i] for a, b in places))
