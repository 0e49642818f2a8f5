"""How Variables, Modules and States print: to the character."""

import re
import textwrap

import jax
import jax.numpy as jnp
import pytest

from refax import nnx


def text(s):
  return textwrap.dedent(s).strip()


class Layer(nnx.Module):
  def __init__(self):
    self.kernel = nnx.Param(jnp.ones((2, 3)))
    self.mean = nnx.BatchStat(jnp.zeros(3), is_hijax=False)
    self.size, self.act, self.name = 3, jnp.tanh, "layer"


def test_a_variable_shows_its_value_size_metadata_and_storage():
  assert str(nnx.Variable(jnp.array([1, 2, 3]))) == text("""
    Variable( # 3 (12 B)
      value=Array([1, 2, 3], dtype=int32),
      is_hijax=True
    )""")
  assert repr(nnx.Param(1.5, is_hijax=False, tag="frozen")) == text("""
    Param( # 1 (4 B)
      value=Array(1.5, dtype=float32),
      tag='frozen'
    )""")


def test_a_long_array_is_indented_as_a_whole():
  assert str(nnx.Variable(jnp.zeros((2, 2)), is_hijax=False)) == text("""
    Variable( # 4 (16 B)
      value=Array([[0., 0.],
             [0., 0.]], dtype=float32)
    )""")


def test_a_variable_may_hold_a_tree_a_key_an_object_or_nothing():
  tree = nnx.Variable({"a": jnp.ones(1), "b": (jnp.zeros(1),)}, is_hijax=False)
  assert "value={'a': Array([1.], dtype=float32), 'b': (Array([0.], dtype=float32),)}" in str(tree)
  assert "value=Array(shape=(), dtype=key<fry>)" in str(nnx.RngKey(jax.random.key(0)))
  assert str(nnx.Variable(None)) == "Variable(\n  value=None\n)"
  spec = nnx.Variable(jax.ShapeDtypeStruct((2,), jnp.float32))
  assert "value=ShapeDtypeStruct(shape=(2,), dtype=float32)" in str(spec)


def test_a_module_shows_shapes_and_totals_by_type():
  assert str(Layer()) == text("""
    Layer( # Param: 6 (24 B), BatchStat: 3 (12 B), Total: 9 (36 B)
      act=tanh,
      kernel=Param(
        value=Array(shape=(2, 3), dtype=dtype('float32')),
        is_hijax=True
      ),
      mean=BatchStat(
        value=Array(shape=(3,), dtype=dtype('float32'))
      ),
      name='layer',
      size=3
    )""")


def test_containers_and_states_nest():
  class Net(nnx.Module):
    def __init__(self):
      self.layers = [nnx.Param(1.0, is_hijax=False)]
      self.table = {"a": 1}

  assert str(Net()) == text("""
    Net( # Param: 1 (4 B)
      layers=List([ # Param: 1 (4 B)
        Param(
          value=Array(shape=(), dtype=dtype('float32'))
        )
      ]),
      table=Dict({
        'a': 1
      })
    )""")
  assert str(nnx.state(Net())) == text("""
    State({
      'layers': {
        0: Param( # 1 (4 B)
          value=Array(1., dtype=float32)
        )
      }
    })""")


def test_an_object_that_holds_itself_prints():
  class Loop(nnx.Pytree):
    def __init__(self):
      self.me = self

  assert str(Loop()) == "Loop(\n  me=Loop(...)\n)"


def test_inside_a_trace_types_are_shown_and_nothing_is_read():
  seen = []

  @jax.jit
  def f(v):
    seen.append(str(v))

  v = nnx.Variable(jnp.ones(3))
  f(v)
  assert seen == [
    text("""
    Variable( # 3 (12 B)
      value=Tracer(shape=(3,), dtype=float32),
      is_hijax=True
    )""")
  ]
  assert jax.make_jaxpr(lambda v: str(v) and None)(v).eqns == []


@pytest.mark.parametrize(
  ("count", "shown"),
  [(1, "1 (4 B)"), (249, "249 (996 B)"), (250, "250 (1.0 KB)"), (1_500_000, "1,500,000 (6.0 MB)")],
)
def test_sizes_have_units(count, shown):
  assert f"# {shown}\n" in str(nnx.Variable(jax.ShapeDtypeStruct((count,), jnp.float32)))


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("no_color", [False, True])
def test_colours_are_for_terminals_only(monkeypatch, terminal, no_color):
  class Out:
    def isatty(self):
      return terminal

  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("NO_COLOR", "1" if no_color else "")
  v = nnx.Variable(1, is_hijax=False)
  with monkeypatch.context() as patch:
    patch.setattr("sys.stdout", Out())
    printed = repr(v)
  assert ("\x1b[" in printed) == (terminal and not no_color)
  plain = re.sub(r"\x1b\[[0-9;]*m", "", printed)
  assert plain == "Variable( # 1 (4 B)\n  value=Array(1, dtype=int32)\n)"
