"""Cells that were made before `jax.set_mesh`, used inside it.

An array that is made outside of a mesh is committed to no device: inside, JAX lays it out over the
mesh. A Ref is always committed, and JAX refuses one on a single device in a mesh of several. So a
cell that is used in a mesh moves to all of its devices, once, and stays there; its value is the
same on each. A layout that splits it up is chosen by `nnx.device_put`.
"""

from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from refax import _jax
from refax.core.epoch import epoch
from refax.core.interrupt import uninterrupted
from refax.core.observe import in_plain_traces


def objects_enter_mesh(leaves: Iterable[Any]) -> None:
  """`enter_mesh` for the cells of Variables, and for Refs, among the leaves of objects."""
  if _jax.wide_mesh() is not None:
    cells = (getattr(x, "_cell", x) for x in leaves)
    enter_mesh(x for cell in cells for x in jax.tree.leaves(cell))


is_possible = False
"""Whether there are several devices."""


def arguments_meet(leaves: Iterable[Any]) -> bool:
  """`objects_enter_mesh` for the arguments of one compiled function, also outside of the mesh.

  Where some of them lie on a mesh (a batch that was divided up, a model that was laid out), the
  cells on one of its devices move to it too: one function cannot have both. JAX does so with arrays
  that nobody has put anywhere. A cell that a function of plain `jax.jit` has read by closure stays,
  and JAX refuses it: that function would lose its state.

  Returns:
    Whether something has moved, outside of `jax.set_mesh`.
  """
  moved = False
  if _jax.wide_mesh() is not None:
    objects_enter_mesh(leaves)
  elif is_possible and _jax.no_trace_active():
    cells = [x for leaf in leaves for x in jax.tree.leaves(getattr(leaf, "_cell", leaf))]
    refs = [x for x in cells if type(x) is jax.Ref]
    alone = list(filter(_jax.is_on_one_device, refs))
    if alone and not any(id(ref) in in_plain_traces for ref in alone):
      for mesh in dict.fromkeys(mesh for x in cells if (mesh := _mesh_of(x)) is not None):
        moved = _enter(refs, mesh) or moved
  return moved


def _mesh_of(x: Any) -> jax.sharding.Mesh | None:
  """The mesh of several devices on which an array, or the buffer of a Ref, lies."""
  array = _jax.peek_cell(x) if type(x) is jax.Ref else x
  mesh = getattr(getattr(_jax.bits(array), "sharding", None), "mesh", None)
  return mesh if isinstance(mesh, jax.sharding.Mesh) and mesh.size > 1 else None


def enter_mesh(cells: Iterable[Any]) -> None:
  """Move the Refs among `cells` to the mesh of now, if there is one that they are not in.

  All copies are made before a cell gets its own: if one fails, none has moved.
  """
  mesh = _jax.wide_mesh()
  if mesh is None:
    return
  _enter(cells, mesh)


def _enter(cells: Iterable[Any], mesh: jax.sharding.Mesh) -> bool:
  """Move those that are on one device of a mesh; whether there are any."""
  cells, moved = {id(x): x for x in cells}.values(), False
  while refs := [x for x in cells if _jax.is_outside(x, mesh)]:
    _move(refs, NamedSharding(mesh, PartitionSpec()))
    moved = True
  return moved


def _move(refs: list[jax.Ref], sharding: NamedSharding) -> None:
  """Lay out cells in another way; those that another thread writes meanwhile stay as they are."""
  held = list(map(_jax.peek_cell, refs))
  try:
    with jax.ensure_compile_time_eval():  # a function that is traced may find them by closure
      moved = [_jax.put(x, sharding) for x in held]
      jax.block_until_ready(moved)
  except Exception:
    if any(_jax.peek_cell(ref) is not x for ref, x in zip(refs, held, strict=True)):
      return  # a step outside of the mesh has taken the buffer
    raise

  def install() -> None:
    for ref, old, new in zip(refs, held, moved, strict=True):
      if _jax.peek_cell(ref) is old:
        _jax.move_cell(ref, new)
    epoch.bump()  # compiled calls are known by where their arguments are

  uninterrupted(install)
