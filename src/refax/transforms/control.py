"""nnx.cond and nnx.switch: branches that read and write state, also under gradients and vmap."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from refax.core.array_protocol import unwrap
from refax.errors import TreeMismatchError
from refax.transforms.lift import Inputs
from refax.transforms.stage import Staged, read_closures, values_of, write_closures
from refax.typing import ArrayLike, describe


def cond(pred: ArrayLike, true_fun: Callable, false_fun: Callable, *operands: Any) -> Any:
  """Run one of two functions, as `jax.lax.cond`; the state that it writes is written.

  Args:
    pred: a boolean scalar.
    true_fun: called with the operands if `pred` is true.
    false_fun: called with the operands otherwise.
    *operands: Modules, Variables, arrays, any pytree of these.

  Returns:
    What the function returned.

  Raises:
    TreeMismatchError: the functions return different structures, shapes or dtypes.

  >>> from refax import nnx
  >>> count = nnx.Variable(0)
  >>> def increment(count):
  ...   count[...] += 1
  >>> nnx.cond(True, increment, lambda count: None, count)
  >>> int(count)
  1
  """
  select = lambda branches, *args: jax.lax.cond(unwrap(pred), *branches, *args)
  return _branch(select, (true_fun, false_fun), operands)


def switch(index: ArrayLike, branches: Sequence[Callable], *operands: Any) -> Any:
  """Run one of several functions, as `jax.lax.switch`; the state that it writes is written.

  Args:
    index: which one, an integer scalar; clamped to the range of the branches.
    branches: functions of the operands.
    *operands: Modules, Variables, arrays, any pytree of these.

  Returns:
    What the function returned.

  Raises:
    TreeMismatchError: the functions return different structures, shapes or dtypes.

  >>> from refax import nnx
  >>> v = nnx.Variable(1)
  >>> nnx.switch(2, [lambda v, k=k: v.set_value(v + k) for k in (10, 20, 30)], v); int(v)
  31
  """
  select = lambda branches, *args: jax.lax.switch(unwrap(index), branches, *args)
  return _branch(select, tuple(branches), operands)


def _branch(select: Callable, functions: Sequence[Callable], operands: tuple) -> Any:
  inputs = Inputs.of(operands, {})
  values = values_of(inputs)
  stages = [Staged(f, inputs, values) for f in functions]
  _check_alike(stages)
  refs, closures = read_closures(stages)
  written = sorted(set().union(*(s.written for s in stages)))
  closures_written = sorted(set().union(*(s.closures_written for s in stages)))

  def run(staged: Staged) -> Callable:
    return lambda values, closures: staged.run(
      values, closures, written=written, closures_written=closures_written
    )

  outputs, after = select([run(s) for s in stages], values, closures)
  write_closures(refs, after)
  return inputs.commit(outputs)


def _check_alike(stages: Sequence[Staged]) -> None:
  def form(staged: Staged) -> tuple:
    out = staged.outputs
    spec = out.spec._replace(written=())
    return spec, jax.tree.structure(out.fresh), [describe(x) for x in jax.tree.leaves(out.fresh)]

  first = form(stages[0])
  for i, staged in enumerate(stages[1:], start=1):
    other = form(staged)
    if other != first:
      shown = [f"({', '.join(f[2])})" for f in (first, other)]
      if shown[0] == shown[1]:
        shown = [f"{f[0].graphdef.root} {f[1]}" for f in (first, other)]
      raise TreeMismatchError.branches(i, *shown)
