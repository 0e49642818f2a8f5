"""in_shardings and out_shardings of nnx.jit: where arguments, results and state are laid out."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from refax import _jax
from refax.core import annotation
from refax.core.flatten import flatten
from refax.core.gather import as_kept
from refax.core.node import Node
from refax.core.variable import Variable
from refax.errors import TreeMismatchError
from refax.graph.placement import device_put
from refax.transforms.axes import StateAxes, by_path, is_prefix


def laid_out(call: Callable, in_shardings: Any, static: tuple[frozenset, frozenset]) -> Callable:
  """A function whose arguments, and the state in them, are first put where they are to be.

  Args:
    call: the function.
    in_shardings: as of `nnx.jit`.
    static: the positions and names of arguments that are no arrays.
  """

  @functools.wraps(call)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    places = [i for i in range(len(args)) if i not in static[0]]
    placed = list(args)
    prefixes = in_shardings
    if is_prefix(prefixes):
      prefixes = (prefixes,) * len(places)
    if len(prefixes) != len(places):
      got = f"{len(prefixes)} shardings for {len(places)} positional arguments"
      raise TreeMismatchError.axes("in_shardings", "", got)
    for i, prefix in zip(places, prefixes, strict=True):
      placed[i] = _place(prefix, args[i])
    return call(*placed, **kwargs)

  return wrapper


def constrained(fun: Callable, out_shardings: Any) -> Callable:
  """A function to be compiled, whose results lie where they are to be."""

  @functools.wraps(fun)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    return _place(out_shardings, fun(*args, **kwargs))

  return wrapper


def _place(prefix: Any, tree: Any) -> Any:
  """A pytree with its arrays laid out by a prefix of shardings; Variables are laid out in place."""
  is_leaf = lambda x: isinstance(x, Node | Variable)
  below = lambda axis, sub: jax.tree.map(functools.partial(_place_leaf, axis), sub, is_leaf=is_leaf)
  return jax.tree.map(below, prefix, tree, is_leaf=is_prefix)


def _place_leaf(sharding: Any, x: Any) -> Any:
  if isinstance(sharding, Node):
    sharding = by_path(sharding, None)
  if isinstance(x, Node):
    flat = flatten(x)
    for path, leaf in zip(flat.graphdef.paths, flat.leaves, strict=True):
      if isinstance(leaf, Variable):
        move(leaf, sharding.axis(path, leaf) if isinstance(sharding, StateAxes) else sharding)
    return x
  if isinstance(x, Variable):
    move(x, sharding.axis((), x) if isinstance(sharding, StateAxes) else sharding)
    return x
  return _put(x, sharding)


def move(variable: Variable, sharding: Any) -> None:
  """Lay a Variable out in place, also while JAX traces."""
  sharding = _resolved(sharding)
  if sharding is None:
    return
  cells = jax.tree.leaves(variable.get_raw_value())
  if all(not _jax.is_tracer(x) and getattr(x, "sharding", None) == sharding for x in cells):
    return
  if any(map(_jax.is_tracer, cells)) or not _jax.no_trace_active():
    with as_kept():
      value = variable.get_value()
    variable.set_value(jax.tree.map(lambda x: _put(x, sharding), value))
  else:
    device_put(variable, sharding)


def _put(x: Any, sharding: Any) -> Any:
  sharding = _resolved(sharding)
  if sharding is None or (
    isinstance(x, jax.Array) and not _jax.is_tracer(x) and x.sharding == sharding
  ):
    return x
  if _jax.no_trace_active():
    return _jax.put(x, sharding)
  if isinstance(sharding, NamedSharding):
    return annotation.constrained(x, sharding.mesh, sharding.spec)
  return jax.lax.with_sharding_constraint(x, sharding)


def _resolved(sharding: Any) -> Any:
  """A PartitionSpec on the mesh of `jax.set_mesh`; a sharding as it is."""
  if not isinstance(sharding, PartitionSpec):
    return sharding
  mesh = _jax.context_mesh()
  if mesh is None or mesh.empty:
    raise TreeMismatchError.axes(
      "shardings of nnx.jit", "", f"{sharding} without a mesh: use jax.set_mesh, or a NamedSharding"
    )
  return NamedSharding(mesh, sharding)
