"""What Refax raises. Every error says what is wrong, where, what came, and what to do.

RefaxError
├── ShapeMismatchError        (ValueError)   an array of another shape or dtype than expected
├── TreeMismatchError         (ValueError)   two structures that should be alike are not
├── FilterError               (ValueError)   filters that do not cover, or do not make sense
├── StaticAttributeError      (TypeError)    an attribute that can be neither data nor static
├── TraceContextError         (RuntimeError) a write from inside a transform that would leak
├── SharedWriteError          (RuntimeError) a write under vmap to a Variable it does not map
├── DifferentiatedWriteError  (TypeError)    a write whose gradient would be lost
├── UnwantedWriteError        (RuntimeError) a function that must not write state would write it
├── RefArgumentError          (TypeError)    a function of JAX for arrays was given Refs
├── ReturnedRefError          (ValueError)   a function that JAX traces returned Refs
├── GradientOutputError       (TypeError)    a function with a gradient that returns no scalar
├── MissingRuleError          (AttributeError) a custom derivative that was announced and not given
├── AliasError                (ValueError)   one cell in two places that must be apart
├── ShardingError             (ValueError)   a Variable that cannot be divided as was asked for
├── ExplicitAxesError         (NotImplementedError) what explicit axes of a mesh do not allow
├── NonFiniteError            (ArithmeticError) a value that must be finite and is not
├── MissingRngError           (AttributeError, KeyError)  a random stream that does not exist
├── MissingHyperparamError    (KeyError)     a hyper-parameter that an optimizer does not keep
├── RngKeyError               (ValueError)   neither a seed nor a PRNG key
├── MissingArgumentError      (TypeError)    a layer that was not told what it needs
├── ProcessMismatchError      (ValueError)   processes that should have the same values do not
├── CheckpointFormatError     (ValueError)   a file that breaks the rules of its format
├── CheckpointWriteError      (OSError)      a checkpoint that could not be written
├── CheckpointLockedError     (OSError)      another process writes to the same folder
├── MissingCheckpointError    (LookupError)  there is no such checkpoint
├── CheckpointMismatchError   (ValueError)   a file that does not fit the model
├── ExportError               (ValueError)   a function that cannot be exported, or called so
├── ArgumentError             (TypeError)    an argument of a compiled function that is no array
├── CaptureError              (ValueError)   a value that a function cannot hand out
├── KeywordError              (TypeError)    a keyword that a constructor does not take
├── MissingPackageError       (ImportError)  a package of an extra that is not installed
├── ForeignNameError          (AttributeError) a method of Modules of another library
├── BrokenLawError            (AssertionError) what `refax.testing` asserts does not hold
└── InvalidArgumentError      (ValueError)   an argument that no layer can be built with
"""

import difflib
from typing import Any

import jax.numpy as jnp

from refax.typing import describe


class RefaxError(Exception):
  """The base of all errors that Refax raises itself.

  `str(error)` ends with the command that explains the error; `error.args[0]` is the message without
  that line.

  Args:
    what: one line, what is wrong.
    at: where, as a path in the model.
    got: what came.
    fix: what to write instead.
  """

  def __init__(self, what: str, *, at: Any = "", got: str = "", fix: str = ""):
    lines = [what]
    lines += [f"  {k} {v}" for k, v in (("at: ", at), ("got:", got), ("fix:", fix)) if v]
    super().__init__("\n".join(lines))

  def __str__(self) -> str:
    return f"{message(self)}\n{_see(type(self))}"


def message(error: BaseException) -> str:
  """What an error says, for the text of another error: without the line that says where to read."""
  return str(error.args[0] if isinstance(error, RefaxError) and error.args else error)


def in_brief(error: BaseException) -> str:
  """The type of an error and what it says, in one line, for the text of another error."""
  return f"{type(error).__name__}: {' '.join(message(error).split())[:300]}"


def _see(kind: type[BaseException]) -> str:
  """The last line of a message; a subclass that a user wrote is explained by the class above it."""
  name = next(base.__name__ for base in kind.__mro__ if base.__module__ == __name__)
  return f"  see: python -m refax.explain {name}"


class StructureWarning(UserWarning):
  """A change of an object's structure that a plain JAX transform loses, or does not see.

  It is given once a place. `warnings.simplefilter("ignore", nnx.StructureWarning)` silences it.

  >>> from refax import nnx
  >>> issubclass(nnx.StructureWarning, UserWarning)
  True
  """

  @classmethod
  def lost(cls, at: str) -> str:
    return (
      f"{at} is lost: it was added inside a plain JAX transform, which rebuilds its arguments and "
      "drops them afterwards.\n  fix: use nnx.jit (nnx.grad, nnx.vmap, ...), which hands it out; "
      f"return it; or keep it in a Variable that is there before\n{_see(cls)}"
    )

  @classmethod
  def unseen(cls, kind: str, place: str) -> str:
    return (
      f"{kind} changes its structure, and a function that read it by closure at {place} is "
      "compiled already: plain jax.jit goes on with the old structure.\n  fix: use nnx.jit, which "
      f"sees it, or pass the object as an argument\n{_see(cls)}"
    )


class RetraceWarning(UserWarning):
  """JAX traces a function again; see `nnx.explain_retrace`.

  >>> from refax import nnx
  >>> issubclass(nnx.RetraceWarning, UserWarning)
  True
  """

  @classmethod
  def again(cls, name: str, count: int, reason: str) -> str:
    return f"{name} is traced for the {_ordinal(count)} time: {reason}\n{_see(cls)}"


def _ordinal(n: int) -> str:
  ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
  return f"{n}{ending}"


