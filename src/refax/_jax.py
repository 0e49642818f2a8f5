"""Every use of private JAX API, each with why it is needed and what replaces it when it is gone.

Three things of JAX are not public: the buffer behind a `jax.Ref` (an eager read or write through
JAX's own primitives costs 65-290 us, a copy costs 4), whether any trace is active, and which of
a jaxpr's Refs are written. A probe decides once, at first use, whether the private path works
on the installed JAX; the public path is always complete. `REFAX_PUBLIC_JAX=1` forces it, and the
tests run both.
"""

import _thread
import contextlib
import functools
import itertools
import operator
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.interpreters import ad, batching, mlir

try:  # private: `jax.extend`, which has these in public, also imports Pallas: 60 of 80 ms of ours
  if os.environ.get("REFAX_PUBLIC_JAX") == "1":
    raise ImportError
  from jax._src.core import ClosedJaxpr as ClosedJaxpr
  from jax._src.core import Literal as Literal
  from jax._src.core import Primitive as Primitive
  from jax._src.core import Var as _new_var
  from jax._src.core import get_opaque_trace_state as get_opaque_trace_state
  from jax._src.core import jaxpr_as_fun as jaxpr_as_fun
  from jax._src.source_info_util import register_exclusion
except ImportError:
  from jax.extend.core import ClosedJaxpr as ClosedJaxpr
  from jax.extend.core import Literal as Literal
  from jax.extend.core import Primitive as Primitive
  from jax.extend.core import Var as _new_var
  from jax.extend.core import get_opaque_trace_state as get_opaque_trace_state
  from jax.extend.core import jaxpr_as_fun as jaxpr_as_fun
  from jax.extend.source_info_util import register_exclusion

# JAX's errors and profiles name the user's line, not the line of Refax that it came through.
register_exclusion(os.path.dirname(__file__))

CELL_KIND = "no_grad_no_remat"
"""The one kind of Ref that a Variable uses: written once under `jax.checkpoint`, and without
tangents under `jax.grad`. Equality of ref types ignores the kind, so two kinds in one place
would reuse a wrong trace; there is one, for ever."""


def is_ref(x: Any) -> bool:
  """Whether `x` is a `jax.Ref`, or a tracer that stands for one.

  Only for these is JAX's own test asked: for an array it takes 0.8 us, ten times as long as this.
  """
  return type(x) is jax.Ref or (is_tracer(x) and isinstance(x, jax.Ref))


def is_tracer(x: Any) -> bool:
  """Whether `x` is a tracer: its value is not known now."""
  return isinstance(x, jax.core.Tracer)


@functools.lru_cache(maxsize=4096)
def _ref_type(aval: Any) -> Any:
  """The type of a Ref to an array: half of what making a Ref takes, and models repeat theirs."""
  private = _private()
  assert private is not None
  return private.AbstractRef(aval, kind=CELL_KIND)


EAGER = object()
"""The trace state outside every trace, which every assignment to an attribute asks for."""


def trace_state() -> Any:
  """A token that is equal for two moments inside the same trace, and only then."""
  private = _private()  # `no_trace_active`, without a frame
  is_eager = private is not None and private.clean()
  return EAGER if is_eager else get_opaque_trace_state()


class _Private(NamedTuple):
  """What of `jax._src` is used when it behaves as this file expects."""

  core: Any
  AbstractRef: Any
  clean: Callable[[], bool]
  ref: Callable[[Any, jax.Array], jax.Ref]
  """From the type of a Ref and its buffer to the Ref."""


@functools.cache
def _private() -> _Private | None:
  """Private JAX, when buffers of Refs behave as this file expects, else None.

  The expectation: `Ref(AbstractRef(type, kind), ArrayRefImpl(aval, buffer))` is a Ref that a
  jitted function writes by replacing `ref._refs._buf`. JAX's own `_ref_impl` builds it so.
  """
  if os.environ.get("REFAX_PUBLIC_JAX") == "1":
    return None
  try:
    from jax._src import core
    from jax._src.state.types import AbstractRef

    with jax.ensure_compile_time_eval():
      value = _committed(jnp.arange(2))
      aval = AbstractRef(jax.typeof(value), kind=CELL_KIND)
      ref = core.Ref(aval, core.ArrayRefImpl(aval, value))
      works = ref._refs._buf is value and core.trace_state_clean() in (True, False)
    if not works:
      return None
    private = _Private(core, AbstractRef, _trace_check(core), _ref_maker(core, ref))
  except Exception:
    return None
  if jax.local_device_count() > 1:
    on_several_devices()
  return private


on_several_devices: Callable[[], None] = lambda: None
"""Called before the first cell is made, if there could be a mesh; see `core.variable`."""


def _trace_check(core: Any) -> Callable[[], bool]:
  """`core.trace_state_clean`, in 60 ns instead of 150 where what it looks at is found here too."""
  try:
    trace, axes = core.trace_state_strong_ref, core.axis_env_state
    eager, no_axes = core.eval_trace, core.top_axis_env
  except AttributeError:
    return core.trace_state_clean

  def clean() -> bool:
    now = trace.value
    return (now is eager or now is None) and axes.value is no_axes

  answers: list[bool] = []
  ask = lambda x: answers.extend((clean(), core.trace_state_clean()))
  with jax.ensure_compile_time_eval():
    jax.eval_shape(ask, 0)
    ask(0)
  return clean if answers[0] == answers[1] and answers[2] == answers[3] else core.trace_state_clean


def _ref_maker(core: Any, like: jax.Ref) -> Callable[[Any, jax.Array], jax.Ref]:
  """`Ref(aval, ArrayRefImpl(aval, buffer))` in 0.25 us, not 0.7 to 1.7: both import a module again.

  Args:
    core: `jax._src.core`.
    like: a Ref that these constructors have made: with another attribute, they are called.
  """
  new, Ref, Impl = object.__new__, core.Ref, core.ArrayRefImpl

  def make(aval: Any, buffer: jax.Array) -> jax.Ref:
    impl, ref = new(Impl), new(Ref)
    impl._aval, impl._buf = aval, buffer
    ref._aval, ref._refs = aval, impl
    return ref

  made, was = make(like._aval, like._refs._buf), cast(Any, like)
  is_same = vars(made).keys() == vars(was).keys() and vars(made._refs) == vars(was._refs)
  return make if is_same else lambda aval, buffer: Ref(aval, Impl(aval, buffer))


def put(x: Any, sharding: Any) -> Any:
  """`jax.device_put`, also where the sharding has devices of other processes than `x` does.

  JAX refuses an array that is committed to a device, as the buffer of every Ref is, for devices of
  other processes, and compares others with those of the other processes, one at a time. Here the
  array of each process is taken to be the same one, and no process waits for another;
  `refax.core.processes` compares all arrays at once. What each process has a whole copy of can go
  back to devices of this one.
  """
  here = is_tracer(x) or getattr(x, "is_fully_addressable", True)
  if here == getattr(sharding, "is_fully_addressable", True):
    return jax.device_put(x, sharding)
  if not here:
    return jax.device_put(x.addressable_data(0) if x.is_fully_replicated else x, sharding)
  if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    if isinstance(sharding, jax.sharding.NamedSharding):  # JAX compares the text of a spec
      sharding = sharding.update(spec=jax.sharding.PartitionSpec(*sharding.spec, None))
    return jax.random.wrap_key_data(
      put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x)
    )
  host = np.asarray(x)
  return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _committed(x: jax.Array) -> jax.Array:
  """JAX >= 0.12 replaces a Ref's buffer only by one that is committed like it."""
  return x if getattr(x, "committed", True) else jax.device_put(x, x.sharding)


_copy = jax.jit(jnp.copy)
"""`x.copy()` takes 19 us, a compiled copy 4; both compile once for each shape."""


@functools.cache
def _copy_onto(sharding: Any) -> Any:
  return jax.jit(jnp.copy, out_shardings=sharding)


def copied(x: jax.Array) -> jax.Array:
  """A copy of a concrete array: a buffer that nobody else knows."""
  if no_trace_active():
    return _copy(x)
  with jax.ensure_compile_time_eval():  # typed keys cannot be copied while JAX traces
    return x.copy()


