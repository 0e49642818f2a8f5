"""What a layer of Refax prints on one line: its class, and what differs from the defaults.

`Linear(4, 32)` is read off the attributes that have the names of the constructor's parameters. An
object of the user's own class prints all of its attributes: its author alone knows its defaults.
"""

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refax.core import text
from refax.core.flatten import flatten
from refax.core.variable import Variable

WIDTH = 88  # arguments that are longer go to the next line
HIDDEN = ("rngs",)
MISSING = inspect.Parameter.empty


def parts(node: Any, style: text.Style) -> tuple[text.Parts, text.Style]:
  """What the block of an object consists of: `__repr_parts__` of a Pytree."""
  entries = list(node._entries())
  style = style._replace(shapes=True, short=False)
  items: Iterable[tuple[str, Any]] = [
    (f"{key}=", value)
    for key, value, is_data in entries
    if style.full or is_data or not _is_default(node, key, value)
  ]
  if not style.full and is_ours(type(node)):
    given = _wrapped(arguments(node))
    children = [(f"{key}=", value) for key, value, is_data in entries if is_data]
    items = [*(("", text.Words(line)) for line in given), *children]
    style = style._replace(short=len(style.seen) > 1)
  comment = summary(leaves(node))
  return text.Parts(f"{type(node).__name__}(", comment, items, ")"), style


def line(node: Any, style: text.Style) -> text.Line | None:
  """The line of a layer that holds nothing but Variables and random streams; else None."""
  if style.full or not is_ours(type(node)):
    return None
  if not all(_is_state(value) for _, value, is_data in node._entries() if is_data):
    return None
  counted = summary(x for x in leaves(node) if not is_random(x))
  return text.Line(f"{type(node).__name__}({', '.join(arguments(node))})", counted)


def _is_state(value: Any) -> bool:
  arrays = jax.Array | np.ndarray | jax.ShapeDtypeStruct
  return isinstance(value, Variable | arrays) or is_random(value)


def is_random(x: Any) -> bool:
  """Whether something is a stream of random numbers, or a Variable of one: it is no weight."""
  return getattr(type(x), "_is_random", False)


def is_ours(cls: type) -> bool:
  """Whether Refax defines the constructor of a class, and so its defaults."""
  owner = next(c for c in cls.__mro__ if "__init__" in vars(c))
  return owner.__module__.startswith("refax.") and not owner.__module__.startswith("refax.core.")


def leaves(node: Any) -> list[Any]:
  """The distinct Variables and arrays below an object."""
  return list(flatten(node).leaves)


def totals(leaves: Iterable[Any]) -> dict[str, tuple[int, int]]:
  """The number of elements and of bytes by the type of the Variables."""
  found: dict[str, tuple[int, int]] = {}
  for leaf in leaves:
    name = type(leaf).__name__ if isinstance(leaf, Variable) else "Array"
    n, nbytes = text.size(leaf.get_raw_value() if isinstance(leaf, Variable) else leaf)
    if n:
      before = found.get(name, (0, 0))
      found[name] = before[0] + n, before[1] + nbytes
  return found


def summary(leaves: Iterable[Any]) -> str:
  """`Param: 6 (24 B), BatchStat: 2 (8 B), Total: 8 (32 B)`: what an object holds, by type."""
  by_type = totals(leaves)
  parts = [f"{name}: {text.count(*sizes)}" for name, sizes in by_type.items()]
  if len(parts) > 1:
    parts.append(f"Total: {text.count(*map(sum, zip(*by_type.values(), strict=True)))}")
  return ", ".join(parts)


def arguments(node: Any) -> list[str]:
  """The arguments that an object was built with, as far as its attributes tell.

  >>> from refax import nnx
  >>> arguments(nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)))
  ['2', '3', 'use_bias=False']
  """
  return [
    text.short(value) if by_position else f"{name}={text.short(value)}"
    for name, value, by_position in given(node)
  ]


def given(node: Any) -> list[tuple[str, Any, bool]]:
  """(name, value, is it positional) of the arguments that differ from the defaults."""
  attributes = {key: value for key, value, is_data in node._entries() if not is_data}
  found, is_in_a_row = [], True
  for name, by_position, default in _parameters(type(node).__init__):
    value = attributes.get(name, MISSING)
    if value is MISSING or (default is not MISSING and _same(value, default)):
      is_in_a_row = False
      continue
    is_in_a_row = is_in_a_row and by_position and default is MISSING
    found.append((name, value, is_in_a_row))
  return found


@functools.lru_cache(maxsize=1024)
def _parameters(init: Any) -> list[tuple[str, bool, Any]]:
  """(name, may it be given by position, default) of each parameter of a constructor."""
  try:
    parameters = list(inspect.signature(init).parameters.values())[1:]
  except (TypeError, ValueError):
    return []
  variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
  keyword_only = inspect.Parameter.KEYWORD_ONLY
  return [
    (p.name, p.kind is not keyword_only, p.default)
    for p in parameters
    if p.kind not in variadic and p.name not in HIDDEN
  ]


def _is_default(node: Any, name: str, value: Any) -> bool:
  """Whether an attribute is as a layer of Refax, which the user's class extends, makes it."""
  layers = [c for c in type(node).__mro__[1:] if "__init__" in vars(c) and is_ours(c)]
  return any(
    name == parameter and default is not MISSING and _same(value, default)
    for layer in layers
    for parameter, _, default in _parameters(layer.__init__)
  )


def _same(value: Any, default: Any) -> bool:
  """Whether an attribute is as the default makes it: sizes may have become tuples."""
  if value is default:
    return True
  if isinstance(value, tuple) and isinstance(default, int | float | str) and value:
    return all(_same(x, default) for x in value)
  if isinstance(value, tuple) and not value and isinstance(default, Mapping | Sequence):
    return not default
  try:
    return _are_equal(value, default)
  except Exception:  # an attribute may be anything: what cannot be compared differs
    return False


def _are_equal(a: Any, b: Any) -> bool:
  if _is_dtype(a) and _is_dtype(b):
    return jnp.dtype(a) == jnp.dtype(b)
  return bool(a == b) or bool(a != a and b != b)


def _is_dtype(x: Any) -> bool:
  is_scalar = isinstance(x, type) and (issubclass(x, np.generic) or hasattr(x, "dtype"))
  return isinstance(x, np.dtype) or is_scalar


def _wrapped(given: list[str]) -> list[str]:
  """Arguments on as few lines as hold them."""
  lines: list[str] = []
  for argument in given:
    if lines and len(lines[-1]) + len(argument) + 2 <= WIDTH:
      lines[-1] += f", {argument}"
    else:
      lines.append(argument)
  return lines