class ShapeMismatchError(RefaxError, ValueError):
  """An array has another shape or dtype than what it is written to, or was built for."""

  @classmethod
  def write(cls, origin: Any, want: Any, x: Any):
    return cls(
      "a Variable keeps its shape and dtype",
      at=origin,
      got=f"{describe(x)}, the Variable holds {describe(want)}",
      fix=f"write an array of shape {want.shape}, or assign a new nnx.{origin.kind}",
    )

  @classmethod
  def dtype(cls, origin: Any, want: Any, x: Any):
    return cls(
      "a Variable keeps its shape and dtype",
      at=origin,
      got=f"{describe(x)}, the Variable holds {describe(want)}",
      fix=f"{_cast(x.dtype, want.dtype)}assign a new nnx.{origin.kind}",
    )

  @classmethod
  def range(cls, origin: Any, want: Any, value: Any, info: Any):
    return cls(
      f"{want.dtype} cannot hold this number",
      at=origin,
      got=f"{type(value).__name__} ({_short(value)}), the Variable holds {describe(want)}",
      fix=f"write a number from {info.min} to {info.max}, or assign a new nnx.{origin.kind}",
    )

  @classmethod
  def not_an_array(cls, origin: Any, want: Any, got: Any):
    return cls(
      "a Variable that holds an array can hold nothing else",
      at=origin,
      got=f"{type(got).__name__} ({_short(got)}), the Variable holds {describe(want)}",
      fix="write an array or a number; keep other objects in an attribute",
    )

  @classmethod
  def index(cls, origin: Any, want: Any, index: Any, x: Any):
    return cls(
      "the value does not fit the indexed part of the Variable",
      at=origin,
      got=f"{describe(x)} for [{_short(index)}] of {describe(want)}",
      fix="write an array that broadcasts to the shape of the indexed part",
    )

  @classmethod
  def last_axis(cls, layer: str, want: int, x: Any):
    return cls(
      f"{layer} maps vectors of size {want}",
      got=f"an input of shape {x.shape}",
      fix=f"make the last axis {want}, or build {layer} with the input's size",
    )


class TreeMismatchError(RefaxError, ValueError):
  """Two structures that should be alike are not."""

  @classmethod
  def value(cls, at: Any, want: Any, got: Any):
    return cls(
      "a hijax Variable keeps the structure of its value",
      at=at,
      got=f"{got}, the Variable holds {want}",
      fix="write a value of the same structure, or assign a new Variable",
    )

  @classmethod
  def assigned(cls, place: str, got: Any):
    name = place.rpartition("[")[2].rstrip("]")
    return cls(
      "the state of an optimizer has a Variable in each place",
      at=f"Optimizer.{place}",
      got=f"{_short(got)}, which was assigned in the place of one",
      fix=f"put a Variable back, optimizer.{place} = nnx.OptState(x); from then on, "
      f"optimizer.hyperparams[{name}] = x writes it in place, and a compiled step sees it",
    )

  @classmethod
  def merge(cls, missing: list[str], unexpected: list[str]):
    parts = []
    if missing:
      parts.append(f"no value for {', '.join(missing)}")
    if unexpected:
      parts.append(f"no place for {', '.join(unexpected)}")
    return cls(
      "the states do not fit the GraphDef",
      got="; ".join(parts),
      fix="pass all the states that nnx.split returned, in any order",
    )

  @classmethod
  def no_place(cls, path: str, node: str):
    return cls(
      f"the state has a value for which {node} has no place",
      at=path,
      got="a path whose parent is not a Module, List or Dict",
      fix="update with a state of the same structure, or build the part first",
    )

  @classmethod
  def object_there(cls, path: str, found: str):
    return cls(
      "an update writes Variables and arrays; it does not replace the objects that hold them",
      at=path,
      got=f"one value in the place of a {found}",
      fix="give a value for each Variable in it, or assign the attribute itself",
    )

  @classmethod
  def not_removable(cls, path: str):
    return cls(
      "nnx.pop removes Variables from attributes, dicts and lists",
      at=path,
      got="a Variable in a tuple, in another pytree, or by itself",
      fix="keep it in a dict, a list or an attribute, or use a filter that does not select it",
    )

  @classmethod
  def sow(cls, module: str, name: str, kind: type, old: Any):
    return cls(
      f"the attribute is no {kind.__name__} that could take the value",
      at=f"{module}.{name}",
      got=f"{type(old).__name__}",
      fix="sow under another name, or remove the attribute (nnx.pop)",
    )

  @classmethod
  def branches(cls, index: int, first: Any, other: Any, at: str = ""):
    return cls(
      "all branches must return the same structure, and change their arguments in the same way",
      at=f"{at or 'the result'} of branch {index}",
      got=f"{other}, and {first} from branch 0",
      fix="return values of the same structure, shapes and dtypes from each branch; "
      "add attributes in all branches or before",
    )

  @classmethod
  def carry(cls, function: str, was: Any, now: Any, at: str = ""):
    return cls(
      f"{function} must return a carry like the one that it got",
      at=at,
      got=f"{now}, the carry that it got has {was}",
      fix="return the same structure, shapes and dtypes; change state through its Variables",
    )

  @classmethod
  def rule(cls, function: str, want: Any, got: Any):
    return cls(
      f"{function} of a custom_vjp returns another structure than it must",
      got=f"{got}, expected {want}",
      fix="fwd returns (out, residuals), with out as the function returns it; bwd returns a tuple "
      "with a gradient for each argument",
    )

  @classmethod
  def condition(cls, function: str):
    return cls(
      f"the condition of {function} must not write state",
      got="a condition that writes a Variable",
      fix="write it in the body",
    )

  @classmethod
  def no_boolean(cls, function: str, got: str):
    return cls(
      f"the condition of {function} must return one boolean",
      got=got,
      fix="return a scalar such as x < 3",
    )

  @classmethod
  def axes(cls, what: str, path: str, axes: Any):
    return cls(
      f"{what} do not fit",
      at=path,
      got=f"{axes}",
      fix="give an int, None, nnx.StateAxes, or a tuple with one of these for each argument",
    )

  @classmethod
  def no_size(cls, function: str, axes: str, option: str):
    return cls(
      f"{function} does not know how often to run",
      got=f"in_axes={axes}, and no {option}",
      fix=f"map an argument over an axis, or pass {option}=",
    )

  @classmethod
  def varies(cls, path: str):
    return cls(
      "a result differs along the mapped axis, and out_axes has no axis for it",
      at=f"{path or 'the result'}",
      got="out_axes=None",
      fix="give it an axis in out_axes, or reduce it inside the function",
    )

  @classmethod
  def microbatches(cls, steps: int, got: str):
    return cls(
      "the batch does not divide into microbatches",
      got=f"{got}, and steps={steps}",
      fix="choose steps that divide the first axis of every array of the batch",
    )

  @classmethod
  def sizes(cls, function: str, sizes: dict[str, int]):
    return cls(
      f"{function} maps over axes of one size",
      got=", ".join(f"{size} at {path or 'the argument'}" for path, size in sizes.items()),
      fix="check the axes, or pass None for what is not mapped",
    )

  @classmethod
  def gradients(cls, path: str, got: str):
    return cls(
      "the gradients do not have the structure of the parameters",
      at=path,
      got=got,
      fix="compute them with nnx.grad(..., wrt=) and the filter the Optimizer was built with; for "
      "one of several optimizers: update(model, nnx.filter_state(grads, filter))",
    )

  @classmethod
  def swapped(cls, got: str):
    return cls(
      "optimizer.update takes the model first, then the gradients",
      got=got,
      fix="write optimizer.update(model, grads)",
    )

  @classmethod
  def averages(cls, path: str, got: str):
    return cls(
      "the model does not have the structure of the averages",
      at=path,
      got=got,
      fix="pass the model that the EMA was built for, or build an EMA for this one",
    )


