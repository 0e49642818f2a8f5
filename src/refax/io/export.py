"""export: a stateful function as an artifact that runs without the code of its model.

The function is compiled to StableHLO by `jax.export`, with state as inputs and outputs; the state
goes to a safetensors file beside it. What is loaded again holds the state in Variables and updates
them in place, as the model did.
"""

import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from refax import _jax
from refax.core.containers import Dict
from refax.core.module import Module
from refax.core.node import Node
from refax.core.processes import flat_bytes
from refax.core.pytree import static
from refax.core.variable import BatchStat, Cache, Intermediate, Param, Variable
from refax.errors import CheckpointFormatError, CheckpointMismatchError, ExportError, message
from refax.io.keys import as_data, as_value, implementation, is_key
from refax.io.origin import written_by
from refax.io.safetensors import load_safetensors, save_safetensors
from refax.io.stored import from_flat_bytes
from refax.io.tensor_file import NAMES
from refax.nn.attention.kv_cache import poison
from refax.rngs import RngCount, RngKey
from refax.train.optimizer import OptState
from refax.transforms.commit import CompiledCommit, Outputs
from refax.transforms.jit import jit
from refax.transforms.lift import Inputs
from refax.transforms.stage import Staged

FORMAT = 1
FUNCTION, STATE, ABOUT = "function.bin", "state.safetensors", "about.json"
TYPES = {
  t.__name__: t
  for t in (Variable, Param, BatchStat, Cache, Intermediate, RngKey, RngCount, OptState)
}
"""What Variables become again when they are loaded; those of a user's type become plain ones."""


class _Program:
  """A compiled function; static, compared by identity."""

  def __init__(self, exported: Any):
    self.exported = exported


class ExportedFunction(Module):
  """A function that was exported, with its state; `nnx.export` and `nnx.load_exported` make it.

  It is a Module: call it, or pass it through `jax.jit`, `nnx.jit` and the like.

  Attributes:
    state: the Variables, by path: `state["model.layers.0.kernel"]`.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> def count(counter, x):
  ...   counter[...] += 1
  ...   return x * counter
  >>> exported = nnx.export(count, nnx.Variable(0), jnp.ones(2))
  >>> exported(jnp.ones(2)).tolist(), exported(jnp.ones(2)).tolist()
  ([1.0, 1.0], [2.0, 2.0])
  >>> list(exported.state)
  ['counter']
  """

  def __init__(self, program: Any, state: dict[str, Variable]):
    self.program: _Program = static(_Program(program))
    self.state: Dict[Variable] = Dict(state)

  def __call__(self, *args: Any) -> Any:
    """Call the function and update the state in place.

    Args:
      *args: the arguments that are not state, of the shapes and dtypes of the export.

    Returns:
      What the function returns.

    Raises:
      ExportError: the arguments are not those of the export.
    """
    return _run(self, *args)

  def save(self, path: str | os.PathLike[str]) -> None:
    """Write the function and its state into a folder, which appears when it is complete.

    Args:
      path: the folder; it does not exist yet, or is empty.

    Raises:
      OSError: the folder has files in it, or cannot be written.
      ExportError: `jax.export` has no name for a dtype, or cannot write something else.
    """
    path = os.path.abspath(path)
    parent, name = os.path.split(path)
    folder = tempfile.mkdtemp(prefix=f".{name}.", dir=parent)
    try:
      with open(os.path.join(folder, FUNCTION), "wb") as file:
        file.write(_serialized(self.program.exported))
      save_safetensors(_in_file(self.state), os.path.join(folder, STATE))
      with open(os.path.join(folder, ABOUT), "w", encoding="utf-8") as file:
        json.dump(self._about(), file, indent=1)
      os.chmod(folder, 0o755)  # mkdtemp makes it for its owner alone
      os.replace(folder, path)
    except BaseException:
      shutil.rmtree(folder, ignore_errors=True)
      raise

  def _about(self) -> dict[str, Any]:
    exported = self.program.exported
    return {
      "format": FORMAT,
      "written_by": written_by(),
      "function": exported.fun_name,
      "platforms": list(exported.platforms),
      "state": {name: _about_variable(v) for name, v in self.state.items()},
    }

  def __repr__(self) -> str:
    return f"ExportedFunction({self.program.exported.fun_name}, state: {', '.join(self.state)})"


