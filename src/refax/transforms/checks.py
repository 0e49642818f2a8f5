"""nnx.checkify: run-time checks in compiled functions that read and write state."""

import functools
from collections.abc import Callable
from typing import Any

from jax.experimental import checkify as jax_checkify

from refax.transforms.lift import Inputs
from refax.transforms.stage import Staged, read_closures, values_of


def checkify(f: Callable, *, errors: Any = jax_checkify.user_checks) -> Callable:
  """Turn the checks in a function into a value, as `jax.experimental.checkify.checkify`.

  Args:
    f: a function of Modules, Variables and arrays that calls `checkify.check`.
    errors: which errors to look for, one of the sets of `jax.experimental.checkify`.

  Returns:
    A function that returns `(error, result)`; `error.throw()` raises the first error. The state
    that `f` writes is written, whether there was an error or not: see `nnx.transaction`.

  >>> from refax import nnx; from jax.experimental import checkify
  >>> def root(v):
  ...   checkify.check(v[...] >= 0, "negative: {x}", x=v[...])
  ...   return v ** 0.5
  >>> error, _ = nnx.checkify(root)(nnx.Variable(-1.0))
  >>> error.get().split(" (")[0]
  'negative: -1.0'
  """

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    inputs = Inputs.of(args, kwargs)
    values = values_of(inputs)
    staged = Staged(f, inputs, values)
    refs, closures = read_closures([staged])
    run = jax_checkify.checkify(staged.run_apart, errors)
    error, (outputs, after) = run(values, closures)
    return error, inputs.commit(outputs, refs, after)

  return wrapper