class FilterError(RefaxError, ValueError):
  """Filters that do not cover what they split, or that make no sense."""

  @classmethod
  def remainder(cls, paths: list[str]):
    shown = ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
    return cls(
      "the filters do not cover everything",
      got=f"nothing matches {shown}",
      fix="add a filter, or `...` as the last one for all the rest",
    )

  @classmethod
  def not_last(cls, index: int, count: int):
    return cls(
      "`...` matches all that is left, so it comes last",
      got=f"`...` as filter {index} of {count}",
      fix="move it to the end",
    )

  @classmethod
  def none(cls, function: str):
    return cls(
      f"{function} takes at least one filter",
      got="no filter",
      fix=f"say what is meant: {function}(model, nnx.Intermediate), or `...` for everything",
    )

  @classmethod
  def unknown(cls, filter: Any):
    return cls(
      "this is not a filter",
      got=f"{type(filter).__name__} ({_short(filter)})",
      fix="use a Variable type, a tag as a string, `...`, a predicate(path, value), "
      "a tuple of filters, or nnx.OfType/PathContains/PathIn/WithTag/Any/All/Not",
    )

  @classmethod
  def no_module(cls, pattern: str, paths: list[str]):
    near = difflib.get_close_matches(pattern, paths, 5, 0.3) or paths[:5]
    return cls(
      "no Module is at this path",
      got=repr(pattern),
      fix=f"there is {', '.join(repr(p) for p in near)}; `*` stands for any one step, `**` for any "
      "number of steps",
    )

  @classmethod
  def options(cls, names: list[str], node: str):
    return cls(
      f"no Module in {node} has a method set_view that takes these",
      got=", ".join(names),
      fix="nnx.view_info(model) lists what there is; attributes without one are set by "
      "nnx.with_attributes",
    )

  @classmethod
  def attributes(cls, names: list[str], module: str):
    return cls(
      f"no Module in {module} has these attributes",
      got=", ".join(names),
      fix="check the names, or pass raise_if_not_found=False",
    )


class StaticAttributeError(RefaxError, TypeError, ValueError):
  """A value that can be neither data nor part of the static structure."""

  @classmethod
  def unhashable(cls, at: str, value: Any, part: str):
    return cls(
      "a static attribute is part of what jax.jit compiles for: it is hashed, or compared by what "
      "is in it",
      at=at,
      got=f"{type(value).__name__} ({_short(value)}), with a part that can be neither: {part}",
      fix="keep state (arrays, Variables, Modules) in attributes of their own, or wrap a pytree of "
      "arrays in nnx.data; give a class of your own __hash__ and __eq__",
    )

  @classmethod
  def captures(cls, at: str, function: Any, found: Any):
    return cls(
      "a function in an attribute holds an object with state, which no transform could exchange",
      at=at,
      got=f"{getattr(function, '__name__', type(function).__name__)}, which holds a "
      f"{type(found).__name__} by closure or as a wrapped method",
      fix="write it as a method of the class (decorated there: @nnx.jit), or assign the bound "
      "method (self.f = self.method) or functools.partial(f, layer): these are followed",
    )

  @classmethod
  def option(cls, kind: str, name: str, value: Any, fix: str):
    return cls(
      f"nnx.{kind} has no option {name}; kept as metadata, it would do nothing",
      got=f"{name}={_short(value)}",
      fix=fix,
    )

  @classmethod
  def slots(cls, name: str, slots: Any):
    return cls(
      "a Pytree keeps its attributes where JAX's transforms find them, in __dict__",
      at=name,
      got=f"__slots__ = {slots!r}",
      fix="leave out __slots__, or slots=True of the dataclass",
    )

  @classmethod
  def metadata(cls, name: str, value: Any):
    return cls(
      "metadata of a Variable must be hashable, for it is part of what jax.jit compiles for",
      at=name,
      got=f"{type(value).__name__} ({_short(value)})",
      fix="make it hashable: a tuple instead of a list, a str instead of an object",
    )

  @classmethod
  def ref(cls):
    return cls(
      "a Variable makes its own Ref",
      got="a jax.Ref as the value",
      fix="pass the array: nnx.Variable(ref[...])",
    )


