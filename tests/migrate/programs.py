"""Code to migrate, and what becomes of it: shared by the tests of the rules."""

import ast

from refax.migrate.edit import apply
from refax.migrate.rules import findings
from refax.migrate.source import Source


def said(code):
  """Kind, line and text of every finding."""
  source = Source(code)
  return [(f.kind, source.data[: f.at].count(b"\n") + 1, f.text) for f in findings(source)]


def migrated(code):
  """The code with all that is certain; a second time changes nothing."""
  source = Source(code)
  new = apply(source.data, [e for f in findings(source) for e in f.edits]).decode()
  ast.parse(new)
  again = Source(new)
  assert not [e for f in findings(again) for e in f.edits]
  return new


def body(code):
  """What becomes of code below `from flax import nnx`."""
  new = migrated(f"from flax import nnx\n{code}")
  first, _, rest = new.partition("\n")
  assert first == "from refax import nnx"
  return rest
