"""Hyperparams: those that `optax.inject_hyperparams` keeps in the state of an optimizer."""

from collections.abc import Iterator, MutableMapping
from typing import Any

from refax.core.variable import Variable
from refax.errors import InvalidArgumentError, MissingHyperparamError


class Hyperparams(MutableMapping[str, Any]):
  """What `optimizer.hyperparams` is: a mapping from names to Variables.

  An assignment writes the Variable in place, so that a compiled step sees it.

  Args:
    opt_state: the state of an optax transformation, with Variables as leaves.

  >>> from refax import nnx; import optax
  >>> tx = optax.inject_hyperparams(optax.adam)(learning_rate=0.5)
  >>> optimizer = nnx.Optimizer(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param)
  >>> optimizer.hyperparams["learning_rate"] = 0.25
  >>> float(optimizer.hyperparams["learning_rate"])
  0.25
  """

  def __init__(self, opt_state: Any):
    self._found: dict[str, list[tuple[Variable, bool]]] = {}
    for state in _injected(opt_state):
      scheduled = getattr(state, "hyperparams_states", {})
      for name, variable in state.hyperparams.items():
        self._found.setdefault(name, []).append((variable, name in scheduled))

  def __getitem__(self, name: str) -> Variable:
    return self._one(name)[0]

  def __setitem__(self, name: str, value: Any) -> None:
    variable, scheduled = self._one(name)
    if scheduled:
      want = "a number to optax.inject_hyperparams: a schedule sets it anew at each update"
      raise InvalidArgumentError.value("Optimizer.hyperparams", name, value, want)
    variable[...] = value

  def __delitem__(self, name: str) -> None:
    raise TypeError("hyper-parameters cannot be deleted")

  def __iter__(self) -> Iterator[str]:
    return iter(self._found)

  def __len__(self) -> int:
    return len(self._found)

  def __repr__(self) -> str:
    return f"Hyperparams({', '.join(self)})"

  def _one(self, name: str) -> tuple[Variable, bool]:
    found = self._found.get(name, [])
    if len(found) != 1:
      raise MissingHyperparamError.name(name, list(self._found), len(found))
    return found[0]


def _injected(state: Any) -> Iterator[Any]:
  """The states of `optax.inject_hyperparams` in a state, from the outside in."""
  if isinstance(getattr(state, "hyperparams", None), dict):
    yield state
  children = state.values() if isinstance(state, dict) else state
  if isinstance(children, list | tuple) or children is not state:
    for child in children:
      yield from _injected(child)
