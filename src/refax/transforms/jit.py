"""nnx.jit: `jax.jit` for functions of objects that share, return and change them."""

import contextlib
import functools
import inspect
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from refax import _jax, config
from refax.core.definition import kind
from refax.core.epoch import epoch
from refax.core.interrupt import uninterrupted
from refax.core.mesh import arguments_meet
from refax.core.observe import observe
from refax.core.variable import Variable
from refax.core.watch import Watch, any_array
from refax.errors import AliasError, ArgumentError
from refax.transforms.ahead import AheadCompiled, Lowered, checked, description
from refax.transforms.around import Around
from refax.transforms.bind import Given, bind
from refax.transforms.compiled import Compiled, Retraced
from refax.transforms.fast import FastCalls, Seen, is_eager, steady
from refax.transforms.layout import constrained, laid_out
from refax.transforms.lift import Inputs
from refax.transforms.method import bound, method_of
from refax.transforms.options import listed, resolved, shifted
from refax.transforms.reach import Reach
from refax.transforms.shared import Known, weak_function
from refax.transforms.traced import Spec, Static, marks_of, run_traced
from refax.transforms.tree import signature
from refax.transforms.versions import Versions
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
  in_shardings: Any = None,
  out_shardings: Any = None,
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
    in_shardings: where positional arguments are to lie, the static ones left out: a sharding, a
      `PartitionSpec` on the mesh of `jax.set_mesh`, `nnx.StateAxes` of these, None for where they
      are, or a tuple with one for each. State is moved there, and stays.
    out_shardings: the same for the result.

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
    static=(listed(static_argnums), listed(static_argnames)),
    donated=(listed(donate_argnums), listed(donate_argnames)),
    keep_unused=keep_unused,
    inline=inline,
    shardings=(in_shardings, out_shardings),
  )
  return decorate if fun is None else decorate(fun)


def _jit(fun: Callable, *, shardings: tuple, **options: Any) -> Callable:
  into, out_of = shardings
  if into is None and out_of is None and (method := method_of(fun)) is not None:
    call = _jit(method[0], shardings=shardings, **shifted(options))
    return bound(call, method[1], fun, lambda: _made(_Jitted(fun, None, **options), fun, fun))
  if out_of is None:
    make = lambda around: _Jitted(fun, around, **options)
    jitted, used = _KNOWN.shared(fun, tuple(options.items()), make)
  else:
    jitted, used = _Jitted(constrained(fun, out_of), None, **options), fun
  place = None if into is None else lambda f: laid_out(f, into, resolved(fun, *options["static"]))
  return _made(jitted, fun, used, place)


def _made(
  jitted: "_Jitted", fun: Callable, used: Callable, place: Callable | None = None
) -> Callable:
  """What the user gets.

  Args:
    jitted: what is compiled.
    fun: the user's function.
    used: one that does the same, which `jitted` calls and does not keep alive.
    place: lays out the arguments of a call.
  """
  call: Any = functools.update_wrapper(steady(jitted.fast, jitted.call), fun)
  call = call if place is None else place(call)
  call.lower, call.trace = (_keeping(used, f) for f in (jitted.lower, jitted.trace))
  call.clear_cache = jitted.clear_cache
  call._fast = jitted.fast  # for tests
  return call


def _keeping(fun: Callable, f: Callable) -> Callable:
  """`f`, which keeps `fun` alive."""

  def call(*args: Any, **kwargs: Any) -> Any:
    return f(*args, **kwargs)

  call.__wrapped__ = fun  # pyright: ignore[reportFunctionMemberAccess]
  return call


_KNOWN = Known()


