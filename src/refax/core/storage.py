"""What a Variable stores, and the rules of writing to it.

A cell is a `jax.Ref` (hijax), an array (lojax), or a pytree of either. A write keeps the cell's
shape and dtype; a value whose gradient would be lost by storing it is refused.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir

from refax import _jax
from refax.core.mesh import enter_mesh
from refax.core.observe import before_write, has_no_tangents
from refax.errors import DifferentiatedWriteError, ShapeMismatchError, SharedWriteError

NUMBERS = (bool, int, float, complex, np.generic)
HOST = (*NUMBERS, np.ndarray)


def is_array(x: Any) -> bool:
  """Whether `x` is an array, JAX's or NumPy's, or a tracer of one."""
  return isinstance(x, jax.Array | np.ndarray) and not _jax.is_ref(x)


def is_array_like(x: Any) -> bool:
  """Whether `x` is an array or a number."""
  return is_array(x) or isinstance(x, NUMBERS)


def as_array(x: Any, hijax: bool = True) -> jax.Array:
  """`x` as a JAX array with a buffer and a dtype of its own, for a Ref or not.

  Weak types are dropped: JAX >= 0.11 drops them from Refs, and a state that is weak before the
  first step and strong after it compiles twice.
  """
  if not isinstance(x, jax.Array):
    x = jnp.array(x, copy=True)
  elif not _jax.is_tracer(x):
    x = _jax.copied_for_cell(x) if hijax else _jax.copied(x)
  return strong(x)


def strong(x: jax.Array) -> jax.Array:
  """An array without a weak type."""
  return jax.lax.convert_element_type(x, x.dtype) if getattr(x, "weak_type", False) else x


def needs_guard(x: Any) -> bool:
  """Whether a tangent may hide in `x`: a tracer of a floating-point or complex array."""
  return _jax.is_tracer(x) and jnp.issubdtype(x.dtype, jnp.inexact)


def _guard_jvp(primals, tangents, *, origin):
  if not isinstance(tangents[0], ad.Zero):
    raise DifferentiatedWriteError.tangent(origin)
  return _guard.bind(primals[0], origin=origin), tangents[0]


# The identity, for values without a tangent: a Ref would drop the tangent in silence. A primitive,
# and no `jax.custom_jvp`, for it must outlive the lowering of loops (see `_jax.discharge`).
_guard = _jax.Primitive("refax_guard")
_guard.def_impl(lambda x, *, origin: x)
_guard.def_abstract_eval(lambda x, *, origin: x)
ad.primitive_jvps[_guard] = _guard_jvp
batching.defvectorized(_guard)
mlir.register_lowering(_guard, lambda ctx, x, *, origin: [x])


def stored(x: jax.Array, origin: Any, *, detached: bool, hijax: bool) -> jax.Array:
  """`x` as it may be stored: detached types store no tangent, Refs refuse one, arrays keep it."""
  if not needs_guard(x) or has_no_tangents():
    return x
  if detached:
    return jax.lax.stop_gradient(x)
  return _guard.bind(x, origin=origin) if hijax else x


def is_exact(value: Any, cell: Any) -> bool:
  """Whether `value` is an array that goes into the cell as it is."""
  return (
    isinstance(value, jax.Array)
    and (isinstance(cell, jax.Array) or _jax.is_ref(cell))
    and value.dtype == cell.dtype
    and value.shape == cell.shape
    and not getattr(value, "weak_type", False)
    and not _jax.is_ref(value)
  )


def fit(value: Any, want: Any, origin: Any) -> jax.Array:
  """`value` with the shape and dtype of the cell `want`.

  Numbers and weakly typed arrays take the cell's dtype where that loses no kind (an int for a
  float cell, not a float for an int cell); shapes broadcast as in NumPy's `a[...] = x`.

  Raises:
    ShapeMismatchError: it does not fit.
  """
  x = fit_dtype(value, want, origin)
  if isinstance(x, np.ndarray):
    return _from_host(x, want, origin)
  if x.shape == want.shape:
    return x
  return jnp.broadcast_to(_broadcastable(x, want, origin), want.shape)


def _from_host(x: np.ndarray, want: Any, origin: Any) -> jax.Array:
  """A NumPy array as one of JAX with a buffer of its own, in the shape of the cell.

  What is small is made as large as the cell in NumPy, and goes to a Ref on one device as a compiled
  copy: that takes 7 us, and each operation of JAX 30.
  """
  x = _broadcastable(x, want, origin)
  if x.shape != want.shape and math.prod(want.shape) > _SMALL:
    return jnp.broadcast_to(jnp.array(x), want.shape)
  x = np.broadcast_to(x, want.shape) if x.shape != want.shape else x
  place = _jax.peek_cell(want).sharding if type(want) is jax.Ref else None
  if isinstance(place, jax.sharding.SingleDeviceSharding) and _jax.wide_mesh() is None:
    return _jax.copied_from_host(x, place)
  return jnp.array(x)


_SMALL = 1 << 14
_LARGEST = 1 << 1023  # which a Python float still holds


def _broadcastable(x: Any, want: Any, origin: Any) -> Any:
  """An array without leading axes of size 1 that the cell lacks.

  Raises:
    ShapeMismatchError: it does not broadcast to the cell.
  """
  given, lead = x, x.ndim - len(want.shape)
  if lead > 0 and x.shape[:lead] == (1,) * lead:
    x = x.reshape(x.shape[lead:])
  # Not by what JAX raises: Ctrl-C inside of it may become a ValueError too.
  pairs = zip(reversed(x.shape), reversed(want.shape), strict=False)
  if x.ndim > len(want.shape) or any(a not in (1, b) for a, b in pairs):
    raise ShapeMismatchError.write(origin, want, given)
  return x


def fit_dtype(value: Any, want: Any, origin: Any) -> jax.Array | np.ndarray:
  """`value` as an array of the cell's dtype; raises ShapeMismatchError if that loses a kind.

  Numbers and NumPy's arrays stay on the host where nothing is traced.
  """
  weak = isinstance(value, bool | int | float | complex) or getattr(value, "weak_type", False)
  if isinstance(value, list | tuple):
    value, weak = _from_sequence(value, want, origin), True
  if not is_array_like(value):
    raise ShapeMismatchError.not_an_array(origin, want, value)
  if weak and isinstance(value, int | np.ndarray) and jnp.issubdtype(want.dtype, jnp.integer):
    value = _in_range(value, want, origin)
  elif type(value) is int and abs(value) >> 31:
    if not jnp.issubdtype(want.dtype, jnp.inexact):
      raise ShapeMismatchError.dtype(origin, want, np.zeros((), np.int64))
    if abs(value) >= _LARGEST:
      raise ShapeMismatchError.range(origin, want, value, jnp.finfo(want.dtype))
    value = float(value)  # it takes what an int32 cannot hold
  x = value if isinstance(value, jax.Array) else _as_traced(value)
  if x.dtype != want.dtype:
    if not weak or not _widens(x, want.dtype):
      raise ShapeMismatchError.dtype(origin, want, x)
    return x.astype(want.dtype)
  return jax.lax.convert_element_type(x, x.dtype) if weak and isinstance(x, jax.Array) else x


def _as_traced(value: Any) -> jax.Array | np.ndarray:
  """A number or an array of NumPy with the dtype that JAX gives it; on the host, if it may be."""
  if _jax.no_trace_active():
    x = np.asarray(value)
    if jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool:
      return np.asarray(value, jax.dtypes.canonicalize_dtype(x.dtype))
  return jnp.array(value)


def _in_range(value: Any, want: Any, origin: Any) -> Any:
  """Python ints for an integer cell, in its dtype: NumPy refuses those that would wrap around."""
  x, info = np.asarray(value), jnp.iinfo(want.dtype)
  if x.dtype.kind not in "iuO":
    return value
  if x.size and not (info.min <= x.min() and x.max() <= info.max):
    raise ShapeMismatchError.range(origin, want, value, info)
  return x.astype(want.dtype)


def _from_sequence(value: Any, want: Any, origin: Any) -> Any:
  """Nested lists of numbers as an array, as NumPy takes them in an assignment."""
  if any(map(_jax.is_tracer, jax.tree.leaves(value))):
    return jnp.asarray(value)
  try:
    x = np.asarray(value)
  except ValueError:  # ragged
    x = np.empty((), object)
  if x.dtype == object or x.dtype.kind in "USV":
    raise ShapeMismatchError.not_an_array(origin, want, value)
  return x


def _widens(x: jax.Array | np.ndarray, dtype: Any) -> bool:
  """Whether a number like `x` becomes a `dtype` without losing its kind (bool < int < float)."""
  kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
  rank = lambda d: next((i for i, kind in enumerate(kinds) if jnp.issubdtype(d, kind)), -1)
  return 0 <= rank(x.dtype) <= rank(dtype)


def fit_index(old: jax.Array, index: Any, value: Any, origin: Any) -> jax.Array:
  """`old` with `value` at `index`, as `a[index] = value` of NumPy."""
  x = fit_dtype(value, old, origin)
  try:
    return old.at[index].set(x)
  except ValueError as error:
    if "broadcast" not in str(error):
      raise
    raise ShapeMismatchError.index(origin, old, index, x) from error


def settled(refs: list[jax.Ref], values: list[jax.Array], given: list[bool]) -> list[jax.Array]:
  """Values as the next buffers of concrete Refs: where those lie, and copied if they were given."""
  enter_mesh(refs)
  copies = iter(_jax.copied_for_cells([x for x, copy in zip(values, given, strict=True) if copy]))
  owned = [next(copies) if copy else x for x, copy in zip(values, given, strict=True)]
  return list(map(_placed, refs, owned))


def _placed(ref: jax.Ref, value: jax.Array) -> jax.Array:
  """A value where the buffer of a concrete Ref lies."""
  new, old = _jax.bits(value), _jax.bits(_jax.peek_cell(ref))
  same = new.sharding is old.sharding or new.sharding == old.sharding
  if same and getattr(new, "committed", True):
    return value
  return _jax.put(value, _jax.peek_cell(ref).sharding)


def write_ref(ref: jax.Ref, value: jax.Array, given: Any, origin: Any) -> None:
  """Store `value` in `ref`. What the user gave is copied: a later step donates the buffer."""
  enter_mesh((ref,))
  if value is given and not _jax.is_tracer(value):
    value = _jax.copied_for_cell(value)
  before_write(ref)
  try:
    _jax.write_cell(ref, value)
  except Exception as error:
    if _jax.is_batched_write_refusal(error):
      raise SharedWriteError.vmap(origin) from error
    raise
