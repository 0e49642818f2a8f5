"""device_put: an object moves to other devices, in place."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from refax import _jax
from refax.core.epoch import epoch
from refax.core.flatten import Walk, region_items
from refax.core.gather import GATHERED
from refax.core.graphdef import LEAF, REGION
from refax.core.interrupt import uninterrupted
from refax.core.node import Node, set_attribute
from refax.core.processes import check_same, checksum
from refax.core.rebuild import resolver
from refax.core.variable import Variable
from refax.errors import RefArgumentError, TraceContextError
from refax.typing import Path, path_str


def device_put(tree: Any, device: Any, /) -> Any:
  """Move an object to a device, or lay it out over several, in place.

  Every Variable and every array in an attribute moves; values, sharing and metadata stay. A hijax
  Variable keeps its cell, so whatever shares the cell (a State of `nnx.split`) moves with it. What
  `nnx.jit` and `jax.jit` write afterwards stays where the object is.

  What was made before `jax.set_mesh` and is used in the mesh needs no call: it moves to all devices
  of the mesh, undivided, when it is used first, and stays there.

  With several processes (`jax.distributed`), every process calls this with an equal object; the
  values are compared. What was made in one process is then one object of all.

  Parts are laid out in their own way by one call each: `nnx.device_put(model.kernel, sharding)`.

  Args:
    tree: a Module, Variable, State, or any pytree of these.
    device: a device or a sharding, as for `jax.device_put`.

  Returns:
    `tree` itself. An array that is in no object cannot move in place: if `tree` holds such arrays
    outside Modules and Variables, the result is a copy of the containers around them.

  Raises:
    RefArgumentError: a hijax Variable is moved inside a transform.
    TraceContextError: an object from outside a transform is moved inside it.
    ProcessMismatchError: a process has other values than the others; nothing has moved.
    ValueError: the sharding does not fit an array; nothing has moved.

  >>> from refax import nnx; import jax
  >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  >>> nnx.device_put(model, jax.devices()[0]) is model
  True
  """
  if isinstance(device, jax.Device):  # given the device, JAX leaves the axes of a mesh in the type
    device = SingleDeviceSharding(device)
  return put(tree, lambda path, leaf: device)


def put(tree: Any, where: Callable[[Path, Any], Any]) -> Any:
  """Move each Variable and array of an object to a place of its own; see `device_put`.

  Args:
    tree: a Module, Variable, State, or any pytree of these.
    where: from a path, and the Variable or array there, to a sharding.
  """
  walk = Walk()
  root = walk.entry(tree)
  graphdef = walk.graphdef(root)
  variables = [x for x in walk.leaves if isinstance(x, Variable)]
  nodes = [
    (node, key, entry)
    for node, (_, entries) in zip(walk.objects, graphdef.nodes, strict=True)
    for key, entry in entries
    if _holds_arrays(entry, walk.leaves)
  ]
  _check_movable(variables, [node for node, _, _ in nodes])
  places = [where(path, x) for path, x in zip(graphdef.paths, walk.leaves, strict=True)]
  _check_same(places, graphdef.paths, walk.leaves)
  moved = list(map(_moved, walk.leaves, places))
  jax.block_until_ready([x for x in moved if x is not None])  # what can fail has failed then
  cells = [(x, new) for x, new in zip(walk.leaves, moved, strict=True) if isinstance(x, Variable)]
  mixed = [x if isinstance(x, Variable) else y for x, y in zip(walk.leaves, moved, strict=True)]
  value = resolver(mixed, walk.objects)
  attributes = [(node, key, value(entry)) for node, key, entry in nodes]
  result = value(root) if _holds_arrays(root, walk.leaves) else tree

  def install() -> None:
    renewed = _install(cells)
    if renewed:
      _renew(_handles(tree, walk.objects), renewed)
    for node, key, new in attributes:
      _set(node, key, new)
    for node in walk.objects:
      node._structure_changed(None)
    epoch.bump()  # compiled calls are known by where their arguments are

  uninterrupted(install)
  return result


def _holds_arrays(entry: tuple, leaves: list[Any]) -> bool:
  """Whether an entry is, or has directly inside, an array that belongs to no Variable."""
  if entry[0] == REGION:
    return any(_holds_arrays(child, leaves) for child in entry[2])
  return entry[0] == LEAF and _is_array(leaves[entry[1]])


def _is_array(x: Any) -> bool:
  return isinstance(x, jax.Array) and not _jax.is_ref(x)


def _check_movable(variables: list[Variable], nodes: list[Node]) -> None:
  now = _jax.trace_state()
  for variable in variables:
    variable._check_writable()
    if variable.is_hijax and (variable._trace != now or _is_traced(variable)):
      raise RefArgumentError.moved(variable._def.origin)
  for node in nodes:
    if node._pytree.trace != now:
      raise TraceContextError.attribute(type(node).__name__)


def _check_same(places: list[Any], paths: Sequence[Path], leaves: list[Any]) -> None:
  """Raise ProcessMismatchError if what is to be on devices of all processes differs in some."""
  if jax.process_count() == 1:
    return
  here = {}
  for place, path, leaf in zip(places, paths, leaves, strict=True):
    if not _is_of_all_processes(place):
      continue  # the others need not be here
    for i, cell in enumerate(jax.tree.leaves(getattr(leaf, "_cell", leaf))):
      x = _jax.peek_cell(cell) if _jax.is_ref(cell) else cell
      if isinstance(x, jax.Array) and x.is_fully_addressable:
        here[f"{path_str(path)}[{i}]".removesuffix("[0]").lstrip(".")] = checksum(x)
  if any(map(_is_of_all_processes, places)):
    check_same("nnx.device_put", here)


def _is_of_all_processes(place: Any) -> bool:
  if getattr(place, "is_fully_addressable", True):
    return False
  return len({x.process_index for x in place.device_set}) == jax.process_count()


def _is_traced(variable: Variable) -> bool:
  return any(map(_jax.is_tracer, jax.tree.leaves(variable.get_raw_value())))


def _moved(leaf: Any, device: Any) -> Any:
  """The value of a leaf on the device: of a Variable that holds a pytree, a pytree."""
  if isinstance(leaf, Variable):
    return jax.tree.map(lambda cell: _moved(cell, device), leaf.get_raw_value())
  if _jax.is_ref(leaf):
    return _jax.put(_jax.peek_cell(leaf), device)
  return _jax.put(leaf, device) if _is_array(leaf) else leaf


def _install(cells: list[tuple[Variable, Any]]) -> dict[int, tuple[Any, Any]]:
  """Exchange the buffers of Refs, and the arrays of lojax Variables.

  Returns:
    The Refs that took the place of others, by the identity of these; they are kept alive with
    them, for a new Ref could be where an old one was.
  """
  renewed: dict[int, tuple[Any, Any]] = {}

  def cell_of(old: Any, new: Any) -> Any:
    if not _jax.is_ref(old):
      return new
    ref = _jax.move_cell(old, new)
    if ref is not old:
      renewed[id(old)] = old, ref
    return ref

  for variable, new in cells:
    if variable._def.gathered is not None:  # of a plan that does not hold any more
      rest = {k: x for k, x in variable._def.metadata.items() if k != GATHERED}
      variable._def = variable._def.with_metadata(rest)
    cell = variable.get_raw_value()
    if _jax.is_ref(cell) or isinstance(cell, jax.Array):
      variable._cell = cell_of(cell, new)
    else:
      variable._cell = jax.tree.map(cell_of, cell, new)
  return renewed


def _renew(handles: Iterator[Variable], renewed: dict[int, tuple[Any, Any]]) -> None:
  """Let all handles of a Ref have the one that took its place."""
  for variable in handles:
    cell = variable.get_raw_value()
    variable._cell = jax.tree.map(lambda x: renewed.get(id(x), (x, x))[1], cell)


def _handles(tree: Any, objects: list[Node]) -> Iterator[Variable]:
  """Every Variable in a tree, also those that share their cell with others."""
  values = [tree, *(value for node in objects for _, value, data in node._entries() if data)]
  for value in values:
    for _, x in region_items(value):
      if isinstance(x, Variable):
        yield x


def _set(node: Node, key: Any, value: Any) -> None:
  """Put an array in the place of another: in an attribute, or among the elements of a container."""
  if key in node.__dict__:
    set_attribute(node.__dict__, key, value)
  else:
    container: Any = node
    container._items[key] = value