class _Jitted:
  """A function compiled by `nnx.jit`.

  Args:
    fun: the function.
    around: what its code finds around itself is noted there as it is traced. Then it is somebody
      else who keeps the function alive.
    static: the numbers and names of static arguments,
    donated: and of donated ones.
    **options: those of `jax.jit`.
  """

  def __init__(
    self, fun: Callable, around: Around | None, *, static: tuple, donated: tuple, **options: Any
  ):
    self.fast = FastCalls()
    self._function = (lambda: fun) if around is None else weak_function(fun)
    self._around = around
    self._static = resolved(fun, *static)
    self._donated = resolved(fun, *donated)
    this = weakref.ref(self)

    def gone(key: int, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
      if not is_finalizing() and (living := this()) is not None:
        living._note_gone(key)

    def look(spec: Spec) -> None:
      if (living := this()) is not None:
        living._look_around(spec)

    self._reaches: dict[tuple, Reach] = {}  # for static arguments of one kind each
    self._gone = gone
    self._versions = Versions()
    self._statics: dict[tuple, Static] = {}
    self._jitted: Any = jax.jit(
      _named(functools.partial(run_traced, self._function, look), fun), static_argnums=0, **options
    )

  @property
  def _fun(self) -> Callable:
    return self._function()

  def call(self, args: tuple, kwargs: dict[str, Any], values: tuple, names: tuple[str, ...]) -> Any:
    """A call that no entry describes; `values` and `names` are its arguments in one row."""
    watch, then = Watch(seen_as=any_array), epoch.value
    inputs, spec, leaves = self._split(args, kwargs, watch)
    if not is_eager():
      with observe() as seen, self._naming(inputs, spec.given):
        outputs = self._jitted(self._static_of(spec), *leaves)
      self._reach(spec.static).add(_concrete(seen))
      return inputs.commit(outputs)
    key, compiled = self._compiled(inputs, spec, leaves, watch)
    try:
      result = self._run(compiled, inputs)
    except Retraced:
      self.fast.forget(key)
      return self.call(args, kwargs, values, names)
    if (reach := self._reach(spec.static)).is_steady:
      static = self._static_values(len(args), names)
      seen = Seen(values, names, static, inputs, watch, then)
      self.fast.learn(seen, compiled, reach.slots)
    return result

  def _run(self, compiled: Compiled, inputs: Inputs, executable: Any = None) -> Any:
    """A call that no entry describes; signals are held back, for all of it is not in C."""
    compiled.commit.check(inputs.leaves, inputs.objects)
    run = bind(compiled, inputs.leaves, Given(inputs), executable)
    try:
      return uninterrupted(lambda: run(()))
    except (ValueError, TypeError, OverflowError) as error:
      raise compiled.renamed(error) from None

  def _compiled(
    self, inputs: Inputs, spec: Spec, leaves: tuple, watch: Watch
  ) -> tuple[tuple, Compiled]:
    """What is compiled for this structure; it is traced where there is none."""
    settings = (config.using_hijax(), _jax.checks_results(), _jax.trace_context())
    rest = (*settings, *map(signature, inputs.leaves))
    key = (spec, *rest)
    compiled = self.fast.compiled(key)
    if compiled is None:
      compiled, found = self._trace(inputs, spec, leaves)
      if self._reach(spec.static).add(found):
        _KNOWN.forget_for_others(self)
        key = (self._spec(inputs, spec.static, spec.given, watch), *rest)
      self.fast.keep(key, compiled)
    return key, compiled

  def _trace(self, inputs: Inputs, spec: Spec, leaves: tuple) -> tuple[Compiled, list[Variable]]:
    """What is compiled for these leaves, and the Variables that are reached by closure."""
    static = self._static_of(spec, is_compiled=True)
    with observe() as seen, self._naming(inputs, spec.given):
      traced = self._jitted.trace(static, *leaves)
    closures = [x for x in traced.jaxpr.consts if _jax.is_ref(x)]
    if closures and arguments_meet([*inputs.leaves, *closures]):
      return self._trace(inputs, spec, leaves)
    compiled = Compiled(
      inputs,
      spec.given,
      traced,
      functools.partial(self._jitted, static),
      careful=_jax.checks_results(),
      names=self._names(inputs),
    )
    return compiled, _concrete(seen)

  def _look_around(self, spec: Spec) -> None:
    """Note what there is around the function, for what is being traced now."""
    if (around := self._around) is None:
      return
    variables = {template[0] for template in spec.graphdef.templates if template is not None}
    values = (value for *_, value in spec.static)
    around.add((self._fun, *values, *spec.graphdef.static_parts(), *variables))
    if spec.version or not (around.is_known and around.is_light):
      _KNOWN.forget_for_others(self)

  def lower(self, *args: Any, **kwargs: Any) -> Lowered:
    """The lowered computation for these arguments, as `jax.jit(f).lower`."""
    inputs, spec, leaves = self._split(args, kwargs, abstract=True)
    fun, compiled = self._fun, None  # what is made here keeps the function alive
    if is_eager() and not any(map(_is_abstract, inputs.leaves)):
      compiled = self._trace(inputs, spec, leaves)[0]
      spec = self._spec(inputs, spec.static, spec.given)  # the trace may have moved cells
      lowered = compiled.lower(inputs.leaves)
      run = lambda executable, inputs, _: self._run(compiled, inputs, executable)
    else:
      with self._naming(inputs, spec.given):
        lowered = self._jitted.lower(self._static_of(spec), *leaves)
      run = lambda executable, inputs, now: inputs.commit(executable(*now))
    was = description(spec, (*leaves[0], *leaves[1]))
    is_for_mesh = _jax.wide_mesh() is not None

    def make(executable: Any) -> AheadCompiled:
      fast = FastCalls()
      left_out = [key for key, *_ in spec.static if isinstance(key, int)]

      def call(args: tuple, kwargs: dict[str, Any], values: tuple, names: tuple[str, ...]) -> Any:
        watch, then = Watch(seen_as=any_array), epoch.value
        args, kwargs = _with_static(spec.static, args, kwargs)
        inputs, spec_now, now = self._split(args, kwargs, watch, enters_mesh=is_for_mesh)
        checked(_name_of(fun), was, description(spec_now, (*now[0], *now[1])))
        result = run(executable, inputs, now)
        reach = self._reach(spec.static)
        if compiled is not None and reach.is_steady and is_eager():
          seen = Seen(values, names, (), inputs, watch, then, left_out)
          fast.learn(seen, compiled, reach.slots, executable)
        return result

      return AheadCompiled(executable, steady(fast, call))

    return Lowered(lowered, make)

  def trace(self, *args: Any, **kwargs: Any) -> Any:
    """The traced computation for these arguments, as `jax.jit(f).trace`."""
    inputs, spec, leaves = self._split(args, kwargs, abstract=True)
    with self._naming(inputs, spec.given):
      return self._jitted.trace(self._static_of(spec), *leaves)

  def clear_cache(self) -> None:
    """Forget all compiled versions."""
    self._jitted.clear_cache()
    self._statics.clear()
    self.fast.clear()

  def _split(
    self,
    args: tuple,
    kwargs: dict[str, Any],
    watch: Watch | None = None,
    *,
    abstract: bool = False,
    enters_mesh: bool = True,
  ) -> Any:
    """The inputs, and what the inner jit is called with: a static spec and two lots of leaves."""
    nums, names = self._static
    static = tuple((i, kind(args[i]), args[i]) for i in sorted(nums) if i < len(args))
    static += tuple((k, kind(kwargs[k]), kwargs[k]) for k in sorted(names) if k in kwargs)
    dynamic = tuple(None if i in nums else a for i, a in enumerate(args))
    dynamic_kwargs = {k: v for k, v in kwargs.items() if k not in names}
    inputs = Inputs.of(dynamic, dynamic_kwargs, watch, enters_mesh=enters_mesh)
    self._check(inputs, abstract)
    mask = self._donation(inputs)
    kept = tuple(x for x, d in zip(inputs.leaves, mask, strict=True) if not d)
    donated = tuple(x for x, d in zip(inputs.leaves, mask, strict=True) if d)
    return inputs, self._spec(inputs, static, mask, watch), (kept, donated)

  def _spec(
    self, inputs: Inputs, static: tuple, mask: tuple[bool, ...], watch: Watch | None = None
  ) -> Spec:
    """The static half of a call. What the function reaches by closure has a number in it."""
    reach = self._reach(static)
    found = reach.snapshot(watch)
    stale = reach.has_arrays or not reach.is_steady or len(self._versions) >= REACHED
    if stale and found not in self._versions:
      self._versions.clear()  # arrays by closure, or many models: do not keep them alive
      self.clear_cache()
    version = self._versions.number(found, reach.ids)
    self._drop_orphans()
    return Spec(inputs.graphdef, static, mask, version, marks_of(inputs.leaves, reach.refs))

  def _reach(self, static: tuple) -> Reach:
    """What is reached with these static arguments, which may hold models."""
    given = tuple(value for *_, value in static if hasattr(value, "__dict__"))
    key = static if given else ()
    if key not in self._reaches:
      if len(self._reaches) >= REACHED:
        self._reaches.clear()
      self._reaches[key] = Reach(self._function, self._gone, given)
    return self._reaches[key]

  def _note_gone(self, key: int) -> None:
    """An object that was reached by closure is gone: the next call is to look for others."""
    if self._versions.note_gone(key):
      self.fast.forget_entries()
      _KNOWN.forget(self)  # a function of a module would keep its cells until the next call

  def _drop_orphans(self) -> None:
    """Forget what was compiled with cells whose objects are gone."""
    if gone := self._versions.take_orphans():
      self._statics = {k: x for k, x in list(self._statics.items()) if k[0].version not in gone}
      self.fast.forget_all(lambda key: key[0].version in gone)
      self._jitted.clear_cache()

  def _static_of(self, spec: Spec, *, is_compiled: bool = False) -> Static:
    """The argument that stands for `spec`: one for each; `is_compiled` as in `Static`."""
    key = (spec, is_compiled)
    if len(self._statics) > STRUCTURES and key not in self._statics:
      self.clear_cache()
    return self._statics.setdefault(key, Static(spec, is_compiled))

  def _check(self, inputs: Inputs, abstract: bool) -> None:
    """Refuse what is neither an array nor an object, by the name of its argument."""
    for i, leaf in enumerate(inputs.leaves):
      for x in jax.tree.leaves(leaf._cell) if isinstance(leaf, Variable) else [leaf]:
        if x is not None and not _is_argument(x, abstract):
          raise ArgumentError.leaf(leaf_name(self._fun, inputs.graphdef.paths[i]), leaf)

  def _static_values(self, count: int, names: tuple[str, ...]) -> list[int]:
    """Which of the values of a call are static: of `count` positional ones, then of `names`."""
    nums, static_names = self._static
    return [i for i in nums if i < count] + [
      count + i for i, name in enumerate(names) if name in static_names
    ]

  def _names(self, inputs: Inputs) -> Callable[[], list[str]]:
    """What the user calls each leaf; made when it is asked for, and keeps no object alive."""
    function, graphdef = self._function, inputs.graphdef
    return lambda: [leaf_name(function(), path) for path in graphdef.paths]

  @contextlib.contextmanager
  def _naming(self, inputs: Inputs, mask: tuple[bool, ...]) -> Iterator[None]:
    """Errors of JAX about an argument name that of the user."""
    try:
      yield
    except (OverflowError, TypeError, ValueError) as error:
      paths = list(zip(mask, inputs.graphdef.paths, strict=True))

      def named(match: re.Match) -> str:
        lot = [path for given, path in paths if given is (match[1] == "donated")]
        return leaf_name(self._fun, lot[int(match[2])])

      if found := re.search(r"both closed over and .*(kept|donated)\[(\d+)\]", str(error)):
        lot = [x for d, x in zip(mask, inputs.leaves, strict=True) if d is (found[1] == "donated")]
        raise AliasError.closure(lot[int(found[2])]._def.origin) from None
      text = re.sub(r"(?<=argument path is )(kept|donated)\[(\d+)\]", named, str(error))
      text = re.sub(r"(?<=function )run_traced at \S+", lambda _: _place_of(self._fun), text)
      text = re.sub(r"at output component \[1\]\[\d+\]", "in its result", text)
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


REACHED = 64  # lots of objects that one function finds by closure, one after the other
STRUCTURES = 1024  # of one function; a program with more makes new ones all the time


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


def leaf_name(fun: Callable, path: Path) -> str:
  """What the user calls a leaf: `model.linear.kernel`, by the name of the argument."""
  positional, argument, *rest = path
  if positional == 0:
    try:
      argument = list(inspect.signature(fun).parameters)[argument]
    except (TypeError, ValueError, IndexError):  # a built-in function, or *args
      argument = f"argument {argument}"
  return f"{argument}{path_str(tuple(rest))}"


def _named(call: Any, fun: Callable) -> Callable:
  """Profiles and errors show the user's function (`functools.wraps` would show its signature)."""
  call.__name__ = _name_of(fun)
  return call


def _place_of(fun: Callable) -> str:
  """A function as JAX says what it is."""
  code = getattr(inspect.unwrap(fun), "__code__", None)
  place = "" if code is None else f" at {code.co_filename}:{code.co_firstlineno}"
  return f"{_name_of(fun)}{place}"


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