def copied_for_cell(x: jax.Array) -> jax.Array:
  """A copy of a concrete array, committed to its device, as the buffer of a Ref is.

  In a mesh of several devices, an array that sits on one of them is put on all.
  """
  mesh = wide_mesh()
  if mesh is not None and _sits_on_one(bits(x).sharding, mesh):
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.ensure_compile_time_eval():
      x = put(x, everywhere)  # it may share the memory of `x`
    return copied(x)
  if getattr(x, "committed", True) or not no_trace_active():
    return copied(x)
  return _copy_onto(x.sharding)(x)


_copy_all = jax.jit(lambda xs: [jnp.copy(x) for x in xs])

_lots: set[int] = set()
"""The lots of arrays that were copied once: a call that copies a lot is compiled for the second."""


def copied_for_cells(xs: list[jax.Array]) -> list[jax.Array]:
  """`copied_for_cell` of each; a lot that is copied again, as in a loop, in one compiled call.

  To compile it takes 0.2 ms a copy, and saves 4 us: thousands would be waited for.
  """
  if not 8 <= len(xs) <= 1024 or not no_trace_active() or wide_mesh() is not None:
    return list(map(copied_for_cell, xs))
  arrays = list(map(bits, xs))  # typed keys make their aval anew each time, and `jit` is slow
  lot = hash(tuple([id(x.aval) for x in arrays]))
  if lot not in _lots:
    if len(_lots) > 4096:
      _lots.clear()
    _lots.add(lot)
    return list(map(copied_for_cell, xs))
  _, committed, places = types_of(arrays)
  place = places[0]
  alike = all(committed) and all(x is place or x == place for x in places)
  if not alike or len(place.device_set) > 1:
    return list(map(copied_for_cell, xs))
  return list(map(_as_key, xs, _copy_all(arrays)))


def _as_key(like: jax.Array, new: jax.Array) -> jax.Array:
  """An array that has come of `bits(like)` as an array like that."""
  if bits(like) is like:
    return new
  return jax.random.wrap_key_data(new, impl=jax.random.key_impl(like))


def copied_from_host(x: Any, sharding: Any) -> jax.Array:
  """A NumPy array as one of JAX on one device, in a buffer that nobody else knows.

  `jax.device_put` would let it share the memory of `x`, even with `may_alias=False`.
  """
  return _copy_onto(sharding)(x)


def no_trace_active() -> bool:
  """Whether code runs eagerly, outside every transform.

  Private: `jax._src.core.trace_state_clean`, which `jax.jit` itself asks. Without it, the answer
  is no: reads and writes then go through JAX's own operations, which are right everywhere.
  """
  private = _private()
  return private is not None and private.clean()


def flag(name: str) -> Any:
  """A flag of `jax.config`, which knows its flags only when it runs."""
  return getattr(jax.config, name)


def checks_results() -> bool:
  """Whether JAX looks at what each call returns, and may raise when the call has been made."""
  return bool(flag("jax_debug_nans") or flag("jax_debug_infs"))


def is_tracing() -> bool:
  """Whether JAX traces, as far as can be known: `not no_trace_active()` errs on the other side."""
  private = _private()
  return private is not None and not private.clean()


def is_staging() -> bool:
  """Whether JAX records operations now, for a function that it compiles and keeps.

  Private: `jax._src.core.trace_state_strong_ref`, JAX's trace of now. Without it the answer is no,
  and warnings about what plain transforms do not see are not given.
  """
  private = _private()
  if private is None or private.clean():
    return False
  trace = getattr(private.core, "trace_state_strong_ref", None)
  return trace is not None and type(trace.value).__name__ == "DynamicJaxprTrace"


_DERIVATIVES = frozenset(("JVPTrace", "LinearizeTrace", "JaxprTrace"))


def computes_now(under: frozenset[str] = _DERIVATIVES) -> bool:
  """Whether nothing is recorded: code runs eagerly, under derivatives at most.

  Private: JAX's trace of now, and the `parent_trace` of each trace. Without them the answer is no.

  Args:
    under: the traces that code may run under.
  """
  private = _private()
  if private is None:
    return False
  trace = getattr(getattr(private.core, "trace_state_strong_ref", None), "value", private)
  eager = getattr(private.core, "eval_trace", private)
  while trace is not None and trace is not eager:
    if type(trace).__name__ not in under:
      return False
    trace = getattr(trace, "parent_trace", private)
  return True


def is_differentiating() -> bool:
  """Whether `jax.grad`, `jax.jvp` or `jax.vjp` computes now, and nothing compiled is recorded.

  Private: `jax._src.core.trace_state_strong_ref`, as `is_staging`. Without it the answer is no, and
  a Ref refuses what carries a gradient.
  """
  private = _private()
  if private is None or private.clean():
    return False
  trace = getattr(private.core, "trace_state_strong_ref", None)
  return trace is not None and type(trace.value).__name__ in ("JVPTrace", "LinearizeTrace")


def context_mesh() -> Any:
  """The mesh of `jax.set_mesh`, abstract while JAX traces; None or an empty one without any."""
  if no_trace_active():
    with contextlib.suppress(ValueError):
      return jax.sharding.get_mesh()
  return jax.sharding.get_abstract_mesh()


@functools.cache
def _mesh_of_now() -> Callable[[], Any]:
  """`jax._src.mesh.get_concrete_mesh`, when it does what `jax.sharding.get_mesh` does."""
  try:
    from jax._src.mesh import get_concrete_mesh

    if _private() is None or not hasattr(get_concrete_mesh(), "size"):
      raise AttributeError
    return get_concrete_mesh
  except (ImportError, AttributeError):
    return jax.sharding.get_abstract_mesh


def wide_mesh() -> jax.sharding.Mesh | None:
  """The mesh of `jax.set_mesh` if it has several devices, also while JAX traces; else None.

  Private: `jax._src.mesh.get_concrete_mesh`; in public, JAX names the mesh outside of traces only.
  Falls back to None: Refs then stay where they are, and JAX refuses those of one device in a mesh.
  """
  mesh = _mesh_of_now()()
  return mesh if mesh.size > 1 and isinstance(mesh, jax.sharding.Mesh) else None


def varying(x: Any) -> frozenset[str]:
  """The axes of `jax.shard_map` along which the values of an array differ, as its type says.

  Private: `ShapedArray.mat`, which the errors of `jax.lax.scan` show. Falls back to none: a carry
  of a scan then keeps its type, and JAX says which one it should have.
  """
  return getattr(getattr(jax.typeof(x), "mat", None), "varying", frozenset())


def is_outside(ref: Any, mesh: jax.sharding.Mesh) -> bool:
  """Whether a Ref sits on one device of a mesh, where operations inside the mesh refuse it.

  An array would be laid out anew by JAX, as it is not committed to its device. A Ref always is.
  """
  if type(ref) is not jax.Ref:
    return False
  return _sits_on_one(bits(peek_cell(ref)).sharding, mesh)


def is_on_one_device(ref: jax.Ref) -> bool:
  """Whether a Ref has its buffer on a single device."""
  return isinstance(bits(peek_cell(ref)).sharding, jax.sharding.SingleDeviceSharding)


def _sits_on_one(sharding: Any, mesh: jax.sharding.Mesh) -> bool:
  """Whether this is a single device, one of a mesh."""
  is_single = isinstance(sharding, jax.sharding.SingleDeviceSharding)
  return is_single and not sharding.device_set.isdisjoint(mesh.devices.flat)


@functools.cache
def _trace_context() -> Callable[[], Any]:
  try:
    from jax._src.config import trace_context

    hash(trace_context())
    return trace_context
  except (ImportError, AttributeError, TypeError):
    return lambda: ()


def trace_context() -> Any:
  """The settings that JAX traces again for (precision, mesh, device, x64): hashable.

  Private: `jax._src.config.trace_context`, a part of the key of JAX's own caches. Without it, what
  is compiled under one setting is compiled once more after a call under another one.
  """
  return _trace_context()()


@functools.cache
def steady_check() -> Callable[[], bool]:
  """Whether a call runs now, compiled, and JAX does not look at its results: in one call.

  Private: `jax._src.config`, whose flags `jax.config` reads in 60 ns more. Falls back to that.
  """
  private = _private()
  if private is None:
    return no_trace_active
  clean = private.clean
  try:
    from jax._src.config import debug_infs as infs
    from jax._src.config import debug_nans as nans
    from jax._src.config import disable_jit as slow

    names = ("jax_debug_nans", "jax_debug_infs", "jax_disable_jit")
    if [nans.value, infs.value, slow.value] != list(map(flag, names)):
      raise AttributeError
  except (ImportError, AttributeError):
    return lambda: clean() and not checks_results() and not flag("jax_disable_jit")
  return lambda: clean() and not nans.value and not infs.value and not slow.value


