"""Tests of `refax.compat` run in its world, and leave Refax as they found it."""

import pytest

from refax.compat import extension

extension.retract()  # other tests are collected in this process too


@pytest.fixture(autouse=True)
def extended():
  """Variables are lojax and have what Flax's have; afterwards, they are Refax's own again."""
  extension.retract()
  extension.extend()
  yield
  extension.retract()
