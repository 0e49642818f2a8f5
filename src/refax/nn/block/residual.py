"""Residual: a layer whose input is added to its output."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Shaped

from refax.core.module import Module
from refax.errors import InvalidArgumentError, ShapeMismatchError
from refax.nn import check, explicit
from refax.typing import ArrayLike


class Residual(Module):
  """`shortcut(x) + layer(x)`, as in "Deep Residual Learning for Image Recognition",
  He et al. 2015, arXiv:1512.03385.

  Args:
    layer: a Module or function.
    shortcut: what to do with the input before it is added, such as a convolution where the sizes
      change; by default nothing.

  Raises:
    InvalidArgumentError: one of them cannot be called.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> block = nnx.Residual(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
  >>> x = jnp.ones((2, 3))
  >>> bool((block(x) == x + block.layer(x)).all())
  True
  """

  def __init__(
    self, layer: Callable[..., Any], *, shortcut: Callable[[jax.Array], jax.Array] | None = None
  ):
    for name, value in {"layer": layer, "shortcut": shortcut}.items():
      if not callable(value) and (name == "layer" or value is not None):
        raise InvalidArgumentError.value("Residual", name, value, "a Module or function")
    self.layer = layer
    self.shortcut = shortcut

  def __call__(
    self, x: Shaped[ArrayLike, "*shape"], *args: Any, **kwargs: Any
  ) -> Shaped[jax.Array, "*shape"]:
    """Call the layer and add.

    Args:
      x: the first argument of the layer.
      *args: more of them.
      **kwargs: its keyword arguments.

    Returns:
      An array of the shape of what the layer returns.

    Raises:
      ShapeMismatchError: the layer returns another shape than what is to be added.
    """
    x = check.as_input(x)
    y = self.layer(x, *args, **kwargs)
    added = x if self.shortcut is None else self.shortcut(x)
    if y.shape != added.shape:
      raise ShapeMismatchError(
        "Residual adds two arrays of one shape",
        got=f"shape {y.shape} from the layer, {added.shape} to add",
        fix="pass a shortcut that makes the input fit: nnx.Residual(layer, shortcut=...)",
      )
    return explicit.add(added, y)