class TraceContextError(RefaxError, RuntimeError):
  """A write from inside a transform to an object from outside it: a tracer would leak."""

  @classmethod
  def variable(cls, at: Any, *, is_array_for_now: bool = False):
    if is_array_for_now:
      return cls(
        "a Variable that is an array while it is differentiated cannot be written inside another "
        "transform",
        at=at,
        got="a write by closure; `through=`, and the residuals of nnx.custom_vjp, give arrays",
        fix="pass the model as an argument to the function inside, by a transform of Refax "
        "(nnx.scan, nnx.cond, nnx.remat, ...), which hands out what is written",
      )
    return cls(
      "a lojax Variable from outside a transform cannot be written inside it",
      at=at,
      got="a write from another trace than the one where the Variable was made",
      fix="pass it as an argument and return it, or use a hijax Variable (nnx.to_hijax)",
    )

  @classmethod
  def attribute(cls, at: Any):
    return cls(
      "an object from outside a transform cannot change its structure inside it",
      at=at,
      got="an attribute set from another trace than the one where the object was made",
      fix="keep what changes in a Variable and write that (self.count[...] = x), or pass the "
      "object as an argument, by a transform of Refax (nnx.jit, nnx.grad, nnx.scan, ...)",
    )


class SharedWriteError(RefaxError, RuntimeError):
  """A write under `jax.vmap` to a Variable that is shared by all that is mapped."""

  @classmethod
  def vmap(cls, at: Any):
    return cls(
      "jax.vmap cannot write one Variable for all elements of the batch",
      at=at,
      got="a write to a Variable that came by closure or with in_axes=None",
      fix="pass the model as a mapped argument, with an axis on this Variable "
      "(for Rngs: rngs.split(n)); or drop the write, as for jax.hessian, by nnx.no_update(f)",
    )

  @classmethod
  def mapped(cls, at: Any):
    return cls(
      "a Variable that all elements of nnx.vmap share is written with values that differ",
      at=at,
      got="a write to a Variable that came by closure or with the axis None",
      fix="give it an axis (nnx.StateAxes; for Rngs: rngs.split(n)), or say how the values become "
      'one: reduce={nnx.BatchStat: "mean"}',
    )


class DifferentiatedWriteError(RefaxError, TypeError):
  """A write through which a gradient would flow, and be lost."""

  @classmethod
  def tangent(cls, at: Any):
    return cls(
      "a value that is being differentiated was written to a Variable, its gradient would be lost",
      at=at,
      got="a value that depends on what jax.grad differentiates",
      fix="to keep the gradient, return the value from the function, hand it out by "
      "self.sow(...), name the Variable in nnx.grad(..., through=...), or make it in the function "
      "with is_hijax=False; to drop the gradient on purpose, write jax.lax.stop_gradient(x)",
    )

  @classmethod
  def selected(cls, at: Any):
    return cls(
      "a Variable cannot be written while it is differentiated",
      at=at,
      got="a write inside a function whose gradient is taken with respect to it",
      fix="write it after the gradient, or leave it out with wrt=: it has no gradient then",
    )


class ShardingError(RefaxError, ValueError):
  """A Variable cannot be divided over the devices of a mesh in the way that was asked for."""

  @classmethod
  def rules(cls, at: Any, name: str, first: Any, second: Any):
    return cls(
      f"two rules give the logical axis {name!r} different axes of the mesh",
      at=at,
      got=f"({name!r}, {first!r}) and ({name!r}, {second!r})",
      fix="give one name one meaning, or name this axis of the Variable differently",
    )

  @classmethod
  def names(cls, at: Any, axes: Any, part: Any):
    return cls(
      "out_sharding names axes, by a string, a tuple of strings or None for each axis of the array",
      at=at,
      got=f"{part!r} in {axes!r}",
      fix="write the name of an axis of the mesh, or of a logical axis",
    )

  @classmethod
  def rank(cls, at: Any, spec: Any, shape: tuple[int, ...]):
    return cls(
      f"an array has {len(shape)} axes and its sharding names {len(spec)}",
      at=at,
      got=f"{spec} for the shape {shape}",
      fix="name each axis of the array, with None for one that is not divided",
    )

  @classmethod
  def unknown(cls, at: Any, spec: Any, axis: str, sizes: dict[str, int]):
    return cls(
      f"the mesh has no axis {axis!r}",
      at=at,
      got=f"{spec} on a mesh with the axes {sizes}",
      fix=f"make a mesh with this axis, or translate it: nnx.logical_axis_rules([({axis!r}, "
      f"{next(iter(sizes), None)!r})]), with None for not to divide it",
    )

  @classmethod
  def twice(cls, at: Any, spec: Any, axis: str):
    return cls(
      f"two axes of an array are divided over the same axis {axis!r} of the mesh",
      at=at,
      got=f"{spec}",
      fix="let one of them be None, or divided over another axis of the mesh",
    )

  @classmethod
  def uneven(cls, at: Any, spec: Any, shape: tuple[int, ...], dimension: int, count: int):
    return cls(
      f"an axis of size {shape[dimension]} cannot be divided evenly over {count} devices",
      at=at,
      got=f"{spec} for the shape {shape}, axis {dimension}",
      fix=f"make its size a multiple of {count}, or do not divide this axis (None)",
    )

  @classmethod
  def no_mesh(cls, function: str):
    return cls(
      f"{function} lays a model out over a mesh, and there is none",
      got="no mesh, outside of jax.set_mesh",
      fix="pass it, mesh=jax.make_mesh((8,), ('data',)), or set it: with jax.set_mesh(mesh)",
    )

  @classmethod
  def plan(cls, at: Any, first: Any, second: Any, shape: tuple[int, ...]):
    return cls(
      "two plans divide a Variable in ways that exclude each other",
      at=at,
      got=f"{first} and {second} for the shape {shape}",
      fix="give the plans different axes of the mesh, or say what this Variable gets: "
      "plan & nnx.Plan({path: spec}) decides",
    )

  @classmethod
  def no_match(cls, pattern: str, paths: list[str]):
    shown = ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "")
    return cls(
      f"a plan has an entry {pattern!r} that no Variable matches",
      got=f"Variables at {shown or 'no path'}",
      fix="correct the pattern: it is compared with the whole path, and * stands for any part",
    )


class ExplicitAxesError(RefaxError, NotImplementedError):
  """What cannot be done where an axis of the mesh is explicit."""

  @classmethod
  def look(cls, function: str, mesh: Any):
    return cls(
      f"{function} cannot look into layers where axes of the mesh are explicit",
      got=f"{mesh}",
      fix="make the mesh with axis_types=(jax.sharding.AxisType.Auto,) for each axis, and search "
      "again: the numbers are the same",
    )