def types_of(arrays: list[Any]) -> tuple[list, list, list]:
  """Of many arrays of JAX: avals, whether they are committed, shardings. They are compared in C.

  Private: `_committed` and `_sharding`, which the public names give in a frame of Python each.
  """
  avals, committed = [x.aval for x in arrays], _are_committed(arrays)
  try:
    return avals, committed, [x._sharding for x in arrays]
  except AttributeError:
    return avals, committed, [x.sharding for x in arrays]


def _are_committed(arrays: list[Any]) -> list[bool]:
  try:
    return [x._committed for x in arrays]
  except AttributeError:
    return [x.committed for x in arrays]


def new_cell(value: jax.Array) -> jax.Ref:
  """A Ref that owns the buffer of `value`: the caller hands over a copy of its own.

  Private when eager: builds the Ref as `jax.new_ref` does, without dispatching an operation.
  """
  private = _private()
  if private is None or is_tracer(value) or not private.clean():
    return jax.new_ref(value, kind=CELL_KIND)
  value = _committed(value)
  return private.ref(_ref_type(jax.typeof(value)), value)


def cells_like(values: list[jax.Array]) -> Callable[[list[jax.Array]], list[jax.Ref]]:
  """`new_cell` for each of more such arrays, results of one compiled function; when eager.

  Private: builds the Refs as `new_cell` does; half of its time goes into the types of the arrays.
  """
  private = _private()
  if private is None:
    return lambda values: list(map(new_cell, values))
  ref, avals = private.ref, [_ref_type(jax.typeof(_committed(x))) for x in values]

  def new_like(values: list[jax.Array]) -> list[jax.Ref]:
    if not all(_are_committed(values)):
      values = list(map(_committed, values))
    return list(map(ref, avals, values))

  return new_like


def copied_cells(refs: list[jax.Ref]) -> list[jax.Ref]:
  """A Ref of its own for each of some concrete Refs, with a copy of its value; when eager.

  Private: builds the Refs as `new_cell` does, with the type `_aval` of what they are copied from.
  """
  private = _private()
  if private is None:
    return [new_cell(read_cell(ref)) for ref in refs]
  values = copies_of_cells(refs)
  avals = [ref._aval for ref in refs]  # pyright: ignore[reportAttributeAccessIssue]
  return list(map(private.ref, avals, values))


def copies_of_cells(refs: list[jax.Ref]) -> list[jax.Array]:
  """`copied_for_cell` of what concrete Refs hold at one moment; when eager.

  Private: the buffers `ref._refs._buf`, all looked at in one C call, as in `snapshot`.
  """
  if _private() is None:
    return list(map(read_cell, refs))
  try:
    return copied_for_cells(list(map(operator.attrgetter("_refs._buf"), refs)))
  except (RuntimeError, ValueError) as error:
    if not may_be_taken(error) or (copies := _copied_later(refs)) is None:
      raise
    return copies


def _copied_later(refs: list[jax.Ref]) -> list[jax.Array] | None:
  """What Refs hold when the step of another thread, which has taken their buffers, has ended."""
  copies = snapshot(refs)
  taken.is_seen = taken.is_seen or copies is not None
  return copies


class _Taken:
  """Whether a thread of this process has found that another one had taken a buffer."""

  is_seen = False


taken = _Taken()


def may_be_taken(error: Exception) -> bool:
  """Whether an error of JAX may come of a step in another thread, which has taken a buffer.

  It may have ended by now, and its thread with it: so one looks once more in any case.
  """
  return "deleted" in str(error)


def is_calling_elsewhere() -> bool:
  """Whether another thread is in a call of a compiled function."""
  frames = sys._current_frames()
  del frames[threading.get_ident()]  # a frame that names itself would keep all that called it alive
  for frame in frames.values():
    while frame is not None:
      code = frame.f_code
      if code in _CALLING or code.co_filename.endswith(os.path.join("jax", "_src", "pjit.py")):
        return True
      frame = frame.f_back
  return False


_CALLING: set[Any] = set()
"""The code of what makes compiled calls."""


_other_threads: Callable[[], int] = getattr(_thread, "_count", lambda: threading.active_count() - 1)
"""How many there are: what `threading` has itself, in C, as layers ask with each read."""


def may_take() -> bool:
  """Whether another thread may take the buffers of Refs from one line to the next."""
  return taken.is_seen or (_other_threads() > 0 and is_calling_elsewhere())


def read_cell(ref: jax.Ref, *, has_no_tangent: bool = False) -> jax.Array:
  """The value of `ref`, as an array that no later step can donate.

  Private when eager: copies the buffer `ref._refs._buf` instead of dispatching `ref[...]`.

  In a trace, the value has no tangent, and says so, unless `has_no_tangent` is known: a Ref made
  under `jax.jvp` or `jax.checkpoint` gives zeros that are not known to be zero, and a guard could
  not tell them from a gradient.
  """
  if is_tracer(ref) or not no_trace_active():
    if not is_tracer(ref) and computes_now(_DERIVATIVES | {"BatchTrace"}):
      # JAX's own read of a Ref gives its buffer away for a moment: Ctrl-C would lose it.
      return copied(ref._refs._buf)  # pyright: ignore[reportAttributeAccessIssue]
    value = ref[...]
    if has_no_tangent or not jnp.issubdtype(ref.dtype, jnp.inexact):
      return value
    return jax.lax.stop_gradient(value)
  try:
    return _copy(ref._refs._buf)  # pyright: ignore[reportAttributeAccessIssue]
  except (RuntimeError, ValueError) as error:
    if not may_be_taken(error) or (copies := _copied_later([ref])) is None:
      raise
    return copies[0]


def is_write_now(ref: jax.Ref, value: Any) -> bool:
  """Whether storing a value in a concrete Ref is a copy of it and nothing else.

  The buffer of a Ref is an array without a weak type: so is one of the same class and aval.
  """
  if not no_trace_active():
    return False
  old: Any = ref._refs._buf  # pyright: ignore[reportAttributeAccessIssue]
  if type(value) is not type(old):
    return False
  x, y = bits(value), bits(old)  # typed keys make their aval anew each time
  return (x.aval is y.aval or x.aval == y.aval) and (x is value or value.dtype == old.dtype)


def write_cell(ref: jax.Ref, value: jax.Array) -> None:
  """Store `value`, of the cell's shape and dtype; the caller hands over a copy of its own.

  Private when eager: installs the buffer without dispatching `ref[...] = value`.
  """
  if is_tracer(ref) or is_tracer(value):
    ref[...] = value
  elif no_trace_active():
    _install(ref, value)
  elif computes_now():  # not under `jax.vmap`, where JAX refuses it
    with jax.ensure_compile_time_eval():
      _install(ref, value)
  else:
    ref[...] = value


def _install(ref: jax.Ref, value: jax.Array) -> None:
  impl: Any = ref._refs  # pyright: ignore[reportAttributeAccessIssue]
  old = impl._buf
  impl._buf = _committed(value if value.sharding == old.sharding else put(value, old.sharding))


def move_cell(ref: jax.Ref, value: jax.Array) -> jax.Ref:
  """Let a concrete Ref hold `value`, an array of its type that is on other devices.

  Private: the buffer `ref._refs._buf`, and the type of a Ref, `_aval`, which includes the sharding
  where the axes of a mesh are explicit. Falls back to a new Ref: who holds the old one keeps it.

  Returns:
    The Ref that holds the value: `ref` itself, or the new one.
  """
  if _private() is None:
    return jax.new_ref(value, kind=CELL_KIND)
  cell: Any = ref
  value = _committed(value)
  cell._refs._buf = value
  cell._aval = cell._refs._aval = _ref_type(jax.typeof(value))
  return ref


def write_copy(ref: jax.Ref, value: jax.Array) -> None:
  """Store a copy of `value`, for which `is_write_now` holds."""
  impl: Any = ref._refs  # pyright: ignore[reportAttributeAccessIssue]
  sharding = impl._buf.sharding
  same = value.sharding is sharding or value.sharding == sharding
  copy = _copy if same and value.committed else _copy_onto(sharding)
  impl._buf = copy(value if same else put(value, sharding))


