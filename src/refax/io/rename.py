"""Rules from the names of a file to those of a model, and what is done to arrays on the way.

A tensor of the file usually goes to one place. It goes to several where it holds several (queries,
keys and values one under the other), and to none where it is not wanted.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from refax.errors import InvalidArgumentError

Transform: TypeAlias = Callable[[Any], Any]
"""From the array of the file to the array of the model: a transposition, a reshape, a cast."""

One: TypeAlias = str | tuple[str, Transform]
Renamed: TypeAlias = One | list[One] | None
Rename: TypeAlias = Mapping[str, Renamed] | Callable[[str], Renamed]
"""Regular expressions to names, or a function of a name; None: the tensor is not wanted."""


class LayoutError(Exception):
  """Raised by a `Transform` that knows what is wrong with an array: the text says what to do."""


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
) -> Callable[[str], list[Target]]:
  r"""The function from a name in the file to its targets; there are none for what is not wanted.

  Args:
    rename: what the user passed.
    function: to what, for errors.

  Raises:
    InvalidArgumentError: `rename` is neither rules nor a function, or a rule makes no sense.

  >>> import numpy as np
  >>> targets = renamer({r"model\.(.*)": r"\1", r"(.*)\.weight": (r"\1.kernel", np.transpose)})
  >>> targets("model.out.weight")[0].name, targets("model.out.bias")
  ('out.kernel', [Target(name='out.bias', transforms=())])
  """
  if rename is None:
    return lambda name: [Target(name)]
  if isinstance(rename, Mapping):
    rules = [_rule(pattern, renamed, function) for pattern, renamed in rename.items()]
    return lambda name: _by_rules(name, rules, function)
  if not callable(rename):
    want = "a dict of regular expressions, or a function of a name"
    raise _refusal(rename, want, function)
  return lambda name: _targets(name, rename(name), function)


def _rule(pattern: Any, renamed: Any, function: str) -> tuple[re.Pattern[str], Any]:
  try:
    compiled = re.compile(pattern)
  except (re.error, TypeError) as error:
    raise _refusal(pattern, f"a regular expression ({error})", function) from None
  _targets(pattern, renamed, function)  # another kind is refused also where nothing matches
  return compiled, renamed


def _by_rules(name: str, rules: list[tuple[re.Pattern[str], Any]], function: str) -> list[Target]:
  targets = [Target(name)]
  for pattern, renamed in rules:
    targets = [new for old in targets for new in _by_rule(old, pattern, renamed, function)]
  return targets


def _by_rule(old: Target, pattern: re.Pattern[str], renamed: Any, function: str) -> list[Target]:
  match = pattern.fullmatch(old.name)
  if match is None:
    return [old]
  return [
    Target(expanded(match, new.name, function), old.transforms + new.transforms)
    for new in _targets(old.name, renamed, function)
  ]


def expanded(match: re.Match[str], replacement: str, function: str) -> str:
  """The replacement with the groups of the match in it.

  Raises:
    InvalidArgumentError: it names a group that there is not.
  """
  try:
    return match.expand(replacement)
  except (re.error, IndexError) as error:
    want = f"a replacement for {match.re.pattern!r} ({error})"
    raise _refusal(replacement, want, function) from None


def _targets(name: str, renamed: Any, function: str) -> list[Target]:
  ones = renamed if isinstance(renamed, list) else [] if renamed is None else [renamed]
  targets = [_target(one) for one in ones]
  if any(target is None for target in targets):
    want = f"for {name!r} a name, (name, function of the array) or None; or a list of such targets"
    raise _refusal(renamed, want, function)
  return [target for target in targets if target is not None]


def _target(one: Any) -> Target | None:
  if isinstance(one, str):
    return Target(one)
  if isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str) and callable(one[1]):
    return Target(one[0], (one[1],))
  return None


def _refusal(value: Any, want: str, function: str) -> InvalidArgumentError:
  return InvalidArgumentError.value(function, "rename", value, want)
