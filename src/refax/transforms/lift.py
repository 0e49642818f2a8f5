"""lift: the one mechanism under all `nnx.*` transforms.

A lifted call finds the distinct Variables and arrays in all arguments together (what is shared
between arguments is seen), hands a JAX transform values in and values out, rebuilds the arguments
inside it, and afterwards gives the caller's own objects what was written: values of Variables,
attributes that were added or changed, and new objects with cells of their own.

    inputs = Inputs.of(args, kwargs)              # outside: flat, distinct
    frame = inputs.enter(values)                  # inside: the arguments again, as inner objects
    args, kwargs = frame.args
    outputs = frame.collect(fn(*args, **kwargs))  # inside: a pytree of arrays, JAX carries it out
    result = inputs.commit(outputs)               # outside: the caller's objects, updated
"""

import functools
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from refax import _jax
from refax.core import storage
from refax.core.calls import places_of
from refax.core.definition import Differentiation
from refax.core.flatten import Walk
from refax.core.gather import as_kept
from refax.core.graphdef import REGION, GraphDef
from refax.core.interrupt import uninterrupted
from refax.core.mesh import arguments_meet
from refax.core.node import Node
from refax.core.rebuild import unflatten
from refax.core.variable import Variable, VariableDef
from refax.core.watch import Watch
from refax.transforms.commit import Commit, Outputs, OutputSpec

_NONE: Mapping[int, Any] = types.MappingProxyType({})


class Entered(NamedTuple):
  """A Variable inside a transform: its value there, and the storage that the function sees."""

  value: Any
  hijax: bool
  selected: Differentiation | None = None
  attached: bool = False


class Inputs:
  """The arguments of a lifted call, flat: each distinct Variable, array and object once."""

  def __init__(
    self,
    graphdef: GraphDef,
    leaves: list[Any],
    objects: list[Node],
    names: tuple[str, ...] = (),
  ):
    self.graphdef = graphdef
    self.leaves = leaves
    self.objects = objects
    self.names = names
    """The keywords of the call, sorted."""

  @classmethod
  def of(
    cls,
    args: tuple,
    kwargs: dict[str, Any],
    watch: Watch | None = None,
    *,
    enters_mesh: bool = True,
  ) -> "Inputs":
    """Flatten the arguments of a call; the root is `(args, kwargs)`.

    Args:
      args: the positional arguments.
      kwargs: the others.
      watch: is told of changes to the objects in them.
      enters_mesh: whether cells move to the mesh of `jax.set_mesh`.
    """
    walk = Walk(watch)
    treedef = jax.tree.structure((tuple(range(len(args))), dict.fromkeys(kwargs, 0)))
    values = [*args, *(kwargs[name] for name in sorted(kwargs))]
    root = (REGION, treedef, tuple(map(walk.entry, values)))
    if enters_mesh:
      arguments_meet(walk.leaves)
    names = tuple(sorted(kwargs))
    graphdef = walk.graphdef(root).at(places_of(walk.objects))
    return cls(graphdef, walk.leaves, walk.objects, names)

  @property
  def arguments(self) -> tuple:
    """The entry of each argument: positional ones, then keywords in sorted order."""
    return self.graphdef.root[2]

  def enter(self, entered: dict[int, Entered]) -> "Frame":
    """The arguments rebuilt inside a transform; leaves that are not in `entered` stay."""
    return Frame(self.graphdef, [self._inner(x, entered.get(i)) for i, x in enumerate(self.leaves)])

  def _inner(self, leaf: Any, entered: Entered | None) -> Any:
    if not isinstance(leaf, Variable):
      return leaf if entered is None else entered.value
    if entered is None:
      return leaf._handle(leaf._cell, leaf._def)
    return enter_variable(type(leaf), leaf._def, entered)

  def commit(
    self,
    outputs: Outputs,
    closures: Mapping[int, jax.Ref] = _NONE,
    values: Mapping[int, jax.Array] = _NONE,
  ) -> Any:
    """Give the caller's objects what the function wrote, and rebuild what it returned.

    No signal comes before all of it is there.

    Args:
      outputs: what the function gave back.
      closures: the Refs that it reaches by closure, by any key.
      values: for the keys of those that it has written, the values.

    Raises:
      TraceContextError: an object from another trace would have to change; nothing has.
    """
    commit = functools.partial(self._commit, outputs, closures, values)
    return uninterrupted(commit) if _jax.no_trace_active() else commit()

  def _commit(
    self, outputs: Outputs, closures: Mapping[int, jax.Ref], values: Mapping[int, jax.Array]
  ) -> Any:
    commit = Commit(self.graphdef, outputs.spec)
    commit.check(self.leaves, self.objects)
    fresh = map(fresh_leaf, outputs.fresh, outputs.spec.hijax)
    leaves = [*self.leaves, *fresh]
    for key, new in values.items():
      array = storage.as_array(new)
      storage.write_ref(closures[key], array, None, "a Variable that came by closure")
    for index, new in zip(outputs.spec.written, outputs.written, strict=True):
      install(self.leaves[index], new)
    return commit.build(leaves, self.objects)


