"""nnx.eval_shape and nnx.make_jaxpr: what a function would do, without doing it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from refax.core.rebuild import unflatten
from refax.core.variable import Variable
from refax.transforms.lift import Entered, Inputs, Outputs, OutputSpec
from refax.transforms.stage import values_of


def eval_shape(f: Callable, *args: Any, **kwargs: Any) -> Any:
  """What a function would return, with shapes and dtypes for arrays, without computing anything.

  Args:
    f: a function of Modules, Variables and arrays; a constructor gives an abstract model.
    *args: its arguments; `jax.ShapeDtypeStruct`s will do for arrays.
    **kwargs: its keyword arguments.

  Returns:
    What `f` returns, with Variables that hold a `jax.ShapeDtypeStruct`. Nothing is written. When
    such a Variable gets an array (by `nnx.Checkpointer.restore`, `nnx.update`, an assignment), it
    has the storage that it would have been built with.

  >>> from refax import nnx
  >>> nnx.eval_shape(lambda: nnx.Linear(1000, 1000, rngs=nnx.Rngs(0))).kernel.shape
  (1000, 1000)
  """
  inputs = Inputs.of(args, kwargs)

  def abstract(values):
    frame = inputs.enter(_entered(inputs, values))
    inner_args, inner_kwargs = frame.args
    outputs = frame.collect(f(*inner_args, **inner_kwargs))
    final = {i: x.get_value() for i, x in enumerate(frame.leaves) if isinstance(x, Variable)}
    return outputs, final

  outputs, final = jax.eval_shape(abstract, _abstract_values(inputs))
  leaves = [
    x._handle(final[i], x._def.elsewhere()) if isinstance(x, Variable) else x
    for i, x in enumerate(inputs.leaves)
  ]
  spec: OutputSpec = outputs.spec._replace(written=(), hijax=(False,) * len(outputs.fresh))
  copies = Inputs(inputs.graphdef, leaves, unflatten(inputs.graphdef, leaves)[1])
  return copies.commit(Outputs((), outputs.fresh, spec))


def _entered(inputs: Inputs, values: Sequence[Any]) -> dict[int, Entered]:
  """How the caller's leaves enter: Variables in the storage that they have outside."""
  return {
    i: Entered(value, isinstance(leaf, Variable) and leaf.is_hijax)
    for i, (leaf, value) in enumerate(zip(inputs.leaves, values, strict=True))
  }


def _abstract_values(inputs: Inputs) -> list[Any]:
  """Shapes and dtypes instead of reads."""

  def abstract(x: Any) -> Any:
    return jax.tree.map(lambda cell: jax.ShapeDtypeStruct(cell.shape, cell.dtype), x._cell)

  return [abstract(x) if isinstance(x, Variable) else x for x in inputs.leaves]


def make_jaxpr(f: Callable, *, return_shape: bool = False) -> Callable:
  """A function that gives the jaxpr of `f` for its arguments, state as inputs and outputs.

  Args:
    f: a function of Modules, Variables and arrays.
    return_shape: whether to return the shapes of the outputs too.

  Returns:
    A function with the arguments of `f`. Nothing is computed or written.

  >>> from refax import nnx
  >>> jaxpr = nnx.make_jaxpr(lambda v: v * 2)(nnx.Variable(1.0))
  >>> len(jaxpr.in_avals)
  1
  """

  def wrapper(*args: Any, **kwargs: Any) -> Any:
    inputs = Inputs.of(args, kwargs)

    def pure(values):
      frame = inputs.enter(_entered(inputs, values))
      inner_args, inner_kwargs = frame.args
      outputs = frame.collect(f(*inner_args, **inner_kwargs))
      final = {i: x.get_value() for i, x in enumerate(frame.leaves) if frame.is_local(i)}
      return outputs.fresh, outputs.written, final

    return jax.make_jaxpr(pure, return_shape=return_shape)(values_of(inputs))

  return wrapper
