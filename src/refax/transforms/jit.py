"""nnx.jit: `jax.jit` for functions of objects that share, return and change them."""

import contextlib
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from refax import _jax, config
from refax.core.definition import kind
from refax.core.graphdef import GraphDef
from refax.core.interrupt import uninterrupted
from refax.core.node import Node
from refax.core.observe import observe
from refax.core.variable import Variable
from refax.errors import ArgumentError
from refax.transforms.ahead import AheadCompiled, Lowered, checked, description
from refax.transforms.compiled import Compiled, Retraced
from refax.transforms.fast import (
  LIMIT,
  FastCalls,
  is_eager,
  picker,
  signature,
  steady,
  takes_arrays_as_they_are,
)
from refax.transforms.lift import Frame, Inputs, Outputs
from refax.transforms.reach import Reach
from refax.typing import Path, path_str


def jit(
  fun: Callable | None = None,
  *,
  static_argnums: int | Sequence[int] | None = None,
  static_argnames: str | Iterable[str] | None = None,
  donate_argnums: int | Sequence[int] | None = None,
  donate_argnames: str | Iterable[str] | None = None,
  keep_unused: bool = False,
  inline: bool = False,
) -> Any:
  """Compile a function of Modules, Variables, States and arrays.

  Plain `jax.jit` updates Variables in place too. This one also takes arguments that share
  Variables, returns Modules, and hands out structural changes (attributes added or set) and writes
  to lojax Variables.

  Args:
    fun: the function; without it, a decorator is returned.
    static_argnums: positions of arguments that are compile-time constants, hashable.
    static_argnames: their names.
    donate_argnums: positions of arguments whose arrays may be overwritten. State needs none.
    donate_argnames: their names.
    keep_unused: whether to keep arguments that the function does not use.
    inline: whether to inline the function in an enclosing one.

  Returns:
    The compiled function. If it raises, all state is as before the call.

  >>> from refax import nnx
  >>> @nnx.jit
  ... def create(rngs):
  ...   return nnx.Linear(2, 3, rngs=rngs)
  >>> create(nnx.Rngs(0)).kernel.is_hijax
  True
  """
  decorate = functools.partial(
    _jit,
    static=(static_argnums, static_argnames),
    donated=(donate_argnums, donate_argnames),
    keep_unused=keep_unused,
    inline=inline,
  )
  return decorate if fun is None else decorate(fun)


def _jit(fun: Callable, **options: Any) -> Callable:
  jitted = _Jitted(fun, **options)
  call: Any = functools.update_wrapper(steady(jitted.fast, jitted.call), fun)
  call.lower, call.trace, call.clear_cache = jitted.lower, jitted.trace, jitted.clear_cache
  call._fast = jitted.fast  # for tests
  return call