def export(f: Callable, *args: Any, platforms: Sequence[str] | None = None) -> ExportedFunction:
  """Compile a function of Modules and arrays for a place that does not have their code.

  Args:
    f: a function of `args`. It returns arrays, in tuples, lists and dicts.
    *args: Modules and Variables, whose state the exported function gets a copy of; and arrays or
      `jax.ShapeDtypeStruct`s, in tuples, lists and dicts. A shape may have symbolic sizes, from
      `jax.export.symbolic_shape("batch, 3")`: the function then takes any.
    platforms: what to compile for, such as `("cpu", "cuda")`; by default what JAX runs on now.

  Returns:
    The function of the arguments that are no Modules or Variables, with its state; `save` writes
    both to a folder. It cannot raise: where a check in it fails, by `checkify` or of a decoder
    whose memory is full, each result is NaN, or the integer that is farthest from 0.

  Raises:
    ExportError: an argument mixes state and arrays, two Variables have one name, or `f` reaches
      state by closure, returns something else, or changes the structure of its arguments.

  >>> from refax import nnx; import jax, jax.numpy as jnp, os, tempfile
  >>> rngs = nnx.Rngs(0)
  >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
  >>> x = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 3"), jnp.float32)
  >>> path = os.path.join(tempfile.mkdtemp(), "model")
  >>> nnx.export(lambda model, x: model(x), model, x).save(path)
  >>> loaded = nnx.load_exported(path)               # also where the model's code is not
  >>> y = loaded(jnp.ones((8, 3)))
  >>> y.shape, bool((loaded.state["model.layers.1.mean"][...] == 0).all())
  ((8, 4), False)
  """
  names, is_state = _names(f, args), [isinstance(x, Node | Variable) for x in args]
  arrays = [_shapes(i, x) for i, x in enumerate(args) if not is_state[i]]
  objects = Inputs.of(tuple(x if yes else None for x, yes in zip(args, is_state, strict=True)), {})
  variables = _variables(objects, names)
  place = {id(v): name for name, v in variables.items()}
  impls = {name: implementation(v.get_value()) for name, v in variables.items()}

  def program(*arrays: Any, state: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], Any]:
    rest = iter(arrays)
    inner = tuple(x if yes else next(rest) for x, yes in zip(args, is_state, strict=True))
    inputs = Inputs.of(inner, {})
    values = [
      as_value(state[place[id(x)]], impls[place[id(x)]]) if isinstance(x, Variable) else x
      for x in inputs.leaves
    ]
    staged = Staged(f, inputs, values)
    for key in staged.closures:
      variable = staged.closure_variable(key)
      raise ExportError.closure("a jax.Ref" if variable is None else variable._def.origin)
    outputs = _outputs(staged, values)
    commit = CompiledCommit(inputs.graphdef, outputs)
    if not commit.is_quiet:
      raise ExportError.result("another structure of an argument")
    if (result := commit.plain_result) is None:
      raise ExportError.result("a Module, a Variable or an argument")
    written = zip(outputs.spec.written, outputs.written, strict=True)
    new = {place[id(inputs.leaves[i])]: as_data(x) for i, x in written}
    return new, result(x for x in outputs.fresh if x is not None)

  program.__name__ = getattr(f, "__name__", type(f).__name__)
  state = {name: _shape(as_data(v[...])) for name, v in variables.items()}
  exported = jax.export.export(jax.jit(program), platforms=platforms)(*arrays, state=state)
  return ExportedFunction(exported, {name: v.copy() for name, v in variables.items()})


def _outputs(staged: Staged, values: Sequence[Any]) -> Outputs:
  """What the function gives. Where a check in it fails, nothing can be raised: all is poisoned."""
  run = lambda values: staged.run(values, {}).outputs
  if not _jax.has_checks(staged.pure):
    return run(values)
  error, outputs = checkify.checkify(run)(list(values))
  failed = _jax.has_failed(error)
  fresh = [_poisoned(x, failed) for x in outputs.fresh]
  return Outputs(outputs.written, fresh, outputs.spec)


def _poisoned(x: Any, failed: Any) -> Any:
  """An array as one that nobody takes for a result, if a check has failed."""
  if x is None or is_key(x):
    return x
  return jnp.where(failed, jnp.asarray(poison(x.dtype), x.dtype), x)


