"""A plugin of pytest: the tests run against a wheel that is installed, or not at all."""

import sys
from pathlib import Path

import pytest

import refax


def pytest_sessionstart() -> None:
  """Stop where `refax` is imported from anywhere but the environment of this interpreter."""
  if not is_installed(refax.__file__, sys.prefix):
    pytest.exit(f"refax comes from {refax.__file__}, and not from the wheel in {sys.prefix}", 3)


def is_installed(file: str, prefix: str) -> bool:
  """Whether a module's file lies among the installed packages of an environment."""
  path = Path(file).resolve()
  return path.is_relative_to(Path(prefix).resolve()) and "site-packages" in path.parts
