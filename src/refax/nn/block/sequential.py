"""Sequential: layers one after the other."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, overload

from refax.core.containers import List
from refax.core.module import Module
from refax.errors import InvalidArgumentError


class Sequential(Module):
  """Layers, or any functions, one after the other.

  A layer that returns a tuple calls the next one with positional arguments, a dict with keyword
  arguments. Keyword arguments of the call go to each layer that has a parameter of this name.

  Args:
    *layers: Modules and functions.

  Raises:
    InvalidArgumentError: one of them cannot be called.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> rngs = nnx.Rngs(0)
  >>> model = nnx.Sequential(nnx.Linear(2, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 1, rngs=rngs))
  >>> model(jnp.ones((4, 2))).shape, len(model), model[1] is nnx.relu
  ((4, 1), 3, True)
  """

  def __init__(self, *layers: Callable[..., Any]):
    for layer in layers:
      if not callable(layer):
        raise InvalidArgumentError.value(
          "Sequential", "layer", layer, "Modules and functions: nnx.Sequential(*layers)"
        )
    self.layers: List[Callable[..., Any]] = List(layers)

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Call the layers.

    Args:
      *args: arguments of the first layer.
      **kwargs: for each layer that has a parameter of this name.

    Returns:
      What the last layer returns; without layers, the arguments.

    Raises:
      InvalidArgumentError: no layer has a parameter of this name.
    """
    output: Any = args[0] if len(args) == 1 else args or None
    named: dict[str, Any] = {}
    unused = set(kwargs)
    for layer in self.layers:
      accepted = _accepted(layer, len(args), kwargs)
      unused.difference_update(accepted)
      output = layer(*args, **named, **accepted)
      args, named = output if isinstance(output, tuple) else (output,), {}
      if isinstance(output, dict):
        args, named = (), output
    if unused:
      raise InvalidArgumentError.value(
        "Sequential", sorted(unused)[0], kwargs[sorted(unused)[0]], "what some layer takes"
      )
    return output

  def __len__(self) -> int:
    return len(self.layers)

  def __iter__(self) -> Iterator[Callable[..., Any]]:
    return iter(self.layers)

  @overload
  def __getitem__(self, index: int) -> Callable[..., Any]: ...
  @overload
  def __getitem__(self, index: slice) -> "Sequential": ...
  def __getitem__(self, index):
    if isinstance(index, slice):
      return Sequential(*self.layers[index])
    return self.layers[index]


def _accepted(layer: Callable, positional: int, kwargs: dict[str, Any]) -> dict[str, Any]:
  """The keyword arguments that `layer` takes besides `positional` positional ones."""
  if not kwargs:
    return {}
  try:
    parameters = list(inspect.signature(layer).parameters.values())
  except (TypeError, ValueError):  # some built-in functions have no signature
    return {}
  if any(p.kind is p.VAR_KEYWORD for p in parameters):
    return kwargs
  bound = {p.name for p in parameters[:positional] if p.kind is not p.KEYWORD_ONLY}
  named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
  names = named - bound
  return {name: value for name, value in kwargs.items() if name in names}
