"""Pytree: a mutable Python object that is a JAX pytree at the same time.

An attribute is data (Variables, arrays, other Pytrees, containers of these) or static (all the
rest: numbers, strings, functions), which is part of the structure that JAX compiles for.
"""

import copy as copylib
import dataclasses
import weakref
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Annotated, Any, ClassVar, Generic, TypeVar, dataclass_transform

import jax
import numpy as np

from refax import _jax
from refax.core import brief, storage, text
from refax.core.by_value import ByValue, NotByValue, has_hash
from refax.core.callables import CALLABLES, taken_apart
from refax.core.definition import kind
from refax.core.flatten import Walk, captured, is_part, register
from refax.core.node import Node, Tracked, set_attribute
from refax.core.rebuild import adopt, fill, resolver
from refax.core.variable import Variable
from refax.core.watch import MISSING
from refax.errors import StaticAttributeError, TraceContextError
from refax.typing import path_str

T = TypeVar("T")

_MARK = "refax.dynamic"
Data = Annotated[T, (_MARK, True)]
"""The annotation of an attribute that is data: `table: nnx.Data[dict[str, jax.Array]]`."""
Static = Annotated[T, (_MARK, False)]
"""The annotation of an attribute that is static: `sizes: nnx.Static[list[int]]`."""

converters: dict[type, Callable[[Any], Any]] = {}
"""What a built-in container becomes when it is assigned to an attribute; filled by `containers`."""


PLAIN = frozenset((type(None), bool, int, float, str, type))
"""Types of values that are static without a closer look."""


DATA_TYPES: set[type] = set()
"""Types whose values are data, whatever is in them; filled by `refax.compat`."""


class Explicit(Generic[T]):
  """A value that the user has marked as data or static; unwrapped by the assignment."""

  __slots__ = ("dynamic", "value")

  def __init__(self, value: T, dynamic: bool):
    self.value = value
    self.dynamic = dynamic


def data(value: T = MISSING, /, **options: Any) -> T:
  """Mark an attribute's value as data: a pytree whose leaves are arrays. It stays as it is.

  The next value of the attribute is data too, unless it is marked as `nnx.static`.

  Args:
    value: the value; without it, this is the field of a dataclass.
    **options: as those of `dataclasses.field`: `default`, `default_factory`, `init`, ...

  >>> from refax import nnx; import jax
  >>> class M(nnx.Module):
  ...   def __init__(self):
  ...     self.table = nnx.data({"a": 1.0})     # a plain dict, its numbers are leaves
  >>> jax.tree.leaves(M())
  [1.0]
  """
  return _marked(value, True, options)


def static(value: T = MISSING, /, **options: Any) -> T:
  """Mark an attribute's value as static: part of what JAX compiles for.

  Args:
    value: the value; without it, this is the field of a dataclass.
    **options: as those of `dataclasses.field`: `default`, `default_factory`, `init`, ...

  >>> from refax import nnx; import jax
  >>> class M(nnx.Module):
  ...   def __init__(self):
  ...     self.sizes = nnx.static((1, 2))
  >>> jax.tree.leaves(M())
  []
  """
  return _marked(value, False, options)


def _marked(value: Any, dynamic: bool, options: dict[str, Any]) -> Any:
  if value is MISSING:
    metadata = dict(options.pop("metadata", None) or {})
    return dataclasses.field(**options, metadata=metadata | {_MARK: dynamic})
  if options:
    raise TypeError("nnx.data and nnx.static take a value, or options for a dataclass's field")
  return Explicit(value, dynamic)


def marks_of(cls: type) -> dict[str, bool]:
  """The attributes that a class declares as data or static, by annotations or as fields."""
  found: dict[str, bool] = {}
  for name, annotation in vars(cls).get("__annotations__", {}).items():
    if isinstance(annotation, str):  # `from __future__ import annotations`
      head = annotation.partition("[")[0].rpartition(".")[2].strip()
      if head in ("Data", "Static") and "[" in annotation:
        found[name] = head == "Data"
    else:
      marks = getattr(annotation, "__metadata__", ())
      found.update((name, x[1]) for x in marks if isinstance(x, tuple) and x[:1] == (_MARK,))
  for name, value in vars(cls).items():
    if isinstance(value, dataclasses.Field) and _MARK in value.metadata:
      found[name] = value.metadata[_MARK]
  return found


@dataclass_transform(field_specifiers=(dataclasses.field, data, static))
def dataclass(cls: Any = None, /, **options: Any) -> Any:
  """`dataclasses.dataclass` for a Pytree or Module, which keeps its own `repr`.

  Args:
    cls: the class; without it, a decorator is returned.
    **options: those of `dataclasses.dataclass`.

  >>> from refax import nnx; import jax, jax.numpy as jnp
  >>> @nnx.dataclass
  ... class Point(nnx.Pytree):
  ...   x: jax.Array
  ...   weights: list = nnx.data(default_factory=lambda: [1.0, 2.0])
  ...   name: str = "p"
  >>> jax.tree.leaves(Point(jnp.zeros(())))
  [1.0, 2.0, Array(0., dtype=float32)]
  """
  decorate = lambda cls: dataclasses.dataclass(cls, **{"repr": False} | options)
  return decorate if cls is None else decorate(cls)


