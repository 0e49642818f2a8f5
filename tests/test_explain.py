"""`python -m refax.explain` prints what the page about errors says, and every error names it."""

import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import jax.numpy as jnp
import pytest

from refax import errors, explain, nnx

ROOT = Path(__file__).parents[1]
SEE = "\n  see: python -m refax.explain "


def explained(capsys, *arguments):
  status = explain.main(list(arguments))
  printed = capsys.readouterr()
  return status, printed.out, printed.err


def test_an_error_ends_with_the_command_that_explains_it():
  with pytest.raises(errors.ShapeMismatchError) as caught:
    nnx.Param(jnp.ones(2))[...] = jnp.ones(3)
  assert str(caught.value) == caught.value.args[0] + SEE + "ShapeMismatchError"
  assert "see:" not in caught.value.args[0]


def test_the_error_of_a_user_is_explained_by_the_class_above_it():
  class OddError(errors.FilterError):
    pass

  class OwnError(errors.RefaxError):
    pass

  assert str(OddError("odd", fix="even")) == "odd\n  fix: even" + SEE + "FilterError"
  assert str(OwnError("mine")) == "mine" + SEE + "RefaxError"


def test_an_error_is_pickled_with_its_message():
  error = errors.KeywordError("no", got="x", fix="y")
  assert pickle.loads(pickle.dumps(error)).args == error.args


def test_an_error_in_the_text_of_another_says_where_to_read_once(tmp_path):
  inner = errors.FilterError("the filter is odd", fix="another")
  outer = errors.CheckpointWriteError.step(tmp_path, 3, inner, [])
  assert "FilterError: the filter is odd fix: another" in str(outer)
  assert str(outer).count("refax.explain") == 1


def test_the_message_of_any_exception_is_known():
  assert errors.message(ValueError("a")) == "a"
  assert errors.message(errors.RngKeyError("a")) == "a"
  assert errors.message(KeyError()) == ""


def test_a_section_is_printed_as_plain_text(capsys):
  status, text, _ = explained(capsys, "FilterError")
  assert status == 0
  assert text.startswith("FilterError\n===========\n\nYou meet it when ")
  assert "\n    graphdef, params, rest = nnx.split(model, nnx.Param, ...)\n" in text
  assert "\n    refax.errors.FilterError: the filters do not cover everything\n" in text
  assert text.endswith("The programs begin with:\n\n" + indented_imports())
  assert "```" not in text and "](" not in text


def indented_imports():
  head = explain.page().partition("\n## ")[0]
  lines = explain.blocks(head, "python")[0].splitlines(keepends=True)
  return "".join("    " + line for line in lines)


@pytest.mark.parametrize("name", ["refax.errors.FilterError", "nnx.FilterError", "filtererror"])
def test_a_name_may_have_a_module_or_small_letters(capsys, name):
  assert explained(capsys, name) == explained(capsys, "FilterError")


def test_each_section_is_printed_without_marks_of_markdown(capsys):
  for name in explain.sections(explain.page()):
    status, text, _ = explained(capsys, name)
    assert status == 0
    assert "```" not in text and "](#" not in text
    prose = [line for line in text.splitlines() if not line.startswith("    ")]
    assert max(map(len, prose)) <= explain.WIDTH


def test_without_a_name_each_error_has_a_line(capsys):
  status, text, _ = explained(capsys)
  lines = text.partition("\n\n")[0].splitlines()
  assert status == 0
  assert [line.split()[0] for line in lines] == list(explain.sections(explain.page()))
  assert all(len(line) <= 100 and len(line.split()) > 3 for line in lines)


def test_an_unknown_name_is_an_error_with_those_that_look_alike(capsys):
  status, text, said = explained(capsys, "ShapeMissmatch")
  assert (status, text) == (2, "")
  assert said.startswith("Refax has no error ShapeMissmatch. Did you mean ShapeMismatchError")
  status, _, said = explained(capsys, "Qqq")
  assert status == 2 and said == (
    "Refax has no error Qqq. python -m refax.explain lists all of them.\n"
  )


def test_the_command_answers_without_jax():
  code = (
    "import runpy, sys\n"
    "sys.argv = ['refax.explain', 'RngKeyError']\n"
    "try:\n  runpy.run_module('refax.explain', run_name='__main__')\n"
    "except SystemExit as end:\n  assert end.code == 0\n"
    "assert not {'jax', 'numpy', 'refax.errors'} & set(sys.modules)\n"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("RngKeyError\n")


def test_the_command_says_its_status():
  command = [sys.executable, "-m", "refax.explain", "RngKeyErr"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 2 and "RngKeyError" in done.stderr


@pytest.mark.slow
def test_a_wheel_has_the_page_and_explains_from_it(tmp_path):
  build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(ROOT)]
  done = subprocess.run(build, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  (wheel,) = tmp_path.glob("*.whl")
  zipfile.ZipFile(wheel).extractall(tmp_path / "site")
  assert (tmp_path / "site/refax/errors.md").read_text() == explain.page()
  command = [sys.executable, "-m", "refax.explain", "RngKeyError"]
  done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "site")
  assert done.returncode == 0 and done.stdout.startswith("RngKeyError\n")
