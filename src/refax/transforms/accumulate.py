"""nnx.accumulate_grads: the gradient of a large batch in the memory of a small one."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from refax.core.filters import Filter
from refax.core.variable import Param
from refax.errors import TreeMismatchError
from refax.transforms.abstract import eval_shape
from refax.transforms.autodiff import value_and_grad
from refax.transforms.axes import Carry
from refax.transforms.loops import scan
from refax.typing import describe, wide_dtype


def accumulate_grads(
  f: Callable | None = None, *, steps: int, wrt: Filter = Param, has_aux: bool = False
) -> Any:
  """`nnx.value_and_grad` of a mean over a batch, computed in microbatches one after the other.

  The gradients are added up in one buffer, so memory holds one gradient and the activations of one
  microbatch. Values and gradients are those of the whole batch, if `f` is a mean over it: they are
  added up in float32 or better, and cast once. State that `f` writes (BatchNorm, random counts) is
  written once for each microbatch.

  Args:
    f: `f(model, *batch) -> loss`, or `(loss, aux)`; without it, a decorator is returned.
    steps: the number of microbatches; it divides the first axis of every array of the batch.
    wrt: which Variables of the model.
    has_aux: whether `f` returns `(loss, aux)`.

  Returns:
    A function that returns `(loss, gradients)`, or `((loss, aux), gradients)` with the `aux` of all
    microbatches stacked.

  Raises:
    TreeMismatchError: `steps` does not divide the batch.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
  >>> loss = lambda model, x: (model(x) ** 2).mean()
  >>> value, grads = nnx.accumulate_grads(loss, steps=4)(model, jnp.ones((8, 2)))
  >>> grads["kernel"].shape
  (2, 1)
  """
  if f is None:
    return functools.partial(accumulate_grads, steps=steps, wrt=wrt, has_aux=has_aux)
  transformed = value_and_grad(f, wrt=wrt, has_aux=has_aux)

  def split(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    if x.ndim == 0 or x.shape[0] % steps:
      raise TreeMismatchError.microbatches(steps, describe(x))
    return x.reshape(steps, x.shape[0] // steps, *x.shape[1:])

  @functools.wraps(f)
  def wrapper(model: Any, *batch: Any) -> Any:
    batch = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], batch)
    shapes = _shapes(transformed, model, first, has_aux)
    # Of 512 equal terms the sum in bfloat16 would lose half.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide_dtype(x.dtype)), shapes)

    def step(total: Any, model: Any, batch: Any) -> Any:
      value, grads = transformed(model, *batch)
      loss, aux = value if has_aux else (value, None)
      add = lambda t, x: t + jnp.asarray(x, t.dtype) / steps
      return jax.tree.map(add, total, (loss, grads)), aux

    loop = scan(step, in_axes=(Carry, None, 0), out_axes=(Carry, 0))
    total, aux = loop(zeros, model, batch)
    loss, grads = jax.tree.map(lambda t, x: t.astype(x.dtype), total, shapes)
    return ((loss, aux) if has_aux else loss), grads

  return wrapper


def _shapes(transformed: Callable, model: Any, batch: Any, has_aux: bool) -> Any:
  """Shape and dtype of the loss and of each gradient."""
  value, grads = eval_shape(transformed, model, *batch)
  return (value[0] if has_aux else value), grads
