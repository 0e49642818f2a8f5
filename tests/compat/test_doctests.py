"""The examples in the docstrings of `refax.compat`, in its own world."""

import doctest
import importlib
import pkgutil

import pytest

import refax.compat

NAMES = [
  name
  for _, name, _ in pkgutil.walk_packages(refax.compat.__path__, "refax.compat.")
  if "__main__" not in name
]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_hold(name):
  module = importlib.import_module(name)
  assert doctest.testmod(module, optionflags=OPTIONS).failed == 0
