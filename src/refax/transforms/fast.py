"""The steady state of nnx.jit: buffers out of the cells, one donated call, buffers back.

A Ref among the arguments of `jax.jit` costs 13-18 us a call, for it leaves JAX's C++ path. Here the
trace of a call is compiled as a function of arrays: state that is written is donated and returned,
state that is only read is neither. Later calls with the same objects, unchanged in structure, go
straight to it. Whatever is out of the ordinary goes through Refs, the general way.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from refax import _jax, config
from refax.core.epoch import epoch
from refax.core.flatten import Node, flatten
from refax.core.variable import Variable
from refax.transforms.lift import Inputs, Outputs, result_of

LIMIT = 64  # entries of one function; more objects than that are not a steady state


class Retraced(Exception):
  """JAX traces again (another context, sharding, device): the entry does not cover this call."""


class Entry(NamedTuple):
  """One call that is known; `run(args)` makes it, on the buffers of the cells of its objects."""

  epoch: int
  no_trace_active: Callable[[], bool]
  arguments: int
  objects: list[tuple[int, weakref.ref]]
  types: list[tuple[int, Any, Any]]
  run: Callable

  @classmethod
  def of(cls, args: tuple, inputs: Inputs, compiled: "Compiled", forget: Callable) -> "Entry":
    """The entry for a call of what was compiled; `forget` is called when an object is gone."""
    objects = [(i, x) for i, x in enumerate(args) if isinstance(x, Node | Variable)]
    arrays = sorted(set(range(len(args))) - {i for i, _ in objects})
    return cls(
      epoch.value,
      _jax.trace_check(),
      len(args),
      [(i, weakref.ref(x, forget)) for i, x in objects],
      [(i, getattr(args[i], "aval", None), _types_of(args[i])) for i in arrays],
      _jax.exchange(compiled.call, *compiled.cells(inputs), arrays),
    )

  def is_of(self, args: tuple) -> bool:
    """Whether these are the objects of the entry, and not new ones at the same addresses."""
    return self.epoch == epoch.value and all(ref() is args[i] for i, ref in self.objects)


NO_CALL = Entry(-1, bool, 0, [], [], lambda _: None)


def steady(calls: "FastCalls", general: Callable[[tuple, dict[str, Any]], Any]) -> Callable:
  """A function that makes the call of last time at once, and any other by `general(args, kwargs)`.

  This is what a training loop waits for: it is one plain function, as every attribute and every
  frame takes as long as a check. Another `use_hijax` is not looked for: it is a context that JAX
  traces again for.
  """

  def call(*args: Any, **kwargs: Any) -> Any:
    then, no_trace_active, count, objects, types, run = calls.last
    if kwargs or epoch.value != then or len(args) != count or not no_trace_active():
      return general(args, kwargs)
    for i, ref in objects:
      if ref() is not args[i]:
        return general(args, kwargs)
    for i, aval, type_ in types:
      x = args[i]  # arrays from one source mostly share their aval
      same = aval is not None and getattr(x, "aval", None) is aval
      if not same and _types_of(x) != type_:
        return general(args, kwargs)
    try:
      return run(args)
    except Retraced:
      calls.clear()
      return general(args, kwargs)

  return call


class FastCalls:
  """The fast calls of one jitted function.

  An entry is found by the identity of objects and the types of arrays; it holds while the structure
  epoch stands. What is compiled is found by structure, so that a model that goes back and forth
  between training and evaluation is compiled twice in all.
  """

  def __init__(self):
    self.last = NO_CALL
    """The entry of the last call by positional arguments: mostly that of the next one."""
    self._entries: dict[tuple | None, Entry] = {}
    self._compiled: dict[tuple, Compiled | None] = {}

  def find(self, args: tuple, names: tuple[str, ...] = ()) -> Entry | None:
    """The entry for a call, if there is one that still holds; `names` are of the last arguments."""
    if not self._entries or not _is_eager():
      return None
    entry = self._entries.get(_key(args, names))
    if entry is None or not entry.is_of(args):
      return None
    self.last = NO_CALL if names else entry
    return entry

  def learn(
    self,
    args: tuple,
    names: tuple[str, ...],
    inputs: Inputs,
    spec: tuple,
    jitted: Any,
  ) -> Entry | None:
    """A new entry for a call, if it is an ordinary one."""
    key = _key(args, names)
    if key is None or not _is_eager() or not _are_ordinary(args, inputs):
      return None
    structure = (spec, config.using_hijax(), *map(_signature, inputs.leaves))
    if structure not in self._compiled:
      call = lambda leaves: jitted(spec, leaves, ())
      traced = jitted.trace(spec, tuple(inputs.leaves), ())
      ordinary = _is_ordinary(inputs, traced)
      self._compiled[structure] = Compiled(inputs, traced, call) if ordinary else None
    compiled = self._compiled[structure]
    if compiled is None:
      return None
    if len(self._entries) >= LIMIT:
      self._entries.clear()
    calls = weakref.ref(self)

    def forget(_):
      if (living := calls()) is not None:
        living.last = NO_CALL
        living._entries.pop(key, None)

    self._entries[key] = entry = Entry.of(args, inputs, compiled, forget)
    return entry

  def clear(self) -> None:
    """Forget everything."""
    self.last = NO_CALL
    self._entries.clear()
    self._compiled.clear()


class Compiled:
  """The donated function of arrays for one structure."""

  def __init__(self, inputs: Inputs, traced: Any, jitted: Callable[[tuple], Outputs]):
    cells = {i for i, x in enumerate(inputs.leaves) if isinstance(x, Variable)}
    self.written = _jax.written_invars(traced.jaxpr)
    self.read = (_jax.used_invars(traced.jaxpr) & cells) - self.written
    call = self._function(inputs, jitted)
    call.__name__ = traced.fun_name  # what profiles show
    # A Ref stays where it is; for what a function returns, the compiler would choose.
    places = [_jax.peek_cell(ref).sharding for ref in self.cells(inputs)[0]]
    self.call = jax.jit(call, donate_argnums=0, out_shardings=(places, None))

  def cells(self, inputs: Inputs) -> tuple[list, list]:
    """The Refs that a call writes, and those that it only reads."""
    refs = [(i, x._cell) for i, x in enumerate(inputs.leaves) if isinstance(x, Variable)]
    written = [ref for i, ref in refs if i in self.written]
    return written, [ref for i, ref in refs if i in self.read]

  def _function(self, inputs: Inputs, jitted: Callable[[tuple], Outputs]) -> Any:
    """The call as a function of arrays; it may be traced once.

    It calls the function on Refs like the caller's, of which JAX has the trace already.
    """
    traces: list[None] = []
    of = lambda x: (type(x), x._def, x.shape, x.dtype) if isinstance(x, Variable) else None
    variables = list(map(of, inputs.leaves))
    read, written = self.read, self.written

    def call(written_values, others, read_values=()):
      if traces:
        raise Retraced
      traces.append(None)
      values = dict(zip(sorted(written), written_values, strict=True))
      values |= zip(sorted(read), read_values, strict=True)
      arrays, leaves = iter(jax.tree.leaves(others)), []
      for i, variable in enumerate(variables):
        if variable is None:
          leaves.append(next(arrays))
          continue
        cls, definition, shape, dtype = variable
        # A cell that is neither read nor written stays out: nothing asks for its value.
        value = values[i] if i in values else jnp.zeros(shape, dtype)
        leaves.append(cls._handle(_jax.new_cell(value), definition))
      out = jitted(tuple(leaves))
      return [leaves[i].get_value() for i in sorted(written)], result_of(out)(out.fresh)

    return call


def _is_eager() -> bool:
  """Whether calls run now, compiled: not inside a trace, and not under `jax.disable_jit`."""
  return _jax.no_trace_active() and not getattr(jax.config, "jax_disable_jit", False)


def _signature(leaf: Any) -> Any:
  """What a trace depends on, of a Variable or an array."""
  if isinstance(leaf, Variable):
    return type(leaf), leaf._def, leaf.shape, leaf.dtype, _jax.peek_cell(leaf._cell).sharding
  return _type_of(leaf)


def _type_of(x: Any) -> Any:
  """The type that JAX traces an array or number with; None for anything else, a Ref too."""
  if isinstance(x, jax.Array) and type(x) is not jax.Ref:
    return x.shape, x.dtype, x.weak_type
  if isinstance(x, np.ndarray):
    return np.ndarray, x.shape, x.dtype
  return type(x) if type(x) in (bool, int, float, complex) else None


def _key(args: tuple, names: tuple[str, ...]) -> tuple | None:
  """What an entry is found by, or None if an argument holds more than arrays, or is no object."""
  key: list[Any] = [config.using_hijax(), names]
  for x in args:
    part = id(x) if isinstance(x, Node | Variable) else _types_of(x)
    if part is None:
      return None
    key.append(part)
  return tuple(key)


def _types_of(x: Any) -> Any:
  """The type of an array, or those of a pytree of arrays; None if there is anything else in it."""
  if (type_ := _type_of(x)) is not None:
    return type_
  leaves, treedef = jax.tree.flatten(x)
  types = tuple(map(_type_of, leaves))
  return (treedef, types) if types and None not in types else None


def _are_ordinary(args: tuple, inputs: Inputs) -> bool:
  """Whether the arguments are arrays and objects with hijax Variables, each one Ref, only."""
  arrays = len(jax.tree.leaves([x for x in args if not isinstance(x, Node | Variable)]))
  cells = [x._cell for x in inputs.leaves if isinstance(x, Variable)]
  if not cells or len(inputs.leaves) - len(cells) != arrays or not all(map(_jax.is_ref, cells)):
    return False
  if any(x._def.selected for x in inputs.leaves if isinstance(x, Variable)):
    return False
  return all(_is_cached(x) for x in args if isinstance(x, Node))


def _is_ordinary(inputs: Inputs, traced: Any) -> bool:
  """Whether a call leaves the structure of its arguments, returns arrays, and does nothing else."""
  out: Outputs = traced.out_info
  spec = out.spec
  if spec.redefined or spec.written or spec.graphdef.nodes != inputs.graphdef.nodes:
    return False
  if not all(isinstance(x, jax.ShapeDtypeStruct) for x in out.fresh) or result_of(out) is None:
    return False
  return _jax.only_refs_are_effects(traced.jaxpr) and not any(map(_jax.is_ref, traced.jaxpr.consts))


def _is_cached(node: Node) -> bool:
  """Whether changes below an object reach the structure epoch."""
  flatten(node)
  return node._pytree.cache is not None and node._pytree.visited
