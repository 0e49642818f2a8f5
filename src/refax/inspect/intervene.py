"""nnx.intervene: another result in the place of what a Module computes, without touching it."""

from collections.abc import Callable, Mapping
from typing import Any

from refax.core import calls
from refax.core.calls import Call, Observer
from refax.core.filters import Filter
from refax.inspect.choice import Choice, Presence
from refax.inspect.target import like, owner_and_function


def intervene(
  fn: Callable,
  changes: Mapping[Filter, Callable[[Any], Any]],
  *,
  method: str = "__call__",
) -> Callable[..., Any]:
  """A function in which what some Modules compute is replaced: for ablations and steering.

  The model stays as it is. It works compiled and in every transform: what JAX has compiled
  without the changes is traced again with them.

  Args:
    fn: a Module, or a function of Modules and arrays; it may be compiled.
    changes: for Modules (a type, a path such as `"encoder/layers/*"`, or a predicate, as in
      `nnx.capture`) a function from what they return to what is used in its place.
    method: the name of the method whose result is replaced.

  Returns:
    A function like `fn`.

  Raises:
    FilterError: no Module is at such a path.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> rngs = nnx.Rngs(0)
  >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs))
  >>> silent = nnx.intervene(model, {"layers/0": jnp.zeros_like})
  >>> silent(jnp.ones((1, 2))).tolist(), bool(model(jnp.ones((1, 2))).any())
  ([[0.0]], True)
  """
  observer = _Changes([(Choice.of([which]), change) for which, change in changes.items()], method)
  owner, function = owner_and_function(fn)
  presence = Presence(changes, is_root=bool(owner))

  def wrapper(*args: Any, **kwargs: Any) -> Any:
    presence.check(owner or (*args, *kwargs.values()))
    with calls.observing(observer, *owner):
      return function(*owner, *args, **kwargs)

  return like(fn, wrapper)


class _Changes(Observer):
  """Replaces what chosen Modules return."""

  def __init__(self, changes: list[tuple[Choice, Callable[[Any], Any]]], method: str):
    super().__init__(("intervene", tuple(changes), method))
    self._changes, self._method = changes, method

  def leave(self, call: Call, result: Any) -> Any:
    if call.method == self._method:
      for choice, change in self._changes:
        if choice.has(call.path, call.module):
          result = change(result)
    return result