def load_exported(path: str | os.PathLike[str]) -> ExportedFunction:
  """Load a function that `ExportedFunction.save` has written.

  Args:
    path: the folder.

  Returns:
    The function, with its state as it was saved. Variables of types that Refax does not know have
    become plain ones.

  Raises:
    ExportError: the folder holds no such function, is damaged, or is of a newer format.

  >>> from refax import nnx; import jax, jax.numpy as jnp, os, tempfile
  >>> path = os.path.join(tempfile.mkdtemp(), "stream")
  >>> nnx.export(lambda stream: jax.random.normal(stream()), nnx.Rngs(0)).save(path)
  >>> stream = nnx.load_exported(path)
  >>> float(stream()) == float(stream()), int(stream.state["stream.default.count"])
  (False, 2)
  """
  path = os.path.abspath(path)
  try:
    with open(os.path.join(path, ABOUT), encoding="utf-8") as file:
      about = json.load(file)
    if about["format"] > FORMAT:
      got = f"format {about['format']}, this Refax reads up to {FORMAT} ({about['written_by']})"
      raise ExportError.folder(path, got)
    state = {name: _new_variable(facts) for name, facts in about["state"].items()}
    with open(os.path.join(path, FUNCTION), "rb") as file:
      exported = jax.export.deserialize(bytearray(file.read()))
    function = ExportedFunction(exported, state)
    arrays = _in_file(state)
    load_safetensors(arrays, os.path.join(path, STATE))
    for name, v in state.items():
      if not isinstance(arrays[name], Variable):
        v[...] = jnp.asarray(from_flat_bytes(arrays[name], v.dtype, v.shape))
  except (ExportError, ImportError):
    raise
  except (CheckpointFormatError, CheckpointMismatchError) as error:
    raise ExportError.folder(path, f"{STATE}: {message(error)}") from error
  except Exception as error:  # whatever damage makes of three formats
    raise ExportError.folder(path, f"{type(error).__name__}: {message(error)}") from error
  return function


@jit
def _run(function: ExportedFunction, *args: Any) -> Any:
  exported = function.program.exported
  state = {name: as_data(v[...]) for name, v in function.state.items()}
  try:
    new, result = exported.call(*args, state=state)
  except ValueError as error:
    raise ExportError.call(exported.fun_name, " ".join(str(error).split())) from None
  for name, x in new.items():
    variable = function.state[name]
    variable[...] = as_value(x, implementation(variable.get_value()))
  return result


def _names(f: Callable, args: tuple) -> list[str]:
  """The names of the parameters of a function, by which its state is called."""
  try:
    signature = inspect.signature(f)
    bound = signature.bind(*args).arguments
  except (TypeError, ValueError):
    return [f"arg{i}" for i in range(len(args))]
  names = []
  for name, value in bound.items():
    many = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
    names += [f"{name}.{i}" for i in range(len(value))] if many else [name]
  return names


def _variables(objects: Inputs, names: list[str]) -> dict[str, Variable]:
  """The Variables among the arguments, by path."""
  found = {}
  for path, leaf in zip(objects.graphdef.paths, objects.leaves, strict=True):
    if isinstance(leaf, Variable):
      name = ".".join((names[path[1]], *map(str, path[2:])))
      if not isinstance(leaf.get_value(), jax.Array):
        raise ExportError.argument(path[1], f"a Variable that holds no array, at {name}")
      if name in found:
        raise ExportError.names(name)
      found[name] = leaf
  return found


def _shapes(index: int, tree: Any) -> Any:
  """The shapes and dtypes of an argument without state."""
  for leaf in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Node | Variable)):
    if isinstance(leaf, Node | Variable):
      raise ExportError.argument(index, f"{type(leaf).__name__} inside {type(tree).__name__}")
  return jax.tree.map(_shape, tree)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
  if isinstance(x, jax.ShapeDtypeStruct):
    return x
  return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def _serialized(exported: Any) -> bytearray:
  try:
    return exported.serialize()
  except (KeyError, TypeError, ValueError, NotImplementedError) as error:
    raise ExportError.serialize(exported.fun_name, f"{type(error).__name__}: {error}") from error


def _in_file(state: Mapping[str, Variable]) -> dict[str, Any]:
  """What the file has for each Variable: its bytes where the format has no such dtype."""
  known = lambda v: v.dtype in NAMES or implementation(v.get_value()) is not None
  return {name: v if known(v) else flat_bytes(v.get_value()) for name, v in state.items()}


def _about_variable(v: Variable) -> dict[str, Any]:
  value = v.get_value()
  return {
    "type": type(v).__name__,
    "shape": list(v.shape),
    "dtype": str(as_data(value).dtype),
    "keys": implementation(value),
    "is_hijax": v.is_hijax,
  }


def _new_variable(facts: dict[str, Any]) -> Variable:
  """A Variable as it is described, to be filled."""
  shape = tuple(facts["shape"])
  if facts["keys"] is not None:
    value = jax.random.split(jax.random.key(0, impl=facts["keys"]), shape)
  else:
    value = jnp.zeros(shape, facts["dtype"])
  return TYPES.get(facts["type"], Variable)(value, is_hijax=facts["is_hijax"])