def bits(x: Any) -> Any:
  """The array behind typed PRNG keys, anything else as it is: keys find their sharding in 7 us.

  Private: `_base_array`. Falls back to the keys themselves.
  """
  return getattr(x, "_base_array", x)


def peek_cell(ref: jax.Ref) -> jax.Array:
  """The value of a concrete `ref`, uncopied, also while JAX traces: it must not reach the user.

  Private: the buffer `ref._refs._buf`, which a later step donates.
  """
  if _private() is None:
    with jax.ensure_compile_time_eval():
      return ref[...]
  return ref._refs._buf  # pyright: ignore[reportAttributeAccessIssue]


def exchange(
  call: Any,
  cells: tuple[list[jax.Ref], list[jax.Ref]],
  pick: Callable[[Any], Any],
  result: Callable[[Iterator], Any],
  *,
  give: Callable[[Any], list] | None = None,
  store: Callable[[Any, Iterator], Iterator] | None = None,
  may_wait: bool = False,
) -> Callable[[Any], Any]:
  """A compiled function without its buffers of Refs, which installs the new ones as it returns.

  The call and the installing are one expression in C, so that no signal comes between them: the
  call has given up the old buffers, and without the new ones the Refs would be lost. (JAX's own
  call must be in C too: the first one of its kind is not, see `refax.core.interrupt`.)

  It has no public fallback of its own: only who runs eagerly by `no_trace_active`, which is never
  true without the private path, may use it.

  Args:
    call: `([*buffers of written Refs, *given arrays], arrays, buffers of read Refs) -> (*new
      buffers, *rest)`, called without the last argument where no Ref is only read.
    cells: the Refs whose buffers are replaced, and those whose buffers are only read.
    pick: from the arguments of `run` to the arrays.
    result: from an iterator over the rest of what the call returns to the result of `run`.
    give: from the arguments of `run` to the arrays that the call may overwrite, if there are any.
    store: from the arguments of `run` and the iterator to another one, which stores some of the
      rest elsewhere as it is used up; it must do so in C, and yield None for each.
    may_wait: whether a call that only reads is made again if the step of another thread has taken
      what it reads. `result` must make all of the call then.

  Returns:
    `run(args) -> result`.
  """
  writes, reads = ([ref._refs for ref in some] for some in cast(Any, cells))
  name = itertools.repeat("_buf")
  flat, chain = itertools.chain.from_iterable, itertools.chain

  def run(args: Any) -> Any:  # `any` goes through to the end, for `setattr` returns None
    old, arrays = [c._buf for c in writes], (pick(args),)
    if give is not None:
      old += give(args)
    if reads:
      new = flat(map(call, (old,), arrays, ([c._buf for c in reads],)))
    else:
      new = flat(map(call, (old,), arrays))
    if store is None:
      any(map(setattr, writes, name, new))
    else:
      any(chain(map(setattr, writes, name, new), store(args, new)))
    return result(new)

  def read(args: Any) -> Any:
    patience = None  # made for an error only: this is as hot as `run`
    while True:
      try:
        return result(flat(map(call, ([],), (pick(args),), ([c._buf for c in reads],))))
      except (RuntimeError, ValueError) as error:
        patience = patience or Patience()
        if not may_be_taken(error) or not patience.waits():
          raise
        taken.is_seen = True

  _CALLING.add(run.__code__)
  return read if may_wait and reads and not (writes or give or store) else run


TRIES = 20_000
"""How often a thread tries to read what others write: about ten seconds."""

IDLE = 64
"""How often it finds, one time after the other, that nobody writes and there is nothing to read."""


class Patience:
  """How long a thread goes on to read what others write.

  Args:
    tries: how often it tries at most.
  """

  def __init__(self, tries: int = TRIES):
    self._tries, self._attempt, self._idle = tries, 0, 0

  def waits(self) -> bool:
    """Wait for a moment after an attempt that failed; whether to make another one."""
    self._attempt += 1
    self._idle = 0 if is_calling_elsewhere() else self._idle + 1
    if self._attempt >= self._tries or self._idle >= IDLE:
      return False
    wait(self._attempt)
    return True


@functools.cache
def _derivative_tracers() -> frozenset[type]:
  """The types of tracers of `jax.jvp`, `jax.vjp`, `jax.linearize` and `jax.grad`.

  Private: `jax._src.interpreters.ad`. Without it, gradients with respect to Refs are not refused
  by Refax: JAX itself refuses those of `jax.grad` from 0.11 on.
  """
  try:
    from jax._src.interpreters import ad

    names = ("JVPTracer", "LinearizeTracer")
    return frozenset(getattr(ad, name) for name in names if hasattr(ad, name))
  except ImportError:
    return frozenset()


def is_differentiated_ref(x: Any) -> bool:
  """Whether `x` is a Ref with respect to which JAX differentiates: its gradient would be zero."""
  return type(x) in _derivative_tracers() and isinstance(x, jax.Ref)


@functools.cache
def _flattening_functions() -> frozenset[int]:
  """The code of the functions in Python by which JAX's own flatten what they are given."""
  public = (jax.tree_util.tree_leaves, jax.tree_util.tree_flatten, jax.tree_util.tree_map)
  return frozenset(
    id(f.__code__) for f in (*public, jax.tree.leaves, jax.tree.flatten, jax.tree.map)
  )


_REFUSING = {
  ("api.py", "value_and_grad_f"): "jax.grad",
  ("api.py", "jacfun"): "jax.jacobian",
  ("api.py", "device_put"): "jax.device_put",
  ("pjit.py", "with_sharding_constraint"): "jax.lax.with_sharding_constraint",
  ("flatten_util.py", "ravel_pytree"): "jax.flatten_util.ravel_pytree",
  ("update.py", "apply_updates"): "optax.apply_updates",
}
"""The functions inside JAX and optax that flatten their arguments and then refuse Refs, by file and
name; the public names."""


def refusing_function() -> str | None:
  """The function of JAX that flattens an object now, if it takes no Refs: its error would not help.

  Private: the names of functions in files of JAX and optax, looked up in the frames of the call.
  Where they are others, JAX's own error arrives. To be called by a flattening function of a pytree.
  """
  frame = sys._getframe(2)
  if id(frame.f_code) not in _flattening_functions():
    return None
  while frame is not None and id(frame.f_code) in _flattening_functions():
    frame = frame.f_back
  if frame is None:
    return None
  code = frame.f_code
  found = _REFUSING.get((os.path.basename(code.co_filename), code.co_name))
  of_library = found is not None and frame.f_globals.get("__name__", "").startswith(
    ("jax.", "optax.")
  )
  return found if of_library else None


_TREE_FILES = frozenset(
  f.__code__.co_filename for f in (jax.tree_util.tree_flatten, jax.tree.flatten)
)


def orbax_flattens() -> bool:
  """Whether orbax-checkpoint has called the function of JAX that flattens an object now.

  To be called by a flattening function of a pytree, as `refusing_function`: the frames of the call
  are those of JAX's files on trees, then one of orbax.
  """
  orbax = sys.modules.get("orbax.checkpoint")
  if orbax is None or orbax.__file__ is None:
    return False
  frame = sys._getframe(2)
  while frame is not None and frame.f_code.co_filename in _TREE_FILES:
    frame = frame.f_back
  folder = os.path.dirname(orbax.__file__)
  return frame is not None and frame.f_code.co_filename.startswith(folder)


def returning_function() -> Callable[[], tuple[str, str]] | None:
  """Of the function whose result JAX flattens now, what names it, and what JAX traces it for.

  None if JAX lets Refs out of it. The names are looked up when they are asked for, for an error:
  `f_locals` keeps what it shows alive with the frame, and tracers must not outlive their trace.

  Private: `FlatTree.flatten` is called by `trace_to_jaxpr` in `jax/_src/interpreters`, which looks
  for Refs next. Where they are others, JAX's own error arrives. As `refusing_function`.
  """
  frame = sys._getframe(2)
  if frame.f_code.co_name != "flatten":
    return None
  caller = frame.f_back
  if caller is None or not caller.f_code.co_name.startswith("trace_to_jaxpr"):
    return None
  if not caller.f_code.co_filename.endswith("partial_eval.py") or not _refuses_refs():
    return None

  def names() -> tuple[str, str]:
    info = caller.f_locals.get("debug_info")
    return getattr(info, "func_src_info", None) or "a function", getattr(info, "traced_for", "jit")

  return names


