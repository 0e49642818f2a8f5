"""nnx.remat: recompute a function in the backward pass; what it writes is written once."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from refax import _jax
from refax.transforms.effect import undone_on_error
from refax.transforms.lift import Inputs
from refax.transforms.reach import Reach
from refax.transforms.stage import Staged, read_closures, values_of


def remat(
  f: Callable | None = None,
  *,
  prevent_cse: bool = True,
  static_argnums: int | Sequence[int] = (),
  policy: Callable[..., bool] | None = None,
) -> Any:
  """Recompute `f` in the backward pass instead of keeping its intermediate values.

  Args:
    f: a function of Modules, Variables and arrays; without it, a decorator is returned.
    prevent_cse: as in `jax.checkpoint`.
    static_argnums: positions of arguments that are passed as they are.
    policy: which intermediate values to keep, one of `jax.checkpoint_policies`.

  Returns:
    A function like `f`. Where nothing is traced, it is `f` itself, and undoes what `f` has done to
    objects if that raises.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  >>> grads = nnx.grad(lambda m: nnx.remat(lambda m, x: m(x))(m, jnp.ones((1, 2))).sum())(model)
  >>> grads["bias"].shape
  (3,)
  """
  if f is None:
    return functools.partial(
      remat, prevent_cse=prevent_cse, static_argnums=static_argnums, policy=policy
    )
  static = {static_argnums} if isinstance(static_argnums, int) else set(static_argnums)
  reach = Reach(lambda: f)

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    fixed = {range(len(args))[n]: args[range(len(args))[n]] for n in static}
    free = tuple(None if i in fixed else x for i, x in enumerate(args))
    if _jax.no_trace_active():  # nothing is differentiated, and nothing to recompute
      with undone_on_error(Inputs.of((free, *reach.objects()), kwargs)):
        return f(*args, **kwargs)
    call = lambda *inner, **kw: f(*(fixed.get(i, x) for i, x in enumerate(inner)), **kw)
    inputs = Inputs.of(free, kwargs)
    values = values_of(inputs)
    staged = Staged(call, inputs, values)
    refs, closures = read_closures([staged])
    run = jax.checkpoint(staged.run, prevent_cse=prevent_cse, policy=policy)
    outputs, after = run(values, closures)
    return inputs.commit(outputs, refs, after)

  return wrapper


checkpoint = remat
