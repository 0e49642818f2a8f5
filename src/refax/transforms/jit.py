"""nnx.jit: `jax.jit` for functions of objects that share, return and change them."""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from refax.core.definition import kind
from refax.core.flatten import GraphDef
from refax.transforms.fast import FastCalls, Retraced, steady
from refax.transforms.lift import Frame, Inputs, Outputs


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
    self._static = _resolve(fun, *static)
    self._donated = _resolve(fun, *donated)
    self._may_be_fast = not any((*self._static, *self._donated))
    self._jitted: Any = jax.jit(
      _named(functools.partial(_call, fun), fun), static_argnums=0, donate_argnums=2, **options
    )

  def call(self, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Any call: by what is known of it, else through Refs."""
    names = tuple(sorted(kwargs))
    values = (*args, *(kwargs[name] for name in names)) if names else args
    entry = self.fast.find(values, names) if self._may_be_fast else None
    if entry is None:
      inputs, spec, kept, donated = self._split(args, kwargs)
      if self._may_be_fast:
        entry = self.fast.learn(values, names, inputs, spec, self._jitted)
      if entry is None:
        return inputs.commit(self._jitted(spec, kept, donated))
    try:
      return entry.run(values)
    except Retraced:
      self.fast.clear()
      return self.call(args, kwargs)

  def lower(self, *args: Any, **kwargs: Any) -> Any:
    """The lowered computation for these arguments, as `jax.jit(f).lower`."""
    _, spec, kept, donated = self._split(args, kwargs)
    return self._jitted.lower(spec, kept, donated)

  def trace(self, *args: Any, **kwargs: Any) -> Any:
    """The traced computation for these arguments, as `jax.jit(f).trace`."""
    _, spec, kept, donated = self._split(args, kwargs)
    return self._jitted.trace(spec, kept, donated)

  def clear_cache(self) -> None:
    """Forget all compiled versions."""
    self._jitted.clear_cache()
    self.fast.clear()

  def _split(self, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The inputs, and what the inner jit is called with: a static spec and two lots of leaves."""
    nums, names = self._static
    static = tuple((i, kind(args[i]), args[i]) for i in sorted(nums) if i < len(args))
    static += tuple((k, kind(kwargs[k]), kwargs[k]) for k in sorted(names) if k in kwargs)
    dynamic = tuple(None if i in nums else a for i, a in enumerate(args))
    dynamic_kwargs = {k: v for k, v in kwargs.items() if k not in names}
    inputs = Inputs.of(dynamic, dynamic_kwargs)
    mask = self._donation(inputs)
    spec = (inputs.graphdef, static, mask)
    kept = tuple(x for x, d in zip(inputs.leaves, mask, strict=True) if not d)
    donated = tuple(x for x, d in zip(inputs.leaves, mask, strict=True) if d)
    return inputs, spec, kept, donated

  def _donation(self, inputs: Inputs) -> tuple[bool, ...]:
    nums, names = self._donated
    if not nums and not names:
      return (False,) * len(inputs.leaves)
    wanted = {(0, i) for i in nums} | {(1, name) for name in names}
    return tuple(
      path[:2] in wanted and isinstance(leaf, jax.Array)
      for path, leaf in zip(inputs.graphdef.paths, inputs.leaves, strict=True)
    )


def _call(fun: Callable, spec: tuple, kept: tuple, donated: tuple) -> Outputs:
  """What is traced: leaves in, outputs out; Variables in hijax storage are written in place."""
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
  call.__name__ = getattr(fun, "__name__", type(fun).__name__)
  return call


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