def _refuses_refs() -> bool:
  return bool(getattr(jax.config, "jax_mutable_array_checks", True))


def is_batched_write_refusal(error: Exception) -> bool:
  """Whether JAX refused a write under `jax.vmap` to a Ref that it does not map.

  JAX raises a bare `Exception` for it; its text is the only thing to know it by.
  """
  return "vmapped value on an unbatched array reference" in str(error)


def ref_effects(jaxpr: Any) -> tuple[set[Any], set[Any]]:
  """The variables of a jaxpr that stand for Refs: (those it reads, those it writes).

  Private: the effects' attribute `input`, and their class, known here by name. An effect of an
  unknown sort counts as both: that costs a copy, and is right.
  """
  effects = [e for eqn in jaxpr.eqns for e in eqn.effects] + list(jaxpr.effects)
  effects = [e for e in effects if hasattr(e, "input")]
  reads = {e.input for e in effects if type(e).__name__ != "WriteEffect"}
  return reads, {e.input for e in effects if type(e).__name__ != "ReadEffect"}


def used_vars(jaxpr: Any) -> set[Any]:
  """The inputs of a jaxpr that it does anything with."""
  used = {id(x) for eqn in jaxpr.eqns for x in eqn.invars} | set(map(id, jaxpr.outvars))
  return {var for var in (*jaxpr.constvars, *jaxpr.invars) if id(var) in used}


def only_refs_are_effects(closed_jaxpr: Any) -> bool:
  """Whether a jaxpr does nothing but compute, read and write Refs: no printing, no callbacks.

  Anything else may raise while the compiled function runs.
  """
  return _effects_are_of_refs(closed_jaxpr) and not _calls_back(closed_jaxpr.jaxpr)


def makes_ref(effect: Any) -> bool:
  """Whether an effect is that a Ref is made. Private: its class, known here by name."""
  return type(effect).__name__ == "InternalMutableArrayEffect"


def _effects_are_of_refs(closed_jaxpr: Any) -> bool:
  """Whether a jaxpr has no other effects than that Refs are made, read and written."""
  return all(hasattr(e, "input") or makes_ref(e) for e in closed_jaxpr.effects)


def _calls_back(jaxpr: Any) -> bool:
  return any(
    "callback" in eqn.primitive.name
    or any(map(_calls_back, (*inner_jaxprs(eqn), *meant_jaxprs(eqn))))
    for eqn in jaxpr.eqns
  )


class AsRef:
  """A value that a trace is given as a Ref that holds it; see `traced`."""

  __slots__ = ("value",)

  def __init__(self, value: Any):
    self.value = value


def traced(fun: Callable[[Any], Any], values: Any) -> tuple[Any, Any]:
  """`jax.make_jaxpr(fun, return_shape=True)(values)`, for a trace that is used once.

  For an `AsRef` among the values, `fun` is given a Ref, and the jaxpr has one as its input.

  Two thirds of what JAX takes to trace a small function go into the options of a new `jax.jit`: 280
  us in place of 70. Private: `trace_to_jaxpr_dynamic`, on which JAX's own transforms are built.
  Falls back to `jax.make_jaxpr`, as it does where JAX looks at the keys of each trace.
  """
  trace = None if _private() is None or flag("jax_debug_key_reuse") else _tracer()
  return (trace or _make_jaxpr)(fun, values)


def _make_jaxpr(fun: Callable[[Any], Any], values: Any) -> tuple[Any, Any]:
  flat, tree = jax.tree.flatten(values)
  are_refs = [type(x) is AsRef for x in flat]
  if not any(are_refs):
    return jax.make_jaxpr(fun, return_shape=True)(values)
  found: list[Any] = []

  def outer(flat: list[Any]) -> None:  # a public way to Refs that hold nothing yet
    given = [new_cell(x) if is_ref else x for x, is_ref in zip(flat, are_refs, strict=True)]
    found.append(jax.make_jaxpr(fun, return_shape=True)(tree.unflatten(given)))

  jax.make_jaxpr(outer)([x.value if type(x) is AsRef else x for x in flat])
  return found[0]


@functools.cache
def _tracer() -> Callable[..., tuple[Any, Any]] | None:
  """The private way of `traced`, when it does what `jax.make_jaxpr` does, else None."""
  try:
    from jax._src import core
    from jax._src.api_util import debug_info
    from jax._src.interpreters.partial_eval import trace_to_jaxpr_dynamic
    from jax._src.linear_util import wrap_init
  except ImportError:
    return None

  def aval(x: Any) -> Any:
    if type(x) is not AsRef:
      return core.shaped_abstractify(x)
    return _ref_type(core.shaped_abstractify(x.value).update(weak_type=False))

  def trace(fun: Callable[[Any], Any], values: Any) -> tuple[Any, Any]:
    flat, tree = jax.tree.flatten(values)
    found: list[Any] = []

    def call(*flat: Any) -> list[Any]:
      result = fun(tree.unflatten(flat))
      leaves, out = jax.tree.flatten(result)
      if not all(isinstance(x, jax.Array) or _has_type(x) for x in leaves):
        raise _no_type(info.func_src_info, result)
      found.append(out)
      return leaves

    info = debug_info("jit", fun, (values,), {})
    wrapped = wrap_init(call, debug_info=info._replace(arg_names=None))
    jaxpr, _, consts = trace_to_jaxpr_dynamic(wrapped, list(map(aval, flat)))
    closed = ClosedJaxpr(jaxpr, consts)
    shapes = [type_struct(aval) for aval in closed.out_avals]
    return closed, jax.tree.unflatten(found[0], shapes)

  try:
    example = [jax.ShapeDtypeStruct((2,), jnp.float32), 1]
    double = lambda xs: {"a": xs[0] * 2}
    pairs = [way(double, example) for way in (trace, _make_jaxpr)]
  except Exception:
    return None
  return trace if str(pairs[0]) == str(pairs[1]) else None


def _has_type(x: Any) -> bool:
  try:
    jax.typeof(x)
  except TypeError:
    return False
  return True


def _no_type(function: str, result: Any) -> TypeError:
  """What JAX says of a result that is no array. It would look for names that are not there."""
  leaves = jax.tree_util.tree_flatten_with_path(result)[0]
  path, x = next((path, x) for path, x in leaves if not _has_type(x))
  at = f" at output component {jax.tree_util.keystr(path)}" if path else ""
  return TypeError(
    f"function {function} traced for jit returned a value of type {type(x)}{at}, "
    "which is not a valid JAX type"
  )


def type_struct(aval: Any) -> jax.ShapeDtypeStruct:
  """The shape, dtype and weak type of a type of JAX's."""
  weak = getattr(aval, "weak_type", False)  # typed keys have none
  return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak)


def discharge(closed_jaxpr: Any, *, differentiable: bool = True) -> Any:
  """A jaxpr of Refs as a pure one: reads and writes become values.

  A Ref among its inputs becomes the value that it holds, and the values that they hold in the end
  are more results, in the same order. Refs among its constants stay: see `refs_as_inputs`.

  Private: `jax._src.state.discharge.discharge_state`, by which `jax.jit` lowers Refs. A pure jaxpr
  has branches with state that differentiate and batch, and says exactly what depends on a batch.
  Falls back to a jaxpr that makes the Refs itself: right too, but JAX refuses such branches, aloud.

  Discharging lowers the bodies of stateful loops and branches, and lowering inlines derivatives of
  the user's own (`jax.nn.relu`, `custom_vjp`, a `HiPrim`). So equations that hold one, and no
  state, are put behind a primitive that lowering passes by, and taken out again afterwards. Where
  the equation itself has state, its rule would be lost: then the jaxpr stays as it is.
  """
  if _private() is None:
    return _making_refs(closed_jaxpr)
  if (renamed := _renamed(closed_jaxpr)) is not None:
    return renamed
  try:
    from jax._src.state.discharge import discharge_state

    jaxpr = _rewritten(closed_jaxpr, _with_classic_remat)
    rules = _custom_rules(jaxpr) if differentiable else 0
    pure = discharge_state(_rewritten(jaxpr, _kept) if rules else jaxpr, lower=False)
  except (ImportError, AttributeError, NotImplementedError, TypeError):
    return _making_refs(closed_jaxpr)
  pure = _rewritten(pure, _taken_out) if rules else pure
  return pure if not rules or _custom_rules(pure) == rules else _making_refs(closed_jaxpr)


