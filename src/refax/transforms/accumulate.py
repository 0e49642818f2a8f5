"""nnx.accumulate_grads: the gradient of a large batch in the memory of a small one."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from refax import _jax
from refax.core.filters import Filter
from refax.core.variable import Param
from refax.errors import TreeMismatchError
from refax.transforms.abstract import eval_shape
from refax.transforms.autodiff import Differentiated, value_and_grad
from refax.transforms.axes import Carry
from refax.transforms.loops import scan
from refax.typing import describe, wide_dtype


def accumulate_grads(
  f: Callable | None = None, *, steps: int, wrt: Filter = Param, has_aux: bool = False
) -> Any:
  """`nnx.value_and_grad` of a mean over a batch, computed in microbatches one after the other.

  The gradients are added up in one buffer, by the backward pass itself, so memory holds one
  gradient and the activations of one microbatch. Values and gradients are those of the whole batch,
  if `f` is a mean over it: they are added up in float32 or better, and cast once. State that `f`
  writes (BatchNorm, random counts) is written once for each microbatch.

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

  def split(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    if x.ndim == 0 or x.shape[0] % steps:
      raise TreeMismatchError.microbatches(steps, describe(x))
    return x.reshape(steps, x.shape[0] // steps, *x.shape[1:])

  @functools.wraps(f)
  def wrapper(model: Any, *batch: Any) -> Any:
    batch = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], batch)
    check = value_and_grad(f, wrt=wrt, has_aux=has_aux)  # raises what cannot be differentiated
    value, _ = eval_shape(check, model, *first)
    loss_type = (value[0] if has_aux else value).dtype
    outer = Differentiated((model, *first), {}, 0, wrt, None)
    # Of 512 equal terms the sum in bfloat16 would lose half.
    zero = lambda x: jnp.zeros_like(x, wide_dtype(jnp.result_type(x)))
    zeros = jnp.zeros((), wide_dtype(loss_type)), jax.tree.map(zero, outer.values)
    # Scaled on the way in, the sum needs no pass of its own; but in half precision a gradient may
    # be too small for that, and 1 / 3 is not exact.
    exact = all(wide_dtype(t) == t for t in (loss_type, *_dtypes(outer.values)))
    scale = 1 / steps if exact else 1.0

    def step(total: Any, model: Any, batch: Any) -> Any:
      call = Differentiated((model, *batch), {}, 0, wrt, None)
      loss, aux, pull = call.pull(f, has_aux, wide_dtype)
      grads = add_in_place(pull, jnp.full_like(loss, scale), total[1])
      return (total[0] + jnp.asarray(loss, total[0].dtype) * scale, grads), aux

    loop = scan(step, in_axes=(Carry, None, 0), out_axes=(Carry, 0))
    (loss, grads), aux = loop(zeros, model, batch)
    if not exact:
      mean = lambda total, x: (total / steps).astype(jnp.result_type(x))
      loss = mean(loss, loss_type)
      grads = jax.tree.map(mean, grads, outer.values)
    return ((loss, aux) if has_aux else loss), outer.gradients(grads)

  return wrapper


def add_in_place(pull: Any, cotangent: jax.Array, totals: Any) -> Any:
  """`totals` and the gradient, added up; without a second gradient in memory, where JAX can.

  `with_refs` of what `jax.vjp` returns adds what it finds to Refs, layer by layer: the gradient of
  8 MiB of weights then takes 4.4 MiB of temporaries, and not 11.4.
  """
  closed = _with_refs(pull, cotangent, totals)
  if closed is None:
    return jax.tree.map(jnp.add, totals, pull(cotangent)[0])
  flat, tree = jax.tree.flatten(totals)
  return tree.unflatten(_jax.jaxpr_as_fun(_jax.discharge(closed))(*flat))


def _with_refs(pull: Any, cotangent: jax.Array, totals: Any) -> Any:
  """The jaxpr of the backward pass that adds to Refs, from totals to totals; None without one."""

  def run(totals: Any) -> Any:
    refs = jax.tree.map(_jax.new_cell, totals)
    pull.with_refs(refs)(cotangent)
    return jax.tree.map(lambda ref: ref[...], refs)

  try:
    closed = jax.make_jaxpr(run)(totals)
  except Exception:  # JAX has no rule for some operation; what is wrong with `f`, the caller sees
    return None
  return closed if _SCANS_ADD or not _scans_refs(closed.jaxpr) else None


def _dtypes(tree: Any) -> list[Any]:
  return [jnp.result_type(x) for x in jax.tree.leaves(tree)]


_SCANS_ADD = jax.__version_info__ >= (0, 12)
"""Whether the backward pass of a scan adds to the Refs that it is given: jax#32411, jax#38929."""


def _scans_refs(jaxpr: Any) -> bool:
  """Whether a scan at any depth of a jaxpr writes Refs."""
  return any(
    (eqn.primitive.name == "scan" and eqn.effects) or any(map(_scans_refs, _jax.inner_jaxprs(eqn)))
    for eqn in jaxpr.eqns
  )
