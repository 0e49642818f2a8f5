"""What `nnx.profile` found out: the parts of the layers, and the memory; prints as a table."""

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from refax.core.text import scaled
from refax.errors import InvalidArgumentError
from refax.inspect import flame
from refax.inspect.cost import Cost

OUTSIDE = "(no layer)"
_FOOTNOTE = (
  "Each row includes the layers below it; (no layer) is the outermost Module and what is around it."
)
SHOWN = 60  # rows of a table; the smallest are left out
BUFFERS = 8  # of each kind, the largest


class Part(NamedTuple):
  """What a layer takes."""

  path: str
  """Its path; empty for what belongs to no layer below the outermost Module."""
  forward: Cost
  backward: Cost
  seconds: float | None = None
  """Of one run, as measured; None where nothing was."""

  @property
  def flops(self) -> float:
    """Arithmetic operations, forward and backward."""
    return self.forward.flops + self.backward.flops

  @property
  def nbytes(self) -> float:
    """Bytes that the operations read and write, each by itself."""
    return self.forward.nbytes + self.backward.nbytes


class Buffer(NamedTuple):
  """Memory that is taken."""

  name: str
  """Of state and arguments, what the user calls them; of a temporary, the path of its layer."""
  nbytes: int
  what: str
  """The type of a Variable, `argument`, or the instruction that makes a temporary."""


class Memory(NamedTuple):
  """The memory that a compiled function takes on one device, in bytes, as XLA reports it."""

  arguments: int
  outputs: int
  """Results, and the new values of state."""
  temporaries: int
  in_place: int
  """Of the outputs, new values of state, which are where the old ones were, as under `nnx.jit`."""
  state: tuple[Buffer, ...]
  """Variables and arrays among the arguments, the largest first."""
  at_peak: tuple[Buffer, ...]
  """Temporaries that are alive where these take most, the largest first: an estimate, by the
  order of the compiled program."""

  @property
  def total(self) -> int:
    """Arguments, outputs and temporaries; state that is written counts once."""
    return self.arguments + self.outputs + self.temporaries - self.in_place