def refs_as_inputs(closed_jaxpr: Any) -> Any:
  """A jaxpr with the Refs among its constants as further inputs, after the others."""
  old = closed_jaxpr.jaxpr
  consts = dict(zip(old.constvars, closed_jaxpr.consts, strict=True))
  if not (refs := list(filter(is_ref_var, consts))):
    return closed_jaxpr
  rest = {v: x for v, x in consts.items() if not is_ref_var(v)}
  info = old.debug_info.with_unknown_names()
  jaxpr = old.replace(constvars=list(rest), invars=[*old.invars, *refs], debug_info=info)
  return ClosedJaxpr(jaxpr, list(rest.values()))


def consts_as_inputs(closed_jaxpr: Any) -> Any:
  """A jaxpr with its constants as further inputs, before the others."""
  old = closed_jaxpr.jaxpr
  info = old.debug_info.with_unknown_names()
  jaxpr = old.replace(constvars=[], invars=[*old.constvars, *old.invars], debug_info=info)
  return ClosedJaxpr(jaxpr, [])


def _making_refs(closed_jaxpr: Any) -> Any:
  """A jaxpr with Refs among its inputs as one of values, which makes the Refs itself."""
  are_refs = list(map(is_ref_var, closed_jaxpr.jaxpr.invars))
  if not any(are_refs):
    return closed_jaxpr

  def run(*values: Any) -> list[Any]:
    given = [new_cell(x) if is_ref else x for x, is_ref in zip(values, are_refs, strict=True)]
    results = jaxpr_as_fun(closed_jaxpr)(*given)
    return [*results, *(ref[...] for ref, is_ref in zip(given, are_refs, strict=True) if is_ref)]

  avals = [getattr(v.aval, "inner_aval", v.aval) for v in closed_jaxpr.jaxpr.invars]
  return jax.make_jaxpr(run)(*map(type_struct, avals))


def _renamed(closed_jaxpr: Any) -> Any:
  """`discharge` of a jaxpr that makes, reads and writes whole Refs only; None for any other.

  JAX would trace all of it once more. Such a jaxpr has as many operations of other sorts as before,
  and what has derivatives of its own is one of these.
  """
  if not _effects_are_of_refs(closed_jaxpr) or any(map(is_ref, closed_jaxpr.consts)):
    return None
  try:
    return _Whole(closed_jaxpr).run_all()
  except (AttributeError, NotImplementedError, TypeError, KeyError, ValueError):
    return None


def without_refs(closed_jaxpr: Any, written: list[Any]) -> tuple[Any, list[Any]] | None:
  """A jaxpr of Refs as one of values, for a compiler: what it does to Refs is put into variables.

  JAX would trace the whole once more for it (`discharge_state`, 50 us an operation). Here, a read
  or a write of a whole Ref becomes another name for a variable; only an operation that does
  something else to a Ref (a loop, a write to a part) is discharged by JAX, by itself.

  Private: the names and forms of JAX's operations on Refs, `discharge_state`.

  Args:
    closed_jaxpr: the jaxpr; among its inputs and constants are Refs.
    written: the variables of those Refs whose values are returned, before all else.

  Returns:
    The jaxpr, and the variables of the old one that its inputs stand for: those of Refs that it
    neither reads nor writes are left out. None if JAX has operations that are not known here.
  """
  if _private() is None:
    return None
  try:
    return _Values(closed_jaxpr).run(written)
  except (ImportError, AttributeError, NotImplementedError, TypeError, KeyError, ValueError):
    return None


class _Values:
  """The values of variables and Refs while a jaxpr is rewritten."""

  def __init__(self, closed_jaxpr: Any):
    self._closed, self._jaxpr = closed_jaxpr, closed_jaxpr.jaxpr
    self._names: dict[Any, Any] = {}  # variables that are others now
    self._refs: dict[Any, Any] = {}  # the value of each Ref
    self._eqns: list[Any] = []
    self._consts: dict[Any, Any] = {}

  def run(self, written: list[Any]) -> tuple[Any, list[Any]]:
    """See `without_refs`."""
    kept, inputs = self._add_all()
    outvars = [*(self._refs[v] for v in written), *map(self._now, self._jaxpr.outvars)]
    used = {v for eqn in self._eqns for v in eqn.invars if type(v) is not Literal} | {
      v for v in outvars if type(v) is not Literal
    }
    kept = [v for v in kept if v not in inputs or inputs[v] in used]
    return self._closed_jaxpr([inputs.get(v, v) for v in kept], outvars), kept

  def run_all(self) -> Any:
    """See `discharge`."""
    given, inputs = self._add_all()
    outvars = [*map(self._now, self._jaxpr.outvars), *(self._refs[v] for v in inputs)]
    return self._closed_jaxpr([inputs.get(v, v) for v in given], outvars)

  def _add_all(self) -> tuple[list[Any], dict[Any, Any]]:
    """Take over all operations; returns the inputs, and the values of the Refs among them."""
    old = self._jaxpr
    consts = dict(zip(old.constvars, self._closed.consts, strict=True))
    given = [v for v in (*old.invars, *consts) if v not in consts or is_ref_var(v)]
    self._refs = {v: _new_var(v.aval.inner_aval) for v in given if is_ref_var(v)}
    inputs = dict(self._refs)
    self._consts = {v: x for v, x in consts.items() if not is_ref_var(v)}
    for eqn in old.eqns:
      self._add(eqn)
    return given, inputs

  def _closed_jaxpr(self, invars: list[Any], outvars: list[Any]) -> Any:
    old = self._jaxpr
    jaxpr = old.replace(
      constvars=list(self._consts),
      invars=invars,
      outvars=outvars,
      eqns=self._eqns,
      effects=frozenset(),
      debug_info=old.debug_info.with_unknown_names(),
      is_high=any(map(_is_high, self._eqns)),
    )
    return ClosedJaxpr(jaxpr, list(self._consts.values()))

  def _now(self, atom: Any) -> Any:
    return atom if type(atom) is Literal else self._names.get(atom, atom)

  def _add(self, eqn: Any) -> None:
    """Take over an operation, or what it does to a Ref."""
    name, params = eqn.primitive.name, eqn.params
    is_whole = name in ("get", "swap") and len(eqn.invars) == 1 + (name == "swap")
    if is_whole and not jax.tree.unflatten(params["tree"], []):
      ref = eqn.invars[0]
      self._names[eqn.outvars[0]] = self._refs[ref]
      if name == "swap":
        self._refs[ref] = self._now(eqn.invars[1])
    elif name == "new_ref" and params["memory_space"] is None:
      self._refs[eqn.outvars[0]] = self._now(eqn.invars[0])
    elif name == "freeze":
      self._names[eqn.outvars[0]] = self._refs[eqn.invars[0]]
    elif _has_state(eqn) or any(map(is_ref_var, eqn.outvars)):
      self._discharge(eqn)
    else:
      invars = list(map(self._now, eqn.invars))
      same = all(map(operator.is_, invars, eqn.invars))
      self._eqns.append(eqn if same else eqn.replace(invars=invars))

  def _discharge(self, eqn: Any) -> None:
    from jax._src.state.discharge import discharge_state

    if any(map(is_ref_var, eqn.outvars)):
      raise NotImplementedError(eqn.primitive.name)
    invars = list({v: None for v in eqn.invars if type(v) is not Literal})
    alone = self._jaxpr.replace(
      constvars=[],
      invars=invars,
      outvars=eqn.outvars,
      eqns=[eqn],
      effects=eqn.effects,
      debug_info=self._jaxpr.debug_info.with_unknown_names(),
    )
    pure = discharge_state(ClosedJaxpr(alone, []), lower=False)
    inner = pure.jaxpr
    given = [self._refs[v] if is_ref_var(v) else self._now(v) for v in invars]
    self._names |= zip(inner.invars, given, strict=True)
    self._consts |= zip(inner.constvars, pure.consts, strict=True)
    for new in inner.eqns:
      self._eqns.append(new.replace(invars=list(map(self._now, new.invars))))
    refs = [v for v in invars if is_ref_var(v)]
    values = list(map(self._now, inner.outvars))
    self._names |= zip(eqn.outvars, values[: len(eqn.outvars)], strict=True)
    self._refs |= zip(refs, values[len(eqn.outvars) :], strict=True)


