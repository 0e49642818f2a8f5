"""Variable: a typed, named handle to one storage cell, and the types of Variables.

A Variable is a pytree node of its own: its one child is the cell, its metadata is static. Several
handles may share a cell (after `split`, inside a transform); what one writes, all see.
"""

import collections
import copy as copylib
import itertools
import operator
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Generic, NamedTuple, TypeGuard, TypeVar, cast

import jax
import jax.numpy as jnp

from refax import _jax, config
from refax.core import annotation, mesh, storage, text
from refax.core.array_protocol import ArrayProtocol, unwrap
from refax.core.definition import Origin, VariableDef
from refax.core.epoch import epoch
from refax.core.gather import GATHERED, gathered
from refax.core.mesh import enter_mesh, objects_enter_mesh
from refax.core.observe import before_write, is_read_without_tangent, note
from refax.errors import (
  DifferentiatedWriteError,
  RefArgumentError,
  ShapeMismatchError,
  StaticAttributeError,
  TraceContextError,
  TreeMismatchError,
)

A = TypeVar("A")
_ARRAY = jax.tree.structure(0)  # what an array is, as a pytree
_SLOTS = frozenset(("_cell", "_def", "_trace"))
_OF_CONCRETE_ARRAYS = frozenset(("block_until_ready", "devices", "tobytes", "tolist"))
"""Methods that arrays have and `jax.Array`, which tracers are too, has not."""


class Writes(NamedTuple):
  """A checked write: (Ref, new value, what the user gave), and the cell afterwards."""

  refs: list[tuple[Any, jax.Array, Any]]
  cell: Any


