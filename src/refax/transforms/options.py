"""Options of nnx.jit that name arguments, by position and by name."""

import inspect
from collections.abc import Callable
from typing import Any


def listed(x: Any) -> tuple:
  """Numbers or names of arguments; one of them may be given by itself."""
  return () if x is None else (x,) if isinstance(x, int | str) else tuple(x)


def resolved(fun: Callable, nums: tuple, names: tuple) -> tuple[frozenset[int], frozenset[str]]:
  """Argument numbers and names, each completed by the other from the signature, as jax.jit does."""
  try:
    parameters = list(inspect.signature(fun).parameters.values())
  except (TypeError, ValueError):
    parameters = []
  positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
  counted = {n + len(positional) if n < 0 else n for n in nums}
  by_name = {p.name: i for i, p in enumerate(positional)}
  all_nums = counted | {by_name[name] for name in names if name in by_name}
  all_names = set(names) | {p.name for i, p in enumerate(positional) if i in counted}
  return frozenset(all_nums), frozenset(all_names)


def shifted(options: dict[str, Any]) -> dict[str, Any]:
  """The options of `nnx.jit` of a bound method, for the function: it has one argument more."""
  numbers = lambda nums: tuple(i + 1 if i >= 0 else i for i in nums)
  both = {name: (numbers(options[name][0]), options[name][1]) for name in ("static", "donated")}
  return options | both
