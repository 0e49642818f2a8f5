"""How tests run: what they print at the end, checked shapes if asked for, time that is saved."""

import os
import threading

import jax
import pytest

if os.environ.get("REFAX_CHECK_SHAPES"):
  # Before the first import of refax: from here on, beartype compares what layers get and return
  # with the shapes that their signatures say. For tests of valid input: it raises before we do.
  from jaxtyping import install_import_hook

  import tests.shape_checker  # noqa: F401  # what the next line names must be there

  install_import_hook("refax.nn", "tests.shape_checker.check")


from refax import _jax  # after the hook


def reuse_ir_contexts(times: int = 10) -> None:
  """Let JAX before 0.12 use an MLIR context for several programs, as later releases do.

  A test run lowers many thousands of small programs, and making a context for each was a sixth of
  its time (4 ms each). Nothing happens where JAX has no such function, or reuses contexts itself.
  """
  from jax._src.interpreters import mlir

  make = getattr(mlir, "make_ir_context", None)
  if make is None or hasattr(mlir, "_thread_local_context"):
    return
  own = threading.local()

  def reused():
    if mlir.ir.Context.current is not None:  # a program is lowered just now, and needs this one
      return make()
    if getattr(own, "left", 0) == 0:
      own.context, own.left = make(), times
    own.left -= 1
    return own.context

  mlir.make_ir_context = reused


reuse_ir_contexts()

MAPS = "/proc/self/maps"


@pytest.fixture(autouse=True, scope="module")
def few_memory_maps():
  """Forget compiled programs before there are too many for one process.

  Each has some fifty memory maps; with Linux's 65,530 of them, the next program is a crash.
  """
  yield
  if os.path.exists(MAPS):
    with open(MAPS) as file:
      count = sum(1 for _ in file)
    if count > 25_000:
      jax.clear_caches()


def pytest_terminal_summary(terminalreporter):
  """Print how many programs the laws were checked on, and what was in them."""
  lines = [
    value
    for report in terminalreporter.stats.get("passed", [])
    for name, value in getattr(report, "user_properties", [])
    if name == "programs"
  ]
  if lines:
    terminalreporter.section("stateful programs that were compared with their functional twins")
    terminalreporter.line(f"{sum(int(line.split()[0]) for line in lines)} programs in all")
    for line in sorted(lines):
      terminalreporter.line(line)


@pytest.fixture(autouse=True)
def no_other_thread_trains():
  """A process in which a thread has once waited for another one copies what it reads: forget it."""
  yield
  _jax.taken.is_seen = False
