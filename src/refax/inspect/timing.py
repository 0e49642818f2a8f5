"""How long the instructions of a compiled program take: read from a trace of JAX's profiler."""

import contextlib
import pathlib
import tempfile
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Set
from typing import Any, NamedTuple

import jax

_one_at_a_time = threading.Lock()  # as JAX's profiler demands


class Times(NamedTuple):
  """What one run takes."""

  wall: float
  """Seconds from the call until all results are there, of the run that was over first."""
  by_instruction: dict[str, float]
  """Seconds of each instruction in one run. Where several run at once each has its part: the sum is
  the time in which any ran."""


class Span(NamedTuple):
  """An instruction that ran, in nanoseconds."""

  start: float
  end: float
  name: str
  run: Any = None
  """What tells runs apart."""


class Run(NamedTuple):
  """A compiled program, and what it is run on."""

  program: Callable[..., Any]
  operands: Callable[[], tuple]
  """Fresh for each run, which may take their memory."""
  module: str
  """Its name in the trace."""
  containers: Set[str]
  """The instructions that run others, which are in the trace by themselves."""


def measure(run: Run, times: int) -> tuple[Times | None, str]:
  """How long a program takes; None and the reason if the profiler does not tell."""
  once = lambda: jax.block_until_ready(run.program(*jax.block_until_ready(run.operands())))
  once()  # the first run allocates
  with _one_at_a_time, tempfile.TemporaryDirectory() as folder:
    try:
      jax.profiler.start_trace(folder, profiler_options=_options())
    except Exception as error:  # a profiler that the user has started is running
      return None, f"JAX's profiler did not start: {error}"
    walls: list[float] = []
    try:
      for _ in range(times):
        operands = jax.block_until_ready(run.operands())
        start = time.perf_counter()
        jax.block_until_ready(run.program(*operands))
        walls.append(time.perf_counter() - start)
    finally:
      jax.profiler.stop_trace()
    try:
      spans = _spans(pathlib.Path(folder), run.module)
    except Exception as error:  # a format that this release of JAX has changed
      return None, f"the trace of JAX's profiler could not be read: {error!r}"
  if not spans:
    return None, f"the trace of JAX's profiler names no operations on {jax.default_backend()}"
  return Times(min(walls), _fastest(spans, run.containers, times)), ""


def _fastest(spans: Iterable[Span], containers: Set[str], times: int) -> dict[str, float]:
  """The seconds of the run in which operations took least: others were held up by something else.

  They are no more than those of the run that was over first.
  """
  by_run: dict[Any, list[Span]] = defaultdict(list)
  for span in spans:
    by_run[span.run].append(span)
  if len(by_run) == times:
    most = max(map(len, by_run.values()))
    whole = [lot for lot in by_run.values() if len(lot) == most]  # of others events are missing
    found = [shared(lot, containers) for lot in whole]
    return min(found, key=lambda lot: sum(lot.values()))
  every = shared([span for lot in by_run.values() for span in lot], containers)
  return {name: t / times for name, t in every.items()}  # runs cannot be told apart


def _options() -> Any:
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # a million events of Python, which push others out
  return options


def _spans(folder: pathlib.Path, module: str) -> list[Span]:
  spans = []
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of the binding that reads statistics
    for file in folder.rglob("*.xplane.pb"):
      data = jax.profiler.ProfileData.from_file(str(file))
      for event in (e for plane in data.planes for line in plane.lines for e in line.events):
        if event.duration_ns <= 0:
          continue
        with contextlib.suppress(TypeError, ValueError):
          about = dict(event.stats)
          if str(about.get("hlo_module")).startswith(module) and "hlo_op" in about:
            start = event.start_ns
            end, name = start + event.duration_ns, str(about["hlo_op"])
            spans.append(Span(start, end, name, about.get("run_id")))
  return spans


def shared(spans: Iterable[Span], containers: Set[str]) -> dict[str, float]:
  """Seconds by name; moments in which several ran are shared between them.

  What contains others counts only where nothing of them runs.

  >>> shared([Span(0, 2e9, "a"), Span(1e9, 2e9, "b"), Span(0, 3e9, "loop")], {"loop"})
  {'a': 1.5, 'b': 0.5, 'loop': 1.0}
  """
  edges = []
  for span in spans:
    edges += [(span.start, 1, span.name), (span.end, -1, span.name)]
  edges.sort(key=lambda edge: edge[0])
  total: dict[str, float] = defaultdict(float)
  running: dict[str, int] = {}
  before = 0.0
  for at, change, name in edges:
    if at > before and running:
      mine = {k: n for k, n in running.items() if k not in containers} or running
      part = (at - before) / sum(mine.values()) / 1e9
      for k, n in mine.items():
        total[k] += part * n
    before = at
    running[name] = running.get(name, 0) + change
    if not running[name]:
      del running[name]
  return dict(total)
