"""Build the sdist and the wheel, test the wheel in a clean environment; nothing is published.

python -m release [--quick]
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from pathlib import Path

from release import checks

ROOT = Path(__file__).parents[1]
QUICK = ("tests/test_public_api.py", "tests/test_release.py", "tests/core/test_variable.py")
# As in the Makefile: XLA need not make programs fast that run once.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def main(argv: list[str] | None = None) -> int:
  """Go through all steps; the exit status."""
  parser = argparse.ArgumentParser(prog="python -m release", description=__doc__)
  parser.add_argument("--quick", action="store_true", help="a few of the tests, not all")
  parser.add_argument(
    "--work", type=Path, default=ROOT / "out" / "release", help="a scratch folder"
  )
  options = parser.parse_args(argv)
  work = options.work.absolute()
  try:
    say("Checking the tree and the versions")
    version, released = check_tree()
    tree = export(work / "tree")
    say(f"Building Refax {version}")
    wheel = build(tree, ROOT / "dist", version)
    say("Installing the wheel, and what its tests need, into a new environment (minutes)")
    python = install(wheel, work / "venv")
    say("Testing the wheel" + (" with a few tests" if options.quick else ""))
    test(python, tree, QUICK if options.quick else ("tests",))
  except subprocess.CalledProcessError as error:
    print(f"failed: {' '.join(map(str, error.cmd[:6]))} ... (exit {error.returncode})")
    return 1
  except KeyboardInterrupt:
    print("\nInterrupted: nothing is released.")
    return 130
  print(f"\n{wheel.name} passes{' a few of' if options.quick else ''} its tests. To publish it:")
  print("\n".join(f"  {line}" for line in checks.publishing(version, released)))
  return 0


def check_tree() -> tuple[str, bool]:
  """The version to release, and whether the changelog has its date; or the end of the program."""
  porcelain = output("git", "status", "--porcelain")
  texts = [(ROOT / name).read_text() for name in ("pyproject.toml", "CHANGELOG.md", "CITATION.cff")]
  stop(checks.tree_problems(porcelain) + checks.version_problems(*texts))
  return checks.project_version(texts[0]), checks.changelog_version(texts[1])[1]


def export(folder: Path) -> Path:
  """The files of the commit, and no others, in a folder of their own."""
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  archive = folder.parent / "tree.tar"
  run("git", "archive", "--output", archive, "HEAD")
  with tarfile.open(archive) as file:
    file.extractall(folder, filter="data")
  return folder


def build(tree: Path, dist: Path, version: str) -> Path:
  """Build both archives into `dist`, in place of those of the same version; the wheel."""
  for old in dist.glob(f"{checks.PACKAGE}-{version}[-.]*"):
    old.unlink()
  run(sys.executable, "-m", "build", "--outdir", dist, tree)
  wheel = dist / f"{checks.PACKAGE}-{version}-py3-none-any.whl"
  with zipfile.ZipFile(wheel) as file:
    stop(checks.wheel_problems(file.namelist()))
  return wheel


def install(wheel: Path, folder: Path) -> Path:
  """A new environment with the wheel and its extra `test`; its interpreter."""
  shutil.rmtree(folder, ignore_errors=True)
  try:
    venv.create(folder, with_pip=True)
  except subprocess.CalledProcessError:  # a Python without ensurepip (Debian): this pip does it
    venv.create(folder, with_pip=False, clear=True)
  python = folder / "bin" / "python"
  pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
  run(*pip, "install", "--quiet", f"{wheel}[test]")
  return python


def test(python: Path, tree: Path, tests: tuple[str, ...]) -> None:
  """Run tests of the exported tree with the environment's interpreter, which has the wheel."""
  environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()}
  environment.pop("PYTHONPATH", None)
  options = ("-q", "-m", "not slow", "-p", "release.installed", "-n", "2", "--dist", "worksteal")
  # `python -m` puts the tree itself on the path, for `release`; the package lies in its `src`.
  run(python, "-m", "pytest", *options, *tests, cwd=tree, env=environment)


def say(what: str) -> None:
  """Print what comes next, with the time."""
  print(f"[{time.strftime('%H:%M:%S')}] {what}", flush=True)


def stop(problems: list[str]) -> None:
  """End the program if there are problems, and print them."""
  if problems:
    raise SystemExit("Not ready for a release:\n" + "\n".join(f"  {p}" for p in problems))


def output(*command: str) -> str:
  """What a command prints."""
  return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def run(*command: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> None:
  """Run a command that prints for itself; one that fails ends the release."""
  subprocess.run([str(part) for part in command], cwd=cwd, env=env, check=True)


if __name__ == "__main__":
  sys.exit(main())
