"""pmap, which JAX replaces by sharded arrays."""

import functools
from typing import Any

from refax.transforms.jit import jit
from refax.transforms.mapping import vmap


def pmap(
  f: Any = None, *, axis_name: Any = None, in_axes: Any = 0, out_axes: Any = 0, **options: Any
) -> Any:
  """A function mapped over the first axis, compiled: `nnx.jit(nnx.vmap(f))`.

  JAX replaces `jax.pmap` by sharded arrays: lay the arguments out over a mesh, and each device
  computes its part.

  >>> from refax.compat import nnx; import jax.numpy as jnp
  >>> nnx.pmap(lambda x: 2 * x)(jnp.arange(3)).tolist()
  [0, 2, 4]
  """
  options = {k: v for k, v in options.items() if k in ("axis_size", "static_broadcasted_argnums")}
  static = options.pop("static_broadcasted_argnums", ())
  if f is None:
    return functools.partial(
      pmap,
      axis_name=axis_name,
      in_axes=in_axes,
      out_axes=out_axes,
      static_broadcasted_argnums=static,
      **options,
    )
  if static:
    numbers = (static,) if isinstance(static, int) else tuple(static)
    return functools.wraps(f)(lambda *args: _mapped(f, numbers, args, axis_name, in_axes, out_axes))
  return jit(vmap(f, in_axes=in_axes, out_axes=out_axes, axis_name=axis_name, **options))


def _mapped(f: Any, static: tuple, args: tuple, axis_name: Any, in_axes: Any, out_axes: Any) -> Any:
  fixed = {i: args[i] for i in static}
  given = [x for i, x in enumerate(args) if i not in fixed]

  def call(*inner: Any) -> Any:
    rest = iter(inner)
    return f(*(fixed[i] if i in fixed else next(rest) for i in range(len(args))))

  if isinstance(in_axes, tuple | list):
    in_axes = tuple(axis for i, axis in enumerate(in_axes) if i not in fixed)
  return jit(vmap(call, in_axes=in_axes, out_axes=out_axes, axis_name=axis_name))(*given)
