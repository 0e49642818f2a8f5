"""What users note beside their arrays, as JSON, from which it comes back as it was.

JSON has no tuples, no bytes, and no keys but strings: as it is, it would make lists and strings of
them in silence. Here a dict with one key that begins with `$` stands for each of these.
"""

from typing import Any

import numpy as np

from refax.errors import InvalidArgumentError
from refax.typing import Path, path_str

_DICT, _TUPLE, _BYTES = "$dict", "$tuple", "$bytes"
WANTED = "numbers, strings, bytes, bools and None, in dicts, lists and tuples"


def encoded(function: str, name: str, value: Any) -> Any:
  """`value` as JSON can hold it.

  Args:
    function: what the user called, for the error.
    name: the argument that `value` came as.
    value: numbers, strings, bytes, bools and None, in dicts, lists and tuples.

  Raises:
    InvalidArgumentError: there is something else in it; its path is named.

  >>> encoded("save", "user", {"shape": (1, 2)})
  {'shape': {'$tuple': [1, 2]}}
  >>> decoded(encoded("save", "user", {1: (2, b"3")}))
  {1: (2, b'3')}
  """

  def visit(x: Any, path: Path, above: tuple[int, ...]) -> Any:
    inner = lambda key, child: visit(child, (*path, key), (*above, id(x)))
    if id(x) in above:
      raise InvalidArgumentError.value(
        function, name + path_str(path), x, "what is not inside itself"
      )
    if isinstance(x, dict) and all(type(key) is str for key in x):
      plain = {key: inner(key, child) for key, child in x.items()}
      return {_DICT: list(map(list, plain.items()))} if _is_tagged(plain) else plain
    if isinstance(x, dict):
      return {_DICT: [[inner("keys", key), inner(key, child)] for key, child in x.items()]}
    if type(x) in (list, tuple):
      items = [inner(i, child) for i, child in enumerate(x)]
      return items if type(x) is list else {_TUPLE: items}
    if isinstance(x, bytes):
      return {_BYTES: x.hex()}
    x = x.item() if isinstance(x, np.bool_ | np.integer | np.floating) else x
    if x is None or isinstance(x, str | bool | int | float):
      return x
    raise InvalidArgumentError.value(function, name + path_str(path), x, WANTED)

  return visit(value, (), ())


def decoded(value: Any) -> Any:
  """What `encoded` was given."""
  if isinstance(value, list):
    return [decoded(x) for x in value]
  if not isinstance(value, dict):
    return value
  if not _is_tagged(value):
    return {key: decoded(x) for key, x in value.items()}
  ((tag, x),) = value.items()
  if tag == _BYTES:
    return bytes.fromhex(x)
  if tag == _TUPLE:
    return tuple(decoded(x))
  return {decoded(key): decoded(child) for key, child in x}


def _is_tagged(value: dict[str, Any]) -> bool:
  return len(value) == 1 and next(iter(value)) in (_DICT, _TUPLE, _BYTES)