class Variable(ArrayProtocol, Generic[A]):
  """A typed handle to one storage cell that is read and written like an array.

  Args:
    value: a number, a NumPy or JAX array, or a pytree of these; copied into the cell.
    is_hijax: True for a `jax.Ref` cell that JAX transforms update in place, False for a plain
      array; by default what `nnx.use_hijax` says.
    **metadata: hashable facts about the Variable; read as attributes. `out_sharding` names, for
      each axis of the array, the axis of the mesh that divides it (or a logical axis, see
      `nnx.logical_axis_rules`; or None); in a mesh the Variable is laid out so when it is made.

  Raises:
    StaticAttributeError: a value in the metadata is not hashable, or `value` is a `jax.Ref`.
    ShardingError: `out_sharding` fits neither the array nor the mesh.

  >>> from refax import nnx; import jax
  >>> count = nnx.Variable(0)
  >>> @jax.jit
  ... def increment(count):
  ...   count[...] += 1
  >>> increment(count); increment(count)
  >>> int(count)
  2
  """

  __slots__ = ("_node", "_trace", "__weakref__")
  _flat: ClassVar[Any]
  """The descriptor of `_node`, by which JAX takes a Variable apart."""
  _node: tuple[tuple[Any], VariableDef]  # the cell and the static half, as JAX flattens a Variable
  _trace: Any

  is_lenient: ClassVar[bool] = False
  """For `refax.compat`: whether lojax Variables take values of any shape and dtype."""

  accept: ClassVar[Callable[..., Any] | None] = None
  """For `refax.compat`: from what a constructor was given to what it understands."""

  detached: ClassVar[bool] = False
  """Whether what is stored carries no gradient, by definition of the type."""

  def __init__(self, value: A, *, is_hijax: bool | None = None, **metadata: Any):
    if Variable.accept is not None:
      value, is_hijax, metadata = Variable.accept(self, value, is_hijax, metadata)
    if isinstance(value, annotation.Annotated):
      value, metadata = value.value, {**value.metadata, **metadata}
    value = cast(A, unwrap(value))
    if any(_jax.is_ref(leaf) for leaf in jax.tree.leaves(value)):
      raise StaticAttributeError.ref()
    origin = Origin(type(self).__name__)
    if not annotation.NAMES.isdisjoint(metadata):
      value, metadata = annotation.applied(value, metadata, origin)
    definition = VariableDef(metadata, origin)
    if is_hijax is not None:
      self._make(value, is_hijax, definition)
    elif _is_local(value):
      self._make(value, False, definition)
      definition.hijax = True  # once it is handed out
    else:
      self._make(value, config.using_hijax(), definition)

  def __init_subclass__(cls, **kwargs):
    super().__init_subclass__(**kwargs)
    _register(cls)

  def _make(self, value: Any, hijax: bool, definition: VariableDef) -> None:
    _set_trace(self, _jax.trace_state())
    _set_node(self, ((None,), definition))
    definition.hijax = hijax
    self._cell = self._new_cell(value, hijax)

  def _new_cell(self, value: Any, hijax: bool) -> Any:
    leaves, treedef = ([value], _ARRAY) if storage.is_array(value) else jax.tree.flatten(value)
    hijax = hijax and all(map(storage.is_array_like, leaves))

    def new(leaf):
      if not storage.is_array_like(leaf):
        return leaf
      leaf = storage.as_array(leaf, hijax)
      leaf = storage.stored(leaf, self._def.origin, detached=self.drops_gradients, hijax=hijax)
      return _jax.new_cell(leaf) if hijax else leaf

    return new(value) if treedef is _ARRAY else treedef.unflatten(map(new, leaves))

  @classmethod
  def _handle(cls, cell: Any, definition: VariableDef, trace: Any = None) -> "Variable":
    """A Variable on an existing cell; validates nothing. `trace` is the trace state of now."""
    self = _new(cls)
    _set_node(self, ((cell,), definition))
    _set_trace(self, _jax.trace_state() if trace is None else trace)
    return self

  @classmethod
  def _taking(cls, value: jax.Array, like: "Variable") -> "Variable":
    """A Variable whose cell takes over a concrete array that nobody else has, uncopied.

    Args:
      value: the array.
      like: a Variable with the same metadata, made in the same place.
    """
    hijax, value = config.using_hijax(), storage.strong(value)
    has_cell = hijax and not _is_local(value)
    return cls._handle(_jax.new_cell(value) if has_cell else value, like._def.elsewhere(hijax))

  @classmethod
  def _unflatten(cls, definition: VariableDef, children: Iterable[Any]) -> "Variable":
    """As JAX rebuilds a Variable; raises RefArgumentError in a function that it differentiates."""
    children, now = tuple(children), _jax.trace_state()
    if now is not _jax.EAGER and _jax.is_differentiated_ref(children[0]):
      raise RefArgumentError.gradient(definition.origin)
    self = _new(cls)
    _set_node(self, (children, definition))
    _set_trace(self, now)
    return self

  @property
  def drops_gradients(self) -> bool:
    """Whether it stores values without gradients: its type is detached, and not in `through=`."""
    if not self.detached or self._node[1].attached:
      return False
    return self.is_hijax or not Variable.is_lenient  # in Flax, arrays keep theirs

  @property
  def _cell(self) -> Any:
    return self._node[0][0]

  @_cell.setter
  def _cell(self, cell: Any) -> None:
    _set_node(self, ((cell,), self._node[1]))

  @property
  def _def(self) -> VariableDef:
    return self._node[1]

  @_def.setter
  def _def(self, definition: VariableDef) -> None:
    _set_node(self, (self._node[0], definition))

  # storage
  @property
  def is_hijax(self) -> bool:
    """Whether the cell is a `jax.Ref`, updated in place by JAX transforms.

    An abstract Variable, which holds a `jax.ShapeDtypeStruct`, says which storage it will have when
    it gets an array.
    """
    cell = self._node[0][0]
    if type(cell) is jax.Ref:
      return True
    if isinstance(cell, jax.Array):
      return _jax.is_ref(cell)
    leaves = jax.tree.leaves(cell)
    return any(map(_jax.is_ref, leaves)) or (self._def.hijax and any(map(_is_abstract, leaves)))

  def get_raw_value(self) -> Any:
    """The cell itself: a `jax.Ref` (hijax), an array (lojax), or a pytree of them."""
    return self._cell

  def set_raw_value(self, cell: Any) -> None:
    """Replace the cell, without a check of shape or dtype."""
    if _jax.is_ref(cell) or self.is_hijax:
      epoch.bump()  # sharing is seen by the identity of Refs
    self._cell = cell

  def get_value(self, *, index: Any = ...) -> Any:
    """The value, or its part at `index`, as arrays that no later step changes or donates."""
    cell = self._cell
    if _jax.is_ref(cell):
      enter_mesh((cell,))
      note(self, cell)
      value = _jax.read_cell(cell, has_no_tangent=is_read_without_tangent(cell))
    elif isinstance(cell, jax.Array):
      note(self, cell)
      value = cell
    else:
      value = jax.tree.map(self._read_part, cell)
    how = self._def.gathered
    if how is not None and not self._def.is_gradient:
      value = jax.tree.map(lambda x: gathered(x, how), value)
    return value if index is ... else value[unwrap(index)]

  @property
  def value(self) -> Any:
    """The value: what `v[...]` reads and `v[...] = x` writes."""
    return self.get_value()

  @value.setter
  def value(self, value: Any) -> None:
    self.set_value(value)

  def _read_part(self, cell: Any) -> Any:
    if not _jax.is_ref(cell):
      return cell
    enter_mesh((cell,))
    note(self, cell)
    return _jax.read_cell(cell, has_no_tangent=is_read_without_tangent(cell))

  def set_value(self, value: A | Any, *, index: Any = ...) -> None:
    """Write the value, or its part at `index`; the shape and dtype stay those of the cell.

    Raises:
      ShapeMismatchError: the value does not broadcast to the cell or has another dtype.
      TreeMismatchError: a hijax Variable that holds a pytree got another structure.
      TraceContextError: a lojax Variable is written inside a transform that it came to by closure.
      DifferentiatedWriteError: the Variable, or the value, is being differentiated.
    """
    cell = self._cell
    if index is ... and self._is_plain_write(value):
      enter_mesh((cell,))
      note(self, cell)
      before_write(cell)
      _jax.write_copy(cell, value)
      return
    if index is ... and self._is_write_from_host(value):
      new = storage.fit(value, cell, self._def.origin)
      note(self, cell)
      storage.write_ref(cell, new, value, self._def.origin)
      return
    self.commit(self.prepare(value, index=index))

  def _is_plain_write(self, value: Any) -> TypeGuard[jax.Array]:
    """Whether a write is a copy of an array into a concrete Ref and nothing else, as most are."""
    cell = self._cell
    return (
      type(cell) is jax.Ref
      and isinstance(value, jax.Array)
      and _jax.is_write_now(cell, value)
      and not self._def.selected
    )

  def _is_write_from_host(self, value: Any) -> bool:
    """Whether a number or an array of NumPy is written to a concrete Ref, in one step."""
    return (
      type(self._cell) is jax.Ref
      and isinstance(value, storage.HOST)
      and _jax.no_trace_active()
      and not self._def.selected
    )

  def prepare(self, value: Any, *, index: Any = ...) -> "Writes":
    """Check a write and convert its value; `commit` then cannot fail half-way."""
    cell = self._cell
    if index is ... and self._is_plain_write(value):
      return Writes([(cell, value, value)], cell)
    if index is ... and storage.is_exact(value, cell):
      self._check_writable()
      hijax = _jax.is_ref(cell)
      new = storage.stored(value, self._def.origin, detached=self.drops_gradients, hijax=hijax)
      return Writes([(cell, new, value)], cell) if hijax else Writes([], new)
    value = jax.tree.map(unwrap, value, is_leaf=is_variable)
    self._check_writable()
    if not isinstance(cell, jax.Array | jax.Ref) and any(map(_is_abstract, jax.tree.leaves(cell))):
      return self._filled(value)
    if index is not ...:
      value = self._indexed(unwrap(index), value)
    elif Variable.is_lenient and not self.is_hijax:
      return Writes([], self._new_cell(value, hijax=False))
    cells, treedef = jax.tree.flatten(self._cell)
    if len(cells) == 1 and cells[0] is self._cell and isinstance(value, list | tuple):
      values, got = [value], treedef  # nested lists of numbers for an array
    else:
      values, got = jax.tree.flatten(value)
    if treedef != got:
      if len(cells) == 1 and cells[0] is self._cell:
        raise ShapeMismatchError.not_an_array(self._def.origin, self._aval(), value)
      if self.is_hijax:
        raise TreeMismatchError.value(self._def.origin, treedef, got)
      return Writes([], self._new_cell(value, hijax=False))
    new = list(map(self._fit, cells, values))
    if cells and _jax.is_ref(cells[0]):
      return Writes(list(zip(cells, new, values, strict=True)), self._cell)
    return Writes([], treedef.unflatten(new))

  def _filled(self, value: Any) -> "Writes":
    """The first write to an abstract Variable: a cell of the storage that it was to have."""
    origin = self._def.origin
    cells, treedef = jax.tree.flatten(self._cell)
    values, got = jax.tree.flatten(value)
    if treedef != got:
      raise TreeMismatchError.value(origin, treedef, got)

    def new(cell: Any, x: Any) -> Any:
      if isinstance(x, jax.ShapeDtypeStruct) or not _is_abstract(cell):
        return x
      x = storage.as_array(storage.fit(x, cell, origin), self._def.hijax)
      x = storage.stored(x, origin, detached=self.drops_gradients, hijax=self._def.hijax)
      return _jax.new_cell(x) if self._def.hijax else x

    return Writes([], treedef.unflatten(map(new, cells, values)))

  def commit(self, writes: "Writes") -> None:
    """Store what `prepare` has checked."""
    if not isinstance(writes.cell, jax.Array) and writes.cell is not self._cell:
      epoch.bump()  # an abstract Variable has become a real one: sharing is seen by its Ref
    for ref, new, given in writes.refs:
      note(self, ref)
      storage.write_ref(ref, new, given, self._def.origin)
    if writes.cell is not self._cell:
      self._cell = writes.cell

  def _fit(self, cell: Any, value: Any) -> Any:
    """`value` as it will be stored in `cell`; nothing is written yet."""
    hijax = _jax.is_ref(cell)
    if not hijax and not storage.is_array(cell):
      return value
    if not hijax and isinstance(value, jax.ShapeDtypeStruct):
      return value  # an abstract model
    new = storage.fit(value, cell, self._def.origin)
    return storage.stored(new, self._def.origin, detached=self.drops_gradients, hijax=hijax)

  def _indexed(self, index: Any, value: Any) -> Any:
    old = self.get_value()
    if isinstance(old, jax.Array):
      return storage.fit_index(old, index, value, self._def.origin)
    new = copylib.copy(old)
    new[index] = value
    return new

  def _check_writable(self) -> None:
    if self._def.selected:
      raise DifferentiatedWriteError.selected(self._def.origin)
    if not self.is_hijax and self._trace != _jax.trace_state():
      raise TraceContextError.variable(self._def.origin, is_array_for_now=self._def.hijax)

  def __delitem__(self, index) -> None:
    value = copylib.copy(self.get_value())
    del value[index]
    self.set_value(value)

  # facts that need no read
  def _aval(self) -> Any:
    cell = self._cell
    return cell if _jax.is_ref(cell) or isinstance(cell, jax.Array) else self.get_value()

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the array."""
    return self._aval().shape

  @property
  def dtype(self) -> Any:
    """The dtype of the array."""
    return self._aval().dtype

  @property
  def ndim(self) -> int:
    """The number of axes."""
    return len(self._aval().shape)

  @property
  def size(self) -> int:
    """The number of elements."""
    return self._aval().size

  @property
  def nbytes(self) -> int:
    """The number of bytes of all elements."""
    return self.size * self.dtype.itemsize

  @property
  def sharding(self) -> Any:
    """How the array is laid out over devices."""
    return self._aval().sharding

  @property
  def sharding_names(self) -> Any:
    """The names of the axes in the metadata `out_sharding`; None without."""
    return self._def.metadata.get("out_sharding")

  # metadata
  def get_metadata(self, name: str | None = None, default: Any = None) -> Any:
    """The metadata as a dict, or one entry of it."""
    metadata = self._def.metadata
    return dict(metadata) if name is None else metadata.get(name, default)

  def set_metadata(self, **metadata: Any) -> None:
    """Add to the metadata, or change it."""
    self._check_writable()
    epoch.bump()  # metadata is part of what jax.jit compiles for
    if not annotation.NAMES.isdisjoint(metadata):
      metadata = annotation.named(metadata)
    self._def = self._def.with_metadata(self._def.metadata | metadata)

  def has_metadata(self, name: str) -> bool:
    """Whether the metadata has an entry `name`."""
    return name in self._def.metadata

  def __getattr__(self, name: str) -> Any:
    if name.startswith("_"):
      raise AttributeError(name)
    metadata = self._def.metadata
    if name in metadata:
      return metadata[name]
    known = hasattr(jax.Array, name) or name in _OF_CONCRETE_ARRAYS
    if not known and isinstance(self._cell, jax.Array | jax.Ref):
      raise AttributeError(f"{type(self).__name__} has no attribute or metadata {name!r}")
    return getattr(self.get_value(), name)

  def __setattr__(self, name: str, value: Any) -> None:
    if name in _SLOTS or isinstance(getattr(type(self), name, None), property):
      object.__setattr__(self, name, value)
      return
    fix = f"for metadata: v.set_metadata({name}=...)"
    raise AttributeError(f"cannot set {name!r} of a {type(self).__name__}; {fix}")

  # copies
  def with_storage(self, hijax: bool) -> "Variable":
    """A copy with a cell of its own of this kind; metadata and origin are kept."""
    return self._handle(self._copied_cell(hijax), self._def.elsewhere(hijax))

  def _copied_cell(self, hijax: bool) -> Any:
    """A cell of this kind with the same value. Each array of it is copied once."""
    cells, treedef = jax.tree.flatten(self._cell)
    if not cells or not _jax.no_trace_active() or not all(type(x) is jax.Ref for x in cells):
      return self._new_cell(self.get_value(), hijax)
    copies = list(map(self._read_part, cells))
    return treedef.unflatten(map(_jax.new_cell, copies) if hijax else copies)

  def copy(self, value: Any = ..., **metadata: Any) -> "Variable":
    """A Variable with a cell of its own, with this value or another, and this metadata.

    >>> from refax import nnx
    >>> a = nnx.Param(1.0); b = a.copy(); b[...] = 2.0
    >>> float(a), float(b)
    (1.0, 2.0)
    """
    hijax = self.is_hijax
    definition = self._def.elsewhere(hijax)
    if metadata:
      definition = definition.with_metadata(self._def.metadata | metadata)
    if value is ...:
      return self._handle(self._copied_cell(hijax), definition)
    new = self._handle(None, definition)
    new._cell = new._new_cell(unwrap(value), hijax)
    return new

  replace = copy

  def __copy__(self) -> "Variable":
    return self._handle(self._cell, self._def)

  def __deepcopy__(self, memo) -> "Variable":
    key = (Variable, identity(self))  # handles that share a cell share the copy's
    shared = memo.get(key)
    memo[key] = new = self.copy() if shared is None else copylib.copy(shared)
    return new

  def __getstate__(self) -> dict[str, Any]:
    value = jax.tree.map(lambda x: _PickledKey(x) if _is_key(x) else x, self.get_value())
    metadata = {k: x for k, x in self._def.metadata.items() if k != GATHERED}  # it has a mesh
    return {"value": value, "is_hijax": self.is_hijax, "metadata": metadata}

  def __setstate__(self, state: dict[str, Any]) -> None:
    is_key = lambda x: isinstance(x, _PickledKey)
    value = jax.tree.map(lambda x: x.key() if is_key(x) else x, state["value"], is_leaf=is_key)
    definition = VariableDef(state["metadata"], Origin(type(self).__name__))
    self._make(value, state["is_hijax"], definition)

  def __repr_parts__(self, style: Any) -> tuple[text.Parts, Any]:
    value = jax.tree.map(_shown, self._cell)
    items = [("value=", value)]
    items += [(f"{name}=", v) for name, v in self._def.metadata.items()]
    if self.is_hijax:
      items.append(("is_hijax=", True))
    n, nbytes = text.size(self._cell)
    comment = text.count(n, nbytes) if n and not style.shapes else ""
    return text.Parts(f"{type(self).__name__}(", comment, items, ")"), style

  def __repr_line__(self, style: Any) -> text.Line | None:
    return text.variable_line(type(self).__name__, self._cell, self._def.metadata, style)

  def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
    return text.as_tree(self, path, subtree_renderer)

  def __repr__(self) -> str:
    return text.render(self)

  __str__ = __repr__


def _shown(cell: Any) -> Any:
  """What is printed for a cell: its value, or its type where a read would be traced."""
  if not _jax.is_ref(cell):
    return cell
  return _jax.peek_cell(cell) if not _jax.is_tracer(cell) else text.Tracer(cell)


def _is_local(value: Any) -> bool:
  """Whether a Variable with this value could hold what is being differentiated."""
  if _jax.no_trace_active() or not config.using_hijax():
    return False
  if not config.are_variables_local() and not _jax.is_differentiating():
    return False
  dtypes = (jnp.result_type(x) for x in jax.tree.leaves(value) if storage.is_array_like(x))
  return any(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes)


def _is_abstract(x: Any) -> bool:
  return isinstance(x, jax.ShapeDtypeStruct)


def _is_key(x: Any) -> bool:
  return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


class _PickledKey:
  """A typed PRNG key as its bits and the name of its implementation; JAX cannot pickle keys."""

  def __init__(self, key: jax.Array):
    self.data = jax.random.key_data(key)
    self.impl = str(jax.random.key_impl(key))

  def key(self) -> jax.Array:
    return jax.random.wrap_key_data(self.data, impl=self.impl)


class CellKey(jax.tree_util.GetAttrKey):
  """The step of a key path from a Variable to its cell: `value` by name, nothing to show.

  A subclass of a key of JAX's own, for who looks at key paths knows these: orbax names files by it.
  """

  __slots__ = ()

  def __str__(self) -> str:
    return ""

  __repr__ = __str__


_CELL_KEY = CellKey("value")


# JAX makes and takes apart every Variable of a model in each call: in C, a third of the time.
_new = object.__new__
_set_node, _set_trace = (vars(Variable)[slot].__set__ for slot in ("_node", "_trace"))
Variable._flat = vars(Variable)["_node"]
_flatten = operator.attrgetter("_flat")


def _look_for_meshes() -> None:
  """From now on, a Variable that JAX takes apart enters the mesh of now first.

  Not before there are several devices: a function in Python takes 0.2 us, five times as long.
  """
  Variable._flat = property(lambda v: (objects_enter_mesh((v,)), v._node)[1])
  mesh.is_possible = True


_jax.on_several_devices = _look_for_meshes

store_cell = _set_node
"""`store_cell(variable, ((cell,), definition))` in C: no signal comes between two of them."""


def make_variables(
  classes: Iterable[type[Variable]],
  cells: Iterable[tuple[Any]],
  definitions: Iterable[VariableDef],
  trace: Any,
) -> list[Variable]:
  """Variables on existing cells, `(cell,)` for each; validates nothing.

  Args:
    classes: their types.
    cells: what they hold.
    definitions: their static halves.
    trace: the trace state of now.
  """
  made = list(map(_new, classes))
  collections.deque(map(_set_node, made, zip(cells, definitions, strict=True)), 0)
  collections.deque(map(_set_trace, made, itertools.repeat(trace)), 0)
  return made


def handles(leaves: Iterable[Any]) -> list[Any]:
  """Leaves with another handle on the same cell for each Variable among them.

  >>> from refax import nnx
  >>> a = nnx.Variable(1); (b, x) = handles([a, 2.0])
  >>> b[...] = 3; int(a), x
  (3, 2.0)
  """
  return replaced(leaves, _handles)


def _handles(variables: list[Variable]) -> list[Variable]:
  cells, definitions = zip(*(v._node for v in variables), strict=True) if variables else ((), ())
  return make_variables(map(type, variables), cells, definitions, _jax.trace_state())


def replaced(
  leaves: Iterable[Any],
  others: Callable[[list[Variable]], Iterable[Variable]],
  is_wanted: Callable[[int, Variable], bool] = lambda i, v: True,
) -> list[Any]:
  """Leaves with others in the places of the Variables among them, which are made all at once.

  Args:
    leaves: the leaves.
    others: from Variables to those that take their places.
    is_wanted: from the index of a Variable, and the Variable, to whether it is replaced.
  """
  found = list(leaves)
  places = [i for i, x in enumerate(found) if isinstance(x, Variable) and is_wanted(i, x)]
  for i, new in zip(places, others([found[i] for i in places]), strict=True):
    found[i] = new
  return found


def _register(cls: type[Variable]) -> None:
  def flatten_with_keys(v: Variable):
    if _jax.orbax_flattens() and any(map(_jax.is_ref, jax.tree.leaves(v._cell))):
      raise RefArgumentError.orbax(v._def.origin)
    objects_enter_mesh((v,))
    return ((_CELL_KEY, v._cell),), v._def

  jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, cls._unflatten, _flatten)


_register(Variable)


class Param(Variable[A]):
  """A trainable parameter: what `nnx.grad` differentiates by default.

  >>> from refax import nnx
  >>> nnx.Param(1.0).is_hijax
  True
  """


class BatchStat(Variable[A]):
  """A running statistic. Detached: what is written to it carries no gradient.

  >>> from refax import nnx
  >>> nnx.BatchStat(0.0).detached
  True
  """

  detached = True


class Cache(Variable[A]):
  """Memory between calls, as of an autoregressive decoder.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> cache = nnx.Cache(jnp.zeros(3)); cache[1] = 5.0
  >>> cache[...].tolist()
  [0.0, 5.0, 0.0]
  """


class Intermediate(Variable[A]):
  """A value from inside a model, kept by `Module.sow`.

  >>> from refax import nnx
  >>> nnx.Intermediate((1.0, 2.0))[1]
  Array(2., dtype=float32)
  """


class Perturbation(Intermediate[A]):
  """A zero added to an intermediate value, whose gradient is that of the value.

  >>> from refax import nnx
  >>> issubclass(nnx.Perturbation, nnx.Intermediate)
  True
  """


def is_variable(x: Any) -> bool:
  """Whether `x` is a Variable; for `is_leaf=`."""
  return isinstance(x, Variable)


def identity(v: Variable) -> int:
  """What two Variables have in common exactly when they share a cell."""
  cell = v._node[0][0]
  if type(cell) is jax.Ref:
    return id(cell)
  if not _jax.is_ref(cell) and not isinstance(cell, jax.Array):
    cell = next((leaf for leaf in jax.tree.leaves(cell) if _jax.is_ref(leaf)), None)
  return id(cell) if _jax.is_ref(cell) else id(v)


def borrowed(v: Variable) -> Any:
  """The value of a Variable for a computation that hands out nothing of it: it is not copied.

  What comes of it must be arrays of their own: results of compiled functions, or copies. The buffer
  of a Ref is donated by later steps, so it must not be kept, and no user may see it.
  """
  cell = v._cell
  if type(cell) is not jax.Ref or not _jax.no_trace_active():
    return v.get_value()
  if _jax.may_take():  # before it is used
    return v.get_value()
  enter_mesh((cell,))
  note(v, cell)
  return _jax.peek_cell(cell)


def map_variables(fn: Callable[[Variable], Any], tree: Any) -> Any:
  """`tree` with every Variable replaced by `fn(variable)`, once for each cell."""
  done: dict[int, tuple[Variable, Any]] = {}

  def once(x):
    if not isinstance(x, Variable):
      return x
    key = identity(x)
    if key not in done:
      done[key] = (x, fn(x))
    return done[key][1]

  return jax.tree.map(once, tree, is_leaf=is_variable)
