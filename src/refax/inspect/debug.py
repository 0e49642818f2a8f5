"""nnx.debug: a check that a training loop can afford, which says where a NaN comes from."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from refax import _jax
from refax.core.array_protocol import unwrap
from refax.core.variable import is_variable
from refax.errors import ExplicitAxesError, NonFiniteError, message
from refax.inspect.nonfinite import find_nonfinite
from refax.inspect.target import Arguments, Compiled, like, owner_and_function
from refax.train.finite import all_finite
from refax.transforms.effect import transaction
from refax.transforms.jit import jit
from refax.transforms.lift import Inputs, Outputs
from refax.transforms.stage import Staged, read_closures, values_of

__all__ = ["check"]


def check(fn: Callable) -> Callable:
  """A compiled function that raises when its result or its state becomes NaN or infinite.

  It is `nnx.jit(fn)` with one look at what it returns and writes. If that is not finite, all state
  is as before the call, and `nnx.find_nonfinite` looks for the operation.

  Args:
    fn: a training step: a function of Modules, Variables and arrays; it may be compiled already.

  Returns:
    A function like `fn`. Each call waits for its result. State that is written is kept until the
    result is known, so it takes its memory twice for that time.

  Raises:
    NonFiniteError: it names the layer, the line and the numbers; nothing has been written.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> @nnx.debug.check
  ... def step(total, x):
  ...   total[...] += jnp.log(x)
  ...   return total[...]
  >>> total = nnx.Variable(0.0)
  >>> float(step(total, jnp.array(1.0)))
  0.0
  >>> step(total, jnp.array(0.0))
  Traceback (most recent call last):
  refax.errors.NonFiniteError: the first value that is not finite: log in outside of all layers...
  >>> float(total)
  0.0
  """
  owner, function = owner_and_function(fn)
  compiled = Compiled()

  def wrapper(*args: Any, **kwargs: Any) -> Any:
    if not _jax.no_trace_active():
      return function(*owner, *args, **kwargs)  # the function around it is looked at
    given = Arguments.of((*owner, *args), kwargs)
    step = compiled.of(given, lambda: _Step(given.completing(function)))
    try:
      return step(given.args, given.kwargs)
    except _NotFiniteError:
      pass
    try:
      found: Any = find_nonfinite(fn)(*args, **kwargs)
    except ExplicitAxesError as error:
      found = f"a result or the new state is not finite; {message(error)}"
    raise NonFiniteError.found(found)

  return like(fn, wrapper)


class _NotFiniteError(Exception):
  """A step has ended with what is not finite; it is undone."""


class _Step:
  """A compiled step that undoes itself if it is not finite."""

  def __init__(self, fn: Callable):
    self._run = jit(_Guarded(fn, self._on_structure))
    self._is_known = False
    self._changes_structure = False

  def _on_structure(self) -> None:
    self._changes_structure = True

  def __call__(self, args: tuple, kwargs: dict[str, Any]) -> Any:
    if self._is_known and not self._changes_structure:
      return self._checked(args, kwargs)
    with transaction(*args, *kwargs.values()):
      result = self._checked(args, kwargs)
    self._is_known = True
    return result

  def _checked(self, args: tuple, kwargs: dict[str, Any]) -> Any:
    result, ok = self._run(*args, **kwargs)
    if not bool(ok):
      raise _NotFiniteError
    return result


class _Guarded:
  """A function that also returns whether all is finite, and writes nothing if it is not."""

  def __init__(self, fn: Callable, on_structure: Callable[[], None]):
    self._fn, self._on_structure = fn, on_structure
    self.__name__ = getattr(fn, "__name__", "step")

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    inputs = Inputs.of(args, kwargs)
    before = values_of(inputs)
    staged = Staged(self._fn, inputs, before, is_final=True)
    refs, closures = read_closures([staged])
    result = staged.run(before, closures)
    outputs, spec = result.outputs, result.outputs.spec
    if spec.redefined or spec.graphdef.nodes[: len(inputs.objects)] != inputs.graphdef.nodes:
      self._on_structure()
    ok = all_finite(_joined((outputs.written, outputs.fresh, result.closures)))
    old = [before[i] for i in spec.written], {key: closures[key] for key in result.closures}
    new = list(outputs.written), result.closures
    if _alike(new, old):
      new = jax.lax.cond(ok, lambda new, _: new, lambda _, old: old, new, old)
    return inputs.commit(Outputs(new[0], outputs.fresh, spec), refs, new[1]), ok


SMALL = 1 << 14  # elements
"""A look at an array takes a kernel of its own: of 400 small ones, half as long as their step."""


def _joined(tree: Any) -> list[Any]:
  """The arrays of a tree, small ones of one dtype as one array; not where they are sharded."""
  leaves = jax.tree.leaves(jax.tree.map(unwrap, tree, is_leaf=is_variable))
  small: dict[Any, list[Any]] = {}
  for x in leaves if _jax.wide_mesh() is None else ():
    if isinstance(x, jax.Array) and x.size <= SMALL and jnp.issubdtype(x.dtype, jnp.inexact):
      small.setdefault(x.dtype, []).append(x)
  joined = {id(x) for lot in small.values() for x in lot}
  rest = [x for x in leaves if id(x) not in joined]
  return rest + [jnp.concatenate([x.ravel() for x in lot]) for lot in small.values()]


def _alike(a: Any, b: Any) -> bool:
  types = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
  return jax.tree.structure(a) == jax.tree.structure(b) and types(a) == types(b)
