import pytest

from tests.migrate.programs import migrated, said


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ("from flax import nnx\n", "from refax import nnx\n"),
    ("from flax import nnx", "from refax import nnx"),
    ("import flax.nnx as nnx\n", "from refax import nnx\n"),
    ("import flax.nnx as nx  # why\n", "from refax import nnx as nx  # why\n"),
    ("from flax import nnx as nx\n", "from refax import nnx as nx\n"),
    ("from flax.nnx import Linear, Param as P\n", "from refax.nnx import Linear, Param as P\n"),
    ("from flax.nnx.statelib import State\n", "from refax.nnx import State\n"),
    ("from flax.nnx.nn import initializers\n", "from refax.nnx import initializers\n"),
    ("from flax.nnx import VariableState\n", "from refax.nnx import Variable as VariableState\n"),
    ("import flax.nnx.nn.initializers as init\n", "from refax.nnx import initializers as init\n"),
    (
      "from flax import linen as nn, nnx  # both\n",
      "from flax import linen as nn  # both\nfrom refax import nnx\n",
    ),
    ("from flax import nnx, struct\n", "from flax import struct\nfrom refax import nnx\n"),
    ("import os, flax.nnx as nnx\n", "import os\nfrom refax import nnx\n"),
    ("import flax.nnx as nnx, os\n", "import os\nfrom refax import nnx\n"),
    ("import flax.nnx as nnx; x = 1\n", "from refax import nnx; x = 1\n"),
    ("if x: from flax import nnx, io\n", "if x: from flax import io; from refax import nnx\n"),
    ("def f():\n\tfrom flax import nnx\n", "def f():\n\tfrom refax import nnx\n"),
    (
      "from flax.nnx import (\n  Linear,  # a layer\n  Param,\n)\n",
      "from refax.nnx import (\n  Linear,  # a layer\n  Param,\n)\n",
    ),
    (
      "from flax.nnx import (\n  Linear,  # a layer\n  flatten,\n)\n",
      "from flax.nnx import (\n  # a layer\n  flatten,\n)\nfrom refax.nnx import Linear\n",
    ),
    ("from flax import \\\n  nnx\n", "from refax import \\\n  nnx\n"),
    ("import flax.nnx\nflax.nnx.relu(1)\n", "import refax.nnx\nrefax.nnx.relu(1)\n"),
    ("import flax\nflax.nnx.relu(1)\n", "import refax.nnx\nrefax.nnx.relu(1)\n"),
    (
      "import flax\nflax.nnx.relu(flax.linen)\n",
      "import flax\nimport refax.nnx\nrefax.nnx.relu(flax.linen)\n",
    ),
    (
      "import flax.nnx\nflax.nnx.relu(flax.linen)\n",
      "import flax\nimport refax.nnx\nrefax.nnx.relu(flax.linen)\n",
    ),
    (
      "import flax.linen, flax.nnx\nflax.nnx.relu(flax.linen)\n",
      "import flax.linen\nimport refax.nnx\nrefax.nnx.relu(flax.linen)\n",
    ),
    ("import flax\nflax.nnx.statelib.State\n", "import refax.nnx\nrefax.nnx.State\n"),
    (
      "try:\n  from flax import nnx\nexcept ImportError:\n  nnx = None\n",
      "try:\n  from refax import nnx\nexcept ImportError:\n  nnx = None\n",
    ),
    (
      "import typing\nif typing.TYPE_CHECKING:\n  from flax import nnx\n",
      "import typing\nif typing.TYPE_CHECKING:\n  from refax import nnx\n",
    ),
    ("from flax import nnx\r\nx = 1\r\n", "from refax import nnx\r\nx = 1\r\n"),
    (
      "from flax import nnx, io\r\nx = 1\r\n",
      "from flax import io\r\nfrom refax import nnx\r\nx = 1\r\n",
    ),
  ],
)
def test_what_refax_has_is_imported_from_it(old, new):
  assert migrated(old) == new


@pytest.mark.parametrize(
  "code",
  [
    "import flax\nimport flax.linen as nn\nflax.linen.Dense(nn)\n",
    "from flax import linen\n",
    "from . import nnx\nnnx.flatten(1)\n",
    "from other import nnx\nx.value\n",
    'text = "from flax import nnx"\n',
    "def f():\n  '''from flax import nnx'''\n",
    "try:\n  from refax import nnx\nexcept ImportError:\n  from flax import nnx\n",
    "from refax.compat import nnx\nnnx.flatten(x.value)\nnnx.split(m, graph=True)\n",
    "import flax_nnx\nfrom flaxnnx import nnx\n",
  ],
)
def test_what_is_not_flax_nnx_stays(code):
  assert migrated(code) == code
  assert not [s for s in said(code) if s[0] != "look"]


def test_a_star_import_is_listed():
  assert migrated("from flax.nnx import *\n") == "from flax.nnx import *\n"
  [(kind, line, text)] = said("from flax.nnx import *\n")
  assert (kind, line) == ("write", 1)
  assert "write the names that you use" in text


@pytest.mark.parametrize(
  ("code", "want"),
  [
    ("from flax.nnx import flatten\n", "nnx.split(node)"),
    ("from flax.nnx import statelib\n", "names of `nnx` itself"),
    ("import flax.nnx.graphlib as graphlib\n", "names of `nnx` itself"),
    ("from flax.nnx.nn.initializers import zeros\n", "`nnx.initializers.zeros` for `zeros`"),
    ("from flax.nnx import Nonsense\n", "no such name"),
  ],
)
def test_a_name_that_has_no_like_stays_and_is_listed(code, want):
  assert migrated(code) == code
  [(kind, _, text)] = said(code)
  assert kind == "write" and want in text
