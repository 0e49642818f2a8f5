"""nnx.use_hijax as a flag, a context and a decorator; for one thread; seen by every jit cache."""

import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from refax import nnx


@pytest.fixture(autouse=True)
def default():
  """Every test starts and ends with hijax Variables."""
  with nnx.use_hijax(True):
    yield


def made():
  return nnx.Variable(1.0).is_hijax


def test_hijax_is_the_default():
  script = "from refax import nnx; print(nnx.using_hijax(), nnx.Variable(1.0).is_hijax)"
  assert run(script, {}) == "True True"


@pytest.mark.parametrize("value", ["0", "false", "OFF"])
def test_the_environment_turns_it_off(value):
  script = (
    "from refax import nnx\n"
    "print(nnx.using_hijax(), nnx.Variable(1.0).is_hijax, end=' ')\n"
    "with nnx.use_hijax(True): print(nnx.Variable(1.0).is_hijax, end=' ')\n"
    "print(nnx.using_hijax())"
  )
  assert run(script, {"REFAX_USE_HIJAX": value}) == "False False True False"


def run(script, environment):
  env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
  if not environment:
    env.pop("REFAX_USE_HIJAX", None)
  result = subprocess.run(
    [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
  )
  return result.stdout.strip()


def test_as_a_flag_it_stays():
  flag = nnx.use_hijax(False)
  assert not nnx.using_hijax() and not made()
  nnx.use_hijax(True)
  assert nnx.using_hijax() and made()
  nnx.use_hijax(False)
  assert not made() and flag is not None


def test_as_a_context_it_ends_also_after_an_error():
  with nnx.use_hijax(False):
    assert not made()
    with nnx.use_hijax(True):
      assert made()
    assert not made()
  assert made()
  with pytest.raises(RuntimeError), nnx.use_hijax(False):
    raise RuntimeError
  assert made()


def test_a_context_may_be_entered_again():
  context = nnx.use_hijax(False)
  for _ in range(2):
    with context:
      assert not made()
    assert made()
  with context, context:
    assert not made()
  assert made()


def test_as_a_decorator_it_is_for_the_call():
  @nnx.use_hijax(False)
  def build(n, *, k):
    """Build."""
    if n:
      raise RuntimeError
    return made(), k

  assert made()
  assert build(0, k=3) == (False, 3) and made()
  with pytest.raises(RuntimeError):
    build(1, k=0)
  assert made() and build.__name__ == "build" and build.__doc__ == "Build."


def test_one_decorator_may_decorate_several_functions():
  lojax = nnx.use_hijax(False)
  first, second = lojax(made), lojax(made)
  assert (made(), first(), second(), first(), made()) == (True, False, False, False, True)


def test_it_is_for_one_thread():
  seen = []

  def work():
    seen.append(nnx.using_hijax())
    nnx.use_hijax(False)
    seen.append(made())

  with nnx.use_hijax(False):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
  assert seen == [True, False] and made()


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit], ids=["jax.jit", "nnx.jit"])
def test_a_function_is_traced_once_for_each_setting(jit):
  traces = []

  @jit
  def f(x):
    traces.append(nnx.using_hijax())
    v = nnx.Variable(x)
    v[...] += 1
    return nnx.to_lojax(v) if v.is_hijax else v

  for setting in (True, False, True, False):
    with nnx.use_hijax(setting):
      assert float(f(1.0)) == 2.0
  assert traces == [True, False]


def test_an_explicit_storage_wins():
  with nnx.use_hijax(False):
    assert nnx.Variable(1.0, is_hijax=True).is_hijax
    assert not nnx.Linear(1, 1, rngs=nnx.Rngs(0)).kernel.is_hijax
  assert not nnx.Variable(1.0, is_hijax=False).is_hijax


def test_existing_variables_keep_their_storage():
  v = nnx.Variable(jnp.zeros(2))
  with nnx.use_hijax(False):
    v[...] = 1.0
    assert v.is_hijax and v.copy().is_hijax and nnx.clone(v).is_hijax
    jax.jit(lambda v: v.set_value(2.0))(v)
  assert v[...].tolist() == [2.0, 2.0]