class _Jitted:
  """A function compiled by `nnx.jit`."""

  def __init__(self, fun: Callable, *, static: tuple, donated: tuple, **options: Any):
    self.fast = FastCalls()
    self._fun = fun
    self._static = _resolve(fun, *static)
    self._donated = _resolve(fun, *donated)
    self._may_be_steady = not any((*self._static, *self._donated))
    self._reach = Reach(fun)
    self._versions: dict[tuple, int] = {}
    self._statics: dict[tuple, _Static] = {}
    self._jitted: Any = jax.jit(
      _named(functools.partial(_call, fun), fun), static_argnums=0, **options
    )

  def call(self, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Any call: by the identity of its arguments, else by their structure."""
    names = tuple(sorted(kwargs))
    values = (*args, *(kwargs[name] for name in names)) if names else args
    entry = self.fast.find(values, names) if self._may_be_steady else None
    try:
      if entry is not None:
        try:
          return entry.run(values)
        except (ValueError, TypeError) as error:
          raise entry.renamed(error) from None
      return self._call(args, kwargs, values, names)
    except Retraced:
      self.fast.clear()
      return self.call(args, kwargs)

  def _call(self, args: tuple, kwargs: dict[str, Any], values: tuple, names: tuple) -> Any:
    inputs, spec, leaves = self._split(args, kwargs)
    if not is_eager():
      with observe() as seen, self._naming(inputs, spec[2]):
        outputs = self._jitted(self._static_of(spec), *leaves)
      self._reach.add(_concrete(seen))
      return inputs.commit(outputs)
    compiled = self._compiled(values, inputs, spec, leaves)
    flat = jax.tree.leaves(leaves)
    picks = picker([i for i, x in enumerate(values) if not isinstance(x, Node | Variable)])
    arrays = ((), picks(values)) if compiled.picks is not None else compiled.arrays(flat)
    result = uninterrupted(lambda: inputs.commit(compiled.run(flat, arrays)))
    if self._may_be_steady and self._reach.is_steady:
      self.fast.learn(values, names, flat, compiled, self._reach.slots)
    return result

  def _compiled(self, values: tuple, inputs: Inputs, spec: tuple, leaves: tuple) -> Compiled:
    """What is compiled for this structure; it is traced where there is none."""
    rest = (config.using_hijax(), _jax.checks_results(), *map(signature, inputs.leaves))
    key = (spec, *rest)
    compiled = self.fast.compiled(key)
    if compiled is None:
      steady = self._may_be_steady and takes_arrays_as_they_are(values, inputs)
      picks = self._array_names(values, inputs) if steady else None
      compiled, found = self._trace(inputs, spec, leaves, picks=picks)
      if self._reach.add(found):
        key = (self._spec(inputs, spec[1], spec[2]), *rest)
      self.fast.keep(key, compiled)
    return compiled

  def _trace(
    self, inputs: Inputs, spec: tuple, leaves: tuple, *, picks: list[str] | None
  ) -> tuple[Compiled, list[Variable]]:
    """What is compiled for these leaves, and the Variables that are reached by closure."""
    static = self._static_of(spec)
    with observe() as seen, self._naming(inputs, spec[2]):
      traced = self._jitted.trace(static, *leaves)
    compiled = Compiled(
      inputs,
      leaves,
      traced,
      functools.partial(self._jitted, static),
      careful=_jax.checks_results(),
      picks=picks,
      names=self._names(inputs, spec[2]),
    )
    return compiled, _concrete(seen)

  def lower(self, *args: Any, **kwargs: Any) -> Lowered:
    """The lowered computation for these arguments, as `jax.jit(f).lower`."""
    inputs, spec, leaves = self._split(args, kwargs, abstract=True)
    if is_eager() and not any(map(_is_abstract, inputs.leaves)):
      compiled = self._trace(inputs, spec, leaves, picks=None)[0]
      lowered = compiled.lower(jax.tree.leaves(leaves))
      run = lambda executable, now: compiled.run(
        flat := jax.tree.leaves(now), compiled.arrays(flat), executable
      )
    else:
      lowered = self._jitted.lower(self._static_of(spec), *leaves)
      run = lambda executable, now: executable(*now)
    was = description(spec, (*leaves[0], *leaves[1]))

    def make(executable: Any) -> AheadCompiled:
      def call(args: tuple, kwargs: dict[str, Any]) -> Any:
        args, kwargs = _with_static(spec[1], args, kwargs)
        inputs, spec_now, now = self._split(args, kwargs)
        checked(_name_of(self._fun), was, description(spec_now, (*now[0], *now[1])))
        return uninterrupted(lambda: inputs.commit(run(executable, now)))

      return AheadCompiled(executable, call)

    return Lowered(lowered, make)

  def trace(self, *args: Any, **kwargs: Any) -> Any:
    """The traced computation for these arguments, as `jax.jit(f).trace`."""
    _, spec, leaves = self._split(args, kwargs, abstract=True)
    return self._jitted.trace(self._static_of(spec), *leaves)

  def clear_cache(self) -> None:
    """Forget all compiled versions."""
    self._jitted.clear_cache()
    self._statics.clear()
    self.fast.clear()

  def _split(self, args: tuple, kwargs: dict[str, Any], *, abstract: bool = False) -> Any:
    """The inputs, and what the inner jit is called with: a static spec and two lots of leaves."""
    nums, names = self._static
    static = tuple((i, kind(args[i]), args[i]) for i in sorted(nums) if i < len(args))
    static += tuple((k, kind(kwargs[k]), kwargs[k]) for k in sorted(names) if k in kwargs)
    dynamic = tuple(None if i in nums else a for i, a in enumerate(args))
    dynamic_kwargs = {k: v for k, v in kwargs.items() if k not in names}
    inputs = Inputs.of(dynamic, dynamic_kwargs)
    self._check(inputs, abstract)
    mask = self._donation(inputs)
    kept = tuple(x for x, d in zip(inputs.leaves, mask, strict=True) if not d)
    donated = tuple(x for x, d in zip(inputs.leaves, mask, strict=True) if d)
    return inputs, self._spec(inputs, static, mask), (kept, donated)

  def _spec(self, inputs: Inputs, static: tuple, mask: tuple[bool, ...]) -> tuple:
    """The static half of a call. What the function reaches by closure has a number in it."""
    found = self._reach.snapshot()
    stale = not self._reach.is_steady or len(self._versions) >= LIMIT
    if stale and found not in self._versions:
      self._versions.clear()  # arrays by closure, or many models: do not keep them alive
      self.clear_cache()
    version = self._versions.setdefault(found, next(_VERSIONS)) if found else 0
    return inputs.graphdef, static, mask, version

  def _static_of(self, spec: tuple) -> "_Static":
    """The argument that stands for `spec`: one for each."""
    if len(self._statics) > STRUCTURES and spec not in self._statics:
      self.clear_cache()
    return self._statics.setdefault(spec, _Static(spec))

  def _check(self, inputs: Inputs, abstract: bool) -> None:
    """Refuse what is neither an array nor an object, by the name of its argument."""
    for i, leaf in enumerate(inputs.leaves):
      for x in jax.tree.leaves(leaf) if isinstance(leaf, Variable) else [leaf]:
        if x is not None and not _is_argument(x, abstract):
          raise ArgumentError.leaf(_name(self._fun, inputs.graphdef.paths[i]), leaf)

  def _names(self, inputs: Inputs, mask: tuple[bool, ...]) -> Callable[[], list[str]]:
    """What the user calls each flat leaf; made when it is asked for, and keeps no object alive."""
    counts = [len(jax.tree.leaves(x)) for x in inputs.leaves]
    fun, graphdef = self._fun, inputs.graphdef

    def names() -> list[str]:
      found = [(d, _name(fun, path)) for d, path in zip(mask, graphdef.paths, strict=True)]
      flat = [[pair] * n for pair, n in zip(found, counts, strict=True)]
      return [name for wanted in (False, True) for f in flat for d, name in f if d is wanted]

    return names

  def _array_names(self, values: tuple, inputs: Inputs) -> list[str]:
    """What the user calls the arguments that are no objects."""
    count = len(values) - len(inputs.names)
    keys = [(0, i) for i in range(count)] + [(1, name) for name in inputs.names]
    pairs = zip(keys, values, strict=True)
    return [_name(self._fun, key) for key, x in pairs if not isinstance(x, Node | Variable)]

  @contextlib.contextmanager
  def _naming(self, inputs: Inputs, mask: tuple[bool, ...]) -> Iterator[None]:
    """Errors of JAX about an argument name that of the user."""
    try:
      yield
    except (OverflowError, TypeError, ValueError) as error:
      paths = list(zip(mask, inputs.graphdef.paths, strict=True))

      def named(match: re.Match) -> str:
        lot = [path for given, path in paths if given is (match[1] == "donated")]
        return _name(self._fun, lot[int(match[2])])

      text = re.sub(r"(?<=argument path is )(kept|donated)\[(\d+)\]", named, str(error))
      if text == str(error):
        raise
      raise type(error)(text) from None

  def _donation(self, inputs: Inputs) -> tuple[bool, ...]:
    nums, names = self._donated
    if not nums and not names:
      return (False,) * len(inputs.leaves)
    wanted = {(0, i) for i in nums} | {(1, name) for name in names}
    return tuple(
      path[:2] in wanted and isinstance(leaf, jax.Array)
      for path, leaf in zip(inputs.graphdef.paths, inputs.leaves, strict=True)
    )


_VERSIONS = itertools.count(1)
STRUCTURES = 1024  # of one function; a program with more makes new ones all the time


class _Static:
  """The static argument of the inner `jax.jit`, equal to itself only.

  JAX compares such arguments inside C++, and turns what is raised there (Ctrl-C) into a ValueError:
  a comparison in Python must not happen there.
  """

  __slots__ = ("__weakref__", "spec")

  def __init__(self, spec: tuple):
    self.spec = spec


def _concrete(seen: dict[int, Callable[[], Any]]) -> list[Variable]:
  """Of the Variables that a trace has used, those from outside it."""
  found = [x for read in seen.values() if (x := read()) is not None]
  return [x for x in found if not any(map(_jax.is_tracer, jax.tree.leaves(x.get_raw_value())))]


def _is_argument(x: Any, abstract: bool) -> bool:
  if isinstance(x, np.ndarray | np.generic):
    return x.dtype.kind not in "OSUmM"
  if isinstance(x, jax.ShapeDtypeStruct):
    return abstract
  numbers = bool | int | float | complex
  return isinstance(x, jax.Array | jax.Ref | numbers) or hasattr(x, "__jax_array__")


def _name(fun: Callable, path: Path) -> str:
  """What the user calls a leaf: `model.linear.kernel`, by the name of the argument."""
  positional, argument, *rest = path
  if positional == 0:
    try:
      argument = list(inspect.signature(fun).parameters)[argument]
    except (TypeError, ValueError, IndexError):  # a built-in function, or *args
      argument = f"argument {argument}"
  return f"{argument}{path_str(tuple(rest))}"


def _call(fun: Callable, static: _Static, kept: tuple, donated: tuple) -> Outputs:
  """What is traced: leaves in, outputs out; Variables in hijax storage are written in place."""
  spec = static.spec
  graphdef: GraphDef = spec[0]
  parts = iter(kept), iter(donated)
  frame = Frame(graphdef, [next(parts[d]) for d in spec[2]])
  args, kwargs = frame.args
  args = list(args)
  for key, _, value in spec[1]:
    if isinstance(key, int):
      args[key] = value
    else:
      kwargs[key] = value
  return frame.collect(fun(*args, **kwargs))


def _named(call: Any, fun: Callable) -> Callable:
  """Profiles and errors show the user's function (`functools.wraps` would show its signature)."""
  call.__name__ = _name_of(fun)
  return call


def _name_of(fun: Callable) -> str:
  return getattr(fun, "__name__", type(fun).__name__)


def _with_static(static: tuple, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
  """The arguments of a compiled call, which leaves the static ones out, completed by these."""
  full = list(args)
  for key, _, value in static:
    if isinstance(key, int):
      full.insert(key, value)
  return tuple(full), kwargs | {key: value for key, _, value in static if isinstance(key, str)}


def _is_abstract(leaf: Any) -> bool:
  leaves = jax.tree.leaves(leaf)
  return any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)


def _resolve(fun: Callable, nums: Any, names: Any) -> tuple[frozenset[int], frozenset[str]]:
  """Argument numbers and names, each completed by the other from the signature, as jax.jit does."""
  nums = () if nums is None else (nums,) if isinstance(nums, int) else tuple(nums)
  names = () if names is None else (names,) if isinstance(names, str) else tuple(names)
  try:
    parameters = list(inspect.signature(fun).parameters.values())
  except (TypeError, ValueError):
    parameters = []
  positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
  nums = {n + len(positional) if n < 0 else n for n in nums}
  by_name = {p.name: i for i, p in enumerate(positional)}
  all_nums = nums | {by_name[name] for name in names if name in by_name}
  all_names = set(names) | {p.name for i, p in enumerate(positional) if i in nums}
  return frozenset(all_nums), frozenset(all_names)
