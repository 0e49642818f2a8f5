"""Keyword arguments of a call as positional ones, which axes and argnums count."""

import functools
import inspect
from collections.abc import Callable
from typing import Any


def positional(f: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> tuple:
  """The arguments of a call by position; unchanged where the function does not say its names.

  >>> positional(lambda a, b=2: None, (1,), {"b": 3})
  (1, 3)
  """
  if not kwargs:
    return args
  bound = inspect.signature(f).bind(*args, **kwargs)
  bound.apply_defaults()
  if bound.kwargs:
    raise TypeError(f"these arguments of {f!r} are keyword-only: {', '.join(bound.kwargs)}")
  return bound.args


def with_positions(transform: Callable[..., Any]) -> Callable[..., Any]:
  """A mapping transform whose functions take keywords for the arguments that have axes."""

  @functools.wraps(transform)
  def wrapper(f: Any = None, /, **options: Any) -> Any:
    f = options.pop("f", f)
    if f is None:
      return functools.partial(wrapper, **options)
    mapped = transform(f, **options)

    @functools.wraps(f)
    def call(*args: Any, **kwargs: Any) -> Any:
      if kwargs and isinstance(options.get("in_axes"), list | tuple):
        args, kwargs = positional(f, args, kwargs), {}
      return mapped(*args, **kwargs)

    return call

  return wrapper
