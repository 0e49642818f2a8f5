"""Refax's own laws as tools for your tests: `from refax import testing`.

A stateful program equals its functional twin, a compiled function is traced as often as you
think, and no trace leaves anything behind in an object. Each function here fails with an
`AssertionError` that says what broke, and where.
"""

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refax import _jax
from refax.core.node import Node
from refax.core.variable import Param, Variable
from refax.errors import BrokenLawError
from refax.graph.split import merge, split
from refax.graph.storage import to_hijax, to_lojax
from refax.inspect.retrace import Traces
from refax.transforms.autodiff import grad
from refax.transforms.jit import jit
from refax.transforms.remat import remat

__all__ = ["assert_max_traces", "assert_no_leaks", "assert_same_as_functional"]

# What makes of a function `args -> out` one that is called in its place, by Refax and by JAX.
_CALLS: dict[str, tuple[Callable, Callable]] = {
  "eager": (lambda f: f, lambda f: f),
  "jax.jit": (jax.jit, jax.jit),
  "nnx.jit": (jit, jax.jit),
  "jax.checkpoint": (jax.checkpoint, jax.checkpoint),
  "nnx.remat": (remat, jax.checkpoint),
}
TRANSFORMS = (*_CALLS, "scan", "grad")
"""What `assert_same_as_functional` knows."""


def assert_same_as_functional(
  program: Callable,
  /,
  *args: Any,
  transforms: Sequence[str] = (*_CALLS, "scan"),
  steps: int = 3,
  rtol: float = 1e-5,
  atol: float = 1e-6,
) -> None:
  """Assert that a program with state does what its functional twin does.

  The program runs on a copy of the arguments whose Variables are `jax.Ref` cells, written in place.
  Its twin runs the same code on arrays: a function from the old state to the result and the new
  state, which is threaded from step to step by hand. Both run under the same transforms; results
  and the last state must be equal. The arguments themselves stay as they are.

  They differ where a program keeps state outside Variables: in a global, a closure, an attribute
  that a trace sets and loses.

  Args:
    program: called as `program(*args)`; returns arrays, objects, any pytree of these.
    *args: Modules, Optimizers, Variables, arrays.
    transforms: of `"eager"`, `"jax.jit"`, `"nnx.jit"`, `"jax.checkpoint"`, `"nnx.remat"`, `"scan"`
      (all steps in one `jax.lax.scan`) and `"grad"` (the gradient of the sum of what the program
      returns, with respect to each Param; only for a program that writes no Param).
    steps: how often the program is called under each.
    rtol: how far apart numbers may be, relative to their size.
    atol: how far apart they may be in any case.

  Raises:
    BrokenLawError: an `AssertionError` that names the transform, the step and the value.

  >>> from refax import nnx, testing; import jax.numpy as jnp
  >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
  >>> testing.assert_same_as_functional(lambda m, x: m(x).sum(), model, jnp.eye(3))
  >>> calls = []
  >>> def impure(v):
  ...   calls.append(1)
  ...   v[...] += len(calls)
  >>> testing.assert_same_as_functional(impure, nnx.Variable(0), transforms=["eager"])
  Traceback (most recent call last):
  refax.errors.BrokenLawError: a program and its functional twin end with different state...
  """
  unknown = [name for name in transforms if name not in TRANSFORMS]
  if unknown:
    raise BrokenLawError.unknown(unknown[0], TRANSFORMS)
  close = functools.partial(_assert_close, rtol=rtol, atol=atol)
  for name in transforms:
    stateful, functional = to_hijax(args), to_lojax(args)
    if name == "scan":
      got, want, functional = _scanned(program, stateful, functional, steps)
      close(got, want, "return different values", name, "")
    else:
      for step in range(steps):
        if name == "grad":
          got, (want, functional) = _gradients(program, stateful, functional)
        else:
          ours, theirs = _CALLS[name]
          got, (want, functional) = ours(program)(*stateful), theirs(_pure(program))(functional)
        close(got, want, "return different values", name, f"step {step + 1}")
    close(stateful, functional, "end with different state", name, "")


def _pure(program: Callable) -> Callable:
  """The program as a function from the old arguments to the result and the new arguments."""

  def step(args: tuple) -> tuple[Any, tuple]:
    args = to_lojax(args)
    return to_lojax(program(*args)), args

  return step


def _scanned(program: Callable, stateful: tuple, functional: tuple, steps: int) -> tuple:
  """The results of all steps in one loop, of both programs, and the twin's last state."""
  step = lambda args, _: _pure(program)(args)[::-1]
  _, got = jax.lax.scan(lambda c, _: (c, to_lojax(program(*stateful))), 0, length=steps)
  functional, want = jax.lax.scan(step, functional, length=steps)
  return got, want, functional


def _gradients(program: Callable, stateful: tuple, functional: tuple) -> tuple:
  """The gradients with respect to all Params, of both programs, and the twin's new state."""
  got = grad(lambda args: _total(program(*args)))(stateful)
  graphdef, params, rest = split(functional, Param, ...)

  def loss(params):
    out, args = _pure(program)(merge(graphdef, params, rest))
    return _total(out), args

  return split(got, Param, ...)[1], jax.grad(loss, has_aux=True)(params)  # not those of arrays


def _total(out: Any) -> jax.Array:
  numbers = [x for x in jax.tree.leaves(to_lojax(out)) if _is_inexact(x)]
  return jnp.asarray(sum(jnp.sum(x.real) for x in numbers), jnp.float32)