class RefArgumentError(RefaxError, TypeError):
  """A function of JAX that takes arrays only was given Variables that are Refs."""

  @classmethod
  def gradient(cls, at: Any):
    return cls(
      "JAX cannot differentiate with respect to a hijax Variable: it is a jax.Ref",
      at=at,
      got="a Variable in an argument of jax.grad, jax.vjp, jax.jvp or jax.linearize",
      fix=_GRADIENT,
    )

  @classmethod
  def moved(cls, at: Any):
    return cls(
      "inside a transform a hijax Variable has no device that it could leave",
      at=at,
      got="a call of nnx.device_put while JAX traces",
      fix="move the object before the call; inside, lay out arrays: "
      "jax.lax.with_sharding_constraint(variable[...], sharding)",
    )

  @classmethod
  def orbax(cls, at: Any):
    return cls(
      "orbax saves arrays, and a hijax Variable is a jax.Ref",
      at=at,
      got="a Variable outside of a State or Module",
      fix="save a State, nnx.state(model), or arrays: nnx.pure(tree)",
    )

  @classmethod
  def function(cls, function: str, kind: str):
    if function in _OF_ARRAYS:
      does, fix = _OF_ARRAYS[function]
      return cls(
        f"{function} {does} arrays, and hijax Variables are jax.Refs",
        got=f"{kind} with hijax Variables",
        fix=fix,
      )
    return cls(
      f"{function} cannot differentiate with respect to hijax Variables: they are jax.Refs",
      got=f"{kind} with hijax Variables as an argument that is differentiated",
      fix=_GRADIENT,
    )


_OF_ARRAYS = {
  "jax.device_put": (
    "moves",
    "write nnx.device_put(model, sharding), which moves the Variables in place",
  ),
  "jax.lax.with_sharding_constraint": (
    "computes with",
    "lay out the model by nnx.device_put or nnx.shard; or, inside a function, each value: "
    "jax.lax.with_sharding_constraint(variable[...], sharding)",
  ),
  "jax.flatten_util.ravel_pytree": (
    "computes with",
    "give it arrays: ravel_pytree(nnx.pure(nnx.state(model))); nnx.update(model, unravel(flat)) "
    "writes them back",
  ),
  "optax.apply_updates": (
    "computes with",
    "let nnx.Optimizer(model, tx, wrt=nnx.Param).update(model, grads) do it; or give it arrays, "
    "nnx.pure(state) and nnx.pure(updates), and write the result by nnx.update",
  ),
}


class ReturnedRefError(RefaxError, ValueError):
  """A function that JAX traces returned Variables that are Refs."""

  @classmethod
  def result(cls, function: str, traced_for: str, kind: str, path: str, ref: Any):
    ours = _RETURNING.get(traced_for, "nnx.jit, nnx.scan, nnx.cond, ...")
    return cls(
      f"{function}, traced for {traced_for}, returned a mutable array reference of type "
      f"Ref{{{describe(ref)}}}",
      at=f"{kind}{path}",
      got=f"{kind} with hijax Variables, which JAX lets out of no function that it compiles",
      fix="return arrays: nnx.pure(x); what came as an argument is updated in place and need not "
      f"be returned; or use {ours}, which returns objects",
    )


_RETURNING = {
  "jit": "nnx.jit (nnx.eval_shape, nnx.make_jaxpr)",
  "scan": "nnx.scan",
  "cond": "nnx.cond",
  "switch": "nnx.switch",
  "while_body": "nnx.while_loop",
  "fori_loop": "nnx.fori_loop",
  "checkpoint / remat": "nnx.remat",
}

_GRADIENT = (
  "use the transform of Refax (nnx.grad, nnx.value_and_grad, nnx.vjp, nnx.jvp), or give JAX's own "
  "a model of arrays: jax.grad(f)(nnx.to_lojax(model))"
)


class GradientOutputError(RefaxError, TypeError):
  """A function whose gradient is taken does not return one number."""

  @classmethod
  def no_pair(cls, function: str, got: str):
    return cls(
      "a function with has_aux=True returns (loss, aux)",
      at=function,
      got=got,
      fix="return a pair, or leave out has_aux",
    )

  @classmethod
  def no_scalar(cls, function: str, got: str, has_aux: bool):
    fix = "return a scalar (x.mean(), x.sum())"
    if not has_aux:
      fix += "; if the function returns (loss, aux), pass has_aux=True"
    what = "a function has a gradient where it returns one number"
    return cls(what, at=function, got=got, fix=fix)


class AliasError(RefaxError, ValueError):
  """One cell in two places that must be apart."""

  @classmethod
  def gradient(cls, at: str, first: int, second: int):
    return cls(
      "one Variable is in two differentiated arguments",
      at=at,
      got=f"the same Variable in argument {first} and in argument {second}",
      fix="differentiate one argument that holds both",
    )

  @classmethod
  def differentiated(cls, origin: Any):
    return cls(
      "a Variable that is being differentiated is read through another object, without a gradient",
      at=origin,
      got="a read of the object outside, inside a function that got it as an argument",
      fix="use the argument of the function (m, not model); for a constant, read it before: "
      "old = nnx.clone(model)",
    )

  @classmethod
  def closure(cls, origin: Any):
    return cls(
      "one Variable came as an argument and by closure",
      at=origin,
      got="a function that uses both",
      fix="use the argument inside the function",
    )

  @classmethod
  def stacked(cls, origin: Any, got: str, fix: str):
    return cls(
      "the layers of a Stack share no Variable: each would get a copy of its own",
      at=origin,
      got=got,
      fix=fix,
    )