class _Whole(_Values):
  """The same where all operations on Refs make, read or write a whole one."""

  def _add(self, eqn: Any) -> None:
    if _has_state(eqn) and eqn.primitive.name not in ("new_ref", "get", "swap", "freeze"):
      raise NotImplementedError(eqn.primitive.name)
    super()._add(eqn)

  def _discharge(self, eqn: Any) -> None:
    raise NotImplementedError(eqn.primitive.name)


def _is_high(eqn: Any) -> bool:
  """Whether an equation computes with what JAX lowers to operations of its own."""
  return eqn.primitive.is_high(*(v.aval for v in eqn.invars), **eqn.params)


def is_ref_var(atom: Any) -> bool:
  """Whether a variable of a jaxpr stands for a Ref. Private: the attribute of its type."""
  return hasattr(atom.aval, "inner_aval")


_call = Primitive("refax_call")
_call.multiple_results = True
_call.def_impl(lambda *args, call: jaxpr_as_fun(call.jaxpr)(*args))
_call.def_abstract_eval(lambda *args, call: list(call.jaxpr.out_avals))
mlir.register_lowering(
  _call,
  lambda ctx, *args, call: mlir.core_call_lowering(
    ctx, *args, name=call.name, call_jaxpr=call.jaxpr
  ),
)


class Call(NamedTuple):
  """The function that an operation `refax_call` calls."""

  name: str
  jaxpr: Any
  __hash__ = object.__hash__
  __eq__ = object.__eq__


def call_jaxpr(closed_jaxpr: Any, args: list[Any], name: str) -> list[Any]:
  """The results of a jaxpr without effects, as one operation of the trace of now.

  `jaxpr_as_fun` would trace each of its operations once more. This is for a compiler only: it can
  be neither differentiated nor batched. What is high (`jax.experimental.hijax`), JAX has to lower.
  """
  if closed_jaxpr.jaxpr.is_high:
    return jaxpr_as_fun(closed_jaxpr)(*args)
  return _call.bind(*args, call=Call(name, closed_jaxpr))


def without_rules(closed_jaxpr: Any) -> Any:
  """A jaxpr without derivatives of the user's own, for a compiler: it holds none of his functions.

  Private: the names of JAX's operations with such rules, and their parameter `call_jaxpr`.
  """
  return _rewritten(closed_jaxpr, _called)


def _called(eqn: Any) -> Any:
  """An equation that calls what has derivatives of its own, as a call of the function alone."""
  function = eqn.params.get("call_jaxpr")
  if eqn.primitive.name not in ("custom_jvp_call", "custom_vjp_call") or function is None:
    return None
  call = Call(eqn.primitive.name, _rewritten(function, _called))
  return eqn.replace(primitive=_call, params={"call": call})


def context_of(eqn: Any) -> Any:
  """The settings under which an equation was made (where it computes, which random bits it draws).

  Private: the attribute `ctx`. Without it, an equation is like itself only.
  """
  return getattr(eqn, "ctx", eqn)


def is_literal(atom: Any) -> bool:
  """Whether what an equation reads is a number, and no variable."""
  return type(atom) is Literal


def fits(closed_jaxpr: Any, args: list[Any]) -> bool:
  """Whether values have the types, shardings included, that a jaxpr is to be called with."""
  plain = lambda aval: aval.strip_weak_type() if hasattr(aval, "strip_weak_type") else aval
  types = (plain(jax.typeof(x)) for x in args)
  return all(map(operator.eq, types, map(plain, closed_jaxpr.in_avals)))


def is_custom(eqn: Any) -> bool:
  """Whether an equation calls what has derivatives or a batching rule of its own.

  `call_hi_primitive` is the one primitive of `jax.experimental.hijax`, and of `jax.custom_vjp` and
  `jax.custom_jvp` in their new form.
  """
  return eqn.primitive.name.startswith(("custom_", "call_hi_primitive"))


def _custom_rules(jaxpr: Any) -> int:
  """How many such calls a jaxpr holds, at any depth."""
  return sum(is_custom(eqn) + sum(map(_custom_rules, inner_jaxprs(eqn))) for eqn in jaxpr.eqns)


def inner_jaxprs(eqn: Any) -> list[Any]:
  """The jaxprs, closed ones too, among the parameters of an equation."""
  flat = (y for x in eqn.params.values() for y in (x if type(x) is tuple else (x,)))
  return [x for x in flat if hasattr(x, "eqns")]


def scan_counts(eqn: Any) -> tuple[int, int]:
  """How many of the inputs of a `lax.scan` are constants, and how many are carried.

  What is sliced has the steps as an axis in front that it lacks inside. The parameters say it too,
  otherwise in each release.
  """
  body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
  is_whole = lambda outer, inner: len(outer.aval.shape) == len(inner.aval.shape)
  whole = sum(map(is_whole, eqn.invars, body.invars))
  carried = sum(map(is_whole, eqn.outvars, body.outvars))
  return whole - carried, carried


def meant_jaxprs(eqn: Any) -> list[Any]:
  """The jaxprs that an equation of `jax.experimental.hijax` will become.

  Private: the parameter `_prim`. A `HiPrim` that holds none says in `expand` what it computes.
  """
  prim = eqn.params.get("_prim")
  if prim is None:
    return []
  held = [getattr(x, "jaxpr", x) for x in prim.params.values()]
  return [x for x in held if hasattr(x, "eqns")] or [jax.make_jaxpr(prim.expand)(*prim.in_avals)]


def _has_state(eqn: Any) -> bool:
  """Whether an equation is given Refs, or makes some inside."""
  return any(map(makes_ref, eqn.effects)) or any(map(is_ref_var, eqn.invars))


def _rewritten(jaxpr: Any, change: Callable[[Any], Any]) -> Any:
  """A jaxpr with other equations: `change(eqn)`, or where that is None, `eqn` rewritten inside."""

  def inside(x: Any) -> Any:
    if type(x) is tuple:
      return tuple(map(inside, x))
    return _rewritten(x, change) if hasattr(x, "eqns") else x

  def rewritten(eqn: Any) -> Any:
    new = change(eqn)
    if new is None and inner_jaxprs(eqn):
      params = {name: inside(x) for name, x in eqn.params.items()}
      changed = eqn.replace(params=params)
      new = changed if any(map(operator.is_not, inner_jaxprs(eqn), inner_jaxprs(changed))) else None
    return eqn if new is None else new

  old = getattr(jaxpr, "jaxpr", jaxpr)  # from 0.12 on, a closed jaxpr is one like others
  eqns = list(map(rewritten, old.eqns))
  if all(map(operator.is_, eqns, old.eqns)):
    return jaxpr
  new = old.replace(eqns=eqns, is_high=any(map(_is_high, eqns)))
  return new if old is jaxpr else jaxpr.replace(jaxpr=new)


class _Behind(NamedTuple):
  """The equation that `refax_kept` stands for."""

  eqn: Any
  __hash__ = object.__hash__
  __eq__ = object.__eq__


_keep = Primitive("refax_kept")
_keep.multiple_results = True
_keep.def_effectful_abstract_eval(
  lambda *args, behind: ([v.aval for v in behind.eqn.outvars], behind.eqn.effects)
)


def _kept(eqn: Any) -> Any:
  """Put an equation behind `refax_kept`, if it has derivatives of its own inside, and no state."""
  if _has_state(eqn) or not (is_custom(eqn) or any(map(_custom_rules, inner_jaxprs(eqn)))):
    return None
  return eqn.replace(primitive=_keep, params={"behind": _Behind(eqn)})


def _taken_out(eqn: Any) -> Any:
  if eqn.primitive is not _keep:
    return None
  behind = eqn.params["behind"].eqn
  return eqn.replace(primitive=behind.primitive, params=behind.params)


def _with_classic_remat(eqn: Any) -> Any:
  """`jax.checkpoint` of a function with state in its form of before `jax_remat3`.

  Only this form can be discharged. Private: the primitive `remat_p`, and what `RematTraced` holds.
  """
  prim = eqn.params.get("_prim")
  if type(prim).__name__ != "RematTraced" or not _has_state(eqn):
    return None
  from jax._src.ad_checkpoint import remat_p

  given = {name: getattr(prim, name) for name in ("jaxpr", "policy", "prevent_cse")}
  given["jaxpr"] = _rewritten(given["jaxpr"], _with_classic_remat)
  return eqn.replace(primitive=remat_p, params={**given, "differentiated": False})


