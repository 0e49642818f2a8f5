"""nnx.cond and nnx.switch: branches that read and write state, also under gradients and vmap."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from refax.core.array_protocol import unwrap
from refax.core.storage import is_array_like
from refax.errors import TreeMismatchError
from refax.transforms.eager import compiled_once
from refax.transforms.fast import is_eager
from refax.transforms.lift import Inputs
from refax.transforms.loops import difference, signature
from refax.transforms.stage import Staged, read_closures, values_of
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
  select = lambda pred, branches, *args: jax.lax.cond(pred, *branches, *args)
  return _branch(select, unwrap(pred), (true_fun, false_fun), operands)


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
  return _branch(jax.lax.switch, unwrap(index), tuple(branches), operands)


def _branch(select: Callable, which: Any, functions: Sequence[Callable], operands: tuple) -> Any:
  inputs = Inputs.of(operands, {})
  values = values_of(inputs)
  is_compiled = is_eager()
  stages = [Staged(f, inputs, values, is_compiled=is_compiled) for f in functions]
  _check_alike(stages)
  refs, closures = read_closures(stages)
  written = sorted(set().union(*(s.written for s in stages)))
  closures_written = sorted(set().union(*(s.closures_written for s in stages)))

  def run(staged: Staged) -> Callable:
    return lambda values, closures: staged.run(
      values, closures, written=written, closures_written=closures_written
    )

  branches = list(map(run, stages))
  choose = lambda which, *given: select(which, branches, *given)
  is_scalar = is_array_like(which) and not jnp.shape(which)
  choose = functools.partial(compiled_once, choose) if is_scalar else choose  # JAX says what it is
  outputs, after = choose(which, values, closures)
  return inputs.commit(outputs, refs, after)


def _check_alike(stages: Sequence[Staged]) -> None:
  for i, staged in enumerate(stages[1:], start=1):
    if _form(staged) != _form(stages[0]):
      at, first, other = _difference(stages[0], staged)
      raise TreeMismatchError.branches(i, first, other, at)


def _form(staged: Staged) -> tuple:
  out = staged.outputs
  return out.spec._replace(written=()), jax.tree.structure(out.fresh), _types(staged)


def _types(staged: Staged) -> list[str]:
  leaves = jax.tree.leaves(staged.outputs.fresh, is_leaf=lambda x: x is None)
  return ["None" if x is None else describe(x) for x in leaves]


def _difference(first: Staged, other: Staged) -> tuple[str, ...]:
  """Where two branches differ, and what is there in each."""
  graphs = [s.outputs.spec.graphdef for s in (first, other)]
  places = [("", [g.root for g in graphs])]
  places += [(f"operand {n}", [e, e]) for n, e in enumerate(first.inputs.arguments)]
  for at, entries in places:
    was, now = (signature(e, g) for e, g in zip(entries, graphs, strict=True))
    if was != now:
      return (at, *difference(was, now))
  types = [_types(s) for s in (first, other)]
  if len(types[0]) == len(types[1]) and types[0] != types[1]:
    return "", *(f"({', '.join(t)})" for t in types)
  names = [f"{len(s.outputs.fresh)} new arrays or Variables" for s in (first, other)]
  return "", *(names if names[0] != names[1] else ("others", "other operands or metadata"))
