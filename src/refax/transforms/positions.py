"""Arguments that a transform counts, `argnums` and `in_axes`, and a caller gives by keyword."""

import inspect
from collections.abc import Callable
from typing import Any


def by_position(
  f: Callable, args: tuple, kwargs: dict[str, Any], count: int
) -> tuple[tuple, dict[str, Any]]:
  """The arguments of a call with the first `count` by position, where the names of `f` allow it.

  >>> by_position(lambda model, x, key: None, (), {"key": 3, "x": 2, "model": 1}, 2)
  ((1, 2), {'key': 3})
  """
  missing = range(len(args), count)
  if len(kwargs) < len(missing) or not missing:
    return args, kwargs
  try:
    parameters = list(inspect.signature(f).parameters.values())
  except (TypeError, ValueError):  # a built-in function
    return args, kwargs
  names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name in kwargs]
  wanted = [parameters[i].name for i in missing if i < len(parameters)]
  if len(wanted) < len(missing) or not set(wanted) <= set(names):
    return args, kwargs
  rest = {name: value for name, value in kwargs.items() if name not in wanted}
  return (*args, *(kwargs[name] for name in wanted)), rest
