"""Rules from the names of a file to those of a model, and what is done to arrays on the way."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from refax.errors import InvalidArgumentError

Transform: TypeAlias = Callable[[Any], Any]
"""From the array of the file to the array of the model: a transposition, a reshape, a cast."""

Renamed: TypeAlias = str | tuple[str, Transform] | None
Rename: TypeAlias = Mapping[str, Renamed] | Callable[[str], Renamed]
"""Regular expressions to names, or a function of a name; None: the tensor is not wanted."""


class Target(NamedTuple):
  """Where a tensor of the file goes, and what is done to it first, in order."""

  name: str
  transforms: tuple[Transform, ...] = ()

  def apply(self, x: Any) -> Any:
    """The array for the model."""
    for transform in self.transforms:
      x = transform(x)
    return x


def renamer(
  rename: Rename | None, function: str = "load_safetensors"
) -> Callable[[str], Target | None]:
  r"""The function from a name in the file to the target, or None for what is not wanted.

  Args:
    rename: what the user passed.
    function: to what, for errors.

  Raises:
    InvalidArgumentError: `rename` is neither rules nor a function, or a rule makes no sense.

  >>> import numpy as np
  >>> target = renamer({r"model\.(.*)": r"\1", r"(.*)\.weight": (r"\1.kernel", np.transpose)})
  >>> target("model.out.weight").name, target("model.out.bias")
  ('out.kernel', Target(name='out.bias', transforms=()))
  """
  if rename is None:
    return Target
  if isinstance(rename, Mapping):
    rules = [_rule(pattern, renamed, function) for pattern, renamed in rename.items()]
    return lambda name: _by_rules(name, rules, function)
  if not callable(rename):
    want = "a dict of regular expressions, or a function of a name"
    raise _refusal(rename, want, function)
  return lambda name: _target(name, rename(name), function)


def _rule(pattern: Any, renamed: Any, function: str) -> tuple[re.Pattern[str], Any]:
  try:
    compiled = re.compile(pattern)
  except (re.error, TypeError) as error:
    raise _refusal(pattern, f"a regular expression ({error})", function) from None
  _target(pattern, renamed, function)  # another kind is refused also where nothing matches
  return compiled, renamed


def _by_rules(name: str, rules: list[tuple[re.Pattern[str], Any]], function: str) -> Target | None:
  target = Target(name)
  for pattern, renamed in rules:
    match = pattern.fullmatch(target.name)
    if match is None:
      continue
    new = _target(name, renamed, function)
    if new is None:
      return None
    try:
      target = Target(match.expand(new.name), target.transforms + new.transforms)
    except (re.error, IndexError) as error:
      want = f"a replacement for {pattern.pattern!r} ({error})"
      raise _refusal(new.name, want, function) from None
  return target


def _target(name: str, renamed: Any, function: str) -> Target | None:
  if renamed is None:
    return None
  if isinstance(renamed, str):
    return Target(renamed)
  if isinstance(renamed, tuple) and len(renamed) == 2:
    new, transform = renamed
    if isinstance(new, str) and callable(transform):
      return Target(new, (transform,))
  want = f"for {name!r} a name, (name, function of the array) or None"
  raise _refusal(renamed, want, function)


def _refusal(value: Any, want: str, function: str) -> InvalidArgumentError:
  return InvalidArgumentError.value(function, "rename", value, want)
