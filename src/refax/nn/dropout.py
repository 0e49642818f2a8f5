"""Dropout: zeros at random."""

import functools
from collections.abc import Sequence
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Shaped

from refax.core.module import Module
from refax.errors import InvalidArgumentError, MissingArgumentError, MissingRngError
from refax.nn import check, dtypes, explicit
from refax.rngs import Rngs, RngStream
from refax.typing import ArrayLike


@functools.partial(jax.jit, static_argnums=(2, 3))
def _dropped(key: jax.Array, x: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
  """An array with elements set to zero; those of one place in `shape` go together."""
  keep = jax.random.bernoulli(key, 1 - rate, shape)
  scaled = dtypes.divided(x, 1 - rate)
  return lax.select(jnp.broadcast_to(keep, x.shape), scaled, jnp.zeros_like(scaled))


class Dropout(Module):
  """Set elements to zero at random, and scale the others so that the mean stays.

  Active when it is built; `model.eval()` turns it off.

  Args:
    rate: the probability of a zero, from 0 to 1.
    broadcast_dims: axes along which all elements share their fate.
    deterministic: whether to pass the input through; None to be told at each call.
    rng_collection: the name of the random stream.
    rngs: a stream of its own is forked from it; None if it will come with each call.

  Raises:
    InvalidArgumentError: the rate is not from 0 to 1, or `rngs` is not a random stream.
    MissingRngError: `rngs` has no such stream.

  >>> from refax import nnx; import jax.numpy as jnp
  >>> dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
  >>> sorted(set(dropout(jnp.ones(100)).tolist()))
  [0.0, 2.0]
  >>> dropout.eval(); dropout(jnp.ones(3)).tolist()
  [1.0, 1.0, 1.0]
  """

  def __init__(
    self,
    rate: float,
    *,
    broadcast_dims: Sequence[int] = (),
    deterministic: bool | None = False,
    rng_collection: str = "dropout",
    rngs: Rngs | RngStream | None = None,
  ):
    if not isinstance(rate, Real) or not 0 <= rate <= 1:
      raise InvalidArgumentError.value("Dropout", "rate", rate, "a number from 0 to 1")
    if rngs is not None and not isinstance(rngs, Rngs | RngStream):
      raise InvalidArgumentError.value("Dropout", "rngs", rngs, "rngs=nnx.Rngs(0)")
    self.rate = float(rate)  # a NumPy scalar would widen the output
    self.broadcast_dims = tuple(broadcast_dims)
    self.deterministic = deterministic
    self.rng_collection = rng_collection
    stream = rngs[rng_collection] if isinstance(rngs, Rngs) else rngs
    self.rngs: RngStream | None = None if stream is None else stream.fork()

  def set_view(self, deterministic: bool | None = None) -> None:
    """What `nnx.view` sets.

    Args:
      deterministic: whether to pass the input through.
    """
    if deterministic is not None:
      self.deterministic = deterministic

  def __call__(
    self,
    inputs: Shaped[ArrayLike, "*shape"],
    *,
    deterministic: bool | None = None,
    rngs: Rngs | RngStream | jax.Array | None = None,
  ) -> Shaped[jax.Array, "*shape"]:
    """Drop elements.

    Args:
      inputs: `[...]`.
      deterministic: goes before the attribute, if not None.
      rngs: streams or a key; they go before the layer's own stream, if not None.

    Returns:
      An array of the same shape.

    Raises:
      MissingArgumentError: `deterministic` is None in both places.
      MissingRngError: random numbers are needed and `rngs` is None in both places.
      InvalidArgumentError: `rngs` gives no keys.
      ShapeMismatchError: the input has no such axis to broadcast.
    """
    x = check.as_input(inputs)
    deterministic = self.deterministic if deterministic is None else deterministic
    if deterministic is None:
      raise MissingArgumentError.flag("Dropout", "deterministic")
    if deterministic or self.rate == 0:
      return x
    if self.rate == 1:  # 0 / 0 where the kept ones are scaled
      return jnp.zeros_like(x)
    shared = check.normalized_axes("Dropout", x, self.broadcast_dims)
    shape = tuple(1 if axis in shared else n for axis, n in enumerate(x.shape))
    drop = lambda x, key: _dropped(key, x, self.rate, shape)
    return explicit.call_like(drop, x, self._key(rngs))

  def _key(self, rngs: Any) -> jax.Array:
    """A key from what came with the call, or else from the layer's own stream."""
    rngs = self.rngs if rngs is None else rngs
    if rngs is None:
      raise MissingRngError.layer("Dropout", self.rng_collection)
    if isinstance(rngs, Rngs):
      return rngs[self.rng_collection]()
    if isinstance(rngs, RngStream):
      return rngs()
    if isinstance(rngs, jax.Array):
      return rngs
    raise InvalidArgumentError.value("Dropout", "rngs", rngs, "nnx.Rngs(0) or jax.random.key(0)")
