"""nnx.profile: where the operations, the time and the memory of a function go, by layer.

Operations are counted in the jaxpr, as `nnx.tabulate` counts them. The function is compiled under
a name of its own, and its text says to which layer each instruction belongs: by that the times of
a profiler trace and the buffers that are alive are given to layers.
"""

import hashlib
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from refax import _jax
from refax.core import calls
from refax.core.calls import Call, Observer
from refax.core.variable import Variable
from refax.errors import InvalidArgumentError
from refax.inspect import timing
from refax.inspect.cost import Cost, Operation, by_path, is_backward_name, operations
from refax.inspect.program import Program, layer_of_name
from refax.inspect.report import Buffer, Memory, Part, Profile
from refax.inspect.summary import type_of
from refax.inspect.target import Arguments, like, owner_and_function
from refax.transforms.jit import leaf_name
from refax.transforms.lift import Inputs
from refax.transforms.stage import Staged, read_closures, values_of
from refax.transforms.taps import opened
from refax.typing import Path


def profile(fn: Callable, *, measure: bool = False, runs: int = 5) -> Callable[..., Profile]:
  """Where the operations, the time and the memory of a function go, by layer.

  All state stays as it is. Without `measure` the function is compiled and does not run, and the
  arguments may be types (`jax.ShapeDtypeStruct`, `nnx.as_abstract`).

  Args:
    fn: a Module, or a function of Modules, Variables and arrays, such as a training step. It may be
      compiled already.
    measure: whether to run it under JAX's profiler, which only one in a process can do at a time.
    runs: how often it then runs, after one run that does not count; the fastest is shown.

  Returns:
    A function with the arguments of `fn` that returns a `Profile`, which prints as a table and
    draws itself with `save`. An operation belongs to the innermost Module in whose call it is;
    what XLA has fused into one instruction takes its time in the layer of the last operation.

  Raises:
    InvalidArgumentError: `runs` is not a positive int; or an argument has no value, with `measure`.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> rngs = nnx.Rngs(0)
  >>> model = nnx.Sequential(nnx.Linear(2, 64, rngs=rngs), nnx.Linear(64, 2, rngs=rngs))
  >>> print(nnx.profile(model)(jnp.ones((8, 2))))  # doctest: +ELLIPSIS
  layer       FLOPs  backward   share    bytes
  --------------------------------------------
  (no layer)      0         0    0.0%      0 B
  layers/0    2,560         0   55.4%  ...
  ...
  """
  if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
    raise InvalidArgumentError.value("nnx.profile", "runs", runs, "a positive int")
  owner, function = owner_and_function(fn)
  signature: Any = type(fn).__call__ if any(fn is x for x in owner) else function

  def wrapper(*args: Any, **kwargs: Any) -> Profile:
    arguments = Arguments.of((*owner, *args), kwargs)
    complete, seen = arguments.completing(function), _Paths()

    def call(*args: Any, **kwargs: Any) -> Any:
      with calls.observing(seen, args[0] if owner else None):
        return complete(*args, **kwargs)

    inputs = Inputs.of(arguments.args, arguments.kwargs)
    values = values_of(inputs)
    if not _are_values(values):
      if measure:
        want = "measure=False, or arguments that are neither types nor values of a transform"
        raise InvalidArgumentError.value("nnx.profile", "measure", measure, want)
      values = list(map(type_of, inputs.leaves))
    staged = Staged(call, inputs, values, is_final=True)

    def name(path: Path) -> str:
      text = leaf_name(signature, path)
      return f"model{text.removeprefix('self')}" if owner and text.startswith("self") else text

    return _profiled(staged, values, list(seen.found), name, runs if measure else 0)

  return like(fn, wrapper)


