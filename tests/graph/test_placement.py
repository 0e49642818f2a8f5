"""nnx.device_put: on four devices, in a process of its own: JAX fixes their number at its start."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest

from refax import nnx
from refax.errors import RefArgumentError, TraceContextError

PRELUDE = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from refax import nnx

assert jax.device_count() == 4
first, second = jax.devices()[:2]
auto = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
explicit = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))

class Node(nnx.Module):
  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)

def is_on(x, place):
  sharding = x.sharding
  if isinstance(place, jax.Device):
    return sharding.device_set == {place}
  return sharding.is_equivalent_to(place, x.ndim)

def arrays(tree):
  return jax.tree.leaves(nnx.to_lojax(tree))

def everything():
  tied = nnx.Param(jnp.arange(8.0), tag="t")
  return Node(
    a=tied, layers=[tied, nnx.BatchStat(jnp.ones(4)), "x", jnp.arange(4)],
    heads={"b": jnp.ones(4), "a": nnx.Variable({"k": jnp.ones(4)})}, table=jnp.ones(4),
    boxed=nnx.data((jnp.ones(4), nnx.Variable(jnp.zeros(4)))), keys=nnx.Variable(
      jax.random.split(jax.random.key(0), 4)), rate=0.5,
  )
"""


def run(program, *, devices=4, **environment):
  env = os.environ | {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join(sys.path),
    **environment,
  }
  text = textwrap.dedent(PRELUDE) + textwrap.dedent(program) + "\nprint('reached the end')\n"
  done = subprocess.run(
    [sys.executable, "-c", text], env=env, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.endswith("reached the end\n")


@pytest.mark.parametrize("public", ["0", "1"])
@pytest.mark.parametrize("hijax", ["0", "1"])
def test_everything_moves_in_place_and_nothing_else_changes(hijax, public):
  run(
    """
    for place in (second, NamedSharding(auto, P("x")), NamedSharding(explicit, P("x")), first):
      m = everything()
      before, order = arrays(m), list(m.heads)
      structure = jax.tree.structure(m)
      parts = (m.a, m.layers, m.heads, m.heads["a"], m.boxed[1], m.keys)
      assert nnx.device_put(m, place) is m
      assert all(is_on(x, place) for x in arrays(m)), [x.sharding for x in arrays(m)]
      assert all(is_on(v, place) for v in (m.a, m.keys, m.boxed[1]))
      assert jax.tree.structure(m) == structure and list(m.heads) == order
      same = zip(parts, (m.a, m.layers, m.heads, m.heads["a"], m.boxed[1], m.keys), strict=True)
      assert all(x is y for x, y in same) and m.layers[0] is m.a
      assert m.layers[0].get_raw_value() is m.a.get_raw_value()
      for x, y in zip(before, arrays(m), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
          x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)
      m.a[...] = m.a * 2
      assert is_on(m.a, place) and m.a[...].tolist() == list(range(0, 16, 2))
    """,
    REFAX_USE_HIJAX=hijax,
    REFAX_PUBLIC_JAX=public,
  )


def test_a_cell_keeps_its_identity_and_other_handles_see_the_move():
  run("""
  for mesh in (auto, explicit):
    rows = NamedSharding(mesh, P("x"))
    m = Node(v=nnx.Param(jnp.arange(4.0)))
    state, copy, ref = nnx.state(m), nnx.split(m)[1], m.v.get_raw_value()
    assert nnx.device_put(m, rows) is m
    assert m.v.get_raw_value() is ref and state["v"].get_raw_value() is ref
    assert is_on(state["v"], rows) and is_on(copy["v"], rows)
    assert state["v"].get_raw_value().sharding == rows
    assert jax.typeof(m.v[...]) == jax.typeof(jax.device_put(jnp.arange(4.0), rows))
    state["v"][...] = jnp.full(4, 7.0)
    assert m.v[...].tolist() == [7.0] * 4
    # a part, a State and a bare Variable
    assert nnx.device_put(m.v, second) is m.v and is_on(copy["v"], second)
    assert nnx.device_put(state, first) is state and is_on(m.v, first)
  """)


@pytest.mark.parametrize("hijax", ["0", "1"])
def test_steps_work_afterwards_and_keep_the_layout(hijax):
  run(
    """
    def step(model, optimizer, x):
      loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
      optimizer.update(model, grads)
      return loss

    def made():
      model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
      return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    x = np.ones((8, 4), np.float32)
    hijax = nnx.using_hijax()
    for jit in (nnx.jit, jax.jit) if hijax else (nnx.jit,):
      one, many, traces = made(), made(), []
      twin = jit(step)
      fast = jit(lambda *args: traces.append(None) or step(*args))
      for place in (second, NamedSharding(auto, P()), first):
        nnx.device_put(many, place)
        for _ in range(3):
          loss = twin(*one, x)
          np.testing.assert_allclose(fast(*many, x), loss, rtol=1e-5)
          assert all(is_on(v, place) for v in arrays(many))
      assert len(traces) <= 3
      for a, b in zip(arrays(one), arrays(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
      rows = NamedSharding(auto, P(None, "x"))
      nnx.device_put(many, NamedSharding(auto, P()))
      nnx.device_put(many[0].layers[0].kernel, rows)
      for _ in range(3):
        fast(*many, x)
        assert is_on(many[0].layers[0].kernel, rows)
    """,
    REFAX_USE_HIJAX=hijax,
  )


@pytest.mark.parametrize("mesh", ["auto", "explicit"])
def test_what_nnx_jit_reaches_by_closure_may_move(mesh):
  run(f"""
  rows = NamedSharding({mesh}, P("x"))
  for m in (Node(v=nnx.Variable(jnp.arange(4.0))), nnx.Variable(jnp.arange(4.0))):
    v = m.v if isinstance(m, Node) else m
    @nnx.jit
    def step():
      held = m.v if isinstance(m, Node) else m
      held[...] = held[...] + 1
    for i, place in enumerate((first, rows, second, rows, first)):
      nnx.device_put(m, place)
      step(), step()
      assert is_on(v, place), v.sharding
      np.testing.assert_array_equal(v, np.arange(4.0) + 2 * i + 2)
  """)


def test_a_move_that_plain_jit_cannot_see_warns():
  run("""
  import warnings
  m = Node(v=nnx.Variable(jnp.arange(4.0)))
  step = jax.jit(lambda: m.v[...] + 1)
  step()
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    nnx.device_put(m, second)
  assert [w.category for w in caught] == [nnx.StructureWarning], caught
  """)


def test_arrays_outside_objects_are_moved_in_a_copy():
  run("""
  v, x = nnx.Variable(jnp.zeros(4)), jnp.ones(4)
  tree = {"v": v, "x": x, "text": "a"}
  moved = nnx.device_put(tree, second)
  assert moved["v"] is v and is_on(v, second) and is_on(moved["x"], second)
  assert moved["text"] == "a" and tree["x"] is x
  """)


@pytest.mark.parametrize("hijax", ["0", "1"])
def test_a_sharding_that_does_not_fit_moves_nothing(hijax):
  run(
    """
    m = Node(a=nnx.Param(jnp.ones(8)), b=nnx.Param(jnp.ones(3)), c=jnp.ones(8))
    for tree in (m, [m, jnp.ones(3)]):
      try:
        nnx.device_put(tree, NamedSharding(auto, P("x")))
      except ValueError as error:
        assert "evenly divide" in str(error), error
      else:
        raise AssertionError("no error")
      assert all(is_on(x, first) for x in (m.a, m.b, m.c))
    """,
    REFAX_USE_HIJAX=hijax,
  )


def test_a_move_inside_a_transform_is_refused_with_a_fix():
  v, device = nnx.Variable(jnp.zeros(2)), jax.devices()[0]
  text = r"has no device(.|\n)*at: (.|\n)*fix: move the object before the call"
  with pytest.raises(RefArgumentError, match=text):
    jax.jit(lambda v: nnx.device_put(v, device))(v)
  with pytest.raises(RefArgumentError, match=text):
    jax.jit(lambda: nnx.device_put(v, device))()
  with nnx.use_hijax(False):
    lojax = nnx.Variable(jnp.zeros(2))
  with pytest.raises(TraceContextError):
    jax.jit(lambda: nnx.device_put(lojax, device))()
  assert jax.jit(lambda v: nnx.device_put(v, device)[...] + 1)(lojax).tolist() == [1.0, 1.0]


def test_jax_device_put_names_what_exists():
  model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  with pytest.raises(RefArgumentError, match=r"fix: write nnx\.device_put"):
    jax.device_put(model, jax.devices()[0])
  assert nnx.device_put(model, jax.devices()[0]) is model
