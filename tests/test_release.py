"""`make release`: what it refuses to release, and that it tests the wheel and not the source."""

import re
from pathlib import Path

import pytest

from release import checks
from release.installed import is_installed

ROOT = Path(__file__).parents[1]
PYPROJECT = '[project]\nname = "refax"\nversion = "1.2.0"\n'
OUT = "# Changelog\n\n## [1.2.0] - 2026-01-31\n\n- A.\n\n## [1.1.0] - 2025-01-31\n"
NEXT = "# Changelog\n\n## [Unreleased]: 1.2.0\n\n## [1.1.0] - 2025-01-31\n"
CITATION = "cff-version: 1.2.0\nversion: 1.2.0\n"


@pytest.mark.parametrize(
  ("text", "want"),
  [(OUT, ("1.2.0", True)), (NEXT, ("1.2.0", False)), ("# Changelog\n", (None, False))],
)
def test_the_newest_part_of_a_changelog_states_the_version(text, want):
  assert checks.changelog_version(text) == want


def test_a_changelog_whose_next_version_is_not_named_has_none():
  assert checks.changelog_version("## [Unreleased]\n\n## [1.1.0] - 2025-01-31\n") == (None, False)


@pytest.mark.parametrize("changelog", [OUT, NEXT])
def test_equal_versions_are_no_problem(changelog):
  assert checks.version_problems(PYPROJECT, changelog, CITATION) == []


def test_each_file_with_another_version_is_a_problem():
  changelog, citation = OUT.replace("1.2.0", "1.3.0"), "cff-version: 1.2.0\nversion: '1.1.0'\n"
  assert checks.version_problems(PYPROJECT, changelog, citation) == [
    "CHANGELOG.md states 1.3.0, pyproject.toml states 1.2.0",
    "CITATION.cff states 1.1.0, pyproject.toml states 1.2.0",
  ]
  assert checks.version_problems(PYPROJECT, OUT, "cff-version: 1.2.0\n") == [
    "CITATION.cff states no version, pyproject.toml states 1.2.0"
  ]


def test_the_files_of_this_repository_state_one_version():
  texts = [(ROOT / name).read_text() for name in ("pyproject.toml", "CHANGELOG.md", "CITATION.cff")]
  assert checks.version_problems(*texts) == []


def test_a_tree_with_changes_is_a_problem_that_names_some():
  assert checks.tree_problems("") == []
  (one,) = checks.tree_problems(" M src/refax/nnx.py\n?? notes.txt\n")
  assert one.endswith("not committed: src/refax/nnx.py, notes.txt")
  (many,) = checks.tree_problems("".join(f"?? {i}\n" for i in range(8)))
  assert many.endswith("0, 1, 2, 3, 4 and 3 more")


def test_a_wheel_has_the_package_its_types_and_the_license_and_nothing_else():
  info = "refax-1.2.0.dist-info"
  names = [*checks.NEEDED, f"{info}/METADATA", f"{info}/licenses/LICENSE"]
  assert checks.wheel_problems(names) == []
  assert checks.wheel_problems(names[:2] + names[3:]) == ["the wheel lacks refax/py.typed"]
  assert checks.wheel_problems(names[:-1]) == ["the wheel lacks the license"]
  assert checks.wheel_problems([*names, "tests/test_a.py"]) == [
    "the wheel has tests, which is not a part of refax"
  ]


def test_the_commands_that_publish_name_the_version_and_a_missing_date():
  commands = checks.publishing("1.2.0", released=True)
  assert commands[0].startswith("git tag") and "upload dist/refax-1.2.0*" in commands[-1]
  assert re.search(r"CHANGELOG.*1\.2\.0", checks.publishing("1.2.0", released=False)[0])


def test_the_source_tree_is_not_taken_for_an_installed_wheel(tmp_path):
  installed = tmp_path / "venv" / "lib" / "python3.13" / "site-packages" / "refax" / "__init__.py"
  assert is_installed(str(installed), str(tmp_path / "venv"))
  assert not is_installed(str(ROOT / "src" / "refax" / "__init__.py"), str(tmp_path / "venv"))
  assert not is_installed(str(tmp_path / "venv" / "src" / "refax" / "a.py"), str(tmp_path / "venv"))