class MissingRngError(RefaxError, AttributeError, KeyError, ValueError):
  """A random stream that was not given."""

  @classmethod
  def stream(cls, name: str, known: list[str]):
    return cls(
      f"no random stream {name!r}",
      got=f"Rngs with the streams {', '.join(known) or '(none)'}",
      fix=f"nnx.Rngs(0) for a default stream, or nnx.Rngs({name}=0)",
    )

  @classmethod
  def layer(cls, layer: str, name: str):
    return cls(
      f"{layer} needs random numbers",
      got="no rngs, neither when it was built nor when it was called",
      fix=f"build it with rngs=nnx.Rngs({name}=0), call it with rngs=, or model.eval()",
    )

  @classmethod
  def tag(cls, name: str, known: list[str]):
    fix = "build the model with rngs" if not known else f"nnx.reseed(model, {known[0]}=0)"
    return cls(
      f"nnx.reseed found no random stream {name!r}",
      got=f"an object with the streams {', '.join(known) or '(none)'}",
      fix=f"{fix}; a stream that fell back to `default` has that name",
    )


class MissingHyperparamError(RefaxError, KeyError):
  """A hyper-parameter that an optimizer does not keep in its state."""

  @classmethod
  def name(cls, name: str, known: list[str], count: int):
    if count > 1:
      return cls(
        f"several transformations have a hyper-parameter {name!r}",
        got=f"optimizer.hyperparams[{name!r}] with {count} of that name",
        fix="read and write their Variables in optimizer.opt_state",
      )
    return cls(
      f"no hyper-parameter {name!r}",
      got=f"an Optimizer with {', '.join(known) or 'none in its state'}",
      fix="build the transformation by optax.inject_hyperparams(optax.adam)(learning_rate=...)",
    )


class RngKeyError(RefaxError, ValueError):
  """Something that is no seed and no PRNG key."""

  @classmethod
  def value(cls, tag: str, key: Any):
    return cls(
      "a random stream starts from a seed or a PRNG key",
      at=tag,
      got=f"{describe(key)} ({_short(key)})",
      fix="pass an int, or jax.random.key(seed)",
    )


class MissingRuleError(RefaxError, AttributeError):
  """A function without the derivative that it announced."""

  @classmethod
  def vjp(cls, function: str):
    return cls(
      f"{function} has no derivative yet",
      got="a call of an nnx.custom_vjp without fwd and bwd",
      fix=f"call {function}.defvjp(fwd, bwd) first",
    )


class UnwantedWriteError(RefaxError, RuntimeError):
  """A function that must not write state would write it."""

  @classmethod
  def writes(cls, function: str, writes: tuple[str, ...]):
    return cls(
      f"{function} writes state",
      at=", ".join(writes) or "an attribute of an argument",
      got="a function under nnx.assert_no_writes",
      fix="call model.eval(), or nnx.no_update to drop what it writes",
    )


class NonFiniteError(RefaxError, ArithmeticError):
  """A value that must be finite is not.

  >>> from refax import nnx
  >>> issubclass(nnx.NonFiniteError, ArithmeticError)
  True
  """

  @classmethod
  def value(cls, value: Any):
    return cls(
      "a value is not finite; the transaction is undone",
      got=f"{_short(value)}",
      fix="skip the batch, or lower the learning rate",
    )

  @classmethod
  def found(cls, found: Any):
    return cls(
      str(found or "a result is not finite; computed once more it was"),
      fix="nothing has been written: go on with another batch, or look at the operation",
    )


class MissingArgumentError(RefaxError, TypeError):
  """An object that was not told what it needs."""

  @classmethod
  def wrt(cls, name: str):
    return cls(
      f"{name} was not told which Variables it trains",
      got="no argument wrt",
      fix=f"{name}(model, tx, wrt=nnx.Param); code written for releases of Flax NNX before 0.11 "
      "runs with ModelAndOptimizer(model, tx) of refax.compat",
    )

  @classmethod
  def flag(cls, layer: str, name: str):
    return cls(
      f"{layer} was not told {name}",
      got="None, both when it was built and when it was called",
      fix=f"pass {name}=True or False, or call model.train() / model.eval()",
    )

  @classmethod
  def memory(cls, layer: str, name: str):
    return cls(
      f"{layer} has no memory to decode from, and was not told the size of one",
      got=f"decode without {name}",
      fix="pass batch_size=... and max_length=... too, or call init_cache before",
    )

  @classmethod
  def keyword(cls, metric: str, name: str, given: list[str], at: Any):
    return cls(
      f"{metric} was not given {name}",
      at=at,
      got=f"the keyword arguments {', '.join(given)}" if given else "no keyword argument",
      fix=f"call update({name}=...), or build {metric} with another argname",
    )


class ProcessMismatchError(RefaxError, ValueError):
  """The processes of one program do not have the same values, where there is to be one value."""

  @classmethod
  def values(cls, function: str, names: list[str], processes: list[int]):
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return cls(
      f"{function} takes a value that each process has for one and the same",
      at=", ".join(names[:8]) + more,
      got=f"other values in process {', '.join(map(str, processes))} than in process 0",
      fix="make it in the same way in each process (the same seed, the same checkpoint); "
      "parts that differ become one array by jax.make_array_from_process_local_data",
    )

  @classmethod
  def names(cls, function: str, counts: list[int]):
    return cls(
      f"{function} takes objects that are alike in each process",
      got=f"arrays of other names or numbers; there are {', '.join(map(str, counts))}, "
      "process by process",
      fix="call it in each process, in the same order, with the same objects",
    )


class CheckpointFormatError(RefaxError, ValueError):
  """A file of tensors that breaks the rules of its format."""

  @classmethod
  def file(cls, path: Any, problem: str, kind: str = "safetensors file"):
    return cls(
      f"this is no {kind}, or it is damaged",
      at=path,
      got=problem,
      fix="download or save it again; nothing has been loaded",
    )

  @classmethod
  def midway(cls, path: Any, problem: str, loaded: int):
    return cls(
      "the file could not be read to its end",
      at=path,
      got=f"{problem}, after {loaded} tensors",
      fix="do not change a file while it is loaded; what comes first in the model is already "
      "written, and `with nnx.transaction(model):` would undo that",
    )

  @classmethod
  def orbax(cls, path: Any, problem: str):
    return cls(
      "this checkpoint of orbax cannot be read; nothing has been changed",
      at=path,
      got=problem,
      fix="pass another one (step=...), or save it again: "
      "ocp.StandardCheckpointer().save(path, nnx.state(model))",
    )

  @classmethod
  def step(cls, path: Any, problem: str, others: list[int]):
    steps = f"step {others[-1]}" if others else "no other"
    return cls(
      "this checkpoint cannot be read; nothing has been changed",
      at=path,
      got=problem,
      fix=f"restore another one with step=...; the latest besides is {steps}",
    )