def is_data(value: Any) -> bool:
  """Whether a value, assigned to an attribute, is data.

  >>> from refax import nnx
  >>> nnx.is_data(nnx.Param(1.0)), nnx.is_data("relu")
  (True, False)
  """
  if isinstance(value, Explicit):
    return value.dynamic
  if isinstance(value, Variable | Node | Tracked | np.ndarray | jax.ShapeDtypeStruct):
    return True
  if type(value) in DATA_TYPES:
    return True
  if isinstance(value, jax.Array) or _jax.is_ref(value):
    return True
  if type(value) in CALLABLES:
    return any(map(is_part, taken_apart(value)[0])) and captured(value) is not None
  if isinstance(value, list | tuple | dict):
    return any(map(is_data, value.values() if isinstance(value, dict) else value))
  if value is None or jax.tree_util.all_leaves([value]):
    return False
  return any(map(is_data, jax.tree.leaves(value, is_leaf=lambda x: isinstance(x, Node | Variable))))


def classify(value: Any, at: Callable[[], str]) -> tuple[Any, bool]:
  """The value as it is kept in an attribute, and whether it is data.

  Raises:
    StaticAttributeError: it is not data and not hashable.
  """
  if type(value) in PLAIN:
    return value, False
  if isinstance(value, Variable | Node):
    return value, True
  if type(value) is FunctionType:
    _check_captures(value, at)
    return value, False
  if isinstance(value, Explicit):
    value, dynamic = value.value, value.dynamic
  else:
    dynamic = is_data(value)
    convert = converters.get(type(value))
    if convert is not None and (dynamic or type(value) is not tuple):
      return convert(value), True
  if not dynamic:
    try:
      if not has_hash(value):
        ByValue(value)
    except NotByValue as error:
      raise StaticAttributeError.unhashable(at(), value, str(error)) from None
    if callable(value):
      _check_captures(value, at)
  elif type(value) in CALLABLES:
    for part in taken_apart(value)[0]:
      if not is_part(part):
        classify(part, at)  # it is static: hashable, and holds no object that cannot be followed
  return value, dynamic


def _check_captures(value: Any, at: Callable[[], str]) -> None:
  """Raise StaticAttributeError if a static function holds an object that cannot be exchanged."""
  if type(value) is FunctionType and value in _holds_nothing:
    return
  found = captured(value)
  if found is not None:
    raise StaticAttributeError.captures(at(), value, found)
  if type(value) is FunctionType:
    _holds_nothing.add(value)


_holds_nothing: "weakref.WeakSet[FunctionType]" = weakref.WeakSet()
"""Functions that have been looked through: layers share theirs, and a look takes 5 us."""


_set_class = vars(object)["__class__"].__set__


_SAYS_WHAT_IT_IS = (Explicit, jax.Array, Node, Variable)


