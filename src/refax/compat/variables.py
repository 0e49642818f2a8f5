"""Variables with what Flax NNX's have besides: hooks, initial metadata, names of collections."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from refax import config
from refax.core.annotation import named
from refax.core.definition import Origin, VariableDef
from refax.core.variable import (
  BatchStat,
  Cache,
  Intermediate,
  Param,
  Perturbation,
  Variable,
)

HOOKS = ("on_get_value", "on_set_value", "on_create_value", "on_add_axis", "on_remove_axis")
STORAGE = ("hijax", "ref", "mutable", "use_ref")
_MISSING: Any = type("Missing", (), {"__repr__": lambda self: "MISSING"})()


@dataclasses.dataclass
class VariableMetadata:
  """A value with the metadata of the Variable that it is to become: what an initializer returns.

  >>> from refax.compat import nnx
  >>> nnx.Param(nnx.VariableMetadata(1.0, metadata={"tag": "a"})).tag
  'a'
  """

  raw_value: Any
  set_value_hooks: tuple = ()
  get_value_hooks: tuple = ()
  create_value_hooks: tuple = ()
  add_axis_hooks: tuple = ()
  remove_axis_hooks: tuple = ()
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def all_metadata(self) -> dict[str, Any]:
    """The metadata, the hooks included."""
    hooks = {
      "on_set_value": self.set_value_hooks,
      "on_get_value": self.get_value_hooks,
      "on_create_value": self.create_value_hooks,
      "on_add_axis": self.add_axis_hooks,
      "on_remove_axis": self.remove_axis_hooks,
    }
    return dict(self.metadata) | {name: tuple(fns) for name, fns in hooks.items() if fns}


def with_metadata(
  initializer: Callable[..., Any],
  on_set_value: Any = (),
  on_get_value: Any = (),
  on_create_value: Any = (),
  on_add_axis: Any = (),
  on_remove_axis: Any = (),
  **metadata: Any,
) -> Callable[..., Any]:
  """An initializer whose values bring metadata to the Variables that are made of them.

  >>> from refax.compat import nnx; import jax
  >>> init = nnx.with_metadata(nnx.initializers.zeros_init(), tag="bias")
  >>> nnx.Param(init(jax.random.key(0), (3,))).tag
  'bias'
  """
  hooks = [
    (fns,) if callable(fns) else tuple(fns)
    for fns in (on_set_value, on_get_value, on_create_value, on_add_axis, on_remove_axis)
  ]

  @functools.wraps(initializer)
  def wrapper(*args: Any, **kwargs: Any) -> VariableMetadata:
    return VariableMetadata(initializer(*args, **kwargs), *hooks, metadata=metadata)

  return wrapper


def with_partitioning(
  initializer: Callable[..., Any], sharding: Any, mesh: Any = None, **metadata: Any
) -> Callable[..., Any]:
  """An initializer whose Variables have the names of their axes in their metadata.

  >>> from refax.compat import nnx; import jax
  >>> init = nnx.with_partitioning(nnx.initializers.zeros_init(), ("embed", None))
  >>> nnx.Param(init(jax.random.key(0), (2, 3))).out_sharding
  ('embed', None)
  """
  return with_metadata(initializer, out_sharding=sharding, mesh=mesh, **metadata)


class Hooked:
  """The mixin of a Variable whose reads and writes go through functions in its metadata."""

  __slots__ = ()

  def get_value(self: Any, *, index: Any = _MISSING) -> Any:
    value = super().get_value() if index is _MISSING else super().get_value(index=index)  # pyright: ignore[reportAttributeAccessIssue]
    return _through(self, "on_get_value", value)

  def set_value(self: Any, value: Any, *, index: Any = _MISSING) -> None:
    value = _through(self, "on_set_value", value)
    if index is _MISSING:
      super().set_value(value)  # pyright: ignore[reportAttributeAccessIssue]
    else:
      super().set_value(value, index=index)  # pyright: ignore[reportAttributeAccessIssue]


def _through(variable: Variable, name: str, value: Any) -> Any:
  hooks = variable.get_metadata(name, None) or ()
  for hook in hooks if isinstance(hooks, tuple) else (hooks,):
    value = hook(variable, value)
  return value


@functools.cache
def _hooked(cls: type[Variable]) -> type[Variable]:
  return type(cls.__name__, (Hooked, cls), {"__slots__": (), "__module__": cls.__module__})


def accept(
  variable: Variable, value: Any, is_hijax: bool | None, metadata: dict[str, Any]
) -> tuple[Any, bool | None, dict[str, Any]]:
  """What Flax's constructor of a Variable understands, as Refax's; see `Variable.accept`."""
  if isinstance(value, VariableMetadata):
    metadata = value.all_metadata() | metadata
    value = value.raw_value
  storage = [metadata.pop(name) for name in STORAGE if name in metadata]
  storage = [x for x in storage if x is not None]
  if is_hijax is None and storage:
    is_hijax = any(storage)
  metadata = named(metadata)
  cls = type(variable)
  metadata |= {
    name: getattr(cls, name) for name in HOOKS if name not in metadata and hasattr(cls, name)
  }
  if any(metadata.get(name) for name in ("on_get_value", "on_set_value")):
    object.__setattr__(variable, "__class__", _hooked(cls))
  if metadata.get("on_create_value") or hasattr(cls, "create_value"):
    variable._make(value, False, VariableDef(metadata, Origin(cls.__name__)))
    value = _through(variable, "on_create_value", value)
    if hasattr(cls, "create_value"):
      value = cls.create_value(variable, value)  # pyright: ignore[reportAttributeAccessIssue]
  return value, is_hijax, metadata


def var_defaults(*, hijax: bool | None = None, ref: bool | None = None) -> Any:
  """The storage of new Variables, or a context that sets it: `nnx.use_hijax`.

  >>> from refax.compat import nnx
  >>> with nnx.var_defaults(hijax=True):
  ...   nnx.var_defaults()["hijax"]
  True
  """
  if hijax is None and ref is None:
    return VarDefaults(config.using_hijax(), config.using_hijax())
  return config.use_hijax(bool(hijax) or bool(ref))


@dataclasses.dataclass(frozen=True)
class VarDefaults(Mapping):
  """The storage of new Variables: in Refax, a hijax Variable holds a Ref."""

  hijax: bool
  ref: bool

  def __getitem__(self, key: str) -> bool:
    if key not in ("hijax", "ref"):
      raise KeyError(key)
    return getattr(self, key)

  def __iter__(self) -> Any:
    return iter(("hijax", "ref"))

  def __len__(self) -> int:
    return 2


# Linen names its collections; Flax NNX keeps a name for each type of Variable.
_TYPES: dict[str, type[Variable]] = {
  "params": Param,
  "batch_stats": BatchStat,
  "cache": Cache,
  "intermediates": Intermediate,
  "perturbations": Perturbation,
}


def variable_type_from_name(
  name: str, /, *, base: type[Variable] = Variable, allow_register: bool = False
) -> type[Variable]:
  """The type of Variable that has the name of a Linen collection.

  >>> variable_type_from_name("params")
  <class 'refax.core.variable.Param'>
  """
  if name not in _TYPES:
    if not allow_register:
      raise ValueError(
        f"no type of Variable has the name {name!r}\n"
        "  fix: nnx.register_variable_name(name, type), or pass allow_register=True"
      )
    _TYPES[name] = type(name, (base,), {"__slots__": ()})
  return _TYPES[name]


def variable_name_from_type(typ: type[Variable], /, *, allow_register: bool = False) -> str:
  """The name of the Linen collection of a type of Variable.

  >>> variable_name_from_type(Param)
  'params'
  """
  for name, known in _TYPES.items():
    if known == typ:
      return name
  if not allow_register or typ.__name__ in _TYPES:
    raise ValueError(
      f"the type {typ.__name__} has no name\n"
      "  fix: nnx.register_variable_name(name, type), or pass allow_register=True"
    )
  register_variable_name(typ.__name__, typ)
  return typ.__name__


def register_variable_name(name: str, typ: Any = _MISSING, *, overwrite: bool = False) -> Any:
  """Give a type of Variable the name of a Linen collection; without `typ`, a decorator.

  >>> @register_variable_name("doctest_stats")
  ... class Stats(Variable): pass
  >>> variable_type_from_name("doctest_stats") is Stats
  True
  """
  if typ is _MISSING:
    return functools.partial(register_variable_name, name, overwrite=overwrite)
  if not overwrite and name in _TYPES:
    raise ValueError(
      f"the name {name!r} is that of {_TYPES[name].__name__}\n  fix: pass overwrite=True"
    )
  _TYPES[name] = typ
  return typ


# Methods and attributes that Flax's Variables have, beside those of Refax's.


def _set_value(self: Variable, value: Any, *, index: Any = _MISSING) -> None:
  """Write as Flax does: a lojax Variable takes any value as a whole, and casts at an index."""
  if index is _MISSING:
    _plain_set_value(self, value)
    return
  if not self.is_hijax and isinstance(self._cell, jax.Array):
    value = jnp.asarray(_unwrapped(value))
    if not jnp.issubdtype(value.dtype, jax.dtypes.extended):
      value = value.astype(self.dtype)
    if index is ...:
      value = jnp.broadcast_to(value, self.shape)
  _plain_set_value(self, value, index=index)


def _unwrapped(value: Any) -> Any:
  return value.get_value() if isinstance(value, Variable) else value


_plain_set_value = Variable.set_value
_plain_set_metadata = Variable.set_metadata
_plain_get_metadata = Variable.get_metadata


def _get_metadata(
  self: Variable, name: str | None = None, default: Any = _MISSING, *, exclude_required: Any = None
) -> Any:
  flags = {"hijax": self.is_hijax, "ref": self.is_hijax, "eager_sharding": True}
  if name in flags:
    return flags[name]
  if name is None:
    return _plain_get_metadata(self) if exclude_required else flags | _plain_get_metadata(self)
  if not self.has_metadata(name):
    if default is _MISSING:
      raise KeyError(name)
    return default
  return _plain_get_metadata(self, name)


def _set_metadata(self: Variable, *args: Any, **metadata: Any) -> None:
  if args and metadata:
    raise TypeError("set_metadata takes a dict, a name and a value, or keywords")
  if len(args) == 1:
    self._check_writable()
    self._def = self._def.with_metadata({})
  given = dict(args[0]) if len(args) == 1 else {args[0]: args[1]} if args else metadata
  for name in (*STORAGE, "eager_sharding"):
    given.pop(name, None)
  _plain_set_metadata(self, **given)


def _del_metadata(self: Variable, name: str) -> None:
  rest = _plain_get_metadata(self)
  del rest[name]
  self._def = self._def.with_metadata(rest)


def _copy_from(self: Variable, other: Variable) -> None:
  if type(self) is not type(other):
    raise ValueError(f"a {type(self).__name__} cannot copy from a {type(other).__name__}")
  if self is not other:
    self.set_value(other.get_value())
    self._def = self._def.with_metadata(dict(other._def.metadata))


def _add_axis(self: Variable, index: int, name: str | None) -> None:
  _through_axis(self, "on_add_axis", index, name)


def _remove_axis(self: Variable, index: int, name: str | None) -> None:
  _through_axis(self, "on_remove_axis", index, name)


def _through_axis(variable: Variable, hook_name: str, index: int, name: str | None) -> None:
  hooks = _plain_get_metadata(variable, hook_name, None) or ()
  for hook in hooks if isinstance(hooks, tuple) else (hooks,):
    hook(variable, index, name)


def _call(self: Variable, *args: Any, **kwargs: Any) -> Any:
  return self.get_value()(*args, **kwargs)


def _from_metadata(cls: type[Variable], value: Any, attributes: Mapping[str, Any]) -> Variable:
  return cls(value, **attributes)


ADDED = {
  "hijax": property(lambda self: self.is_hijax),
  "ref": property(lambda self: self.is_hijax),
  "mutable": property(lambda self: self.is_hijax),
  "raw_value": property(lambda self: self.get_raw_value(), lambda self, x: self.set_raw_value(x)),
  "type": property(type),
  "var_type": property(type),
  "set_value": _set_value,
  "get_metadata": _get_metadata,
  "set_metadata": _set_metadata,
  "del_metadata": _del_metadata,
  "copy_from": _copy_from,
  "update_from_state": lambda self, other: _copy_from(self, other),
  "add_axis": _add_axis,
  "remove_axis": _remove_axis,
  "to_state": lambda self: self.copy(),
  "from_metadata": classmethod(_from_metadata),
  "__call__": _call,
}