class Profile:
  """What `nnx.profile` returns; prints as a table.

  Attributes:
    parts: what each layer takes itself, without the layers below it, in the order of their calls;
      first what belongs to none. They sum to the whole.
    memory: the memory of the compiled function; None if XLA does not report it.
    wall: seconds of the fastest run, from the call to its results; None if nothing was measured.
    notes: what could not be found out, and why.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> rngs = nnx.Rngs(0)
  >>> model = nnx.Sequential(nnx.Linear(2, 64, rngs=rngs), nnx.Linear(64, 2, rngs=rngs))
  >>> profile = nnx.profile(model)(jnp.ones((8, 2)))
  >>> isinstance(profile, nnx.Profile), profile["layers/0"].flops
  (True, 2560.0)
  """

  def __init__(
    self,
    parts: Sequence[Part],
    memory: Memory | None = None,
    wall: float | None = None,
    notes: Sequence[str] = (),
  ):
    self.parts = tuple(parts)
    self.memory = memory
    self.wall = wall
    self.notes = tuple(notes)

  @property
  def total(self) -> Part:
    """What the whole function takes."""
    return _sum("", self.parts)

  def __getitem__(self, path: str) -> Part:
    """What a layer takes with all layers below it.

    Raises:
      KeyError: no call of a layer at that path was seen.
    """
    below = [x for x in self.parts if x.path == path or x.path.startswith(f"{path}/")]
    if not below:
      raise KeyError(path)
    return _sum(path, below)

  def __str__(self) -> str:
    return "\n".join([*self._table(), *self._memory(), *(f"note: {x}" for x in self.notes)])

  def __repr__(self) -> str:
    return str(self)

  def _repr_svg_(self) -> str:
    return self._picture("flops" if self.wall is None else "time")

  def save(self, path: str | os.PathLike[str], by: str | None = None) -> None:
    """Draw the layers as a flame graph: each as wide as its part of the whole.

    Args:
      path: where the SVG is written.
      by: "flops" or "time"; by default the time if it was measured.

    Raises:
      InvalidArgumentError: `by` is something else, or "time" and nothing was measured.
    """
    by = ("flops" if self.wall is None else "time") if by is None else by
    if by not in ("flops", "time") or (by == "time" and self.wall is None):
      want = '"flops", or "time" of a profile with measure=True that has times'
      raise InvalidArgumentError.value("Profile.save", "by", by, want)
    with open(path, "w", encoding="utf-8") as file:
      file.write(self._picture(by))

  def _picture(self, by: str) -> str:
    if by == "time":
      boxes = [flame.Box(x.path, x.seconds or 0.0) for x in self.parts]
      return flame.draw(boxes, "time of one run", _seconds)
    boxes = [flame.Box(x.path, x.flops, x.backward.flops) for x in self.parts]
    return flame.draw(boxes, "operations", lambda n: f"{scaled(n)}FLOPs")

  def _table(self) -> list[str]:
    whole = self.total
    rows = [(x.path or OUTSIDE, x if not x.path else self[x.path]) for x in self.parts]
    shown = sorted(rows, key=lambda row: -_weight(row[1], whole))[:SHOWN]
    lines = [self._head(), *(self._cells(*row, whole) for row in rows if row in shown)]
    if len(rows) > SHOWN:
      lines.append([f"({len(rows) - SHOWN} smaller ones)", *[""] * (len(lines[0]) - 1)])
    lines.append(self._cells("total", whole, whole))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ends = [text.ljust(widths[0]) for text, *_ in lines]
    rest = [[c.rjust(w) for c, w in zip(x[1:], widths[1:], strict=True)] for x in lines]
    text = ["  ".join([end, *cells]).rstrip() for end, cells in zip(ends, rest, strict=True)]
    rule = "-" * max(map(len, text))
    return [text[0], rule, *text[1:-1], rule, text[-1], _FOOTNOTE]

  def _head(self) -> list[str]:
    head = ["layer", "FLOPs", "backward", "share", "bytes"]
    return head if self.wall is None else [*head, "time", "share"]

  def _cells(self, name: str, part: Part, whole: Part) -> list[str]:
    cells = [name, f"{part.flops:,.0f}", f"{part.backward.flops:,.0f}"]
    cells += [_share(part.flops, whole.flops), f"{scaled(part.nbytes)}B"]
    if self.wall is not None:
      mine = part.seconds or 0.0
      cells += [_seconds(mine), _share(mine, whole.seconds or 0.0)]
    return cells

  def _memory(self) -> list[str]:
    lines = []
    if self.wall is not None:
      inside = _seconds(self.total.seconds or 0.0)
      lines.append(f"time: {_seconds(self.wall)} a run, {inside} of it in operations")
    m = self.memory
    if m is None:
      return lines
    size = lambda n: f"{scaled(n)}B"
    lines.append(
      f"memory: {size(m.total)} = arguments {size(m.arguments)} + outputs {size(m.outputs)} "
      f"+ temporaries {size(m.temporaries)} - written in place {size(m.in_place)}"
    )
    titles = ("state and arguments:", "temporaries alive at the peak, estimated:")
    for title, lot in zip(titles, (m.state, m.at_peak), strict=True):
      lines += [title] if lot else []
      lines += [f"  {size(x.nbytes):>8}  {x.name or OUTSIDE} ({x.what})" for x in lot[:BUFFERS]]
      rest = lot[BUFFERS:]
      lines += [f"  {size(sum(x.nbytes for x in rest)):>8}  {len(rest)} more"] if rest else []
    return lines


def _sum(path: str, parts: Iterable[Part]) -> Part:
  forward = backward = Cost()
  seconds: float | None = None
  for x in parts:
    forward, backward = forward + x.forward, backward + x.backward
    seconds = seconds if x.seconds is None else (seconds or 0.0) + x.seconds
  return Part(path, forward, backward, seconds)


def _weight(part: Part, whole: Part) -> float:
  share = lambda a, b: a / b if b else 0.0
  return max(share(part.flops, whole.flops), share(part.seconds or 0.0, whole.seconds or 0.0))


def _share(part: float, whole: float) -> str:
  return f"{100 * part / whole if whole else 0.0:.1f}%"


def _seconds(t: float) -> str:
  for unit, size in (("s", 1.0), ("ms", 1e-3)):
    if t >= size:
      return f"{t / size:.2f} {unit}"
  return f"{t * 1e6:.1f} us"
