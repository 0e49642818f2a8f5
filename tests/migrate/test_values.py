import pytest

from tests.migrate.programs import body, said

CLASS = """
class V(nnx.Variable): ...
class M(nnx.Module):
  d: nnx.Param | None
  def __init__(self, rngs):
    self.w = nnx.Param(1)  # the weight
    self.v = V(2)
    self.b = nnx.Param(1) if rngs else None
    self.lin = nnx.Linear(2, 3, rngs=rngs)
    self.attn = nnx.MultiHeadAttention(1, 2, rngs=rngs)
    self.mixed = nnx.Param(1)
    self.other = make()
    self.value = nnx.Linear(2, 3, rngs=rngs)
  def set(self, x):
    self.mixed = x
  def __call__(self, x, p: nnx.Variable, q):
"""


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ("self.w.value", "self.w[...]"),
    ("self.w.value = x", "self.w[...] = x"),
    ("self.w.value += x", "self.w[...] += x"),
    ("self.w.value: int = x", "self.w[...]: int = x"),
    ("self.w.value[0] = x", "self.w[...][0] = x"),
    ("self.w.value = self.w.value.at[0].set(x)", "self.w[...] = self.w[...].at[0].set(x)"),
    ("self.v.value.shape", "self.v[...].shape"),
    ("self.b.value", "self.b[...]"),
    ("self.d.value", "self.d[...]"),
    ("self.lin.kernel.value", "self.lin.kernel[...]"),
    ("self.attn.value.kernel.value", "self.attn.value.kernel[...]"),
    ("p.value", "p[...]"),
    ("y = nnx.Param(1); y.value", "y = nnx.Param(1); y[...]"),
    ("lambda z: self.w.value + z", "lambda z: self.w[...] + z"),
    ('f"{self.w.value} {self.w.value!r:>{p.value}}"', 'f"{self.w[...]} {self.w[...]!r:>{p[...]}}"'),
    ("(self.w\n      .value)  # why", "(self.w\n      [...])  # why"),
    ("(self.w).value", "(self.w)[...]"),
    ("nnx.Param(1).value", "nnx.Param(1)[...]"),
    (
      "q.value if isinstance(q, nnx.Variable) else q",
      "q[...] if isinstance(q, nnx.Variable) else q",
    ),
    ("isinstance(q, nnx.Param) and q.value.ndim", "isinstance(q, nnx.Param) and q[...].ndim"),
    (
      "if isinstance(q, (nnx.Param, V)):\n      q = q.value",
      "if isinstance(q, (nnx.Param, V)):\n      q = q[...]",
    ),
    ("p.hijax", "p.is_hijax"),
  ],
)
def test_the_value_of_a_variable_is_indexed(old, new):
  assert body(f"{CLASS}    {old}\n") == f"{CLASS}    {new}\n"


@pytest.mark.parametrize(
  "code",
  [
    "self.other.value",
    "self.mixed.value",
    "q.value",
    "q.kernel.value",
    "x = 1; x.value",
    "for p in q: p.value",
    "p = f(p); p.value",
    "[i.value for i in q]",
    'f"{self.w.value=}"',
    "q if isinstance(q, nnx.Variable) else q.value",
    "isinstance(q, nnx.Variable) or q.value",
    "isinstance(q, (nnx.Variable, int)) and q.value",
    "if isinstance(q, nnx.Variable):\n      q = f(q)\n      q.value",
    "if isinstance(q, nnx.Variable):\n      for i in x:\n        q = q.value",
    "if isinstance(q, nnx.Variable):\n      def f(q): return q.value",
    "self.lin.value",
    "setattr(q, 'value', x)",
    "self.value(x)",
    "del self.w.value",
    "self = q; self.w.value",
    "[self.w.value for self in q]",
  ],
)
def test_the_value_of_what_may_be_something_else_stays(code):
  assert body(f"{CLASS}    {code}\n") == f"{CLASS}    {code}\n"


@pytest.mark.parametrize(
  "code",
  [
    "import enum\nclass E(enum.Enum):\n  A = 1\nE.A.value\n",
    "import ast\nast.Constant(1).value\n",
    "try: f()\nexcept StopIteration as e: e.value\n",
    "class V(nnx.Variable):\n  @property\n  def value(self): return 1\nV(1).value\n",
    "class V(nnx.Variable):\n  def __getitem__(self, i): return 1\nV(1).value\n",
    "class A:\n  w = property(f)\n  def g(self):\n    return self.w.value\n",
    "class A:\n  @staticmethod\n  def g(self): return 1\n",
  ],
)
def test_values_of_enums_and_the_like_are_not_mentioned(code):
  assert body(code) == code
  assert [s for s in said(f"from flax import nnx\n{code}") if "w.value" not in s[2]][1:] == []


def test_a_subclass_that_assigns_something_else_makes_it_uncertain():
  code = """class A(nnx.Module):
  def __init__(self): self.w = nnx.Param(1)
  def __call__(self): return self.w.value
class B(A):
  def __init__(self): self.w = Box(1)
"""
  assert body(code) == code


def test_what_may_be_a_variable_is_a_hint():
  found = said("from flax import nnx\nx.value\nstate['w'].value = 1\n")
  assert [s[:2] for s in found] == [("change", 1), ("look", 2), ("look", 3)]
  assert "`state['w'][...]` is the usual way" in found[2][2]