def _is_inexact(x: Any) -> bool:
  return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _assert_close(
  got: Any, want: Any, what: str, transform: str, at: str, **tolerance: Any
) -> None:
  pairs = [jax.tree_util.tree_flatten_with_path(to_lojax(x))[0] for x in (got, want)]
  values = [{jax.tree_util.keystr(path): x for path, x in some} for some in pairs]
  if values[0].keys() != values[1].keys():
    only = sorted(values[0].keys() ^ values[1].keys())[0]
    raise BrokenLawError.structure(what, transform, at, only, only in values[0])
  for path, x in values[0].items():
    a, b = map(_comparable, (x, values[1][path]))
    if a.shape != b.shape or a.dtype != b.dtype or not _equal(a, b, **tolerance):
      raise BrokenLawError.value(what, transform, f"{at} {path}".strip(), a, b)


def _comparable(x: Any) -> np.ndarray:
  if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  return np.asarray(x)


def _equal(a: np.ndarray, b: np.ndarray, rtol: float, atol: float) -> bool:
  if not _is_inexact(a):
    return bool((a == b).all())
  wide = np.complex128 if np.iscomplexobj(a) else np.float64
  return np.allclose(a.astype(wide), b.astype(wide), rtol, atol, equal_nan=True)


def assert_max_traces(fn: Callable, n: int) -> Any:
  """A function like `fn` that may be traced `n` times, and fails when it is traced once more.

  Give it to `nnx.jit`, `jax.jit` or any other transform: each run of the Python code of `fn` is a
  trace. What is traced again and again is slow, and seldom meant: an argument that changes its
  shape or dtype, a number that is static, a function that is made anew for each call.

  Args:
    fn: a function; not one that is compiled already.
    n: how many traces are right.

  Returns:
    The function. Its attribute `traces` says how often it was traced.

  Raises:
    BrokenLawError: by the call that traces once too often. It names the arguments of that trace
      and of the one before.

  >>> from refax import nnx, testing; import jax.numpy as jnp
  >>> double = testing.assert_max_traces(lambda x: x * 2, 1)
  >>> step = nnx.jit(double)
  >>> y = step(jnp.ones(3)), step(jnp.zeros(3))
  >>> double.traces
  1
  >>> step(jnp.ones(4))
  Traceback (most recent call last):
  refax.errors.BrokenLawError: <lambda> is traced 2 times, and may be traced once...
  """
  seen = Traces()

  @functools.wraps(fn)
  def counted(*args: Any, **kwargs: Any) -> Any:
    reason = seen.add(fn, args, kwargs)
    counter.traces += 1
    if counter.traces > n:
      raise BrokenLawError.traces(getattr(fn, "__name__", "fn"), counter.traces, n, reason)
    return fn(*args, **kwargs)

  counter: Any = counted
  counter.traces = 0
  return counted


@contextlib.contextmanager
def assert_no_leaks(*, traces: bool = True) -> Iterator[None]:
  """Assert that a block leaves no tracer and no deleted buffer in any Variable or Module.

  At the end of the block all objects that are alive in the process are looked at. A tracer that
  outlives its trace (`kept.append(nnx.Cache(x))` inside `jax.jit`) raises `UnexpectedTracerError`
  at some later use, far from the line that kept it; here the Variable is named. A buffer is
  deleted when a function that donates its arguments has failed or was interrupted.

  Args:
    traces: whether to run the block under `jax.checking_leaks` too, which also finds tracers in
      plain Python objects. It traces every function anew, so it is slow.

  Raises:
    BrokenLawError: an object holds a tracer or a deleted buffer that it did not hold before.
    Exception: from JAX, where `jax.checking_leaks` finds one.

  >>> from refax import nnx, testing; import jax; import jax.numpy as jnp
  >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  >>> with testing.assert_no_leaks():
  ...   y = jax.jit(lambda m, x: m(x))(model, jnp.ones((1, 2)))
  >>> kept = []
  >>> with testing.assert_no_leaks(traces=False):
  ...   y = jax.jit(lambda x: (kept.append(nnx.Cache(x)), x)[1])(1.0)
  Traceback (most recent call last):
  refax.errors.BrokenLawError: an object holds a tracer whose trace has ended...
  """
  before = {key for key, _ in _leaks()}
  with jax.checking_leaks() if traces else contextlib.nullcontext():
    yield
  gc.collect()
  for key, (what, at) in _leaks():
    if key not in before:
      raise BrokenLawError.leak(what, at)


def _leaks() -> Iterator[tuple[tuple[int, str], tuple[str, str]]]:
  """What is wrong with the Variables and objects that are alive: (key, (what, where))."""
  for x in gc.get_objects():
    cls = type(x)
    if issubclass(cls, Variable):
      for leaf in jax.tree.leaves(getattr(x, "_cell", None)):
        if what := _wrong(leaf):
          yield (id(x), what), (what, str(x._def.origin))
    elif issubclass(cls, Node):
      for name, value in list(vars(x).items()):
        if _jax.is_tracer(value):
          what = "a tracer whose trace has ended"
          yield (id(x), name), (what, f"{cls.__name__}.{name}")


def _wrong(leaf: Any) -> str:
  if _jax.is_tracer(leaf):
    return "a tracer whose trace has ended"
  value = _jax.peek_cell(leaf) if _jax.is_ref(leaf) else leaf
  return "a deleted buffer" if isinstance(value, jax.Array) and value.is_deleted() else ""
