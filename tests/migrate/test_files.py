import json
import os
import subprocess
import sys

import pytest

from refax.migrate.__main__ import main

OLD = "from flax import nnx\n\np = nnx.Param(1)\np.value += 1  # one more\n"
NEW = "from refax import nnx\n\np = nnx.Param(1)\np[...] += 1  # one more\n"


def put(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return path


def stamp(path):
  """What differs once a file was written, be it with the same bytes."""
  return path.stat().st_mtime_ns, path.stat().st_ino


def run(*args):
  return main([str(a) for a in args])


def test_a_check_writes_nothing_and_says_each_line(tmp_path, capsys):
  path = put(tmp_path / "a.py", OLD)
  assert run(tmp_path) == 1
  assert path.read_text() == OLD
  out, err = capsys.readouterr()
  assert out.splitlines() == [
    f"{path}:1: change: `from flax import nnx` -> `from refax import nnx`",
    f"{path}:4: change: `p.value` -> `p[...]`",
  ]
  assert "1 files read; changes: 2 in 1 files, certain (--write writes them)" in err


def test_write_writes_and_a_second_time_there_is_nothing_left(tmp_path):
  path = put(tmp_path / "a.py", OLD)
  path.chmod(0o640)
  assert run("--write", path) == 0
  assert path.read_text() == NEW
  assert path.stat().st_mode & 0o777 == 0o640
  before = stamp(path)
  assert run("--write", path) == 0
  assert stamp(path) == before
  assert os.listdir(tmp_path) == ["a.py"]


def test_a_diff_shows_what_would_be_written(tmp_path, capsys):
  path = put(tmp_path / "a.py", OLD)
  assert run("--diff", path) == 1
  out = capsys.readouterr().out
  assert "-p.value += 1  # one more\n+p[...] += 1  # one more\n" in out
  assert path.read_text() == OLD


def test_what_is_left_to_write_makes_the_status_1_and_hints_do_not(tmp_path, capsys):
  put(tmp_path / "a.py", "from refax import nnx\nnnx.flatten(m)\n")
  assert run("--write", tmp_path) == 1
  put(tmp_path / "a.py", "from refax import nnx\nx.value\n")
  assert run("--write", tmp_path) == 0
  assert "look" in capsys.readouterr().out
  assert run("--quiet", tmp_path) == 0
  assert "look:" not in capsys.readouterr().out


@pytest.mark.parametrize(
  ("old", "new"),
  [
    (OLD.replace("\n", "\r\n"), NEW.replace("\n", "\r\n")),
    (b"\xef\xbb\xbf" + OLD.encode(), b"\xef\xbb\xbf" + NEW.encode()),
    (
      b"# -*- coding: latin-1 -*-\nx = '\xe9'\n" + OLD.encode(),
      b"# -*- coding: latin-1 -*-\nx = '\xe9'\n" + NEW.encode(),
    ),
    ("x = 'é𝄞'\n" + OLD + "\x0c\ny = 1 ", "x = 'é𝄞'\n" + NEW + "\x0c\ny = 1 "),
    ("#!/usr/bin/python\n'''doc'''\n" + OLD, "#!/usr/bin/python\n'''doc'''\n" + NEW),
    ("if x:\n\t" + OLD.replace("\n\np", "; p"), "if x:\n\t" + NEW.replace("\n\np", "; p")),
  ],
)
def test_encodings_ends_of_lines_and_layout_stay(tmp_path, old, new):
  path = put(tmp_path / "a.py", old)
  run("--write", path)
  assert path.read_bytes() == (new if isinstance(new, bytes) else new.encode())


@pytest.mark.parametrize(
  "text",
  [
    b"x.value\nnnx = 1\n",
    b"\xff\xfe binary",
    b"def broken(:\n",
    b"",
    b"# flax nnx, in a comment\nx.value = 1\n",
    b"import flax\nx = 'nnx'\n",
  ],
)
def test_files_without_nnx_are_not_touched(tmp_path, text):
  path = put(tmp_path / "a.py", text)
  before = stamp(path)
  assert run("--write", tmp_path) == 0
  assert (path.read_bytes(), stamp(path)) == (text, before)


@pytest.mark.parametrize(
  ("name", "text", "why"),
  [
    ("a.py", OLD + "def broken(:\n", "line 5"),
    ("a.py", b"# \xff\n" + OLD.encode(), "encoding declaration"),
    ("a.py", b"# coding: nonsense\n" + OLD.encode(), "nonsense"),
    ("a.py", OLD + "x = " + "(" * 3000 + ")" * 3000, "nested too deeply"),
    ("a.py", OLD + "\0", "not a valid character"),
    ("a.ipynb", '{"flax": "nnx"', "JSON"),
    ("a.ipynb", '{"flax": "nnx"}', "notebook"),
    ("a.ipynb", '["flax", "nnx"]', "notebook"),
  ],
)
def test_what_cannot_be_read_is_named_and_the_others_go_on(tmp_path, capsys, name, text, why):
  bad = put(tmp_path / name, text)
  good = put(tmp_path / "good.py", OLD)
  before = bad.read_bytes()
  assert run("--write", tmp_path) == 2
  assert good.read_text() == NEW
  assert bad.read_bytes() == before
  err = capsys.readouterr().err
  assert f"{bad}: " in err and why in err


def test_a_path_that_is_not_there_is_an_error(tmp_path, capsys):
  assert run(tmp_path / "missing.py") == 2
  assert "No such file" in capsys.readouterr().err


def test_wrong_usage_has_the_status_2():
  with pytest.raises(SystemExit, match="2"):
    main([])
  with pytest.raises(SystemExit, match="2"):
    main(["--nonsense", "."])


def test_hidden_folders_environments_and_links_are_not_entered(tmp_path):
  paths = [".git/a.py", "env2/lib/a.py", "site-packages/a.py", "__pycache__/a.py", ".a.py"]
  files = [put(tmp_path / "in" / p, OLD) for p in paths]
  put(tmp_path / "in/env2/pyvenv.cfg", "")
  outside = put(tmp_path / "out/a.py", OLD)
  (tmp_path / "in/link").symlink_to(tmp_path / "out")
  (tmp_path / "in/link.py").symlink_to(outside)
  (tmp_path / "in/dangling.py").symlink_to(tmp_path / "nowhere")
  (tmp_path / "in/loop").symlink_to(tmp_path / "in")
  os.mkfifo(tmp_path / "in/pipe.py")
  assert run("--write", tmp_path / "in") == 0
  assert {f.read_text() for f in [*files, outside]} == {OLD}
  assert run("--write", tmp_path / "in/link.py") == 0
  assert outside.read_text() == NEW
  assert (tmp_path / "in/link.py").is_symlink()


def test_a_file_that_is_named_twice_is_read_once(tmp_path, capsys):
  path = put(tmp_path / "a.py", OLD)
  run(tmp_path, path, tmp_path / "." / "a.py")
  assert "1 files read" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_that_cannot_be_written_stays(tmp_path, capsys):
  path = put(tmp_path / "a.py", OLD)
  path.chmod(0o440)
  assert run("--write", path) == 2
  assert path.read_text() == OLD
  assert "cannot be written" in capsys.readouterr().err


def test_the_module_runs_by_its_name_and_without_jax(tmp_path):
  path = put(tmp_path / "a.py", OLD)
  code = "import runpy, sys; sys.modules['jax'] = None; "
  code += "runpy.run_module('refax.migrate', {}, '__main__')"
  done = subprocess.run([sys.executable, "-c", code, "--write", str(path)], capture_output=True)
  assert done.returncode == 0, done.stderr
  assert path.read_text() == NEW


def test_without_libcst_it_says_how_to_install_it(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "libcst", None)
  assert run(tmp_path) == 2
  assert "pip install 'refax[migrate]'" in capsys.readouterr().err


def notebook(*cells, **options):
  listed = [
    {"cell_type": kind, "metadata": {"a": [1, {}]}, "source": source, "outputs": []}
    for kind, source in cells
  ]
  return json.dumps({"metadata": {}, "cells": listed, "nbformat": 4}, **options)


def test_a_notebook_changes_in_its_code_only(tmp_path):
  cells = [
    ("markdown", ["from flax import nnx\n", "x.value"]),
    (
      "code",
      ["!pip install flax\n", "%time\n", "from flax import nnx, struct\n", "p = nnx.Param('é')"],
    ),
    ("code", ["%%bash\n", "echo nnx\n"]),
    ("code", ["%%time\n", "p.value\n", "p?\n", "!ls \\\n", "  -l\n", "files = !ls"]),
    ("code", "p.value = 1"),
    ("code", []),
    ("code", ["this is no Python\n"]),
  ]
  new = [list(c) for c in cells]
  new[1][1] = [
    *cells[1][1][:2],
    "from flax import struct\n",
    "from refax import nnx\n",
    "p = nnx.Param('é')",
  ]
  new[3][1] = ["%%time\n", "p[...]\n", *cells[3][1][2:]]
  new[4][1] = "p[...] = 1"
  for options in ({"indent": 1}, {"indent": 1, "ensure_ascii": False}, {}, {"indent": "\t"}):
    path = put(tmp_path / "a.ipynb", notebook(*cells, **options) + "\n")
    assert run("--write", path) == 0
    assert path.read_text() == notebook(*new, **options) + "\n"
    assert run("--write", path) == 0
    assert path.read_text() == notebook(*new, **options) + "\n"


def test_a_notebook_says_cell_and_line(tmp_path, capsys):
  path = put(tmp_path / "a.ipynb", notebook(("markdown", "x"), ("code", "\nfrom flax import nnx")))
  run(path)
  assert f"{path}:cell 2:2: change: " in capsys.readouterr().out


MARKDOWN = """# from flax import nnx

```python
from flax import nnx, struct
```

- a list:

  ~~~py
  def f(p: nnx.Param):

    nnx.split(
      p,
      graph=True,
    )
    p.value
  ~~~

```sh
from flax import nnx
```

```{code-cell} ipython3
:tags: [a]

%matplotlib
nnx.set_graph_mode(True)
nnx.compat.jit
```

`p.value`
"""


def test_the_fenced_python_of_markdown_is_written(tmp_path, capsys):
  new = (
    MARKDOWN.replace(
      "from flax import nnx, struct\n", "from flax import struct\nfrom refax import nnx\n"
    )
    .replace("      graph=True,\n", "")
    .replace("    p.value\n", "    p[...]\n")
    .replace("nnx.set_graph_mode(True)\n", "")
    .replace("compat.", "")
  )
  for end in ("\n", "\r\n"):
    path = put(tmp_path / "a.md", MARKDOWN.replace("\n", end))
    assert run("--write", path) == 0
    assert path.read_bytes().decode() == new.replace("\n", end)
    assert run("--write", path) == 0
  put(path, MARKDOWN)
  capsys.readouterr()
  run(path)
  assert f"{path}:16: change: `p.value` -> `p[...]`" in capsys.readouterr().out
