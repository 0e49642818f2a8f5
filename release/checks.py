"""What must be true of a tree and of a wheel before they are released; nothing here runs a process.

Each function returns the problems that it found as sentences, and none if all is well.
"""

import re
import tomllib
from collections.abc import Iterable

PACKAGE = "refax"
NEEDED = (f"{PACKAGE}/__init__.py", f"{PACKAGE}/nnx.py", f"{PACKAGE}/py.typed")
HEADING = re.compile(r"^## \[(?P<title>[^\]]+)\](?:: (?P<next>\S+))?", re.MULTILINE)


def project_version(pyproject: str) -> str:
  """The version that a pyproject.toml states."""
  return tomllib.loads(pyproject)["project"]["version"]


def changelog_version(changelog: str) -> tuple[str | None, bool]:
  """The version of a changelog's newest part, and whether that part says that it is released.

  A heading is `## [1.2.0] - 2026-01-31` for a version that is out, and `## [Unreleased]: 1.2.0` for
  the next one.
  """
  found = HEADING.search(changelog)
  if found is None:
    return None, False
  released = found["title"] != "Unreleased"
  return found["title"] if released else found["next"], released


def citation_version(citation: str) -> str | None:
  """The version that a CITATION.cff states."""
  found = re.search(r"^version: *[\"']?([^\"'\s]+)", citation, flags=re.MULTILINE)
  return found[1] if found else None


def version_problems(pyproject: str, changelog: str, citation: str) -> list[str]:
  """Where the changelog and the citation state another version than the project does."""
  version = project_version(pyproject)
  stated = {
    "CHANGELOG.md": changelog_version(changelog)[0],
    "CITATION.cff": citation_version(citation),
  }
  return [
    f"{name} states {other or 'no version'}, pyproject.toml states {version}"
    for name, other in stated.items()
    if other != version
  ]


def tree_problems(porcelain: str) -> list[str]:
  """What `git status --porcelain` lists: a release is made from a commit, and not from more."""
  lines = porcelain.splitlines()
  shown = ", ".join(line[3:] for line in lines[:5])
  more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
  return [f"the tree has changes that are not committed: {shown}{more}"] if lines else []


def wheel_problems(names: Iterable[str]) -> list[str]:
  """What is missing among the files of a wheel, and what should not be there."""
  names = set(names)
  missing = [f"the wheel lacks {name}" for name in NEEDED if name not in names]
  if not any(re.search(r"\.dist-info/.*LICENSE$", name) for name in names):
    missing.append("the wheel lacks the license")
  top = {name.partition("/")[0] for name in names}
  strange = sorted(t for t in top if t != PACKAGE and not t.endswith(".dist-info"))
  return missing + [f"the wheel has {name}, which is not a part of {PACKAGE}" for name in strange]


def publishing(version: str, released: bool) -> list[str]:
  """The commands that would publish a version, in order."""
  date = [] if released else [f'# CHANGELOG.md: write "## [{version}] - DATE", then commit']
  return [
    *date,
    f'git tag --annotate v{version} --message "Refax {version}"',
    f"git push origin v{version}",
    f"python -m pip install twine && python -m twine upload dist/{PACKAGE}-{version}*",
  ]
