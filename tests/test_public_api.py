"""The public namespace: every name resolves, is sorted, is documented and shows an example."""

import inspect
import re
import types

import pytest

import refax
from refax import errors, nnx


def defined_here(value):
  return getattr(value, "__module__", "").startswith("refax") and (
    inspect.isclass(value) or inspect.isroutine(value)
  )


def _is_class(name):
  """A class of Refax; the constructors of errors are not for users."""
  value = getattr(nnx, name)
  return inspect.isclass(value) and defined_here(value) and not issubclass(value, Exception)


def test_names_are_sorted_and_unique():
  assert nnx.__all__ == sorted(set(nnx.__all__))  # as ruff sorts them


@pytest.mark.parametrize("name", nnx.__all__)
def test_a_public_name_is_documented_and_shows_an_example(name):
  value = getattr(nnx, name)
  assert not name.startswith("_")
  if isinstance(value, types.ModuleType) or defined_here(value):
    doc = inspect.getdoc(value) or ""
    assert doc.strip(), f"nnx.{name} has no docstring"
  if defined_here(value):
    assert value.__doc__ and ">>>" in value.__doc__, f"nnx.{name} has no example"


def test_nothing_public_is_left_out():
  names = {n for n, v in vars(nnx).items() if not n.startswith("_")}
  assert names == set(nnx.__all__)


@pytest.mark.parametrize("name", [n for n in nnx.__all__ if _is_class(n)])
def test_public_methods_of_classes_are_documented(name):
  cls = getattr(nnx, name)
  for method, value in vars(cls).items():
    if not method.startswith("_") and inspect.isroutine(value):
      assert inspect.getdoc(getattr(cls, method)), f"nnx.{name}.{method} has no docstring"


def test_the_version_is_a_version():
  assert refax.__version__.count(".") == 2


@pytest.mark.parametrize("name", nnx.__all__)
def test_public_signatures_are_annotated(name):
  value = getattr(nnx, name)
  if not defined_here(value):
    return
  target = value.__init__ if inspect.isclass(value) and "__init__" in vars(value) else value
  if inspect.isclass(target):
    return
  for parameter in list(inspect.signature(target).parameters.values()):
    if parameter.name != "self":
      assert parameter.annotation is not parameter.empty, f"nnx.{name}: {parameter.name}"


def test_what_the_errors_tell_users_to_write_exists():
  text = inspect.getsource(errors)
  names = set(re.findall(r"\bnnx\.(\w+)", text))
  assert {"grad", "pure", "device_put"} <= names
  assert [name for name in names if not hasattr(nnx, name)] == []
