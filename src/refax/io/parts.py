"""What a user saves: objects with arrays, and iterators, which have a state of their own making."""

import json
from typing import Any, NamedTuple

import jax

from refax.core.processes import gathered_bytes
from refax.errors import InvalidArgumentError
from refax.io.notes import decoded, encoded
from refax.typing import path_str


class Parted(NamedTuple):
  """Objects without those of them that have a state of their own making, and these, by path."""

  objects: Any
  iterators: dict[str, Any]
  copies: list[tuple[dict, dict]]
  """Dicts of the user, and those that stand for them."""

  def hand_back(self) -> None:
    """What was filled in a copy of a dict is the user's."""
    for original, copy in self.copies:
      original.update({k: v for k, v in copy.items() if type(v) is not dict})


def part(function: str, objects: Any) -> Parted:
  """Take the iterators out of nested dicts.

  Raises:
    InvalidArgumentError: two iterators have one name, or the keys of a dict cannot be sorted.
  """
  if _is_iterator(objects):
    return Parted({}, {"": objects}, [])
  found = Parted(None, {}, [])
  return found._replace(objects=_taken_apart(function, objects, (), found))


def _taken_apart(function: str, tree: Any, path: tuple, found: Parted) -> Any:
  """What is saved in the place of a part; what is taken out of it is added to `found`."""
  if type(tree) is not dict:
    return tree
  _check_keys(function, tree, path)
  for key, value in tree.items():
    if _is_iterator(value):
      name = ".".join(map(str, (*path, key)))
      if name in found.iterators:
        raise InvalidArgumentError.value(function, "name of an iterator", name, "other keys")
      found.iterators[name] = value
  inner = lambda key, value: _taken_apart(function, value, (*path, key), found)
  copy = {k: inner(k, v) for k, v in tree.items() if not _is_iterator(v)}
  found.copies.append((tree, copy))
  return copy


def _check_keys(function: str, tree: dict, path: tuple) -> None:
  """JAX sorts the keys of a dict, and says no more than that it cannot."""
  try:
    sorted(tree)
  except TypeError:
    want = "keys that can be sorted: all ints, or all strings"
    raise InvalidArgumentError.value(function, f"dict{path_str(path)}", list(tree), want) from None


def _is_iterator(x: Any) -> bool:
  methods = ("get_state", "set_state")  # of its class: an Rngs has attributes of any name
  return all(callable(getattr(type(x), name, None)) for name in methods)


def states_of(function: str, iterators: dict[str, Any]) -> dict[str, Any]:
  """The states of iterators as JSON, by name: one for all processes, or that of each."""
  states = {name: _state_of(function, name, x) for name, x in iterators.items()}
  if jax.process_count() == 1 or not states:
    return states
  everywhere = [json.loads(x) for x in gathered_bytes(json.dumps(states).encode())]
  return {
    name: mine if all(x.get(name) == mine for x in everywhere) else _each(name, everywhere)
    for name, mine in states.items()
  }


def _each(name: str, everywhere: list[dict[str, Any]]) -> dict[str, Any]:
  return {"processes": [states.get(name) for states in everywhere]}


def _state_of(function: str, name: str, iterator: Any) -> Any:
  """The state of an iterator as JSON."""
  state = iterator.get_state()
  if isinstance(state, bytes):
    return {"bytes": state.hex()}
  return {"json": encoded(function, f"state of the iterator {name}".rstrip(), state)}


def state_from(name: str, kept: dict[str, Any]) -> Any:
  """What the iterator of this process had said.

  Raises:
    InvalidArgumentError: each process had a place of its own, and there were not as many.
  """
  if "processes" in kept:
    states = kept["processes"]
    if len(states) != jax.process_count():
      want = (
        f"{len(states)} processes, as when it was saved; each had its own state of the iterator"
      )
      got = f"{jax.process_count()} processes"
      raise InvalidArgumentError.value("Checkpointer.restore", f"iterator {name}", got, want)
    kept = states[jax.process_index()]
  return bytes.fromhex(kept["bytes"]) if "bytes" in kept else decoded(kept["json"])
