"""`python -m refax.migrate PATH...`: what to write so that code of Flax NNX runs on Refax."""

import argparse
import difflib
import os
import sys
import threading
from collections import Counter
from pathlib import Path

INSTALL = "refax.migrate reads code with libcst: pip install 'refax[migrate]'"
EXPLAIN = """
change: certain; --write writes it. write: for you to write. look: may need no change.
The exit status is 0 if nothing is left to write, 1 if something is, 2 if a file cannot be read.
"""


def parser() -> argparse.ArgumentParser:
  """The command line."""
  made = argparse.ArgumentParser(
    prog="python -m refax.migrate",
    description="Say, line by line, what to write so that code of Flax NNX runs on Refax.",
    epilog=EXPLAIN,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  made.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=".py, .ipynb, .md; folders")
  made.add_argument("--write", action="store_true", help="write what is certain into the files")
  made.add_argument("--diff", action="store_true", help="show what --write writes, as a diff")
  made.add_argument("--quiet", action="store_true", help="leave out what may need no change")
  return made


def main(argv: list[str] | None = None) -> int:
  """Run the tool, and return its exit status."""
  options = parser().parse_args(argv)
  try:
    import libcst  # noqa: F401
  except ImportError:
    print(INSTALL, file=sys.stderr)
    return 2
  from refax.migrate import files

  count: Counter[str] = Counter()
  for path in files.find(options.paths):
    try:
      result = files.migrate(path)
      if options.write and result.new != result.old:
        files.write(result)
    except files.UnreadableError as error:
      count["unreadable"] += 1
      print(f"{path}: {error}", file=sys.stderr)
      continue
    count["read"] += 1
    count["changed"] += result.new != result.old
    count.update(kind for _, kind, _ in result.said)
    _print(result, options)
  _summary(count, options)
  left = count["write"] or (count["change"] and not options.write)
  return 2 if count["unreadable"] else 1 if left else 0


def _print(result, options: argparse.Namespace) -> None:
  """The findings of one file, or its diff."""
  for place, kind, text in result.said:
    if not (options.quiet and kind == "look") and not (options.diff and kind == "change"):
      print(f"{result.path}:{place}: {kind}: {text}")
  for place in result.skipped:
    print(f"{result.path}:{place}: look: this code is no Python; it was not read")
  if options.diff:
    old, new = (d.decode("utf-8", "replace").splitlines(True) for d in (result.old, result.new))
    lines = difflib.unified_diff(old, new, f"a/{result.path}", f"b/{result.path}")
    sys.stdout.writelines(line if line.endswith("\n") else f"{line}\n" for line in lines)


def _summary(count: Counter[str], options: argparse.Namespace) -> None:
  done = "written" if options.write else "certain (--write writes them)"
  print(
    f"{count['read']} files read; changes: {count['change']} in {count['changed']} files, {done}; "
    f"to write: {count['write']}; to look at: {count['look']}",
    file=sys.stderr,
  )


def _deep(argv: list[str] | None = None) -> int:
  """`main` on a stack that deeply nested code does not exhaust."""
  status: list[int] = []
  sys.setrecursionlimit(20_000)
  threading.stack_size(512 << 20)
  problem: list[BaseException] = []

  def run() -> None:
    try:
      status.append(main(argv))
    except BaseException as error:
      problem.append(error)

  thread = threading.Thread(target=run, daemon=True)  # Ctrl-C ends it too
  thread.start()
  thread.join()
  if problem:
    raise problem[0]
  return status[0]


if __name__ == "__main__":
  try:
    sys.exit(_deep())
  except BrokenPipeError:  # `| head` has read enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
  except KeyboardInterrupt:
    sys.exit(130)
