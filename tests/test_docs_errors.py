"""docs/reference/errors.md is true: each program raises its error, prints it, and can be mended."""

import gc
import inspect
import os
import re
import sys
import traceback
import warnings

import pytest

from refax import errors, explain

PAGE = explain.page()
SECTIONS = explain.sections(PAGE)
IMPORTS = explain.blocks(PAGE.partition("\n## ")[0], "python")[0]
CLASSES = {
  name: value
  for name, value in vars(errors).items()
  if inspect.isclass(value) and value.__module__ == errors.__name__
}
# What one process cannot raise: the error is made here as the code of Refax makes it.
SEVERAL_PROCESSES = {
  "ProcessMismatchError": lambda: errors.ProcessMismatchError.values(
    "nnx.device_put", ["kernel"], [1]
  ),
}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
  """An empty folder to write to; modules that a program hides are there again afterwards."""
  monkeypatch.chdir(tmp_path)
  modules = dict(sys.modules)
  yield
  for name in [name for name, module in sys.modules.items() if module is None]:
    del sys.modules[name]
  sys.modules.update(modules)


def run(code):
  namespace = {"__name__": "__main__"}
  exec(IMPORTS, namespace)
  exec(compile(code, "train.py", "exec"), namespace)


def masked(text):
  """Without what differs from run to run: lines of files, the folder, the process, JAX's note."""
  text = text.partition("\n--------------------\nFor simplicity, JAX has removed")[0]
  text = re.sub(r"\b\w+\.py:\d+", "train.py:N", text.replace(os.path.realpath("."), "/home/me"))
  return text.replace(f"process {os.getpid()}", "process 12345").strip()


def shows(shown, printed):
  """Whether a text of the page is what is printed; three dots stand for anything in a line."""
  pattern = ".*".join(map(re.escape, masked(shown).split("...")))
  return re.fullmatch(pattern, masked(printed)) is not None


def outcome(code):
  """The class of what a program raises or warns of, and what Python prints about it."""
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
      run(code)
    except Exception as error:
      return type(error), "".join(traceback.format_exception_only(error))
    gc.collect()  # what a trace loses is found when its copy of the object goes
  for one in caught:
    if one.category.__module__ == errors.__name__:
      where = f"{os.path.basename(one.filename)}:{one.lineno}"
      return one.category, f"{where}: {one.category.__name__}: {one.message}"
  return None, ""


def test_each_class_of_errors_has_a_section_and_a_place_in_the_table():
  assert len(CLASSES) > 35
  assert set(SECTIONS) == set(CLASSES)
  head = PAGE.partition("\n## ")[0]
  assert re.findall(r"\[(\w+)\]\(#\w+\)", head) == list(SECTIONS)
  assert all(anchor == name.lower() for name, anchor in re.findall(r"\[(\w+)\]\(#(\w+)\)", head))


@pytest.mark.parametrize("name", [name for name in SECTIONS if name not in SEVERAL_PROCESSES])
def test_the_first_program_raises_the_error_and_prints_what_the_page_shows(name, elsewhere):
  program, _ = explain.blocks(SECTIONS[name], "python")
  (shown,) = explain.blocks(SECTIONS[name], "text")
  kind, printed = outcome(program)
  assert kind is CLASSES[name]
  assert shows(shown, printed), printed
  assert masked(printed).endswith(f"\n  see: python -m refax.explain {name}")


@pytest.mark.parametrize("name", SECTIONS)
def test_the_second_program_works(name, elsewhere):
  _, program = explain.blocks(SECTIONS[name], "python")
  with warnings.catch_warnings():
    warnings.simplefilter("error", errors.StructureWarning)
    warnings.simplefilter("error", errors.RetraceWarning)
    run(program)


@pytest.mark.parametrize("name", SEVERAL_PROCESSES)
def test_what_one_process_cannot_raise_is_said_and_shown(name):
  error = SEVERAL_PROCESSES[name]()
  assert type(error) is CLASSES[name]
  assert "One process alone cannot raise it" in SECTIONS[name]
  (shown,) = explain.blocks(SECTIONS[name], "text")
  assert shows(shown, "".join(traceback.format_exception_only(error)))


def test_the_example_at_the_top_has_the_lines_of_an_error():
  shown = explain.blocks(PAGE.partition("\n## ")[0], "text")[0]
  keys = [line.strip().partition(" ")[0] for line in shown.splitlines()[1:]]
  assert keys == ["at:", "got:", "fix:", "see:"]
  model = "\n".join(
    [
      "class Net(nnx.Module):",
      "  def __init__(self):",
      "    self.hidden = nnx.Linear(2, 64, rngs=nnx.Rngs(0))",
      "net = Net()",
      "net.hidden.kernel[...] = jnp.ones((5, 5))",
    ]
  )
  assert shows(shown, outcome(model)[1])