class CheckpointLockedError(RefaxError, OSError):
  """Another process writes checkpoints to the same folder."""

  @classmethod
  def writer(cls, folder: Any, owner: str):
    return cls(
      "one process at a time writes checkpoints to a folder",
      at=folder,
      got=f"a folder that {owner or 'another process'} writes to",
      fix="end that process, or save to another folder",
    )


class CheckpointWriteError(RefaxError, OSError):
  """A checkpoint could not be written; those that were there still are."""

  @classmethod
  def step(cls, folder: Any, step: int | None, error: BaseException, steps: list[int]):
    there = f"step {steps[-1]}" if steps else "none"
    return cls(
      "a checkpoint could not be written; those that were complete are still there",
      at=folder,
      got=f"{'' if step is None else f'step {step}, '}{in_brief(error)}",
      fix=f"mend the cause (a full disk, a folder that was removed) and save again; "
      f"the latest that is complete is {there}",
    )

  @classmethod
  def moving(cls, tries: int):
    return cls(
      "no moment was found at which all Variables belonged to one step",
      got=f"other threads that wrote them in each of {tries} tries",
      fix="save between two steps, or hold a lock around the step and around the save",
    )

  @classmethod
  def closed(cls, folder: Any):
    return cls(
      "the Checkpointer is closed",
      at=folder,
      got="a save after close(), or after its `with` block",
      fix="save inside the block, or make another Checkpointer",
    )


class MissingCheckpointError(RefaxError, LookupError):
  """There is no such checkpoint."""

  @classmethod
  def step(cls, folder: Any, step: int | None, steps: list[int]):
    there = f"the steps {', '.join(map(str, steps[-8:]))}" if steps else "no checkpoint"
    wanted = "any" if step is None else f"step {step}"
    return cls(
      "there is no such checkpoint",
      at=folder,
      got=f"{wanted} asked for, and {there} there",
      fix="pass a step that is there" if steps else "start afresh, or look in another folder",
    )

  @classmethod
  def orbax(cls, folder: Any, there: list[str]):
    return cls(
      "there is no checkpoint of orbax here",
      at=folder,
      got=f"a folder with {', '.join(there[:8])}" if there else "no folder, or an empty one",
      fix="pass the folder that StandardCheckpointer.save or CheckpointManager was given, with a "
      "file _METADATA in it, in its steps or in their items",
    )

  @classmethod
  def best(cls, folder: Any, metric: str, steps: list[int]):
    there = f"the steps {', '.join(map(str, steps[-8:]))}" if steps else "no checkpoint"
    return cls(
      f"no checkpoint has a number as {metric!r}",
      at=folder,
      got=f"{there}, and the metric is missing or NaN in all",
      fix="restore the latest one: leave step out",
    )


class CheckpointMismatchError(RefaxError, ValueError):
  """A file of tensors does not fit the model; nothing has been loaded."""

  @classmethod
  def table(cls, path: Any, rows: list[tuple[str, str, str, str, str]]):
    head = ("in the file", "in the model", "the file has", "the model has", "what to do")
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
      "    " + "  ".join(f"{cell:{n}}" for cell, n in zip(row, widths, strict=True)).rstrip()
      for row in (head, *rows)
    ]
    number = "one mismatch" if len(rows) == 1 else f"{len(rows)} mismatches"
    return cls(
      "the file does not fit the model; nothing has been loaded",
      at=path,
      got="\n".join([number, *lines]),
      fix="the last column says it for each tensor",
    )


class ExportError(RefaxError, ValueError):
  """A function that cannot be exported, or an exported one that is called in another way."""

  @classmethod
  def argument(cls, index: int, got: str):
    return cls(
      "an argument of nnx.export is an object with state, or arrays",
      at=f"argument {index}",
      got=got,
      fix="pass Modules and Variables as arguments of their own, and arrays in others",
    )

  @classmethod
  def closure(cls, origin: Any):
    return cls(
      "an exported function reaches all state by its arguments",
      at=origin,
      got="a Variable that came by closure",
      fix="pass the object that holds it as an argument: nnx.export(f, model, x)",
    )

  @classmethod
  def result(cls, got: str):
    return cls(
      "an exported function returns arrays, and leaves the structure of its arguments",
      got=got,
      fix="return x[...] for a Variable; create caches and other attributes before the export",
    )

  @classmethod
  def call(cls, name: str, problem: str):
    return cls(
      f"{name} was exported for other arguments",
      got=problem,
      fix="pass arrays of the shapes and dtypes of the export, or export it with others",
    )

  @classmethod
  def folder(cls, path: Any, problem: str):
    return cls(
      "this folder holds no exported function, or it is damaged",
      at=path,
      got=problem,
      fix="export and save it again",
    )

  @classmethod
  def names(cls, name: str):
    return cls(
      "an exported function keeps each Variable under its path as a name",
      at=name,
      got="two Variables with this name: a key with a dot in it reads like two keys",
      fix="rename one of the keys",
    )

  @classmethod
  def serialize(cls, name: str, problem: str):
    return cls(
      f"jax.export cannot write {name}",
      got=problem,
      fix="keep what it has no name for (int2, a custom pytree) out of state and arguments",
    )


class ArgumentError(RefaxError, TypeError):
  """An argument of a compiled function that is neither an array nor an object with state."""

  @classmethod
  def leaf(cls, name: str, value: Any):
    if isinstance(value, type) or not hasattr(value, "shape"):
      argument = name.split(".")[0].split("[")[0]
      fix = f"pass arrays, or declare it as a constant: nnx.jit(f, static_argnames={argument!r})"
    else:
      fix = "pass an array with values; shapes and dtypes alone are for nnx.eval_shape and lower()"
    return cls(
      "a compiled function takes arrays, numbers, and Modules or Variables that hold them",
      at=name,
      got=f"{type(value).__name__} ({_short(value)})",
      fix=fix,
    )

  @classmethod
  def compiled(cls, function: str, got: str):
    return cls(
      f"{function} was compiled for other arguments",
      got=got,
      fix="call it with arrays of the shapes and dtypes, and objects of the structure, that were "
      "given to lower(); or call nnx.jit(f), which compiles again",
    )


