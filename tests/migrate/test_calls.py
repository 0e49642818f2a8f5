import pytest

from tests.migrate.programs import body, migrated, said


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ("nnx.split(m, graph=True)", "nnx.split(m)"),
    ("nnx.split(m, graph=True, )", "nnx.split(m, )"),
    ("nnx.jit(graph=False)", "nnx.jit()"),
    ("nnx.jit(graph=a.b, static_argnums=0)", "nnx.jit(static_argnums=0)"),
    ("nnx.jit(f, graph=True,\n  static_argnums=0)", "nnx.jit(f,\n  static_argnums=0)"),
    ("nnx.jit(\n  f,\n  graph=True,  # why\n)", "nnx.jit(\n  f,\n  # why\n)"),
    ("nnx.jit(\n  f,  # the step\n  graph=True\n)", "nnx.jit(\n  f,  # the step\n)"),
    ("nnx.jit(f, graph=True, graph_updates=False)", "nnx.jit(f)"),
    ("nnx.compat.jit(f, graph=True)", "nnx.jit(f)"),
    ("p = nnx.Param(1); nnx.jit(f, graph=p.value)", "p = nnx.Param(1); nnx.jit(f)"),
    ("nnx.split (m, graph = True , )", "nnx.split (m, )"),
    ("nnx.jit(*a, graph=(True))", "nnx.jit(*a)"),
    ("nnx.graphlib.split(m)", "nnx.split(m)"),
    ("nnx.statelib.State.map", "nnx.State.map"),
    ("nnx.training.metrics.Average()", "nnx.metrics.Average()"),
    ("nnx.nn.linear.default_bias_init", "nnx.initializers.zeros_init()"),
    ("nnx.filterlib.Filter", "nnx.Filter"),
    ("nnx.grad(f, reduce_axes=())", "nnx.grad(f)"),
    ("nnx.Param(x, hijax=True)", "nnx.Param(x, is_hijax=True)"),
    ("nnx.Variable(x, ref=r, a=1)", "nnx.Variable(x, is_hijax=r, a=1)"),
    ("nnx.from_flat_state(flat_state=s)", "nnx.from_flat_state(flat=s)"),
    ("nnx.set_graph_mode(True)\nx = 1", "x = 1"),
    ("def f():\n  nnx.set_graph_updates(False)", "def f():\n  pass"),
    ("if x: nnx.set_graph_mode(True)", "if x: pass"),
    ("y = 1; nnx.set_graph_mode(True)", "y = 1; pass"),
    (
      "from functools import partial\n@partial(nnx.jit, graph=True)\ndef f(m): ...",
      "from functools import partial\n@partial(nnx.jit)\ndef f(m): ...",
    ),
  ],
)
def test_what_is_certain_is_written(old, new):
  assert body(f"{old}\n") == f"{new}\n"


@pytest.mark.parametrize(
  ("code", "want"),
  [
    ("nnx.split(m, graph=f())", "leave it out"),
    ("nnx.flatten(m)", "nnx.split(node)"),
    ("nnx.bridge.ToNNX(m)", "refax.compat"),
    ("nnx.Nonsense(m)", "no such name"),
    ("with nnx.set_graph_mode(True):\n  pass", "Refax has one mode"),
    ("nnx.merge(g, s, copy=True)", "`copy=` of `nnx.merge`"),
    ("nnx.Param(x, hijax=True, ref=True)", "one `is_hijax=`"),
    ("nnx.custom_vjp(nondiff_argnums=(0,))", "functools.partial"),
    ("nnx.Optimizer(model, tx)", "wrt=nnx.Param"),
    (
      "o = nnx.Optimizer(model, tx, wrt=nnx.Param)\no.update(grads)",
      "`o.update(model, grads)`",
    ),
  ],
)
def test_the_rest_is_listed_and_left(code, want):
  assert body(f"{code}\n") == f"{code}\n"
  listed = [s for s in said(f"from flax import nnx\n{code}\n") if s[0] == "write"]
  assert len(listed) == 1
  assert want in listed[0][2]


@pytest.mark.parametrize(
  "code",
  [
    "def f(nnx):\n  return nnx.compat.jit(1, graph=True), nnx.flatten\n",
    "def f():\n  nnx = g()\n  return nnx.statelib.State\n",
    "[nnx.graphlib.split for nnx in xs]\n",
    "lambda nnx: nnx.compat\n",
    "g(nnx=1, graph=True)\n",
    "m.split(graph=True)\n",
    "class A:\n  nnx = 1\n  y = nnx.flatten\n",
    "nnx.Linear(1, graph=2)\n",
  ],
)
def test_what_only_looks_like_nnx_stays(code):
  assert body(code) == code
  assert said(f"from flax import nnx\n{code}")[1:] == []


def test_a_name_of_nnx_that_is_given_another_value_stays():
  code = "from flax import nnx\nnnx = other\nnnx.compat.jit(f, graph=True)\n"
  assert migrated(code).endswith("\nnnx = other\nnnx.compat.jit(f, graph=True)\n")


def test_a_local_name_refax_is_not_taken_for_the_package():
  code = "def f(refax):\n  return flax.nnx.relu(refax)\n"
  assert migrated(f"import flax.nnx\n{code}").endswith(code)
  assert ("write", 3) in [s[:2] for s in said(f"import flax.nnx\n{code}")]


def test_jax_grad_is_a_hint():
  found = said("from flax import nnx\nimport jax\njax.value_and_grad(f)(m)\n")
  assert ("look", 3) in [s[:2] for s in found]


def test_code_of_refax_is_listed_too_but_for_its_own_names():
  code = "from refax import nnx\nnnx.Stack\nnnx.flatten(m)\nnnx.Nonsense\n"
  assert [s[:2] for s in said(code)] == [("write", 3), ("write", 4)]
