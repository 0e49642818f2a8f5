"""transform_metadata: names of axes in the metadata of Variables, under vmap and scan."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from refax.compat.sharding import PARTITION_NAME, add_axis, remove_axis
from refax.core.flatten import Walk
from refax.core.variable import Variable
from refax.transforms.axes import argument_axes, assign
from refax.transforms.jit import jit
from refax.transforms.lift import Inputs
from refax.transforms.mapping import vmap


def transform_metadata(
  f: Callable[..., Any] | None = None,
  *,
  in_axes: Any = 0,
  out_axes: Any = 0,
  partition: str | None = None,
  metadata: Mapping[str, Any] | None = None,
  graph: Any = None,
) -> Any:
  """A function to be mapped, inside of which Variables do not name the axis that is mapped.

  Args:
    f: the function; without it, a decorator is returned.
    in_axes: the mapped axis of each argument, as for `nnx.vmap`.
    out_axes: that of the results.
    partition: the name of the axis, in the metadata `out_sharding`.
    metadata: in place of it, names for several entries of the metadata.
    graph: taken for Flax's sake.

  >>> from refax.compat import nnx; import jax
  >>> @nnx.vmap
  ... @nnx.transform_metadata(partition="layers")
  ... def create(key):
  ...   return nnx.Param(jax.numpy.zeros(3), out_sharding=("embed",))
  >>> create(jax.random.split(jax.random.key(0), 2)).out_sharding
  ('layers', 'embed')
  """
  names = dict(metadata) if metadata is not None else {PARTITION_NAME: partition}
  if f is None:
    return functools.partial(transform_metadata, in_axes=in_axes, out_axes=out_axes, metadata=names)

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    inputs = Inputs.of(args, kwargs)
    axes = argument_axes(inputs, in_axes, len(args), default=0 if kwargs else None)
    given = [(inputs.leaves[i], axis) for i, axis in axes.items() if type(axis) is int]
    given = [(x, axis) for x, axis in given if isinstance(x, Variable)]
    for x, axis in given:
      remove_axis(x, axis, names)
    out = f(*args, **kwargs)
    walk = Walk()
    entry = walk.entry(out)
    found = assign(out_axes, entry, walk.graphdef(entry), walk.leaves, "out_axes")
    made = [(walk.leaves[i], axis) for i, axis in found.items() if type(axis) is int]
    known = {id(x) for x, _ in given}
    new = [(x, axis) for x, axis in made if isinstance(x, Variable) and id(x) not in known]
    for x, axis in (*given, *new):
      add_axis(x, axis, names)
    return out

  return wrapper


def with_names(transform: Callable[..., Any]) -> Callable[..., Any]:
  """`nnx.vmap` or `nnx.scan` with the argument `transform_metadata`."""

  @functools.wraps(transform)
  def wrapper(f: Any = None, /, *, transform_metadata: Any = None, **options: Any) -> Any:
    f = options.pop("f", f)
    if f is None:
      return functools.partial(wrapper, transform_metadata=transform_metadata, **options)
    if transform_metadata:
      axes = {k: options[k] for k in ("in_axes", "out_axes") if k in options}
      f = _named(f, transform_metadata, **axes)
    return transform(f, **options)

  return wrapper


def _named(f: Callable[..., Any], names: Mapping[str, Any], **axes: Any) -> Callable[..., Any]:
  return transform_metadata(f, metadata=names, **axes)


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