class BrokenLawError(RefaxError, AssertionError):
  """What `refax.testing` asserts does not hold."""

  @classmethod
  def unknown(cls, name: str, known: Any):
    return cls(
      "assert_same_as_functional knows no such transform",
      got=repr(name),
      fix=f"write one of {', '.join(known)}",
    )

  @classmethod
  def structure(cls, what: str, transform: str, at: str, path: str, stateful: bool):
    side = "the program" if stateful else "its functional twin"
    return cls(
      f"a program and its functional twin {what}",
      at=" ".join(filter(None, (f"under {transform}", at))),
      got=f"{path or 'a value'}, which only {side} has",
      fix="let the program set the same attributes in each call, and return the same structure",
    )

  @classmethod
  def value(cls, what: str, transform: str, at: str, got: Any, want: Any):
    return cls(
      f"a program and its functional twin {what}",
      at=" ".join(filter(None, (f"under {transform}", at))),
      got=f"{_short(got)} of the program, {_short(want)} of the twin",
      fix="keep what changes in Variables of the arguments, not in globals, closures or lists",
    )

  @classmethod
  def traces(cls, name: str, count: int, most: int, reason: str | None):
    limit = "once" if most == 1 else f"{most} times"
    return cls(
      f"{name} is traced {count} times, and may be traced {limit}",
      got=reason or "the first trace",
      fix="call it with the same shapes, dtypes and static values, and compile it once; or raise n",
    )

  @classmethod
  def leak(cls, what: str, at: str):
    return cls(
      f"an object holds {what}",
      at=at,
      fix="return the value from the function, or keep it in a Variable of an argument"
      if "tracer" in what
      else "let nnx.jit donate: it puts the new buffers in place; restore the Variable from a copy",
    )


class CaptureError(RefaxError, ValueError):
  """What `nnx.capture` is to hand out is where no value can be handed out of."""

  @classmethod
  def unreached(cls, names: list[str]) -> "CaptureError":
    return cls(
      "nnx.capture cannot hand values out of a part of this function",
      got=f"Modules that are called inside {', '.join(sorted(set(names)))}",
      fix="choose Modules outside of it, or capture a function that does without it",
    )

  @classmethod
  def lost(cls, paths: list[str]) -> "CaptureError":
    shown = ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
    return cls(
      "nnx.capture lost values: JAX leaves out what no result depends on where it differentiates",
      got=f"nothing of {shown}",
      fix="capture the function that is differentiated, inside of nnx.grad with has_aux=True, or "
      "let its result depend on the value",
    )


class KeywordError(RefaxError, TypeError):
  """A keyword that a constructor does not take."""

  @classmethod
  def unknown(
    cls, kind: str, name: str, value: Any, meant: str | None, note: str, known: list[str]
  ):
    takes = f"{kind} takes {', '.join(known) or 'no arguments'}"
    return cls(
      f"{kind} has no argument {name}",
      got=f"{name}={_short(value)}",
      fix=takes if meant is None else f"did you mean {meant}={note}? {takes}",
    )


class ForeignNameError(RefaxError, AttributeError):
  """A method that Modules of another library have."""

  @classmethod
  def habit(cls, kind: str, name: str, fix: str):
    return cls(f"{kind} has no attribute {name!r}", fix=fix)

  @classmethod
  def public(cls, name: str, fix: str):
    error = cls(f"nnx has no {name!r}", fix=fix or "dir(nnx) lists what there is")
    if fix:  # Python would add `Did you mean: ...`, the name that looks alike
      error.name = ""
    return error

  @classmethod
  def pmap(cls):
    return cls(
      "Refax has no nnx.pmap, for JAX itself does without it: arrays are sharded over a mesh",
      fix="nnx.jit a function of sharded arrays, or write nnx.shard_map for code of each device",
    )


class InvalidArgumentError(RefaxError, ValueError):
  """An argument that no layer can be built or called with."""

  @classmethod
  def value(cls, layer: str, name: str, value: Any, want: str):
    return cls(
      f"{layer} cannot work with this {name}",
      got=f"{name}={_short(value)}",
      fix=f"pass {want}",
    )


class MissingPackageError(RefaxError, ImportError):
  """A package of an extra that is not installed."""

  @classmethod
  def extra(cls, what: str, package: str, extra: str):
    return cls(
      f"{what} needs {package}",
      got="an environment without that package",
      fix=f"pip install 'refax[{extra}]'",
    )


def _cast(old: Any, new: Any) -> str:
  """How an array gets another dtype without a number that is wrong in silence."""
  number = jnp.number, jnp.bool_
  if not all(any(jnp.issubdtype(d, n) for n in number) for d in (old, new)):
    return ""
  cast, is_complex = f"x.astype('{new}')", jnp.issubdtype(old, jnp.complexfloating)
  part = "x.real" if is_complex and not jnp.issubdtype(new, jnp.complexfloating) else "x"
  if new == jnp.bool_:
    cast = "x != 0"
  elif jnp.issubdtype(new, jnp.integer) and jnp.issubdtype(old, jnp.inexact):
    cast = f"jnp.round({part}).astype('{new}')"
  elif part != "x":
    cast = f"{part}.astype('{new}')"
  elif jnp.issubdtype(new, jnp.integer) and old != jnp.bool_ and not jnp.can_cast(old, new):
    info = jnp.iinfo(new)
    cast = f"jnp.clip(x, {info.min}, {info.max}).astype('{new}')"
  return f"write {cast}, or "


def _short(x: Any) -> str:
  text = " ".join(repr(x).split())
  return text if len(text) <= 60 else text[:57] + "..."