class _Paths(Observer):
  """Notes the paths of the Modules that are called, in order."""

  def __init__(self):
    super().__init__()
    self.found: dict[str, None] = {}

  def enter(self, call: Call, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if call.path and not call.module._is_container:
      self.found.setdefault("/".join(map(str, call.path)))
    return args, kwargs


def _are_values(values: Sequence[Any]) -> bool:
  leaves = jax.tree.leaves(list(values))
  return not any(isinstance(x, jax.ShapeDtypeStruct) or _jax.is_tracer(x) for x in leaves)


def _profiled(
  staged: Staged, values: list[Any], order: list[str], name: Callable[[Path], str], runs: int
) -> Profile:
  found = list(operations(opened(staged.pure)))
  paths = set(order)
  costs = by_path(found, paths, lambda x: "backward" if x.is_backward else "forward")
  closures = {k: jax.ShapeDtypeStruct(r.shape, r.dtype) for k, r in staged.closures.items()}
  if runs:
    closures = read_closures([staged])[1]
  compiled, module = _compiled(staged, values, closures, found)
  program = Program.of(compiled.as_text() or "")
  names = program.op_names()
  seconds: dict[str, float] | None = None
  wall, notes = None, []
  if runs:
    operands = lambda: (*_apart(staged, values, copied=True), closures)
    run = timing.Run(compiled, operands, module, program.containers())
    times, reason = timing.measure(run, runs)
    if times is not None and names.keys().isdisjoint(times.by_instruction):
      times, reason = None, "the trace of JAX's profiler names no instruction of the program"
    if times is None:
      notes.append(f"no times: {reason}")
    else:
      wall, seconds = times.wall, defaultdict(float)
      for instruction, t in times.by_instruction.items():
        seconds[layer_of_name(names.get(instruction, ""), paths)] += t
  none = Cost()
  parts = [
    Part(
      path,
      costs.get((path, "forward"), none),
      costs.get((path, "backward"), none),
      None if seconds is None else seconds.get(path, 0.0),
    )
    for path in ("", *order)
  ]
  memory = _memory(staged, values, compiled, program, paths, name)
  return Profile(parts, memory, wall, notes)


def _compiled(
  staged: Staged, values: list[Any], closures: dict[int, Any], found: list[Operation]
) -> tuple[Any, str]:
  """The compiled function, and its name, which no other function has.

  JAX's cache on disk knows programs by what they compute and by their name, not by the scopes in
  them: under a name of its own a program gets its own scopes back, not another model's.
  """

  def run(kept: list[Any], donated: dict[int, Any], closures: dict[int, Any]) -> Any:
    values = [donated.get(i, x) for i, x in enumerate(kept)]
    result = staged.run(values, closures)
    return result.outputs.written, result.outputs.fresh, result.closures

  scopes = [f"{'/'.join(x.scopes)} {x.is_backward} {x.eqn.primitive.name}" for x in found]
  digest = hashlib.sha256("\n".join(scopes).encode()).hexdigest()[:16]
  run.__name__ = run.__qualname__ = f"refax_profile_{digest}"
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", ".*donated buffers were not usable")
    lowered = jax.jit(run, donate_argnums=1).lower(*_apart(staged, values), closures)
    return lowered.compile(), f"jit_{run.__name__}"


def _apart(
  staged: Staged, values: list[Any], *, copied: bool = False
) -> tuple[list[Any], dict[int, Any]]:
  """The values that stay, and those of state that is written: these give their memory away.

  So they do under `nnx.jit`. XLA then cannot compute in the memory of the new values either.
  """
  copy = lambda x: jax.tree.map(jax.numpy.copy, x) if copied else x
  donated = {i: copy(values[i]) for i in staged.written}
  return [None if i in donated else x for i, x in enumerate(values)], donated


def _memory(
  staged: Staged,
  values: list[Any],
  compiled: Any,
  program: Program,
  paths: set[str],
  name: Callable[[Path], str],
) -> Memory | None:
  try:
    stats = compiled.memory_analysis()
    kinds = ("argument", "output", "temp", "alias")
    arguments, outputs, temporaries, aliased = (
      int(getattr(stats, f"{kind}_size_in_bytes")) for kind in kinds
    )
  except Exception:  # a platform that does not tell
    return None
  state = []
  inputs = staged.inputs
  for path, leaf, value in zip(inputs.graphdef.paths, inputs.leaves, values, strict=True):
    what = type(leaf).__name__ if isinstance(leaf, Variable) else "argument"
    state.append(Buffer(name(path), _size(value), what))
  for key, ref in staged.closures.items():
    variable = staged.closure_variable(key)
    what = "Variable" if variable is None else type(variable).__name__
    path = "" if variable is None else variable._def.origin.path()
    nbytes = _size(jax.ShapeDtypeStruct(ref.shape, ref.dtype))
    state.append(Buffer(path or "a Variable", nbytes, f"{what}, by closure"))
  names = program.op_names()
  alive = (
    Buffer(layer_of_name(names[x.name], paths), x.nbytes, _instruction(names[x.name], x.opcode))
    for x in program.alive_at_peak()
  )
  return Memory(arguments, outputs, temporaries, aliased, _largest(state), _largest(alive))


def _instruction(op_name: str, opcode: str) -> str:
  last = op_name.rsplit("/", 1)[-1] or opcode
  return f"{last}, backward" if is_backward_name(op_name) else last


def _largest(buffers: Iterable[Buffer]) -> tuple[Buffer, ...]:
  return tuple(sorted((x for x in buffers if x.nbytes), key=lambda x: -x.nbytes))


def _size(value: Any) -> int:
  """The bytes on one device of the arrays in a value, also of random keys."""
  total = 0
  for x in jax.tree.leaves(value):
    if hasattr(x, "dtype") and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.eval_shape(jax.random.key_data, x)
    x = x if hasattr(x, "dtype") else np.asarray(x)
    sharding = getattr(x, "sharding", None)
    shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
    total += math.prod(shape) * x.dtype.itemsize
  return total
