"""Signals that come while they are held back, and while their handlers are given back."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refax import _jax, nnx
from refax.core import interrupt, observe
from refax.core.interrupt import uninterrupted


class Late(Exception):
  pass


def late(*_):
  raise Late


@pytest.fixture
def handlers():
  """Handlers of three signals, two of which raise; what they are is what is put back."""
  calls = []
  new = {
    signal.SIGUSR1: late,
    signal.SIGUSR2: lambda number, _: calls.append(number),
    signal.SIGALRM: late,
  }
  old = {number: signal.signal(number, handler) for number, handler in new.items()}
  yield calls
  assert {number: signal.getsignal(number) for number in new} == new
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  for number, handler in old.items():
    signal.signal(number, handler)


@pytest.mark.parametrize(
  "order", [(signal.SIGUSR1, signal.SIGUSR2), (signal.SIGUSR2, signal.SIGUSR1)]
)
def test_every_handler_is_called_though_another_one_raises(handlers, order):
  with pytest.raises(Late):
    uninterrupted(lambda: [signal.raise_signal(number) for number in order])
  assert handlers == [signal.SIGUSR2]


def test_ctrl_c_is_not_lost_behind_another_signal(handlers):
  with pytest.raises(KeyboardInterrupt) as error:
    uninterrupted(lambda: [signal.raise_signal(n) for n in (signal.SIGUSR1, signal.SIGINT)])
  assert isinstance(error.value.__context__, Late)


def test_a_signal_that_comes_while_handlers_are_given_back_takes_none_away(handlers, monkeypatch):
  class Raw:
    getsignal = staticmethod(signal.getsignal)
    back: list = []

    @classmethod
    def signal(cls, number, handler):
      if number == signal.SIGINT and handler is signal.default_int_handler and not cls.back:
        cls.back.append(number)
        raise Late  # what `signal` does if a signal is pending whose handler raises
      signal.signal(number, handler)

  monkeypatch.setattr(interrupt, "raw", Raw)
  with pytest.raises(Late):
    uninterrupted(lambda: None)
  assert Raw.back == [signal.SIGINT]


def test_a_result_and_an_error_go_through(handlers):
  assert uninterrupted(lambda: 3) == 3
  with pytest.raises(ZeroDivisionError):
    uninterrupted(lambda: 1 / 0)


def test_an_interrupt_before_a_gradient_leaves_nothing_marked(monkeypatch):
  class Stopping(dict):
    def __contains__(self, key):
      raise KeyboardInterrupt

  model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  loss = lambda m: (m(jnp.ones((1, 2))) ** 2).sum()
  monkeypatch.setattr(observe, "_in_traces", Stopping())
  with pytest.raises(KeyboardInterrupt):
    nnx.grad(loss)(model)
  monkeypatch.undo()
  assert np.isfinite(model.kernel).all()  # it was said to be differentiated for ever
  nnx.grad(loss)(model)


DERIVATIVES = {
  "grad": lambda f, x: jax.grad(f)(x),
  "nnx.grad": lambda f, x: nnx.grad(f)(x),
  "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
  "nnx.jvp": lambda f, x: nnx.jvp(f, (x,), (x,)),
  "vjp": lambda f, x: jax.vjp(f, x)[1](jnp.ones(())),
  "linearize": lambda f, x: jax.linearize(f, x)[1](x),
  "hessian": lambda f, x: jax.hessian(f)(x),
}
EAGER = pytest.mark.skipif(not _jax.no_trace_active(), reason="public JAX gives buffers away")


@EAGER
@pytest.mark.parametrize("way", [*DERIVATIVES.values(), lambda f, x: jax.vmap(f)(x[None])])
def test_an_eager_read_by_closure_gives_no_buffer_away(way):
  v, x = nnx.Variable(jnp.arange(3.0)), jnp.ones(3)
  buffer = _jax.peek_cell(v.get_raw_value())
  way(lambda x: (x**2 * v[...]).sum(), x)
  assert _jax.peek_cell(v.get_raw_value()) is buffer and not buffer.is_deleted()
  np.testing.assert_array_equal(v, [0, 1, 2])


@EAGER
@pytest.mark.parametrize("name", sorted(DERIVATIVES.keys() - {"hessian"}))  # in it is a `jax.vmap`
def test_an_eager_write_by_closure_of_what_is_not_differentiated(name):
  v, x = nnx.Variable(jnp.arange(3.0)), jnp.ones(3)
  taken = []

  def f(x):
    buffer = _jax.peek_cell(v.get_raw_value())
    v[...] = v * 2
    taken.append(buffer.is_deleted())
    return (x**2 * v[...]).sum()

  DERIVATIVES[name](f, x)
  assert taken and not any(taken)
  np.testing.assert_array_equal(v, np.arange(3.0) * 2 ** len(taken))


@pytest.mark.parametrize(
  "outer", [jax.jit, jax.checkpoint, nnx.jit, lambda f: jax.jit(jax.vmap(f))]
)
def test_what_is_recorded_reads_the_cell_each_time(outer):
  v = nnx.Variable(jnp.ones(()))
  f = outer(jax.grad(lambda x: (x**2 * v[...]).sum()))
  for value in (1.0, 3.0):
    v[...] = value
    np.testing.assert_allclose(f(jnp.ones(2)), 2 * value)