class Frame:
  """The arguments of a lifted call as the function sees them."""

  def __init__(self, graphdef: GraphDef, leaves: list[Any]):
    self._graphdef = graphdef
    self.leaves = leaves
    self.args, self.objects = unflatten(graphdef, leaves)
    self._cells = [x._cell if isinstance(x, Variable) else None for x in leaves]
    self._defs = [x._def if isinstance(x, Variable) else None for x in leaves]

  def is_local(self, index: int) -> bool:
    """Whether a leaf is a Variable in hijax storage: its final value must be read to be seen."""
    leaf = self.leaves[index]
    return isinstance(leaf, Variable) and leaf.is_hijax

  def collect(self, out: Any, *, hijax_afterwards: bool = False) -> Outputs:
    """What the function returned and did to its arguments, as a pytree of arrays.

    Args:
      out: what the function returned.
      hijax_afterwards: whether Variables that were local to a differentiation become hijax.
    """
    walk = Walk.seeded(self._graphdef, self.leaves, self.objects)
    root = walk.entry(out)
    count = len(self.leaves)
    written = [i for i in range(count) if self._is_written(i)]
    fresh = walk.leaves[count:]
    spec = OutputSpec(
      walk.graphdef(root),
      tuple(written),
      tuple(
        isinstance(x, Variable) and (x.is_hijax or (hijax_afterwards and x._def.hijax))
        for x in fresh
      ),
      tuple(
        (i, x._def)
        for i, x in enumerate(self.leaves)
        if isinstance(x, Variable) and x._def is not self._defs[i]
      ),
    )
    with as_kept():
      values = [self.leaves[i].get_value() for i in written]
      return Outputs(values, [carried_leaf(x) for x in fresh], spec)

  def _is_written(self, index: int) -> bool:
    """A Ref that came in is written in place; one made on entering, and an array, are carried."""
    leaf, cell = self.leaves[index], self._cells[index]
    if not isinstance(leaf, Variable) or _jax.is_ref(cell):
      return False
    old, new = jax.tree.leaves(cell), jax.tree.leaves(leaf._cell)
    return len(old) != len(new) or any(a is not b for a, b in zip(old, new, strict=True))


def enter_variable(cls: type[Variable], definition: VariableDef, entered: Entered) -> Variable:
  """A Variable on a value inside a transform."""
  if entered.selected is not None:
    definition = definition.as_selected(entered.selected)
  if entered.attached:
    definition = definition.as_attached()
  cell = entered.value
  if entered.hijax:
    cell = jax.tree.map(_jax.new_cell, cell)
  return cls._handle(cell, definition)


def carried_leaf(leaf: Any) -> Any:
  """A leaf in the form that JAX can return: a Variable with arrays for Refs."""
  if not isinstance(leaf, Variable):
    return leaf
  definition = leaf._def.elsewhere() if leaf._def.selected else leaf._def
  return leaf._handle(leaf.get_value() if leaf.is_hijax else leaf._cell, definition)


def fresh_leaf(leaf: Any, hijax: bool) -> Any:
  """A new leaf for the caller: in hijax storage, the array becomes a cell of its own."""
  if not hijax:
    return leaf
  return leaf._handle(jax.tree.map(_jax.new_cell, storable(leaf, leaf._cell)), leaf._def)


def storable(variable: Variable, value: Any) -> Any:
  """The value as a Ref may store it: without a tangent, or refused, and in a buffer of its own.

  What JAX returns may be an array that went in, or one array in two places.
  """

  def own(x: Any) -> Any:
    x = storage.stored(x, variable._def.origin, detached=variable.drops_gradients, hijax=True)
    return storage.as_array(x)

  return jax.tree.map(own, value)


def install(variable: Variable, value: Any) -> None:
  """Store the value that a transform computed for a caller's Variable."""
  if not variable.is_hijax:
    variable._cell = value
    return
  refs, new = jax.tree.leaves(variable._cell), jax.tree.leaves(storable(variable, value))
  for ref, x in zip(refs, new, strict=True):
    storage.write_ref(ref, x, None, variable._def.origin)
