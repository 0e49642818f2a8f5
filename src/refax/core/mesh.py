"""Cells that were made before `jax.set_mesh`, used inside it.

An array that is made outside of a mesh is committed to no device: inside, JAX lays it out over the
mesh. A Ref is always committed, and JAX refuses one on a single device in a mesh of several. So a
cell that is used in a mesh moves to all of its devices, once, and stays there; its value is the
same on each. A layout that splits it up is chosen by `nnx.device_put`.

One thing is not seen: a Variable that by itself, in no Module or State, is an argument of a plain
JAX transform. JAX takes it apart in C; to do that in Python would make a call of `jax.jit` with 100
lojax Variables a sixth slower.
"""

from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from refax import _jax
from refax.core.epoch import epoch
from refax.core.interrupt import uninterrupted


def objects_enter_mesh(leaves: Iterable[Any]) -> None:
  """`enter_mesh` for the cells of Variables, and for Refs, among the leaves of objects."""
  if _jax.wide_mesh() is not None:
    cells = (getattr(x, "_cell", x) for x in leaves)
    enter_mesh(x for cell in cells for x in jax.tree.leaves(cell))


def enter_mesh(cells: Iterable[Any]) -> None:
  """Move the Refs among `cells` to the mesh of now, if there is one that they are not in.

  All copies are made before a cell is given its own: if one fails, none has moved.
  """
  mesh = _jax.wide_mesh()
  if mesh is None:
    return
  refs = list({id(x): x for x in cells if _jax.is_outside(x, mesh)}.values())
  if not refs:
    return
  everywhere = NamedSharding(mesh, PartitionSpec())
  with jax.ensure_compile_time_eval():  # a function that is traced may find them by closure
    held = list(map(_jax.peek_cell, refs))
    moved = [jax.device_put(x, everywhere) for x in held]
    jax.block_until_ready(moved)

  def install() -> None:
    for ref, new in zip(refs, moved, strict=True):
      _jax.move_cell(ref, new)
    epoch.bump()  # compiled calls are known by where their arguments are

  uninterrupted(install)