class Pytree(Node):
  """A mutable object that passes through JAX transforms.

  Subclass it as any Python class. Assign Variables, arrays, other Pytrees and lists or dicts of
  them as attributes; everything else must be hashable and is static.

  >>> from refax import nnx; import jax
  >>> class Counter(nnx.Pytree):
  ...   def __init__(self):
  ...     self.count = nnx.Variable(0)
  >>> counter = Counter()
  >>> @jax.jit
  ... def increment(counter):
  ...   counter.count[...] += 1
  >>> increment(counter)
  >>> int(counter.count)
  1
  """

  __slots__ = ()
  _declared: ClassVar[dict[str, bool]] = {}
  """The attributes that are declared as data (True) or static."""

  def __init_subclass__(cls, *, pytree: bool = True, **kwargs):
    """Args: `pytree`: taken for Flax's sake, where False keeps JAX from looking inside."""
    super().__init_subclass__(**kwargs)
    if declared := marks_of(cls):
      cls._declared = cls._declared | declared
    slots = vars(cls).get("__slots__")
    if slots and not cls.__module__.startswith("refax."):
      raise StaticAttributeError.slots(cls.__qualname__, slots)
    register(cls)

  def __setattr__(self, name: str, value: Any) -> None:
    old = self.__dict__.get(name, MISSING)
    declared = self._declared
    is_plain = type(value) in PLAIN and type(old) in PLAIN
    if is_plain and not declared and name not in self._pytree.dynamic:  # loops switch modes by it
      self._put(name, old, value, dynamic=False)
      return
    if isinstance(getattr(type(self), name, None), property):
      object.__setattr__(self, name, value)
      return
    if name == "__class__":
      self._exchange_class(value)
      return
    if name == "__dict__":
      self.__dict__.clear()
      self.__dict__.update(value)
      return
    if old is value and isinstance(value, Variable | Node):
      return  # `self.count += 1` has written it in place
    if isinstance(old, Variable) and storage.is_array_like(value):
      old.set_value(value)  # `self.count = self.count + 1` writes the Variable
      return
    if name in declared and not isinstance(value, Explicit):
      value = Explicit(value, declared[name])
    elif not isinstance(value, _SAYS_WHAT_IT_IS) and self._is_marked(name, old):
      value = Explicit(value, True)
    value, dynamic = classify(value, lambda: type(self).__name__ + path_str((name,)))
    self._put(name, old, value, dynamic=dynamic)

  def _exchange_class(self, cls: type) -> None:
    """Become an object of another class: `object.__setattr__` does it for IPython's autoreload."""
    self._check_trace("__class__")
    _set_class(self, cls)
    self._structure_changed(None)

  __class__ = property(type, _exchange_class)  # pyright: ignore

  def _is_marked(self, name: str, old: Any) -> bool:
    """Whether an attribute is data only because `nnx.data` says so: its next value is, too."""
    return name in self._pytree.dynamic and old is not MISSING and not is_data(old)

  def _put(self, name: str, old: Any, value: Any, *, dynamic: bool) -> None:
    """Set an attribute, which was `old`, to what `classify` has made of a value."""
    self._check_trace(name)
    state = self._pytree
    was_dynamic = name in state.dynamic
    if old is not MISSING and dynamic == was_dynamic and _same(old, value):
      return
    try:  # Ctrl-C may come between any two lines: a name that is data and missing does no harm
      if dynamic:
        state.dynamic.add(name)
      set_attribute(self.__dict__, name, value)
      if not dynamic:
        state.dynamic.discard(name)
    finally:
      before = {name: (old, was_dynamic)}
      self._structure_changed(before, (name,) if dynamic else (), () if dynamic else (name,))
    if dynamic:
      adopt(self, name, value)

  def _entries(self) -> Iterable[tuple[Any, Any, bool]]:
    dynamic = self._pytree.dynamic
    parameters = getattr(type(self), "__dataclass_params__", None)
    frozen = parameters is not None and parameters.frozen
    static = [x for name, x in self.__dict__.items() if name not in dynamic]
    if frozen or any(isinstance(x, Variable) for x in static):
      self._classify_all()
    return super()._entries()

  def _classify_all(self) -> None:
    """Look at attributes set by `object.__setattr__`, as a frozen dataclass sets all of its own."""
    dynamic = self._pytree.dynamic
    for name, value in list(self.__dict__.items()):
      if name not in dynamic and name not in self._memoized:
        kept, is_data = classify(value, lambda name=name: type(self).__name__ + path_str((name,)))
        set_attribute(self.__dict__, name, kept)
        if is_data:
          dynamic.add(name)
          adopt(self, name, kept)

  def _assign(self, name: str, value: Any) -> None:
    Pytree.__setattr__(self, name, value)  # past a frozen dataclass's own, as `__dict__` is

  def __delattr__(self, name: str) -> None:
    self._check_trace(name)
    before = {name: (self.__dict__.get(name, MISSING), name in self._pytree.dynamic)}
    try:
      object.__delattr__(self, name)
      self._pytree.dynamic.discard(name)
    finally:
      self._structure_changed(before, removed=(name,))

  def _check_trace(self, key: Any) -> None:
    if self._pytree.trace != _jax.trace_state():
      raise TraceContextError.attribute(type(self).__name__ + path_str((key,)))

  def __deepcopy__(self, memo: dict[int, Any]) -> Any:
    """A copy of everything below; static attributes are shared, for the structure is the same."""
    walk = Walk()
    graphdef = walk.graphdef(walk.entry(self))
    leaves = [copylib.deepcopy(leaf, memo) for leaf in walk.leaves]
    objects = [memo.get(id(node)) or Node.__new__(type(node)) for node in walk.objects]
    value = resolver(leaves, objects)
    for old, new, (_, entries) in zip(walk.objects, objects, graphdef.nodes, strict=True):
      if id(old) not in memo:
        memo[id(old)] = new
        fill(new, entries, value)
    return objects[0]

  def __getstate__(self) -> Any:
    return dict(self.__dict__), self._pytree.dynamic.intersection(self.__dict__)

  def __setstate__(self, state: Any) -> None:
    attributes, dynamic = state
    self._fill(attributes, dynamic)
    for key in dynamic:
      adopt(self, key, attributes[key])

  def __repr_parts__(self, style: Any) -> tuple[text.Parts, Any]:
    return brief.parts(self, style)

  def __repr_line__(self, style: Any) -> text.Line | None:
    return brief.line(self, style)

  def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
    return text.as_tree(self, path, subtree_renderer)

  def __repr__(self) -> str:
    return text.render(self)


register(Pytree)


def _same(old: Any, new: Any) -> bool:
  """Whether an assignment changes nothing: the same object, or an equal number or string."""
  if type(old) is not type(new) or not isinstance(new, int | float | str):
    return old is new
  return bool(old == new) and kind(old) == kind(new)