def checked(ok: jax.Array, message: str) -> jax.Array:
  """`ok` as it is; `checkify` reads the call as `check(all(ok), message)`.

  `checkify.debug_check` would say the same, but its effect takes a compiled function off JAX's fast
  path: 58 us a call instead of 4. This is a primitive without an effect, whose rule is private:
  `jax._src.checkify.error_checks`. It falls back to `debug_check`.
  """
  if _checked is None:
    checkify.debug_check(jnp.all(ok), message)
    return ok
  return _checked.bind(ok, message=message)


def _checked_primitive() -> Any:
  """The primitive of `checked`; None where JAX lacks what its rule for `checkify` is made of."""
  if os.environ.get("REFAX_PUBLIC_JAX") == "1":
    return None
  try:
    from jax._src.checkify import Error, checkify_jaxpr, error_checks
  except ImportError:
    return None

  def rule(*args: Any, message: str) -> Any:
    at = next(i for i, x in enumerate(args) if isinstance(x, Error))
    context, error, enabled, ok = args[:at], args[at], args[at + 1], args[at + 2]
    check = lambda ok: (checkify.debug_check(jnp.all(ok), message), ok)[1]
    error, (ok,) = checkify_jaxpr(*context, jax.make_jaxpr(check)(ok), enabled, error, ok)
    return error, ok

  primitive = Primitive("refax_checked")
  primitive.def_impl(lambda ok, *, message: ok)
  primitive.def_abstract_eval(lambda ok, *, message: ok)
  ad.primitive_jvps[primitive] = lambda primals, tangents, *, message: (
    primitive.bind(*primals, message=message),
    tangents[0],  # a boolean has none
  )
  batching.defvectorized(primitive)
  mlir.register_lowering(primitive, lambda ctx, ok, *, message: [ok])
  error_checks[primitive] = rule
  return primitive


_checked = _checked_primitive()


def has_checks(closed_jaxpr: Any) -> bool:
  """Whether a jaxpr calls `checked` or `checkify.check`, at any depth."""

  def found(jaxpr: Any) -> bool:
    return any(
      eqn.primitive.name in ("refax_checked", "check")
      or any(map(found, (*inner_jaxprs(eqn), *meant_jaxprs(eqn))))
      for eqn in jaxpr.eqns
    )

  return found(closed_jaxpr.jaxpr)


def has_failed(error: Any) -> Any:
  """Whether a check failed, of the error that `checkify` returns inside a trace: a boolean.

  Private: `Error._pred`, a boolean for each sort of error. Public is only `Error.get`, which needs
  concrete values; without the attribute all booleans in the error count.
  """
  leaves = jax.tree.leaves(getattr(error, "_pred", error))
  return functools.reduce(
    jnp.logical_or, (jnp.any(x) for x in leaves if jnp.asarray(x).dtype == jnp.bool_), False
  )


def snapshot(refs: list[jax.Ref], tries: int = TRIES) -> list[jax.Array] | None:
  """Copies of what concrete Refs hold at one moment, while other threads may write them.

  Private: the buffers `ref._refs._buf`. All are looked at in one C call, and so is their exchange
  by a compiled step: the lot belongs to one step. Another thread may donate them until the copy
  holds them; then they are looked at again. Falls back to reading one after the other.

  Returns:
    The copies; None if in all `tries` another thread was in between.
  """
  if not no_trace_active() or any(map(is_tracer, refs)):
    return [read_cell(ref) for ref in refs]
  cells: list[Any] = [ref._refs for ref in refs]  # pyright: ignore[reportAttributeAccessIssue]
  look, patience = operator.attrgetter("_buf"), Patience(tries)
  while True:
    held = list(map(look, cells))
    arrays = list(map(bits, held))  # `jit` is slow with typed keys
    if not any(x.is_deleted() for x in arrays):
      try:
        copies, calls = _copied_together(arrays)
      except Exception as error:  # while another call takes a buffer, it is not deleted yet
        if not any(x.is_deleted() for x in arrays) and "deleted or donated" not in str(error):
          raise
      else:
        if calls < 2 or all(map(operator.is_, held, map(look, cells))):
          return list(map(_as_key, held, copies))
    if not patience.waits():
      return None


def wait(attempt: int) -> None:
  """A pause before the next attempt to read what another thread writes."""
  time.sleep(random.random() * 1e-5 * min(attempt, 100))


def _copied_together(xs: list[jax.Array]) -> tuple[list[jax.Array], int]:
  """Copies of arrays, and how many calls it took: one for each set of devices."""
  groups: dict[Any, list[int]] = {}
  for i, x in enumerate(xs):
    groups.setdefault(frozenset(x.sharding.device_set), []).append(i)
  copies = {}
  for places in groups.values():
    copies |= zip(places, _copy_all([xs[i] for i in places]), strict=True)
  return [copies[i] for i in range(len(xs))], len(groups)


def put_back(refs: list[jax.Ref], buffers: list[jax.Array]) -> None:
  """Let concrete Refs hold what `peek_cell` has given of them, if they still can."""
  if _private() is not None:
    for ref, buffer in zip(refs, buffers, strict=True):
      impl: Any = ref._refs  # pyright: ignore[reportAttributeAccessIssue]
      impl._buf = buffer
  else:
    for ref, buffer in zip(refs, buffers, strict=True):
      ref[...] = buffer


def evaluate(eqn: Any, args: list[Any]) -> list[Any]:
  """The results of one equation of a jaxpr, under the settings and names that it was traced with.

  Private: `get_bind_params` and `eqn.ctx`, with which JAX's own `eval_jaxpr` does the same, and the
  name stack. Falls back to no names.
  """
  params = eqn.primitive.get_bind_params(eqn.params)
  with _named(eqn), eqn.ctx.manager:
    results = eqn.primitive.bind(*args, **params)
  return list(results) if eqn.primitive.multiple_results else [results]


def interpret(
  closed: Any, args: Sequence[Any], results_of: Callable[[Any, list[Any]], Sequence[Any]]
) -> list[Any]:
  """Run a jaxpr, closed or without constants, by what `results_of` makes of each equation."""
  jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
  env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
  env |= zip(jaxpr.invars, args, strict=True)
  read = lambda v: v.val if isinstance(v, Literal) else env[v]
  for eqn in jaxpr.eqns:
    env |= zip(eqn.outvars, results_of(eqn, list(map(read, eqn.invars))), strict=True)
  return list(map(read, jaxpr.outvars))


def one_by_one(fn: Callable[..., Any], *args: Any) -> Any:
  """`fn(*args)`, one array, compiled, with the bits that its operations give one by one.

  XLA rewrites across operations: it multiplies two constants, and the last bit is another one. A
  barrier after each operation on arguments keeps it from that, and one before each float that JAX
  hands to a compiled function of its own, which does not know it either. Not before an int: to
  compute the bounds -2 and 2 of a normal distribution anew for each element takes half as long
  again for a small array, twice the time that the budget of construction has, for the same bits.
  """
  closed = jax.make_jaxpr(fn)(*args)
  jaxpr, barrier = closed.jaxpr, jax.lax.optimization_barrier
  given = (*closed.consts, *jax.tree.leaves(args))  # a key that is None has no part in it
  known = dict(zip((*jaxpr.constvars, *jaxpr.invars), given, strict=True))
  moving = set(jaxpr.invars)

  def read(atom: Any) -> Any:
    if not isinstance(atom, Literal):
      return known[atom]
    dtype = cast(Any, atom.aval).dtype
    is_float = jnp.issubdtype(dtype, jnp.floating)
    return barrier(jnp.asarray(atom.val, dtype)) if is_float else atom.val

  for eqn in jaxpr.eqns:
    is_moving = not moving.isdisjoint(x for x in eqn.invars if not isinstance(x, Literal))
    results = evaluate(eqn, list(map(read, eqn.invars)))
    if is_moving:
      moving.update(eqn.outvars)
      results = barrier(results)
    known.update(zip(eqn.outvars, results, strict=True))
  return read(jaxpr.outvars[0])


def _named(eqn: Any) -> Any:
  try:
    from jax._src.source_info_util import current_name_stack, user_context

    names = current_name_stack() + eqn.source_info.name_stack
    return user_context(eqn.source_info.traceback, name_stack=names)
  except (ImportError, AttributeError, TypeError):
    return contextlib.nullcontext()
